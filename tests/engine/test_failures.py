# SPDX-License-Identifier: MIT OR Apache-2.0
"""Batches that raise, give wrong answers or run out of memory: who fails, and who does not."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from engine_bench import HUGE, INFINITE, LARGE, NAN, RAISES, Bench, expected, run_on, settle
from numpy.typing import NDArray

from embedding_server.errors import InferenceFailed, OutOfMemory


def test_equal_inputs_of_a_failed_batch_all_fail() -> None:
    bench = Bench()

    async def scenario() -> None:
        bench.executor.held = True
        tasks = [bench.send("9")]
        await settle()
        tasks += [bench.send(f"{NAN}"), bench.send(f"{NAN}"), bench.send("8")]
        await settle()
        bench.executor.step()
        await settle()
        bench.executor.held = False
        bench.executor.step()
        for task in tasks[1:3]:
            with pytest.raises(InferenceFailed):
                await task
        assert (await tasks[3]).vectors.tolist() == expected("8")

    run_on(bench, scenario)


def test_a_batch_that_cannot_be_begun_fails_its_own_requests_only() -> None:
    bench = Bench(core_count=2)

    async def scenario() -> None:
        submit = bench.executor.submit

        def refuse(*arguments: Any, **options: Any) -> Any:
            bench.executor.submit = submit  # type: ignore[method-assign]
            raise RuntimeError("can't start new thread")

        bench.executor.submit = refuse  # type: ignore[method-assign]
        with pytest.raises(InferenceFailed):
            await bench.send("1 " * 30)
        assert bench.cores.free == 2
        assert (await bench.send("2")).vectors.tolist() == expected("2")
        assert bench.engine.ready

    run_on(bench, scenario)


def test_an_input_that_raises_fails_alone(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(max_batch_tokens=4)

    async def scenario() -> None:
        bench.executor.held = True
        before = bench.send("1 1")
        await settle()
        broken = bench.send(f"{RAISES} 2")
        neighbour = bench.send("3 3")
        after = bench.send("4 4")
        for _ in range(5):  # two of them the halves of the batch that raises
            await settle()
            bench.executor.step()
        with pytest.raises(InferenceFailed) as caught:
            await broken
        assert "secret" not in str(caught.value)
        assert (await before).vectors.tolist() == expected("1 1")
        assert (await neighbour).vectors.tolist() == expected("3 3")
        assert (await after).vectors.tolist() == expected("4 4")
        assert bench.engine.ready
        assert bench.metric("failed_batches_total") == 1

    run_on(bench, scenario)
    (record,) = (record for record in caplog.records if record.levelno == logging.ERROR)
    assert "secret detail" in str(record.exc_info)


def test_a_failed_request_leaves_the_queue() -> None:
    bench = Bench(max_batch_tokens=2)

    async def scenario() -> None:
        bench.executor.held = True
        task = bench.send(f"{RAISES} 1", "2 2", "3 3", "4 4")
        await settle()
        bench.executor.step()
        with pytest.raises(InferenceFailed):
            await task
        assert bench.scheduler.tokens == 0
        assert bench.metric("queue_tokens") == 0
        bench.executor.held = False
        await bench.send("5")
        assert bench.backend.batches == [[[RAISES, 1]], [[5]]]

    run_on(bench, scenario)


@pytest.mark.parametrize("token", [NAN, INFINITE], ids=["nan", "infinite"])
def test_values_that_are_not_finite_fail_their_request_only(token: int) -> None:
    bench = Bench()

    async def scenario() -> None:
        bench.executor.held = True
        first = bench.send("1")
        await settle()
        broken = bench.send("2 2", f"{token} 2")
        neighbour = bench.send("3 3")
        await settle()
        bench.executor.step()
        await settle()
        bench.executor.held = False
        bench.executor.step()
        with pytest.raises(InferenceFailed, match="not finite"):
            await broken
        assert (await first).vectors.tolist() == expected("1")
        assert (await neighbour).vectors.tolist() == expected("3 3")
        assert bench.batch_sizes[:2] == [1, 3]
        assert bench.metric("failed_batches_total") == 1

    run_on(bench, scenario)


def test_an_answer_of_the_wrong_shape_fails_its_batch() -> None:
    bench = Bench()

    async def scenario() -> None:
        bench.backend.extra_rows = 1
        with pytest.raises(InferenceFailed, match="wrong shape"):
            await bench.send("1", "2")
        bench.backend.extra_rows = 0
        assert (await bench.send("3")).vectors.tolist() == expected("3")
        assert bench.metric("failed_batches_total") == 1

    run_on(bench, scenario)


@pytest.mark.parametrize(
    ("answer", "logged"),
    [
        pytest.param(lambda vectors: None, "NoneType instead of an array", id="none"),
        pytest.param(lambda vectors: vectors.tolist(), "list instead of an array", id="list"),
        pytest.param(lambda vectors: vectors.astype(np.float64), "float64 instead", id="float64"),
        pytest.param(lambda vectors: vectors.astype(object), "object instead", id="objects"),
        pytest.param(lambda vectors: vectors[:, :3], r"shape \(1, 3\)", id="narrow"),
        pytest.param(lambda vectors: vectors[0], r"shape \(4,\)", id="flat"),
        pytest.param(lambda vectors: vectors[:0], r"shape \(0, 4\)", id="nothing"),
    ],
)
def test_no_answer_ends_the_batch_loop(
    answer: Callable[[NDArray[np.float32]], Any], logged: str, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench()

    async def scenario() -> None:
        bench.backend.answer = answer
        for _ in range(2):
            with pytest.raises(InferenceFailed, match="wrong shape or kind"):
                await bench.send("1")
        bench.backend.answer = None
        assert (await bench.send("3")).vectors.tolist() == expected("3")
        assert bench.metric("failed_batches_total") == 2

    run_on(bench, scenario)
    assert re.search(logged, caplog.text)


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt(), StopIteration()], ids=repr)
def test_no_exception_ends_the_batch_loop(error: BaseException) -> None:
    """As they come out of a thread."""
    bench = Bench(real_threads=True)

    def refuse(vectors: NDArray[np.float32]) -> Any:
        raise error

    async def scenario() -> None:
        bench.backend.answer = refuse
        with pytest.raises(InferenceFailed):
            await bench.send("1")
        bench.backend.answer = None
        assert (await bench.send("3")).vectors.tolist() == expected("3")

    run_on(bench, scenario)


def test_a_batch_without_memory_is_halved_down_to_one_input(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bench = Bench()
    texts = [*(f"{number} 7" for number in range(6)), f"6 {LARGE}", "8 7"]

    async def scenario() -> None:
        answer = await bench.send(*texts)
        assert answer.vectors.tolist() == expected(*texts)
        assert bench.batch_sizes == [8, 4, 4, 2, 2, 1, 1]
        assert bench.cores.free == 1
        assert bench.metric("out_of_memory_total") == 1
        assert bench.metric("failed_batches_total") == 0

    run_on(bench, scenario)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_an_input_that_is_too_large_alone_fails_its_request_only(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bench = Bench(core_count=2)

    async def scenario() -> None:
        bench.executor.held = True
        tasks = [bench.send("9"), bench.send("8")]
        await settle()
        good = [bench.send(f"{number} 7") for number in range(5)]
        bad = [bench.send(f"{HUGE} 7", "1 2"), bench.send(f"{HUGE} 7"), bench.send(f"8 {HUGE}")]
        await settle()
        bench.executor.held = False
        bench.executor.step()
        bench.executor.step()
        for number, task in enumerate(good):
            assert (await task).vectors.tolist() == expected(f"{number} 7")
        for task in bad:
            with pytest.raises(OutOfMemory, match="2 tokens, even alone"):
                await task
        await asyncio.gather(*tasks)
        assert bench.engine.ready
        assert bench.cores.free == 2
        assert bench.scheduler.tokens == 0

    run_on(bench, scenario)
    events = bench.metric("out_of_memory_total")
    levels = [record.levelname for record in caplog.records]
    assert 1 <= events <= 2
    assert levels.count("WARNING") == events
    assert levels.count("ERROR") <= events
    assert bench.metric("failed_batches_total") == levels.count("ERROR")


def test_cancelled_requests_are_not_tried_again() -> None:
    bench = Bench()

    async def scenario() -> None:
        bench.executor.held = True
        first = bench.send("9")
        await settle()
        unwanted, wanted = bench.send(f"1 {LARGE}", f"2 {LARGE}"), bench.send("3 3", "4 4")
        await settle()
        bench.executor.step()
        await settle()
        unwanted.cancel()
        await settle()
        bench.executor.held = False
        bench.executor.step()
        assert (await wanted).vectors.tolist() == expected("3 3", "4 4")
        await first
        retried = [sequence for batch in bench.backend.batches[2:] for sequence in batch]
        assert sorted(retried) == [[3, 3], [4, 4]]
        bench.executor.held = True
        last = bench.send(f"5 {LARGE}", f"6 {LARGE}")
        await settle()
        last.cancel()
        await settle()
        bench.executor.step()
        await settle()
        assert bench.cores.free == 1

    run_on(bench, scenario)
