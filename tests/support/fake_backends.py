# SPDX-License-Identifier: MIT OR Apache-2.0
"""Backends for ``BACKENDS`` that fail, or wait until a test lets them go on."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from embedding_server.backends.base import BackendOptions, Pipeline
from embedding_server.backends.onnx import PackedBackend
from embedding_server.engine.batch import Batch

__all__ = [
    *("FAULTS", "RELEASE", "Blocked", "Broken", "Failing", "Faulty", "Leaving", "NotFinite"),
    "Working",
]


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
    """Falls apart at its first batch: no batch loop survives what isn't even an answer."""

    @property
    def padded(self) -> bool:  # type: ignore[override]
        if self.computed:
            raise AttributeError("padded")
        return False

    computed = False

    def embed(self, batch: Batch, *, wide: bool = False) -> NDArray[np.float32]:
        self.computed = True
        return super().embed(batch)


class Leaving(Working):
    """Ends the program that loads it."""

    @classmethod
    def load(cls, pipeline: Pipeline, options: BackendOptions) -> Self:
        raise SystemExit(3)


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


def _raise(vectors: NDArray[np.float32]) -> Any:
    raise RuntimeError("secret detail of the backend")


def _leave(vectors: NDArray[np.float32]) -> Any:
    raise SystemExit(3)


def _hang(vectors: NDArray[np.float32]) -> Any:
    native = ctypes.CDLL(None)
    while True:  # a signal ends the pause
        native.pause()


def _wait(vectors: NDArray[np.float32]) -> Any:
    while not Path(os.environ[RELEASE]).exists():
        time.sleep(0.01)
    return vectors


def _need_all_memory(vectors: NDArray[np.float32]) -> Any:
    raise MemoryError


def _need_much_memory(vectors: NDArray[np.float32]) -> Any:
    if len(vectors) > 1:
        raise MemoryError
    return vectors


RELEASE = "FAULTY_BACKEND_RELEASE"
"""The variable with the name of a file; ``please wait`` ends when it is there."""

FAULTS: Mapping[str, Callable[[NDArray[np.float32]], Any]] = {
    "please raise": _raise,
    "please leave": _leave,
    "please return none": lambda vectors: None,
    "please return a string": lambda vectors: "vectors",
    "please double": lambda vectors: vectors.astype(np.float64),
    "please give one too many": lambda vectors: np.concatenate([vectors, vectors[:1]]),
    "please flatten": np.ravel,
    "please return nan": lambda vectors: vectors * np.nan,
    "please return infinity": lambda vectors: vectors / np.float32(0),
    "please hang": _hang,
    "please wait": _wait,
    "please need all memory": _need_all_memory,
    "please need much memory": _need_much_memory,
}
"""What a batch becomes of which one text begins so."""


class Faulty(PackedBackend):
    """Computes as well as any, but for texts that begin with one of ``FAULTS``."""

    @classmethod
    def load(cls, pipeline: Pipeline, options: BackendOptions) -> Self:
        backend = super().load(pipeline, options)
        tokenizer = Tokenizer.from_file(str(pipeline.transformer / "tokenizer.json"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        backend.faults = [
            (tuple(tokenizer.encode(text, add_special_tokens=False).ids), fault)
            for text, fault in FAULTS.items()
        ]
        return backend

    faults: list[tuple[tuple[int, ...], Callable[[NDArray[np.float32]], Any]]]

    def embed(self, batch: Batch, *, wide: bool = False) -> NDArray[np.float32]:
        vectors = super().embed(batch, wide=wide)
        with np.errstate(all="ignore"):
            for start in batch.cu_seqlens[:-1]:
                for ids, fault in self.faults:
                    if tuple(batch.input_ids[start + 1 : start + 1 + len(ids)]) == ids:
                        return fault(vectors)  # type: ignore[no-any-return]
        return vectors
