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

from embedding_server.api.headers import single_header
from embedding_server.errors import BodyTooSlow, DeadlineExceeded, InvalidRequest

__all__ = ["DEADLINE_HEADER", "BodyClock", "Lifetime"]

DEADLINE_HEADER = b"x-request-timeout"

_LOOK_SECONDS = 1.0

_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{0,9})?|\.[0-9]{1,9}")


class Lifetime:
    """Cancels the work in its ``async with`` block when its time is over or its client hangs up.

    The body must be read within the time of ``clock``, and all be done by the deadline that
    ``x-request-timeout`` sets; raises InvalidRequest for a header that is no time. The block then
    raises BodyTooSlow, DeadlineExceeded or ClientDisconnect. One ``asyncio.Timeout`` serves all
    three, so that a cancellation by anybody else passes through. The block is cancelled ``grace``
    seconds after the deadline.
    """

    __slots__ = ("_clock", "_grace", "_reason", "_request", "_seconds", "_timeout", "_watcher")

    def __init__(self, request: Request, clock: BodyClock, *, grace: float = 0.0) -> None:
        self._request = request
        self._clock = clock
        self._seconds = _seconds_given(request)
        self._grace = grace
        self._timeout = asyncio.timeout(None if self._seconds is None else self._seconds + grace)
        self._watcher: asyncio.Task[None] | None = None
        self._reason: Exception | None = None

    async def __aenter__(self) -> Self:
        await self._timeout.__aenter__()
        self._clock.start(self)
        return self

    @property
    def deadline(self) -> float | None:
        """In the event loop's time; None without one."""
        end = self._timeout.when()
        return None if end is None else end - self._grace

    def body_read(self, *, watch_client: bool = True) -> None:
        """From now on only the deadline ends the work, and the client with ``watch_client``."""
        self._clock.stop(self)
        if watch_client:  # ASGI servers report a hang-up only to a pending ``receive``
            self._watcher = asyncio.ensure_future(self._wait_for_hang_up())

    def end(self, reason: Exception) -> None:
        """Cancel the work, and let the block raise ``reason``, unless its deadline came first."""
        if not self._timeout.expired():
            self._reason = reason
            self._timeout.reschedule(0)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._clock.stop(self)
        if self._watcher is not None:
            self._watcher.cancel()
        try:
            await self._timeout.__aexit__(kind, error, traceback)
        except TimeoutError:
            raise (self._reason or self._deadline_exceeded()) from None

    def _deadline_exceeded(self) -> DeadlineExceeded:
        return DeadlineExceeded(
            f"The {self._seconds:g} s that x-request-timeout gave this request are over; the rest "
            "of it is not computed."
        )

    async def _wait_for_hang_up(self) -> None:
        # A server whose receive fails has lost its client, too.
        with contextlib.suppress(Exception):
            while (await self._request.receive())["type"] != "http.disconnect":
                pass
        self.end(ClientDisconnect())


class BodyClock:
    """Ends lifetimes whose body takes longer than ``seconds``; for use in one event loop.

    One timer for all of them: one for each request would take 5 % of a short request's time.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._started: dict[Lifetime, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def start(self, lifetime: Lifetime) -> None:
        """Count the time of the body of ``lifetime`` from now."""
        loop = asyncio.get_running_loop()
        self._started[lifetime] = loop.time()
        if self._timer is None:
            self._timer = loop.call_later(_LOOK_SECONDS, self._look)

    def stop(self, lifetime: Lifetime) -> None:
        """Count it no longer."""
        self._started.pop(lifetime, None)

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        too_long_ago = loop.time() - self._seconds
        for lifetime in [one for one, since in self._started.items() if since < too_long_ago]:
            self.stop(lifetime)
            reason = f"The body did not come within {self._seconds:g} s; send the inputs in parts."
            lifetime.end(BodyTooSlow(reason))
        self._timer = loop.call_later(_LOOK_SECONDS, self._look) if self._started else None


def _seconds_given(request: Request) -> float | None:
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
