# SPDX-License-Identifier: MIT OR Apache-2.0
"""The batch loop: which inputs share a batch, on which cores."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from engine_bench import Bench, expected, run_on, settle, until_queued


def test_vectors_come_in_the_order_of_the_inputs() -> None:
    bench = Bench(max_batch_tokens=6)
    texts = ["1", "2 3 4 5", "6 7", "8 9 10 11 12", "13"]

    async def scenario() -> None:
        answer = await bench.send(*texts)
        assert answer.vectors.tolist() == expected(*texts)
        assert (answer.dimensions, answer.tokens, answer.truncated) == (4, 13, 0)
        assert len(bench.backend.batches) > 1

    run_on(bench, scenario)


def test_requests_that_wait_share_the_next_batch() -> None:
    bench = Bench()

    async def scenario() -> None:
        bench.executor.held = True
        first = bench.send("1")
        await settle()
        others = [bench.send(f"{number} {number}") for number in (2, 3, 4)]
        await settle()
        bench.executor.step()
        await settle()
        bench.executor.step()
        answers = await asyncio.gather(first, *others)
        assert bench.backend.batches == [[[1]], [[2, 2], [3, 3], [4, 4]]]
        assert [answer.vectors.tolist() for answer in answers[1:]] == [
            expected(text) for text in ("2 2", "3 3", "4 4")
        ]

    run_on(bench, scenario)


def test_an_idle_engine_starts_at_once() -> None:
    """No timer: the first request is in the executor before anything else can happen."""
    bench = Bench()

    async def scenario() -> None:
        for number in range(3):
            await bench.send(f"{number}")
        assert bench.backend.batches == [[[0]], [[1]], [[2]]]

    run_on(bench, scenario)


def test_many_requests_get_their_own_vectors() -> None:
    bench = Bench(max_batch_tokens=37)
    random = np.random.default_rng(5)

    async def scenario() -> None:
        requests = [
            [
                " ".join(map(str, random.integers(0, 900, random.integers(1, 30))))
                for _ in range(random.integers(1, 12))
            ]
            for _ in range(60)
        ]
        answers = await asyncio.gather(*(bench.send(*texts) for texts in requests))
        for texts, answer in zip(requests, answers, strict=True):
            assert answer.vectors.tolist() == expected(*texts)
        assert bench.scheduler.tokens == 0

    run_on(bench, scenario)


def test_a_query_passes_a_large_job() -> None:
    bench = Bench(max_batch_tokens=100)

    async def scenario() -> None:
        bench.executor.held = True
        job = bench.send(*[f"{number} " + "5 " * 39 for number in range(500)])
        await until_queued(bench)
        await settle()
        query = bench.send("1 2")
        await settle()
        bench.executor.step()
        await settle()
        bench.executor.step()
        await settle()
        assert query.done()
        assert not job.done()
        job.cancel()

    run_on(bench, scenario)


def test_as_many_batches_at_a_time_as_there_are_cores() -> None:
    bench = Bench(max_batch_tokens=2, core_count=3)

    async def scenario() -> None:
        bench.executor.held = True
        tasks = [bench.send(f"{number} {number}") for number in range(5)]
        await settle()
        assert bench.cores.free == 0
        for _ in range(3):
            bench.executor.step()
        with pytest.raises(IndexError):
            bench.executor.step()  # the other two wait for a core
        await settle()
        for _ in range(2):
            bench.executor.step()
        answers = await asyncio.gather(*tasks)
        for number, answer in enumerate(answers):
            assert answer.vectors.tolist() == expected(f"{number} {number}")
        assert bench.cores.free == 3

    run_on(bench, scenario)


def test_idle_cores_share_what_waits() -> None:
    bench = Bench(max_batch_tokens=100, core_count=2)
    texts = [f"{number} " + "7 " * 19 for number in range(4)]

    async def scenario() -> None:
        answer = await bench.send(*texts)
        assert answer.vectors.tolist() == expected(*texts)
        assert [len(batch) for batch in bench.backend.batches] == [2, 2]
        bench.backend.batches.clear()
        await bench.send("1", "2")
        assert len(bench.backend.batches) == 1, "too short to be worth dividing"

    run_on(bench, scenario)


def test_a_long_input_alone_has_all_cores() -> None:
    bench = Bench(core_count=4)
    bench.tokenizer.max_tokens = 500

    async def scenario() -> None:
        await bench.send("5 " * 200)
        await bench.send("5 " * 10)
        await bench.send("5 " * 200, "6 " * 200)
        assert bench.backend.wide == [True, False, False, False]
        bench.executor.held = True
        tasks = [bench.send("5 " * 200)]
        await settle()
        assert bench.cores.free == 0
        tasks.append(bench.send("6 " * 200))
        await settle()
        bench.executor.step()
        await settle()
        bench.executor.step()
        await asyncio.gather(*tasks)
        assert bench.backend.wide[4:] == [True, True]
        assert bench.cores.free == 4

    run_on(bench, scenario)


def test_an_exclusive_backend_has_one_batch_at_a_time() -> None:
    bench = Bench(max_batch_tokens=2, core_count=3, exclusive=True)

    async def scenario() -> None:
        bench.executor.held = True
        tasks = [bench.send("1 1"), bench.send("2 2")]
        await settle()
        bench.executor.step()
        with pytest.raises(IndexError):
            bench.executor.step()
        await settle()
        bench.executor.step()
        await asyncio.gather(*tasks)
        assert bench.cores.free == 3

    run_on(bench, scenario)


def test_equal_inputs_are_computed_once() -> None:
    """Of one request, and of requests that share a batch."""
    bench = Bench()

    async def scenario() -> None:
        answer = await bench.send("1 2", "3", "1 2", "1 2", "3")
        assert answer.vectors.tolist() == expected("1 2", "3", "1 2", "1 2", "3")
        assert answer.tokens == 8
        assert bench.backend.batches == [[[3], [1, 2]]]
        bench.executor.held = True
        tasks = [bench.send("9")]
        await settle()
        tasks += [bench.send("7", "8"), bench.send("8"), bench.send("8")]
        await settle()
        for _ in range(2):
            bench.executor.step()
            await settle()
        answers = await asyncio.gather(*tasks)
        assert [a.vectors.tolist() for a in answers[1:]] == [
            expected("7", "8"),
            expected("8"),
            expected("8"),
        ]
        assert bench.backend.batches[2:] == [[[7], [8]]]

    run_on(bench, scenario)
