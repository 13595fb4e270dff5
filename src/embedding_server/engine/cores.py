# SPDX-License-Identifier: MIT OR Apache-2.0
"""The cores of a process, lent to batches, and the time limit of each batch."""

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

# How often running batches are checked within the time limit, and the bounds of the interval in
# seconds.
_CHECKS = 10
_SHORTEST_INTERVAL, _LONGEST_INTERVAL = 0.05, 1.0

# Nobody needs the batches that run when the process ends.
_SECONDS_TO_END = 2.0


@dataclass(eq=False, slots=True)
class _Job:
    """Work in a thread."""

    owner: str
    cores: int
    result: asyncio.Future[Any]
    checks: int = 0
    overdue: bool = False


class Cores:
    """``count`` cores, shared by all engines of a process.

    First come, first served, so that models take turns. ``executor`` runs the batches; by
    default a pool of as many threads. A batch that takes longer than ``timeout`` seconds is
    overdue, and its cores are unusable until it ends, if it ever does. For one event loop.
    """

    def __init__(
        self, count: int, *, timeout: float | None = None, executor: Executor | None = None
    ) -> None:
        self.count = count
        self.usable = count
        """Cores without an overdue batch."""
        self._timeout = timeout
        self._interval = min(max((timeout or 0) / _CHECKS, _SHORTEST_INTERVAL), _LONGEST_INTERVAL)
        self._executor = executor or ThreadPoolExecutor(count, thread_name_prefix="inference")
        self._free = count
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._jobs: dict[Future[Any], _Job] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._left_behind = False
        self.broken = asyncio.Event()
        """Set once a batch was overdue or a batch loop has died."""

    @property
    def free(self) -> int:
        """Cores that are neither taken nor waited for."""
        return 0 if self._waiting else self._free

    @property
    def waiting(self) -> int:
        """How many callers of ``acquire`` wait."""
        return len(self._waiting)

    @property
    def overdue(self) -> Sequence[str]:
        """The owners of overdue batches."""
        return sorted({job.owner for job in self._jobs.values() if job.overdue})

    @property
    def stuck(self) -> bool:
        """Whether a thread still runs that the process can't wait for."""
        return self._left_behind or self.usable < self.count

    def check(self, cores: int) -> None:
        """Raise InferenceTimedOut if fewer than ``cores`` are usable."""
        if cores > self.usable:
            raise self._timed_out(" and ".join(self.overdue))

    async def acquire(self, cores: int) -> None:
        """Take ``cores`` of them, after all who wait already.

        Raises InferenceTimedOut once fewer are usable.
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
        """Take ``cores`` of the free ones, without waiting."""
        assert cores <= self.free
        self._free -= cores

    def release(self, cores: int) -> None:
        """Give ``cores`` of them back."""
        self._free += cores
        self._serve()

    def run(self, work: Callable[[], Result], cores: int, *, owner: str) -> asyncio.Future[Result]:
        """Run ``work`` in a thread for the model ``owner``; ``cores`` are released when it ends.

        Not when the result is there: it may be cancelled, or an InferenceTimedOut, long before.
        """
        loop = asyncio.get_running_loop()
        job = self._executor.submit(work)
        result: asyncio.Future[Result] = loop.create_future()
        self._jobs[job] = _Job(owner, cores, result)
        if self._timeout is not None and self._timer is None:
            self._timer = loop.call_later(self._interval, self._check_jobs)

        def ended(job: Future[Result]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._end, job)

        job.add_done_callback(ended)
        return result

    def close(self) -> None:
        """End the threads after their batches; with a time limit, wait a moment only.

        Afterwards ``stuck`` says whether a thread still runs.
        """
        if self._timer is not None:
            self._timer.cancel()
        if self._timeout is not None:
            in_time = [future for future, job in self._jobs.items() if not job.overdue]
            concurrent.futures.wait(in_time, _SECONDS_TO_END)
            self._left_behind = any(not future.done() for future in self._jobs)
        self._executor.shutdown(wait=not self._left_behind, cancel_futures=True)

    def _end(self, future: Future[Any]) -> None:
        job = self._jobs.pop(future)
        try:
            if job.overdue:
                self.usable += job.cores
                logger.warning("the batch of %s that took too long has ended", job.owner)
            if not job.result.done():
                _set_result(job.result, future)
        finally:
            # After the result: a failed request leaves the queue before the next batch is chosen.
            self.release(job.cores)

    def _check_jobs(self) -> None:
        """Find overdue jobs; one timer for all, and none when nothing runs."""
        assert self._timeout is not None
        self._timer = None
        if not self._jobs:
            return
        # The next check first, so that it comes even if this one fails.
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._interval, self._check_jobs)
        for job in self._jobs.values():
            # Checks are counted, not seconds: while the whole process stood still, nothing hung.
            job.checks += 1
            seconds = (job.checks - 1) * self._interval
            if seconds >= self._timeout and not job.overdue:
                self._give_up(job)

    def _give_up(self, job: _Job) -> None:
        job.overdue = True
        self.broken.set()
        self.usable -= job.cores
        if not job.result.done():
            job.result.set_exception(self._timed_out(job.owner))
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


def _set_result(result: asyncio.Future[Any], job: Future[Any]) -> None:
    if job.cancelled():
        result.cancel()
    elif (error := job.exception()) is None:
        result.set_result(job.result())
    elif isinstance(error, Exception) and not isinstance(error, StopIteration):
        result.set_exception(error)
    else:  # a task can't raise these, or would end with them
        wrapped = RuntimeError(f"{type(error).__name__} in a thread of inference")
        wrapped.__cause__ = error
        result.set_exception(wrapped)
