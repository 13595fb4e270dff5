# SPDX-License-Identifier: MIT OR Apache-2.0
"""What a backend is, and the table of those there are; importing it loads none of them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import tokenizers
from numpy.typing import NDArray

from embedding_server.engine.batch import Batch

__all__ = [
    "BACKENDS",
    "ONNX_FILES",
    "Backend",
    "BackendOptions",
    "Module",
    "OwnTokenizer",
    "Pipeline",
    "backend_class",
]


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
    """What a model's folder asks to be computed; each backend refuses what it can't."""

    folder: Path
    """The whole sentence-transformers model."""
    body: str
    """The first module's class: ``Transformer`` or ``StaticEmbedding``."""
    transformer: Path
    """The first module's folder: ``config.json``, the weights and the tokenizer."""
    config: Mapping[str, Any]
    """``config.json``; empty where there is none."""
    modules: tuple[Module, ...]
    """What follows the first module, in order."""

    @property
    def pad_token_id(self) -> int:
        return int(self.config.get("pad_token_id") or 0)


@dataclass(frozen=True, slots=True)
class BackendOptions:
    """How to run it."""

    threads: int
    onnx_file: str | None = None


@dataclass(frozen=True, slots=True)
class OwnTokenizer:
    """The tokenizer that a backend's own library has loaded for the model."""

    backend: tokenizers.Tokenizer
    special_ids: frozenset[int]
    pad_id: int | None
    keep_end: bool
    """Whether a text that is too long loses its beginning."""


class Backend(Protocol):
    """A ``Batch`` in, one pooled vector for each of its sequences out."""

    dims: int
    """Length of a vector."""
    padded: bool
    """Whether a batch costs its size times its longest sequence."""
    exclusive: bool
    """Whether a batch takes all cores; else each batch takes one, and several run at a time."""
    default_batch_tokens: int
    """The budget of a batch that this device computes best."""
    vocab_size: int | None
    """How many token ids it has vectors for; None: as many as config.json says."""
    tokenizer: OwnTokenizer | None
    """What texts must be tokenised with; None: what the model's files say."""

    @classmethod
    def load(cls, pipeline: Pipeline, options: BackendOptions) -> Self:
        """Load the model; raises ModelNotSupported for what it can't compute exactly."""
        ...

    def embed(self, batch: Batch, *, wide: bool = False) -> NDArray[np.float32]:
        """float32 [len(batch), dims], not normalised.

        ``wide`` says that no other batch runs, so that this one may take all cores. Called from
        several threads at a time, unless ``exclusive``.
        """
        ...


ONNX_FILES = ("onnx/model.onnx", "model.onnx")
"""Where a repository has its own graph; the first that is there is taken."""

BACKENDS: Mapping[str, str] = {
    "onnx": "embedding_server.backends.onnx:PackedBackend",
    "onnx-file": "embedding_server.backends.onnx:OnnxFileBackend",
    "static": "embedding_server.backends.static:StaticBackend",
    "torch": "embedding_server.backends.torch:TorchBackend",
}
"""Name -> ``module:Class``, imported on use."""


def backend_class(name: str) -> type[Backend]:
    """The class of the backend ``name``, imported now."""
    module, _, attribute = BACKENDS[name].partition(":")
    loaded: type[Backend] = getattr(importlib.import_module(module), attribute)
    return loaded
