# SPDX-License-Identifier: MIT OR Apache-2.0
"""One connection of HTTP/1, parsed by httptools: uvicorn's protocol with bounds on its clients."""

from __future__ import annotations

import asyncio
import http
import logging
import re
import uuid
from collections.abc import Callable, Iterable
from typing import Any

import httptools
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from embedding_server.api.errors import ErrorAnswer
from embedding_server.serving.servers.base import ServerOptions

__all__ = ["MAX_HEADER_BYTES", "Http1", "Timer", "UvicornConfig"]

logger = logging.getLogger(__name__)

MAX_HEADER_BYTES = 32 * 1024
"""The request's target and all header fields of one request."""

# A header field takes a colon, a space and a line end beside its name and value.
_FIELD_BYTES = 4

# When a client that has closed its sending half is first probed: it is sent an answer of status
# 100, which it must accept (RFC 9110, section 15.2). If it has hung up, its system refuses that,
# and the next write fails. Each wait is twice as long as the one before.
_PROBE_SECONDS = 0.1

# A client of HTTP/1.0 can't be probed: after a wait longer than this one it counts as gone.
_UNPROBED_SECONDS = 0.5

# RFC 3986, section 3.2.2, and the zones that some clients leave in IPv6 addresses.
_HOST = re.compile(
    rb"(?:\[[0-9A-Za-z:.%_~-]+\]|(?:[A-Za-z0-9._~!$&'()*+,;=-]++|%[0-9A-Fa-f]{2})*+)(?::[0-9]*)?"
)

_REASONS = {
    400: "This is not a valid HTTP/1.1 request: it needs a request line, fields that are well "
    "formed, among them one Host that names a host, and a body with one length.",
    408: "The request's header did not come in time.",
    431: f"The request's header is over the limit of {MAX_HEADER_BYTES} bytes.",
    505: "This version of HTTP is not spoken here: send the request in HTTP/1.1.",
}
_BODIES = {
    status: bytes(ErrorAnswer(status, reason, "invalid_request_error").body)
    for status, reason in _REASONS.items()
}

_TE = b"transfer-encoding"
_TE_LENGTH = len(_TE)


class UvicornConfig(uvicorn.Config):
    """uvicorn's configuration, with the options that it has no parameters for."""

    def __init__(self, app: ASGIApp, protocol: type[Http1], options: ServerOptions) -> None:
        super().__init__(
            app,
            http=protocol,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # the application doesn't ask who the client is
        )
        self.options = options
        self.draining = False

    def load(self) -> None:
        super().load()
        self.ssl = self.options.tls


class Http1(HttpToolsProtocol):
    """Serves HTTP/1.1 to slow, greedy and confused clients, and to those that offer HTTP/2.

    A client that sends a whole request and closes its sending half is answered. A header that is
    too long or takes too long is refused, a connection that is idle or doesn't read its answer is
    closed, and malformed requests are answered in our error shape. Fields after a body are dropped,
    as RFC 9110 (section 6.5.1) asks: they would else pass for headers. A client that offers another
    protocol is answered in HTTP/1.1: Java's HttpClient offers HTTP/2 with every request, and
    httptools takes the end of such headers for the end of the request (uvicorn issue 2722).

    uvicorn has no settings for these. Its protocol's attributes and the two private methods
    ``_should_upgrade`` and ``_unset_keepalive_if_required`` are held by
    ``tests/libraries/test_uvicorn.py``.
    """

    config: UvicornConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.timeout_keep_alive = self.config.options.idle_timeout  # type: ignore[assignment]
        self._in_head = False
        self._head_bytes = 0  # parsed
        self._unparsed_bytes = 0  # of a header, or of the fields after a body
        self._after_body = False  # or between a chunk's length and the chunk
        self._refused = False
        self._half_closed = False
        self._head_timer = Timer(self.loop)
        self._unread_timer = Timer(self.loop)
        self._probe_timer = Timer(self.loop)

    def drain(self) -> None:
        """Close the connection with its next answer."""
        if self.cycle is not None:
            self.cycle.keep_alive = False

    def stop_timers(self) -> None:
        self._unset_keepalive_if_required()
        self._head_timer.stop()
        self._unread_timer.stop()
        self._probe_timer.stop()

    # The connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.stop_timers()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Return whether to keep the connection: while a whole request is to be answered.

        asyncio can't keep one that is half closed over TLS.
        """
        cycle = self.cycle
        ended = cycle is None or cycle.response_complete or cycle.more_body
        if self.scheme == "https" or (ended and not self.pipeline):
            return False
        if not self._half_closed:  # it may be received again after a pause in reading
            self._half_closed = True
            cycle.keep_alive = False
            self._head_timer.stop()
            self._probe_timer.start(_PROBE_SECONDS, self._probe, _PROBE_SECONDS)
        return True

    def _probe(self, seconds: float) -> None:
        cycle = self.cycle
        if not self.pipeline and not cycle.response_started:
            if cycle.scope["http_version"] == "1.1":
                self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            elif seconds > _UNPROBED_SECONDS:
                self.transport.abort()
                return
        self._probe_timer.start(2 * seconds, self._probe, 2 * seconds)

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()  # closing would wait for the reader
        else:
            super().timeout_keep_alive_handler()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unread_timer.stop()

    def _await_reader(self) -> None:
        if not self._unread_timer.running:
            self._unread_timer.start(self.config.options.idle_timeout, self.transport.abort)

    # The bytes of requests

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        size = len(data)
        while data:
            try:
                self.parser.feed_data(data)
                break
            except httptools.HttpParserUpgrade as offer:
                rest = data[offer.args[0] :]
                if self.parser.get_method() == b"CONNECT":  # always an offer, never accepted
                    self._refuse(400)
                    return
                if self.accept_offer(rest):
                    return
                data = self._head_without_offer() + rest
                self.parser = httptools.HttpRequestParser(self)
            except httptools.HttpParserError as error:
                cause = error.__context__  # the exception of a callback
                self._refuse(cause.status if isinstance(cause, _RefusedError) else 400)
                return
        if self._in_head:
            self._bound_head(size)
        elif self._after_body:
            self._count_unparsed(size)

    def accept_offer(self, rest: bytes) -> bool:
        """Switch to the protocol that the request's headers offer; here none is accepted."""
        return False

    def _should_upgrade(self) -> bool:
        """Begin no request before ``data_received`` has handled the offer."""
        return True

    def _head_without_offer(self) -> bytes:
        version = self.parser.get_http_version().encode("ascii")
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version)]
        lines += [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])

    def _bound_head(self, size: int) -> None:
        """Bound the time and the memory that the rest of a header takes."""
        if not self._head_timer.running:
            self._head_timer.start(self.config.options.header_timeout, self._refuse, 408)
        else:  # of the first part it is unknown how much belongs to earlier requests
            self._count_unparsed(size)

    def _count_unparsed(self, size: int) -> None:
        """The parser keeps a field, however long it is, until its end has arrived."""
        self._unparsed_bytes += size
        if self._unparsed_bytes > MAX_HEADER_BYTES:
            self._refuse(431)

    # The parser's events

    def on_message_begin(self) -> None:
        # Only a new request ends the idle time, not the rest of a body that is no longer read.
        self._unset_keepalive_if_required()
        self._in_head = True
        self._head_bytes = self._unparsed_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:
            return
        self._count_head(len(name) + len(value) + _FIELD_BYTES)
        if len(name) == _TE_LENGTH and name.lower() == _TE and value.lower() != b"chunked":
            raise _RefusedError(400)  # a coding that is not decoded here
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._head_timer.stop()
        fault = _head_fault(self.parser.get_http_version(), self.headers)
        if fault is not None:
            raise _RefusedError(fault)
        self._in_head = False
        super().on_headers_complete()
        if self.config.draining:
            self.drain()

    def on_chunk_header(self) -> None:
        self._after_body = True
        self._unparsed_bytes = 0

    def on_body(self, body: bytes) -> None:
        self._after_body = False
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._after_body = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        if self._half_closed and self.pipeline and self.pipeline[-1][0].more_body:
            self.transport.close()  # the rest of that request never arrives
        super().on_response_complete()
        if self.transport.is_closing() and self.transport.get_write_buffer_size():
            self._await_reader()

    def _count_head(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > MAX_HEADER_BYTES:
            raise _RefusedError(431)

    # Refusals

    def _refuse(self, status: int) -> None:
        if self.transport.is_closing():
            return
        if self._can_answer():
            self.transport.write(_refusal(status))
            self.transport.close()
        elif self.cycle.response_complete:
            self.transport.close()
        else:  # it would pass for the answer to the request before, which is the last one now
            self._refused = True
            self.cycle.keep_alive = False

    def _can_answer(self) -> bool:
        """Return whether the client would take an answer for that of the incoming request."""
        cycle = self.cycle
        if cycle is None:
            return True
        if self._in_head or not cycle.more_body:
            return cycle.response_complete
        return not cycle.response_started and not self.pipeline


class _RefusedError(Exception):
    """Raised in a callback of the parser, which wraps it."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Timer:
    """Calls a function once, unless it is stopped before."""

    __slots__ = ("_handle", "_loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._handle: asyncio.TimerHandle | None = None

    @property
    def running(self) -> bool:
        return self._handle is not None

    def start(self, seconds: float, call: Callable[..., object], *arguments: object) -> None:
        self.stop()
        self._handle = self._loop.call_later(seconds, call, *arguments)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None


def _head_fault(version: str, headers: Iterable[tuple[bytes, bytes]]) -> int | None:
    """Return the status that refuses a request by its version or its Host, or None.

    See RFC 9112, sections 2.3 and 3.2.
    """
    if version not in ("1.1", "1.0"):
        return 505
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) == 1:
        return None if _HOST.fullmatch(hosts[0]) else 400
    return 400 if hosts or version == "1.1" else None


def _refusal(status: int) -> bytes:
    """Log a request that the application never sees, and return its whole answer."""
    request_id = uuid.uuid4().hex
    logger.info("not HTTP", extra={"fields": {"id": request_id, "status": status}})
    body = _BODIES[status]
    lines = (
        f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}",
        f"x-request-id: {request_id}",
        "content-type: application/json",
        "x-content-type-options: nosniff",
        f"content-length: {len(body)}",
        "connection: close",
    )
    return "\r\n".join((*lines, "", "")).encode("ascii") + body
