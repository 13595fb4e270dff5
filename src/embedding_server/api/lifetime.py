# SPDX-License-Identifier: MIT OR Apache-2.0
"""How long a request is worth its work: to its deadline, and while its client is connected."""

from __future__ import annotations

import asyncio
import contextlib
import re
from types import TracebackType
from typing import Self

from fastapi import Request
from starlette.requests import ClientDisconnect

from embedding_server.api.body import body_too_slow
from embedding_server.api.headers import single_header
from embedding_server.errors import DeadlineExceeded, InvalidRequest

__all__ = ["DEADLINE_HEADER", "Lifetime", "deadline_exceeded", "seconds_given"]

DEADLINE_HEADER = b"x-request-timeout"

_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{0,9})?|\.[0-9]{1,9}")


class Lifetime:
    """Cancels the work in its ``async with`` block when its time is over or its client hangs up.

    The body must be read within ``body_seconds``, and all be done by the deadline that
    ``x-request-timeout`` sets; raises InvalidRequest for a header that is no time. The block then
    raises BodyTooSlow, DeadlineExceeded or ClientDisconnect. One ``asyncio.Timeout`` serves all
    three, so that a cancellation by anybody else passes through.
    """

    __slots__ = ("_body_seconds", "_deadline", "_hung_up", "_request", "_seconds", "_timeout",
                 "_watcher")  # fmt: skip

    def __init__(self, request: Request, body_seconds: float) -> None:
        self._request = request
        self._body_seconds = body_seconds
        self._seconds = seconds_given(request)
        now = asyncio.get_running_loop().time()
        self._deadline = None if self._seconds is None else now + self._seconds
        until = now + body_seconds
        if self._deadline is not None:
            until = min(until, self._deadline)
        self._timeout = asyncio.timeout_at(until)
        self._watcher: asyncio.Task[None] | None = None
        self._hung_up = False

    async def __aenter__(self) -> Self:
        await self._timeout.__aenter__()
        return self

    def body_read(self) -> None:
        """From now on only the deadline and the client end the work.

        ASGI servers report a hang-up only to a pending ``receive``.
        """
        self._timeout.reschedule(self._deadline)
        self._watcher = asyncio.ensure_future(self._wait_for_hang_up())

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
        try:
            await self._timeout.__aexit__(kind, error, traceback)
        except TimeoutError:
            raise self._reason() from None

    def _reason(self) -> Exception:
        if self._hung_up:
            return ClientDisconnect()
        if self._watcher is None and (self._seconds is None or self._body_seconds < self._seconds):
            return body_too_slow(self._body_seconds)
        assert self._seconds is not None
        return deadline_exceeded(self._seconds)

    async def _wait_for_hang_up(self) -> None:
        # A server whose receive fails has lost its client, too.
        with contextlib.suppress(Exception):
            while (await self._request.receive())["type"] != "http.disconnect":
                pass
        if not self._timeout.expired():
            self._hung_up = True
            self._timeout.reschedule(0)


def seconds_given(request: Request) -> float | None:
    """The value of ``x-request-timeout``; raises InvalidRequest for two, or for no time."""
    value = single_header(request.scope, DEADLINE_HEADER)
    if value is None:
        return None
    text = value.decode("latin-1")
    seconds = float(text) if _SECONDS.fullmatch(text) else 0.0
    if seconds <= 0:
        raise InvalidRequest(
            f"The header x-request-timeout must be a positive number of seconds, as 2.5, not "
            f"{text[:100]!r}.",
            param="x-request-timeout",
        )
    return seconds


def deadline_exceeded(seconds: float) -> DeadlineExceeded:
    """The error for a request whose ``seconds`` are over."""
    return DeadlineExceeded(
        f"The {seconds:g} s that x-request-timeout gave this request are over; the rest of it is "
        "not computed."
    )
