# SPDX-License-Identifier: MIT OR Apache-2.0
"""One running model: requests in, vectors out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence, Sized
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedding_server.engine.backend import Backend
from embedding_server.engine.batch import Encoding
from embedding_server.engine.batch_loop import BatchLoop
from embedding_server.engine.cores import Cores
from embedding_server.engine.info import ModelInfo
from embedding_server.engine.parameters import EmbedParams, check_dimensions, prompt_of
from embedding_server.engine.postprocess import postprocess
from embedding_server.engine.scheduler import Scheduler
from embedding_server.engine.stages import Stages
from embedding_server.engine.token_ids import Input
from embedding_server.engine.tokenizer import Tokenizer
from embedding_server.errors import InvalidRequest, NotReady, Overloaded
from embedding_server.telemetry import ModelMetrics

__all__ = ["CHARACTERS_PER_TOKEN", "Embeddings", "Engine", "Limits"]

# Up to here tokenising takes about a millisecond: less than a thread costs, and no other request
# waits for the event loop any longer.
_INLINE_CHARACTERS = 4096

CHARACTERS_PER_TOKEN = 10
"""How many characters a request may have for each token: tokenising takes time by the character,
before tokens can be counted. In most languages a token has some four."""

_INLINE_VALUES = 32 * 1024

# The longest wait that OpenAI's clients respect; a longer one they replace by a second or so.
_LONGEST_RETRY_AFTER = 60.0


@dataclass(frozen=True, slots=True)
class Limits:
    """How much one engine takes at a time."""

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
        return _count_tokens(self.encodings)

    @property
    def truncated(self) -> int:
        """How many inputs were cut."""
        return sum(encoding.truncated for encoding in self.encodings)


class Engine:
    """Admission of requests to one model, and their way through tokenizer and batches.

    All engines of a process share ``cores`` and the threads that tokenise long inputs: those of
    ``tokenizing``, and the only one of ``tokenizing_large`` for steps that take much memory. Call
    ``start`` in the event loop that will call ``embed``.
    """

    def __init__(
        self,
        info: ModelInfo,
        tokenizer: Tokenizer,
        backend: Backend,
        *,
        scheduler: Scheduler,
        limits: Limits,
        cores: Cores,
        tokenizing: Executor,
        tokenizing_large: Executor,
        metrics: ModelMetrics,
    ) -> None:
        self.info = info
        self._tokenizer = tokenizer
        self._limits = limits
        self._tokenizing = tokenizing
        self._tokenizing_large = tokenizing_large
        self._metrics = metrics
        metrics.queue_requests_limit.set(limits.max_concurrent_requests)
        metrics.queue_tokens_limit.set(limits.max_queued_tokens)
        self._admitted = 0
        self._batches = BatchLoop(
            info.name, backend, scheduler=scheduler, cores=cores, metrics=metrics
        )

    @property
    def ready(self) -> bool:
        """Whether the batch loop is running."""
        return self._batches.running

    def start(self) -> None:
        """Start the batch loop in the running event loop."""
        self._batches.start()

    async def close(self) -> None:
        """Stop the batch loop; all pending requests fail with NotReady."""
        await self._batches.close()

    async def embed(
        self, inputs: Sequence[Input], params: EmbedParams, stages: Stages | None = None
    ) -> Embeddings:
        """The vectors of ``inputs``: all texts, or all lists of token ids, or none.

        ``stages`` gets the time of each stage.
        Raises InvalidRequest for parameters or inputs that this model can't take, Overloaded when
        the queue is full, InferenceFailed, OutOfMemory or InferenceTimedOut when its batch failed
        or is overdue, NotReady when closed.
        """
        if not self.ready:
            raise NotReady(f"The model {self.info.name!r} is not running.")
        self._batches.check_cores()
        check_dimensions(self.info, params.dimensions)
        prompt = prompt_of(self.info, params)
        if self._admitted >= self._limits.max_concurrent_requests:
            raise self._overloaded(f"{self._admitted} requests are being served already")
        self._admitted += 1
        self._metrics.queue_requests.set(self._admitted)
        try:
            encodings = await self._tokenize(inputs, prompt, params.truncate, stages)
            vectors = await self._compute(encodings, stages)
            vectors = await self._postprocess(vectors, params)
        finally:
            self._admitted -= 1
            self._metrics.queue_requests.set(self._admitted)
        answer = Embeddings(vectors, encodings, params.dimensions or self.info.dims)
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
        # The tokenizer refuses an input without a length.
        characters = sum(len(value) for value in inputs if isinstance(value, Sized))
        characters += len(inputs) * len(prompt)
        self._check_size(
            characters,
            "characters",
            len(inputs),
            self._limits.max_request_tokens * CHARACTERS_PER_TOKEN,
        )
        if characters <= _INLINE_CHARACTERS:
            encodings = self._tokenizer.encode(inputs, prompt=prompt, truncate=truncate)
        else:
            encodings = await self._tokenize_in_threads(inputs, prompt, truncate)
        ended = time.perf_counter()
        self._metrics.tokenize_duration.observe(ended - started)
        if stages is not None:
            stages.tokenize_end = ended
        self._check_size(
            _count_tokens(encodings), "tokens", len(inputs), self._limits.max_request_tokens
        )
        return encodings

    async def _tokenize_in_threads(
        self, inputs: Sequence[Input], prompt: str, truncate: bool
    ) -> list[Encoding]:
        """Tokenise in steps, so that long texts take turns, and end when their client hangs up."""
        steps = self._tokenizer.encode_in_steps(inputs, prompt=prompt, truncate=truncate)
        loop = asyncio.get_running_loop()
        step: bool | list[Encoding] = False
        while isinstance(step, bool):  # whether the next step is a large one
            threads = self._tokenizing_large if step else self._tokenizing
            step = await loop.run_in_executor(threads, next, steps)
        return step

    def _check_size(self, count: int, unit: str, inputs: int, limit: int) -> None:
        if count > limit:
            raise InvalidRequest(
                f"The request has {count} {unit} in {inputs} inputs; at most {limit} are taken at "
                "once. Send it in parts.",
                param="input",
                code="request_too_large",
            )

    async def _compute(
        self, encodings: Sequence[Encoding], stages: Stages | None
    ) -> NDArray[np.float32]:
        """Queue every input or none, and wait for their vectors."""
        if not self.ready:
            raise NotReady(f"The model {self.info.name!r} is shutting down.")
        if not encodings:
            return np.empty((0, self.info.dims), dtype=np.float32)
        # Equal inputs are computed once.
        places: dict[Encoding, list[int]] = {}
        for place, encoding in enumerate(encodings):
            places.setdefault(encoding, []).append(place)
        tokens = _count_tokens(places)
        waiting = self._batches.tokens
        # An empty queue takes a request that is larger than its limit.
        if waiting and waiting + tokens > self._limits.max_queued_tokens:
            raise self._overloaded(f"{waiting} tokens are waiting already")
        return await self._batches.compute(places, tokens, stages)

    async def _postprocess(self, vectors: NDArray[np.float32], params: EmbedParams) -> NDArray[Any]:
        work = partial(
            postprocess,
            vectors,
            dimensions=params.dimensions,
            # The authors' layer norm ends in scaling; the unscaled output is the model's own.
            layer_norm_first=self.info.layer_norm and params.normalize,
            scale=params.normalize,
            output_dtype=params.output_dtype,
        )
        return work() if vectors.size <= _INLINE_VALUES else await asyncio.to_thread(work)

    def _overloaded(self, reason: str) -> Overloaded:
        return Overloaded(
            f"The model {self.info.name!r} is at its limit: {reason}. Try again later.",
            retry_after=min(max(1.0, self._batches.seconds), _LONGEST_RETRY_AFTER),
        )


def _count_tokens(encodings: Iterable[Encoding]) -> int:
    return sum(len(encoding.ids) for encoding in encodings)
