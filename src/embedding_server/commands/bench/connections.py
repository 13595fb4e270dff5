# SPDX-License-Identifier: MIT OR Apache-2.0
"""Keep-alive connections that cost little: prebuilt requests out, status and tail of answers in.

The generator shares the machine with the server it measures, so an answer isn't parsed: only
its length is followed, and the last bytes are kept.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self, cast
from urllib.parse import urlsplit

from embedding_server.errors import ConfigurationError

__all__ = ["CLOSED", "UNFRAMED", "Answer", "Connection", "Pool", "Target", "fetch", "parse_target"]

CLOSED = 0
"""In place of a status: the server closed the connection instead of answering."""
UNFRAMED = -1
"""In place of a status: no HTTP/1.1, or no Content-Length that tells where the answer ends."""

_TAIL = 512
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)")
_REOPEN_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go."""

    host: str
    port: int
    path: str
    """Of the embeddings route."""
    api_key: str | None = None

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    @property
    def models_path(self) -> str:
        """The route beside the embeddings' that lists models."""
        return self.path.removesuffix("embeddings") + "models"

    def post(self, body: bytes) -> bytes:
        """The whole request for ``body``, JSON."""
        head = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        return self._head("POST", self.path, head) + body

    def get(self, path: str) -> bytes:
        """The whole request for ``path``."""
        return self._head("GET", path, "")

    def _head(self, method: str, path: str, headers: str) -> bytes:
        host = self.url.removeprefix("http://")
        key = f"Authorization: Bearer {self.api_key}\r\n" if self.api_key else ""
        return f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n{key}{headers}\r\n".encode()


def parse_target(url: str, api_key: str | None = None) -> Target:
    """Read ``http://host:port``, to which /v1/embeddings is added unless the path ends so.

    Raises ConfigurationError for anything else.
    """
    try:
        parts = urlsplit(url)
        port = parts.port or 80
    except ValueError:  # a port that is no number
        parts, port = urlsplit(""), 0
    if parts.scheme != "http" or not parts.hostname or parts.query or parts.fragment:
        raise ConfigurationError(
            f"--url {url!r} must be as http://127.0.0.1:5000; over https the encryption would be "
            "measured, too."
        )
    path = parts.path.rstrip("/")
    if not path.endswith("/embeddings"):
        path = path.removesuffix("/v1") + "/v1/embeddings"
    return Target(parts.hostname, port, path, api_key)


@dataclass(frozen=True, slots=True)
class Answer:
    """``status`` may be ``CLOSED`` or ``UNFRAMED``; ``body`` is the kept end of the body."""

    status: int
    body: bytes

    @property
    def reason(self) -> str:
        """The sentence of an error in our and OpenAI's shape, else the beginning of the body."""
        try:
            return str(json.loads(self.body)["error"]["message"])
        except (ValueError, LookupError, TypeError):
            return self.body[:300].decode(errors="replace").strip() or "it says no more."


class Connection(asyncio.Protocol):
    """One connection, with one request under way at a time."""

    def __init__(
        self,
        on_answer: Callable[[Connection, Answer], None],
        on_lost: Callable[[Connection], None],
        *,
        keep: int = _TAIL,
    ) -> None:
        self._on_answer = on_answer
        self._on_lost = on_lost
        self._keep = keep
        self._transport: asyncio.Transport | None = None
        self._waiting = self._closing = False
        self._head = self._body = b""
        self._missing = -1
        self._status = CLOSED

    @property
    def usable(self) -> bool:
        """Whether it is open and no request is under way."""
        return self._transport is not None and not self._waiting and not self._closing

    def send(self, request: bytes) -> None:
        """Send it; ``on_answer`` tells the end."""
        assert self._transport is not None
        self._waiting = True
        self._head = self._body = b""
        self._missing = -1
        self._transport.write(request)

    def close(self) -> None:
        """Hang up, whatever is under way."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is only like one

    def data_received(self, data: bytes) -> None:
        if self._missing < 0:
            self._head += data
            end = self._head.find(b"\r\n\r\n")
            if end < 0:
                return
            head, data = self._head[:end].lower(), self._head[end + 4 :]
            length = _LENGTH.search(head)
            if length is None or not head.startswith(b"http/1."):
                self._closing = True
                self._finish(UNFRAMED)
                self.close()
                return
            self._status, self._missing = int(head[9:12]), int(length[1])
            self._closing = b"\r\nconnection: close" in head
        self._missing -= len(data)
        whole = data if len(data) >= self._keep else self._body + data
        self._body = whole[-self._keep :]
        if self._missing <= 0:
            self._finish(self._status)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._finish(CLOSED)
        self._on_lost(self)

    def _finish(self, status: int) -> None:
        if self._waiting:
            self._waiting = False
            self._on_answer(self, Answer(status, self._body))


class Pool:
    """A number of connections to one server; one that is lost is opened again.

    ``on_ready`` is called with each connection that can be used: after ``start`` with all of
    them, later with those that were opened again.
    """

    def __init__(self, target: Target, size: int) -> None:
        self._target = target
        self._size = size
        self._open: list[Connection] = []
        self._reopening: set[asyncio.Task[None]] = set()
        self._closed = False
        self._on_answer: Callable[[Connection, Answer], None] | None = None
        self._on_ready: Callable[[Connection], None] | None = None

    async def __aenter__(self) -> Self:
        try:
            self._open = [await self._connect() for _ in range(self._size)]
        except OSError as error:
            raise _unreachable(self._target, error) from None
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
        self._closed = True
        for task in self._reopening:
            task.cancel()
        await asyncio.gather(*self._reopening, return_exceptions=True)
        for connection in self._open:
            connection.close()
        await asyncio.sleep(0)  # lets the transports close

    @property
    def connected(self) -> bool:
        """Whether any connection is open."""
        return bool(self._open)

    def start(
        self,
        on_ready: Callable[[Connection], None],
        on_answer: Callable[[Connection, Answer], None],
    ) -> None:
        """Call these from now on, and ``on_ready`` for every connection at once."""
        self._on_ready, self._on_answer = on_ready, on_answer
        for connection in list(self._open):
            if connection.usable:
                on_ready(connection)

    def stop(self) -> None:
        """Call nobody any more."""
        self._on_ready = self._on_answer = None

    async def _connect(self) -> Connection:
        _, connection = await asyncio.get_running_loop().create_connection(
            lambda: Connection(self._answered, self._lost), self._target.host, self._target.port
        )
        return connection

    def _answered(self, connection: Connection, answer: Answer) -> None:
        if self._on_answer is not None:
            self._on_answer(connection, answer)
        if connection.usable and self._on_ready is not None:
            self._on_ready(connection)

    def _lost(self, connection: Connection) -> None:
        if self._closed:
            return
        self._open.remove(connection)
        task = asyncio.get_running_loop().create_task(self._reopen())
        self._reopening.add(task)
        task.add_done_callback(self._reopening.discard)

    async def _reopen(self) -> None:
        while True:
            await asyncio.sleep(_REOPEN_SECONDS)
            try:
                connection = await self._connect()
            except OSError:
                continue
            self._open.append(connection)
            if self._on_ready is not None:
                self._on_ready(connection)
            return


async def fetch(target: Target, request: bytes, *, seconds: float) -> Answer:
    """One request on a connection of its own, with the answer's whole body.

    Raises ConfigurationError if the server can't be reached, and TimeoutError.
    """
    loop = asyncio.get_running_loop()
    answered: asyncio.Future[Answer] = loop.create_future()

    def finish(_: Connection, answer: Answer) -> None:
        if not answered.done():
            answered.set_result(answer)

    def make() -> Connection:
        return Connection(finish, lambda _: None, keep=2**62)

    try:
        _, connection = await loop.create_connection(make, target.host, target.port)
    except OSError as error:
        raise _unreachable(target, error) from None
    try:
        connection.send(request)
        return await asyncio.wait_for(answered, seconds)
    finally:
        connection.close()


def _unreachable(target: Target, error: OSError) -> ConfigurationError:
    reason = error.strerror or str(error)
    return ConfigurationError(f"There is no server at {target.url}: {reason}.")
