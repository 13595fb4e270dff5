# SPDX-License-Identifier: MIT OR Apache-2.0
"""The cores of a process, lent to batches, and a watch over those that hang."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from embedding_server.errors import InferenceTimedOut

__all__ = ["Cores"]

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# Looks at what runs for one time limit, and the seconds between two.
_LOOKS = 10
_LEAST_BETWEEN, _MOST_BETWEEN = 0.05, 1.0

# What is under way at the end is for nobody any more.
_PATIENCE_AT_END = 2.0


@dataclass(eq=False, slots=True)
class _Running:
    """Work in a thread."""

    owner: str
    cores: int
    result: asyncio.Future[Any]
    looks: int = 0
    overdue: bool = False


class Cores:
    """``count`` cores, shared by all engines of a process.

    First come, first served, so that models take turns. ``executor`` runs the batches; by
    default a pool of as many threads. Work that takes longer than ``timeout`` seconds hangs: its
    cores are gone until it ends, if it ever does. For use in one event loop.
    """

    def __init__(
        self, count: int, *, timeout: float | None = None, executor: Executor | None = None
    ) -> None:
        self.count = count
        self.usable = count
        """Those that no hanging work holds."""
        self._timeout = timeout
        self._between_looks = min(max((timeout or 0) / _LOOKS, _LEAST_BETWEEN), _MOST_BETWEEN)
        self._executor = executor or ThreadPoolExecutor(count, thread_name_prefix="inference")
        self._free = count
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._running: dict[Future[Any], _Running] = {}
        self._watch: asyncio.TimerHandle | None = None
        self._left_behind = False
        self.broken = asyncio.Event()
        """Set once any work has hung or any batch loop has died."""

    @property
    def free(self) -> int:
        """Cores that nobody has or waits for."""
        return 0 if self._waiting else self._free

    @property
    def waiting(self) -> int:
        """How many wait for their turn."""
        return len(self._waiting)

    @property
    def overdue(self) -> Sequence[str]:
        """Whose work hangs now."""
        return sorted({running.owner for running in self._running.values() if running.overdue})

    @property
    def stuck(self) -> bool:
        """Whether a thread is at work that can't be waited for."""
        return self._left_behind or self.usable < self.count

    def check(self, cores: int) -> None:
        """Raise InferenceTimedOut if there won't be ``cores`` before hanging work ends."""
        if cores > self.usable:
            raise self._timed_out(" and ".join(self.overdue))

    async def acquire(self, cores: int) -> None:
        """Wait for ``cores`` of them, behind all who wait already.

        Raises InferenceTimedOut once hanging work holds so many that there won't be enough.
        """
        if cores <= self.free:
            self.take(cores)
            return
        self.check(cores)
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((cores, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
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

    def run(self, work: Callable[[], Result], cores: int, *, owner: str) -> asyncio.Future[Result]:
        """``work()`` in one of the threads, which gives ``cores`` back at its end.

        At the thread's own end: whoever waits for it may have been cancelled, or got
        InferenceTimedOut. ``owner`` is the model's name.
        """
        loop = asyncio.get_running_loop()
        job = self._executor.submit(work)
        result: asyncio.Future[Result] = loop.create_future()
        self._running[job] = _Running(owner, cores, result)
        if self._timeout is not None and self._watch is None:
            self._watch = loop.call_later(self._between_looks, self._look)

        def ended(job: Future[Result]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._ended, job)

        job.add_done_callback(ended)
        return result

    def close(self) -> None:
        """End the threads, after the batches under way.

        With a time limit these are waited for a moment only; see ``stuck``.
        """
        if self._watch is not None:
            self._watch.cancel()
        if self._timeout is not None:
            jobs = [job for job, running in self._running.items() if not running.overdue]
            concurrent.futures.wait(jobs, _PATIENCE_AT_END)
            self._left_behind = any(not job.done() for job in self._running)
        self._executor.shutdown(wait=not self._left_behind, cancel_futures=True)

    def _ended(self, job: Future[Any]) -> None:
        running = self._running.pop(job)
        try:
            if running.overdue:
                self.usable += running.cores
                logger.warning("the batch of %s that took too long has ended", running.owner)
            if not running.result.done():
                _pass_on(job, running.result)
        finally:
            # After its result: a failed request leaves the queue before the next batch is chosen.
            self.release(running.cores)

    def _look(self) -> None:
        """One timer for all that runs, and none when nothing does."""
        assert self._timeout is not None
        self._watch = None
        if not self._running:
            return
        # First, so that a look that fails is not the last one.
        loop = asyncio.get_running_loop()
        self._watch = loop.call_later(self._between_looks, self._look)
        for running in self._running.values():
            # Counted and not timed: when the whole process stood still, nothing hung.
            running.looks += 1
            seconds = (running.looks - 1) * self._between_looks
            if seconds >= self._timeout and not running.overdue:
                self._give_up(running)

    def _give_up(self, running: _Running) -> None:
        running.overdue = True
        self.broken.set()
        self.usable -= running.cores
        if not running.result.done():
            running.result.set_exception(self._timed_out(running.owner))
        for item in list(self._waiting):
            cores, turn = item
            if cores > self.usable:
                self._waiting.remove(item)
                if not turn.done():
                    turn.set_exception(self._timed_out(" and ".join(self.overdue)))
        self._serve()

    def _timed_out(self, owners: str) -> InferenceTimedOut:
        return InferenceTimedOut(
            f"A batch of the model {owners} has taken longer than the {self._timeout:g} s that "
            "--inference-timeout allows. Try again when the server has been restarted."
        )

    def _serve(self) -> None:
        while self._waiting and self._waiting[0][0] <= self._free:
            cores, turn = self._waiting.popleft()
            if not turn.done():
                self._free -= cores
                turn.set_result(None)


def _pass_on(job: Future[Any], result: asyncio.Future[Any]) -> None:
    """What ``job`` came to, to ``result``; anything it raised as an Exception."""
    if job.cancelled():
        result.cancel()
        return
    error = job.exception()
    if error is None:
        result.set_result(job.result())
    elif isinstance(error, Exception) and not isinstance(error, StopIteration):
        result.set_exception(error)
    else:  # a task can't raise these, or would end with them
        wrapped = RuntimeError(f"{type(error).__name__} in a thread of inference")
        wrapped.__cause__ = error
        result.set_exception(wrapped)
