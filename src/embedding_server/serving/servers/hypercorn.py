# SPDX-License-Identifier: MIT OR Apache-2.0
"""hypercorn: slower than uvicorn (docs/performance.md), but it speaks HTTP/2 without TLS."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import socket
import ssl
from collections.abc import Callable
from typing import Any, ClassVar

import h2.events
import h11
import hypercorn.asyncio.run
import hypercorn.protocol
from h2.errors import ErrorCodes
from h2.events import DataReceived, RequestReceived
from hypercorn.asyncio import serve
from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.h2 import H2Protocol
from hypercorn.protocol.h11 import H11Protocol
from starlette.types import ASGIApp

from embedding_server.serving.servers.base import (
    FIELD_BYTES,
    MAX_HEADER_BYTES,
    PROBE_SECONDS,
    UNPROBED_SECONDS,
    ServerOptions,
    head_fault,
    refusal,
)

try:
    from uvloop import new_event_loop
except ImportError:  # there is none for Windows
    from asyncio import new_event_loop  # type: ignore[assignment]

__all__ = ["HypercornServer"]

_UNLIMITED = 2**31

_READ_BYTES = 2**16

_ORIGIN = re.compile(rb"https?://[^/?#]*", re.IGNORECASE)
"""What a target in the absolute form begins with (RFC 9112, section 3.2.2)."""


class HypercornServer:
    """See ``AsgiServer``; a request's header may take as long as a connection may be idle."""

    protocols: ClassVar = ["h2", "http/1.1"]

    def __init__(self, app: ASGIApp, options: ServerOptions) -> None:
        self._app = app
        self._config = _Config(options)
        self._stopping = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self, listener: socket.socket, on_start: Callable[[], None]) -> None:
        self._config.bind = [f"fd://{listener.detach()}"]  # it closes it

        async def main() -> None:
            self._loop = asyncio.get_running_loop()
            self._loop.set_exception_handler(_tell_fault)
            on_start()
            await serve(
                self._app,  # type: ignore[arg-type]
                self._config,
                shutdown_trigger=self._stopping.wait,
                mode="asgi",
            )

        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(main())

    def stop(self) -> None:
        if self._loop is None:
            self._stopping.set()
            return
        with contextlib.suppress(RuntimeError):  # it has ended
            self._loop.call_soon_threadsafe(self._stopping.set)


def _tell_fault(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """All but connections that were cut, and handshakes that failed."""
    if not isinstance(context.get("exception"), (asyncio.CancelledError, ssl.SSLError)):
        loop.default_exception_handler(context)


class _Config(Config):
    def __init__(self, options: ServerOptions) -> None:
        self._tls = options.tls
        self.backlog = 2048
        self.errorlog = logging.getLogger("hypercorn.error")
        self.include_server_header = False
        self.h11_max_incomplete_size = MAX_HEADER_BYTES
        self.h2_max_header_list_size = MAX_HEADER_BYTES
        self.keep_alive_timeout = options.idle_timeout
        self.keep_alive_max_requests = _UNLIMITED
        self.startup_timeout = _UNLIMITED  # models may be large
        self.graceful_timeout = options.drain_timeout

    @property
    def ssl_enabled(self) -> bool:
        return self._tls is not None

    def create_ssl_context(self) -> ssl.SSLContext | None:
        return self._tls


class _Connection(TCPServer):
    """Gives up a client that doesn't read its answer; answers one that has only half closed."""

    async def run(self) -> None:
        self._task = asyncio.current_task()
        await super().run()

    async def _read_data(self) -> None:
        with contextlib.suppress(OSError):
            while data := await self.reader.read(_READ_BYTES):
                await self.protocol.handle(RawData(data))
            await self.protocol.handle(RawData(b""))
            http = self.protocol.protocol
            if isinstance(http, _Http1) and not http.ssl:  # asyncio closes all of it over TLS
                await http.answer_half_closed()
        await self.protocol.handle(Closed())
        await self.idle_task.stop()  # or it would keep the connection until it is over

    async def protocol_send(self, event: Event) -> None:
        assert self._task is not None
        if isinstance(event, Updated) and self._task.cancelling():
            return  # it ends, and has no idle time any more
        try:
            async with asyncio.timeout(self.config.keep_alive_timeout):
                await super().protocol_send(event)
        except TimeoutError:
            self.writer.transport.abort()
            self._task.cancel()  # it may wait for this answer's end, to read the next request


class _Http1(H11Protocol):
    """Answers nonsense in our error shape, and offers of anything but HTTP/2 in HTTP/1.1."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._answered = asyncio.Event()

    async def answer_half_closed(self) -> None:
        """Wait until a request that came whole is answered, or its client has hung up."""
        self._answered.clear()
        seconds = PROBE_SECONDS
        while self.stream is not None and self.connection.their_state is h11.CLOSED:
            try:
                async with asyncio.timeout(seconds):
                    await self._answered.wait()
            except TimeoutError:
                if seconds > UNPROBED_SECONDS and self._is_unprobed():
                    return
                await self._probe()
                seconds *= 2

    def _is_unprobed(self) -> bool:
        assert isinstance(self.connection, h11.Connection)
        return self.connection.their_http_version != b"1.1"

    async def _probe(self) -> None:
        """See ``PROBE_SECONDS``."""
        assert isinstance(self.connection, h11.Connection)
        unanswered = self.connection.our_state is h11.SEND_RESPONSE
        if unanswered and not self._is_unprobed():
            probe = h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")
            await self._send_h11_event(probe)

    async def _close_stream(self) -> None:
        await super()._close_stream()
        self._answered.set()

    async def _send_error_response(self, status_code: int) -> None:
        status = status_code if status_code in (431, 505) else 400
        headers, body = refusal(status)
        await self._send_h11_event(h11.Response(status_code=status, headers=headers))
        await self._send_h11_event(h11.Data(data=body))
        await self._send_h11_event(h11.EndOfMessage())

    async def _create_stream(self, request: h11.Request) -> None:
        assert isinstance(self.connection, h11.Connection)
        if {b"content-length", b"transfer-encoding"} <= {name for name, _ in request.headers}:
            # A proxy may believe the other one, and take the rest for a request of its own.
            await self._refuse(400)
            return
        fault = head_fault(request.http_version.decode("ascii"), request.headers)
        if fault is not None:
            await self._refuse(fault)
            return
        fields = (len(name) + len(value) + FIELD_BYTES for name, value in request.headers)
        if len(request.target) + sum(fields) > MAX_HEADER_BYTES:  # which came at once
            await self._refuse(431)
            return
        offers = self.connection._cstate.pending_switch_proposals
        if offers:
            # HTTP/2 would have been taken by now. As long as h11 waits for an answer to an offer,
            # hypercorn doesn't read, and so doesn't hear the client hang up.
            offers.clear()
            headers = [header for header in request.headers if header[0] != b"upgrade"]
            request = _replace(request, headers=headers)
        if origin := _ORIGIN.match(request.target):
            path = request.target[origin.end() :]
            request = _replace(request, target=path if path[:1] == b"/" else b"/" + path)
        await super()._create_stream(request)

    async def _refuse(self, status: int) -> None:
        await self._send_error_response(status)
        await self.send(Closed())


def _replace(request: h11.Request, **fields: Any) -> h11.Request:
    names = ("method", "target", "headers", "http_version")
    kept: dict[str, Any] = {name: getattr(request, name) for name in names}
    return h11.Request(**(kept | fields))


class _Http2(H2Protocol):
    """Outlives requests that are answered before all of their body has come, and strange ones."""

    async def _handle_events(self, events: list[h2.events.Event]) -> None:
        for event in events:
            if isinstance(event, DataReceived) and event.stream_id not in self.streams:
                self.connection.acknowledge_received_data(
                    event.flow_controlled_length, event.stream_id
                )
            elif isinstance(event, RequestReceived) and _is_strange(event):
                self.connection.reset_stream(event.stream_id, ErrorCodes.PROTOCOL_ERROR)
            else:
                await super()._handle_events([event])
        await self._flush()


def _is_strange(request: RequestReceived) -> bool:
    """Whether it asks for a tunnel, or for a path that is none."""
    pseudo = {name: value for name, value in request.headers if name[:1] == b":"}
    return pseudo[b":method"] == b"CONNECT" or not pseudo[b":path"].isascii()


# There is no setting for them.
hypercorn.protocol.H11Protocol = _Http1  # type: ignore[attr-defined]
hypercorn.protocol.H2Protocol = _Http2  # type: ignore[attr-defined]
hypercorn.asyncio.run.TCPServer = _Connection  # type: ignore[attr-defined]
