"""Around every request: its id, its key, its log line, its metrics, and the last-resort 500."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from embedding_server.api.errors import error_answer, fault_answer
from embedding_server.api.record import RequestRecord, record_of
from embedding_server.errors import EmbeddingServerError, Unauthenticated
from embedding_server.telemetry import Telemetry

__all__ = ["ApiKeyMiddleware", "DirectRoutes", "Endpoint", "RequestMiddleware"]

logger = logging.getLogger(__name__)

# What a client may choose as its id stands in logs and headers: printable, and not endless.
_CLIENT_ID = re.compile(rb"[\x21-\x7e]{1,128}")


_QUIET = frozenset({"/health", "/health/live", "/health/ready", "/metrics"})


class RequestMiddleware:
    """Gives every HTTP request a record, and tells it in a log line and in the metrics."""

    def __init__(self, app: ASGIApp, *, telemetry: Telemetry) -> None:
        self._app = app
        self._telemetry = telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord(_request_id(scope))
        record.attach(scope)
        started = time.perf_counter()
        status: int | None = None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", record.id.encode("ascii")),
                ]
            await send(message)

        self._telemetry.in_flight.inc()
        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            pass
        except Exception as error:
            answer = fault_answer(scope, error)
            if status is None:
                await answer(scope, receive, send_with_id)
        finally:
            self._telemetry.in_flight.dec()
            self._finish(scope, record, status or 499, time.perf_counter() - started)

    def _finish(self, scope: Scope, record: RequestRecord, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path_format", record.route)
        self._telemetry.request_finished(
            route=route, model=record.model, status=status, seconds=seconds
        )
        if record.error_code is not None:
            self._telemetry.error_answered(record.error_code)
        level = logging.INFO
        if status == 500:  # at --log-level error, too, its id must be found
            level = logging.ERROR
        elif route in _QUIET and status < 400:
            # Probes and scrapes come every few seconds, and nobody asks for them.
            level = logging.DEBUG
        if logger.isEnabledFor(level):
            fields: dict[str, object] = {
                "id": record.id,
                "method": scope["method"],
                "route": route,
                "status": status,
                "ms": round(seconds * 1000, 2),
            }
            if record.model:
                fields |= {
                    "model": record.model,
                    "inputs": record.inputs,
                    "tokens": record.tokens,
                    "truncated": record.truncated,
                }
            if record.error_code is not None:
                fields["error"] = record.error_code
            logger.log(level, "request", extra={"fields": fields})


class ApiKeyMiddleware:
    """Asks for one of ``keys`` on every route but health; with no keys, lets all pass."""

    def __init__(self, app: ASGIApp, *, keys: Iterable[str]) -> None:
        self._app = app
        # Only digests stay in memory, and comparing them takes the same time for every guess.
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._digests or _is_health(scope["path"]):
            await self._app(scope, receive, send)
            return
        scheme, _, key = _header(scope, b"authorization").partition(b" ")
        digest = _digest(key.strip())
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() == b"bearer" and any(matches):
            await self._app(scope, receive, send)
            return
        what = "is not valid" if key else "is missing"
        answer = error_answer(
            Unauthenticated(f"The API key {what}: send it as 'Authorization: Bearer KEY'.")
        )
        await answer(scope, receive, send)


Endpoint = Callable[[Request], Awaitable[Response]]


class DirectRoutes:
    """Calls ``endpoints`` by method and path, and the application for everything else.

    The routes stand in the application, too, for its documentation and for paths behind a
    prefix; going through its router would take longer than all that we do to a short request.
    """

    def __init__(self, app: ASGIApp, *, endpoints: Mapping[tuple[str, str], Endpoint]) -> None:
        self._app = app
        self._endpoints = endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = None
        if scope["type"] == "http":
            endpoint = self._endpoints.get((scope["method"], scope["path"]))
        if endpoint is None:
            await self._app(scope, receive, send)
            return
        record_of(scope).route = scope["path"]
        try:
            response = await endpoint(Request(scope, receive, send))
        except EmbeddingServerError as error:
            response = error_answer(error)
        await response(scope, receive, send)


def _request_id(scope: Scope) -> str:
    wanted = _header(scope, b"x-request-id")
    return wanted.decode("ascii") if _CLIENT_ID.fullmatch(wanted) else uuid.uuid4().hex


def _header(scope: Scope, name: bytes) -> bytes:
    return next((bytes(value) for key, value in scope["headers"] if key == name), b"")


def _is_health(path: str) -> bool:
    return path == "/health" or path.startswith("/health/")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
