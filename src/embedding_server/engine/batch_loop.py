# SPDX-License-Identifier: MIT OR Apache-2.0
"""The batches of one model: what waits is put together, computed in threads, and handed out."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from embedding_server.engine.backend import Backend
from embedding_server.engine.batch import Batch, Encoding, Entry
from embedding_server.engine.cores import Cores
from embedding_server.engine.postprocess import all_finite
from embedding_server.engine.scheduler import Scheduler
from embedding_server.engine.stages import Stages
from embedding_server.engine.throughput import Throughput
from embedding_server.errors import (
    EmbeddingServerError,
    InferenceFailed,
    InferenceTimedOut,
    NotReady,
    OutOfMemory,
)
from embedding_server.telemetry import ModelMetrics

__all__ = ["BatchLoop"]

logger = logging.getLogger(__name__)

# From here a single input is faster on all cores together than on one.
_WIDE_TOKENS = 64

_NO_MEMORY = "ran out of memory"


class _Request:
    """A request's vectors as they come in; done when none is missing."""

    __slots__ = ("arrived", "future", "missing", "stages", "vectors")

    def __init__(
        self, size: int, dims: int, future: asyncio.Future[None], stages: Stages | None
    ) -> None:
        self.vectors = np.empty((size, dims), dtype=np.float32)
        self.missing = size
        self.future = future
        self.stages = stages
        self.arrived = time.perf_counter()

    def deliver(self, places: tuple[int, ...], vector: NDArray[np.float32]) -> None:
        for place in places:
            self.vectors[place] = vector
        self.missing -= len(places)
        if not self.missing and not self.future.done():
            self.future.set_result(None)

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)


@dataclass(frozen=True, slots=True)
class _Running:
    """A batch under way."""

    entries: Sequence[Entry]
    rows: Sequence[int]
    """The row of each entry in the batch; equal inputs share one."""
    batch: Batch
    stages: Collection[Stages]
    """Of the requests that are traced."""
    cores: int
    started: float
    vectors: asyncio.Future[NDArray[np.float32]]


class BatchLoop:
    """The queue of one model and the loop that empties it; ``name`` is the model's.

    Call ``start`` in the event loop that will call ``compute``.
    """

    def __init__(
        self,
        name: str,
        backend: Backend,
        *,
        scheduler: Scheduler,
        cores: Cores,
        metrics: ModelMetrics,
    ) -> None:
        self._name = name
        self._backend = backend
        self._scheduler = scheduler
        self._cores = cores
        self._cores_needed = 1
        self._metrics = metrics
        self._throughput = Throughput()
        self._pending: set[_Request] = set()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._failure: BaseException | None = None

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._task is not None and self._failure is None

    @property
    def tokens(self) -> int:
        """Tokens waiting."""
        return self._scheduler.tokens

    @property
    def seconds(self) -> float:
        """How long what waits will take, as far as recent batches tell; 0 if none do."""
        # Models that wait for cores take turns, and what hangs has none to give.
        cores = max(self._cores.usable, 1) / max(self._cores.waiting, 1)
        return self._throughput.seconds(self._scheduler.tokens, cores=cores)

    def start(self) -> None:
        """Start the loop in the running event loop."""
        self._cores_needed = self._cores.count if self._backend.exclusive else 1
        loop = asyncio.get_running_loop()
        self._task = loop.create_task(self._run(), name=f"batches of {self._name}")
        self._task.add_done_callback(self._ended)

    async def close(self) -> None:
        """Stop the loop; whatever still waits fails with NotReady."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def check_cores(self) -> None:
        """Raise InferenceTimedOut if batches that hang hold the cores that the next one needs."""
        self._cores.check(self._cores_needed)

    async def compute(
        self, places: Mapping[Encoding, Sequence[int]], tokens: int, stages: Stages | None
    ) -> NDArray[np.float32]:
        """One vector for each place, float32 [places, dims].

        Each distinct input comes with its places; ``tokens`` are those of all. Raises
        InferenceFailed, OutOfMemory, InferenceTimedOut or NotReady.
        """
        size = sum(len(equal) for equal in places.values())
        future = asyncio.get_running_loop().create_future()
        request = _Request(size, self._backend.dims, future, stages)
        if stages is not None:
            stages.queue_start, stages.tokens = request.arrived, tokens
        self._pending.add(request)
        self._scheduler.add(
            [Entry(request, tuple(equal), encoding) for encoding, equal in places.items()]
        )
        self._metrics.queue_tokens.set(self._scheduler.tokens)
        self._wake.set()
        try:
            await request.future
        finally:
            self._pending.discard(request)
            if request.missing:  # failed or cancelled: nobody wants the rest
                self._scheduler.discard(request)
                self._metrics.queue_tokens.set(self._scheduler.tokens)
        return request.vectors

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as batches:
            while True:
                while not len(self._scheduler):
                    self._wake.clear()
                    await self._wake.wait()
                try:
                    await self._cores.acquire(self._cores_needed)
                except InferenceTimedOut as error:
                    self._fail_all(error)
                    continue
                batch = self._begin(self._cores_needed)
                if batch is not None:
                    batches.create_task(self._end(batch))

    def _begin(self, cores: int) -> _Running | None:
        """Start the next batch on ``cores`` that were acquired, and on the rest if it pays."""
        idle = self._cores.free
        entries: Sequence[Entry] = ()
        try:
            entries = self._scheduler.next_batch(cores=1 + idle)
        finally:
            if not entries:  # all were discarded meanwhile
                self._cores.release(cores)
        if not entries:
            return None
        self._metrics.queue_tokens.set(self._scheduler.tokens)
        return self._start(entries, cores, idle)

    def _start(self, entries: Sequence[Entry], cores: int, idle: int = 0) -> _Running | None:
        """Start ``entries`` on ``cores``, and on the ``idle`` others if it pays."""
        try:
            distinct: dict[Encoding, int] = {}
            rows = [distinct.setdefault(entry.encoding, len(distinct)) for entry in entries]
            batch = Batch.from_encodings(list(distinct))
            alone = len(batch) == 1 and not len(self._scheduler) and idle == self._cores.count - 1
            wide = idle > 0 and alone and batch.tokens >= _WIDE_TOKENS
            if wide:
                self._cores.take(idle)
                cores += idle
            started = time.perf_counter()
            work = partial(self._backend.embed, batch, wide=wide)
            vectors = self._cores.run(work, cores, owner=self._name)
            traced = _stages_of(entries)
            for stages in traced:
                stages.batch_started(started)
        except Exception:  # no memory, or no thread
            self._cores.release(cores)
            self._batch_failed(entries)
            return None
        return _Running(entries, rows, batch, traced, cores, started, vectors)

    async def _end(self, running: _Running) -> None:
        trouble = await self._settle(running)
        if trouble:
            logger.warning(
                "a batch of %d inputs with %d tokens %s on %s; trying it in halves",
                *(len(running.entries), running.batch.tokens, trouble, self._name),
            )
            if trouble == _NO_MEMORY:
                self._metrics.out_of_memory.inc()
            await self._retry_in_halves(running)

    async def _settle(self, running: _Running) -> str:
        """Deliver the batch, or fail its requests, or tell what kept it from being delivered.

        The last is for the caller to mend. The exception is gone by then, and with it whatever its
        frames held.
        """
        entries = running.entries
        try:
            vectors = await running.vectors
        except MemoryError:
            return _NO_MEMORY
        except InferenceTimedOut as error:
            self._metrics.timed_out_batches.inc()
            self._batch_failed(entries, InferenceTimedOut, str(error))
        except Exception:
            if len(running.batch) > 1:
                return "failed"
            self._batch_failed(entries)
        else:
            return self._deliver(running, vectors)
        finally:
            for stages in running.stages:
                stages.batch_ended(time.perf_counter())
        return ""

    async def _retry_in_halves(self, running: _Running) -> None:
        """Compute a batch that failed in parts, one after the other, down to one input if need be.

        So the one input that breaks it fails alone, and what is too much at once is computed.
        """
        failed = [running]
        alone = 0
        while failed:
            batch = failed.pop()
            if len(batch.batch) == 1:  # and is out of memory, or it would have failed already
                alone += 1
                message = (
                    f"The server has not enough memory for an input of {batch.batch.tokens} "
                    "tokens, even alone. Try again later, or send shorter inputs."
                )
                self._fail(batch.entries, OutOfMemory, message)
                continue
            middle = len(batch.entries) // 2
            for half in (batch.entries[:middle], batch.entries[middle:]):
                again = await self._start_again(half)
                if again is not None and await self._settle(again):
                    failed.append(again)
        if alone:
            self._metrics.failed_batches.inc()
            logger.error("%d inputs found no memory on %s, each alone", alone, self._name)

    async def _start_again(self, entries: Sequence[Entry]) -> _Running | None:
        """Start what is still wanted of ``entries`` when there are cores."""
        try:
            await self._cores.acquire(self._cores_needed)
        except InferenceTimedOut as error:
            self._fail(entries, InferenceTimedOut, str(error))
            return None
        entries = [entry for entry in entries if not _request_of(entry).future.done()]
        if not entries:
            self._cores.release(self._cores_needed)
            return None
        return self._start(entries, self._cores_needed)

    def _batch_failed(
        self,
        entries: Sequence[Entry],
        kind: type[EmbeddingServerError] = InferenceFailed,
        message: str = "The model failed on this request; the server's log says why.",
    ) -> None:
        self._metrics.failed_batches.inc()
        logger.exception("a batch of %d inputs failed on %s", len(entries), self._name)
        self._fail(entries, kind, message)

    def _deliver(self, running: _Running, vectors: NDArray[np.float32]) -> str:
        """As ``_settle``."""
        entries, batch = running.entries, running.batch
        self._measure(running, time.perf_counter() - running.started)
        try:
            finite = all_finite(vectors, (len(batch), self._backend.dims))
            fault = told = "" if finite else "values that are not finite"
        except ValueError as error:
            fault, told = str(error), "an answer of the wrong shape or kind"
        if fault:
            if len(batch) > 1:
                return f"gave {fault}"
            self._metrics.failed_batches.inc()
            logger.error("%s gave %s", self._name, fault)
            self._fail(entries, InferenceFailed, f"The model gave {told} for this request.")
            return ""
        for entry, row in zip(entries, running.rows, strict=True):
            _request_of(entry).deliver(entry.places, vectors[row])
        for request in {_request_of(entry) for entry in entries}:
            self._metrics.queue_duration.observe(running.started - request.arrived)
        return ""

    def _measure(self, running: _Running, seconds: float) -> None:
        metrics, batch = self._metrics, running.batch
        metrics.inference_duration.observe(seconds)
        metrics.batch_size.observe(len(batch))
        metrics.batch_tokens.observe(batch.tokens)
        if self._backend.padded:
            metrics.padding_tokens.inc(len(batch) * batch.max_seqlen - batch.tokens)
        self._throughput.add(batch.tokens, seconds * running.cores)

    def _fail(
        self, entries: Sequence[Entry], kind: type[EmbeddingServerError], message: str
    ) -> None:
        for request in {_request_of(entry) for entry in entries}:
            request.fail(kind(message))
            self._scheduler.discard(request)
        self._metrics.queue_tokens.set(self._scheduler.tokens)

    def _fail_all(self, error: InferenceTimedOut) -> None:
        """Nothing may wait for cores that hang."""
        logger.error("%d requests fail, as no cores are left: %s", len(self._pending), error)
        for request in self._pending:
            request.fail(InferenceTimedOut(str(error)))
        self._scheduler.clear()
        self._metrics.queue_tokens.set(0)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Nothing may wait for a loop that is gone, and readiness must say so."""
        failure = None if task.cancelled() else task.exception()
        self._failure = failure or asyncio.CancelledError()
        if failure is not None:
            logger.critical("the batch loop of %s died", self._name, exc_info=failure)
            self._cores.broken.set()
        for request in self._pending:
            request.fail(NotReady(f"The model {self._name!r} has stopped."))


def _request_of(entry: Entry) -> _Request:
    assert isinstance(entry.request, _Request)
    return entry.request


def _stages_of(entries: Sequence[Entry]) -> set[Stages]:
    """Of each request that is traced and has one of ``entries``."""
    return {stages for entry in entries if (stages := _request_of(entry).stages) is not None}
