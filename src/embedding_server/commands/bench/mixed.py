# SPDX-License-Identifier: MIT OR Apache-2.0
"""Single queries beside an endless job: what each loses by the other.

Queries alone, the job alone, and both, in several rounds of these three: the machine's speed
may change over the minutes, and then changes all three alike.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from embedding_server.commands.bench.connections import Pool
from embedding_server.commands.bench.load import Load, closed_loop, fixed_rate
from embedding_server.commands.bench.measure import Costs, Watch, latencies, warm_requests
from embedding_server.commands.bench.report import number, significant
from embedding_server.commands.bench.subject import Subject
from embedding_server.commands.bench.usage import read_metric
from embedding_server.commands.bench.workloads import build_workload, request_bodies
from embedding_server.errors import ConfigurationError

__all__ = ["JOB", "QUERIES", "Mixed", "measure_mixed"]

QUERIES = "query"
JOB = "bulk"

_ROUNDS = 3
_COMPUTED = "embedding_server_batch_tokens_sum"
"""Grows with each batch, so that the job's progress shows long before its answer."""
_WAITING = "embedding_server_queue_requests"
_QUIET_SECONDS = 60.0
_WARM_UP_SECONDS = 1.0
_LOOK_SECONDS = 0.1
_ENDLESS = 1e6


@dataclass(slots=True)
class Mixed:
    """What the rounds came to; a list has one entry a round."""

    alone: list[Load] = field(default_factory=list)
    """Queries without the job."""
    beside: list[Load] = field(default_factory=list)
    """Queries with it."""
    job_alone: list[float] = field(default_factory=list)
    """Tokens of the job a second, without queries."""
    job_beside: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    """Of queries and of the job."""
    first_failure: str | None = None
    """What the server said to the first of them."""
    costs: Costs | None = None
    """Of all rounds together, with the pauses in between."""

    @property
    def answered(self) -> int:
        """Queries that were answered."""
        return sum(len(load.answered) for load in (*self.alone, *self.beside))

    @property
    def p99_ratio(self) -> float | None:
        """How many times a query's 99th percentile grows beside the job."""
        alone, beside = (_together(loads).percentile(0.99) for loads in (self.alone, self.beside))
        return beside / alone if alone and beside else None

    @property
    def job_share(self) -> float | None:
        """What the job keeps of its throughput beside the queries."""
        return sum(self.job_beside) / sum(self.job_alone) if sum(self.job_alone) else None

    def rows(self) -> list[tuple[str, str]]:
        """For people."""
        costs = self.costs
        assert costs is not None
        return [
            ("queries alone, ms", _told(self.alone)),
            ("beside the job, ms", _told(self.beside)),
            ("p99 beside / alone", number(self.p99_ratio)),
            ("job alone, tokens/s", number(_mean(self.job_alone))),
            ("beside queries", number(_mean(self.job_beside))),
            ("job keeps", number(self.job_share, "%", scale=100)),
            ("server CPU", number(costs.server_cpu_seconds, "s")),
            ("generator CPU", number(costs.generator_cpu_seconds, "s")),
            ("server memory, peak", number(costs.peak_bytes, "MB", scale=2**-20)),
        ]

    def result(self) -> dict[str, object]:
        """For programs."""
        costs = self.costs
        assert costs is not None
        return {
            "rounds": len(self.alone),
            "failures": dict(self.failures),
            "queries_alone": _figures(self.alone),
            "queries_beside": _figures(self.beside),
            "p99_ratio": significant(self.p99_ratio),
            "job_alone_tokens_per_second": [significant(rate) for rate in self.job_alone],
            "job_beside_tokens_per_second": [significant(rate) for rate in self.job_beside],
            "job_share": significant(self.job_share),
            "server_cpu_seconds": significant(costs.server_cpu_seconds),
            "generator_cpu_seconds": significant(costs.generator_cpu_seconds),
            "server_resident_bytes": costs.resident_bytes,
            "server_peak_bytes": costs.peak_bytes,
        }


async def measure_mixed(
    subject: Subject, model: str, *, connections: int, seconds: float, rate: float
) -> Mixed:
    """Three rounds; each of their three phases lasts ``seconds``.

    Raises ConfigurationError for a server whose /metrics don't show a job's progress.
    """
    if await read_metric(subject.target, _COMPUTED) is None:
        raise ConfigurationError(
            f"'mixed' reads a job's progress from {_COMPUTED} in {subject.target.url}/metrics, and "
            "there is none."
        )
    queries, job = (build_workload(name) for name in (QUERIES, JOB))
    query_requests = [subject.target.post(body) for body in request_bodies(queries, model)]
    job_requests = [subject.target.post(body) for body in request_bodies(job, model)]
    for request in (query_requests[0], *warm_requests(subject, job, model)):
        await subject.try_out(request)
    mixed = Mixed()
    phase = "mixed"
    async with Pool(subject.target, connections) as pool:

        async def ask(seconds: float) -> Load:
            load = await fixed_rate(pool, query_requests, rate=rate, seconds=seconds)
            mixed.failures += load.failures
            mixed.first_failure = mixed.first_failure or load.first_failure
            return load

        await ask(min(_WARM_UP_SECONDS, seconds))
        async with Watch(subject, lambda: phase) as watch:
            for round in range(1, _ROUNDS + 1):
                phase = f"mixed, round {round} of {_ROUNDS}, queries alone"
                mixed.alone.append(await ask(seconds))
                phase = f"mixed, round {round} of {_ROUNDS}, job alone"
                async with _Job(subject, job_requests, mixed.failures) as job_alone:
                    await asyncio.sleep(seconds)
                    mixed.job_alone.append(await job_alone.rate(but=0))
                phase = f"mixed, round {round} of {_ROUNDS}, both"
                async with _Job(subject, job_requests, mixed.failures) as job_beside:
                    load = await ask(seconds)
                    mixed.beside.append(load)
                    mixed.job_beside.append(await job_beside.rate(but=load.tokens or 0))
    mixed.costs = watch.costs
    return mixed


class _Job:
    """An endless sequence of large requests on one connection, under way while the body runs."""

    def __init__(self, subject: Subject, requests: Sequence[bytes], failures: Counter[str]) -> None:
        self._subject = subject
        self._requests = requests
        self._failures = failures
        self._load = Load()
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        before = await self._computed()
        pool = await self._stack.enter_async_context(Pool(self._subject.target, 1))
        loop = closed_loop(pool, self._requests, seconds=_ENDLESS, load=self._load)
        self._running = asyncio.create_task(loop)
        # Reading and tokenising come first; they are no part of what is compared.
        while not self._load.failures:
            await asyncio.sleep(_LOOK_SECONDS)
            if await self._computed() > before:
                break
        if self._load.failures:
            await self._end()
            raise ConfigurationError(f"The job failed: {self._load.first_failure or 'it hung up.'}")
        self._first, self._began = await self._computed(), time.perf_counter()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._end()

    async def _end(self) -> None:
        self._running.cancel()
        await asyncio.gather(self._running, return_exceptions=True)
        self._failures += self._load.failures
        await self._stack.aclose()  # hangs up, and so ends the job
        for _ in range(round(_QUIET_SECONDS / _LOOK_SECONDS)):
            await asyncio.sleep(_LOOK_SECONDS)
            if not await read_metric(self._subject.target, _WAITING):
                break

    async def rate(self, *, but: int) -> float:
        """Tokens a second computed since the start, ``but`` so many that were not the job's."""
        tokens = await self._computed() - self._first - but
        return tokens / (time.perf_counter() - self._began)

    async def _computed(self) -> float:
        return await read_metric(self._subject.target, _COMPUTED) or 0.0


def _together(loads: Sequence[Load]) -> Load:
    return Load(answered=[answered for load in loads for answered in load.answered])


def _told(loads: Sequence[Load]) -> str:
    found = latencies(_together(loads))
    return ", ".join(f"{name} {number(value)}" for name, value in found.items())


def _figures(loads: Sequence[Load]) -> dict[str, object]:
    return {
        "requests": sum(len(load.answered) for load in loads),
        "latency_ms": latencies(_together(loads)),
        "p99_ms_by_round": [latencies(load)["p99"] for load in loads],
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
