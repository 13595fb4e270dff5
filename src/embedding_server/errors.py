# SPDX-License-Identifier: MIT OR Apache-2.0
"""Every error this package raises on purpose; none of them knows HTTP.

::

    EmbeddingServerError
    ├── InvalidRequest                the caller can fix it by changing the request
    │   ├── ContextLengthExceeded     an input is over the model's length and may not be cut
    │   ├── ModelNotFound             no model of that name is served
    │   ├── BodyTooLarge              the request's body is over the limit
    │   ├── BodyTooSlow               the request's body takes too long to come
    │   ├── UnsupportedContent        the body is not plain JSON
    │   ├── FingerprintMismatch       the client's stored vectors are of another model
    │   └── Unauthenticated           a key is needed, and none or a wrong one came
    ├── Overloaded                    the queue is full; says when to come back
    ├── DeadlineExceeded              the time that the client gave its request is over
    ├── NotReady                      starting, draining, or the model's engine has died
    │   └── InferenceTimedOut         a batch hangs, and what needs its cores can't go on
    ├── InferenceFailed               a batch failed, or gave values that are not finite
    ├── OutOfMemory                   no memory for an input, even alone
    ├── ConfigurationError            a setting, or a mix of settings, that can't work
    └── ModelError                    a model that can't be had or can't be run
        ├── ModelUnavailable          its files are neither here nor to be fetched
        └── ModelNotSupported         its files ask for something we can't do exactly
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
    """The root: ``str(error)`` is one or two sentences that a user can act on.

    ``code`` is a stable identifier for programs, or None.
    """

    code: str | None = None


class InvalidRequest(EmbeddingServerError):
    """The request can't be served as it is.

    ``param`` is the name of the request's field at fault and ``index`` the input's place; each
    may be None. ``reason`` is the message without that place.
    """

    default_code: str | None = None

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
        self.code = code or self.default_code
        self.index = index


class ContextLengthExceeded(InvalidRequest):
    """An input is longer than the model's limit and the request forbids cutting it."""

    default_code = "context_length_exceeded"


class ModelNotFound(InvalidRequest):
    """No model of the requested name is served."""

    default_code = "model_not_found"


class BodyTooLarge(InvalidRequest):
    """The request's body is over the limit."""

    default_code = "request_too_large"


class BodyTooSlow(InvalidRequest):
    """The request's body takes too long to come."""

    default_code = "request_timeout"


class UnsupportedContent(InvalidRequest):
    """The request's body is not plain JSON."""


class FingerprintMismatch(InvalidRequest):
    """The client's stored vectors and those of the served model do not match."""

    default_code = "fingerprint_mismatch"


class Unauthenticated(InvalidRequest):
    """An API key is set, and the request has none or a wrong one."""

    default_code = "invalid_api_key"


class Overloaded(EmbeddingServerError):
    """Admission was refused; ``retry_after`` is the expected wait in seconds."""

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineExceeded(EmbeddingServerError):
    """The time that the client gave its request is over."""

    code = "deadline_exceeded"


class NotReady(EmbeddingServerError):
    """The server or the model can't take requests now."""


class InferenceTimedOut(NotReady):
    """A batch is over its time, and holds the cores that this request needs."""

    code = "inference_timeout"


class InferenceFailed(EmbeddingServerError):
    """A batch raised, or its vectors were not finite; other batches go on."""


class OutOfMemory(EmbeddingServerError):
    """There was no memory for an input, even alone; others go on."""

    code = "out_of_memory"


class ConfigurationError(EmbeddingServerError):
    """A setting, or a mix of settings, that can't work."""


class ModelError(EmbeddingServerError):
    """A model that can't be had or can't be run."""


class ModelUnavailable(ModelError):
    """The model's files are not on this machine and could not be downloaded."""


class ModelNotSupported(ModelError):
    """The model's files ask for something this server can't do exactly."""
