# SPDX-License-Identifier: MIT OR Apache-2.0
"""What the engine needs of a backend: a ``Batch`` in, one vector for each sequence out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import tokenizers
from numpy.typing import NDArray

from embedding_server.engine.batch import Batch

__all__ = ["Backend", "OwnTokenizer"]


@dataclass(frozen=True, slots=True)
class OwnTokenizer:
    """The tokenizer that a backend's own library has loaded for the model."""

    backend: tokenizers.Tokenizer
    special_ids: frozenset[int]
    pad_id: int | None
    keep_end: bool
    """Whether a text that is too long loses its beginning."""


class Backend(Protocol):
    """A loaded model; ``backends.base.load_backend`` makes one."""

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
    """The tokenizer that texts need; None: the one in the model's files."""

    def embed(self, batch: Batch, *, wide: bool = False) -> NDArray[np.float32]:
        """float32 [len(batch), dims], not normalised.

        ``wide`` says that no other batch runs, so that this one may take all cores. Called from
        several threads at a time, unless ``exclusive``.
        """
        ...
