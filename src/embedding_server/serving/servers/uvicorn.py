# SPDX-License-Identifier: MIT OR Apache-2.0
"""uvicorn with httptools: HTTP/1.1, and none of those measured is faster (docs/performance.md)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable
from typing import ClassVar

import uvicorn
from starlette.types import ASGIApp

from embedding_server.serving.servers.base import ServerOptions
from embedding_server.serving.servers.http1 import Http1, UvicornConfig

__all__ = ["UvicornServer"]

logger = logging.getLogger(__name__)

_CUT_SECONDS = 1


class UvicornServer:
    """See ``AsgiServer``."""

    protocols: ClassVar = ["http/1.1"]
    connection: ClassVar[type[Http1]] = Http1

    def __init__(self, app: ASGIApp, options: ServerOptions) -> None:
        self._server = _Server(UvicornConfig(app, self.connection, options))

    def run(self, listener: socket.socket, on_start: Callable[[], None]) -> None:
        self._server.on_start = on_start
        self._server.run(sockets=[listener])

    def stop(self) -> None:
        self._server.stop()


class _Server(uvicorn.Server):
    """Goes on answering on open connections while requests under way finish."""

    config: UvicornConfig
    on_start: Callable[[], None]

    def __init__(self, config: UvicornConfig) -> None:
        super().__init__(config)
        self.servers = []
        self._loop: asyncio.AbstractEventLoop | None = None

    def stop(self) -> None:
        self.should_exit = True
        if self._loop is not None:  # at once, and not when uvicorn looks next
            with contextlib.suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(self._drain)

    def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        return contextlib.nullcontext()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self.on_start()
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._drain()
        loop = asyncio.get_running_loop()
        end = loop.time() + self.config.options.drain_timeout
        while (tasks := set(self.server_state.tasks)) and loop.time() < end:
            await asyncio.wait(tasks, timeout=end - loop.time())
        if tasks:
            logger.error("--drain-timeout is over: %d requests are cut", len(tasks))
            for task in tasks:
                task.cancel()  # in HTTP/1 the application then answers the client
            await asyncio.wait(tasks, timeout=_CUT_SECONDS)
        self.config.timeout_graceful_shutdown = _CUT_SECONDS
        await super().shutdown(sockets)

    def _drain(self) -> None:
        """Accept no connection, and close each open one with its next answer."""
        self.config.draining = True
        for server in self.servers:
            server.close()
        for connection in self.server_state.connections.copy():
            connection.drain()  # type: ignore[union-attr]
