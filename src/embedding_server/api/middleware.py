# SPDX-License-Identifier: MIT OR Apache-2.0
"""Around every request: its id, its key, its log line, its metrics, and the answer to a fault."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from embedding_server.api.errors import error_answer, fault_answer
from embedding_server.api.headers import single_header
from embedding_server.api.keys import ApiKeys
from embedding_server.api.record import RequestRecord, record_of
from embedding_server.engine.stages import Stages
from embedding_server.errors import EmbeddingServerError, InvalidRequest, NotReady, Unauthenticated
from embedding_server.telemetry import Telemetry

if TYPE_CHECKING:  # OpenTelemetry is loaded where it is used only
    from embedding_server.api.tracing import Tracing

__all__ = ["ApiKeyMiddleware", "DirectRoutes", "Endpoint", "RequestMiddleware", "RootPath"]

logger = logging.getLogger(__name__)

# A client's id is copied to logs and headers: printable, and of limited length.
_CLIENT_ID = re.compile(rb"[\x21-\x7e]{1,128}")

# Browsers must not guess another content type than the answer's.
_NOSNIFF = (b"x-content-type-options", b"nosniff")

_QUIET = frozenset({"/health", "/health/live", "/health/ready", "/metrics"})


class RequestMiddleware:
    """Gives every HTTP request a record, and reports it in the log, the metrics and a trace."""

    def __init__(
        self, app: ASGIApp, *, telemetry: Telemetry, tracing: Tracing | None = None
    ) -> None:
        self._app = app
        self._telemetry = telemetry
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        app = self._app
        try:
            record = RequestRecord(_request_id(scope))
        except InvalidRequest as error:
            record, app = RequestRecord(uuid.uuid4().hex), error_answer(error)
        record.attach(scope)
        started = time.perf_counter()
        if self._tracing is not None:
            record.stages = Stages(started)
        status: int | None = None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", record.id.encode("ascii")),
                    _NOSNIFF,
                ]
            await send(message)

        self._telemetry.in_flight.inc()
        try:
            await app(scope, receive, send_with_id)
        except ClientDisconnect:
            pass
        except asyncio.CancelledError:  # by the server, whose time to drain is over
            if status is None:
                shutdown = NotReady("The server is shutting down and ends its requests. Try again.")
                await error_answer(shutdown)(scope, receive, send_with_id)
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
        trace_id = None
        if self._tracing is not None and route not in _QUIET:
            trace_id = self._tracing.request_finished(scope, record, route=route, status=status)
        level = logging.INFO
        if status == 500:  # its id must be in the log at --log-level error, too
            level = logging.ERROR
        elif route in _QUIET and status < 400:
            # Probes and scrapes come every few seconds, and would fill the log.
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
            if trace_id is not None:
                fields["trace_id"] = trace_id
            logger.log(level, "request", extra={"fields": fields})


class ApiKeyMiddleware:
    """Requires one of ``keys`` on every route but health, and metrics unless they are public.

    ``route_of`` returns the route of a path; refusals are counted by it.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: ApiKeys,
        metrics_public: bool,
        route_of: Callable[[str], str],
    ) -> None:
        self._app = app
        self._keys = keys
        self._public = {"/health", "/metrics"} if metrics_public else {"/health"}
        self._route_of = route_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._is_public(scope["path"]):
            await self._app(scope, receive, send)
            return
        try:
            self._keys.check(scope)
        except Unauthenticated as error:
            record_of(scope).route = self._route_of(scope["path"])
            await error_answer(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_public(self, path: str) -> bool:
        return path in self._public or path.startswith("/health/")


class RootPath:
    """Removes ``prefix`` from every path that has it; a proxy in front may have done so already."""

    def __init__(self, app: ASGIApp, *, prefix: str) -> None:
        self._app = app
        self._prefix = prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(f"{self._prefix}/"):
            # The routes know nothing of the prefix, so that the ASGI root_path stays empty.
            scope["path"] = scope["path"][len(self._prefix) :]
        await self._app(scope, receive, send)


Endpoint = Callable[[Request], Awaitable[Response]]


class DirectRoutes:
    """Calls ``endpoints`` by method and path, and the application for everything else.

    The same routes are in the application, for its documentation.
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
        except ClientDisconnect:
            raise
        except Exception as error:  # answered here, inside the middleware that adds headers
            response = fault_answer(scope, error)
        await response(scope, receive, send)


def _request_id(scope: Scope) -> str:
    wanted = single_header(scope, b"x-request-id")
    return wanted.decode("ascii") if wanted and _CLIENT_ID.fullmatch(wanted) else uuid.uuid4().hex
