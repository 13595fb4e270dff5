# SPDX-License-Identifier: MIT OR Apache-2.0
"""The table of backends, and what each is loaded from; importing it loads none of them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedding_server.engine.backend import Backend

__all__ = ["BACKENDS", "ONNX_FILES", "BackendOptions", "Module", "Pipeline", "load_backend"]


@dataclass(frozen=True, slots=True)
class Module:
    """One entry of ``modules.json`` after the transformer."""

    kind: str
    """The class's own name: ``Pooling``, ``Dense``, ``Normalize``."""
    folder: Path
    config: Mapping[str, Any]
    """Its ``config.json``."""


@dataclass(frozen=True, slots=True)
class Pipeline:
    """The modules of a model's folder; each backend refuses those that it can't compute."""

    folder: Path
    """The whole sentence-transformers model."""
    body: str
    """The first module's class: ``Transformer`` or ``StaticEmbedding``."""
    transformer: Path
    """The first module's folder: ``config.json``, the weights and the tokenizer."""
    config: Mapping[str, Any]
    """``config.json``; empty where there is none."""
    modules: tuple[Module, ...]
    """The modules after the first, in order."""

    @property
    def pad_token_id(self) -> int:
        return int(self.config.get("pad_token_id") or 0)


@dataclass(frozen=True, slots=True)
class BackendOptions:
    """How to run a model."""

    threads: int
    onnx_file: str | None = None


ONNX_FILES = ("onnx/model.onnx", "model.onnx")
"""Where a repository has its own graph; the first that exists is used."""

BACKENDS: Mapping[str, str] = {
    "onnx": "embedding_server.backends.onnx:PackedBackend",
    "onnx-file": "embedding_server.backends.onnx:OnnxFileBackend",
    "static": "embedding_server.backends.static:StaticBackend",
    "torch": "embedding_server.backends.torch:TorchBackend",
}
"""Name -> ``module:Class``, imported on use."""


def load_backend(name: str, pipeline: Pipeline, options: BackendOptions) -> Backend:
    """Import the backend ``name`` and load the model with it.

    Raises ModelNotSupported for a model that it can't compute exactly.
    """
    module, _, attribute = BACKENDS[name].partition(":")
    backend_class = getattr(importlib.import_module(module), attribute)
    backend: Backend = backend_class.load(pipeline, options)
    return backend
