"""What many tests share: one live server with the real model, and its reference vectors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from live import LiveServer, running_server
from numpy.typing import NDArray

GOLDEN = Path(__file__).parent / "data" / "all-MiniLM-L6-v2.npz"


@pytest.fixture(scope="session")
def server() -> Iterator[LiveServer]:
    """A server of the real all-MiniLM-L6-v2 that tests share, and so must not disturb."""
    with running_server("--model", "all-MiniLM-L6-v2") as live:
        yield live


@pytest.fixture(scope="session")
def golden() -> tuple[list[str], NDArray[np.float32]]:
    """141 texts and what sentence-transformers makes of them, float32 [141, 384]."""
    with np.load(GOLDEN) as data:
        return [str(text) for text in data["texts"]], data["embeddings"]
