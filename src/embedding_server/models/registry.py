# SPDX-License-Identifier: MIT OR Apache-2.0
"""The models that are served: loaded, looked up by name, closed."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
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
        # Of their own, so that a very long text keeps no answer from being written.
        self._tokenizing = ThreadPoolExecutor(options.threads, thread_name_prefix="tokenize")

    async def load(self) -> None:
        """Find, load, check and start every model.

        Raises ModelError if a model that was asked for by name can't be had or run, or if no
        model is left; a default model that can't be served is one warning.
        """
        for spec in self._specs:
            started = time.perf_counter()
            try:
                model = await _in_own_thread(partial(self._load_one, spec))
                checked = await self._self_check(model)
            except ModelError as error:
                if spec.requested:
                    raise
                logger.warning("%s is not served. %s", spec.served_name, error)
                continue
            except Exception:
                if spec.requested:
                    raise
                logger.exception("%s is not served", spec.served_name)
                continue
            self._serve(spec, model)
            logger.info(
                "%s is ready: %s, %d dimensions, %d tokens, from %s (%s) in %.2f s; %s",
                *(model.info.name, model.info.backend, model.info.dims, model.info.max_tokens),
                *(model.located.folder, model.located.origin),
                *(time.perf_counter() - started, checked),
            )
        if not self._engines:
            raise ModelUnavailable("No model can be served; the warnings above say why.")
        self._loaded = True

    def _add_names(self, spec: ModelSpec, engine: Engine) -> None:
        """Let every name of ``spec`` find its ``engine``, but for those that another model has."""
        others = [other for other in self._specs if other is not spec]
        names = [spec.served_name, *spec.hub_ids(engine.info.revision)]
        if spec.repo and all(spec.repo != other.repo for other in others):  # else which of both?
            names.append(spec.repo)
        if spec.repo and all(spec.name != other.name for other in others):
            names.append(spec.name)
        served = {other.served_name for other in others}
        for name in names:
            if name not in served:
                self._by_name.setdefault(name, engine)

    def _load_one(self, spec: ModelSpec) -> LoadedModel:
        self._threads_loading += 1
        try:
            return self._load_now(spec)
        finally:
            self._threads_loading -= 1

    def _load_now(self, spec: ModelSpec) -> LoadedModel:
        located = locate(
            spec,
            models_dir=self._models_dir,
            token=self._hf_token,
            onnx_file=self._options.onnx_file,
        )
        if self._options.onnx_file is None:  # the digest is of the file that it replaces
            verify(located, spec)
            if spec.sha256 is not None:  # byte for byte
                located = replace(located, revision=spec.revision)
        if spec.repo and spec.revision and located.revision is None:
            logger.warning(
                "%s does not say which revision it is, and is taken for %s",
                *(located.folder, spec.hub_id),
            )
        return load_model(spec, located, self._options)

    async def _self_check(self, model: LoadedModel) -> str:
        """Hold the model against its reference vectors; what the log says of it.

        On an engine that no request reaches, so that no limit refuses them and no metric counts
        them. Raises ModelNotSupported if they differ.
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

    def _serve(self, spec: ModelSpec, model: LoadedModel) -> None:
        info = model.info
        engine = self._engine(model, self._options.limits, self._telemetry.for_model(info.name))
        engine.start()
        self._engines[info.name] = engine
        self._add_names(spec, engine)
        self._folders[info.name] = model.located.folder
        self._telemetry.model_loaded(
            info.name,
            backend=info.backend,
            revision=info.revision,
            dims=info.dims,
            max_tokens=info.max_tokens,
        )

    def _engine(self, model: LoadedModel, limits: Limits, metrics: ModelMetrics) -> Engine:
        return Engine(
            model.info,
            model.tokenizer,
            model.backend,
            scheduler=Scheduler(
                max_batch_tokens=(
                    self._options.max_batch_tokens or model.backend.default_batch_tokens
                ),
                padded=model.backend.padded,
            ),
            limits=limits,
            cores=self._cores,
            tokenizing=self._tokenizing,
            metrics=metrics,
        )

    async def close(self) -> None:
        """Stop every engine; what still waits fails with NotReady."""
        await asyncio.gather(*(engine.close() for engine in self._engines.values()))
        # Wait for what is under way. Not in a thread: at the interpreter's end, when a forgotten
        # Embedder is closed, no thread can be had.
        self._cores.close()
        self._tokenizing.shutdown()  # what comes of it finds its engine closed

    @property
    def loading(self) -> bool:
        """Whether a thread is loading a model, be it for nobody any more."""
        return self._threads_loading > 0

    @property
    def stuck(self) -> bool:
        """Whether a thread computes that can't be waited for."""
        return self._cores.stuck

    @property
    def hung(self) -> Sequence[str]:
        """The models of which a batch is over its time, now."""
        return self._cores.overdue

    @property
    def dead(self) -> Sequence[str]:
        """The models whose engine has ended."""
        return [name for name, engine in self._engines.items() if not engine.ready]

    async def until_broken(self) -> None:
        """Wait for a batch to be over its time or an engine to die."""
        await self._cores.broken.wait()

    @property
    def ready(self) -> bool:
        """Whether all models are loaded, every engine runs, and nothing hangs."""
        running = all(engine.ready for engine in self._engines.values())
        return self._loaded and running and not self.hung

    def status(self) -> dict[str, str]:
        """``loading``, ``ready``, ``hung`` or ``failed`` for each model."""
        states = {
            name: "ready" if engine.ready else "failed" for name, engine in self._engines.items()
        }
        states |= dict.fromkeys(self.hung, "hung")
        if not self._loaded:
            names = [spec.served_name for spec in self._specs]
            states |= {name: "loading" for name in names if name not in states}
        return states

    def folder(self, name: str) -> Path:
        """Where the files of the served model ``name`` lie."""
        return self._folders[name]

    def __getitem__(self, name: str) -> Engine:
        """The engine of the served model ``name``, as soon as it is loaded.

        ``name`` is what it is served as, its catalog name, its hub id, or that with a revision.
        Raises NotReady while it may still come, ModelNotFound for any other name.
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


async def _in_own_thread(work: Callable[[], Result]) -> Result:
    """``work()`` in a thread that nothing waits for: Ctrl-C must not take as long as a download."""
    future: Future[Result] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)
        except BaseException as error:  # a panic, perhaps; who waits for it expects an Exception
            wrapped = RuntimeError(f"{type(error).__name__} while loading a model: {error}")
            wrapped.__cause__ = error
            future.set_exception(wrapped)

    threading.Thread(target=run, name="loading a model", daemon=True).start()
    return await asyncio.wrap_future(future)
