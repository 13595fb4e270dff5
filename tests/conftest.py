# SPDX-License-Identifier: MIT OR Apache-2.0
"""What many tests share: one live server with the real model, and its reference vectors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import tiny_models
from fake_backends import Blocked
from live import LiveServer, running_server
from numpy.typing import NDArray

from embedding_server.backends.base import BACKENDS

# A busy machine takes as long as it takes: time is no reason to fail.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")

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


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a BERT that is small enough to be loaded anew for a test, named tiny."""
    return tiny_models.make_bert(tmp_path_factory.mktemp("models") / "tiny").folder


@pytest.fixture
def blocked(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Blocked]]:
    """A backend in the place of onnx that loads, and computes once it is released."""
    monkeypatch.setitem(BACKENDS, "onnx", f"fake_backends:{Blocked.__name__}")
    Blocked.reset(load=True)
    yield Blocked
    Blocked.release()
