# SPDX-License-Identifier: MIT OR Apache-2.0
"""The engine without a server, for scripts and notebooks."""

from __future__ import annotations

import asyncio
import logging
import threading
import weakref
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

from numpy.typing import NDArray

from embedding_server.engine.engine import Embeddings, Engine
from embedding_server.engine.info import ModelInfo
from embedding_server.engine.parameters import EmbedParams, OutputDtype
from embedding_server.engine.token_ids import Input
from embedding_server.errors import ConfigurationError, NotReady
from embedding_server.machine import available_cores
from embedding_server.models.loader import NO_LIMITS, LoadOptions
from embedding_server.models.registry import Registry
from embedding_server.models.spec import parse_spec
from embedding_server.settings import BACKEND_CHOICES, Settings
from embedding_server.telemetry import Telemetry

__all__ = ["Embedder"]

logger = logging.getLogger(__name__)

P = ParamSpec("P")
Result = TypeVar("Result")


class Embedder:
    """One model, ready to embed: ``Embedder("all-MiniLM-L6-v2").embed(["iPhone"])``.

    ``model`` is a value of ``--model``. Several threads may use one Embedder; their texts then
    share batches. Raises ModelError if the model is unavailable or can't run, and
    ConfigurationError for an unknown ``backend`` or a ``revision`` that can't apply. A download
    runs in another process, which environment variables reach (HTTPS_PROXY, SSL_CERT_FILE, HF_*)
    and a client that was set with huggingface_hub's functions doesn't.
    """

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        backend: str = "auto",
        onnx_file: str | None = None,
        threads: int | None = None,
        max_batch_tokens: int | None = None,
        matryoshka: Sequence[int] = (),
        load_models_from: Path | str | None = None,
        hf_token: str | None = None,
    ) -> None:
        if backend not in BACKEND_CHOICES:
            raise ConfigurationError(
                f"There is no backend {backend!r}; there are {', '.join(BACKEND_CHOICES)}."
            )
        spec = parse_spec(model, revision=revision)
        self._registry = Registry(
            [spec],
            LoadOptions(
                backend=backend,
                threads=threads or available_cores(),
                limits=NO_LIMITS,
                onnx_file=onnx_file,
                max_batch_tokens=max_batch_tokens,
                matryoshka={spec.name: tuple(matryoshka)} if matryoshka else {},
            ),
            telemetry=Telemetry(),
            models_dir=Path(load_models_from) if load_models_from else None,
            hf_token=hf_token,
        )
        self._loop = _LoopThread()
        # Closes it, too, when it is garbage, or when the program ends.
        self._end = weakref.finalize(self, self._loop.close, self._registry.close)
        try:
            self._loop.run(self._registry.load)
        except BaseException:
            self._end()
            raise
        self._engine: Engine = next(iter(self._registry))

    @classmethod
    def from_settings(cls, model: str, settings: Settings) -> Self:
        """The embedder of ``model`` as the command line's ``settings`` want it."""
        name = parse_spec(model, revision=settings.revision).name
        if unknown := set(settings.matryoshka) - {name}:
            raise ConfigurationError(
                f"--matryoshka names {', '.join(unknown)}, but the model is {name}."
            )
        return cls(
            model,
            revision=settings.revision,
            backend=settings.backend,
            onnx_file=settings.onnx_file,
            threads=settings.threads,
            max_batch_tokens=settings.max_batch_tokens,
            matryoshka=settings.matryoshka.get(name, ()),
            load_models_from=settings.load_models_from,
            hf_token=settings.hub_token,
        )

    @property
    def info(self) -> ModelInfo:
        """The model's description: ``info.dims``, ``info.max_tokens``, ``info.prompts``."""
        return self._engine.info

    @property
    def folder(self) -> Path:
        """The folder of the model's files."""
        return self._registry.folder(self.info.name)

    def embed(
        self,
        inputs: Sequence[Input],
        *,
        dimensions: int | None = None,
        input_type: str | None = None,
        prompt: str | None = None,
        truncate: bool = True,
        normalize: bool = True,
        output_dtype: OutputDtype = "float",
    ) -> NDArray[Any]:
        """One vector for each text, float32 [len(inputs), dims], in their order.

        The options are those of ``EmbedParams``; a warning is logged if texts were truncated.
        Raises InvalidRequest for inputs or options the model can't take,
        InferenceFailed if it fails on them, NotReady when closed.
        """
        params = EmbedParams(
            dimensions=dimensions,
            input_type=input_type,
            prompt=prompt,
            truncate=truncate,
            normalize=normalize,
            output_dtype=output_dtype,
        )
        if isinstance(inputs, str):
            raise TypeError("embed() takes a list of texts: write embed([text])")
        inputs = list(inputs)
        answer = self.embed_detailed(inputs, params)
        if answer.truncated:
            logger.warning(
                "%d of %d texts were cut to the %d tokens that %s takes",
                *(answer.truncated, len(inputs), self.info.max_tokens, self.info.name),
            )
        return answer.vectors

    def embed_detailed(self, inputs: Sequence[Input], params: EmbedParams) -> Embeddings:
        """As ``embed``, with the length of every input and whether it was truncated."""
        return self._loop.run(self._engine.embed, inputs, params)

    def close(self) -> None:
        """Stop the engine and its threads; pending calls of other threads raise NotReady."""
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class _LoopThread:
    """An event loop in a separate thread, as the caller's thread may be running one already."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._workers = ThreadPoolExecutor(thread_name_prefix="embedder")
        self._loop.set_default_executor(self._workers)
        self._thread = threading.Thread(target=self._run_loop, name="embedder", daemon=True)
        self._closing = threading.Lock()
        self._closed = False
        self._thread.start()

    def _run_loop(self) -> None:
        """Run the loop until it is stopped; a SystemExit in it must not leave callers waiting."""
        while True:
            try:
                self._loop.run_forever()
                return
            except (SystemExit, KeyboardInterrupt):
                logger.exception("the event loop of an Embedder was interrupted, and continues")

    def run(
        self, work: Callable[P, Coroutine[Any, Any, Result]], *args: P.args, **kwargs: P.kwargs
    ) -> Result:
        """Do ``work`` in the loop; raises NotReady when closed."""
        # With the lock held: work that enters the loop after its end would wait for ever.
        with self._closing:
            if self._closed:
                raise NotReady("This Embedder is closed.")
            future = asyncio.run_coroutine_threadsafe(work(*args, **kwargs), self._loop)
        try:
            return future.result()
        except BaseException:  # Ctrl-C here must stop the work there
            future.cancel()
            raise

    def close(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run ``last``, wait for pending work, and end the threads."""
        with self._closing:
            self._closed = True
        if threading.current_thread() is self._thread:  # collected as garbage, in the loop itself
            self._loop.stop()
            return
        asyncio.run_coroutine_threadsafe(last(), self._loop).result()
        self._workers.shutdown()
        asyncio.run_coroutine_threadsafe(_all_other_tasks(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _all_other_tasks() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    await asyncio.gather(*others, return_exceptions=True)
