# SPDX-License-Identifier: MIT OR Apache-2.0
"""Single queries beside an endless job: what each loses by the other.

Queries alone, the job alone, and both, in several rounds of these three: if the machine's speed
changes over the minutes, it changes for all three alike.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from statistics import mean

from embedding_server.commands.bench.connections import Target, connected
from embedding_server.commands.bench.load import Load, closed_loop, fixed_rate
from embedding_server.commands.bench.measure import warm_requests
from embedding_server.commands.bench.report import Outcome, number, significant
from embedding_server.commands.bench.subject import Subject
from embedding_server.commands.bench.usage import Costs, read_metric, watch
from embedding_server.commands.bench.workloads import build_workload, request_bodies
from embedding_server.errors import ConfigurationError

__all__ = ["JOB", "QUERIES", "measure_mixed"]

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


@dataclass(frozen=True, slots=True)
class _Rounds:
    """The measurements; each list has one entry a round."""

    alone: list[Load] = field(default_factory=list)
    """Queries without the job."""
    beside: list[Load] = field(default_factory=list)
    """Queries with the job."""
    job_alone: list[float] = field(default_factory=list)
    """Tokens of the job a second, without queries."""
    job_beside: list[float] = field(default_factory=list)
    job_failures: Counter[str] = field(default_factory=Counter)


async def measure_mixed(
    subject: Subject, model: str, *, connections: int, seconds: float, rate: float
) -> Outcome:
    """Three rounds; each of their three phases lasts ``seconds``.

    Raises ConfigurationError for a server whose /metrics don't show a job's progress.
    """
    target = subject.target
    if await read_metric(target, _COMPUTED) is None:
        raise ConfigurationError(
            f"'mixed' reads a job's progress from {_COMPUTED} in {target.url}/metrics, which "
            "doesn't have it."
        )
    queries, job = (build_workload(name) for name in (QUERIES, JOB))
    query_requests = [target.post(body) for body in request_bodies(queries, model)]
    job_requests = [target.post(body) for body in request_bodies(job, model)]
    for request in (query_requests[0], *warm_requests(subject, job, model)):
        await subject.try_out(request)
    rounds = _Rounds()
    phase = "mixed"
    async with connected(target, connections) as pool:

        async def ask(seconds: float) -> Load:
            return await fixed_rate(pool, query_requests, rate=rate, seconds=seconds)

        warm_up = await ask(min(_WARM_UP_SECONDS, seconds))
        async with watch(target, subject.pid, lambda: phase) as costs:
            for round in range(1, _ROUNDS + 1):
                phase = f"mixed, round {round} of {_ROUNDS}, queries alone"
                rounds.alone.append(await ask(seconds))
                phase = f"mixed, round {round} of {_ROUNDS}, job alone"
                async with _job(target, job_requests, rounds.job_failures) as progress:
                    await asyncio.sleep(seconds)
                    rounds.job_alone.append(await progress.rate(without=0))
                phase = f"mixed, round {round} of {_ROUNDS}, both"
                async with _job(target, job_requests, rounds.job_failures) as progress:
                    load = await ask(seconds)
                    rounds.beside.append(load)
                    rounds.job_beside.append(await progress.rate(without=load.tokens or 0))
    return _outcome(rounds, warm_up, costs)


@dataclass(frozen=True, slots=True)
class _Progress:
    """Where the job stood, in tokens of the server, and when."""

    target: Target
    tokens: float
    time: float

    async def rate(self, *, without: int) -> float:
        """Tokens a second since then, without as many that were not the job's."""
        tokens = await _computed(self.target) - self.tokens - without
        return tokens / (time.perf_counter() - self.time)


@asynccontextmanager
async def _job(
    target: Target, requests: Sequence[bytes], failures: Counter[str]
) -> AsyncIterator[_Progress]:
    """Large requests without end, on one connection, are computed while the body runs."""
    before = await _computed(target)
    load = Load()
    async with connected(target, 1) as pool:
        running = asyncio.create_task(closed_loop(pool, requests, seconds=_ENDLESS, load=load))
        try:
            # Reading and tokenizing come first; they are no part of the comparison.
            while await _computed(target) <= before:
                if load.failures:
                    reason = load.first_failure or "the server hung up."
                    raise ConfigurationError(f"The job failed: {reason}")
                await asyncio.sleep(_LOOK_SECONDS)
            yield _Progress(target, await _computed(target), time.perf_counter())
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            failures.update(load.failures)
    # The connection is closed now, and so the server ends the job.
    for _ in range(round(_QUIET_SECONDS / _LOOK_SECONDS)):
        await asyncio.sleep(_LOOK_SECONDS)
        if not await read_metric(target, _WAITING):
            break


async def _computed(target: Target) -> float:
    return await read_metric(target, _COMPUTED) or 0.0


def _outcome(rounds: _Rounds, warm_up: Load, costs: Costs) -> Outcome:
    alone, beside = _together(rounds.alone), _together(rounds.beside)
    alone_p99, beside_p99 = alone.percentile(0.99), beside.percentile(0.99)
    p99_ratio = beside_p99 / alone_p99 if alone_p99 and beside_p99 else None
    job_total = sum(rounds.job_alone)
    job_share = sum(rounds.job_beside) / job_total if job_total else None
    loads = [warm_up, *rounds.alone, *rounds.beside]
    failures = sum((load.failures for load in loads), rounds.job_failures)
    reasons = [load.first_failure for load in loads if load.first_failure is not None]
    rows = [
        ("queries alone, ms", _percentiles(alone)),
        ("beside the job, ms", _percentiles(beside)),
        ("p99 beside / alone", number(p99_ratio)),
        ("job alone, tokens/s", number(mean(rounds.job_alone))),
        ("beside queries", number(mean(rounds.job_beside))),
        ("job keeps", number(job_share, "%", scale=100)),
        *costs.rows(),
    ]
    figures = {
        "rounds": len(rounds.alone),
        "failures": dict(failures),
        "queries_alone": _figures(rounds.alone),
        "queries_beside": _figures(rounds.beside),
        "p99_ratio": significant(p99_ratio),
        "job_alone_tokens_per_second": [significant(rate) for rate in rounds.job_alone],
        "job_beside_tokens_per_second": [significant(rate) for rate in rounds.job_beside],
        "job_share": significant(job_share),
        **costs.figures(),
    }
    answered = len(alone.answered) + len(beside.answered)
    return Outcome(answered, failures, next(iter(reasons), None), rows, figures)


def _together(loads: Sequence[Load]) -> Load:
    return Load(answered=[answered for load in loads for answered in load.answered])


def _percentiles(load: Load) -> str:
    return ", ".join(f"{name} {number(value)}" for name, value in load.latency_ms().items())


def _figures(loads: Sequence[Load]) -> dict[str, object]:
    return {
        "requests": sum(len(load.answered) for load in loads),
        "latency_ms": _together(loads).latency_ms(),
        "p99_ms_by_round": [load.latency_ms()["p99"] for load in loads],
    }
