# SPDX-License-Identifier: MIT OR Apache-2.0
"""Post-processing against PyTorch and sentence-transformers, and each row on its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from sentence_transformers.util import quantize_embeddings

from embedding_server.engine.postprocess import (
    OutputDtype,
    layer_norm,
    normalize,
    postprocess,
    quantize,
)

DTYPES: tuple[OutputDtype, ...] = ("float", "int8", "uint8", "binary", "ubinary")

VECTORS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=24),
    elements=st.floats(-1000, 1000, width=32, allow_subnormal=False),
)


def random_vectors(rows: int = 7, dims: int = 384, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 3, (rows, dims)).astype(np.float32)


@pytest.mark.parametrize("dims", [2, 64, 384, 768, 4096])
@pytest.mark.parametrize("scale", [1e-3, 1, 1e4], ids=["small", "usual", "large"])
def test_layer_norm_is_torch_s(dims: int, scale: float) -> None:
    vectors = np.float32(scale) * random_vectors(dims=dims)
    expected = torch.nn.functional.layer_norm(torch.from_numpy(vectors), (dims,))
    ours = layer_norm(vectors)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, expected.numpy(), atol=2e-6)


@given(vectors=VECTORS)
def test_normalize_is_torch_s(vectors: NDArray[np.float32]) -> None:
    expected = torch.nn.functional.normalize(torch.from_numpy(vectors), dim=1)
    ours = normalize(vectors)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, expected.numpy(), atol=1e-6)


@pytest.mark.parametrize("dtype", ["binary", "ubinary"])
@given(vectors=VECTORS)
def test_bits_are_sentence_transformers_s(dtype: OutputDtype, vectors: NDArray[np.float32]) -> None:
    expected = quantize_embeddings(vectors, precision=dtype)
    ours = quantize(vectors, dtype)
    assert ours.dtype == expected.dtype
    np.testing.assert_array_equal(ours, expected)


@given(vectors=VECTORS)
def test_int8_and_uint8_are_the_documented_formula(vectors: NDArray[np.float32]) -> None:
    int8, uint8 = quantize(vectors, "int8"), quantize(vectors, "uint8")
    assert (int8.dtype, uint8.dtype) == (np.int8, np.uint8)
    np.testing.assert_array_equal(uint8.astype(np.int16), int8.astype(np.int16) + 128)
    peaks = np.abs(vectors).max(axis=1, keepdims=True).astype(np.float64)
    exact = 127 * vectors.astype(np.float64) / np.where(peaks == 0, 1, peaks)
    assert np.abs(int8 - exact).max() <= 0.5 + 1e-4
    assert (np.abs(int8.astype(np.int16)).max(axis=1) == np.where(peaks[:, 0] == 0, 0, 127)).all()


def test_int8_of_one_vector() -> None:
    vectors = np.array([[0.5, -0.25, 0.0, 0.1]], dtype=np.float32)
    assert quantize(vectors, "int8").tolist() == [[127, -64, 0, 25]]
    assert quantize(vectors, "uint8").tolist() == [[255, 64, 128, 153]]


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_int8_keeps_the_direction(dtype: OutputDtype) -> None:
    vectors = normalize(random_vectors())
    quantised = quantize(vectors, dtype).astype(np.float32) - (128 if dtype == "uint8" else 0)
    assert (np.sum(normalize(quantised) * vectors, axis=1) > 0.999).all()


# ----------------------------------------------------------------------------------- postprocess


@pytest.mark.parametrize("layer_norm_first", [False, True], ids=["", "layer-norm"])
@pytest.mark.parametrize("dimensions", [None, 1, 12, 100, 384])
@pytest.mark.parametrize("scale", [True, False], ids=["scaled", "unscaled"])
def test_order_is_layer_norm_cut_scale(
    layer_norm_first: bool, dimensions: int | None, scale: bool
) -> None:
    """As nomic-embed-text-v1.5 and sentence-transformers' ``truncate_dim`` do it."""
    vectors = random_vectors()
    expected = torch.from_numpy(vectors)
    if layer_norm_first:
        expected = torch.nn.functional.layer_norm(expected, (384,))
    expected = expected[:, :dimensions]
    if scale:
        expected = torch.nn.functional.normalize(expected, dim=1)
    ours = postprocess(
        vectors, dimensions=dimensions, layer_norm_first=layer_norm_first, scale=scale
    )
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, expected.numpy(), atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dimensions", [None, 13, 256])
def test_shape_of_every_dtype(dtype: OutputDtype, dimensions: int | None) -> None:
    size = dimensions or 384
    values = -(-size // 8) if "binary" in dtype else size
    ours = postprocess(random_vectors(), dimensions=dimensions, output_dtype=dtype)
    assert ours.shape == (7, values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [True, False], ids=["scaled", "unscaled"])
def test_zeros_stay_zeros(dtype: OutputDtype, scale: bool) -> None:
    ours = postprocess(np.zeros((2, 16), np.float32), scale=scale, output_dtype=dtype)
    zero = {"uint8": 128, "binary": -128}.get(dtype, 0)
    assert (ours == zero).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer_norm_first", [False, True], ids=["", "layer-norm"])
@pytest.mark.parametrize("dimensions", [None, 100])
def test_no_row_depends_on_its_neighbours(
    dtype: OutputDtype, layer_norm_first: bool, dimensions: int | None
) -> None:
    vectors = np.concatenate(
        [random_vectors(), np.zeros((1, 384), np.float32), 1000 * random_vectors(seed=1)]
    )
    options = {"dimensions": dimensions, "layer_norm_first": layer_norm_first}
    together = postprocess(vectors, output_dtype=dtype, **options)
    for row in range(len(vectors)):
        alone = postprocess(vectors[row : row + 1], output_dtype=dtype, **options)
        np.testing.assert_array_equal(together[row : row + 1], alone)


def test_the_input_is_left_alone() -> None:
    vectors = random_vectors()
    before = vectors.copy()
    for dtype in DTYPES:
        postprocess(vectors, layer_norm_first=True, dimensions=10, output_dtype=dtype)
    np.testing.assert_array_equal(vectors, before)
