# SPDX-License-Identifier: MIT OR Apache-2.0
"""The interface of an ASGI server, and the table of servers; importing it loads none."""

from __future__ import annotations

import importlib
import socket
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol, Self

from starlette.types import ASGIApp

from embedding_server.errors import ConfigurationError
from embedding_server.settings import Settings

__all__ = ["SERVERS", "AsgiServer", "ServerOptions", "server_class"]

SERVERS: Mapping[str, str] = {
    "uvicorn": "embedding_server.serving.servers.uvicorn:UvicornServer",
    "hypercorn": "embedding_server.serving.servers.hypercorn:HypercornServer",
}
"""Name -> ``module:Class``, imported on use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """How to serve; times are in seconds."""

    drain_timeout: float
    """For requests under way after ``stop``."""
    header_timeout: float
    """For a request's header to arrive."""
    idle_timeout: float
    """For an idle connection, or an answer that its client doesn't read."""
    tls: ssl.SSLContext | None = None

    @classmethod
    def from_settings(cls, settings: Settings, tls: ssl.SSLContext | None = None) -> Self:
        return cls(
            drain_timeout=settings.drain_timeout,
            header_timeout=settings.header_timeout,
            idle_timeout=settings.idle_timeout,
            tls=tls,
        )


class AsgiServer(Protocol):
    """Serves one application in this process."""

    protocols: ClassVar[list[str]]
    """The protocols offered over TLS, best first, by their ALPN names (RFC 7301)."""

    def __init__(self, app: ASGIApp, options: ServerOptions) -> None: ...

    def run(self, listener: socket.socket, on_start: Callable[[], None]) -> None:
        """Serve on ``listener`` until ``stop``, and close it; the caller handles signals.

        ``on_start`` is called in the event loop before the first request. After ``stop`` no
        connection is accepted, and requests under way are cut after ``drain_timeout``.
        """
        ...

    def stop(self) -> None:
        """May be called at any time, from any thread, and more than once."""
        ...


def server_class(name: str) -> type[AsgiServer]:
    """Import the class of the server ``name``.

    Raises ConfigurationError without its extra, which has the server's name.
    """
    module, _, attribute = SERVERS[name].partition(":")
    try:
        loaded: type[AsgiServer] = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"--server {name} can't be used ({error}): install the extra [{name}] with "
            f"pip install 'embedding-server[{name}]', in a checkout with "
            f"scripts/install '[{name}]'."
        ) from None
    return loaded
