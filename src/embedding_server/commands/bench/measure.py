# SPDX-License-Identifier: MIT OR Apache-2.0
"""One workload against one server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from embedding_server.commands.bench.connections import Connection, connected
from embedding_server.commands.bench.load import Load, closed_loop, fixed_rate
from embedding_server.commands.bench.operations import ModelCost
from embedding_server.commands.bench.report import Outcome, number, progress, significant
from embedding_server.commands.bench.subject import Subject
from embedding_server.commands.bench.usage import Costs, watch
from embedding_server.commands.bench.workloads import Workload, request_bodies

__all__ = ["measure", "warm_requests"]

_WARM_UP_SECONDS = 2.0
_WARM_UP_SHARE = 0.2
_WARM_UP_TEXTS = 32


async def measure(
    subject: Subject,
    workload: Workload,
    model: str,
    cost: ModelCost | None,
    *,
    connections: int,
    seconds: float,
    rate: float | None,
) -> Outcome:
    """Warm up, then load the server for ``seconds``: in a closed loop, or at ``rate`` a second.

    ``cost`` is None where the model's files aren't here, or its sizes aren't known.
    """
    requests = [subject.target.post(body) for body in request_bodies(workload, model)]
    warm = warm_requests(subject, workload, model)
    await subject.try_out(warm[0])
    load = Load()
    async with connected(subject.target, connections) as pool:
        progress(f"{workload.name}: warming up")
        await _put(pool, warm, rate, min(_WARM_UP_SECONDS, _WARM_UP_SHARE * seconds), Load())
        async with watch(
            subject.target, subject.pid, lambda: f"{workload.name}: {len(load.answered)} answered"
        ) as costs:
            await _put(pool, requests, rate, seconds, load)
    return _outcome(load, costs, workload, cost)


def warm_requests(subject: Subject, workload: Workload, model: str) -> list[bytes]:
    """The workload's requests, of at most 32 texts so that warming up doesn't take minutes."""
    short = tuple(texts[:_WARM_UP_TEXTS] for texts in workload.requests)
    bodies = request_bodies(replace(workload, requests=short), model)
    return [subject.target.post(body) for body in bodies]


async def _put(
    pool: Sequence[Connection],
    requests: Sequence[bytes],
    rate: float | None,
    seconds: float,
    load: Load,
) -> None:
    if rate is None:
        await closed_loop(pool, requests, seconds=seconds, load=load)
    else:
        await fixed_rate(pool, requests, rate=rate, seconds=seconds, load=load)


def _outcome(load: Load, costs: Costs, workload: Workload, cost: ModelCost | None) -> Outcome:
    times = Counter(answered.request for answered in load.answered)
    inputs = sum(count * len(workload.requests[place]) for place, count in times.items())
    counted_tokens = operations = None
    if cost is not None:
        each = {place: cost.of_request(workload.requests[place]) for place in times}
        counted_tokens = sum(count * each[place].tokens for place, count in times.items())
        operations = sum(count * each[place].operations for place, count in times.items())

    def per_second(count: float | None) -> float | None:
        return count / load.seconds if count is not None and load.seconds else None

    requests_rate, inputs_rate = per_second(len(load.answered)), per_second(inputs)
    tokens_rate, counted_rate = per_second(load.tokens), per_second(counted_tokens)
    operations_rate = per_second(operations)
    gflops = None if operations_rate is None else operations_rate / 1e9
    rows = [
        ("requests/s", number(requests_rate)),
        ("inputs/s", number(inputs_rate)),
        ("tokens/s", number(tokens_rate)),
    ]
    # Some servers count characters or words, and call them tokens.
    if counted_tokens not in (None, load.tokens):
        rows.append(("  by its tokenizer", number(counted_rate)))
    rows.append(("GFLOP/s useful", number(gflops)))
    rows += [(f"{name} ms", number(value)) for name, value in load.latency_ms().items()]
    rows += costs.rows(load.seconds)
    figures = {
        "seconds": significant(load.seconds),
        "requests": len(load.answered),
        "failures": dict(load.failures),
        "requests_per_second": significant(requests_rate),
        "inputs_per_second": significant(inputs_rate),
        "tokens_per_second": significant(tokens_rate),
        "counted_tokens_per_second": significant(counted_rate),
        "gflops_useful": significant(gflops),
        "latency_ms": load.latency_ms(),
        **costs.figures(),
    }
    return Outcome(len(load.answered), load.failures, load.first_failure, rows, figures)
