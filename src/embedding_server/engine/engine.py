"""One model at work: requests in, vectors out, batched together on the way."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence, Sized
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from embedding_server.engine.batch import Batch, Encoding, Entry
from embedding_server.engine.cores import Cores
from embedding_server.engine.info import ModelInfo
from embedding_server.engine.parameters import EmbedParams, check_dimensions, prompt_of
from embedding_server.engine.postprocess import finite_rows, postprocess
from embedding_server.engine.scheduler import Scheduler
from embedding_server.engine.stages import Stages
from embedding_server.engine.throughput import Throughput
from embedding_server.engine.tokenizer import Input, Tokenizer
from embedding_server.errors import (
    EmbeddingServerError,
    InferenceFailed,
    InferenceTimedOut,
    InvalidRequest,
    NotReady,
    OutOfMemory,
    Overloaded,
)
from embedding_server.telemetry import ModelMetrics

__all__ = ["Embeddings", "Engine", "Limits"]

logger = logging.getLogger(__name__)

# Up to here tokenising takes about a millisecond, less than handing it to a thread and the
# noise that adds; past it the event loop would be kept from other requests.
_INLINE_CHARACTERS = 4096

# Tokenising takes memory by the character, before tokens can be counted: some ten times what a
# text of so many tokens has in most languages is enough for all.
_CHARACTERS_PER_TOKEN = 10

_INLINE_VALUES = 32 * 1024

# From here a single input is faster on all cores together than on one.
_WIDE_TOKENS = 64

# The longest wait that OpenAI's clients heed; a longer one they replace by a second or so.
_MOST_RETRY_AFTER = 60.0


class _Backend(Protocol):
    @property
    def dims(self) -> int: ...

    @property
    def padded(self) -> bool: ...

    @property
    def exclusive(self) -> bool: ...

    def embed(self, batch: Batch, *, wide: bool = False) -> NDArray[np.float32]: ...


@dataclass(frozen=True, slots=True)
class Limits:
    """What one engine takes at a time."""

    max_concurrent_requests: int
    max_queued_tokens: int
    max_request_tokens: int


@dataclass(frozen=True, slots=True)
class Embeddings:
    """The answer to one request, in the order of its inputs."""

    vectors: NDArray[Any]
    """[n, dimensions] float32, int8 or uint8; see ``postprocess``."""
    encodings: Sequence[Encoding]
    dimensions: int
    """Values in each vector before bits were packed."""

    @property
    def tokens(self) -> int:
        """Tokens of all inputs, special tokens and prompts included."""
        return sum(len(encoding.ids) for encoding in self.encodings)

    @property
    def truncated(self) -> int:
        """How many inputs were cut."""
        return sum(encoding.truncated for encoding in self.encodings)


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
    cores: int
    started: float
    vectors: asyncio.Future[NDArray[np.float32]]


class Engine:
    """Admission and the batch loop of one model.

    ``cores`` and the threads of ``tokenizing`` are shared by all engines of a process. Call
    ``start`` in the event loop that will call ``embed``.
    """

    def __init__(
        self,
        info: ModelInfo,
        tokenizer: Tokenizer,
        backend: _Backend,
        *,
        scheduler: Scheduler,
        limits: Limits,
        cores: Cores,
        tokenizing: Executor,
        metrics: ModelMetrics,
    ) -> None:
        self.info = info
        self._tokenizer = tokenizer
        self._backend = backend
        self._scheduler = scheduler
        self._limits = limits
        self._cores = cores
        self._tokenizing = tokenizing
        self._metrics = metrics
        self._pending: set[_Request] = set()
        self._admitted = 0
        self._throughput = Throughput()
        self._cores_needed = 1
        self._wake = asyncio.Event()
        self._loop_task: asyncio.Task[None] | None = None
        self._failure: BaseException | None = None

    @property
    def ready(self) -> bool:
        """Whether the batch loop is running."""
        return self._loop_task is not None and self._failure is None

    def start(self) -> None:
        """Start the batch loop in the running event loop."""
        self._cores_needed = self._cores.count if self._backend.exclusive else 1
        self._loop_task = asyncio.get_running_loop().create_task(
            self._run(), name=f"batches of {self.info.name}"
        )
        self._loop_task.add_done_callback(self._loop_ended)

    async def close(self) -> None:
        """Stop the batch loop; whatever still waits fails with NotReady."""
        task = self._loop_task
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def embed(
        self, inputs: Sequence[Input], params: EmbedParams, stages: Stages | None = None
    ) -> Embeddings:
        """The vectors of ``inputs``: all texts, or all lists of token ids.

        ``stages`` is told what the request passes, and when.
        Raises InvalidRequest for parameters or inputs this model can't take, Overloaded when
        the queue is full, InferenceFailed, OutOfMemory or InferenceTimedOut when its batch failed
        or hangs, NotReady when closed.
        """
        if not self.ready:
            raise NotReady(f"The model {self.info.name!r} is not running.")
        self._cores.check(self._cores_needed)
        check_dimensions(self.info, params.dimensions)
        prompt = prompt_of(self.info, params)
        if self._admitted >= self._limits.max_concurrent_requests:
            raise self._overloaded(f"{self._admitted} requests are being served already")
        self._admitted += 1
        self._metrics.queue_requests.set(self._admitted)
        try:
            encodings = await self._tokenize(inputs, prompt, params.truncate, stages)
            vectors = await self._compute(encodings, stages)
            answer = await self._finish(vectors, encodings, params)
        finally:
            self._admitted -= 1
            self._metrics.queue_requests.set(self._admitted)
        self._metrics.inputs.inc(len(encodings))
        self._metrics.tokens.inc(answer.tokens)
        self._metrics.truncated_inputs.inc(answer.truncated)
        return answer

    async def _tokenize(
        self, inputs: Sequence[Input], prompt: str, truncate: bool, stages: Stages | None
    ) -> list[Encoding]:
        started = time.perf_counter()
        if stages is not None:
            stages.tokenize_start = started
        # What has no length is no input, and for the tokenizer to refuse.
        characters = sum(len(value) for value in inputs if isinstance(value, Sized))
        characters += len(inputs) * len(prompt)
        allowed = self._limits.max_request_tokens * _CHARACTERS_PER_TOKEN
        if characters > allowed:
            raise InvalidRequest(
                f"The request has {characters} characters in {len(inputs)} inputs; at most "
                f"{allowed} are taken at once. Send it in parts.",
                param="input",
                code="request_too_large",
            )

        encodings: list[Encoding] | None
        if characters <= _INLINE_CHARACTERS:
            encodings = self._tokenizer.encode(inputs, prompt=prompt, truncate=truncate)
        else:
            # A step at a time: a long text takes its turn among others, and ends with its client.
            steps = self._tokenizer.encode_in_steps(inputs, prompt=prompt, truncate=truncate)
            in_thread = asyncio.get_running_loop().run_in_executor
            while (encodings := await in_thread(self._tokenizing, next, steps)) is None:
                pass
        ended = time.perf_counter()
        self._metrics.tokenize_duration.observe(ended - started)
        if stages is not None:
            stages.tokenize_end = ended
        tokens = sum(len(encoding.ids) for encoding in encodings)
        if tokens > self._limits.max_request_tokens:
            raise InvalidRequest(
                f"The request has {tokens} tokens in {len(encodings)} inputs; at most "
                f"{self._limits.max_request_tokens} are taken at once. Send it in parts.",
                param="input",
                code="request_too_large",
            )
        return encodings

    async def _compute(
        self, encodings: Sequence[Encoding], stages: Stages | None
    ) -> NDArray[np.float32]:
        """Queue every input or none, and wait for their vectors."""
        if not self.ready:
            raise NotReady(f"The model {self.info.name!r} is shutting down.")
        # Equal inputs are computed once.
        places: dict[Encoding, list[int]] = {}
        for place, encoding in enumerate(encodings):
            places.setdefault(encoding, []).append(place)
        tokens = sum(len(encoding.ids) for encoding in places)
        waiting = self._scheduler.tokens
        # A request that is larger than the whole queue must have its chance when it is empty.
        if waiting and waiting + tokens > self._limits.max_queued_tokens:
            raise self._overloaded(f"{waiting} tokens are waiting already")
        request = _Request(
            len(encodings), self._backend.dims, asyncio.get_running_loop().create_future(), stages
        )
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

    async def _finish(
        self,
        vectors: NDArray[np.float32],
        encodings: Sequence[Encoding],
        params: EmbedParams,
    ) -> Embeddings:
        def work() -> NDArray[Any]:
            return postprocess(
                vectors,
                dimensions=params.dimensions,
                # What the authors define ends in scaling; the unscaled output is the model's own.
                layer_norm_first=self.info.layer_norm and params.normalize,
                scale=params.normalize,
                output_dtype=params.output_dtype,
            )

        finished = await _inline_or_thread(work, small=vectors.size <= _INLINE_VALUES)
        return Embeddings(finished, encodings, params.dimensions or self.info.dims)

    def _overloaded(self, what: str) -> Overloaded:
        # Engines that wait for cores take turns; what hangs has none to give.
        cores = max(self._cores.usable, 1) / max(self._cores.waiting, 1)
        wait = self._throughput.seconds(self._scheduler.tokens, cores=cores)
        return Overloaded(
            f"The model {self.info.name!r} is at its limit: {what}. Try again later.",
            retry_after=min(max(1.0, wait), _MOST_RETRY_AFTER),
        )

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
            vectors = self._cores.run(work, cores, owner=self.info.name)
            for stages in _stages_of(entries):
                stages.batch_started(started)
        except Exception:  # no memory, or no thread
            self._cores.release(cores)
            self._batch_failed(entries)
            return None
        return _Running(entries, rows, batch, cores, started, vectors)

    async def _end(self, running: _Running) -> None:
        if not await self._settled(running):
            await self._retry_in_halves(running)

    async def _settled(self, running: _Running) -> bool:
        """Deliver the batch, or fail its requests; False if memory ran out, for the caller to mend.

        The exception is gone by then, and with it whatever its frames held.
        """
        entries = running.entries
        try:
            vectors = await running.vectors
        except MemoryError:
            return False
        except InferenceTimedOut as error:
            self._metrics.timed_out_batches.inc()
            self._batch_failed(entries, InferenceTimedOut, str(error))
        except Exception:
            self._batch_failed(entries)
        else:
            self._deliver(running, vectors)
        finally:
            for stages in _stages_of(entries):
                stages.batch_ended(time.perf_counter())
        return True

    async def _retry_in_halves(self, running: _Running) -> None:
        """Compute a batch that ran out of memory in parts, one after the other.

        Down to one input, if need be, which fails with OutOfMemory.
        """
        told = (len(running.entries), running.batch.tokens, self.info.name)
        logger.warning(
            "a batch of %d inputs with %d tokens ran out of memory on %s; trying it in halves",
            *told,
        )
        self._metrics.out_of_memory.inc()
        too_large = [running]
        alone = 0
        while too_large:
            batch = too_large.pop()
            if len(batch.batch) == 1:
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
                if again is not None and not await self._settled(again):
                    too_large.append(again)
        if alone:
            self._metrics.failed_batches.inc()
            logger.error("%d inputs found no memory on %s, each alone", alone, self.info.name)

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
        logger.exception("a batch of %d inputs failed on %s", len(entries), self.info.name)
        self._fail(entries, kind, message)

    def _deliver(self, running: _Running, vectors: NDArray[np.float32]) -> None:
        entries, batch = running.entries, running.batch
        self._measure(running, time.perf_counter() - running.started)
        try:
            finite = finite_rows(vectors, (len(batch), self._backend.dims))
        except ValueError as error:
            self._metrics.failed_batches.inc()
            logger.error("%s gave %s", self.info.name, error)
            message = "The model gave an answer of the wrong shape or kind for this request."
            self._fail(entries, InferenceFailed, message)
            return
        if not all(finite):
            self._metrics.failed_batches.inc()
            logger.error("%s gave values that are not finite", self.info.name)
            told = zip(entries, running.rows, strict=True)
            broken = [entry for entry, row in told if not finite[row]]
            message = "The model gave values that are not finite for this request."
            self._fail(broken, InferenceFailed, message)
        for entry, row in zip(entries, running.rows, strict=True):
            if finite[row]:
                _request_of(entry).deliver(entry.places, vectors[row])
        for request in {_request_of(entry) for entry in entries}:
            self._metrics.queue_duration.observe(running.started - request.arrived)

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

    def _loop_ended(self, task: asyncio.Task[None]) -> None:
        """Nothing may wait for a loop that is gone, and readiness must say so."""
        failure = None if task.cancelled() else task.exception()
        self._failure = failure or asyncio.CancelledError()
        if failure is not None:
            logger.critical("the batch loop of %s died", self.info.name, exc_info=failure)
        for request in self._pending:
            request.fail(NotReady(f"The model {self.info.name!r} has stopped."))


async def _inline_or_thread(work: Callable[[], NDArray[Any]], *, small: bool) -> NDArray[Any]:
    return work() if small else await asyncio.to_thread(work)


def _request_of(entry: Entry) -> _Request:
    assert isinstance(entry.request, _Request)
    return entry.request


def _stages_of(entries: Sequence[Entry]) -> set[Stages]:
    """Of each request that is traced and has one of ``entries``."""
    return {stages for entry in entries if (stages := _request_of(entry).stages) is not None}
