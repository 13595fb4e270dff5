# SPDX-License-Identifier: MIT OR Apache-2.0
"""Any config.json gives sentence-transformers' vectors or is refused: none is silently wrong."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tiny_models import FAMILIES, TinyModel, load_reference

from embedding_server import Embedder
from embedding_server.errors import ModelNotSupported

TEXTS = [*tiny_models.texts(6, seed=11, max_words=30), "", "a", "one <pad> two"]

ACTIVATIONS = st.sampled_from(
    (
        *("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_10", "relu", "relu2", "silu"),
        *("swish", "quick_gelu", "tanh", "mish", "sigmoid", "linear", "laplace", "unknown", None),
    )
)
EPSILONS = st.sampled_from([1e-12, 1e-6, 1e-5, 1e-3, 0.1, 0, -1.0, "1e-5", None])
FLAGS = st.sampled_from([True, False, None])
SMALL = st.sampled_from([0, 1, 2, 3, 4, 5, 8, 16, 32, 64, -1, None, "2", 2.0])
THETAS = st.sampled_from([500.0, 1000, 10_000.0, 1_000_000, 0, None])
ROPES = st.sampled_from(
    [
        None,
        {},
        {"rope_type": "default"},
        {"rope_type": "default", "rope_theta": 777.0},
        {"type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1000.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.5},
        {"full_attention": {"rope_type": "default", "rope_theta": 555.0}},
        {
            "full_attention": {"rope_type": "default", "rope_theta": 555.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 66.0},
        },
    ]
)
KINDS = st.lists(
    st.sampled_from(["full_attention", "sliding_attention", "chunked_attention"]), max_size=4
)
ANY_FAMILY: dict[str, st.SearchStrategy[Any]] = {
    "is_decoder": FLAGS,
    "add_cross_attention": FLAGS,
    "is_encoder_decoder": FLAGS,
    "chunk_size_feed_forward": SMALL,
    "vocab_size": st.sampled_from([1, 100, 456, 461, 925, 939, 10_000]),
    "max_position_embeddings": st.sampled_from([16, 64, 100, 128, 130, 256, 0, None]),
    "torch_dtype": st.sampled_from(["float16", "float32", None]),
    "attention_probs_dropout_prob": st.sampled_from([0.0, 0.5]),
    "hidden_dropout_prob": st.sampled_from([0.0, 0.5]),
    "pad_token_id": st.sampled_from([0, 1, 2, 5, None]),
    "output_hidden_states": FLAGS,
    "position_embedding_type": st.sampled_from(["absolute", "relative_key", "alibi", None]),
    "pruned_heads": st.sampled_from([{}, {"0": [0]}]),
    "tie_word_embeddings": FLAGS,
}
BERT: dict[str, st.SearchStrategy[Any]] = {
    "hidden_act": ACTIVATIONS,
    "layer_norm_eps": EPSILONS,
    "num_attention_heads": SMALL,
    "num_hidden_layers": SMALL,
    "hidden_size": SMALL,
    "intermediate_size": SMALL,
    "type_vocab_size": SMALL,
}
ROTARY: dict[str, st.SearchStrategy[Any]] = {
    "rope_parameters": ROPES,
    "rope_scaling": ROPES,
    "rope_theta": THETAS,
    "partial_rotary_factor": st.sampled_from([None, 1.0, 0.5]),
    "head_dim": SMALL,
    "layer_types": KINDS,
}
FIELDS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "bert": BERT,
    "roberta": BERT,
    "xlm_roberta": BERT,
    "mpnet": {**BERT, "relative_attention_num_buckets": SMALL},
    "distilbert": {
        "activation": ACTIVATIONS,
        "n_heads": SMALL,
        "n_layers": SMALL,
        "dim": SMALL,
        "hidden_dim": SMALL,
        "sinusoidal_pos_embds": FLAGS,
    },
    "nomic_bert": {**BERT, **ROTARY},
    "modernbert": {
        "hidden_activation": ACTIVATIONS,
        "norm_eps": EPSILONS,
        "layer_norm_eps": EPSILONS,
        "norm_bias": FLAGS,
        "attention_bias": FLAGS,
        "mlp_bias": FLAGS,
        "global_attn_every_n_layers": SMALL,
        "local_attention": SMALL,
        "global_rope_theta": THETAS,
        "local_rope_theta": THETAS,
        "num_attention_heads": SMALL,
        "num_hidden_layers": SMALL,
        **ROTARY,
    },
    "qwen3": {
        "hidden_act": ACTIVATIONS,
        "rms_norm_eps": EPSILONS,
        "attention_bias": FLAGS,
        "use_sliding_window": FLAGS,
        "sliding_window": SMALL,
        "max_window_layers": SMALL,
        "num_attention_heads": SMALL,
        "num_key_value_heads": SMALL,
        "num_hidden_layers": SMALL,
        **ROTARY,
    },
}


@pytest.fixture(scope="module", params=FIELDS)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(family: str, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    # transformers reads NomicBERT's own fields only, so its config is fuzzed as transformers
    # writes it; test_nomic_fields takes care of its authors' fields.
    layout = "v6" if family == "nomic_bert" else "hub"
    return FAMILIES[family](tmp_path_factory.mktemp("fuzz") / family, layout=layout)


def without_loading_messages() -> None:
    for name in ("transformers", "sentence_transformers"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


@settings(
    max_examples=50,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
@pytest.mark.filterwarnings("ignore")
def test_agrees_or_is_refused(data: st.DataObject, family: str, model: TinyModel) -> None:
    without_loading_messages()
    fields = {**ANY_FAMILY, **FIELDS[family]}
    names = data.draw(
        st.lists(st.sampled_from(sorted(fields)), min_size=1, max_size=3, unique=True)
    )
    changes = {name: data.draw(fields[name], label=name) for name in names}
    assert_agrees_or_is_refused(model, changes)


def assert_agrees_or_is_refused(model: TinyModel, changes: dict[str, Any]) -> None:
    path = model.folder / "config.json"
    original = path.read_text()
    path.write_text(json.dumps({**json.loads(original), **changes}))
    try:
        try:
            with Embedder(str(model.folder), backend="onnx", threads=1) as embedder:
                found = embedder.embed(TEXTS)
        except ModelNotSupported:
            return
        try:
            expected = load_reference(model).encode(TEXTS, normalize_embeddings=True)
        except Exception:
            return  # the reference refuses: there is no truth to miss
    finally:
        path.write_text(original)
    assert np.abs(found - expected).max() < 1e-5, changes


NOMIC_FIELDS = [
    ("rotary_emb_fraction", 0.5),
    ("rotary_emb_interleaved", True),
    ("rotary_emb_scale_base", 512.0),
    ("activation_function", "geglu"),
    ("activation_function", "gelu"),
    ("qkv_proj_bias", True),
    ("mlp_fc1_bias", True),
    ("mlp_fc2_bias", True),
    ("prenorm", True),
    ("causal", True),
    ("parallel_block", True),
    ("use_rms_norm", True),
    ("num_experts", 8),
    ("moe_every_n_layers", 2),
    ("scale_attn_by_inverse_layer_idx", True),
    ("scale_attn_weights", False),
    ("n_head", 3),
    ("n_head", 0),
    ("n_embd", None),
    ("n_inner", 128),
    ("n_layer", 5),
    ("rotary_emb_base", "1000"),
    ("rotary_scaling_factor", -2.0),
    ("type_vocab_size", 3),
    ("vocab_size", 7),
]


@pytest.mark.parametrize(("field", "value"), NOMIC_FIELDS, ids=str)
def test_nomic_fields(field: str, value: object, tmp_path: Path) -> None:
    folder = FAMILIES["nomic_bert"](tmp_path / "nomic").folder
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(ModelNotSupported):
        Embedder(str(copy), backend="onnx")
