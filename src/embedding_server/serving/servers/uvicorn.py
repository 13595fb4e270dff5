# SPDX-License-Identifier: MIT OR Apache-2.0
"""uvicorn with httptools: HTTP/1.1, and none of those measured is faster (docs/performance.md)."""

from __future__ import annotations

import asyncio
import contextlib
import http
import logging
import socket
from collections.abc import Callable
from typing import Any, ClassVar

import httptools
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from embedding_server.serving.servers.base import (
    FIELD_BYTES,
    MAX_HEADER_BYTES,
    PROBE_SECONDS,
    UNPROBED_SECONDS,
    ServerOptions,
    head_fault,
    refusal,
)

__all__ = ["UvicornServer"]

logger = logging.getLogger(__name__)

_CUT_SECONDS = 1

_TE = b"transfer-encoding"
_TE_LENGTH = len(_TE)

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class UvicornServer:
    """See ``AsgiServer``."""

    protocols: ClassVar = ["http/1.1"]

    def __init__(self, app: ASGIApp, options: ServerOptions) -> None:
        self._server = _Server(_Config(app, options))

    def run(self, listener: socket.socket, on_start: Callable[[], None]) -> None:
        self._server.on_start = on_start
        self._server.run(sockets=[listener])

    def stop(self) -> None:
        self._server.stop()


class _Config(uvicorn.Config):
    def __init__(self, app: ASGIApp, options: ServerOptions) -> None:
        super().__init__(
            app,
            http=_Http1,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # nothing here asks who the client is
        )
        self.options = options
        self.draining = False

    def load(self) -> None:
        super().load()
        self.ssl = self.options.tls


class _Server(uvicorn.Server):
    """Goes on answering on the connections there are, while requests under way finish."""

    config: _Config
    on_start: Callable[[], None]

    def __init__(self, config: _Config) -> None:
        super().__init__(config)
        self.servers = []
        self._loop: asyncio.AbstractEventLoop | None = None

    def stop(self) -> None:
        self.should_exit = True
        if self._loop is not None:  # at once, and not at uvicorn's next look
            with contextlib.suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(self._stop_listening)

    def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        return contextlib.nullcontext()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self.on_start()
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._stop_listening()
        loop = asyncio.get_running_loop()
        end = loop.time() + self.config.options.drain_timeout
        while (tasks := set(self.server_state.tasks)) and loop.time() < end:
            await asyncio.wait(tasks, timeout=end - loop.time())
        if tasks:
            logger.error("--drain-timeout is over: %d requests are cut", len(tasks))
            for task in tasks:
                task.cancel()  # the application tells the client
            await asyncio.wait(tasks, timeout=_CUT_SECONDS)
        self.config.timeout_graceful_shutdown = _CUT_SECONDS
        await super().shutdown(sockets)

    def _stop_listening(self) -> None:
        self.config.draining = True
        for server in self.servers:
            server.close()
        for connection in self.server_state.connections:
            if isinstance(connection, _Http1) and connection.cycle is not None:
                connection.cycle.keep_alive = False  # so that its answer says so


class _Http1(HttpToolsProtocol):
    """HTTP/1.1 for clients that are slow, greedy or confused, and for those that offer HTTP/2.

    A client that sends a whole request and closes its sending half is answered. A header that is
    too long or takes too long is refused, a connection that is idle or doesn't
    read its answer is closed, and nonsense is answered in our error shape. Fields that come after
    a body are dropped, as RFC 9110 (section 6.5.1) asks: they would else pass for headers. A client
    that offers another protocol is answered in HTTP/1.1: Java's HttpClient offers HTTP/2 with every
    request; httptools then takes the end of the headers for the end of the request and loses the
    body (uvicorn issue 2722).
    """

    config: _Config

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.timeout_keep_alive = self.config.options.idle_timeout  # type: ignore[assignment]
        self._in_head = False
        self._head_bytes = 0  # of the fields that are read
        self._unread_bytes = 0  # raw, of a header or of the fields after a body
        self._after_body = False  # or between a chunk's length and the chunk
        self._refused = False
        self._half_closed = False
        self._head_timer = _Timer(self.loop)
        self._unread_timer = _Timer(self.loop)
        self._probe_timer = _Timer(self.loop)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        self._head_timer.stop()
        self._unread_timer.stop()
        self._probe_timer.stop()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Whether to keep the connection: while there is a whole request to be answered.

        asyncio can't keep one that is half closed over TLS.
        """
        cycle = self.cycle
        ended = cycle is None or cycle.response_complete or cycle.more_body
        if self.scheme == "https" or (ended and not self.pipeline):
            return False
        if not self._half_closed:  # it may be heard again after a pause in reading
            self._half_closed = True
            cycle.keep_alive = False
            self._head_timer.stop()
            self._probe_timer.start(PROBE_SECONDS, self._probe, PROBE_SECONDS)
        return True

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        size = len(data)
        while data:
            try:
                self.parser.feed_data(data)
                break
            except httptools.HttpParserUpgrade as offer:
                if self.parser.get_method() == b"CONNECT":  # always an offer, and never for us
                    self.send_400_response("")
                    return
                data = self._head_without_offer() + data[offer.args[0] :]
                self.parser = httptools.HttpRequestParser(self)
            except httptools.HttpParserError as error:
                cause = error.__context__  # what a callback has raised
                self._refuse(cause.status if isinstance(cause, _RefusedError) else 400)
                return
        if self._in_head:
            self._await_head(size)
        elif self._after_body:
            self._count_unread(size)

    def on_message_begin(self) -> None:
        # Only a new request ends the idle time: the rest of a body that nobody waits for doesn't.
        self._unset_keepalive_if_required()
        self._in_head = True
        self._head_bytes = self._unread_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:
            return
        self._count_head(len(name) + len(value) + FIELD_BYTES)
        if len(name) == _TE_LENGTH and name.lower() == _TE and value.lower() != b"chunked":
            raise _RefusedError(400)  # a coding that nobody undoes
        super().on_header(name, value)

    def on_chunk_header(self) -> None:
        self._after_body = True
        self._unread_bytes = 0

    def on_body(self, body: bytes) -> None:
        self._after_body = False
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._after_body = False
        super().on_message_complete()

    def on_headers_complete(self) -> None:
        self._head_timer.stop()
        fault = head_fault(self.parser.get_http_version(), self.headers)
        if fault is not None:
            raise _RefusedError(fault)
        self._in_head = False
        super().on_headers_complete()
        if self.config.draining and self.cycle is not None:
            self.cycle.keep_alive = False

    def on_response_complete(self) -> None:
        if self._half_closed and self.pipeline and self.pipeline[-1][0].more_body:
            self.transport.close()  # the rest of that request never comes
        super().on_response_complete()
        if self.transport.is_closing() and self.transport.get_write_buffer_size():
            self._await_reader()

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

    def send_400_response(self, msg: str) -> None:
        self._refuse(400)

    def _await_head(self, size: int) -> None:
        """Part of a header has come: the rest must not take for ever, nor all memory."""
        if not self._head_timer.running:
            self._head_timer.start(self.config.options.header_timeout, self._refuse, 408)
        else:  # of the first part it is not known how much belongs to earlier requests
            self._count_unread(size)

    def _count_head(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > MAX_HEADER_BYTES:
            raise _RefusedError(431)

    def _count_unread(self, size: int) -> None:
        """The parser keeps a field, however long it is, until its end has come."""
        self._unread_bytes += size
        if self._unread_bytes > MAX_HEADER_BYTES:
            self._refuse(431)

    def _probe(self, seconds: float) -> None:
        """See ``PROBE_SECONDS``."""
        cycle = self.cycle
        if not self.pipeline and not cycle.response_started:
            if cycle.scope["http_version"] == "1.1":
                self.transport.write(_CONTINUE)
            elif seconds > UNPROBED_SECONDS:
                self.transport.abort()
                return
        self._probe_timer.start(2 * seconds, self._probe, 2 * seconds)

    def _await_reader(self) -> None:
        if not self._unread_timer.running:
            self._unread_timer.start(self.config.options.idle_timeout, self.transport.abort)

    def _refuse(self, status: int) -> None:
        if self.transport.is_closing():
            return
        if self._can_answer():
            headers, body = refusal(status)
            line = b"HTTP/1.1 %d %b" % (status, http.HTTPStatus(status).phrase.encode("ascii"))
            head = b"".join(b"%b: %b\r\n" % header for header in headers)
            self.transport.write(b"%b\r\n%b\r\n%b" % (line, head, body))
            self.transport.close()
        elif self.cycle.response_complete:
            self.transport.close()
        else:  # it would be taken for the answer to the request before, with which all ends now
            self._refused = True
            self.cycle.keep_alive = False

    def _can_answer(self) -> bool:
        """Whether an answer would be taken for that of the request which is coming in."""
        cycle = self.cycle
        if cycle is None:
            return True
        if self._in_head or not cycle.more_body:
            return cycle.response_complete
        return not cycle.response_started and not self.pipeline

    def _should_upgrade(self) -> bool:
        """Asked about each offer, before ``data_received`` hears of it: begin no request yet."""
        return True

    def _head_without_offer(self) -> bytes:
        version = self.parser.get_http_version().encode("ascii")
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version)]
        lines += [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])


class _RefusedError(Exception):
    """Raised in a callback of the parser, which wraps it."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class _Timer:
    """Calls something once, unless it is stopped before."""

    __slots__ = ("_handle", "_loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._handle: asyncio.TimerHandle | None = None

    @property
    def running(self) -> bool:
        return self._handle is not None

    def start(self, seconds: float, call: Callable[..., object], *arguments: object) -> None:
        self._handle = self._loop.call_later(seconds, call, *arguments)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
