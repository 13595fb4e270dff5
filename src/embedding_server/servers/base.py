"""What an ASGI server is to us, and the table of those there are; importing it loads none."""

from __future__ import annotations

import importlib
import logging
import socket
import uuid
from collections.abc import Mapping
from typing import Protocol

from starlette.types import ASGIApp

from embedding_server.api.errors import ErrorAnswer
from embedding_server.errors import ConfigurationError

__all__ = ["KEEP_ALIVE_SECONDS", "SERVERS", "AsgiServer", "answer_to_nonsense", "server_class"]

logger = logging.getLogger(__name__)

SERVERS: Mapping[str, str] = {
    "uvicorn": "embedding_server.servers.uvicorn:UvicornServer",
    "hypercorn": "embedding_server.servers.hypercorn:HypercornServer",
}
"""Name -> ``module:Class``, imported on use."""

KEEP_ALIVE_SECONDS = 75
"""How long a connection may be idle: longer than a load balancer in front would leave it so."""

_NOT_HTTP = bytes(
    ErrorAnswer(400, "This is not a valid HTTP/1.1 request.", "invalid_request_error").body
)


class AsgiServer(Protocol):
    """Serves one application in this process."""

    def __init__(self, app: ASGIApp, *, drain_seconds: int) -> None: ...

    def run(self, listener: socket.socket) -> None:
        """Serve on ``listener`` until ``stop``, SIGTERM or SIGINT, and close it.

        Then requests under way are finished, for up to ``drain_seconds``: a client that never
        ends its request must not keep the server from ending. May end with the signal's
        SystemExit or KeyboardInterrupt.
        """
        ...

    def stop(self) -> None:
        """End as if by a signal; may be called from any thread while ``run`` runs."""
        ...


def server_class(name: str) -> type[AsgiServer]:
    """The class of the server ``name``, imported now.

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


def answer_to_nonsense() -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Headers and body of the 400 to what is no HTTP request; its id is in the log."""
    request_id = uuid.uuid4().hex
    logger.info("not HTTP", extra={"fields": {"id": request_id, "status": 400}})
    headers = [
        (b"x-request-id", request_id.encode("ascii")),
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(_NOT_HTTP)),
        (b"connection", b"close"),
    ]
    return headers, _NOT_HTTP
