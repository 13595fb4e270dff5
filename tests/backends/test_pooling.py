# SPDX-License-Identifier: MIT OR Apache-2.0
"""Pooling and dense layers in numpy against sentence-transformers' own modules."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from sentence_transformers.base.modules import Dense
from sentence_transformers.sentence_transformer.modules import Pooling

from embedding_server.backends.base import Module, Pipeline
from embedding_server.backends.head import Head, pooling_modes
from embedding_server.backends.pooling import POOLINGS, pool
from embedding_server.engine.batch import Batch, Encoding
from embedding_server.errors import ModelNotSupported

HIDDEN = 24
LENGTHS = [1, 2, 7, 64, 3, 300]


def batch_of(lengths: Sequence[int], prompts: Sequence[int] | None = None) -> Batch:
    prompts = prompts or [0] * len(lengths)
    return Batch.from_encodings(
        [
            Encoding((1,) * length, length, prompt_tokens=prompt)
            for length, prompt in zip(lengths, prompts, strict=True)
        ]
    )


def states_of(batch: Batch, hidden: int = HIDDEN) -> NDArray[np.float32]:
    return np.random.default_rng(9).normal(0.1, 2, (batch.tokens, hidden)).astype(np.float32)


def reference(
    states: NDArray[np.float32], batch: Batch, module: Pooling, prompt: int = 0
) -> NDArray[np.float32]:
    """sentence-transformers' vectors, from padded states; the padding holds what must not count."""
    _, mask = batch.padded(0)
    padded = np.full((*mask.shape, states.shape[1]), 1e6, dtype=np.float32)
    padded[mask.astype(bool)] = states
    features: dict[str, Any] = {
        "token_embeddings": torch.from_numpy(padded),
        "attention_mask": torch.from_numpy(mask),
    }
    if prompt:
        features["prompt_length"] = prompt
    vectors: NDArray[np.float32] = module(features)["sentence_embedding"].numpy()
    return vectors


def assert_close(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> None:
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------- pooling


def test_every_mode_of_sentence_transformers_is_there() -> None:
    assert set(POOLINGS) == set(Pooling.POOLING_MODES)


@pytest.mark.parametrize("mode", POOLINGS)
def test_pooling(mode: str) -> None:
    batch = batch_of(LENGTHS)
    states = states_of(batch)
    assert_close(pool(states, batch, [mode]), reference(states, batch, Pooling(HIDDEN, mode)))


@pytest.mark.parametrize("mode", POOLINGS)
@pytest.mark.parametrize("prompt", [1, 2, 5])
def test_pooling_without_the_prompt(mode: str, prompt: int) -> None:
    lengths = [prompt + 1, prompt + 2, 20, 64]
    batch = batch_of(lengths, [prompt] * len(lengths))
    states = states_of(batch)
    module = Pooling(HIDDEN, mode, include_prompt=False)
    assert_close(pool(states, batch, [mode]), reference(states, batch, module, prompt))


@pytest.mark.parametrize("mode", POOLINGS)
def test_each_sequence_has_its_own_prompt(mode: str) -> None:
    batch = batch_of([9, 9, 9], [0, 3, 8])
    states = states_of(batch)
    together = pool(states, batch, [mode])
    for row, prompt in enumerate([0, 3, 8]):
        alone = pool(states[row * 9 : row * 9 + 9], batch_of([9], [prompt]), [mode])
        np.testing.assert_array_equal(together[row : row + 1], alone)


@pytest.mark.parametrize("mode", ["cls", "mean", "mean_sqrt_len_tokens", "weightedmean", "max"])
def test_a_sequence_that_is_all_prompt(mode: str) -> None:
    """It has no vector, or none that is finite, and its neighbours keep theirs."""
    batch = batch_of([4, 6], [4, 4])
    states = states_of(batch)
    module = Pooling(HIDDEN, mode, include_prompt=False)
    assert_close(pool(states, batch, [mode]), reference(states, batch, module, 4))


@pytest.mark.parametrize("modes", [("cls", "mean"), ("lasttoken", "max", "weightedmean")], ids=str)
def test_several_modes_are_joined_in_their_order(modes: tuple[Any, ...]) -> None:
    batch = batch_of(LENGTHS)
    states = states_of(batch)
    ours = pool(states, batch, modes)
    assert ours.shape == (len(LENGTHS), HIDDEN * len(modes))
    assert_close(ours, reference(states, batch, Pooling(HIDDEN, modes)))


def test_the_mean_of_many_tokens_keeps_its_digits() -> None:
    batch = batch_of([8192])
    states = states_of(batch) + np.float32(100)
    exact = states.astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(pool(states, batch, ["mean"])[0], exact, rtol=1e-7)


# ---------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({"word_embedding_dimension": HIDDEN}, id="nothing"),
        pytest.param(
            {"word_embedding_dimension": HIDDEN, "pooling_mode_cls_token": True}, id="old-cls"
        ),
        pytest.param(
            {
                "word_embedding_dimension": HIDDEN,
                "pooling_mode_mean_tokens": True,
                "pooling_mode_cls_token": True,
                "pooling_mode_lasttoken": True,
                "pooling_mode_max_tokens": False,
            },
            id="old-three",
        ),
        pytest.param(
            {"word_embedding_dimension": HIDDEN, "pooling_mode_mean_tokens": False},
            id="old-all-off",
        ),
        pytest.param({"embedding_dimension": HIDDEN, "pooling_mode": "max"}, id="new"),
        pytest.param(
            {"embedding_dimension": HIDDEN, "pooling_mode": ["mean", "cls"]}, id="new-two"
        ),
        pytest.param(
            {
                "embedding_dimension": HIDDEN,
                "pooling_mode": "lasttoken",
                "pooling_mode_cls_token": True,
                "include_prompt": False,
            },
            id="new-wins-over-old",
        ),
    ],
)
def test_config_is_read_as_sentence_transformers_reads_it(
    config: Mapping[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = Pooling.load(str(tmp_path)).pooling_mode
    assert pooling_modes(config) == ((theirs,) if isinstance(theirs, str) else tuple(theirs))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        pytest.param({"pooling_mode": "median"}, "'median'", id="mode"),
        pytest.param({"pooling_mode": ["mean", "best"]}, "'best'", id="one-of-two"),
        pytest.param({"pooling_mode": []}, "no mode", id="none"),
        pytest.param({"pooling_mode_median_tokens": True}, "pooling_mode_median_tokens", id="key"),
    ],
)
def test_unknown_pooling_is_refused(config: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ModelNotSupported, match=message):
        pooling_modes(config)


# ----------------------------------------------------------------------------------- dense, head

TANH = "torch.nn.modules.activation.Tanh"
IDENTITY = "torch.nn.modules.linear.Identity"


def write_dense(folder: Path, inputs: int, outputs: int, **config: Any) -> Module:
    """A Dense module as a folder; ``config`` wins over what such a folder has."""
    bias = config.get("bias", True)
    whole = {
        "in_features": inputs,
        "out_features": outputs,
        "bias": bias,
        "activation_function": TANH,
        **config,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(whole))
    random = np.random.default_rng(inputs + outputs)
    tensors = {"linear.weight": random.normal(0, 0.2, (outputs, inputs)).astype(np.float32)}
    if bias:
        tensors["linear.bias"] = random.normal(0, 0.2, outputs).astype(np.float32)
    save_file(tensors, folder / "model.safetensors")
    return Module("Dense", folder, whole)


def pipeline(folder: Path, *modules: Module) -> Pipeline:
    return Pipeline(folder, "Transformer", folder, {}, modules)


def module(kind: str, **config: Any) -> Module:
    return Module(kind, Path(), config)


MEAN = module("Pooling", pooling_mode="mean")
NORMALIZE = module("Normalize")


@pytest.mark.parametrize("activation", [TANH, IDENTITY], ids=["tanh", "identity"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("normalize", [True, False], ids=["normalize", ""])
def test_head_is_pooling_and_dense(
    activation: str, bias: bool, normalize: bool, tmp_path: Path
) -> None:
    dense = write_dense(tmp_path / "2_Dense", HIDDEN, 10, activation_function=activation, bias=bias)
    modules = [MEAN, dense, *([NORMALIZE] if normalize else [])]
    head = Head.from_pipeline(pipeline(tmp_path, *modules), HIDDEN)
    batch = batch_of(LENGTHS)
    states = states_of(batch)
    pooled = reference(states, batch, Pooling(HIDDEN, "mean"))
    layer = Dense.load(str(dense.folder))
    with torch.inference_mode():
        theirs = layer({"sentence_embedding": torch.from_numpy(pooled)})["sentence_embedding"]
    assert head.dims == 10
    assert_close(head(states, batch), theirs.numpy())


def test_head_of_two_modes_and_two_layers(tmp_path: Path) -> None:
    first = write_dense(tmp_path / "2_Dense", 2 * HIDDEN, 12)
    second = write_dense(tmp_path / "3_Dense", 12, 5, activation_function=IDENTITY)
    pooling = module("Pooling", pooling_mode=["cls", "mean"])
    head = Head.from_pipeline(pipeline(tmp_path, pooling, first, second), HIDDEN)
    assert head.dims == 5
    batch = batch_of(LENGTHS)
    states = states_of(batch)
    vectors = torch.from_numpy(reference(states, batch, Pooling(HIDDEN, ("cls", "mean"))))
    with torch.inference_mode():
        for layer in (first, second):
            features = {"sentence_embedding": vectors}
            vectors = Dense.load(str(layer.folder))(features)["sentence_embedding"]
    assert_close(head(states, batch), vectors.numpy())


def test_half_precision_dense_weights_are_computed_in_float32(tmp_path: Path) -> None:
    dense = write_dense(tmp_path / "2_Dense", HIDDEN, 10)
    weight = np.random.default_rng(0).normal(0, 0.2, (10, HIDDEN)).astype(np.float16)
    tensors = {"linear.weight": weight, "linear.bias": np.zeros(10, np.float16)}
    save_file(tensors, dense.folder / "model.safetensors")
    head = Head.from_pipeline(pipeline(tmp_path, MEAN, dense), HIDDEN)
    batch = batch_of(LENGTHS)
    states = states_of(batch)
    pooled = reference(states, batch, Pooling(HIDDEN, "mean"))
    assert_close(head(states, batch), np.tanh(pooled @ weight.T.astype(np.float32)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        pytest.param({"use_residual": True}, "use_residual", id="residual"),
        pytest.param({"module_input_name": "other"}, "module_input_name", id="other-input"),
        pytest.param({"module_output_name": "other"}, "module_output_name", id="other-output"),
        pytest.param({"new_option": 1}, "new_option", id="unknown-option"),
        pytest.param({"activation_function": "torch.nn.GELU"}, "torch.nn.GELU", id="activation"),
    ],
)
def test_dense_options_that_are_not_computed_are_refused(
    config: Mapping[str, Any], message: str, tmp_path: Path
) -> None:
    dense = write_dense(tmp_path / "2_Dense", HIDDEN, 10, **config)
    with pytest.raises(ModelNotSupported, match=message):
        Head.from_pipeline(pipeline(tmp_path, MEAN, dense), HIDDEN)


def test_dense_of_another_width_is_refused(tmp_path: Path) -> None:
    dense = write_dense(tmp_path / "2_Dense", HIDDEN + 1, 10)
    with pytest.raises(ModelNotSupported, match=f"takes {HIDDEN + 1} values, not the {HIDDEN}"):
        Head.from_pipeline(pipeline(tmp_path, MEAN, dense), HIDDEN)


def test_dense_without_safetensors_is_refused(tmp_path: Path) -> None:
    dense = write_dense(tmp_path / "2_Dense", HIDDEN, 10)
    (dense.folder / "model.safetensors").rename(dense.folder / "pytorch_model.bin")
    with pytest.raises(ModelNotSupported, match=r"no model\.safetensors"):
        Head.from_pipeline(pipeline(tmp_path, MEAN, dense), HIDDEN)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        pytest.param([], "not nothing", id="nothing"),
        pytest.param([NORMALIZE], "not Normalize", id="only-normalize"),
        pytest.param([module("WeightedLayerPooling"), MEAN], "WeightedLayerPooling", id="first"),
        pytest.param([MEAN, module("LSTM")], "LSTM", id="unknown-module"),
        pytest.param([MEAN, NORMALIZE, module("LSTM")], "Normalize", id="normalize-in-the-middle"),
    ],
)
def test_modules_that_are_not_computed_are_refused(modules: list[Module], message: str) -> None:
    with pytest.raises(ModelNotSupported, match=message):
        Head.from_pipeline(pipeline(Path(), *modules), HIDDEN)
