"""Backends for ``BACKENDS`` that fail, or wait until a test lets them go on."""

from __future__ import annotations

import threading
from typing import Self

import numpy as np
from numpy.typing import NDArray

from embedding_server.backends.base import BackendOptions, Pipeline
from embedding_server.engine.batch import Batch

__all__ = ["Blocked", "Broken", "Failing", "NotFinite", "Working"]


class Working:
    """Gives every input the same vector."""

    dims = 8
    padded = False
    exclusive = True
    vocab_size = None
    tokenizer = None
    default_batch_tokens = 32

    @classmethod
    def load(cls, pipeline: Pipeline, options: BackendOptions) -> Self:
        return cls()

    def embed(self, batch: Batch, *, wide: bool = False) -> NDArray[np.float32]:
        return np.ones((len(batch), self.dims), dtype=np.float32)


class Failing(Working):
    """Raises what an inference library would raise."""

    def embed(self, batch: Batch, *, wide: bool = False) -> NDArray[np.float32]:
        raise RuntimeError("onnxruntime failed in /srv/models/secret.onnx at 0xdeadbeef")


class NotFinite(Working):
    """Gives NaN for every input of more than five tokens."""

    def embed(self, batch: Batch, *, wide: bool = False) -> NDArray[np.float32]:
        vectors = super().embed(batch)
        vectors[batch.lengths > 5] = np.nan
        return vectors


class Broken(Working):
    """Breaks its contract, which no batch loop survives."""

    def embed(self, batch: Batch, *, wide: bool = False) -> NDArray[np.float32]:
        return None  # type: ignore[return-value]


class Blocked(Working):
    """Loads and computes only once ``loading`` and ``computing`` are set; ``reset`` before use."""

    loading = threading.Event()
    computing = threading.Event()

    @classmethod
    def reset(cls, *, load: bool) -> None:
        """Block computing, and loading unless ``load``."""
        cls.loading, cls.computing = threading.Event(), threading.Event()
        if load:
            cls.loading.set()

    @classmethod
    def release(cls) -> None:
        """Let everything go on."""
        cls.loading.set()
        cls.computing.set()

    @classmethod
    def load(cls, pipeline: Pipeline, options: BackendOptions) -> Self:
        cls.loading.wait()
        return cls()

    def embed(self, batch: Batch, *, wide: bool = False) -> NDArray[np.float32]:
        self.computing.wait()
        return super().embed(batch)
