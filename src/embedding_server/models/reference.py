# SPDX-License-Identifier: MIT OR Apache-2.0
"""Reference vectors: the vectors that a model must compute for some texts before it is served."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from embedding_server.engine.engine import Engine
from embedding_server.engine.parameters import EmbedParams
from embedding_server.errors import EmbeddingServerError, InvalidRequest, ModelNotSupported

__all__ = ["REFERENCE_FILE", "SELF_CHECK_TOLERANCE", "ReferenceVectors", "self_check"]

REFERENCE_FILE = "reference_vectors.npz"

SELF_CHECK_TOLERANCE = 1e-4
"""Largest difference of any value: ten times that between backends, for other versions of
sentence-transformers and other processors round differently; a wrong model differs far more."""

_MOST_TEXTS = 256
_MOST_BYTES = 2**20


@dataclass(frozen=True, slots=True, eq=False)
class ReferenceVectors:
    """Texts and their vectors by sentence-transformers, without a prompt, and layer-normalised if
    the catalog says so."""

    path: Path
    texts: Sequence[str]
    vectors: NDArray[np.float32]
    """[texts, dims], each row of length 1."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read ``texts`` and ``embeddings`` of a .npz file.

        Raises ModelNotSupported for a file that is damaged, too large, or holds anything else.
        """
        try:
            size = path.stat().st_size
            if size <= _MOST_BYTES:
                with zipfile.ZipFile(path) as archive:
                    size = sum(member.file_size for member in archive.infolist())
            if size <= _MOST_BYTES:
                with np.load(path, allow_pickle=False) as arrays:
                    texts, vectors = arrays["texts"], arrays["embeddings"]
        except Exception as error:  # zipfile and numpy raise many kinds of it
            raise _unusable(path, f"can't be read ({error})") from None
        if size > _MOST_BYTES:
            raise _unusable(path, f"is larger than {_MOST_BYTES} bytes")
        if not (isinstance(texts, np.ndarray) and texts.dtype.kind == "U" and texts.ndim == 1):
            raise _unusable(path, "has no list of strings 'texts'")
        if not 1 <= len(texts) <= _MOST_TEXTS:
            raise _unusable(path, f"has {len(texts)} texts instead of 1 to {_MOST_TEXTS}")
        floats = isinstance(vectors, np.ndarray) and vectors.dtype == np.float32
        if not floats or vectors.ndim != 2 or len(vectors) != len(texts):
            raise _unusable(path, "has no float32 vector in 'embeddings' for each text")
        with np.errstate(all="ignore"):
            if not (np.abs(np.linalg.norm(vectors, axis=1) - 1) < 1e-3).all():
                raise _unusable(path, "has vectors in 'embeddings' whose length is not 1")
        return cls(path, texts.tolist(), vectors)

    def agrees_with(self, other: ReferenceVectors, tolerance: float) -> bool:
        """Whether ``other`` has the same texts, and no value differs by more than ``tolerance``."""
        if self.texts != other.texts or self.vectors.shape != other.vectors.shape:
            return False
        return bool(np.abs(self.vectors - other.vectors).max() <= tolerance)

    def write(self) -> None:
        """Write the file beside ``path``, and then rename it."""
        part = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        try:
            with part.open("wb") as file:
                np.savez(file, texts=np.array(self.texts), embeddings=self.vectors)
            part.rename(self.path)
        finally:
            part.unlink(missing_ok=True)


async def self_check(engine: Engine, reference: ReferenceVectors) -> float:
    """Embed the texts on the running ``engine``; returns the largest difference of any value.

    Raises ModelNotSupported if it is above SELF_CHECK_TOLERANCE, or if the engine fails.
    """
    dims = reference.vectors.shape[1]
    if dims != engine.info.dims:
        raise _unusable(
            reference.path, f"has vectors of {dims} values, and the model's have {engine.info.dims}"
        )
    try:
        answer = await engine.embed(reference.texts, EmbedParams(prompt=""))
    except InvalidRequest as error:
        raise _unusable(reference.path, f"has texts that can't be embedded ({error})") from None
    except EmbeddingServerError as error:
        raise ModelNotSupported(
            f"{engine.info.name} fails on the texts of {reference.path}, so that it would fail on "
            f"others, too: {error}"
        ) from error
    differences = np.abs(answer.vectors - reference.vectors).max(axis=1)
    worst = int(differences.argmax())
    if differences[worst] > SELF_CHECK_TOLERANCE:
        raise ModelNotSupported(
            f"{engine.info.name} does not give the vectors in {reference.path}: that of "
            f"{reference.texts[worst][:50]!r} differs by {differences[worst]:.1e}, and "
            f"{SELF_CHECK_TOLERANCE:.0e} is allowed. Get the model again; or, if it was changed on "
            f"purpose, {_advice(reference.path)}."
        )
    return float(differences[worst])


def _advice(path: Path) -> str:
    if path.name != REFERENCE_FILE:  # the catalog's
        return "give its folder another name than that of a catalog model"
    return (
        "remove that file, and write it anew with `embedding-server models verify "
        f"{path.parent} --write {path.parent}`"
    )


def _unusable(path: Path, fault: str) -> ModelNotSupported:
    return ModelNotSupported(f"{path} {fault}: {_advice(path)}.")
