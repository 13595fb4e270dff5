"""hypercorn: slower than uvicorn (docs/performance.md), but it speaks HTTP/2 without TLS."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading

import h11
import hypercorn.protocol
from h2.errors import ErrorCodes
from h2.events import DataReceived, Event, RequestReceived
from hypercorn.asyncio import serve
from hypercorn.config import Config
from hypercorn.protocol.h2 import H2Protocol
from hypercorn.protocol.h11 import H11Protocol
from starlette.types import ASGIApp

from embedding_server.servers.base import KEEP_ALIVE_SECONDS, answer_to_nonsense

try:
    from uvloop import new_event_loop
except ImportError:  # there is none for Windows
    from asyncio import new_event_loop  # type: ignore[assignment]

__all__ = ["HypercornServer"]

_UNLIMITED = 2**31


class HypercornServer:
    """See ``AsgiServer``."""

    def __init__(self, app: ASGIApp, *, drain_seconds: int) -> None:
        self._app = app
        self._config = Config()
        self._config.backlog = 2048
        self._config.errorlog = logging.getLogger("hypercorn.error")
        self._config.include_server_header = False
        self._config.keep_alive_timeout = KEEP_ALIVE_SECONDS
        self._config.keep_alive_max_requests = _UNLIMITED
        self._config.graceful_timeout = drain_seconds
        self._stopping = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self, listener: socket.socket) -> None:
        self._config.bind = [f"fd://{listener.detach()}"]  # it closes it
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            self._loop = runner.get_loop()
            if threading.current_thread() is threading.main_thread():
                for number in (signal.SIGINT, signal.SIGTERM):
                    self._loop.add_signal_handler(number, self._stopping.set)
            runner.run(
                serve(
                    self._app,  # type: ignore[arg-type]
                    self._config,
                    shutdown_trigger=self._stopping.wait,
                    mode="asgi",
                )
            )

    def stop(self) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._stopping.set)


class _Http1(H11Protocol):
    """Answers nonsense in our error shape, and offers of anything but HTTP/2 in HTTP/1.1."""

    async def _send_error_response(self, status_code: int) -> None:
        headers, body = answer_to_nonsense()
        await self._send_h11_event(h11.Response(status_code=400, headers=headers))
        await self._send_h11_event(h11.Data(data=body))
        await self._send_h11_event(h11.EndOfMessage())

    async def _create_stream(self, request: h11.Request) -> None:
        assert isinstance(self.connection, h11.Connection)
        offers = self.connection._cstate.pending_switch_proposals
        if offers:
            # HTTP/2 would have been taken by now. As long as h11 waits for an answer to an offer,
            # hypercorn doesn't read, and so doesn't hear the client hang up.
            offers.clear()
            request = h11.Request(
                method=request.method,
                target=request.target,
                http_version=request.http_version,
                headers=[header for header in request.headers if header[0] != b"upgrade"],
            )
        await super()._create_stream(request)


class _Http2(H2Protocol):
    """Outlives requests that are answered before all of their body has come, and strange ones."""

    async def _handle_events(self, events: list[Event]) -> None:
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
