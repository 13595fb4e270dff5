# SPDX-License-Identifier: MIT OR Apache-2.0
"""The ``models verify`` command: compares a backend's vectors with sentence-transformers."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedding_server.backends.torch import load_sentence_transformer
from embedding_server.commands.tables import print_rows
from embedding_server.embedder import Embedder
from embedding_server.engine.parameters import EmbedParams
from embedding_server.engine.postprocess import normalize, postprocess
from embedding_server.errors import ModelUnavailable
from embedding_server.models.layout import read_layout
from embedding_server.models.reference import REFERENCE_FILE, ReferenceVectors

__all__ = [
    "TEXTS",
    "TOLERANCE",
    "Verification",
    "print_verification",
    "verify_vectors",
    "write_reference",
]

logger = logging.getLogger(__name__)

TOLERANCE = 1e-5
"""The largest difference of a value of normalized vectors that a backend may have."""

_SENTENCE = "The quick brown fox jumps over the lazy dog, and nobody in the village is surprised. "

TEXTS: tuple[str, ...] = (
    "",
    "a",
    "iPhone",
    "popular smartphone",
    "How do I reset my password?",
    "  spaces   around \t and\nbetween  ",
    "ALL CAPITALS and MiXeD case",
    "naïve café, Zürich, Kraków, crème brûlée",
    "日本語の文章と中文的句子。",
    "Привет, как дела? Γειά σου, τι κάνεις;",  # noqa: RUF001
    "مرحبا بالعالم, שלום עולם, नमस्ते दुनिया",
    "👍🏽 emoji 🚀 and 👩‍👩‍👧 families",
    "x = [i ** 2 for i in range(10)]  # code",
    "https://example.com/path?query=value&other=1#fragment",
    "3.14159, 1e-12, 2026-11-22, +49 30 123456",
    "[CLS] special [SEP] tokens <s> written </s> in <pad> the text",
    *(_SENTENCE * count for count in (1, 2, 3, 5, 8, 13, 21, 34)),
)
"""Words, sentences, scripts, odd characters, and texts up to and beyond the usual limits."""

_SHORT_TEXTS = [text for text in TEXTS if 0 < len(text) <= 100]
"""The texts of reference vectors: few, because every start embeds them."""

_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Verification:
    """The differences of a backend from sentence-transformers, and the speed of both."""

    model: str
    backend: str
    max_error: float
    """The largest difference of a value, of vectors of length 1."""
    worst_text: str
    min_cosine: float
    texts_per_second: float
    reference_texts_per_second: float
    reference: Mapping[str, NDArray[np.float32]]
    """sentence-transformers' vectors of short texts without a prompt, of length 1."""

    @property
    def exact(self) -> bool:
        return self.max_error <= TOLERANCE


def verify_vectors(embedder: Embedder, folder: Path) -> Verification:
    """Embed ``TEXTS`` with ``embedder`` and with sentence-transformers from ``folder``.

    Raises ModelNotSupported without the extra [torch], or if sentence-transformers itself
    can't load the folder.
    """
    logger.info("comparing with sentence-transformers, which takes some seconds to load")
    reference = load_sentence_transformer(read_layout(folder).pipeline)
    texts = list(TEXTS)
    params = EmbedParams(normalize=False)
    found, seconds = _timed(lambda: embedder.embed_detailed(texts, params).vectors)
    expected, reference_seconds = _timed(lambda: np.asarray(reference.encode(texts)))
    found, expected = (normalize(vectors).astype(np.float64) for vectors in (found, expected))
    errors = np.abs(found - expected).max(axis=1)
    short = postprocess(
        np.asarray(reference.encode(_SHORT_TEXTS, prompt="")),
        layer_norm_first=embedder.info.layer_norm,
    )
    return Verification(
        model=embedder.info.name,
        backend=embedder.info.backend,
        max_error=float(errors.max()),
        worst_text=texts[int(errors.argmax())],
        min_cosine=float(_cosines(found, expected).min()),
        texts_per_second=len(texts) / seconds,
        reference_texts_per_second=len(texts) / reference_seconds,
        # The vector of a text without a token is 0 and can't be compared.
        reference={text: v for text, v in zip(_SHORT_TEXTS, short, strict=True) if v.any()},
    )


def write_reference(result: Verification, folder: Path) -> Path:
    """Write the reference vectors of ``result`` into ``folder``; returns their file.

    Raises ModelUnavailable if the file has other vectors already, or can't be written.
    """
    path = folder / REFERENCE_FILE
    new = ReferenceVectors(path, list(result.reference), np.stack([*result.reference.values()]))
    if path.exists():
        if new.agrees_with(ReferenceVectors.read(path), TOLERANCE):
            return path
        raise ModelUnavailable(
            f"{path} is there already, with other vectors than those of {result.model}: remove it, "
            "or write to another folder."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        new.write()
    except OSError as error:
        raise ModelUnavailable(
            f"{path} could not be written ({error.strerror or error}): name a writable folder."
        ) from None
    return path


def print_verification(result: Verification) -> None:
    """Print ``result`` as a table."""
    rows = (
        ("model", result.model),
        ("backend", result.backend),
        ("texts", str(len(TEXTS))),
        ("maximum error", f"{result.max_error:.2e}  (allowed {TOLERANCE:.0e})"),
        ("worst text", repr(result.worst_text[:50])),
        ("minimum cosine", f"{result.min_cosine:.9f}"),
        ("speed", f"{result.texts_per_second:.0f} texts/s"),
        ("sentence-transformers", f"{result.reference_texts_per_second:.0f} texts/s"),
        ("verdict", "exact" if result.exact else "NOT EXACT"),
    )
    print_rows(rows)


def _cosines(left: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return np.asarray((left * right).sum(axis=1) / np.maximum(lengths, 1e-12))


def _timed(work: Callable[[], NDArray[Any]]) -> tuple[NDArray[Any], float]:
    """The result of ``work``, and the seconds of its fastest round."""
    result = work()
    seconds = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return result, min(seconds)
