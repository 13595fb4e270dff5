# SPDX-License-Identifier: MIT OR Apache-2.0
"""Sentence embeddings, over HTTP or in Python: exact to sentence-transformers, without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from embedding_server.embedder import Embedder

__all__ = ["Embedder", "__version__"]

__version__ = "0.2.0"


def __getattr__(name: str) -> object:
    # Imported on use: the command line's --help needs no model code.
    if name == "Embedder":
        from embedding_server.embedder import Embedder

        return Embedder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
