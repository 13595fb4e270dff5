# SPDX-License-Identifier: MIT OR Apache-2.0
"""Every error that this package raises on purpose; none of them knows HTTP.

::

    EmbeddingServerError
    ├── InvalidRequest                the client must change its request
    │   ├── ContextLengthExceeded     an input is longer than the model's limit
    │   ├── ModelNotFound             no model of that name is served
    │   ├── BodyTooLarge              the request's body is over the limit
    │   ├── BodyTooSlow               the request's body takes too long to arrive
    │   ├── UnsupportedContent        the body is not plain JSON
    │   ├── FingerprintMismatch       the client's stored vectors are of another model
    │   └── Unauthenticated           the API key is missing or wrong
    ├── Overloaded                    the queue is full
    ├── DeadlineExceeded              the request took longer than the client allows
    ├── NotReady                      starting, draining, or the model's engine has died
    │   └── InferenceTimedOut         a batch hangs and holds the cores
    ├── InferenceFailed               a batch failed, or its vectors are not finite
    ├── OutOfMemory                   no memory for an input, even alone
    ├── ConfigurationError            settings that can't work, alone or together
    └── ModelError                    a model that is not available or can't be run
        ├── ModelUnavailable          its files are not here and can't be downloaded
        └── ModelNotSupported         its files need something that is not computed exactly
"""

from __future__ import annotations

__all__ = [
    "BodyTooLarge",
    "BodyTooSlow",
    "ConfigurationError",
    "ContextLengthExceeded",
    "DeadlineExceeded",
    "EmbeddingServerError",
    "FingerprintMismatch",
    "InferenceFailed",
    "InferenceTimedOut",
    "InvalidRequest",
    "ModelError",
    "ModelNotFound",
    "ModelNotSupported",
    "ModelUnavailable",
    "NotReady",
    "OutOfMemory",
    "Overloaded",
    "Unauthenticated",
    "UnsupportedContent",
]


class EmbeddingServerError(Exception):
    """The root: ``str(error)`` is one or two sentences that say what the user can do.

    ``code`` is a stable identifier for programs, or None.
    """

    code: str | None = None


class InvalidRequest(EmbeddingServerError):
    """The client must change its request.

    ``param`` is the name of the wrong field and ``index`` that of the wrong input; each may be
    None. ``reason`` is the message without them.
    """

    def __init__(
        self,
        reason: str,
        *,
        param: str | None = None,
        code: str | None = None,
        index: int | None = None,
    ) -> None:
        super().__init__(reason if index is None else f"input[{index}] {reason}")
        self.reason = reason
        self.param = param
        self.code = code or self.code
        self.index = index


class ContextLengthExceeded(InvalidRequest):
    """An input is longer than the model's limit, and the request forbids truncation."""

    code = "context_length_exceeded"


class ModelNotFound(InvalidRequest):
    """No model of the requested name is served."""

    code = "model_not_found"


class BodyTooLarge(InvalidRequest):
    """The request's body is over the limit."""

    code = "request_too_large"


class BodyTooSlow(InvalidRequest):
    """The request's body takes too long to arrive."""

    code = "request_timeout"


class UnsupportedContent(InvalidRequest):
    """The request's body is not plain JSON."""


class FingerprintMismatch(InvalidRequest):
    """The client's stored vectors are of another model than the one that is served."""

    code = "fingerprint_mismatch"


class Unauthenticated(InvalidRequest):
    """The API key is missing or wrong."""

    code = "invalid_api_key"


class Overloaded(EmbeddingServerError):
    """The request was not admitted; ``retry_after`` is the expected wait in seconds."""

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineExceeded(EmbeddingServerError):
    """The request took longer than the client allows."""

    code = "deadline_exceeded"


class NotReady(EmbeddingServerError):
    """The server or the model can't serve requests now."""


class InferenceTimedOut(NotReady):
    """A batch takes too long, and holds the cores that this request needs."""

    code = "inference_timeout"


class InferenceFailed(EmbeddingServerError):
    """A batch failed, or its vectors are not finite; other batches are not affected."""


class OutOfMemory(EmbeddingServerError):
    """There is no memory for an input, even alone; other inputs are not affected."""

    code = "out_of_memory"


class ConfigurationError(EmbeddingServerError):
    """Settings that can't work, alone or together."""


class ModelError(EmbeddingServerError):
    """A model that is not available or can't be run."""


class ModelUnavailable(ModelError):
    """The model's files are not on this machine and could not be downloaded."""


class ModelNotSupported(ModelError):
    """The model's files need something that this server does not compute exactly."""
