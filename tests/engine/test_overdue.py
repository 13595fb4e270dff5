# SPDX-License-Identifier: MIT OR Apache-2.0
"""Batches over their time limit, and what waits for their cores."""

from __future__ import annotations

import pytest
from engine_bench import MODEL, Bench, expected, run_on, settle

from embedding_server.errors import InferenceTimedOut


def test_a_batch_over_its_time_fails_alone_and_gives_its_core_back_late() -> None:
    bench = Bench(core_count=2, timeout=0.05, max_batch_tokens=2)

    async def scenario() -> None:
        bench.executor.held = True
        slow = bench.send("1 1")
        with pytest.raises(InferenceTimedOut, match=MODEL):
            await slow
        assert bench.cores.overdue == [MODEL]
        assert (bench.cores.usable, bench.cores.free) == (1, 1)
        other = bench.send("2 2")
        await settle()
        bench.executor.step()  # the slow one
        bench.executor.step()
        assert (await other).vectors.tolist() == expected("2 2")
        await settle()
        assert not bench.cores.overdue
        assert bench.cores.usable == bench.cores.free == 2
        bench.executor.held = False
        assert (await bench.send("3 3")).vectors.tolist() == expected("3 3")
        assert bench.metric("timed_out_batches_total") == 1

    run_on(bench, scenario)


@pytest.mark.parametrize("exclusive", [False, True], ids=["a-core-each", "exclusive"])
def test_nothing_waits_for_cores_of_overdue_batches(exclusive: bool) -> None:
    bench = Bench(core_count=2, timeout=0.05, max_batch_tokens=2, exclusive=exclusive)

    async def scenario() -> None:
        bench.executor.held = True
        tasks = [bench.send(f"{number} {number}", "5 5") for number in range(20)]
        for task in tasks:
            with pytest.raises(InferenceTimedOut):
                await task
        assert bench.scheduler.tokens == len(bench.scheduler) == 0
        tokenised = len(bench.tokenizer.prompts)
        with pytest.raises(InferenceTimedOut):
            await bench.send("1")
        assert len(bench.tokenizer.prompts) == tokenised, "refused before any work"
        assert bench.engine.ready, "the loop lives on"
        for _ in range(1 if exclusive else 2):
            bench.executor.step()
        await settle()
        bench.executor.held = False
        assert (await bench.send("1")).vectors.tolist() == expected("1")

    run_on(bench, scenario)
