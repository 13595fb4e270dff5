# SPDX-License-Identifier: MIT OR Apache-2.0
"""``models verify`` and ``models info``, as a user runs them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from hub_standin import MAIN_COMMIT, HubStandIn
from live import run_cli
from model_folders import export_onnx
from safetensors.numpy import load_file, save_file
from tiny_models import FAMILIES, load_reference, make_bert, make_nomic_bert

from embedding_server.commands import verify
from embedding_server.embedder import Embedder
from embedding_server.engine.postprocess import postprocess
from embedding_server.models.reference import REFERENCE_FILE, ReferenceVectors


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


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("family", ["bert", "static"])
def test_half_precision_is_compared_in_float32(family: str, dtype: str, tmp_path: Path) -> None:
    folder = FAMILIES[family](tmp_path / family, dtype=dtype).folder
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


# ---------------------------------------------------------------------------------------- --write


def test_reference_vectors_for_the_next_start(tmp_path: Path) -> None:
    """A model with a default prompt: its reference vectors have none."""
    model = make_bert(
        tmp_path / "tiny", prompts={"query": "the water "}, default_prompt_name="query"
    )
    command = ("models", "verify", str(model.folder), "--write", str(model.folder))
    path = model.folder / REFERENCE_FILE
    for _ in range(2):  # the same vectors are left as they are
        done = run_cli(*command)
        assert done.returncode == 0, done.stderr.decode()
        assert done.stdout.decode().endswith(f"exact\n{path}\n")
    assert [file.name for file in model.folder.iterdir() if ".part" in file.name] == []
    written = ReferenceVectors.read(path)
    assert 8 < len(written.texts) == len(set(written.texts))
    assert set(written.texts) < set(verify.TEXTS)
    truth = load_reference(model).encode(list(written.texts), prompt="", normalize_embeddings=True)
    assert np.abs(written.vectors - truth).max() < 1e-6
    started = run_cli("embed", "--model", str(model.folder), stdin=b"text\n")
    assert f"self-check: {len(written.texts)} texts within" in started.stderr.decode()


def test_reference_vectors_of_a_model_that_is_layer_normalised(tmp_path: Path) -> None:
    """sentence-transformers leaves that to its caller, and the catalog says it of this name."""
    folder = make_nomic_bert(tmp_path / "nomic-embed-text-v1.5", hidden=96, layout="v6").folder
    expected = make_bert(tmp_path / "bert", hidden=96).folder
    with Embedder(str(folder)) as embedder:
        result = verify.verify_vectors(embedder, expected)
        path = verify.write_reference(result, tmp_path / "new" / "folder")
    texts, vectors = ReferenceVectors.read(path).texts, ReferenceVectors.read(path).vectors
    with Embedder(str(expected)) as embedder:
        unscaled = embedder.embed(texts, normalize=False)
    assert np.abs(postprocess(unscaled, layer_norm_first=True) - vectors).max() < 1e-5


def test_other_vectors_are_never_overwritten(tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("two", 2)):
        make_bert(tmp_path / name, seed=seed)
    to = tmp_path / "to"
    run_cli("models", "verify", str(tmp_path / "one"), "--write", str(to))
    before = (to / REFERENCE_FILE).read_bytes()
    done = run_cli("models", "verify", str(tmp_path / "two"), "--write", str(to))
    assert done.returncode == 2
    assert b"is there already, with other vectors than those of two: remove it" in done.stderr
    assert (to / REFERENCE_FILE).read_bytes() == before


def test_of_a_model_that_is_not_exact_nothing_is_written(tmp_path: Path) -> None:
    """Its folder brings the graph of another one."""
    model, other = make_bert(tmp_path / "tiny"), make_bert(tmp_path / "other", seed=5)
    export_onnx(other, "onnx/model.onnx")
    shutil.copytree(other.folder / "onnx", model.folder / "onnx")
    flags = ("--onnx-file", "onnx/model.onnx", "--write", str(tmp_path / "to"))
    done = run_cli("models", "verify", str(model.folder), *flags)
    assert done.returncode == 1
    assert b"NOT EXACT" in done.stdout
    assert not (tmp_path / "to").exists()


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    model = make_bert(tmp_path / "tiny")
    (tmp_path / "file").touch()
    to = tmp_path / "file" / "folder"
    done = run_cli("models", "verify", str(model.folder), "--write", str(to))
    assert done.returncode == 2
    assert b"could not be written (Not a directory)" in done.stderr
    assert b"Traceback" not in done.stderr


# -------------------------------------------------------------------------------------- a revision


@pytest.mark.parametrize("given", ["environment", "file", "name"])
def test_both_sides_are_of_the_same_revision(given: str, tmp_path: Path) -> None:
    new, old = (
        make_bert(tmp_path / name, seed=seed).folder for name, seed in [("new", 1), ("old", 2)]
    )
    commit = 40 * "a"
    config = tmp_path / "settings.toml"
    config.write_text('revision = "v1"\n' if given == "file" else "")
    with HubStandIn({"org/tiny": new}, folders={commit: old}) as hub:
        hub.commits["v1"] = commit
        env = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
        if given == "environment":
            env["EMBEDDING_SERVER_REVISION"] = "v1"
        name = "org/tiny@v1" if given == "name" else "org/tiny"
        done = run_cli("models", "verify", name, "--config", str(config), env=env)
        assert done.returncode == 0, done.stderr.decode() + done.stdout.decode()
        assert len(hub.asked(part="org/tiny/resolve")) > 0
        assert hub.asked(part=f"resolve/{MAIN_COMMIT}") == []
        info = run_cli("models", "info", name, "--config", str(config), env=env)
    assert f"revision          {commit}" in info.stdout.decode()
