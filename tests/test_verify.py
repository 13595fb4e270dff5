# SPDX-License-Identifier: MIT OR Apache-2.0
"""``models verify`` and ``models info``, as a user runs them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from live import run_cli
from safetensors.numpy import load_file, save_file
from tiny_models import FAMILIES, make_bert

from embedding_server import verify
from embedding_server.embedder import Embedder


def test_the_real_model_is_exact() -> None:
    done = run_cli("models", "verify", "all-MiniLM-L6-v2")
    told = done.stdout.decode()
    assert done.returncode == 0, done.stderr.decode()
    assert "verdict                exact" in told
    assert "maximum error" in told and "texts/s" in told


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "nomic_bert"])
def test_every_family_is_exact(family: str, tmp_path: Path) -> None:
    """NomicBERT's folder can't be read by transformers, whose class knows other fields."""
    folder = FAMILIES[family](tmp_path / family).folder
    with Embedder(str(folder), backend="onnx" if family != "static" else "auto") as embedder:
        result = verify.verify_vectors(embedder, folder)
    assert result.exact, result


def test_a_wrong_vector_is_found(tmp_path: Path) -> None:
    """The embedder of one model against the files of another."""
    right = make_bert(tmp_path / "right").folder
    wrong = make_bert(tmp_path / "wrong").folder
    tensors = load_file(wrong / "model.safetensors")
    name = "embeddings.word_embeddings.weight"
    save_file({**tensors, name: tensors[name] * np.float32(1.001)}, wrong / "model.safetensors")
    with Embedder(str(wrong)) as embedder:
        result = verify.verify_vectors(embedder, right)
    assert not result.exact
    assert 1e-5 < result.max_error < 0.1


def test_info(tmp_path: Path) -> None:
    done = run_cli("models", "info", "all-MiniLM-L6-v2", "--matryoshka", "all-MiniLM-L6-v2=64,128")
    told = dict(line.split(maxsplit=1) for line in done.stdout.decode().splitlines())
    assert done.returncode == 0
    assert told["architecture"] == "bert"
    assert told["dimensions"] == "384"
    assert told["Matryoshka"] == "sizes  64, 128"
    assert told["backend"] == "onnx (its graph is built here)"
    assert told["sha256"].startswith("53aa5117")


def test_info_tells_why_another_backend_was_taken(tmp_path: Path) -> None:
    folder = make_bert(tmp_path / "bert", act="mish").folder
    done = run_cli("models", "info", str(folder))
    assert "torch (nothing lighter computes it" in done.stdout.decode()
    assert "hidden_act 'mish' is not supported" in done.stdout.decode()


def test_unknown_model() -> None:
    for action, code in (("info", 1), ("verify", 2)):
        done = run_cli("models", action, "nothing-like-it")
        assert done.returncode == code
        assert b"nothing-like-it" in done.stderr
        assert b"Traceback" not in done.stderr
