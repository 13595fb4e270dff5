# SPDX-License-Identifier: MIT OR Apache-2.0
"""One model at work: requests in, vectors out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence, Sized
from concurrent.futures import Executor
from dataclasses import dataclass
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
from embedding_server.engine.tokenizer import Input, Tokenizer
from embedding_server.errors import InvalidRequest, NotReady, Overloaded
from embedding_server.telemetry import ModelMetrics

__all__ = ["CHARACTERS_PER_TOKEN", "Embeddings", "Engine", "Limits"]

# Up to here tokenising takes about a millisecond, less than handing it to a thread and the
# noise that adds; past it the event loop would be kept from other requests.
_INLINE_CHARACTERS = 4096

CHARACTERS_PER_TOKEN = 10
"""How many characters a request may have for each token: tokenising takes time by the character,
before tokens can be counted. In most languages a token has some four."""

_INLINE_VALUES = 32 * 1024

# The longest wait that OpenAI's clients heed; a longer one they replace by a second or so.
_MOST_RETRY_AFTER = 60.0


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


class Engine:
    """Admission of requests to one model, tokenising, and what follows the batches.

    ``cores`` and the threads of ``tokenizing`` are shared by all engines of a process. Call
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
        metrics: ModelMetrics,
    ) -> None:
        self.info = info
        self._tokenizer = tokenizer
        self._limits = limits
        self._tokenizing = tokenizing
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
        """Stop the batch loop; whatever still waits fails with NotReady."""
        await self._batches.close()

    async def embed(
        self, inputs: Sequence[Input], params: EmbedParams, stages: Stages | None = None
    ) -> Embeddings:
        """The vectors of ``inputs``: all texts, or all lists of token ids, or none.

        ``stages`` is told what the request passes, and when.
        Raises InvalidRequest for parameters or inputs this model can't take, Overloaded when
        the queue is full, InferenceFailed, OutOfMemory or InferenceTimedOut when its batch failed
        or hangs, NotReady when closed.
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
        allowed = self._limits.max_request_tokens * CHARACTERS_PER_TOKEN
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
        if not encodings:
            return np.empty((0, self.info.dims), dtype=np.float32)
        # Equal inputs are computed once.
        places: dict[Encoding, list[int]] = {}
        for place, encoding in enumerate(encodings):
            places.setdefault(encoding, []).append(place)
        tokens = sum(len(encoding.ids) for encoding in places)
        waiting = self._batches.tokens
        # A request that is larger than the whole queue must have its chance when it is empty.
        if waiting and waiting + tokens > self._limits.max_queued_tokens:
            raise self._overloaded(f"{waiting} tokens are waiting already")
        return await self._batches.compute(places, tokens, stages)

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
        return Overloaded(
            f"The model {self.info.name!r} is at its limit: {what}. Try again later.",
            retry_after=min(max(1.0, self._batches.seconds), _MOST_RETRY_AFTER),
        )


async def _inline_or_thread(work: Callable[[], NDArray[Any]], *, small: bool) -> NDArray[Any]:
    return work() if small else await asyncio.to_thread(work)
