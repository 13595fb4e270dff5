"""Reads a request's JSON body within its limit."""

from __future__ import annotations

from fastapi import Request

from embedding_server.errors import BodyTooLarge, InvalidRequest, UnsupportedContent

__all__ = ["read_body"]


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body.

    Raises UnsupportedContent for anything but plain JSON, and BodyTooLarge once more than
    ``limit`` bytes are announced or have come.
    """
    content_type = request.headers.get("content-type", "application/json")
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise UnsupportedContent(
            f"The body must be JSON, not {media_type[:100]}: send the header "
            "'Content-Type: application/json'."
        )
    if "content-encoding" in request.headers:
        raise UnsupportedContent(
            "The body must not be compressed: leave out the header 'Content-Encoding'."
        )
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise _too_large(limit)
    chunks = bytearray()
    async for chunk in request.stream():
        chunks += chunk
        if len(chunks) > limit:
            raise _too_large(limit)
    if not chunks:
        raise InvalidRequest(
            'The body is empty; send JSON like {"model": "all-MiniLM-L6-v2", "input": "text"}.'
        )
    return bytes(chunks)


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"The body is over the limit of {limit} bytes; send the inputs in parts.")
