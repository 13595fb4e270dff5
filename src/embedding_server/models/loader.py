"""A model's folder to a running Engine: picks the backend and refuses what can't be exact."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path

from embedding_server.backends.base import Backend, BackendOptions, Pipeline, backend_class
from embedding_server.backends.head import pooling_modes
from embedding_server.engine.engine import Engine, Limits
from embedding_server.engine.info import ModelInfo
from embedding_server.engine.scheduler import Scheduler
from embedding_server.engine.tokenizer import Tokenizer
from embedding_server.errors import ModelNotSupported
from embedding_server.models.catalog import CATALOG, CatalogModel
from embedding_server.models.hub import LocatedModel, ModelSpec, sha256_of
from embedding_server.models.layout import Layout, read_layout
from embedding_server.telemetry import Telemetry

__all__ = ["LoadOptions", "load_engine"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How models are run; the same for all of a process."""

    backend: str
    threads: int
    limits: Limits
    onnx_file: str | None = None
    max_batch_tokens: int | None = None


def load_engine(
    spec: ModelSpec,
    located: LocatedModel,
    options: LoadOptions,
    *,
    executor: Executor,
    telemetry: Telemetry,
) -> Engine:
    """The engine of one model, ready to be started.

    Raises ModelNotSupported, saying what in the folder is to blame, if no backend that was
    asked for computes the model exactly.
    """
    layout = read_layout(located.folder)
    name, backend = _load_backend(layout.pipeline, options)
    row = _catalog_row(spec, located)
    info = _describe(spec, located, layout, name, backend.dims, row)
    tokenizer = Tokenizer.from_file(
        layout.tokenizer_file,
        max_tokens=layout.max_tokens,
        vocab_size=layout.pipeline.config.get("vocab_size"),
        lowercase=layout.lowercase,
    )
    telemetry.model_loaded(
        info.name,
        backend=info.backend,
        revision=info.revision,
        dims=info.dims,
        max_tokens=info.max_tokens,
    )
    return Engine(
        info,
        tokenizer,
        backend,
        scheduler=Scheduler(
            max_batch_tokens=options.max_batch_tokens or backend.default_batch_tokens,
            padded=backend.padded,
        ),
        limits=options.limits,
        executor=executor,
        metrics=telemetry.for_model(info.name),
    )


def _load_backend(pipeline: Pipeline, options: LoadOptions) -> tuple[str, Backend]:
    """The first backend that takes the model, and its name."""
    refusals: list[str] = []
    backend_options = BackendOptions(threads=options.threads, onnx_file=options.onnx_file)
    for name in _candidates(options):
        try:
            backend = backend_class(name).load(pipeline, backend_options)
        except ModelNotSupported as refusal:
            refusals.append(f"{name}: {refusal}")
            continue
        if refusals:
            logger.info("%s runs on %s (%s)", pipeline.folder, name, "; ".join(refusals))
        return name, backend
    raise ModelNotSupported("; ".join(refusals))


def _candidates(options: LoadOptions) -> list[str]:
    if options.onnx_file is not None:
        return ["onnx-file"]
    if options.backend == "torch":
        return ["torch"]
    onnx = ["onnx", "onnx-file"]
    if options.backend == "onnx" or not _torch_installed():
        return onnx
    return ["torch", *onnx] if _gpu_present() else [*onnx, "torch"]


def _torch_installed() -> bool:
    names = ("torch", "sentence_transformers")
    return all(importlib.util.find_spec(name) is not None for name in names)


def _gpu_present() -> bool:
    """Whether a GPU that torch can use is likely here, without torch's seconds of import."""
    if sys.platform == "darwin":
        return os.uname().machine == "arm64"
    return Path("/dev/nvidiactl").exists() or Path("/proc/driver/nvidia/version").exists()


def _catalog_row(spec: ModelSpec, located: LocatedModel) -> CatalogModel | None:
    row = CATALOG.get(located.folder.name if spec.repo is None else spec.name)
    row = row or next((row for row in CATALOG.values() if row.repo == spec.repo), None)
    if row is not None and spec.repo is None:
        logger.info("%s is taken for the catalog's %s, by its name", located.folder, row.name)
    return row


def _describe(
    spec: ModelSpec,
    located: LocatedModel,
    layout: Layout,
    backend: str,
    dims: int,
    row: CatalogModel | None,
) -> ModelInfo:
    weights = layout.pipeline.transformer / "model.safetensors"
    pooling = next((m for m in layout.pipeline.modules if m.kind == "Pooling"), None)
    info = ModelInfo(
        name=spec.name,
        dims=dims,
        max_tokens=layout.max_tokens,
        pooling="+".join(pooling_modes(pooling.config)) if pooling else "none",
        prompts=dict(layout.prompts),
        default_prompt=layout.default_prompt,
        backend=backend,
        revision=located.revision,
        sha256=spec.sha256 or (sha256_of(weights) if weights.is_file() else None),
        created=int(weights.stat().st_mtime) if weights.is_file() else 0,
        owned_by=spec.repo.partition("/")[0] if spec.repo else "local",
    )
    if row is None:
        return info
    return replace(
        info,
        prompts={**row.prompts, **info.prompts},
        dimensions=row.dimensions,
        layer_norm=row.layer_norm,
    )
