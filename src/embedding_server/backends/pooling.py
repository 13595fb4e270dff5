# SPDX-License-Identifier: MIT OR Apache-2.0
"""Token states to one vector a sequence, as sentence-transformers' ``Pooling`` does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedding_server.engine.batch import Batch

__all__ = ["POOLINGS", "pool"]

States = NDArray[np.float32]
"""float32 [tokens, hidden]: one sequence's last hidden states, the prompt's included."""
Pooling = Callable[[States, int], NDArray[np.floating[Any]]]
"""``(states, tokens of the prompt to leave out) -> [hidden]``."""


def _cls(states: States, prompt: int) -> NDArray[np.floating[Any]]:
    return np.asarray(states[prompt if prompt < len(states) else 0])


def _last(states: States, prompt: int) -> NDArray[np.floating[Any]]:
    # sentence-transformers gives zeros where nothing but the prompt is left.
    return np.asarray(states[-1] if prompt < len(states) else np.zeros_like(states[-1]))


def _max(states: States, prompt: int) -> NDArray[np.floating[Any]]:
    return np.asarray(states[prompt:].max(axis=0, initial=-np.inf))


def _sum(states: States) -> NDArray[np.floating[Any]]:
    # Row after row in float32 loses digits over thousands of tokens; float64 costs nothing
    # beside the model.
    return np.asarray(np.add.reduce(states, axis=0, dtype=np.float64))


def _mean(states: States, prompt: int) -> NDArray[np.floating[Any]]:
    return np.asarray(_sum(states[prompt:]) / max(len(states) - prompt, 1e-9))


def _mean_sqrt_len(states: States, prompt: int) -> NDArray[np.floating[Any]]:
    return np.asarray(_sum(states[prompt:]) / np.sqrt(max(len(states) - prompt, 1e-9)))


def _weighted_mean(states: States, prompt: int) -> NDArray[np.floating[Any]]:
    weights = np.arange(1, len(states) + 1, dtype=np.float64)[prompt:]
    return np.asarray(weights @ states[prompt:] / max(weights.sum(), 1e-9))


POOLINGS: Mapping[str, Pooling] = {
    "cls": _cls,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt_len,
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}
"""sentence-transformers' names of the pooling modes."""


def pool(states: States, batch: Batch, modes: Sequence[str]) -> NDArray[np.float32]:
    """Packed ``states`` [T, hidden] to float32 [n, hidden * len(modes)]."""
    hidden = states.shape[1]
    pooled = np.empty((len(batch), hidden * len(modes)), dtype=np.float32)
    bounds = batch.cu_seqlens.tolist()
    prompts = batch.prompt_lengths.tolist()
    for place, mode in enumerate(modes):
        pooling = POOLINGS[mode]
        columns = slice(place * hidden, (place + 1) * hidden)
        for row, prompt in enumerate(prompts):
            pooled[row, columns] = pooling(states[bounds[row] : bounds[row + 1]], prompt)
    return pooled
