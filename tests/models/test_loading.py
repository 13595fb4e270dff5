# SPDX-License-Identifier: MIT OR Apache-2.0
"""Folders as they lie on real machines, in good and in bad order, to vectors or to a refusal."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from model_folders import COMMIT, export_onnx, put_in_cache
from safetensors.numpy import save_file
from tiny_models import TinyModel, load_reference, make_bert, make_nomic_bert, make_static

from embedding_server import Embedder
from embedding_server.engine.parameters import EmbedParams
from embedding_server.errors import InvalidRequest, ModelNotSupported, ModelUnavailable
from embedding_server.models.catalog import CATALOG

TEXTS = tiny_models.texts(8, seed=4, max_words=20)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # It reads the environment once, at its import, and other tests must not find it offline.
    import huggingface_hub.constants  # noqa: F401

    folder = tmp_path / "cache"
    monkeypatch.setenv("HF_HUB_CACHE", str(folder))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return folder


def assert_exact(model: TinyModel, name: str, **options: Any) -> Embedder:
    expected = load_reference(model).encode(TEXTS, normalize_embeddings=True)
    with Embedder(name, **options) as embedder:
        assert np.abs(embedder.embed(TEXTS) - expected).max() < 1e-5
    return embedder


@pytest.mark.parametrize("options", [{}, {"shards": 3}, {"dense": (24, "tanh")}], ids=str)
def test_a_model_in_the_hubs_cache(options: dict[str, Any], cache: Path, tmp_path: Path) -> None:
    model = make_bert(tmp_path / "bert", **options)
    put_in_cache(model.folder, cache, "org/tiny")
    embedder = assert_exact(model, "org/tiny", backend="onnx")
    assert embedder.info.backend == "onnx"
    assert embedder.info.revision == COMMIT


def test_an_onnx_file_in_the_hubs_cache(cache: Path, tmp_path: Path) -> None:
    model = make_bert(tmp_path / "bert")
    export_onnx(model, "onnx/model.onnx")
    put_in_cache(model.folder, cache, "org/tiny")
    embedder = assert_exact(model, "org/tiny", onnx_file="onnx/model.onnx")
    assert embedder.info.backend == "onnx-file"
    digest = hashlib.sha256((model.folder / "onnx" / "model.onnx").read_bytes()).hexdigest()
    assert embedder.info.sha256 == digest


def test_torch_needs_no_tokenizer_json(tmp_path: Path) -> None:
    """As transformers makes a tokenizer from the vocabulary."""
    model = make_bert(tmp_path / "bert")
    assert (model.folder / "vocab.txt").is_file()
    (model.folder / "tokenizer.json").unlink()
    with pytest.raises(ModelNotSupported, match=r"tokenizer\.json"):
        Embedder(str(model.folder), backend="onnx")
    assert assert_exact(model, str(model.folder)).info.backend == "torch"


def test_a_pickled_module_is_never_read(tmp_path: Path) -> None:
    import torch

    model = make_bert(tmp_path / "bert", dense=(24, "tanh"))
    dense = model.folder / "2_Dense"
    (dense / "model.safetensors").unlink()
    torch.save({"linear.weight": torch.zeros(24, 32)}, dense / "pytorch_model.bin")
    for backend in ("auto", "onnx", "torch"):
        with pytest.raises(ModelNotSupported, match="2_Dense"):
            Embedder(str(model.folder), backend=backend)


@pytest.mark.parametrize("damage", ["cut", "other-names", "other-shape"])
def test_damaged_dense_weights(damage: str, tmp_path: Path) -> None:
    folder = make_bert(tmp_path / "bert", dense=(24, "tanh")).folder
    file = folder / "2_Dense" / "model.safetensors"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        name = "linear.weight" if damage == "other-shape" else "weight"
        tensor = np.zeros((7, 5), np.float32)
        save_file({name: tensor, "linear.bias": np.zeros(24, np.float32)}, file)
    with pytest.raises(ModelNotSupported, match="2_Dense"):
        Embedder(str(folder), backend="onnx")


@pytest.mark.parametrize("damage", ["cut", "longer-header", "missing-tensor", "other-shape"])
def test_damaged_weights(damage: str, tmp_path: Path) -> None:
    folder = make_bert(tmp_path / "bert").folder
    file = folder / "model.safetensors"
    content = file.read_bytes()
    if damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "longer-header":
        file.write_bytes((2**40).to_bytes(8, "little") + content[8:])
    else:
        from safetensors.numpy import load_file

        tensors = load_file(file)
        name = "encoder.layer.1.output.dense.weight"
        if damage == "other-shape":
            tensors[name] = np.ascontiguousarray(tensors[name][:, 1:])
        else:
            del tensors[name]
        save_file(tensors, file)
    with pytest.raises(ModelNotSupported, match=r"model\.safetensors|output\.dense\.weight|bert"):
        Embedder(str(folder), backend="onnx")


def test_empty_prompts_of_a_saved_folder_leave_the_catalogs(tmp_path: Path) -> None:
    """sentence-transformers 6 saves an empty 'query' and 'document' for a model without any."""
    folder = make_nomic_bert(
        tmp_path / "nomic-embed-text-v1", hidden=96, prompts={"query": "", "document": ""}
    ).folder
    with Embedder(str(folder)) as embedder:
        by_type = embedder.embed(TEXTS, input_type="query")
        by_prompt = embedder.embed(TEXTS, prompt="search_query: ")
        assert np.abs(by_type - by_prompt).max() == 0
        assert np.abs(by_type - embedder.embed(TEXTS)).max() > 1e-3


def test_catalog_sizes_never_exceed_the_model(tmp_path: Path) -> None:
    folder = make_nomic_bert(tmp_path / "nomic-embed-text-v1.5", hidden=96).folder
    with Embedder(str(folder)) as embedder:
        assert embedder.info.dimensions == (64, 96)


def test_other_weights_under_a_name_with_a_known_digest(tmp_path: Path) -> None:
    """In shards they have no digest to compare, and so are not that model either."""
    name = "all-MiniLM-L6-v2"
    assert CATALOG[name].sha256 is not None
    for shards in (1, 3):
        target = tmp_path / str(shards) / name
        make_bert(target, shards=shards)
        with pytest.raises(ModelUnavailable, match="sha256"):
            Embedder(name, load_models_from=tmp_path / str(shards))


def test_a_static_table_shorter_than_its_vocabulary(tmp_path: Path) -> None:
    folder = make_static(tmp_path / "static").folder
    from safetensors.numpy import load_file

    table = load_file(folder / "model.safetensors")["embeddings"]
    save_file({"embeddings": np.ascontiguousarray(table[:50])}, folder / "model.safetensors")
    with pytest.raises(ModelNotSupported, match="don't belong together"):
        Embedder(str(folder))


def test_a_text_without_a_token_fails_alone(tmp_path: Path) -> None:
    """Where a tokenizer adds no special tokens, an empty text has none at all."""
    folder = make_bert(tmp_path / "bert").folder
    config = json.loads((folder / "tokenizer.json").read_text())
    config["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(config))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with Embedder(str(folder), backend="onnx") as embedder:
        assert embedder.embed(["one two"]).shape == (1, 32)
        with pytest.raises(InvalidRequest, match=r"input\[1\] has no token") as caught:
            embedder.embed_detailed(["one", ""], EmbedParams())
    assert caught.value.index == 1


def test_an_incomplete_copy(tmp_path: Path) -> None:
    """Without the pooling's config one would have to guess, and get other vectors."""
    folder = make_bert(tmp_path / "bert", pooling="cls").folder
    (folder / "1_Pooling" / "config.json").unlink()
    for backend in ("auto", "onnx", "torch"):
        with pytest.raises(ModelNotSupported, match=r"1_Pooling/config\.json is missing"):
            Embedder(str(folder), backend=backend)
