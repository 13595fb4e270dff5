# SPDX-License-Identifier: MIT OR Apache-2.0
"""Two kinds of load: each connection as fast as it is answered, or requests at a fixed rate."""

from __future__ import annotations

import asyncio
import itertools
import math
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from embedding_server.commands.bench.connections import CLOSED, UNFRAMED, Answer, Connection
from embedding_server.commands.bench.report import significant

__all__ = ["Answered", "Load", "closed_loop", "fixed_rate"]

_PATIENCE = 600.0
"""Seconds after the end within which requests under way must be answered."""

_PROMPT_TOKENS = re.compile(rb'"prompt_tokens"\s*:\s*(\d+)')
_FAILURES = {CLOSED: "closed", UNFRAMED: "unframed"}
_PERCENTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}


@dataclass(frozen=True, slots=True)
class Answered:
    """One request that was answered with 200."""

    request: int
    """Its place in the cycle."""
    seconds: float
    """From when it was due to the answer's last byte."""
    tokens: int | None
    """The tokens that the server reports; None if it reports none."""


@dataclass(slots=True)
class Load:
    """The answers and failures of a load; it grows while the load lasts."""

    answered: list[Answered] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    """By status; ``closed``, ``unframed`` or ``unanswered`` where there is none."""
    first_failure: str | None = None
    """The server's reason for the first failure."""
    sent: int = 0
    started: float = 0.0
    seconds: float = 0.0
    """From the start to the last answer."""

    @property
    def tokens(self) -> int | None:
        """The tokens of all answers; None if one of them reports none."""
        tokens = [answered.tokens for answered in self.answered if answered.tokens is not None]
        return sum(tokens) if len(tokens) == len(self.answered) else None

    def percentile(self, share: float) -> float | None:
        """The least latency, in seconds, that ``share`` of the answers didn't exceed."""
        latencies = sorted(answered.seconds for answered in self.answered)
        return latencies[max(0, math.ceil(share * len(latencies)) - 1)] if latencies else None

    def latency_ms(self) -> dict[str, float | None]:
        """The percentiles that are reported, in milliseconds."""
        found = {name: self.percentile(share) for name, share in _PERCENTILES.items()}
        return {
            name: None if seconds is None else significant(seconds * 1000)
            for name, seconds in found.items()
        }

    def record(self, request: int, due: float, answer: Answer) -> None:
        """Add the answer that has just come to ``request``, which was due at ``due``."""
        now = time.perf_counter()
        self.seconds = now - self.started
        if answer.status == 200:
            usage = _PROMPT_TOKENS.search(answer.body)
            tokens = int(usage[1]) if usage else None
            self.answered.append(Answered(request, now - due, tokens))
            return
        self.failures[_FAILURES.get(answer.status, str(answer.status))] += 1
        if self.first_failure is None and answer.status > 0:
            self.first_failure = answer.reason

    def end(self) -> None:
        """Count the requests that got no answer as failures."""
        unanswered = self.sent - len(self.answered) - self.failures.total()
        if unanswered:
            self.failures["unanswered"] += unanswered


async def closed_loop(
    connections: Sequence[Connection],
    requests: Sequence[bytes],
    *,
    seconds: float,
    load: Load | None = None,
) -> Load:
    """Every connection sends the next of ``requests`` as soon as it is answered.

    After ``seconds`` no more are sent; those under way are waited for, and count with their time,
    so that few long requests are measured as exactly as many short ones.
    """
    load = load or Load()
    load.started = time.perf_counter()
    end = load.started + seconds
    cycle = itertools.cycle(enumerate(requests))

    async def send(connection: Connection) -> None:
        while (now := time.perf_counter()) < end:
            if not await connection.reopen(until=end):
                return
            place, request = next(cycle)
            load.sent += 1
            load.record(place, now, await connection.request(request))

    try:
        async with asyncio.timeout(seconds + _PATIENCE), asyncio.TaskGroup() as group:
            for connection in connections:
                group.create_task(send(connection))
    except TimeoutError:
        pass  # counted as unanswered
    load.end()
    return load


async def fixed_rate(
    connections: Sequence[Connection],
    requests: Sequence[bytes],
    *,
    rate: float,
    seconds: float,
    load: Load | None = None,
) -> Load:
    """``rate`` requests a second for ``seconds``, whether or not earlier ones are answered.

    A latency counts from the time its request was due. If no connection is free, the request
    waits for one, and the wait is part of its latency: else a slow server would get fewer
    requests just when it is slow, and the latencies would not show it.
    """
    load = load or Load()
    load.started = time.perf_counter()
    end = load.started + seconds
    # The connection used last is the first to be used again: the server closes idle ones.
    idle = list(connections)
    free = asyncio.Semaphore(len(idle))

    async def send(place: int, due: float) -> None:
        async with free:
            connection = idle.pop()
            if await connection.reopen(until=end):
                load.record(place, due, await connection.request(requests[place]))
            idle.append(connection)

    try:
        async with asyncio.timeout(seconds + _PATIENCE), asyncio.TaskGroup() as group:
            for number in range(max(1, round(rate * seconds))):
                due = load.started + number / rate
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                load.sent += 1
                group.create_task(send(number % len(requests), due))
            await asyncio.sleep(max(0.0, end - time.perf_counter()))
    except TimeoutError:
        pass  # counted as unanswered
    load.end()
    load.seconds = max(load.seconds, seconds)
    return load
