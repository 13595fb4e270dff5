# SPDX-License-Identifier: MIT OR Apache-2.0
"""The time that a client gives its request, in the header ``x-request-timeout``."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable

from fastapi import Request, Response

from embedding_server.errors import DeadlineExceeded, InvalidRequest

__all__ = ["within_deadline"]

_HEADER = b"x-request-timeout"

_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{0,9})?|\.[0-9]{1,9}")


def within_deadline(
    endpoint: Callable[[Request], Awaitable[Response]], request: Request
) -> Awaitable[Response]:
    """``endpoint(request)``, which is cancelled when the client's time for it is over.

    Raises InvalidRequest for a header that is no time, and, awaited, DeadlineExceeded.
    """
    for name, value in request.scope["headers"]:
        if name == _HEADER:
            return _limited(endpoint, request, _seconds(value.decode("latin-1")))
    return endpoint(request)


async def _limited(
    endpoint: Callable[[Request], Awaitable[Response]], request: Request, seconds: float
) -> Response:
    try:
        async with asyncio.timeout(seconds) as timeout:
            return await endpoint(request)
    except TimeoutError:
        if not timeout.expired():
            raise
    raise DeadlineExceeded(
        f"The {seconds:g} s that x-request-timeout gave this request are over; what was left of "
        "it is not computed."
    )


def _seconds(text: str) -> float:
    seconds = float(text) if _SECONDS.fullmatch(text) else 0.0
    if seconds <= 0:
        raise InvalidRequest(
            f"The header x-request-timeout must be a positive number of seconds, as 2.5, not "
            f"{text[:100]!r}.",
            param="x-request-timeout",
        )
    return seconds
