# SPDX-License-Identifier: MIT OR Apache-2.0
"""Where the real all-MiniLM-L6-v2 lies on this machine."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from embedding_server.models.hub import locate
from embedding_server.models.spec import parse_spec

__all__ = ["minilm_folder"]


@lru_cache
def minilm_folder() -> Path:
    """Its folder, in the hub's layout; never downloaded."""
    return locate(parse_spec("all-MiniLM-L6-v2"), download=False).folder
