# SPDX-License-Identifier: MIT OR Apache-2.0
"""Every family against sentence-transformers, on tiny random models in its hub's layout."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from numpy.typing import NDArray
from tiny_models import FAMILIES, PREFIXES, TinyModel, load_reference

from embedding_server import Embedder

SHAPES: dict[str, dict[str, Any]] = {
    "small": {},
    "two-heads": {"seed": 1, "heads": 2, "layers": 3},
    "wide": {"seed": 2, "hidden": 96, "heads": 6, "intermediate": 120, "layers": 4},
}

TRANSFORMERS = [family for family in FAMILIES if family != "static"]

BODY = tiny_models.texts(60, seed=5, max_words=90)


def by_length(limit: int) -> list[str]:
    """Texts of every length from no token to beyond ``limit``, in mixed order."""
    words = " ".join(BODY).split()
    lengths = [*range(12), *range(12, limit + 8, 5), limit - 2, limit - 1, limit, limit + 1]
    return [" ".join(words[start : start + length]) for start, length in enumerate(lengths)]


def make(family: str, folder: Path, **options: Any) -> TinyModel:
    if family == "qwen3" and "heads" in options:
        options = {"kv_heads": options["heads"] // 2, **options}
    return FAMILIES[family](folder, **options)


def expected_of(model: TinyModel, texts: list[str], **options: Any) -> NDArray[np.float32]:
    # Its other modules than the transformer compute in the checkpoint's own precision.
    reference = load_reference(model).float()
    vectors: NDArray[np.float32] = reference.encode(texts, normalize_embeddings=True, **options)
    return vectors


def assert_exact(
    model: TinyModel, texts: list[str], *, backend: str = "onnx", **options: Any
) -> None:
    """The vectors agree with the reference, and the company of a text changes nothing."""
    with Embedder(str(model.folder), backend=backend) as embedder:
        together = embedder.embed(texts, **options)
        alone = np.concatenate([embedder.embed([text], **options) for text in texts[::7]])
    assert np.abs(together - expected_of(model, texts)).max() < 1e-5
    assert np.abs(together[::7] - alone).max() < 1e-6


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("family", TRANSFORMERS)
def test_lengths_and_shapes(family: str, shape: dict[str, Any], tmp_path: Path) -> None:
    model = make(family, tmp_path / family, max_positions=200, max_seq_length=180, **shape)
    assert_exact(model, [*by_length(180), *tiny_models.ODD_TEXTS])


@pytest.mark.parametrize("layout", ["hub", "v6"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layouts(family: str, layout: str, tmp_path: Path) -> None:
    model = make(family, tmp_path / family, layout=layout, normalize=False)
    assert_exact(model, BODY)


@pytest.mark.parametrize("family", PREFIXES)
def test_prefixes_and_shards(family: str, tmp_path: Path) -> None:
    model = make(family, tmp_path / family, prefix=PREFIXES[family], shards=3)
    assert_exact(model, BODY[:20])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_weights(family: str, dtype: str, tmp_path: Path) -> None:
    model = make(family, tmp_path / family, dtype=dtype)
    assert_exact(model, BODY[:20])


@pytest.mark.parametrize(
    "pooling",
    [*tiny_models.POOLING_MODES, ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean")],
    ids=str,
)
@pytest.mark.parametrize("layout", ["hub", "v6"])
def test_poolings(pooling: Any, layout: str, tmp_path: Path) -> None:
    model = make("bert", tmp_path / "bert", pooling=pooling, layout=layout)
    assert_exact(model, BODY[:20])


@pytest.mark.parametrize("dense", [(20, "tanh"), (48, "identity")], ids=str)
@pytest.mark.parametrize("family", ["bert", "qwen3", "static"])
def test_dense(family: str, dense: tuple[int, str], tmp_path: Path) -> None:
    model = make(family, tmp_path / family, dense=dense)
    assert_exact(model, BODY[:20])


@pytest.mark.parametrize(
    "options",
    [
        {"style": "model2vec"},
        {"style": "model2vec", "mapping": True, "token_weights": True},
        {"style": "subfolder"},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_static_layouts(dtype: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = make("static", tmp_path / "static", dtype=dtype, **options)
    assert_exact(model, [*BODY, *tiny_models.ODD_TEXTS])


BERT_VARIANTS: dict[str, dict[str, Any]] = {
    "old-norm-names": {"legacy_norm_names": True},
    "large-epsilon": {"layer_norm_eps": 1e-3},
    "five-types": {"types": 5},
    "silu": {"act": "silu"},
    "quick-gelu": {"act": "quick_gelu"},
    "gelu-tanh": {"act": "gelu_pytorch_tanh"},
    "gelu-fast": {"act": "gelu_fast"},
}


@pytest.mark.parametrize("options", BERT_VARIANTS.values(), ids=BERT_VARIANTS.keys())
def test_bert_variants(options: dict[str, Any], tmp_path: Path) -> None:
    assert_exact(make("bert", tmp_path / "bert", **options), BODY[:20])


MODERNBERT_VARIANTS: dict[str, dict[str, Any]] = {
    "all-global": {"global_attn_every_n_layers": 1},
    "every-other": {"global_attn_every_n_layers": 2, "layers": 4},
    "biases": {"norm_bias": True, "attention_bias": True, "mlp_bias": True},
    "wide-window": {"local_attention": 64},
    "narrow-window": {"local_attention": 2},
    "window-of-itself": {"local_attention": 1},
    "all-local": {"config": {"layer_types": ["sliding_attention"] * 4}},
}


@pytest.mark.parametrize("options", MODERNBERT_VARIANTS.values(), ids=MODERNBERT_VARIANTS.keys())
def test_modernbert_variants(options: dict[str, Any], tmp_path: Path) -> None:
    options = {"max_positions": 300, "max_seq_length": 290, **options}
    model = make("modernbert", tmp_path / "modernbert", **options)
    assert_exact(model, by_length(290))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("backend", ["onnx", "torch"])
def test_qwen3_that_attends_in_both_directions(kv_heads: int, backend: str, tmp_path: Path) -> None:
    model = make("qwen3", tmp_path / "qwen3", kv_heads=kv_heads, config={"is_causal": False})
    texts = [*by_length(120), *tiny_models.ODD_TEXTS]
    assert_exact(model, texts, backend=backend)
    causal = make("qwen3", tmp_path / "causal", kv_heads=kv_heads)
    difference = np.abs(expected_of(causal, texts) - expected_of(model, texts)).max()
    assert difference > 0.1, "the reference itself must heed is_causal"


def test_the_pooling_of_a_plain_folder_follows_is_causal(tmp_path: Path) -> None:
    """Without modules.json sentence-transformers takes the last token's state, or their mean."""
    for causal in (True, False):
        config = {"architectures": ["Qwen3ForCausalLM"], "is_causal": causal}
        model = make("qwen3", tmp_path / f"qwen3-{causal}", config=config)
        for name in ("modules.json", "config_sentence_transformers.json"):
            (model.folder / name).unlink()
        path = model.folder / "tokenizer_config.json"
        settings = json.loads(path.read_text())
        del settings["chat_template"]
        path.write_text(json.dumps(settings))
        assert_exact(model, BODY[:20])


def test_padding_token_written_in_a_text(tmp_path: Path) -> None:
    """RoBERTa and MPNet don't count the padding token as a position, but attend to it."""
    for family, pad in (("roberta", "<pad>"), ("mpnet", "<pad>"), ("bert", "[PAD]")):
        model = make(family, tmp_path / family)
        assert_exact(model, [f"one {pad} two {pad}{pad} three", f"{pad} first", "none"])


@pytest.mark.parametrize("length", [40, 64, 65, 200])
def test_nomic_scales_by_the_inputs_own_length(length: int, tmp_path: Path) -> None:
    """Past the trained length angles shrink, by this input's length and not its company's."""
    model = make(
        "nomic_bert",
        tmp_path / "nomic",
        rotary_scaling_factor=2.0,
        max_trained_positions=64,
        max_positions=256,
        max_seq_length=256,
    )
    text = " ".join((" ".join(BODY)).split()[: length - 2])
    company = by_length(256)
    with Embedder(str(model.folder)) as embedder:
        found = embedder.embed([*company, text])[-1]
    # The reference remembers the longest input it has seen: a fresh one for each text.
    assert np.abs(found - expected_of(model, [text])[0]).max() < 1e-5


MEMORY_PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from peak_memory import peak_megabytes
from embedding_server import Embedder
with Embedder(sys.argv[2]) as embedder:
    vectors = embedder.embed(["word " * 9000])
    assert embedder.info.max_tokens == 8192
    assert abs((vectors**2).sum() - 1) < 1e-5
print(peak_megabytes())
"""


@pytest.mark.parametrize("family", ["nomic_bert", "modernbert"])
def test_8192_tokens_in_bounded_memory(family: str, tmp_path: Path) -> None:
    model = make(
        family, tmp_path / family, hidden=48, heads=12, max_positions=8192, max_seq_length=8192
    )
    command = [
        sys.executable,
        "-c",
        MEMORY_PROGRAM,
        str(Path(tiny_models.__file__).parent),
        str(model.folder),
    ]
    done = subprocess.run(command, capture_output=True, check=True, timeout=300)
    megabytes = int(done.stdout)
    print(f"{family}: peak resident memory {megabytes} MB")
    assert megabytes < 1500
