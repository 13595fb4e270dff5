"""The cores of a process, lent to batches."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["Cores"]

Result = TypeVar("Result")


class Cores:
    """``count`` cores, shared by all engines of a process.

    First come, first served, so that models take turns. ``executor`` runs the batches; by
    default a pool of as many threads. For use in one event loop.
    """

    def __init__(self, count: int, *, executor: Executor | None = None) -> None:
        self.count = count
        self._executor = executor or ThreadPoolExecutor(count, thread_name_prefix="inference")
        self._free = count
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def free(self) -> int:
        """Cores that nobody has or waits for."""
        return 0 if self._waiting else self._free

    async def acquire(self, cores: int) -> None:
        """Wait for ``cores`` of them, behind all who wait already."""
        if cores <= self.free:
            self.take(cores)
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((cores, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.release(cores)
            else:
                self._waiting = deque(item for item in self._waiting if item[1] is not turn)
                self._serve()
            raise

    def take(self, cores: int) -> None:
        """Have ``cores`` of the free ones, without waiting."""
        assert cores <= self.free
        self._free -= cores

    def release(self, cores: int) -> None:
        """Give ``cores`` of them back."""
        self._free += cores
        self._serve()

    def run(self, work: Callable[[], Result], cores: int) -> asyncio.Future[Result]:
        """``work()`` in one of the threads, which gives ``cores`` back at its end.

        At the thread's own end: whoever waits for it may have been cancelled.
        """
        loop = asyncio.get_running_loop()
        job = self._executor.submit(work)

        def ended(_: Future[Result]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self.release, cores)

        result = asyncio.wrap_future(job, loop=loop)
        job.add_done_callback(ended)  # after the other: a failed request leaves the queue first
        return result

    def close(self) -> None:
        """Wait for the batches under way and end the threads."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _serve(self) -> None:
        while self._waiting and self._waiting[0][0] <= self._free:
            cores, turn = self._waiting.popleft()
            if not turn.done():
                self._free -= cores
                turn.set_result(None)
