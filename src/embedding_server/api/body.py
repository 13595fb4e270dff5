# SPDX-License-Identifier: MIT OR Apache-2.0
"""Reads a request's JSON body within its limits, and within those of all bodies together."""

from __future__ import annotations

import asyncio
from typing import Self

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.types import Scope

from embedding_server.api.headers import single_header
from embedding_server.api.parsing import check_extent, parse
from embedding_server.api.schemas import EmbedRequest
from embedding_server.engine.engine import CHARACTERS_PER_TOKEN
from embedding_server.errors import (
    BodyTooLarge,
    InvalidRequest,
    Overloaded,
    UnsupportedContent,
)
from embedding_server.settings import Settings

__all__ = ["Bodies", "Body"]

# As many bodies of the largest size at a time: reading and parsing one takes several times its
# bytes, before a model's own limits apply.
_LARGEST_AT_A_TIME = 4

# A body that came whole and is no larger than this isn't counted: there can't be many.
_SHORT = 64 * 1024

# A larger body is parsed in a thread, as health must be answered meanwhile.
_INLINE_BYTES = 256 * 1024


class Bodies:
    """The limits of bodies, and the bytes of all that a process holds; for one event loop."""

    def __init__(self, settings: Settings) -> None:
        self.max_body_bytes = settings.max_body_bytes
        self.max_inputs = settings.max_client_batch_size
        self.max_ids = settings.max_request_tokens * CHARACTERS_PER_TOKEN
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
    """One request's body, whose bytes count in ``bodies`` until the ``with`` block is left."""

    __slots__ = ("_bodies", "_closed", "_held", "_parsing")

    def __init__(self, bodies: Bodies) -> None:
        self._bodies = bodies
        self._closed = False
        self._held = 0
        self._parsing: asyncio.Future[EmbedRequest] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._closed = True
        if self._parsing is not None and not self._parsing.done():
            self._parsing.add_done_callback(self._release)  # its thread holds the bytes till then
        else:
            self._release()

    async def read(self, request: Request) -> bytes:
        """The whole body.

        Raises InvalidRequest for a repeated header, UnsupportedContent for anything but plain
        JSON, BodyTooLarge once more bytes than a body may have are announced or have come, and
        Overloaded when other bodies leave no room for it. How long it may take is for the caller
        to limit.
        """
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

    async def parse(self, content: bytes, schema: type[EmbedRequest]) -> EmbedRequest:
        """``content``, as ``read`` returned it, as a request; raises InvalidRequest."""
        if len(content) <= _INLINE_BYTES:
            return parse(schema, content)
        loop = asyncio.get_running_loop()
        self._parsing = loop.run_in_executor(None, self._parse_large, content, schema)
        return await asyncio.shield(self._parsing)

    def _parse_large(self, content: bytes, schema: type[EmbedRequest]) -> EmbedRequest:
        if self._closed:
            raise ClientDisconnect  # the request has ended while it was waiting for this thread
        check_extent(content, inputs=self._bodies.max_inputs, ids=self._bodies.max_ids)
        return parse(schema, content)

    def _release(self, parsing: asyncio.Future[EmbedRequest] | None = None) -> None:
        if parsing is not None and not parsing.cancelled():
            parsing.exception()  # or asyncio would log it as never retrieved
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
    """The body's Content-Length in bytes; 0 without one."""
    length = single_header(scope, b"content-length") or b""
    return int(length[:20]) if length.isdigit() else 0


async def _next_chunk(request: Request) -> tuple[bytes, bool]:
    """The next part of the body, and whether more may come; raises ClientDisconnect."""
    message = await request.receive()
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
