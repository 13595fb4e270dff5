# SPDX-License-Identifier: MIT OR Apache-2.0
"""Admission: limits of requests and tokens, and when to try again."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np
import pytest
from engine_bench import RAISES, UNSCALED, Bench, expected, run_on, settle
from numpy.typing import NDArray

from embedding_server.engine.parameters import EmbedParams
from embedding_server.errors import (
    ContextLengthExceeded,
    InferenceFailed,
    InvalidRequest,
    Overloaded,
)


def test_max_concurrent_requests() -> None:
    bench = Bench(max_concurrent_requests=2)

    async def scenario() -> None:
        bench.executor.held = True
        tasks = [bench.send("1"), bench.send("2")]
        await settle()
        with pytest.raises(Overloaded, match="2 requests") as caught:
            await bench.send("3")
        assert caught.value.retry_after >= 1
        bench.executor.held = False
        bench.executor.step()
        await asyncio.gather(*tasks)
        assert (await bench.send("3")).vectors.tolist() == expected("3")

    run_on(bench, scenario)


@pytest.mark.parametrize(
    ("text", "params", "error"),
    [
        pytest.param("5 " * 60, EmbedParams(truncate=False), ContextLengthExceeded, id="too-long"),
        pytest.param(f"{RAISES}", UNSCALED, InferenceFailed, id="failed"),
        pytest.param("1", EmbedParams(dimensions=2), InvalidRequest, id="invalid"),
    ],
)
def test_a_request_that_fails_frees_its_place(
    text: str, params: EmbedParams, error: type[Exception]
) -> None:
    bench = Bench(max_concurrent_requests=1)

    async def scenario() -> None:
        for _ in range(3):
            with pytest.raises(error):
                await bench.send(text, params=params)
        assert (await bench.send("1")).vectors.tolist() == expected("1")
        assert bench.metric("queue_requests") == 0

    run_on(bench, scenario)


def test_max_queued_tokens_takes_a_whole_request_or_nothing() -> None:
    bench = Bench(max_batch_tokens=2, max_queued_tokens=10)

    async def scenario() -> None:
        bench.executor.held = True
        tasks = [bench.send("1 1")]
        await settle()
        tasks.append(bench.send("2 2 2", "2 2 5"))
        await settle()
        with pytest.raises(Overloaded, match="6 tokens are waiting"):
            await bench.send("3 1", "3 2", "3 3", "3 4")
        assert bench.scheduler.tokens == 6
        tasks.append(bench.send("4", "5", "6", "7"))
        await settle()
        assert bench.scheduler.tokens == 10
        bench.executor.held = False
        bench.executor.step()
        await asyncio.gather(*tasks)
        assert [3, 1] not in [sequence for batch in bench.backend.batches for sequence in batch]

    run_on(bench, scenario)


def test_a_request_larger_than_the_queue_is_taken_when_it_is_empty() -> None:
    bench = Bench(max_queued_tokens=10)

    async def scenario() -> None:
        texts = ["7 7 7"] * 8
        assert (await bench.send(*texts)).vectors.tolist() == expected(*texts)

    run_on(bench, scenario)


def test_max_request_tokens() -> None:
    bench = Bench(max_request_tokens=10)

    async def scenario() -> None:
        await bench.send("1 " * 5, "2 " * 5)
        with pytest.raises(InvalidRequest, match="11 tokens in 2 inputs; at most 10") as caught:
            await bench.send("1 " * 5, "2 " * 6)
        assert (caught.value.param, caught.value.code) == ("input", "request_too_large")

    run_on(bench, scenario)


def test_retry_after_is_what_waits_over_measured_throughput() -> None:
    bench = Bench(max_batch_tokens=10, max_queued_tokens=500)

    async def scenario() -> None:
        bench.backend.seconds = 0.02
        await bench.send("1 " * 10)
        bench.executor.held = True
        tasks = [bench.send("1")]
        await settle()
        waits = []
        for _ in range(2):
            tasks.append(bench.send(*[f"{number} " + "2 " * 49 for number in range(5)]))
            await settle()
            with pytest.raises(Overloaded) as caught:
                await bench.send(*[f"{number} " + "3 " * 49 for number in range(6)])
            waits.append(caught.value.retry_after)
            bench.backend.seconds = 0
        # 10 tokens took 0.02 s or, on a busy machine, more.
        assert waits[0] >= 250 * 0.02 / 10 - 1e-9
        assert waits[1] >= 1
        assert waits[1] == pytest.approx(max(1, 500 * waits[0] / 250), rel=0.5)
        for task in tasks:
            task.cancel()

    run_on(bench, scenario)


@pytest.mark.parametrize("core_count", [1, 2, 4])
def test_retry_after_counts_cores_and_outlasts_idle_time(core_count: int) -> None:
    bench = Bench(max_queued_tokens=1000, core_count=core_count, real_threads=True)
    hold = threading.Event()

    def wait(vectors: NDArray[np.float32]) -> Any:
        assert hold.wait(20)
        return vectors

    async def scenario() -> None:
        bench.backend.seconds = 0.1
        for number in range(4):  # one at a time: the other cores are idle
            await bench.send("1 " * 9 + str(number))
        seconds, tokens = bench.metric("inference_duration_seconds_sum"), 40
        bench.backend.seconds, bench.backend.answer = 0, wait
        tasks = [bench.send("2 " * 49 + str(number)) for number in range(core_count)]
        await settle()
        tasks.append(bench.send(*("3 " * 49 + str(number) for number in range(20))))
        await settle()
        with pytest.raises(Overloaded, match="1000 tokens are waiting") as caught:
            await bench.send("4")
        # The latest batches count most, and a busy machine makes them differ.
        measured = 1000 * seconds / tokens / core_count
        assert caught.value.retry_after == pytest.approx(measured, rel=0.3)
        hold.set()
        await asyncio.gather(*tasks)

    run_on(bench, scenario)


def test_retry_after_counts_models_that_wait_for_the_same_cores() -> None:
    bench = Bench(max_queued_tokens=500)

    async def scenario() -> None:
        bench.backend.seconds = 0.1
        await bench.send("1 " * 10)
        bench.executor.held = True
        tasks: list[asyncio.Task[Any]] = [bench.send("1")]
        await settle()
        tasks.append(bench.send(*[f"{number} " + "2 " * 49 for number in range(10)]))
        await settle()
        waits = []
        for _ in range(2):
            with pytest.raises(Overloaded) as caught:
                await bench.send("3")
            waits.append(caught.value.retry_after)
            tasks.append(asyncio.create_task(bench.cores.acquire(1)))  # another model
            await settle()
        assert waits[1] == pytest.approx(2 * waits[0])
        for task in tasks:
            task.cancel()

    run_on(bench, scenario)


def test_retry_after_is_never_longer_than_clients_heed() -> None:
    bench = Bench(max_queued_tokens=500)

    async def scenario() -> None:
        bench.backend.seconds = 0.2
        await bench.send("1")  # at which rate 500 tokens take 100 s
        bench.executor.held = True
        tasks = [bench.send("1")]
        await settle()
        tasks.append(bench.send(*[f"{number} " + "2 " * 49 for number in range(10)]))
        await settle()
        with pytest.raises(Overloaded) as caught:
            await bench.send("3")
        assert caught.value.retry_after == 60
        for task in tasks:
            task.cancel()

    run_on(bench, scenario)
