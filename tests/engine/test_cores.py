# SPDX-License-Identifier: MIT OR Apache-2.0
"""Cores: lent in turn, given back at the end of a thread, and taken away by overdue batches."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
from engine_bench import MODEL, FakeExecutor, run, settle

from embedding_server.engine.cores import Cores
from embedding_server.errors import InferenceTimedOut


def test_cores_are_lent_in_turn_and_given_back_when_waiting_is_cancelled() -> None:
    async def scenario() -> None:
        cores = Cores(2, executor=FakeExecutor())
        await cores.acquire(1)
        order: list[str] = []

        async def work(name: str, count: int) -> None:
            await cores.acquire(count)
            order.append(name)

        large = asyncio.create_task(work("large", 2))
        await settle()
        small = asyncio.create_task(work("small", 1))
        await settle()
        assert order == []
        assert cores.free == 0, "no one overtakes the caller that waits for two"
        large.cancel()
        await settle()
        assert order == ["small"]
        third = asyncio.create_task(work("third", 2))
        await settle()
        cores.release(1)
        cores.release(1)
        third.cancel()  # in the moment in which it gets them
        await settle()
        assert order == ["small"]
        assert cores.free == 2
        await asyncio.gather(large, small, third, return_exceptions=True)

    run(scenario())


class Nameless(str):
    """Can't be put into a message."""

    def __format__(self, _: str) -> str:
        raise ZeroDivisionError("no name")


def test_a_check_that_fails_is_not_the_last() -> None:
    async def scenario() -> None:
        cores = Cores(2, timeout=0.05, executor=(executor := FakeExecutor()))
        executor.held = True
        cores.take(2)
        cores.run(lambda: None, 1, owner=Nameless())
        other = cores.run(lambda: None, 1, owner="other")
        with pytest.raises(InferenceTimedOut, match="other"):
            await other
        assert cores.broken.is_set()

    run(scenario())


def test_waiting_for_all_cores_does_not_block_others_from_the_usable_ones() -> None:
    async def scenario() -> None:
        cores = Cores(2, timeout=0.05, executor=(executor := FakeExecutor()))
        executor.held = True
        await cores.acquire(1)
        hanging = cores.run(lambda: None, 1, owner="hanging")
        large = asyncio.create_task(cores.acquire(2))
        await settle()
        small = asyncio.create_task(cores.acquire(1))
        with pytest.raises(InferenceTimedOut, match="hanging"):
            await hanging
        with pytest.raises(InferenceTimedOut, match="hanging"):
            await large
        await small
        assert cores.stuck

    run(scenario())


def test_close_does_not_wait_for_an_overdue_batch() -> None:
    ended = threading.Event()

    async def scenario() -> None:
        cores = Cores(1, timeout=0.05)
        await cores.acquire(1)
        with pytest.raises(InferenceTimedOut):
            await cores.run(lambda: ended.wait(60), 1, owner=MODEL)
        cores.close()
        assert cores.stuck

    run(scenario())
    ended.set()


def test_close_waits_for_a_batch_in_time() -> None:
    async def scenario() -> None:
        cores = Cores(1, timeout=60)
        await cores.acquire(1)
        result = cores.run(lambda: time.sleep(0.2), 1, owner=MODEL)
        cores.close()
        assert not cores.stuck
        await result

    run(scenario())
