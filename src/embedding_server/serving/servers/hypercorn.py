# SPDX-License-Identifier: MIT OR Apache-2.0
"""HTTP/2, with and without TLS, in hypercorn's protocol; HTTP/1 is served as by uvicorn."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import ClassVar

import h2.events
from h2.errors import ErrorCodes
from h2.events import DataReceived, RequestReceived, StreamReset
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.asyncio.task_group import TaskGroup
from hypercorn.asyncio.worker_context import WorkerContext
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.h2 import H2Protocol
from hypercorn.typing import ConnectionState

from embedding_server.serving.servers.http1 import MAX_HEADER_BYTES, Http1, Timer
from embedding_server.serving.servers.uvicorn import UvicornServer

__all__ = ["HypercornServer"]

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

_SWITCHING = b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n"

_UNLIMITED = 2**31

_READ_BYTES = 2**16

Headers = list[tuple[bytes, bytes]]


class _Http1OrHttp2(Http1):
    """Speaks HTTP/1 until the client asks for HTTP/2: by ALPN, its preface or an upgrade."""

    _start: bytes | None = b""
    """The first bytes, while they may become the preface of HTTP/2."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        tls = transport.get_extra_info("ssl_object")
        if tls is not None and tls.selected_alpn_protocol() == "h2":
            self._switch(b"")

    def data_received(self, data: bytes) -> None:
        if self._start is not None:
            data = self._start + data
            if data.startswith(_PREFACE):
                self._switch(data)
                return
            if _PREFACE.startswith(data):
                self._start = data
                self._bound_head(len(data))
                return
            self._start = None
        super().data_received(data)

    def accept_offer(self, rest: bytes) -> bool:
        fields = dict(self.headers)
        if fields.get(b"upgrade", b"").lower() != b"h2c" or self.scheme == "https":
            return False
        if {b"content-length", b"transfer-encoding"} & fields.keys():
            return False  # its body would have to be read in HTTP/1.1 first
        if self.cycle is not None and not self.cycle.response_complete:
            return False  # the request before is still to be answered in HTTP/1.1
        self.transport.write(_SWITCHING)
        pseudo = [(b":method", self.parser.get_method()), (b":path", self.url)]
        self._switch(rest, [*pseudo, *self.headers], fields.get(b"http2-settings", b""))
        return True

    def _switch(
        self, data: bytes, headers: Headers | None = None, settings: bytes | None = None
    ) -> None:
        """Go on in HTTP/2 with ``data``; ``headers`` and ``settings`` are those of an upgrade."""
        self.stop_timers()
        self.connections.discard(self)

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(asyncio.CancelledError):  # asyncio would log it as a fault
                await _Http2Connection(self, reader, writer).run(headers, settings)

        reader = asyncio.StreamReader(loop=self.loop)
        streams = asyncio.StreamReaderProtocol(reader, serve, loop=self.loop)
        self.transport.set_protocol(streams)
        streams.connection_made(self.transport)
        reader.feed_data(data)


class _Http2Connection:
    """Hands what one client sends to hypercorn's protocol, and writes what that answers.

    A connection that is idle, or whose client doesn't read its answers, is closed.
    """

    def __init__(
        self, http1: Http1, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._http1 = http1
        self._reader = reader
        self._writer = writer
        self._idle_seconds = http1.config.options.idle_timeout
        self._idle_timer = Timer(http1.loop)
        self._draining = asyncio.Event()

    async def run(self, headers: Headers | None, settings: bytes | None) -> None:
        """Serve until the connection ends; ``headers`` and ``settings`` are those of an upgrade."""
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        state = self._http1.server_state
        state.connections.add(self)  # type: ignore[arg-type]
        state.tasks.add(task)
        if headers is None:
            self._idle_timer.start(self._idle_seconds, self._close)
        if self._http1.config.draining:  # it began after the other connections were drained
            self.drain()
        try:
            async with TaskGroup(self._http1.loop) as group:
                protocol = self._protocol(group)
                await protocol.initiate(headers, settings)
                with contextlib.suppress(OSError):
                    while data := await self._reader.read(_READ_BYTES):
                        await protocol.handle(RawData(data))
                await protocol.handle(Closed())
        finally:
            self._idle_timer.stop()
            self._writer.close()
            state.connections.discard(self)
            state.tasks.discard(task)

    def drain(self) -> None:
        """Refuse further requests, and close the connection when none is under way."""
        self._draining.set()
        if self._idle_timer.running:
            self._close()

    def shutdown(self) -> None:
        self._close()

    def _protocol(self, group: TaskGroup) -> H2Protocol:
        config = Config()
        config.errorlog = logging.getLogger("hypercorn.error")
        config.include_server_header = False
        config.h2_max_header_list_size = MAX_HEADER_BYTES
        config.keep_alive_max_requests = _UNLIMITED
        context = WorkerContext(max_requests=None)
        context.terminated = self._draining  # type: ignore[assignment]
        http1 = self._http1
        return _Http2(
            ASGIWrapper(http1.app),
            config,
            context,
            group,
            ConnectionState({}),
            http1.scheme == "https",
            http1.client,
            http1.server,  # type: ignore[arg-type]
            self._send,
        )

    async def _send(self, event: Event) -> None:
        if self._writer.is_closing():
            return
        if isinstance(event, RawData):
            await self._write(event.data)
        elif isinstance(event, Closed):
            self._close()
        elif isinstance(event, Updated) and event.idle:
            self._idle_timer.start(self._idle_seconds, self._close)
            if self._draining.is_set():
                self._close()
        else:
            self._idle_timer.stop()

    async def _write(self, data: bytes) -> None:
        self._writer.write(data)
        try:
            async with asyncio.timeout(self._idle_seconds):
                await self._writer.drain()
        except TimeoutError:
            self._writer.transport.abort()
            self._task.cancel()  # it may wait for the application to take a request's body
        except ConnectionError:
            pass  # reading ends, too

    def _close(self) -> None:
        """Close the connection when its client has read the answers; after the idle time, cut."""
        self._writer.close()
        self._idle_timer.start(self._idle_seconds, self._writer.transport.abort)


class _Http2(H2Protocol):
    """Survives requests that are answered before all of their body has arrived, and strange ones.

    hypercorn has no setting for these. ``tests/libraries/test_hypercorn.py`` holds the private
    method ``_handle_events`` and the attributes that stand here.
    """

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
                if isinstance(event, StreamReset) and self.idle:
                    await self.send(Updated(idle=True))  # not sent for streams that are closed
        await self._flush()


def _is_strange(request: RequestReceived) -> bool:
    """Return whether it asks for a tunnel, or for a path that is none."""
    pseudo = {name: value for name, value in request.headers if name[:1] == b":"}
    return pseudo[b":method"] == b"CONNECT" or not pseudo[b":path"].isascii()


class HypercornServer(UvicornServer):
    """See ``AsgiServer``."""

    protocols: ClassVar = ["h2", "http/1.1"]
    connection: ClassVar = _Http1OrHttp2
