# SPDX-License-Identifier: MIT OR Apache-2.0
"""``embedding-server bench engine``, and the arithmetic behind its figures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models as tiny
from live import run_cli
from minilm import minilm_folder
from safetensors import safe_open
from tiny_models import FAMILIES

from embedding_server.backends.architectures import Architecture, Attention, architecture_of
from embedding_server.commands.bench.operations import ModelCost, linear_weights, useful_operations
from embedding_server.commands.bench.peak import machine_peak
from embedding_server.models.layout import read_layout


def architecture(folder: Path) -> Architecture:
    return architecture_of(read_layout(folder).pipeline.config)


def with_attention(attention: Attention) -> Architecture:
    """MiniLM with a single layer of another attention."""
    return replace(architecture(minilm_folder()), attention=(attention,))


# --------------------------------------------------------------------------------------- operations


def test_minilm_needs_21_million_operations_a_token() -> None:
    mini = architecture(minilm_folder())
    assert linear_weights(mini) == 6 * (4 * 384 * 384 + 2 * 384 * 1536)
    assert 2 * linear_weights(mini) == pytest.approx(21.2e6, rel=0.01)
    assert useful_operations(mini, 1) == 2 * linear_weights(mini) + 6 * 4 * 384
    assert useful_operations(mini, 100) == 200 * linear_weights(mini) + 6 * 4 * 384 * 100**2


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "static"])
def test_the_weights_are_those_of_the_file(family: str, tmp_path: Path) -> None:
    """Every matrix of a layer counts once, and nothing else does."""
    model = FAMILIES[family](tmp_path / "model")
    found = architecture(model.folder)
    prefix = found.tensors.layer.partition("{}")[0]
    with safe_open(model.folder / "model.safetensors", "numpy") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    matrices = [shape for name, shape in shapes.items() if prefix in name and len(shape) == 2]
    assert linear_weights(found) == sum(rows * columns for rows, columns in matrices)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 9, 40])
@pytest.mark.parametrize(
    "attention", [Attention(), Attention(causal=True), Attention(window=3), Attention(window=8)]
)
def test_attention_counts_pairs_that_see_each_other(attention: Attention, length: int) -> None:
    found = with_attention(attention)
    pairs = sum(
        (not attention.causal or key <= query)
        and (attention.window is None or abs(query - key) <= attention.window)
        for query in range(length)
        for key in range(length)
    )
    attended = useful_operations(found, length) - 2 * linear_weights(found) * length
    assert attended == 4 * 384 * pairs


def test_costs_are_those_of_the_tokens_as_served(tmp_path: Path) -> None:
    """Special tokens count, and what is cut doesn't."""
    model = tiny.make_bert(tmp_path / "tiny", max_seq_length=16)
    cost = ModelCost(read_layout(model.folder))
    (encoding,) = cost.tokenizer.encode(["river"])
    request = cost.of_request(["river", "river " * 100])
    assert request.tokens == len(encoding.ids) + 16
    assert request.operations == sum(
        useful_operations(cost.architecture, length) for length in (len(encoding.ids), 16)
    )


def test_costs_of_a_model_that_is_not_here() -> None:
    assert ModelCost.of_model("nobody/has-this", None) is None
    assert ModelCost.of_model("no model at all", None) is None
    assert ModelCost.of_model("all-MiniLM-L6-v2", None) is not None


def test_costs_of_a_model_without_layers(tmp_path: Path) -> None:
    static = tiny.make_static(tmp_path / "static")
    assert ModelCost.of_model(str(static.folder), None) is None


# --------------------------------------------------------------------------------------------- peak


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_the_peak_without_a_compiler(compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or with one that fails."""
    monkeypatch.setenv("CC", compiler)
    with machine_peak(1) as peak:
        assert peak.source == "matrix product 512 x 384 x 1536 of ONNX Runtime"
        assert peak.measure() > 0


# ------------------------------------------------------------------------------------------ command


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return str(tiny.make_bert(folder, max_positions=64).folder)


def test_engine(model: str) -> None:
    """Batches of 512 tokens, and of the budget in use; never longer than the model's positions."""
    done = run_cli(
        *("bench", "engine", "--model", model, "--threads", "1", "--rounds", "1"),
        *("--max-batch-tokens", "100"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == b""
    *table, line = done.stdout.decode().splitlines()
    result = json.loads(line)
    assert result["benchmark"] == "engine"
    assert (result["model"], result["backend"], result["threads"]) == ("tiny", "onnx", 1)
    assert (result["max_batch_tokens"], result["rounds"]) == (100, 1)
    assert result["machine"]["cores"] >= 1
    assert result["peak"]["gflops"] > 0
    assert any(result["peak"]["source"] in row for row in table)
    shapes = {shape["batch"]: shape for shape in result["shapes"]}
    assert list(shapes) == [
        *("pair", "query", "16 of 32", "8 of 64", "mixed, to 512"),
        *("3 of 32", "1 of 64", "mixed, to 100"),
    ]
    for name, shape in shapes.items():
        assert shape["tokens_per_second"] == pytest.approx(
            shape["at_once"] * shape["tokens"] / shape["ms"] * 1000, rel=0.01
        )
        assert shape["share_of_peak"] == pytest.approx(
            shape["gflops_useful"] / result["peak"]["gflops"], rel=0.01
        )
        assert any(row.startswith(name) for row in table)
    uniform = shapes["16 of 32"]
    operations = 16 * useful_operations(architecture(Path(model)), 32)
    assert (uniform["tokens"], uniform["batches"]) == (512, 1)
    assert uniform["gflops_useful"] == pytest.approx(operations / uniform["ms"] / 1e6, rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--model", "a/b", "--model", "c/d"), "One model"),
        (("--model", "no model"), "is no model"),
    ],
)
def test_engine_says_what_is_wrong(arguments: tuple[str, ...], told: str) -> None:
    done = run_cli("bench", "engine", *arguments)
    assert done.returncode == 1
    assert told in done.stderr.decode()
    assert done.stdout == b""


def test_engine_refuses_a_model_without_layers(tmp_path: Path) -> None:
    done = run_cli("bench", "engine", "--model", str(tiny.make_static(tmp_path / "s").folder))
    assert done.returncode == 1
    assert b"not built here" in done.stderr


def test_engine_takes_no_option_of_a_server_in_silence() -> None:
    done = run_cli("bench", "--duration", "3", "--max-queued-tokens", "9", "engine")
    assert done.returncode == 1
    assert b"doesn't take --duration, --max-queued-tokens" in done.stderr
