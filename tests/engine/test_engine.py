# SPDX-License-Identifier: MIT OR Apache-2.0
"""The engine with fakes around it: batching, failure, admission and the end, step by step."""

from __future__ import annotations

import asyncio
import logging
import re
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from embedding_server.engine.batch import Batch, Encoding, Entry
from embedding_server.engine.cores import Cores
from embedding_server.engine.engine import Embeddings, Engine, Limits
from embedding_server.engine.info import ModelInfo
from embedding_server.engine.parameters import EmbedParams
from embedding_server.engine.postprocess import normalize
from embedding_server.engine.scheduler import Scheduler
from embedding_server.errors import (
    ContextLengthExceeded,
    InferenceFailed,
    InferenceTimedOut,
    InvalidRequest,
    NotReady,
    OutOfMemory,
    Overloaded,
)
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
    ) -> Iterator[list[Encoding] | None]:
        yield self.encode(inputs, prompt=prompt, truncate=truncate)


class FakeBackend:
    """A sequence's vector is its length, its sum, its first and its last token."""

    dims = 4

    def __init__(self, *, padded: bool = False) -> None:
        self.padded = padded
        self.exclusive = padded
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
    """Dies when told to, and takes the batch loop with it."""

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
    core_count: int = 1
    timeout: float | None = None
    real_threads: bool = False
    info: ModelInfo = field(default_factory=lambda: model_info())

    def __post_init__(self) -> None:
        self.telemetry = Telemetry()
        self.tokenizer = FakeTokenizer()
        self.backend = FakeBackend(padded=self.padded)
        self.executor = FakeExecutor()
        executor = None if self.real_threads else self.executor
        self.cores = Cores(self.core_count, timeout=self.timeout, executor=executor)
        self.tokenizing = ThreadPoolExecutor(2)
        self.scheduler = MortalScheduler(max_batch_tokens=self.max_batch_tokens, padded=self.padded)
        self.engine = Engine(
            self.info,
            self.tokenizer,  # type: ignore[arg-type]
            self.backend,
            scheduler=self.scheduler,
            limits=Limits(
                self.max_concurrent_requests, self.max_queued_tokens, self.max_request_tokens
            ),
            cores=self.cores,
            tokenizing=self.tokenizing,
            metrics=self.telemetry.for_model(MODEL),
        )

    @property
    def batch_sizes(self) -> list[int]:
        """Of all batches that the backend was asked for."""
        return [len(batch) for batch in self.backend.batches]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        self.engine.start()
        try:
            yield
        finally:
            await self.engine.close()
            self.tokenizing.shutdown()
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


# -------------------------------------------------------------------------------------- batching


def test_vectors_come_in_the_order_of_the_inputs() -> None:
    bench = Bench(max_batch_tokens=6)
    texts = ["1", "2 3 4 5", "6 7", "8 9 10 11 12", "13"]

    async def scenario() -> None:
        answer = await bench.send(*texts)
        assert answer.vectors.tolist() == expected(*texts)
        assert (answer.dimensions, answer.tokens, answer.truncated) == (4, 13, 0)
        assert len(bench.backend.batches) > 1

    run_on(bench, scenario)


def test_requests_that_wait_share_the_next_batch() -> None:
    bench = Bench()

    async def scenario() -> None:
        bench.executor.held = True
        first = bench.send("1")
        await settle()
        others = [bench.send(f"{number} {number}") for number in (2, 3, 4)]
        await settle()
        bench.executor.step()
        await settle()
        bench.executor.step()
        answers = await asyncio.gather(first, *others)
        assert bench.backend.batches == [[[1]], [[2, 2], [3, 3], [4, 4]]]
        assert [answer.vectors.tolist() for answer in answers[1:]] == [
            expected(text) for text in ("2 2", "3 3", "4 4")
        ]

    run_on(bench, scenario)


def test_an_idle_engine_starts_at_once() -> None:
    """No timer: the first request is in the executor before anything else can happen."""
    bench = Bench()

    async def scenario() -> None:
        for number in range(3):
            await bench.send(f"{number}")
        assert bench.backend.batches == [[[0]], [[1]], [[2]]]

    run_on(bench, scenario)


def test_many_requests_get_their_own_vectors() -> None:
    bench = Bench(max_batch_tokens=37)
    random = np.random.default_rng(5)

    async def scenario() -> None:
        requests = [
            [
                " ".join(map(str, random.integers(0, 900, random.integers(1, 30))))
                for _ in range(random.integers(1, 12))
            ]
            for _ in range(60)
        ]
        answers = await asyncio.gather(*(bench.send(*texts) for texts in requests))
        for texts, answer in zip(requests, answers, strict=True):
            assert answer.vectors.tolist() == expected(*texts)
        assert bench.scheduler.tokens == 0

    run_on(bench, scenario)


def test_a_query_passes_a_large_job() -> None:
    bench = Bench(max_batch_tokens=100)

    async def scenario() -> None:
        bench.executor.held = True
        job = bench.send(*[f"{number} " + "5 " * 39 for number in range(500)])
        while not bench.scheduler.tokens:  # noqa: ASYNC110 - it is tokenised in a thread
            await asyncio.sleep(0.001)
        await settle()
        query = bench.send("1 2")
        await settle()
        bench.executor.step()
        await settle()
        bench.executor.step()
        await settle()
        assert query.done()
        assert not job.done()
        job.cancel()

    run_on(bench, scenario)


# ------------------------------------------------------------------------------- cores, equals


def test_as_many_batches_at_a_time_as_there_are_cores() -> None:
    bench = Bench(max_batch_tokens=2, core_count=3)

    async def scenario() -> None:
        bench.executor.held = True
        tasks = [bench.send(f"{number} {number}") for number in range(5)]
        await settle()
        assert bench.cores.free == 0
        for _ in range(3):
            bench.executor.step()
        with pytest.raises(IndexError):
            bench.executor.step()  # the other two wait for a core
        await settle()
        for _ in range(2):
            bench.executor.step()
        answers = await asyncio.gather(*tasks)
        for number, answer in enumerate(answers):
            assert answer.vectors.tolist() == expected(f"{number} {number}")
        assert bench.cores.free == 3

    run_on(bench, scenario)


def test_idle_cores_share_what_waits() -> None:
    bench = Bench(max_batch_tokens=100, core_count=2)
    texts = [f"{number} " + "7 " * 19 for number in range(4)]

    async def scenario() -> None:
        answer = await bench.send(*texts)
        assert answer.vectors.tolist() == expected(*texts)
        assert [len(batch) for batch in bench.backend.batches] == [2, 2]
        bench.backend.batches.clear()
        await bench.send("1", "2")
        assert len(bench.backend.batches) == 1, "too short to be worth dividing"

    run_on(bench, scenario)


def test_a_long_input_alone_has_all_cores() -> None:
    bench = Bench(core_count=4)
    bench.tokenizer.max_tokens = 500

    async def scenario() -> None:
        await bench.send("5 " * 200)
        await bench.send("5 " * 10)
        await bench.send("5 " * 200, "6 " * 200)
        assert bench.backend.wide == [True, False, False, False]
        bench.executor.held = True
        tasks = [bench.send("5 " * 200)]
        await settle()
        assert bench.cores.free == 0
        tasks.append(bench.send("6 " * 200))
        await settle()
        bench.executor.step()
        await settle()
        bench.executor.step()
        await asyncio.gather(*tasks)
        assert bench.backend.wide[4:] == [True, True]
        assert bench.cores.free == 4

    run_on(bench, scenario)


def test_an_exclusive_backend_has_one_batch_at_a_time() -> None:
    bench = Bench(max_batch_tokens=2, core_count=3)
    bench.backend.exclusive = True

    async def scenario() -> None:
        bench.executor.held = True
        tasks = [bench.send("1 1"), bench.send("2 2")]
        await settle()
        bench.executor.step()
        with pytest.raises(IndexError):
            bench.executor.step()
        await settle()
        bench.executor.step()
        await asyncio.gather(*tasks)
        assert bench.cores.free == 3

    run_on(bench, scenario)


def test_equal_inputs_are_computed_once() -> None:
    """Of one request, and of requests that share a batch."""
    bench = Bench()

    async def scenario() -> None:
        answer = await bench.send("1 2", "3", "1 2", "1 2", "3")
        assert answer.vectors.tolist() == expected("1 2", "3", "1 2", "1 2", "3")
        assert answer.tokens == 8
        assert bench.backend.batches == [[[3], [1, 2]]]
        bench.executor.held = True
        tasks = [bench.send("9")]
        await settle()
        tasks += [bench.send("7", "8"), bench.send("8"), bench.send("8")]
        await settle()
        for _ in range(2):
            bench.executor.step()
            await settle()
        answers = await asyncio.gather(*tasks)
        assert [a.vectors.tolist() for a in answers[1:]] == [
            expected("7", "8"),
            expected("8"),
            expected("8"),
        ]
        assert bench.backend.batches[2:] == [[[7], [8]]]

    run_on(bench, scenario)


def test_equal_inputs_of_a_failed_batch_all_fail() -> None:
    bench = Bench()

    async def scenario() -> None:
        bench.executor.held = True
        tasks = [bench.send("9")]
        await settle()
        tasks += [bench.send(f"{NAN}"), bench.send(f"{NAN}"), bench.send("8")]
        await settle()
        bench.executor.step()
        await settle()
        bench.executor.held = False
        bench.executor.step()
        for task in tasks[1:3]:
            with pytest.raises(InferenceFailed):
                await task
        assert (await tasks[3]).vectors.tolist() == expected("8")

    run_on(bench, scenario)


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


def test_a_batch_that_cannot_be_begun_fails_its_own_requests_only() -> None:
    bench = Bench(core_count=2)

    async def scenario() -> None:
        submit = bench.executor.submit

        def refuse(*arguments: Any, **options: Any) -> Any:
            bench.executor.submit = submit  # type: ignore[method-assign]
            raise RuntimeError("can't start new thread")

        bench.executor.submit = refuse  # type: ignore[method-assign]
        with pytest.raises(InferenceFailed):
            await bench.send("1 " * 30)
        assert bench.cores.free == 2
        assert (await bench.send("2")).vectors.tolist() == expected("2")
        assert bench.engine.ready

    run_on(bench, scenario)


def test_cores_are_lent_in_turn_and_given_back_by_those_who_stop_waiting() -> None:
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
        assert cores.free == 0, "nobody passes the one who waits for two"
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


# --------------------------------------------------------------------------------------- failure


def test_what_raises_fails_alone(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(max_batch_tokens=4)

    async def scenario() -> None:
        bench.executor.held = True
        before = bench.send("1 1")
        await settle()
        broken = bench.send(f"{RAISES} 2")
        neighbour = bench.send("3 3")
        after = bench.send("4 4")
        for _ in range(5):  # two of them the halves of the batch that raises
            await settle()
            bench.executor.step()
        with pytest.raises(InferenceFailed) as caught:
            await broken
        assert "secret" not in str(caught.value)
        assert (await before).vectors.tolist() == expected("1 1")
        assert (await neighbour).vectors.tolist() == expected("3 3")
        assert (await after).vectors.tolist() == expected("4 4")
        assert bench.engine.ready
        assert bench.metric("failed_batches_total") == 1

    run_on(bench, scenario)
    (record,) = (record for record in caplog.records if record.levelno == logging.ERROR)
    assert "secret detail" in str(record.exc_info)


def test_what_a_failed_request_still_has_in_the_queue_is_dropped() -> None:
    bench = Bench(max_batch_tokens=2)

    async def scenario() -> None:
        bench.executor.held = True
        task = bench.send(f"{RAISES} 1", "2 2", "3 3", "4 4")
        await settle()
        bench.executor.step()
        with pytest.raises(InferenceFailed):
            await task
        assert bench.scheduler.tokens == 0
        assert bench.metric("queue_tokens") == 0
        bench.executor.held = False
        await bench.send("5")
        assert bench.backend.batches == [[[RAISES, 1]], [[5]]]

    run_on(bench, scenario)


@pytest.mark.parametrize("token", [NAN, INFINITE], ids=["nan", "infinite"])
def test_values_that_are_not_finite_fail_their_request_only(token: int) -> None:
    bench = Bench()

    async def scenario() -> None:
        bench.executor.held = True
        first = bench.send("1")
        await settle()
        broken = bench.send("2 2", f"{token} 2")
        neighbour = bench.send("3 3")
        await settle()
        bench.executor.step()
        await settle()
        bench.executor.held = False
        bench.executor.step()
        with pytest.raises(InferenceFailed, match="not finite"):
            await broken
        assert (await first).vectors.tolist() == expected("1")
        assert (await neighbour).vectors.tolist() == expected("3 3")
        assert bench.batch_sizes[:2] == [1, 3]
        assert bench.metric("failed_batches_total") == 1

    run_on(bench, scenario)


def test_an_answer_of_the_wrong_shape_fails_its_batch() -> None:
    bench = Bench()

    async def scenario() -> None:
        bench.backend.extra_rows = 1
        with pytest.raises(InferenceFailed, match="wrong shape"):
            await bench.send("1", "2")
        bench.backend.extra_rows = 0
        assert (await bench.send("3")).vectors.tolist() == expected("3")
        assert bench.metric("failed_batches_total") == 1

    run_on(bench, scenario)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        pytest.param(lambda vectors: None, "NoneType instead of an array", id="none"),
        pytest.param(lambda vectors: vectors.tolist(), "list instead of an array", id="list"),
        pytest.param(lambda vectors: vectors.astype(np.float64), "float64 instead", id="float64"),
        pytest.param(lambda vectors: vectors.astype(object), "object instead", id="objects"),
        pytest.param(lambda vectors: vectors[:, :3], r"shape \(1, 3\)", id="narrow"),
        pytest.param(lambda vectors: vectors[0], r"shape \(4,\)", id="flat"),
        pytest.param(lambda vectors: vectors[:0], r"shape \(0, 4\)", id="nothing"),
    ],
)
def test_no_answer_ends_the_batch_loop(
    answer: Callable[[NDArray[np.float32]], Any], told: str, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench()

    async def scenario() -> None:
        bench.backend.answer = answer
        for _ in range(2):
            with pytest.raises(InferenceFailed, match="wrong shape or kind"):
                await bench.send("1")
        bench.backend.answer = None
        assert (await bench.send("3")).vectors.tolist() == expected("3")
        assert bench.metric("failed_batches_total") == 2

    run_on(bench, scenario)
    assert re.search(told, caplog.text)


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt(), StopIteration()], ids=repr)
def test_no_exception_ends_the_batch_loop(error: BaseException) -> None:
    """As they come out of a thread."""
    bench = Bench(real_threads=True)

    def refuse(vectors: NDArray[np.float32]) -> Any:
        raise error

    async def scenario() -> None:
        bench.backend.answer = refuse
        with pytest.raises(InferenceFailed):
            await bench.send("1")
        bench.backend.answer = None
        assert (await bench.send("3")).vectors.tolist() == expected("3")

    run_on(bench, scenario)


# ---------------------------------------------------------------------------------------- memory


def test_a_batch_without_memory_is_halved_down_to_one_input(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bench = Bench()
    texts = [*(f"{number} 7" for number in range(6)), f"6 {LARGE}", "8 7"]

    async def scenario() -> None:
        answer = await bench.send(*texts)
        assert answer.vectors.tolist() == expected(*texts)
        assert bench.batch_sizes == [8, 4, 4, 2, 2, 1, 1]
        assert bench.cores.free == 1
        assert bench.metric("out_of_memory_total") == 1
        assert bench.metric("failed_batches_total") == 0

    run_on(bench, scenario)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_an_input_that_is_too_large_alone_fails_its_request_only(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bench = Bench(core_count=2)

    async def scenario() -> None:
        bench.executor.held = True
        tasks = [bench.send("9"), bench.send("8")]
        await settle()
        good = [bench.send(f"{number} 7") for number in range(5)]
        bad = [bench.send(f"{HUGE} 7", "1 2"), bench.send(f"{HUGE} 7"), bench.send(f"8 {HUGE}")]
        await settle()
        bench.executor.held = False
        bench.executor.step()
        bench.executor.step()
        for number, task in enumerate(good):
            assert (await task).vectors.tolist() == expected(f"{number} 7")
        for task in bad:
            with pytest.raises(OutOfMemory, match="2 tokens, even alone"):
                await task
        await asyncio.gather(*tasks)
        assert bench.engine.ready
        assert bench.cores.free == 2
        assert bench.scheduler.tokens == 0

    run_on(bench, scenario)
    events = bench.metric("out_of_memory_total")
    levels = [record.levelname for record in caplog.records]
    assert 1 <= events <= 2
    assert levels.count("WARNING") == events
    assert levels.count("ERROR") <= events
    assert bench.metric("failed_batches_total") == levels.count("ERROR")


def test_what_nobody_wants_any_more_is_not_tried_again() -> None:
    bench = Bench()

    async def scenario() -> None:
        bench.executor.held = True
        first = bench.send("9")
        await settle()
        unwanted, wanted = bench.send(f"1 {LARGE}", f"2 {LARGE}"), bench.send("3 3", "4 4")
        await settle()
        bench.executor.step()
        await settle()
        unwanted.cancel()
        await settle()
        bench.executor.held = False
        bench.executor.step()
        assert (await wanted).vectors.tolist() == expected("3 3", "4 4")
        await first
        retried = [sequence for batch in bench.backend.batches[2:] for sequence in batch]
        assert sorted(retried) == [[3, 3], [4, 4]]
        bench.executor.held = True
        last = bench.send(f"5 {LARGE}", f"6 {LARGE}")
        await settle()
        last.cancel()
        await settle()
        bench.executor.step()
        await settle()
        assert bench.cores.free == 1

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


# ----------------------------------------------------------------------------------------- hangs


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
def test_nothing_waits_for_cores_that_hang(exclusive: bool) -> None:
    bench = Bench(core_count=2, timeout=0.05, max_batch_tokens=2)
    bench.backend.exclusive = exclusive

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


class Nameless(str):
    """Can't be put into a message."""

    def __format__(self, _: str) -> str:
        raise ZeroDivisionError("no name")


def test_a_look_that_fails_is_not_the_last() -> None:
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


def test_who_needs_all_cores_does_not_keep_others_from_what_is_left() -> None:
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


def test_the_end_does_not_wait_for_a_thread_that_hangs() -> None:
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


def test_the_end_waits_for_work_that_ends() -> None:
    async def scenario() -> None:
        cores = Cores(1, timeout=60)
        await cores.acquire(1)
        result = cores.run(lambda: time.sleep(0.2), 1, owner=MODEL)
        cores.close()
        assert not cores.stuck
        await result

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


# ----------------------------------------------------------------------------------- start, close


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


# ----------------------------------------------------------------------------------- cancellation


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


# -------------------------------------------------------------------------------------- admission


def test_max_concurrent_requests() -> None:
    bench = Bench(max_concurrent_requests=2)

    async def scenario() -> None:
        bench.executor.held = True
        tasks = [bench.send("1"), bench.send("2")]
        await settle()
        with pytest.raises(Overloaded, match="2 requests") as caught:
            await bench.send("3")
        assert caught.value.retry_after >= 1
        bench.executor.held = False
        bench.executor.step()
        await asyncio.gather(*tasks)
        assert (await bench.send("3")).vectors.tolist() == expected("3")

    run_on(bench, scenario)


@pytest.mark.parametrize(
    ("text", "params", "error"),
    [
        pytest.param("5 " * 60, EmbedParams(truncate=False), ContextLengthExceeded, id="too-long"),
        pytest.param(f"{RAISES}", UNSCALED, InferenceFailed, id="failed"),
        pytest.param("1", EmbedParams(dimensions=2), InvalidRequest, id="invalid"),
    ],
)
def test_a_request_that_fails_frees_its_place(
    text: str, params: EmbedParams, error: type[Exception]
) -> None:
    bench = Bench(max_concurrent_requests=1)

    async def scenario() -> None:
        for _ in range(3):
            with pytest.raises(error):
                await bench.send(text, params=params)
        assert (await bench.send("1")).vectors.tolist() == expected("1")
        assert bench.metric("queue_requests") == 0

    run_on(bench, scenario)


def test_max_queued_tokens_takes_a_whole_request_or_nothing() -> None:
    bench = Bench(max_batch_tokens=2, max_queued_tokens=10)

    async def scenario() -> None:
        bench.executor.held = True
        tasks = [bench.send("1 1")]
        await settle()
        tasks.append(bench.send("2 2 2", "2 2 5"))
        await settle()
        with pytest.raises(Overloaded, match="6 tokens are waiting"):
            await bench.send("3 1", "3 2", "3 3", "3 4")
        assert bench.scheduler.tokens == 6
        tasks.append(bench.send("4", "5", "6", "7"))
        await settle()
        assert bench.scheduler.tokens == 10
        bench.executor.held = False
        bench.executor.step()
        await asyncio.gather(*tasks)
        assert [3, 1] not in [sequence for batch in bench.backend.batches for sequence in batch]

    run_on(bench, scenario)


def test_a_request_larger_than_the_queue_is_taken_when_it_is_empty() -> None:
    bench = Bench(max_queued_tokens=10)

    async def scenario() -> None:
        texts = ["7 7 7"] * 8
        assert (await bench.send(*texts)).vectors.tolist() == expected(*texts)

    run_on(bench, scenario)


def test_max_request_tokens() -> None:
    bench = Bench(max_request_tokens=10)

    async def scenario() -> None:
        await bench.send("1 " * 5, "2 " * 5)
        with pytest.raises(InvalidRequest, match="11 tokens in 2 inputs; at most 10") as caught:
            await bench.send("1 " * 5, "2 " * 6)
        assert (caught.value.param, caught.value.code) == ("input", "request_too_large")

    run_on(bench, scenario)


def test_retry_after_is_what_waits_over_measured_throughput() -> None:
    bench = Bench(max_batch_tokens=10, max_queued_tokens=500)

    async def scenario() -> None:
        bench.backend.seconds = 0.02
        await bench.send("1 " * 10)
        bench.executor.held = True
        tasks = [bench.send("1")]
        await settle()
        waits = []
        for _ in range(2):
            tasks.append(bench.send(*[f"{number} " + "2 " * 49 for number in range(5)]))
            await settle()
            with pytest.raises(Overloaded) as caught:
                await bench.send(*[f"{number} " + "3 " * 49 for number in range(6)])
            waits.append(caught.value.retry_after)
            bench.backend.seconds = 0
        # 10 tokens took 0.02 s or, on a busy machine, more.
        assert waits[0] >= 250 * 0.02 / 10 - 1e-9
        assert waits[1] >= 1
        assert waits[1] == pytest.approx(max(1, 500 * waits[0] / 250), rel=0.5)
        for task in tasks:
            task.cancel()

    run_on(bench, scenario)


@pytest.mark.parametrize("core_count", [1, 2, 4])
def test_retry_after_counts_cores_and_outlasts_idle_time(core_count: int) -> None:
    bench = Bench(max_queued_tokens=1000, core_count=core_count, real_threads=True)
    hold = threading.Event()

    def wait(vectors: NDArray[np.float32]) -> Any:
        assert hold.wait(20)
        return vectors

    async def scenario() -> None:
        bench.backend.seconds = 0.1
        for number in range(4):  # one at a time: the other cores are idle
            await bench.send("1 " * 9 + str(number))
        seconds, tokens = bench.metric("inference_duration_seconds_sum"), 40
        bench.backend.seconds, bench.backend.answer = 0, wait
        tasks = [bench.send("2 " * 49 + str(number)) for number in range(core_count)]
        await settle()
        tasks.append(bench.send(*("3 " * 49 + str(number) for number in range(20))))
        await settle()
        with pytest.raises(Overloaded, match="1000 tokens are waiting") as caught:
            await bench.send("4")
        # The latest batches count most, and a busy machine makes them differ.
        measured = 1000 * seconds / tokens / core_count
        assert caught.value.retry_after == pytest.approx(measured, rel=0.3)
        hold.set()
        await asyncio.gather(*tasks)

    run_on(bench, scenario)


def test_retry_after_counts_models_that_wait_for_the_same_cores() -> None:
    bench = Bench(max_queued_tokens=500)

    async def scenario() -> None:
        bench.backend.seconds = 0.1
        await bench.send("1 " * 10)
        bench.executor.held = True
        tasks: list[asyncio.Task[Any]] = [bench.send("1")]
        await settle()
        tasks.append(bench.send(*[f"{number} " + "2 " * 49 for number in range(10)]))
        await settle()
        waits = []
        for _ in range(2):
            with pytest.raises(Overloaded) as caught:
                await bench.send("3")
            waits.append(caught.value.retry_after)
            tasks.append(asyncio.create_task(bench.cores.acquire(1)))  # another model
            await settle()
        assert waits[1] == pytest.approx(2 * waits[0])
        for task in tasks:
            task.cancel()

    run_on(bench, scenario)


def test_retry_after_is_never_longer_than_clients_heed() -> None:
    bench = Bench(max_queued_tokens=500)

    async def scenario() -> None:
        bench.backend.seconds = 0.2
        await bench.send("1")  # at which rate 500 tokens take 100 s
        bench.executor.held = True
        tasks = [bench.send("1")]
        await settle()
        tasks.append(bench.send(*[f"{number} " + "2 " * 49 for number in range(10)]))
        await settle()
        with pytest.raises(Overloaded) as caught:
            await bench.send("3")
        assert caught.value.retry_after == 60
        for task in tasks:
            task.cancel()

    run_on(bench, scenario)


# ---------------------------------------------------------------------------------- event loop


def test_what_still_waits_to_be_tokenised_is_dropped_when_it_is_cancelled() -> None:
    bench = Bench()

    async def scenario() -> None:
        bench.tokenizer.hold.clear()
        tasks = [bench.send(f"{number} " * 3000) for number in range(5)]
        await asyncio.to_thread(bench.tokenizer.busy.wait, 20)
        for task in tasks:
            task.cancel()
        await settle()
        assert bench.metric("queue_requests") == 0
        bench.tokenizer.hold.set()
        assert (await bench.send("1")).vectors.tolist() == expected("1")
        assert len(bench.tokenizer.threads) <= 2 + 1, "those that had begun, and the last"
        assert bench.backend.batches == [[[1]]]

    run_on(bench, scenario)


def test_long_texts_are_tokenised_off_the_loop() -> None:
    bench = Bench()

    async def scenario() -> None:
        bench.tokenizer.hold.clear()
        long = bench.send("7 " * 3000)
        await asyncio.to_thread(bench.tokenizer.busy.wait, 20)
        # The long text's tokeniser stands still, and the loop goes on.
        assert (await bench.send("1 2")).vectors.tolist() == expected("1 2")
        assert not long.done()
        bench.tokenizer.hold.set()
        assert (await long).encodings[0].total_tokens == 3000
        off_loop, on_loop = bench.tokenizer.threads
        assert off_loop is not threading.main_thread()
        assert on_loop is threading.main_thread()

    run_on(bench, scenario)


@pytest.mark.parametrize("inputs", [1, 8000, 9000], ids=str)
def test_small_and_large_answers_are_finished_alike(inputs: int) -> None:
    """Beside the loop or in a thread."""
    bench = Bench(max_batch_tokens=100_000)

    async def scenario() -> None:
        texts = [f"{number % 900} 2" for number in range(inputs)]
        answer = await bench.send(*texts, params=EmbedParams())
        assert answer.vectors.shape == (inputs, 4)
        whole = np.array(expected(*texts), dtype=np.float32)
        np.testing.assert_allclose(answer.vectors, normalize(whole), atol=1e-6)

    run_on(bench, scenario)


# --------------------------------------------------------------------------------- the parameters

PROMPTS = {"search_query": "Q: ", "document": "D: ", "odd": "O: "}


@pytest.mark.parametrize(
    ("params", "default", "prompt"),
    [
        pytest.param(EmbedParams(), None, "", id="none"),
        pytest.param(EmbedParams(), "odd", "O: ", id="default"),
        pytest.param(EmbedParams(input_type="query"), None, "Q: ", id="query-is-search_query"),
        pytest.param(EmbedParams(input_type="document"), "odd", "D: ", id="document"),
        pytest.param(EmbedParams(input_type="search_query"), None, "Q: ", id="exact-name"),
        pytest.param(EmbedParams(prompt="P: "), "odd", "P: ", id="own-prompt"),
        pytest.param(EmbedParams(prompt=""), "odd", "", id="empty-prompt-overrides-default"),
    ],
)
def test_which_prompt_is_prepended(params: EmbedParams, default: str | None, prompt: str) -> None:
    bench = Bench(info=model_info(prompts=PROMPTS, default_prompt=default))

    async def scenario() -> None:
        await bench.send("1", params=params)
        assert bench.tokenizer.prompts == [prompt]

    run_on(bench, scenario)


@pytest.mark.parametrize("name", ["query", "document"])
def test_a_model_without_prompts_takes_query_and_document(name: str) -> None:
    bench = Bench()

    async def scenario() -> None:
        await bench.send("1", params=EmbedParams(input_type=name))
        assert bench.tokenizer.prompts == [""]

    run_on(bench, scenario)


@pytest.mark.parametrize(
    ("params", "param", "message"),
    [
        pytest.param(
            EmbedParams(input_type="poem"), "input_type", "has no prompt 'poem'", id="prompt"
        ),
        pytest.param(
            EmbedParams(input_type="query", prompt="x"), "prompt", "not both", id="both-prompts"
        ),
        pytest.param(
            EmbedParams(dimensions=2), "dimensions", "not trained for shorter", id="no-matryoshka"
        ),
    ],
)
def test_what_a_model_cannot_do_is_refused(params: EmbedParams, param: str, message: str) -> None:
    bench = Bench()

    async def scenario() -> None:
        with pytest.raises(InvalidRequest, match=message) as caught:
            await bench.send("1", params=params)
        assert caught.value.param == param
        assert not bench.backend.batches

    run_on(bench, scenario)


@pytest.mark.parametrize("dimensions", [0, -1, 5])
def test_dimensions_outside_are_refused_with_what_is_possible(dimensions: int) -> None:
    bench = Bench(info=model_info(dimensions=(2, 4)))

    async def scenario() -> None:
        with pytest.raises(InvalidRequest, match="from 1 to 4 .* trained for 2, 4"):
            await bench.send("1", params=EmbedParams(dimensions=dimensions))
        answer = await bench.send("1 2", params=EmbedParams(dimensions=2, normalize=False))
        assert answer.vectors.tolist() == [[2, 3]]
        assert answer.dimensions == 2

    run_on(bench, scenario)


def test_a_cut_input_is_told() -> None:
    bench = Bench()

    async def scenario() -> None:
        answer = await bench.send("5 " * 60, "6")
        assert (answer.truncated, answer.tokens) == (1, 51)
        assert [encoding.total_tokens for encoding in answer.encodings] == [60, 1]

    run_on(bench, scenario)


# ---------------------------------------------------------------------------------------- metrics


def test_metrics_move() -> None:
    bench = Bench(max_batch_tokens=9, padded=True)

    async def scenario() -> None:
        await bench.send("5 " * 60)
        await bench.send("1", "2 2", "3 3 3")

    run_on(bench, scenario)
    assert bench.metric("inputs_total") == 4
    assert bench.metric("tokens_total") == 56
    assert bench.metric("truncated_inputs_total") == 1
    assert bench.metric("padding_tokens_total") == 3
    assert bench.metric("failed_batches_total") == 0
    assert bench.metric("queue_tokens") == bench.metric("queue_requests") == 0
    assert bench.metric("tokenize_duration_seconds_count") == 2
    assert bench.metric("queue_duration_seconds_count") == 2
    assert bench.metric("inference_duration_seconds_count") == 2
    assert bench.metric("batch_size_sum") == 4
    assert bench.metric("batch_tokens_sum") == 56
    assert bench.metric("batch_tokens_bucket", le="64.0") == 2


def test_metrics_of_a_packed_backend_count_no_padding() -> None:
    bench = Bench()

    async def scenario() -> None:
        await bench.send("1", "2 2", "3 3 3")

    run_on(bench, scenario)
    assert bench.metric("padding_tokens_total") == 0
