# SPDX-License-Identifier: MIT OR Apache-2.0
"""Start, end, cancellation and the death of the batch loop."""

from __future__ import annotations

import asyncio
import logging

import pytest
from engine_bench import LARGE, NAN, Bench, expected, run, run_on, settle

from embedding_server.errors import NotReady


def test_a_dying_engine_gives_its_cores_back() -> None:
    """Under load, while the next batch is being begun: other models go on."""
    bench = Bench(max_batch_tokens=2, core_count=2)

    async def scenario() -> None:
        bench.executor.held = True
        tasks = [bench.send(f"{number} {number}") for number in range(8)]
        await settle()
        bench.engine._batches._deliver = None  # type: ignore[assignment, method-assign]
        bench.executor.held = False
        bench.executor.step()
        bench.executor.step()
        await settle()
        assert not bench.engine.ready
        await asyncio.gather(*tasks, return_exceptions=True)
        assert bench.cores.free == 2

    run_on(bench, scenario)


def test_closing_while_halves_wait() -> None:
    bench = Bench()

    async def scenario() -> None:
        bench.engine.start()
        bench.executor.held = True
        task = bench.send(f"1 {LARGE}", f"2 {LARGE}")
        await settle()
        bench.executor.step()
        await settle()
        await bench.engine.close()
        with pytest.raises(NotReady):
            await task

    run(scenario())


def test_a_dead_loop_fails_what_waits_and_is_not_ready(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(max_batch_tokens=2)

    async def scenario() -> None:
        bench.executor.held = True
        computing, waiting = bench.send("1 1", "2 2"), bench.send("3 3")
        await settle()
        bench.scheduler.dying = True
        bench.executor.step()
        for task in (computing, waiting):
            with pytest.raises(NotReady, match="has stopped"):
                await task
        assert not bench.engine.ready
        assert bench.cores.broken.is_set()
        with pytest.raises(NotReady, match="not running"):
            await bench.send("4")

    run_on(bench, scenario)
    (record,) = (record for record in caplog.records if record.levelno == logging.CRITICAL)
    assert "ZeroDivisionError" in str(record.exc_info)


def test_not_ready_before_the_start() -> None:
    bench = Bench()

    async def scenario() -> None:
        assert not bench.engine.ready
        with pytest.raises(NotReady):
            await bench.send("1")
        await bench.engine.close()

    run(scenario())


def test_close_fails_what_waits_and_what_is_computed() -> None:
    bench = Bench(max_batch_tokens=2)

    async def scenario() -> None:
        bench.executor.held = True
        bench.engine.start()
        tasks = [bench.send("1 1"), bench.send("2 2")]
        await settle()
        await bench.engine.close()
        for task in tasks:
            with pytest.raises(NotReady, match="has stopped"):
                await task
        assert not bench.engine.ready
        with pytest.raises(NotReady):
            await bench.send("3")
        await bench.engine.close()

    run(scenario())


def test_close_fails_what_is_being_tokenised() -> None:
    bench = Bench()

    async def scenario() -> None:
        bench.tokenizer.hold.clear()
        bench.engine.start()
        task = bench.send("7 " * 3000)
        await asyncio.to_thread(bench.tokenizer.busy.wait, 20)
        await bench.engine.close()
        bench.tokenizer.hold.set()
        with pytest.raises(NotReady, match="shutting down"):
            await task

    run(scenario())


def test_a_quiet_close_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()

    async def scenario() -> None:
        await bench.send("1")

    run_on(bench, scenario)
    assert not caplog.records


def test_a_cancelled_request_leaves_the_queue() -> None:
    bench = Bench(max_batch_tokens=2)

    async def scenario() -> None:
        bench.executor.held = True
        first = bench.send("1 1")
        await settle()
        unwanted, wanted = bench.send("2 2", "3 3"), bench.send("4 4")
        await settle()
        assert bench.metric("queue_tokens") == 6
        assert bench.metric("queue_requests") == 3
        unwanted.cancel()
        await settle()
        assert bench.metric("queue_tokens") == bench.scheduler.tokens == 2
        assert bench.metric("queue_requests") == 2
        for _ in range(2):
            bench.executor.step()
            await settle()
        await asyncio.gather(first, wanted)
        assert bench.backend.batches == [[[1, 1]], [[4, 4]]]

    run_on(bench, scenario)


def test_cancelling_during_its_batch_leaves_the_others_alone() -> None:
    bench = Bench()

    async def scenario() -> None:
        bench.executor.held = True
        blocker = bench.send("9")
        await settle()
        unwanted, wanted = bench.send(f"1 {NAN}"), bench.send("2 2")
        await settle()
        bench.executor.step()
        await settle()
        unwanted.cancel()
        await settle()
        bench.executor.held = False
        bench.executor.step()
        assert (await wanted).vectors.tolist() == expected("2 2")
        await blocker
        assert bench.engine.ready

    run_on(bench, scenario)
