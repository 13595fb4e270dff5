# SPDX-License-Identifier: MIT OR Apache-2.0
"""Reads a request's JSON body within its limits, and within those of all bodies together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.types import Message, Scope

from embedding_server.api.headers import single_header
from embedding_server.errors import (
    BodyTooLarge,
    BodyTooSlow,
    InvalidRequest,
    Overloaded,
    UnsupportedContent,
)

__all__ = ["Bodies", "Body"]

Result = TypeVar("Result")

# Of the largest size, this many at a time: before a model's own limits can be asked, a body takes
# several times its bytes to be read and parsed.
_LARGEST_AT_A_TIME = 4

# A body that came whole and is no larger than this isn't counted: there can't be many.
_SHORT = 64 * 1024

# Between two looks at the bodies that are waited for: one timer for all of them costs nothing to
# those that come at once.
_LOOK_SECONDS = 1.0


class Bodies:
    """All bodies that a process reads and holds now: their bytes, and how long they may take.

    ``timeout`` is in seconds, for each body. For use in one event loop.
    """

    def __init__(self, *, max_body_bytes: int, timeout: float) -> None:
        self.max_body_bytes = max_body_bytes
        self.held = 0
        self._timeout = timeout
        self._since: dict[asyncio.Task[Any], float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def check(self, more: int) -> None:
        """Raise Overloaded if there is no room for ``more`` bytes."""
        if self.held + more > _LARGEST_AT_A_TIME * self.max_body_bytes:
            raise Overloaded(
                f"The server is at its limit: requests of {self.held} bytes are being read or "
                "served already. Try again later.",
                retry_after=1.0,
            )

    def watch(self, task: asyncio.Task[Any]) -> None:
        """Cancel ``task`` after the time that a body may take, unless ``leave`` comes before."""
        loop = task.get_loop()
        self._since[task] = loop.time()
        if self._timer is None:
            self._timer = loop.call_later(_LOOK_SECONDS, self._look)

    def leave(self, task: asyncio.Task[Any]) -> bool:
        """Whether ``task`` was watched until now, and not cancelled."""
        return self._since.pop(task, None) is not None

    def too_slow(self) -> BodyTooSlow:
        """What a task was cancelled for."""
        return BodyTooSlow(
            f"The body did not come within {self._timeout:g} s; send the inputs in parts."
        )

    def _look(self) -> None:
        self._timer = None
        loop = asyncio.get_running_loop()
        for task, since in list(self._since.items()):
            if loop.time() - since > self._timeout:
                del self._since[task]
                task.cancel()
        if self._since:
            self._timer = loop.call_later(_LOOK_SECONDS, self._look)


class Body:
    """One request's body; ``close`` it when nothing of it is held any more."""

    __slots__ = ("_bodies", "_closed", "_held", "_thread")

    def __init__(self, bodies: Bodies) -> None:
        self._bodies = bodies
        self._closed = False
        self._held = 0
        self._thread: asyncio.Future[Any] | None = None

    async def read(self, request: Request) -> bytes:
        """The whole body.

        Raises InvalidRequest for a header that is there twice, UnsupportedContent for anything
        but plain JSON, BodyTooLarge once more bytes than a body may have are announced or have
        come, BodyTooSlow when it takes too long, and Overloaded when other bodies leave no room
        for it.
        """
        task = asyncio.current_task()
        assert task is not None
        self._bodies.watch(task)
        try:
            return await self._read(request)
        except asyncio.CancelledError:
            if self._bodies.leave(task) or task.uncancel() > 0:  # by another, too
                raise
            raise self._bodies.too_slow() from None
        finally:
            self._bodies.leave(task)

    async def _read(self, request: Request) -> bytes:
        _check_type(request.scope)
        limit = self._bodies.max_body_bytes
        announced = _announced(request.scope)
        if announced > limit:
            raise _too_large(limit)
        if announced > _SHORT:
            self._bodies.check(announced)  # before any of it has come
        chunk, more = await _next_chunk(request)
        if not more and len(chunk) <= min(_SHORT, limit):
            return _not_empty(chunk)
        chunks = bytearray()
        while True:
            chunks += chunk
            if len(chunks) > limit:
                raise _too_large(limit)
            self._bodies.check(len(chunk))
            self._bodies.held += len(chunk)
            self._held += len(chunk)
            if not more:
                return _not_empty(bytes(chunks))
            chunk, more = await _next_chunk(request)

    async def in_thread(self, work: Callable[[], Result]) -> Result:
        """The result of ``work``, which holds the body: until it ends, whoever waits for it."""

        def unless_closed() -> Result:
            if self._closed:
                raise ClientDisconnect  # nobody waits for it
            return work()

        self._thread = asyncio.get_running_loop().run_in_executor(None, unless_closed)
        return await asyncio.shield(self._thread)

    def close(self) -> None:
        """Make room for others; when a thread still holds the body, as soon as it is done."""
        self._closed = True
        if self._thread is not None and not self._thread.done():
            self._thread.add_done_callback(self._leave)
        else:
            self._leave()

    def _leave(self, unheard: asyncio.Future[Any] | None = None) -> None:
        if unheard is not None and not unheard.cancelled():
            unheard.exception()  # or asyncio would log it
        self._bodies.held -= self._held
        self._held = 0


def _check_type(scope: Scope) -> None:
    content_type = single_header(scope, b"content-type")
    if content_type is None:
        content_type = b"application/json"
    media_type = content_type.decode("latin-1").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise UnsupportedContent(
            f"The body must be JSON, not {media_type[:100]}: send the header "
            "'Content-Type: application/json'."
        )
    if single_header(scope, b"content-encoding") is not None:
        raise UnsupportedContent(
            "The body must not be compressed: leave out the header 'Content-Encoding'."
        )


def _announced(scope: Scope) -> int:
    """Bytes that the body should have; 0 if nobody says."""
    length = single_header(scope, b"content-length") or b""
    return int(length[:20]) if length.isdigit() else 0


async def _next_chunk(request: Request) -> tuple[bytes, bool]:
    """The next part of the body, and whether more may come; raises ClientDisconnect."""
    message: Message = await request.receive()
    if message["type"] == "http.disconnect":
        raise ClientDisconnect
    return message.get("body", b""), message.get("more_body", False)


def _not_empty(body: bytes) -> bytes:
    if not body:
        raise InvalidRequest(
            'The body is empty; send JSON like {"model": "all-MiniLM-L6-v2", "input": "text"}.'
        )
    return body


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"The body is over the limit of {limit} bytes; send the inputs in parts.")
