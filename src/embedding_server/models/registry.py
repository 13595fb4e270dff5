# SPDX-License-Identifier: MIT OR Apache-2.0
"""The models that are served: loads, finds by name and closes them."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

from embedding_server.engine.cores import Cores
from embedding_server.engine.engine import Engine, Limits
from embedding_server.engine.scheduler import Scheduler
from embedding_server.errors import ModelError, ModelNotFound, ModelUnavailable, NotReady
from embedding_server.models.hub import locate, verify
from embedding_server.models.loader import NO_LIMITS, LoadedModel, LoadOptions, load_model
from embedding_server.models.reference import SELF_CHECK_TOLERANCE, self_check
from embedding_server.models.spec import ModelSpec
from embedding_server.telemetry import ModelMetrics, Telemetry

__all__ = ["Registry"]

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class Registry:
    """Names to engines. Until ``load`` has returned, every look-up raises NotReady."""

    def __init__(
        self,
        specs: Sequence[ModelSpec],
        options: LoadOptions,
        *,
        telemetry: Telemetry,
        models_dir: Path | None = None,
        hf_token: str | None = None,
    ) -> None:
        self._specs = specs
        self._options = options
        self._telemetry = telemetry
        self._models_dir = models_dir
        self._hf_token = hf_token
        self._engines: dict[str, Engine] = {}
        self._by_name: dict[str, Engine] = {}
        self._folders: dict[str, Path] = {}
        self._loaded = False
        self._threads_loading = 0
        self._cores = Cores(options.threads, timeout=options.inference_timeout)
        # Not the event loop's threads, which a very long text would keep from writing answers.
        self._tokenizing = ThreadPoolExecutor(options.threads, thread_name_prefix="tokenize")
        self._tokenizing_large = ThreadPoolExecutor(1, thread_name_prefix="tokenize large")

    async def load(self) -> None:
        """Find, load, check and start every model.

        Raises ModelError if a model that the user named is not available or can't run, or if no
        model is left; a default model that can't be served is one warning.
        """
        for spec in self._specs:
            try:
                await self._load(spec)
            except ModelError as error:
                if spec.requested:
                    raise
                logger.warning("%s is not served. %s", spec.served_name, error)
            except Exception:
                if spec.requested:
                    raise
                logger.exception("%s is not served", spec.served_name)
        if not self._engines:
            raise ModelUnavailable("No model can be served; the warnings above say why.")
        self._loaded = True

    async def _load(self, spec: ModelSpec) -> None:
        started = time.perf_counter()
        model = await _in_daemon_thread(partial(self._find_and_load, spec))
        checked = await self._self_check(model)
        info, located = model.info, model.located
        engine = self._engine(model, self._options.limits, self._telemetry.for_model(info.name))
        engine.start()
        self._engines[info.name] = engine
        self._folders[info.name] = located.folder
        for name in self._names(spec, info.revision):
            self._by_name.setdefault(name, engine)
        self._telemetry.model_loaded(
            info.name,
            backend=info.backend,
            revision=info.revision,
            dims=info.dims,
            max_tokens=info.max_tokens,
        )
        logger.info(
            "%s is ready: %s, %d dimensions, %d tokens, from %s (%s) in %.2f s; %s",
            *(info.name, info.backend, info.dims, info.max_tokens),
            *(located.folder, located.origin, time.perf_counter() - started, checked),
        )

    def _find_and_load(self, spec: ModelSpec) -> LoadedModel:
        self._threads_loading += 1
        onnx_file = self._options.onnx_file
        try:
            located = locate(
                spec, models_dir=self._models_dir, token=self._hf_token, onnx_file=onnx_file
            )
            return load_model(verify(located, onnx_file=onnx_file), self._options)
        finally:
            self._threads_loading -= 1

    async def _self_check(self, model: LoadedModel) -> str:
        """Compare the model with its reference vectors; returns the result for the log.

        Its own engine has no limit that could refuse the texts and no metric that counts them.
        Raises ModelNotSupported if the vectors differ.
        """
        if not model.references:
            return "no self-check, as it has no reference vectors"
        engine = self._engine(model, NO_LIMITS, ModelMetrics.uncounted())
        engine.start()
        try:
            largest = max([await self_check(engine, found) for found in model.references])
        finally:
            await engine.close()
        texts = sum(len(found.texts) for found in model.references)
        return (
            f"self-check: {texts} texts within {SELF_CHECK_TOLERANCE:.0e} (largest difference "
            f"{largest:.0e})"
        )

    def _engine(self, model: LoadedModel, limits: Limits, metrics: ModelMetrics) -> Engine:
        backend = model.backend
        scheduler = Scheduler(
            max_batch_tokens=self._options.max_batch_tokens or backend.default_batch_tokens,
            padded=backend.padded,
        )
        return Engine(
            model.info,
            model.tokenizer,
            backend,
            scheduler=scheduler,
            limits=limits,
            cores=self._cores,
            tokenizing=self._tokenizing,
            tokenizing_large=self._tokenizing_large,
            metrics=metrics,
        )

    def _names(self, spec: ModelSpec, commit: str | None) -> list[str]:
        """The names that find the model of ``spec``: none that could mean another model."""
        others = [other for other in self._specs if other is not spec]
        names = [spec.served_name, *spec.hub_ids(commit)]
        if spec.repo and all(spec.repo != other.repo for other in others):
            names.append(spec.repo)
        if spec.repo and all(spec.name != other.name for other in others):
            names.append(spec.name)
        served = {other.served_name for other in others}
        return [name for name in names if name not in served]

    async def close(self) -> None:
        """Stop every engine; requests that still wait fail with NotReady."""
        await asyncio.gather(*(engine.close() for engine in self._engines.values()))
        # Not in a thread: when the interpreter ends, and with it an Embedder that was not closed,
        # no thread can be started.
        self._cores.close()
        self._tokenizing.shutdown()
        self._tokenizing_large.shutdown()

    @property
    def loading(self) -> bool:
        """Whether a thread is loading a model, even if ``load`` was cancelled."""
        return self._threads_loading > 0

    @property
    def stuck(self) -> bool:
        """Whether a thread computes that can't be waited for."""
        return self._cores.stuck

    @property
    def hung(self) -> Sequence[str]:
        """The models that have a batch over its time limit."""
        return self._cores.overdue

    @property
    def dead(self) -> Sequence[str]:
        """The models whose engine has ended."""
        return [name for name, engine in self._engines.items() if not engine.ready]

    async def until_broken(self) -> None:
        """Wait until a batch is over its time limit or an engine dies."""
        await self._cores.broken.wait()

    @property
    def ready(self) -> bool:
        """Whether all models are loaded, every engine runs, and no batch hangs."""
        return self._loaded and not self.dead and not self.hung

    def status(self) -> dict[str, str]:
        """``loading``, ``ready``, ``hung`` or ``failed`` for each model."""
        states = dict.fromkeys(self._engines, "ready")
        states |= dict.fromkeys(self.dead, "failed")
        states |= dict.fromkeys(self.hung, "hung")
        if not self._loaded:
            for spec in self._specs:
                states.setdefault(spec.served_name, "loading")
        return states

    def folder(self, name: str) -> Path:
        """The folder with the files of the served model ``name``."""
        return self._folders[name]

    def __getitem__(self, name: str) -> Engine:
        """The engine of the model ``name``, as soon as it is loaded.

        ``name`` is the name it is served under, its catalog name, or its hub id with or without
        the revision. Raises NotReady while it may still be loaded, else ModelNotFound.
        """
        engine = self._by_name.get(name)
        if engine is not None:
            return engine
        if not self._loaded and name in (spec.served_name for spec in self._specs):
            raise NotReady(f"The server is starting: the model {name!r} is being loaded.")
        self._check_loaded()
        served = ", ".join(self._engines)
        raise ModelNotFound(
            f"The model {name[:100]!r} is not served here; there are: {served}.", param="model"
        )

    def __iter__(self) -> Iterator[Engine]:
        """The engines in the order of ``/v1/models``; raises NotReady while loading."""
        self._check_loaded()
        return iter(self._engines.values())

    def _check_loaded(self) -> None:
        if not self._loaded:
            raise NotReady("The server is starting: its models are being loaded.")


async def _in_daemon_thread(work: Callable[[], Result]) -> Result:
    """``work()`` in a thread that the process's end doesn't wait for, for a download takes long."""
    future: Future[Result] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)
        except BaseException as error:  # such as a panic; the caller expects an Exception
            wrapped = RuntimeError(f"{type(error).__name__} while loading a model: {error}")
            wrapped.__cause__ = error
            future.set_exception(wrapped)

    threading.Thread(target=run, name="loading a model", daemon=True).start()
    return await asyncio.wrap_future(future)
