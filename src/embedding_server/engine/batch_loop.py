# SPDX-License-Identifier: MIT OR Apache-2.0
"""One model's queue, and the loop that computes it batch by batch in threads."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from embedding_server.engine.backend import Backend
from embedding_server.engine.batch import Batch, Encoding, Entry
from embedding_server.engine.cores import Cores
from embedding_server.engine.postprocess import NOT_FINITE, fault_in
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
_FAILED = "The model failed on this request; the server's log says why."


class _PendingRequest:
    """A request's vectors as they arrive; ``future`` is done when none is missing."""

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
class _StartedBatch:
    """A batch that a thread computes."""

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
    """The queue of the model ``name`` and the loop that empties it.

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
        self._cores_needed = cores.count if backend.exclusive else 1
        self._metrics = metrics
        self._throughput = Throughput()
        self._pending: set[_PendingRequest] = set()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._ended = False

    @property
    def running(self) -> bool:
        """Whether the loop was started and has not ended."""
        return self._task is not None and not self._ended

    @property
    def tokens(self) -> int:
        """Tokens waiting."""
        return self._scheduler.tokens

    @property
    def seconds(self) -> float:
        """How long the waiting tokens will take at the speed of recent batches; 0 before any."""
        # Models that wait for cores take turns, and a batch that hangs holds its cores.
        cores = max(self._cores.usable, 1) / max(self._cores.waiting, 1)
        return self._throughput.seconds(self._scheduler.tokens, cores=cores)

    def start(self) -> None:
        """Start the loop in the running event loop."""
        loop = asyncio.get_running_loop()
        self._task = loop.create_task(self._run(), name=f"batches of {self._name}")
        self._task.add_done_callback(self._end)

    async def close(self) -> None:
        """Stop the loop; all pending requests fail with NotReady."""
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
        request = _PendingRequest(size, self._backend.dims, future, stages)
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
            if request.missing:  # it failed or was cancelled
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
                    logger.error(
                        "%d requests fail, as no cores are left: %s", len(self._pending), error
                    )
                    self._fail(self._pending, InferenceTimedOut, str(error))
                    continue
                started = self._start_next()
                if started is not None:
                    batches.create_task(self._finish(started))

    def _end(self, task: asyncio.Task[None]) -> None:
        self._ended = True
        error = None if task.cancelled() else task.exception()
        if error is not None:
            logger.critical("the batch loop of %s died", self._name, exc_info=error)
            self._cores.broken.set()
        for request in self._pending:
            request.fail(NotReady(f"The model {self._name!r} has stopped."))

    def _start_next(self) -> _StartedBatch | None:
        """Start a batch of waiting entries on the acquired cores, and on idle ones if it pays."""
        idle = self._cores.free
        entries: Sequence[Entry] = ()
        try:
            entries = self._scheduler.next_batch(cores=1 + idle)
        finally:
            if not entries:  # all were discarded while the loop waited for cores
                self._cores.release(self._cores_needed)
        if not entries:
            return None
        self._metrics.queue_tokens.set(self._scheduler.tokens)
        return self._start(entries, idle)

    def _start(self, entries: Sequence[Entry], idle: int = 0) -> _StartedBatch | None:
        """Start ``entries`` on the acquired cores, and on ``idle`` others if it pays."""
        cores = self._cores_needed
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
        except Exception:  # no memory, or no thread
            self._cores.release(cores)
            self._fail_batch(entries, InferenceFailed, _FAILED)
            return None
        traced = {request.stages for request in _requests_of(entries) if request.stages is not None}
        for stages in traced:
            stages.batch_started(started)
        return _StartedBatch(entries, rows, batch, traced, cores, started, vectors)

    async def _finish(self, batch: _StartedBatch) -> None:
        fault = await self._settle(batch)
        if fault is None:
            return
        logger.warning(
            "a batch of %d inputs with %d tokens %s on %s; trying it in halves",
            *(len(batch.entries), batch.batch.tokens, fault, self._name),
        )
        if fault == _NO_MEMORY:
            self._metrics.out_of_memory.inc()
        await self._retry_in_halves(batch)

    async def _settle(self, batch: _StartedBatch) -> str | None:
        """Deliver the batch or fail its requests; or return the fault, if halves may not have it.

        As a string: the frames of an exception would keep the memory of the batch.
        """
        try:
            vectors = await batch.vectors
        except MemoryError:
            return _NO_MEMORY
        except InferenceTimedOut as error:
            self._metrics.timed_out_batches.inc()
            self._fail_batch(batch.entries, InferenceTimedOut, str(error))
            return None
        except Exception:
            if len(batch.batch) > 1:
                return "failed"
            self._fail_batch(batch.entries, InferenceFailed, _FAILED)
            return None
        finally:
            for stages in batch.stages:
                stages.batch_ended(time.perf_counter())
        self._measure(batch)
        fault = fault_in(vectors, (len(batch.batch), self._backend.dims))
        if fault is None:
            self._deliver(batch, vectors)
            return None
        if len(batch.batch) > 1:
            return f"gave {fault}"
        self._metrics.failed_batches.inc()
        logger.error("%s gave %s", self._name, fault)
        answer = fault if fault == NOT_FINITE else "an answer of the wrong shape or kind"
        message = f"The model gave {answer} for this request."
        self._fail(_requests_of(batch.entries), InferenceFailed, message)
        return None

    async def _retry_in_halves(self, batch: _StartedBatch) -> None:
        """Compute a failed batch in parts, one after the other, down to single inputs.

        So an input that breaks its batch fails alone, and a batch that needs too much memory is
        computed in smaller ones.
        """
        failed = [batch]
        without_memory = 0
        while failed:
            batch = failed.pop()
            if len(batch.batch) == 1:  # it is out of memory, or it would have failed already
                without_memory += 1
                message = (
                    f"The server has not enough memory for an input of {batch.batch.tokens} "
                    "tokens, even alone. Try again later, or send shorter inputs."
                )
                self._fail(_requests_of(batch.entries), OutOfMemory, message)
                continue
            middle = len(batch.entries) // 2
            for half in (batch.entries[:middle], batch.entries[middle:]):
                started = await self._start_again(half)
                if started is not None and await self._settle(started) is not None:
                    failed.append(started)
        if without_memory:
            self._metrics.failed_batches.inc()
            logger.error("%d inputs found no memory on %s, each alone", without_memory, self._name)

    async def _start_again(self, entries: Sequence[Entry]) -> _StartedBatch | None:
        """Start those of ``entries`` whose requests still wait, when there are cores."""
        try:
            await self._cores.acquire(self._cores_needed)
        except InferenceTimedOut as error:
            self._fail(_requests_of(entries), InferenceTimedOut, str(error))
            return None
        entries = [entry for entry in entries if not _request_of(entry).future.done()]
        if not entries:
            self._cores.release(self._cores_needed)
            return None
        return self._start(entries)

    def _measure(self, batch: _StartedBatch) -> None:
        seconds = time.perf_counter() - batch.started
        packed, metrics = batch.batch, self._metrics
        metrics.inference_duration.observe(seconds)
        metrics.batch_size.observe(len(packed))
        metrics.batch_tokens.observe(packed.tokens)
        if self._backend.padded:
            metrics.padding_tokens.inc(len(packed) * packed.max_seqlen - packed.tokens)
        self._throughput.add(packed.tokens, seconds * batch.cores)

    def _deliver(self, batch: _StartedBatch, vectors: NDArray[np.float32]) -> None:
        for entry, row in zip(batch.entries, batch.rows, strict=True):
            _request_of(entry).deliver(entry.places, vectors[row])
        for request in _requests_of(batch.entries):
            self._metrics.queue_duration.observe(batch.started - request.arrived)

    def _fail_batch(
        self, entries: Sequence[Entry], kind: type[EmbeddingServerError], message: str
    ) -> None:
        """Fail the requests of ``entries``; the log gets the exception that is being handled."""
        self._metrics.failed_batches.inc()
        logger.exception("a batch of %d inputs failed on %s", len(entries), self._name)
        self._fail(_requests_of(entries), kind, message)

    def _fail(
        self, requests: Set[_PendingRequest], kind: type[EmbeddingServerError], message: str
    ) -> None:
        for request in requests:
            request.fail(kind(message))
            self._scheduler.discard(request)
        self._metrics.queue_tokens.set(self._scheduler.tokens)


def _request_of(entry: Entry) -> _PendingRequest:
    assert isinstance(entry.request, _PendingRequest)
    return entry.request


def _requests_of(entries: Sequence[Entry]) -> set[_PendingRequest]:
    return {_request_of(entry) for entry in entries}
