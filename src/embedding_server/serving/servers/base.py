# SPDX-License-Identifier: MIT OR Apache-2.0
"""What an ASGI server is to us, and the table of those there are; importing it loads none."""

from __future__ import annotations

import importlib
import logging
import re
import socket
import ssl
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol, Self

from starlette.types import ASGIApp

from embedding_server.api.errors import ErrorAnswer
from embedding_server.errors import ConfigurationError
from embedding_server.settings import Settings

__all__ = [
    "FIELD_BYTES",
    "MAX_HEADER_BYTES",
    "PROBE_SECONDS",
    "SERVERS",
    "UNPROBED_SECONDS",
    "AsgiServer",
    "ServerOptions",
    "head_fault",
    "refusal",
    "server_class",
]

logger = logging.getLogger(__name__)

SERVERS: Mapping[str, str] = {
    "uvicorn": "embedding_server.serving.servers.uvicorn:UvicornServer",
    "hypercorn": "embedding_server.serving.servers.hypercorn:HypercornServer",
}
"""Name -> ``module:Class``, imported on use."""

MAX_HEADER_BYTES = 32 * 1024
"""The request's target and all header fields of one request."""

FIELD_BYTES = 4
"""What a header field has beside its name and value: a colon, a space and the line's end."""

PROBE_SECONDS = 0.1
"""When a client that has closed its sending half is first asked whether it still reads.

It is sent an answer of status 100, which it must take (RFC 9110, section 15.2); if it has hung up,
its system refuses that, and so the next one fails. Each time the wait is twice as long.
"""

UNPROBED_SECONDS = 0.5
"""Such a wait is the last for a client of HTTP/1.0, which has no such answer: it counts as gone."""

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
_REFUSALS = {
    status: bytes(ErrorAnswer(status, reason, "invalid_request_error").body)
    for status, reason in _REASONS.items()
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """How to serve; times are in seconds."""

    drain_timeout: float
    """What requests under way have to finish in after ``stop``."""
    header_timeout: float
    """What a request's header may take to come."""
    idle_timeout: float
    """What a connection may be idle, or an answer go unread."""
    tls: ssl.SSLContext | None = None

    @classmethod
    def from_settings(cls, settings: Settings, tls: ssl.SSLContext | None = None) -> Self:
        """As ``settings`` want it."""
        return cls(
            drain_timeout=settings.drain_timeout,
            header_timeout=settings.header_timeout,
            idle_timeout=settings.idle_timeout,
            tls=tls,
        )


class AsgiServer(Protocol):
    """Serves one application in this process."""

    protocols: ClassVar[list[str]]
    """What it speaks over TLS, best first, by the names of ALPN (RFC 7301)."""

    def __init__(self, app: ASGIApp, options: ServerOptions) -> None: ...

    def run(self, listener: socket.socket, on_start: Callable[[], None]) -> None:
        """Serve on ``listener`` until ``stop``, and close it; signals are the caller's.

        ``on_start`` is called in the event loop before the first request. After ``stop`` no
        connection is accepted, and requests under way have ``drain_timeout`` to finish in: a
        client that never ends its request must not keep the server from ending.
        """
        ...

    def stop(self) -> None:
        """May be called at any time, from any thread, and more than once."""
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


def head_fault(version: str, headers: Iterable[tuple[bytes, bytes]]) -> int | None:
    """The status that refuses a request of HTTP/1 by its version or its Host, or None.

    Names of ``headers`` are in small letters. See RFC 9112, sections 2.3 and 3.2.
    """
    if version not in ("1.1", "1.0"):
        return 505
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) == 1:
        return None if _HOST.fullmatch(hosts[0]) else 400
    return 400 if hosts or version == "1.1" else None


def refusal(status: int) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Headers and body of the answer to what is no request, or none for us; the log has its id."""
    request_id = uuid.uuid4().hex
    body = _REFUSALS[status]
    logger.info("not HTTP", extra={"fields": {"id": request_id, "status": status}})
    headers = [
        (b"x-request-id", request_id.encode("ascii")),
        (b"content-type", b"application/json"),
        (b"x-content-type-options", b"nosniff"),
        (b"content-length", b"%d" % len(body)),
        (b"connection", b"close"),
    ]
    return headers, body
