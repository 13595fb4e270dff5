# SPDX-License-Identifier: MIT OR Apache-2.0
"""A backend's vectors to those that a request asked for; numpy only."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedding_server.engine.parameters import OutputDtype

__all__ = [
    "NOT_FINITE",
    "fault_in",
    "layer_norm",
    "normalize",
    "postprocess",
    "quantize",
]


NOT_FINITE = "values that are not finite"


def fault_in(vectors: object, shape: tuple[int, int]) -> str | None:
    """What is wrong with a backend's answer: it must be a finite float32 array of ``shape``."""
    if not isinstance(vectors, np.ndarray):
        return f"{type(vectors).__name__} instead of an array"
    if vectors.dtype != np.float32:
        return f"{vectors.dtype} instead of float32"
    if vectors.shape != shape:
        return f"the wrong shape {vectors.shape} instead of {shape}"
    return None if np.isfinite(vectors).all() else NOT_FINITE


def postprocess(
    vectors: NDArray[np.float32],
    *,
    dimensions: int | None = None,
    layer_norm_first: bool = False,
    scale: bool = True,
    output_dtype: OutputDtype = "float",
) -> NDArray[Any]:
    """``vectors`` [n, dims] layer-normed if asked, cut to ``dimensions``, scaled, quantised.

    Returns [n, dimensions] float32, int8 or uint8; the binary dtypes give
    [n, ceil(dimensions / 8)].
    """
    if layer_norm_first:
        vectors = layer_norm(vectors)
    if dimensions is not None:
        vectors = vectors[:, :dimensions]
    if scale:
        vectors = normalize(vectors)
    return vectors if output_dtype == "float" else quantize(vectors, output_dtype)


def layer_norm(vectors: NDArray[np.float32], eps: float = 1e-5) -> NDArray[np.float32]:
    """Each row with mean 0 and variance 1: ``torch.nn.functional.layer_norm`` without weights."""
    mean = vectors.mean(axis=1, keepdims=True)
    variance = vectors.var(axis=1, keepdims=True)
    return np.asarray((vectors - mean) / np.sqrt(variance + eps), dtype=np.float32)


def normalize(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each row scaled to length 1; zeros stay, as in ``torch.nn.functional.normalize``."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(norms, 1e-12), dtype=np.float32)


def quantize(vectors: NDArray[np.float32], dtype: OutputDtype) -> NDArray[Any]:
    """``vectors`` as int8, uint8 or packed bits; no row's answer depends on its neighbours.

    The bits are sentence-transformers' ``quantize_embeddings``: one for each positive value,
    the first value in the highest bit, and ``binary`` the same byte minus 128.
    """
    if dtype in ("binary", "ubinary"):
        packed = np.packbits(vectors > 0, axis=1)
        if dtype == "ubinary":
            return packed
        return (packed.astype(np.int16) - 128).astype(np.int8)
    peak = np.abs(vectors).max(axis=1, keepdims=True)
    scaled = np.rint(127.0 * vectors / np.maximum(peak, np.finfo(np.float32).tiny))
    shifted, target = (scaled, np.int8) if dtype == "int8" else (scaled + 128, np.uint8)
    return np.asarray(shifted, dtype=target)
