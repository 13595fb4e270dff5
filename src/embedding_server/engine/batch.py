# SPDX-License-Identifier: MIT OR Apache-2.0
"""Token ids on their way from the tokenizer to the backend, packed end to end."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = ["Batch", "Encoding", "Entry"]


@dataclass(frozen=True, slots=True)
class Encoding:
    """One input as the model sees it, special tokens and prompt included, cut to its limit."""

    ids: tuple[int, ...]
    total_tokens: int
    """The length before the cut."""
    prompt_tokens: int = 0
    """How many leading tokens belong to the prompt and are left out of pooling."""

    @property
    def truncated(self) -> bool:
        return self.total_tokens > len(self.ids)


@dataclass(slots=True)
class Entry:
    """One input that waits for inference, with all places in ``request`` that hold it."""

    request: Hashable
    places: tuple[int, ...]
    encoding: Encoding
    start: float = field(default=0.0, compare=False)
    """Start tag of fair queueing, in tokens of virtual time; set by the scheduler."""

    @property
    def length(self) -> int:
        return len(self.encoding.ids)


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences laid end to end, without padding.

    ``input_ids`` is int64 ``[T]``; sequence ``i`` is
    ``input_ids[cu_seqlens[i]:cu_seqlens[i + 1]]``, with ``cu_seqlens`` int64 ``[n + 1]``.
    ``prompt_lengths`` is int64 ``[n]``: leading tokens left out of pooling.
    """

    input_ids: NDArray[np.int64]
    cu_seqlens: NDArray[np.int64]
    prompt_lengths: NDArray[np.int64]
    max_seqlen: int

    @classmethod
    def from_encodings(cls, encodings: Sequence[Encoding]) -> Batch:
        """Pack ``encodings`` in their order; there must be at least one, none empty."""
        lengths = np.array([len(e.ids) for e in encodings], dtype=np.int64)
        cu_seqlens = np.zeros(len(encodings) + 1, dtype=np.int64)
        np.cumsum(lengths, out=cu_seqlens[1:])
        tokens = itertools.chain.from_iterable(e.ids for e in encodings)
        input_ids = np.fromiter(tokens, dtype=np.int64, count=int(cu_seqlens[-1]))
        prompt_lengths = np.array([e.prompt_tokens for e in encodings], dtype=np.int64)
        return cls(input_ids, cu_seqlens, prompt_lengths, int(lengths.max()))

    def __len__(self) -> int:
        return len(self.cu_seqlens) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sequence, int64 ``[n]``."""
        return np.diff(self.cu_seqlens)

    @property
    def tokens(self) -> int:
        """Tokens of all sequences together."""
        return int(self.cu_seqlens[-1])

    def padded(self, pad_id: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """``(input_ids, attention_mask)``, both int64 ``[n, max_seqlen]``, padded on the right."""
        mask = np.arange(self.max_seqlen) < self.lengths[:, None]
        ids = np.full(mask.shape, pad_id, dtype=np.int64)
        ids[mask] = self.input_ids
        return ids, mask.astype(np.int64)
