# SPDX-License-Identifier: MIT OR Apache-2.0
"""The time that a client gives its request, in the header ``x-request-timeout``."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable

from fastapi import Request, Response

from embedding_server.api.headers import single_header
from embedding_server.errors import DeadlineExceeded, InvalidRequest

__all__ = ["DEADLINE_HEADER", "deadline_exceeded", "seconds_given", "within_deadline"]

DEADLINE_HEADER = b"x-request-timeout"

_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{0,9})?|\.[0-9]{1,9}")


def within_deadline(
    endpoint: Callable[[Request], Awaitable[Response]], request: Request
) -> Awaitable[Response]:
    """``endpoint(request)``, which is cancelled when the client's time for it is over.

    Raises InvalidRequest for a header that is no time, and, awaited, DeadlineExceeded.
    """
    seconds = seconds_given(request)
    return endpoint(request) if seconds is None else _limited(endpoint, request, seconds)


def seconds_given(request: Request) -> float | None:
    """What the header says, if it is there; raises InvalidRequest for two, or for no time."""
    value = single_header(request.scope, DEADLINE_HEADER)
    return None if value is None else _seconds(value.decode("latin-1"))


def deadline_exceeded(seconds: float) -> DeadlineExceeded:
    """What to raise when the ``seconds`` are over."""
    return DeadlineExceeded(
        f"The {seconds:g} s that x-request-timeout gave this request are over; what was left of "
        "it is not computed."
    )


async def _limited(
    endpoint: Callable[[Request], Awaitable[Response]], request: Request, seconds: float
) -> Response:
    try:
        async with asyncio.timeout(seconds) as timeout:
            return await endpoint(request)
    except TimeoutError:
        if not timeout.expired():
            raise
    raise deadline_exceeded(seconds)


def _seconds(text: str) -> float:
    seconds = float(text) if _SECONDS.fullmatch(text) else 0.0
    if seconds <= 0:
        raise InvalidRequest(
            f"The header x-request-timeout must be a positive number of seconds, as 2.5, not "
            f"{text[:100]!r}.",
            param="x-request-timeout",
        )
    return seconds
