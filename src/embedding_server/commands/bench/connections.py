# SPDX-License-Identifier: MIT OR Apache-2.0
"""Keep-alive connections that cost little CPU time.

The generator shares the machine with the server that it measures. So requests are built before,
and an answer isn't parsed: its length is followed, and its last bytes are kept.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

from embedding_server.errors import ConfigurationError

__all__ = [
    "CLOSED",
    "UNFRAMED",
    "Answer",
    "Connection",
    "Target",
    "connected",
    "fetch",
    "parse_target",
]

CLOSED = 0
"""Stands for a status: the server closed the connection and didn't answer."""
UNFRAMED = -1
"""Stands for a status: the answer is no HTTP/1.1, or has no Content-Length."""

_TAIL = 512
_REOPEN_SECONDS = 0.1
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)")


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go."""

    host: str
    port: int
    path: str
    """The path of the embeddings route."""
    api_key: str | None = None

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    @property
    def models_path(self) -> str:
        """The path of the route that lists models, next to the embeddings route."""
        return self.path.removesuffix("embeddings") + "models"

    def post(self, body: bytes) -> bytes:
        """The bytes of a request that sends ``body``, JSON, for embeddings."""
        head = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        return self._head("POST", self.path, head) + body

    def get(self, path: str) -> bytes:
        """The bytes of a request for ``path``."""
        return self._head("GET", path, "")

    def _head(self, method: str, path: str, headers: str) -> bytes:
        host = self.url.removeprefix("http://")
        key = f"Authorization: Bearer {self.api_key}\r\n" if self.api_key else ""
        return f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n{key}{headers}\r\n".encode()


def parse_target(url: str, api_key: str | None = None) -> Target:
    """Read ``http://host:port``; /v1/embeddings is added unless the path ends in /embeddings.

    Raises ConfigurationError for anything else.
    """
    try:
        parts = urlsplit(url)
        port = parts.port or 80
    except ValueError:  # the port is no number
        parts, port = urlsplit(""), 0
    if parts.scheme != "http" or not parts.hostname or parts.query or parts.fragment:
        raise ConfigurationError(
            f"--url {url!r} must be as http://127.0.0.1:5000; with https the encryption would be "
            "measured, too."
        )
    path = parts.path.rstrip("/")
    if not path.endswith("/embeddings"):
        path = path.removesuffix("/v1") + "/v1/embeddings"
    return Target(parts.hostname, port, path, api_key)


@dataclass(frozen=True, slots=True)
class Answer:
    """The status, or ``CLOSED`` or ``UNFRAMED``, and the end of the body."""

    status: int
    body: bytes

    @property
    def reason(self) -> str:
        """The message of an error in OpenAI's shape and ours, else the beginning of the body."""
        try:
            return str(json.loads(self.body)["error"]["message"])
        except (ValueError, LookupError, TypeError):
            return self.body[:300].decode(errors="replace").strip() or "no reason given."


class Connection(asyncio.Protocol):
    """A connection to one server with one request under way at a time; it can be reopened."""

    def __init__(self, target: Target, *, keep: int = _TAIL) -> None:
        """Of each body the last ``keep`` bytes are kept."""
        self._target = target
        self._keep = keep
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[Answer] | None = None
        self._ending = False
        self._head = self._body = b""
        self._missing = -1
        self._status = CLOSED

    async def open(self) -> None:
        """Connect; raises OSError if the server can't be reached."""
        self.close()
        self._ending = False
        loop = asyncio.get_running_loop()
        await loop.create_connection(lambda: self, self._target.host, self._target.port)

    async def reopen(self, *, until: float) -> bool:
        """Connect if the connection was closed; returns whether it is open by the time ``until``.

        One attempt is always made. ``until`` is of ``time.perf_counter``.
        """
        while self._transport is None or self._ending:
            try:
                await self.open()
            except OSError:
                if time.perf_counter() > until:
                    return False
                await asyncio.sleep(_REOPEN_SECONDS)
        return True

    async def request(self, request: bytes) -> Answer:
        """Send ``request`` on the open connection and wait for the answer."""
        assert self._transport is not None
        self._answer = asyncio.get_running_loop().create_future()
        self._head = self._body = b""
        self._missing = -1
        self._transport.write(request)
        try:
            return await self._answer
        except asyncio.CancelledError:  # the answer may still come, and must not be the next one's
            self.close()
            raise

    def close(self) -> None:
        """Hang up, even if a request is under way."""
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        if self._missing < 0:
            self._head += data
            end = self._head.find(b"\r\n\r\n")
            if end < 0:
                return
            head, data = self._head[:end].lower(), self._head[end + 4 :]
            length = _LENGTH.search(head)
            if length is None or not head.startswith(b"http/1."):
                self._finish(UNFRAMED)
                self.close()
                return
            self._status, self._missing = int(head[9:12]), int(length[1])
            self._ending = b"\r\nconnection: close" in head
        self._missing -= len(data)
        whole = data if len(data) >= self._keep else self._body + data
        self._body = whole[-self._keep :]
        if self._missing <= 0:
            self._finish(self._status)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._finish(CLOSED)

    def _finish(self, status: int) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(Answer(status, self._body))


@asynccontextmanager
async def connected(target: Target, count: int) -> AsyncIterator[list[Connection]]:
    """``count`` open connections, closed at the end.

    Raises ConfigurationError if the server can't be reached.
    """
    connections = [Connection(target) for _ in range(count)]
    try:
        for connection in connections:
            await _open(connection, target)
        yield connections
    finally:
        for connection in connections:
            connection.close()
        await asyncio.sleep(0)  # the transports close in the next turn of the loop


async def fetch(target: Target, request: bytes, *, seconds: float) -> Answer:
    """Send one request on a new connection; the answer has the whole body.

    Raises ConfigurationError if the server can't be reached, and TimeoutError.
    """
    connection = Connection(target, keep=2**62)
    try:
        await _open(connection, target)
        async with asyncio.timeout(seconds):
            return await connection.request(request)
    finally:
        connection.close()


async def _open(connection: Connection, target: Target) -> None:
    try:
        await connection.open()
    except OSError as error:
        raise ConfigurationError(
            f"There is no server at {target.url}: {error.strerror or error}."
        ) from None
