# SPDX-License-Identifier: MIT OR Apache-2.0
"""Two kinds of load: each connection as fast as it is answered, or requests at a fixed rate."""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from embedding_server.commands.bench.connections import CLOSED, UNFRAMED, Answer, Connection, Pool

__all__ = ["Answered", "Load", "closed_loop", "fixed_rate"]

_PATIENCE = 600.0
"""Seconds that what is under way at the end may still take."""

_PROMPT_TOKENS = re.compile(rb'"prompt_tokens"\s*:\s*(\d+)')
_FAILURES = {CLOSED: "closed", UNFRAMED: "unframed"}


@dataclass(frozen=True, slots=True)
class Answered:
    """One request that was answered with 200."""

    request: int
    """Its place in the cycle."""
    seconds: float
    """From when it was due to the answer's last byte."""
    tokens: int | None
    """What the server says it computed; None if it doesn't."""


@dataclass(slots=True)
class Load:
    """What came of a load; it grows while the load lasts."""

    answered: list[Answered] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    """By status; ``closed``, ``unframed`` or ``unanswered`` where there is none."""
    first_failure: str | None = None
    """What the server said to the first that failed."""
    seconds: float = 0.0
    """From the start to the last answer."""

    @property
    def tokens(self) -> int | None:
        """Of all answers; None if one of them doesn't tell."""
        tokens = [answered.tokens for answered in self.answered if answered.tokens is not None]
        return sum(tokens) if len(tokens) == len(self.answered) else None

    def percentile(self, share: float) -> float | None:
        """The least latency, in seconds, that ``share`` of the answers didn't exceed."""
        latencies = sorted(answered.seconds for answered in self.answered)
        return latencies[max(0, math.ceil(share * len(latencies)) - 1)] if latencies else None


async def closed_loop(
    pool: Pool, requests: Sequence[bytes], *, seconds: float, load: Load | None = None
) -> Load:
    """Every connection of ``pool`` sends the next of ``requests`` as soon as it is answered.

    After ``seconds`` no more are sent; those under way are waited for, and count with their time,
    so that few long requests are measured as exactly as many short ones.
    """
    return await _ClosedLoop(pool, requests, load or Load(), seconds).run()


async def fixed_rate(
    pool: Pool,
    requests: Sequence[bytes],
    *,
    rate: float,
    seconds: float,
    load: Load | None = None,
) -> Load:
    """``rate`` requests a second for ``seconds``, whether or not earlier ones are answered.

    A latency counts from the time its request was due. Where no connection is free, the request
    waits for one, and the wait is part of its latency: else a slow server would be asked less
    often just when it is slow, and that would not show.
    """
    return await _FixedRate(pool, requests, load or Load(), seconds, rate).run()


class _Run:
    """What both kinds share: sending, recording, and waiting for the last answer."""

    def __init__(self, pool: Pool, requests: Sequence[bytes], load: Load, seconds: float) -> None:
        self._pool = pool
        self._requests = requests
        self._load = load
        self._seconds = seconds
        self._sent = 0
        self._under_way: dict[Connection, tuple[int, float]] = {}
        self._queue: deque[float] = deque()
        self._started = 0.0

    async def run(self) -> Load:
        self._started = time.perf_counter()
        self._pool.start(self._ready, self._answered)
        try:
            await self._offer()
            await self._rest()
        finally:
            self._pool.stop()
        return self._load

    async def _offer(self) -> None:
        """Last as long as requests are to be sent."""
        raise NotImplementedError

    def _ready(self, connection: Connection) -> None:
        raise NotImplementedError

    def _send(self, connection: Connection, due: float) -> None:
        place = self._sent % len(self._requests)
        self._sent += 1
        self._under_way[connection] = place, due
        connection.send(self._requests[place])

    def _answered(self, connection: Connection, answer: Answer) -> None:
        now = time.perf_counter()
        if connection not in self._under_way:
            return  # of an earlier load, which has given it up
        place, due = self._under_way.pop(connection)
        self._load.seconds = now - self._started
        if answer.status == 200:
            usage = _PROMPT_TOKENS.search(answer.body)
            tokens = int(usage[1]) if usage else None
            self._load.answered.append(Answered(place, now - due, tokens))
        else:
            self._load.failures[_FAILURES.get(answer.status, str(answer.status))] += 1
            if self._load.first_failure is None and answer.status > 0:
                self._load.first_failure = answer.reason

    async def _rest(self) -> None:
        """Wait for what is still to be answered."""
        end = time.perf_counter() + _PATIENCE
        while self._under_way or self._queue:
            if time.perf_counter() > end or not (self._under_way or self._pool.connected):
                self._load.failures["unanswered"] += len(self._under_way) + len(self._queue)
                return
            await asyncio.sleep(0.01)


class _ClosedLoop(_Run):
    _over = False

    async def _offer(self) -> None:
        await asyncio.sleep(self._seconds)
        self._over = True

    def _ready(self, connection: Connection) -> None:
        if not self._over:
            self._send(connection, time.perf_counter())


class _FixedRate(_Run):
    def __init__(
        self, pool: Pool, requests: Sequence[bytes], load: Load, seconds: float, rate: float
    ) -> None:
        super().__init__(pool, requests, load, seconds)
        self._rate = rate
        self._idle: list[Connection] = []

    async def _offer(self) -> None:
        for number in range(max(1, round(self._rate * self._seconds))):
            due = self._started + number / self._rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            self._queue.append(due)
            # The connection used last is the least likely to be closed for idleness.
            while self._queue and self._idle:
                self._ready(self._idle.pop())
        await asyncio.sleep(max(0.0, self._started + self._seconds - time.perf_counter()))
        self._load.seconds = self._seconds

    def _ready(self, connection: Connection) -> None:
        if not connection.usable:
            return
        if self._queue:
            self._send(connection, self._queue.popleft())
        else:
            self._idle.append(connection)
