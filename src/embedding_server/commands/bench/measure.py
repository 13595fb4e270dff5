# SPDX-License-Identifier: MIT OR Apache-2.0
"""One workload against one server."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from embedding_server.commands.bench.connections import Pool
from embedding_server.commands.bench.load import Load, closed_loop, fixed_rate
from embedding_server.commands.bench.operations import ModelCost
from embedding_server.commands.bench.report import number, progress, significant
from embedding_server.commands.bench.subject import Subject
from embedding_server.commands.bench.usage import Usage
from embedding_server.commands.bench.workloads import Workload, request_bodies

__all__ = ["Costs", "Measurement", "Watch", "latencies", "measure", "warm_requests"]

_WARM_UP_SECONDS = 2.0
_WARM_UP_SHARE = 0.2
_WARM_UP_TEXTS = 32
_LOOK_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Costs:
    """What a stretch of time cost."""

    server_cpu_seconds: float | None
    generator_cpu_seconds: float
    resident_bytes: int | None
    """Of the server, at the end."""
    peak_bytes: int | None
    """Of the server: since its start if it was started here, else the most seen."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one workload came to."""

    load: Load
    costs: Costs
    inputs: int
    counted_tokens: int | None
    """Of all answers, by the model's own tokenizer; None where its files aren't here."""
    operations: int | None
    """That all answers needed; None likewise."""

    @property
    def failures(self) -> Counter[str]:
        """Requests that failed, by status."""
        return self.load.failures

    @property
    def first_failure(self) -> str | None:
        """What the server said to the first of them."""
        return self.load.first_failure

    @property
    def answered(self) -> int:
        """Requests that did not."""
        return len(self.load.answered)

    def rows(self) -> list[tuple[str, str]]:
        """For people."""
        load, seconds = self.load, self.load.seconds
        return [
            ("requests/s", number(_rate(self.answered, seconds))),
            ("inputs/s", number(_rate(self.inputs, seconds))),
            ("tokens/s", number(_rate(load.tokens, seconds))),
            *self._own_count(),
            ("GFLOP/s useful", number(_rate(self.operations, seconds), scale=1e-9)),
            *((f"{name} ms", number(value)) for name, value in latencies(load).items()),
            ("server CPU", _cpu(self.costs.server_cpu_seconds, seconds)),
            ("generator CPU", _cpu(self.costs.generator_cpu_seconds, seconds)),
            ("server memory, peak", number(self.costs.peak_bytes, "MB", scale=2**-20)),
        ]

    def _own_count(self) -> list[tuple[str, str]]:
        """Some servers count characters or words, and call them tokens."""
        if self.counted_tokens in (None, self.load.tokens):
            return []
        rate = _rate(self.counted_tokens, self.load.seconds)
        return [("  by its tokenizer", number(rate))]

    def result(self) -> dict[str, object]:
        """For programs."""
        load, seconds = self.load, self.load.seconds
        operations = _rate(self.operations, seconds)
        return {
            "seconds": significant(seconds),
            "requests": self.answered,
            "failures": dict(load.failures),
            "requests_per_second": significant(_rate(self.answered, seconds)),
            "inputs_per_second": significant(_rate(self.inputs, seconds)),
            "tokens_per_second": significant(_rate(load.tokens, seconds)),
            "counted_tokens_per_second": significant(_rate(self.counted_tokens, seconds)),
            "gflops_useful": significant(operations / 1e9 if operations is not None else None),
            "latency_ms": latencies(load),
            "server_cpu_seconds": significant(self.costs.server_cpu_seconds),
            "generator_cpu_seconds": significant(self.costs.generator_cpu_seconds),
            "server_resident_bytes": self.costs.resident_bytes,
            "server_peak_bytes": self.costs.peak_bytes,
        }


async def measure(
    subject: Subject,
    workload: Workload,
    model: str,
    cost: ModelCost | None,
    *,
    connections: int,
    seconds: float,
    rate: float | None,
) -> Measurement:
    """Warm up, then load the server for ``seconds``: in a closed loop, or at ``rate`` a second."""

    async def load_with(requests: Sequence[bytes], seconds: float, load: Load) -> None:
        if rate is None:
            await closed_loop(pool, requests, seconds=seconds, load=load)
        else:
            await fixed_rate(pool, requests, rate=rate, seconds=seconds, load=load)

    requests = [subject.target.post(body) for body in request_bodies(workload, model)]
    warm = warm_requests(subject, workload, model)
    await subject.try_out(warm[0])
    load = Load()
    async with Pool(subject.target, connections) as pool:
        progress(f"{workload.name}: warming up")
        await load_with(warm, min(_WARM_UP_SECONDS, _WARM_UP_SHARE * seconds), Load())
        async with Watch(
            subject, lambda: f"{workload.name}: {len(load.answered)} answered"
        ) as watch:
            await load_with(requests, seconds, load)
    return _measurement(load, watch.costs, workload, cost)


def warm_requests(subject: Subject, workload: Workload, model: str) -> list[bytes]:
    """The workload's requests, large ones cut so that warming up doesn't take minutes."""
    cut = tuple(texts[:_WARM_UP_TEXTS] for texts in workload.requests)
    bodies = request_bodies(Workload(workload.name, workload.help, cut), model)
    return [subject.target.post(body) for body in bodies]


class Watch:
    """Around a stretch of time: shows how far it is, and then has its ``costs``."""

    costs: Costs

    def __init__(self, subject: Subject, tell: Callable[[], str]) -> None:
        self._subject = subject
        self._tell = tell
        self._residents: list[int] = []

    async def __aenter__(self) -> Self:
        self._before = await self._subject.usage()
        self._cpu_before = time.process_time()
        self._started = time.perf_counter()
        self._looking = asyncio.create_task(self._look())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._looking.cancel()
        await asyncio.gather(self._looking, return_exceptions=True)
        progress("")
        if error is not None:
            return
        generator = time.process_time() - self._cpu_before
        after = await self._subject.usage()
        self._note(after)
        server = None
        if after.cpu_seconds is not None and self._before.cpu_seconds is not None:
            server = after.cpu_seconds - self._before.cpu_seconds
        self.costs = Costs(
            server_cpu_seconds=server,
            generator_cpu_seconds=generator,
            resident_bytes=after.resident_bytes,
            peak_bytes=after.peak_bytes or max(self._residents, default=None),
        )

    async def _look(self) -> None:
        while True:
            self._note(await self._subject.usage())
            seconds = time.perf_counter() - self._started
            progress(f"{self._tell()}, {seconds:.0f} s")
            await asyncio.sleep(_LOOK_SECONDS)

    def _note(self, usage: Usage) -> None:
        if usage.resident_bytes is not None:
            self._residents.append(usage.resident_bytes)


def latencies(load: Load) -> dict[str, float | None]:
    """In milliseconds, by the share of answers that took no longer."""
    shares = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}
    found = {name: load.percentile(share) for name, share in shares.items()}
    return {
        name: None if value is None else significant(value * 1000) for name, value in found.items()
    }


def _measurement(
    load: Load, costs: Costs, workload: Workload, cost: ModelCost | None
) -> Measurement:
    times = Counter(answered.request for answered in load.answered)
    tokens = operations = None
    if cost is not None:
        each = {place: cost.of_request(workload.requests[place]) for place in times}
        tokens = sum(times[place] * each[place][0] for place in times)
        operations = sum(times[place] * each[place][1] for place in times)
    return Measurement(
        load=load,
        costs=costs,
        inputs=sum(times[place] * len(workload.requests[place]) for place in times),
        counted_tokens=tokens,
        operations=operations,
    )


def _rate(count: float | None, seconds: float) -> float | None:
    """For each second; None if there is nothing to tell."""
    return count / seconds if count is not None and seconds else None


def _cpu(used: float | None, seconds: float) -> str:
    return f"{number(used, 's')} ({number(_rate(used, seconds))} cores)"
