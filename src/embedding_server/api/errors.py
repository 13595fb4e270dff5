# SPDX-License-Identifier: MIT OR Apache-2.0
"""From exceptions to HTTP: the table of statuses, and the shape of every error."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import orjson
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match
from starlette.types import Receive, Scope, Send

from embedding_server.api.record import record_of
from embedding_server.errors import (
    BodyTooLarge,
    BodyTooSlow,
    ConfigurationError,
    ContextLengthExceeded,
    DeadlineExceeded,
    EmbeddingServerError,
    FingerprintMismatch,
    InferenceFailed,
    InferenceTimedOut,
    InvalidRequest,
    ModelError,
    ModelNotFound,
    ModelNotSupported,
    ModelUnavailable,
    NotReady,
    OutOfMemory,
    Overloaded,
    Unauthenticated,
    UnsupportedContent,
)

__all__ = ["ERROR_STATUS", "ErrorAnswer", "add_error_handlers", "error_answer", "fault_answer"]

logger = logging.getLogger(__name__)

ERROR_STATUS: Mapping[type[EmbeddingServerError], tuple[int, str]] = {
    InvalidRequest: (400, "invalid_request_error"),
    ContextLengthExceeded: (400, "invalid_request_error"),
    Unauthenticated: (401, "invalid_request_error"),
    ModelNotFound: (404, "invalid_request_error"),
    BodyTooSlow: (408, "invalid_request_error"),
    FingerprintMismatch: (409, "invalid_request_error"),
    BodyTooLarge: (413, "invalid_request_error"),
    UnsupportedContent: (415, "invalid_request_error"),
    Overloaded: (429, "rate_limit_error"),
    InferenceFailed: (500, "server_error"),
    ConfigurationError: (500, "server_error"),
    EmbeddingServerError: (500, "server_error"),
    NotReady: (503, "service_unavailable"),
    InferenceTimedOut: (503, "service_unavailable"),
    OutOfMemory: (503, "service_unavailable"),
    ModelError: (503, "service_unavailable"),
    ModelUnavailable: (503, "service_unavailable"),
    ModelNotSupported: (503, "service_unavailable"),
    DeadlineExceeded: (504, "timeout_error"),
}
"""The status and the JSON ``type`` of every exception of this package."""

_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")

_DEFAULT_CODES = {429: "overloaded", 500: "internal_error", 503: "not_ready"}


class ErrorAnswer(Response):
    """An error as JSON; when it is sent, its code goes into the request's record."""

    media_type = "application/json"

    def __init__(
        self,
        status: int,
        message: str,
        kind: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        code = code or _DEFAULT_CODES.get(status)
        error = {"message": message, "type": kind, "param": param, "code": code}
        self._code = code or kind
        super().__init__(orjson.dumps({"error": error}), status, headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record_of(scope).error_code = self._code
        await super().__call__(scope, receive, send)


def error_answer(error: EmbeddingServerError) -> ErrorAnswer:
    """The answer to a request that failed with ``error``."""
    status, kind = ERROR_STATUS[type(error)]
    headers = {}
    if isinstance(error, Overloaded):
        headers["retry-after"] = str(math.ceil(error.retry_after))
    if isinstance(error, NotReady | OutOfMemory):
        headers["retry-after"] = "1"
    if isinstance(error, Unauthenticated):
        headers["www-authenticate"] = "Bearer"
    param = error.param if isinstance(error, InvalidRequest) else None
    return ErrorAnswer(status, str(error), kind, param=param, code=error.code, headers=headers)


def fault_answer(scope: Scope, error: Exception) -> ErrorAnswer:
    """The answer to an unexpected exception, which is logged once, before that is sent."""
    record = record_of(scope)
    if record.fault is not error:
        record.fault = error
        logger.error("request %s failed", record.id, exc_info=error)
    return ErrorAnswer(500, "The server failed on this request; its log says why.", "server_error")


def add_error_handlers(app: FastAPI) -> None:
    """Answer every exception of a route with an ``ErrorAnswer``."""

    @app.exception_handler(EmbeddingServerError)
    async def ours(request: Request, error: EmbeddingServerError) -> Response:
        return error_answer(error)

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: Exception) -> None:
        """No client is left to answer."""

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> Response:
        return fault_answer(request.scope, error)

    @app.exception_handler(HTTPException)
    async def routing(request: Request, error: HTTPException) -> Response:
        headers = error.headers
        if error.status_code == 404:
            code = "not_found"
            message = f"There is nothing at {request.url.path}; the API is described at /docs."
        elif error.status_code == 405:
            code = "method_not_allowed"
            message = f"{request.method} is not possible at {request.url.path}."
            headers = {"allow": ", ".join(_allowed_methods(request))}
        else:
            code, message = None, str(error.detail)
        return ErrorAnswer(
            error.status_code, message, "invalid_request_error", code=code, headers=headers
        )


def _allowed_methods(request: Request) -> list[str]:
    """The methods of all routes at the request's path; Starlette names those of the first only."""

    def is_allowed(method: str) -> bool:
        scope = {**request.scope, "method": method}
        return any(route.matches(scope)[0] is Match.FULL for route in request.app.router.routes)

    return [method for method in _METHODS if is_allowed(method)]
