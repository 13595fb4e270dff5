# SPDX-License-Identifier: MIT OR Apache-2.0
"""A fingerprint is the same wherever a model's files lie, and another for any other vectors."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from hub_standin import HubStandIn
from live import run_cli
from minilm import minilm_folder
from model_folders import export_onnx, put_in_cache
from safetensors.numpy import load_file, save_file
from tiny_models import make_bert, make_nomic_bert, make_static

from embedding_server import Embedder
from embedding_server.models import fingerprint
from embedding_server.models.pull import pull
from embedding_server.models.spec import parse_spec

MINILM = "38cd28ffc5109ca5"


def of(model: Path | str, **options: Any) -> str:
    with Embedder(str(model), **{"threads": 1, "backend": "onnx", **options}) as embedder:
        return embedder.info.fingerprint


def edit(file: Path, **values: Any) -> None:
    """Set keys of a JSON file, which is then on one line."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def turn_a_byte(file: Path) -> None:
    """The last one, which is of a tensor's value."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_bert(
        tmp_path / "tiny", dense=(24, "tanh"), prompts={"query": "q: "}, max_seq_length=32
    ).folder


# ------------------------------------------------------------------------------------- the same


def test_the_real_model_has_this_one_everywhere(tmp_path: Path) -> None:
    """Whoever stores vectors holds them against it: a change of it asks them to start anew."""
    assert of("all-MiniLM-L6-v2") == MINILM
    assert of("all-MiniLM-L6-v2", backend="torch") == MINILM
    copied = shutil.copytree(minilm_folder(), tmp_path / "some name")
    assert of(copied) == MINILM


def test_the_command_line_shows_it() -> None:
    done = run_cli("models", "info", "all-MiniLM-L6-v2")
    assert f"fingerprint       {MINILM}\n" in done.stdout.decode()


def test_every_place_and_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It reads the environment once, at its import, and other tests must not find it offline.
    import huggingface_hub.constants  # noqa: F401

    expected = of(folder)
    pull(parse_spec(str(folder)), tmp_path / "models")
    assert of("org/tiny", load_models_from=tmp_path / "models") == expected
    put_in_cache(folder, tmp_path / "cache", "org/other-name")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    assert of("org/other-name") == expected
    with HubStandIn({"org/third": folder}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        assert of("org/third") == expected


@pytest.mark.parametrize("layout", ["hub", "v6"])
def test_every_backend(layout: str, tmp_path: Path) -> None:
    bert = make_bert(tmp_path / "bert", layout=layout, dense=(24, "tanh"), shards=2).folder
    assert of(bert) == of(bert, backend="torch")
    static = make_static(tmp_path / "static", layout=layout, dense=(24, "identity")).folder
    assert of(static) == of(static, backend="torch")


def test_how_a_model_is_run(folder: Path) -> None:
    expected = of(folder)
    assert of(folder, threads=2, max_batch_tokens=7, matryoshka=[8, 16]) == expected


HARMLESS: dict[str, Callable[[Path], object]] = {
    "readme": lambda f: (f / "README.md").write_text("A model."),
    "times": lambda f: [os.utime(file, (1, 1)) for file in f.rglob("*")],
    "spelling": lambda f: [edit(f / n) for n in ("config.json", "tokenizer_config.json")],
    "version": lambda f: edit(
        f / "config.json", transformers_version="9", architectures=["Other"], torch_dtype="float16"
    ),
    "tokenizer": lambda f: edit(f / "tokenizer_config.json", name_or_path="/x", is_local=False),
    "pickle": lambda f: (f / "2_Dense" / "pytorch_model.bin").write_bytes(b"other form"),
    "vocabulary": lambda f: (f / "vocab.txt").write_text("not read beside tokenizer.json"),
    "folder-of-a-module": lambda f: (
        (f / "2_Dense").rename(f / "3_Dense"),
        (f / "modules.json").write_text((f / "modules.json").read_text().replace("2_D", "3_D")),
    ),
    "pooling-spelt-anew": lambda f: (f / "1_Pooling" / "config.json").write_text(
        '{"embedding_dimension": 32, "pooling_mode": "mean"}'
    ),
    "a-checkpoint": lambda f: shutil.copytree(f / "2_Dense", f / "checkpoint-10"),
}


@pytest.mark.parametrize("change", HARMLESS.values(), ids=HARMLESS.keys())
def test_what_changes_no_vector(change: Callable[[Path], object], folder: Path) -> None:
    before = of(folder)
    change(folder)
    assert of(folder) == before


# ---------------------------------------------------------------------------------------- another

CHANGES: dict[str, Callable[[Path], object]] = {
    "weights": lambda f: turn_a_byte(f / "model.safetensors"),
    "dense-weights": lambda f: turn_a_byte(f / "2_Dense" / "model.safetensors"),
    "dense-activation": lambda f: edit(
        f / "2_Dense" / "config.json",
        activation_function="torch.nn.modules.linear.Identity",
    ),
    "config": lambda f: edit(f / "config.json", layer_norm_eps=1e-7),
    "pooling": lambda f: edit(
        f / "1_Pooling" / "config.json", pooling_mode_cls_token=True, pooling_mode_mean_tokens=False
    ),
    "include-prompt": lambda f: edit(f / "1_Pooling" / "config.json", include_prompt=False),
    "normalisation": lambda f: (f / "modules.json").write_text(
        json.dumps(json.loads((f / "modules.json").read_text())[:-1])
    ),
    "max-seq-length": lambda f: edit(f / "sentence_bert_config.json", max_seq_length=33),
    "lowercase": lambda f: edit(f / "sentence_bert_config.json", do_lower_case=True),
    "prompt": lambda f: edit(
        f / "config_sentence_transformers.json", prompts={"query": "question: "}
    ),
    "default-prompt": lambda f: edit(
        f / "config_sentence_transformers.json", default_prompt_name="query"
    ),
    "tokenizer": lambda f: (f / "tokenizer.json").write_text(
        (f / "tokenizer.json").read_text().replace("##", "@@")
    ),
    "tokenizer-config": lambda f: edit(f / "tokenizer_config.json", do_lower_case=False),
    "special-tokens": lambda f: edit(f / "special_tokens_map.json", mask_token="[UNK]"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_changes_vectors(change: Callable[[Path], object], folder: Path) -> None:
    before = of(folder)
    change(folder)
    assert of(folder) != before


def test_every_shard_counts(tmp_path: Path) -> None:
    folder = make_bert(tmp_path / "tiny", shards=3).folder
    seen = {of(folder)}
    for shard in sorted(folder.glob("model-*.safetensors")):
        turn_a_byte(shard)
        seen.add(of(folder))
    assert len(seen) == 4


def test_the_table_of_a_static_model(tmp_path: Path) -> None:
    folder = make_static(tmp_path / "static").folder
    before = of(folder)
    edit(folder / "config.json", seq_length=5)  # which nothing reads
    assert of(folder) == before
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, folder / "model.safetensors")
    assert of(folder) != before


def test_the_pooling_that_a_plain_transformers_folder_gets(tmp_path: Path) -> None:
    """``architectures`` decides it, and counts by that alone."""
    folder = make_bert(
        tmp_path / "tiny", pooling="mean", normalize=False, max_seq_length=None
    ).folder
    with_modules = of(folder)
    (folder / "modules.json").unlink()
    assert of(folder) == with_modules
    edit(folder / "config.json", architectures=["BertForCausalLM"])
    assert of(folder) != with_modules


def test_the_tokenizer_that_torch_makes_of_a_vocabulary(tmp_path: Path) -> None:
    folder = make_bert(tmp_path / "tiny").folder
    (folder / "tokenizer.json").unlink()
    before = of(folder, backend="torch")
    words = (folder / "vocab.txt").read_text().splitlines()
    (folder / "vocab.txt").write_text("\n".join([*words[:-2], words[-1], words[-2]]) + "\n")
    assert of(folder, backend="torch") != before


def test_what_the_catalog_adds(tmp_path: Path) -> None:
    """The three have the same files; the catalog gives two of them prompts, and one a norm."""
    model = make_nomic_bert(tmp_path / "plain", hidden=96).folder
    names = ("nomic-embed-text-v1", "nomic-embed-text-v1.5")
    folders = [model, *(shutil.copytree(model, tmp_path / name) for name in names)]
    assert len({of(folder) for folder in folders}) == 3


def test_a_graph_of_the_models_own(tmp_path: Path) -> None:
    """With its external data, whatever that file is called."""
    model = make_bert(tmp_path / "tiny")
    export_onnx(model, "onnx/model.onnx")
    graph = model.folder / "onnx" / "model.onnx"
    built = of(model.folder)
    inside = of(model.folder, onnx_file="onnx/model.onnx")
    (graph.parent / "README.md").write_text("not of the graph")
    assert inside == of(model.folder, onnx_file="onnx/model.onnx") != built
    turn_a_byte(model.folder / "model.safetensors")  # which is not read then
    assert of(model.folder, onnx_file="onnx/model.onnx") == inside

    onnx.save_model(
        onnx.load(graph),
        graph,
        save_as_external_data=True,
        location="tensors.bin",
        size_threshold=0,
    )
    outside = of(model.folder, onnx_file="onnx/model.onnx")
    turn_a_byte(graph.parent / "tensors.bin")
    assert len({inside, outside, of(model.folder, onnx_file="onnx/model.onnx")}) == 3


def test_the_arithmetic(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = of(folder)
    monkeypatch.setattr(fingerprint, "ARITHMETIC", fingerprint.ARITHMETIC + 1)
    assert of(folder) != before


def test_its_form(tiny_model: Path) -> None:
    assert re.fullmatch("[0-9a-f]{16}", of(tiny_model))
