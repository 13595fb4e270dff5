# SPDX-License-Identifier: MIT OR Apache-2.0
"""The inputs of the packed graph, computed from a batch in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedding_server.backends.architectures import Architecture, Positions, Rotary
from embedding_server.engine.batch import Batch

__all__ = ["GraphInputs", "distance_buckets", "rotaries", "rotary_name", "window_name"]

# Queries in a block. Longer blocks compute more masked keys, shorter ones need more calls: 128
# measured best at 8,192 tokens, and within a few percent elsewhere.
_BLOCK = 128

_OUT_OF_SIGHT = np.float32(np.finfo(np.float32).min)


def rotary_name(number: int) -> tuple[str, str]:
    """The graph's inputs of the architecture's ``number``-th rotary embedding."""
    return f"cos_{number}", f"sin_{number}"


def window_name(part: str) -> str:
    """The graph's input of this part of the sliding window."""
    return f"window_{part}"


class GraphInputs:
    """Makes the graph's inputs of a batch, and keeps the tables that every batch needs."""

    def __init__(self, architecture: Architecture) -> None:
        self._positions = architecture.positions
        self._rotaries = tuple(_RotaryTable(rotary) for rotary in rotaries(architecture))
        windows = {attention.window for attention in architecture.attention} - {None}
        self._window = windows.pop() if windows else None
        self._looped = any(attention.window is None for attention in architecture.attention)

    def of(self, batch: Batch) -> dict[str, NDArray[Any]]:
        """Every input by its name; see ``build_graph``."""
        lengths, starts = batch.lengths, batch.cu_seqlens[:-1]
        offsets = np.arange(batch.tokens) - np.repeat(starts, lengths)
        inputs: dict[str, NDArray[Any]] = {"input_ids": batch.input_ids}
        if self._looped:
            inputs["runs"] = _runs(batch.cu_seqlens, lengths)
        if self._positions is not None:
            inputs["position_ids"] = _position_ids(self._positions, batch, offsets)
        if self._rotaries:
            inputs["rotary_ids"] = np.arange(batch.tokens)[None]
        for number, table in enumerate(self._rotaries):
            cos, sin = rotary_name(number)
            inputs[cos], inputs[sin] = table.rows(lengths, offsets)
        if self._window is not None:
            parts = _window(batch, self._window)
            inputs |= {window_name(part): value for part, value in parts.items()}
        return inputs


def rotaries(architecture: Architecture) -> tuple[Rotary, ...]:
    """The different rotary embeddings of the layers, in order of their first use."""
    used = (attention.rotary for attention in architecture.attention)
    return tuple(dict.fromkeys(rotary for rotary in used if rotary is not None))


def _runs(cu_seqlens: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Neighbours of equal length as one run: int64 [R, 3] of first row, end row, length."""
    cuts = np.flatnonzero(np.diff(lengths)) + 1
    first = np.concatenate([[0], cuts])
    last = np.concatenate([cuts, [len(lengths)]])
    return np.stack([cu_seqlens[first], cu_seqlens[last], lengths[first]], axis=1)


def _position_ids(
    positions: Positions, batch: Batch, offsets: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Rows of the position table, int64 [T].

    RoBERTa counts from after the padding index, and leaves out tokens that are the padding
    token itself, as one written in the text.
    """
    if positions.padding_idx is None:
        return offsets
    counted = batch.input_ids != positions.padding_idx
    if counted.all():
        return offsets + positions.padding_idx + 1
    so_far = np.cumsum(counted)
    before = np.concatenate([[0], so_far])[batch.cu_seqlens[:-1]]
    within = so_far - np.repeat(before, batch.lengths)
    return np.asarray(within * counted + positions.padding_idx)


class _RotaryTable:
    """Cosines and sines by position, grown to the longest input seen."""

    def __init__(self, rotary: Rotary) -> None:
        self._rotary = rotary
        self._tables = _rotary_rows(rotary.theta, rotary.head_dim, 512)

    def rows(
        self, lengths: NDArray[np.int64], offsets: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Cosines and sines of every token, float32 [T, head_dim / 2] each."""
        rotary, longest = self._rotary, int(lengths.max())
        tables = self._tables  # another thread may replace them, and by shorter ones
        if longest > len(tables[0]):
            size = 1 << (longest - 1).bit_length()
            self._tables = tables = _rotary_rows(rotary.theta, rotary.head_dim, size)
        cos, sin = (table[offsets] for table in tables)
        if rotary.factor is not None and longest > rotary.trained:
            ends = np.cumsum(lengths)
            for length, end in zip(lengths.tolist(), ends.tolist(), strict=True):
                if length > rotary.trained:
                    stretch = slice(end - length, end)
                    theta = _stretched_theta(rotary, length)
                    cos[stretch], sin[stretch] = _rotary_rows(theta, rotary.head_dim, length)
        return cos, sin


def _stretched_theta(rotary: Rotary, length: int) -> float:
    """Dynamic NTK scaling, as in NomicBERT and transformers' ``dynamic``."""
    assert rotary.factor is not None
    stretch = rotary.factor * length / rotary.trained - (rotary.factor - 1)
    return float(rotary.theta * stretch ** (rotary.head_dim / (rotary.head_dim - 2)))


def _rotary_rows(
    theta: float, head_dim: int, rows: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    # Angles grow to thousands, so float32 rounding shows in the result: the steps and their
    # precision are those of transformers' ``compute_default_rope_parameters``.
    powers = (theta ** (np.arange(0, head_dim, 2) / head_dim)).astype(np.float32)
    angles = np.arange(rows, dtype=np.float32)[:, None] * (np.float32(1) / powers)
    return np.cos(angles), np.sin(angles)


def _window(batch: Batch, window: int) -> dict[str, NDArray[Any]]:
    """Blocks of queries of one sequence each, and the keys that they can see.

    ``queries`` int64 [blocks, B] and ``keys`` int64 [blocks, S] are rows of the packed states,
    ``mask`` int32 [blocks, S] says which keys are there, ``band`` float32 [1, 1, B, S] is
    added to the scores, and ``rows`` int64 [T] finds each token among the blocks' queries.
    """
    lengths, longest = batch.lengths, batch.max_seqlen
    all_see_all = longest <= window + 1
    size, reach = (longest, 0) if all_see_all else (min(_BLOCK, longest), window)
    blocks = -(-lengths // size)
    sequence = np.repeat(np.arange(len(batch)), blocks)
    first_block = np.repeat(np.cumsum(blocks) - blocks, blocks)
    start = (np.arange(len(sequence)) - first_block) * size
    row, last = batch.cu_seqlens[sequence][:, None], lengths[sequence][:, None] - 1
    queries = start[:, None] + np.arange(size)
    keys = start[:, None] + np.arange(-reach, size + reach)
    distance = np.abs(np.arange(size)[:, None] + reach - np.arange(size + 2 * reach))
    band = np.where((distance <= window) | all_see_all, np.float32(0), _OUT_OF_SIGHT)
    return {
        # Beyond a sequence's end its last token stands in: finite, and masked or not used.
        "queries": row + np.minimum(queries, last),
        "keys": row + np.clip(keys, 0, last),
        "mask": ((keys >= 0) & (keys <= last)).astype(np.int32),
        "band": band[None, None],
        "rows": np.flatnonzero(queries <= last),
    }


def distance_buckets(length: int, buckets: int = 32, max_distance: int = 128) -> NDArray[np.int64]:
    """T5's bucket of every distance (Raffel et al., 2020), int64 [length, length]."""
    places = np.arange(length)
    distance = places[:, None] - places[None, :]
    half = buckets // 2
    exact = half // 2
    size = np.abs(distance)
    scale = np.float32(np.log(max_distance / exact))
    with np.errstate(divide="ignore"):
        logs = np.log(size.astype(np.float32) / np.float32(exact)) / scale
    large = exact + np.where(size < exact, 0, logs * np.float32(half - exact)).astype(np.int64)
    return np.where(distance < 0, half, 0) + np.where(
        size < exact, size, np.minimum(large, half - 1)
    )
