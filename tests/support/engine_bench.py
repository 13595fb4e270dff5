# SPDX-License-Identifier: MIT OR Apache-2.0
"""An engine with fakes around it, which a test moves step by step."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedding_server.engine.batch import Batch, Encoding, Entry
from embedding_server.engine.cores import Cores
from embedding_server.engine.engine import Embeddings, Engine, Limits
from embedding_server.engine.info import ModelInfo
from embedding_server.engine.parameters import EmbedParams
from embedding_server.engine.scheduler import Scheduler
from embedding_server.engine.tokenizer import Tokenizer
from embedding_server.errors import ContextLengthExceeded
from embedding_server.telemetry import Telemetry

MODEL = "fake"
RAISES, NAN, INFINITE, LARGE, HUGE = 901, 902, 903, 904, 905
"""Tokens that make the fake backend fail; memory runs out for LARGE unless it is alone."""
UNSCALED = EmbedParams(normalize=False)


class FakeTokenizer:
    """One token a word, and the word is its number: ``"7 8"`` is ``[7, 8]``; at most 50."""

    def __init__(self) -> None:
        self.max_tokens = 50
        self.prompts: list[str] = []
        self.threads: list[threading.Thread] = []
        self.busy = threading.Event()
        self.hold = threading.Event()
        self.hold.set()

    def encode(
        self, inputs: Sequence[str], *, prompt: str = "", truncate: bool = True
    ) -> list[Encoding]:
        self.prompts.append(prompt)
        self.threads.append(threading.current_thread())
        if len(inputs[0]) > 1000:
            self.busy.set()
            assert self.hold.wait(20)
        encodings = []
        for index, text in enumerate(inputs):
            ids = [int(word) for word in text.split()]
            if len(ids) > self.max_tokens and not truncate:
                raise ContextLengthExceeded("is too long", param="input", index=index)
            encodings.append(Encoding(tuple(ids[: self.max_tokens]), len(ids)))
        return encodings

    def encode_in_steps(
        self, inputs: Sequence[str], *, prompt: str = "", truncate: bool = True
    ) -> Iterator[bool | list[Encoding]]:
        yield self.encode(inputs, prompt=prompt, truncate=truncate)


class FakeBackend:
    """A sequence's vector is its length, its sum, its first and its last token."""

    dims = 4

    def __init__(self, *, padded: bool = False, exclusive: bool = False) -> None:
        self.padded = padded
        self.exclusive = exclusive
        self.wide: list[bool] = []
        self.batches: list[list[list[int]]] = []
        self.seconds = 0.0
        self.extra_rows = 0
        self.answer: Callable[[NDArray[np.float32]], Any] | None = None

    def embed(self, batch: Batch, *, wide: bool = False) -> NDArray[np.float32]:
        sequences = [part.tolist() for part in np.split(batch.input_ids, batch.cu_seqlens[1:-1])]
        self.batches.append(sequences)
        self.wide.append(wide)
        time.sleep(self.seconds)
        if any(RAISES in sequence for sequence in sequences):
            raise RuntimeError("secret detail of the backend")
        alone = len(sequences) == 1
        if any(HUGE in s or (LARGE in s and not alone) for s in sequences):
            raise MemoryError
        vectors = np.array([vector_of(s) for s in sequences], dtype=np.float32)
        for row, sequence in enumerate(sequences):
            if NAN in sequence:
                vectors[row, 1] = np.nan
            if INFINITE in sequence:
                vectors[row, 3] = np.inf
        if self.answer is not None:
            return self.answer(vectors)  # type: ignore[no-any-return]
        return np.concatenate([vectors, np.zeros((self.extra_rows, self.dims), np.float32)])


class FakeExecutor(Executor):
    """Runs each batch at once, or, while ``held``, one for each call of ``step``."""

    def __init__(self) -> None:
        self.held = False
        self._waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._waiting.append((future, lambda: fn(*args, **kwargs)))
        if not self.held:
            self.step()
        return future

    def step(self) -> None:
        future, work = self._waiting.popleft()
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)


class MortalScheduler(Scheduler):
    """Raises once ``dying`` is set, which ends the batch loop."""

    dying = False

    def next_batch(self, *, cores: int = 1) -> list[Entry]:
        if self.dying:
            raise ZeroDivisionError("the loop dies")
        return super().next_batch(cores=cores)


@dataclass
class Bench:
    """An engine and the fakes around it."""

    max_batch_tokens: int = 100
    max_concurrent_requests: int = 1000
    max_queued_tokens: int = 100_000
    max_request_tokens: int = 100_000
    padded: bool = False
    exclusive: bool = False
    core_count: int = 1
    timeout: float | None = None
    real_threads: bool = False
    tokenizing_threads: int = 2
    info: ModelInfo = field(default_factory=lambda: model_info())
    real_tokenizer: Tokenizer | None = None

    def __post_init__(self) -> None:
        self.telemetry = Telemetry()
        self.tokenizer = FakeTokenizer()
        self.backend = FakeBackend(padded=self.padded, exclusive=self.exclusive)
        self.executor = FakeExecutor()
        executor = None if self.real_threads else self.executor
        self.cores = Cores(self.core_count, timeout=self.timeout, executor=executor)
        self.tokenizing = ThreadPoolExecutor(self.tokenizing_threads)
        self.tokenizing_large = ThreadPoolExecutor(1)
        self.scheduler = MortalScheduler(max_batch_tokens=self.max_batch_tokens, padded=self.padded)
        self.engine = Engine(
            self.info,
            self.real_tokenizer or self.tokenizer,  # type: ignore[arg-type]
            self.backend,
            scheduler=self.scheduler,
            limits=Limits(
                self.max_concurrent_requests, self.max_queued_tokens, self.max_request_tokens
            ),
            cores=self.cores,
            tokenizing=self.tokenizing,
            tokenizing_large=self.tokenizing_large,
            metrics=self.telemetry.for_model(MODEL),
        )

    @property
    def batch_sizes(self) -> list[int]:
        """Of all batches that the backend has computed."""
        return [len(batch) for batch in self.backend.batches]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        self.engine.start()
        try:
            yield
        finally:
            await self.engine.close()
            self.tokenizing.shutdown()
            self.tokenizing_large.shutdown()
            if self.real_threads:
                self.cores.close()

    def send(self, *texts: str, params: EmbedParams = UNSCALED) -> asyncio.Task[Embeddings]:
        return asyncio.create_task(self.engine.embed(texts, params))

    def metric(self, name: str, **labels: str) -> float:
        value = self.telemetry.registry.get_sample_value(
            f"embedding_server_{name}", {"model": MODEL, **labels}
        )
        assert value is not None, name
        return value


def model_info(**fields: Any) -> ModelInfo:
    return ModelInfo(
        name=MODEL, architecture="fake", dims=4, max_tokens=50, pooling="mean", **fields
    )


def vector_of(sequence: Sequence[int]) -> list[int]:
    return [len(sequence), sum(sequence), sequence[0], sequence[-1]]


def expected(*texts: str) -> list[list[int]]:
    return [vector_of([int(word) for word in text.split()]) for text in texts]


async def settle() -> None:
    """Let all that can run now run."""
    for _ in range(50):
        await asyncio.sleep(0)


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


def run_on(bench: Bench, scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """``scenario`` with the bench's engine running."""

    async def whole() -> None:
        async with bench.running():
            await scenario()

    run(whole())


async def until_queued(bench: Bench) -> None:
    """Wait for a request that is tokenised in a thread."""
    while not bench.scheduler.tokens:  # noqa: ASYNC110 - there is no event to wait for
        await asyncio.sleep(0.001)
