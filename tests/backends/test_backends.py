# SPDX-License-Identifier: MIT OR Apache-2.0
"""The contract of every backend: sentence-transformers' vectors, whatever the model's shape."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from model_folders import export_onnx
from tiny_models import TinyModel, load_reference, make_bert

from embedding_server import Embedder
from embedding_server.errors import ModelNotSupported

SHAPES: dict[str, dict[str, Any]] = {
    "as-minilm": {},
    "cls-pooling": {"pooling": "cls"},
    "max-pooling": {"pooling": "max"},
    "two-poolings": {"pooling": ("cls", "mean")},
    "no-normalize": {"normalize": False},
    "relu": {"act": "relu"},
    "gelu-new": {"act": "gelu_new"},
    "two-heads": {"heads": 2},
    "eight-heads-wide": {"hidden": 96, "heads": 8, "intermediate": 160, "layers": 3},
    "dense": {"dense": (24, "tanh")},
    "written-by-v6": {"layout": "v6"},
}

BACKENDS = ("onnx", "onnx-file", "torch")

TEXTS = [*tiny_models.ODD_TEXTS, *tiny_models.texts(30, seed=3, max_words=70)]


@pytest.fixture(scope="module", params=SHAPES.values(), ids=SHAPES.keys())
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    made = make_bert(tmp_path_factory.mktemp("bert") / "bert", **request.param)
    export_onnx(made)
    return made


@pytest.fixture(params=BACKENDS)
def embedder(request: pytest.FixtureRequest, model: TinyModel) -> Any:
    options = {
        "onnx": {"backend": "onnx"},
        "onnx-file": {"onnx_file": "model.onnx"},
        "torch": {"backend": "torch"},
    }[request.param]
    with Embedder(str(model.folder), **options) as made:
        assert made.info.backend == request.param
        yield made


def test_agrees_with_sentence_transformers(embedder: Embedder, model: TinyModel) -> None:
    expected = load_reference(model).encode(TEXTS, normalize_embeddings=True)
    assert np.abs(embedder.embed(TEXTS) - expected).max() < 1e-5


def test_unscaled_output(embedder: Embedder, model: TinyModel) -> None:
    """What comes before a final Normalize, whether the model has one or not."""
    reference = load_reference(model)
    if type(reference[-1]).__name__ == "Normalize":
        del reference[-1]
    expected = reference.encode(TEXTS)
    found = embedder.embed(TEXTS, normalize=False)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_company_does_not_matter(embedder: Embedder) -> None:
    alone = np.concatenate([embedder.embed([text]) for text in TEXTS])
    assert np.abs(embedder.embed(TEXTS) - alone).max() < 1e-6


def test_batches_may_be_of_one_input(embedder: Embedder) -> None:
    assert embedder.embed([""]).shape == (1, embedder.info.dims)


def test_a_pickle_is_never_read(tmp_path: Path) -> None:
    import torch

    folder = make_bert(tmp_path / "pickled").folder
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    for backend in ("auto", "onnx", "torch"):
        with pytest.raises(ModelNotSupported, match=r"save_pretrained"):
            Embedder(str(folder), backend=backend)


def unknown_architecture(folder: Path, **options: Any) -> TinyModel:
    """A model that is BERT to sentence-transformers, of a name that no graph is built for."""
    made = make_bert(folder, **options)
    export_onnx(made, "onnx/model.onnx")
    return made


def test_auto_takes_the_models_own_file_where_no_graph_is_built(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = unknown_architecture(tmp_path / "bert")
    expected = load_reference(made).encode(TEXTS, normalize_embeddings=True)
    other = shutil.copytree(made.folder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "not-built"}))
    with pytest.raises(ModelNotSupported, match="--onnx-file onnx/model.onnx takes it"):
        Embedder(str(other))  # it may be older than the weights
    (other / "model.safetensors").unlink()
    with caplog.at_level(logging.INFO, "embedding_server"), Embedder(str(other)) as embedder:
        assert embedder.info.backend == "onnx-file"
        assert np.abs(embedder.embed(TEXTS) - expected).max() < 1e-5
    told = [record for record in caplog.records if "not-built" in record.getMessage()]
    assert len(told) == 1


def test_auto_goes_to_torch_for_what_is_not_computed_here(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = make_bert(tmp_path / "bert", normalize=False)
    modules = json.loads((made.folder / "modules.json").read_text())
    modules.append(
        {
            "idx": len(modules),
            "name": "norm",
            "path": "2_LayerNorm",
            "type": "sentence_transformers.models.LayerNorm",
        }
    )
    (made.folder / "modules.json").write_text(json.dumps(modules))
    from safetensors.numpy import save_file

    (made.folder / "2_LayerNorm").mkdir()
    (made.folder / "2_LayerNorm" / "config.json").write_text(json.dumps({"dimension": 32}))
    ramp = np.linspace(0.5, 1.5, 32, dtype=np.float32)
    save_file(
        {"norm.weight": ramp, "norm.bias": ramp},
        made.folder / "2_LayerNorm" / "model.safetensors",
    )
    expected = load_reference(made).encode(TEXTS, normalize_embeddings=True)
    with caplog.at_level(logging.INFO, "embedding_server"), Embedder(str(made.folder)) as embedder:
        assert embedder.info.backend == "torch"
        assert np.abs(embedder.embed(TEXTS) - expected).max() < 1e-5
    assert sum("LayerNorm" in record.getMessage() for record in caplog.records) == 1
    with pytest.raises(ModelNotSupported, match="LayerNorm"):
        Embedder(str(made.folder), backend="onnx")


def test_an_onnx_file_that_is_not_there(tmp_path: Path) -> None:
    made = make_bert(tmp_path / "bert")
    with pytest.raises(ModelNotSupported, match=r"onnx/other\.onnx"):
        Embedder(str(made.folder), onnx_file="onnx/other.onnx")


def test_an_onnx_file_outside_the_folder(tmp_path: Path) -> None:
    made = make_bert(tmp_path / "bert")
    export_onnx(made)
    shutil.move(made.folder / "model.onnx", tmp_path / "model.onnx")
    with pytest.raises(ModelNotSupported, match=r"\.\./model\.onnx"):
        Embedder(str(made.folder), onnx_file="../model.onnx")


@pytest.mark.parametrize("backend", ["onnx", "torch"])
def test_an_activation_that_does_not_exist_is_refused_by_name(backend: str, tmp_path: Path) -> None:
    made = make_bert(tmp_path / "bert", act="gelu_13")
    with pytest.raises(ModelNotSupported, match=r"config\.json.*hidden_act.*'gelu_13'"):
        Embedder(str(made.folder), backend=backend)
