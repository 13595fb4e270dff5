"""Reads a request's JSON body within its limit, and within that of all bodies together."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.types import Message

from embedding_server.errors import BodyTooLarge, InvalidRequest, Overloaded, UnsupportedContent

__all__ = ["Body", "BodyBudget"]

# Of the largest size, this many at a time: before a model's own limits can be asked, a body takes
# several times its bytes to be read and parsed.
_LARGEST_AT_A_TIME = 4

# A body that came whole and is no larger than this isn't counted: there can't be many.
_SHORT = 64 * 1024


class BodyBudget:
    """The bytes of bodies that a process holds now, and how many it may."""

    def __init__(self, max_body_bytes: int) -> None:
        self.max_body_bytes = max_body_bytes
        self.held = 0

    def check(self, more: int) -> None:
        """Raise Overloaded if there is no room for ``more`` bytes."""
        if self.held + more > _LARGEST_AT_A_TIME * self.max_body_bytes:
            raise Overloaded(
                f"The server is at its limit: requests of {self.held} bytes are being read or "
                "served already. Try again later.",
                retry_after=1.0,
            )


class Body:
    """One request's body; ``close`` it when nothing of it is held any more."""

    __slots__ = ("_budget", "_held")

    def __init__(self, budget: BodyBudget) -> None:
        self._budget = budget
        self._held = 0

    async def read(self, request: Request) -> bytes:
        """The whole body.

        Raises UnsupportedContent for anything but plain JSON, BodyTooLarge once more bytes than
        a body may have are announced or have come, and Overloaded when other bodies leave no room
        for them.
        """
        headers: dict[bytes, bytes] = dict(request.scope["headers"])
        _check_type(headers)
        limit = self._budget.max_body_bytes
        announced = _announced(headers)
        if announced > limit:
            raise _too_large(limit)
        if announced > _SHORT:
            self._budget.check(announced)  # before any of it has come
        chunk, more = await _next_chunk(request)
        if not more and len(chunk) <= min(_SHORT, limit):
            return _not_empty(chunk)
        chunks = bytearray()
        while True:
            chunks += chunk
            if len(chunks) > limit:
                raise _too_large(limit)
            self._budget.check(len(chunk))
            self._budget.held += len(chunk)
            self._held += len(chunk)
            if not more:
                return _not_empty(bytes(chunks))
            chunk, more = await _next_chunk(request)

    def close(self) -> None:
        """Make room for others."""
        self._budget.held -= self._held
        self._held = 0


def _check_type(headers: Mapping[bytes, bytes]) -> None:
    content_type = headers.get(b"content-type", b"application/json").decode("latin-1")
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise UnsupportedContent(
            f"The body must be JSON, not {media_type[:100]}: send the header "
            "'Content-Type: application/json'."
        )
    if b"content-encoding" in headers:
        raise UnsupportedContent(
            "The body must not be compressed: leave out the header 'Content-Encoding'."
        )


def _announced(headers: Mapping[bytes, bytes]) -> int:
    """Bytes that the body should have; 0 if nobody says."""
    length = headers.get(b"content-length", b"")
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
