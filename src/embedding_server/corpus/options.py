# SPDX-License-Identifier: MIT OR Apache-2.0
"""The options of a run over a corpus, in one process or on a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from embedding_server.engine.parameters import EmbedParams

__all__ = ["CorpusOptions"]


@dataclass(frozen=True, slots=True)
class CorpusOptions:
    """What to read, where to write, and the options of every vector."""

    files: Sequence[str]
    params: EmbedParams
    output: str = "-"
    field: str | None = None
    """The key of a JSON line, or the column of a table, that holds the text."""
