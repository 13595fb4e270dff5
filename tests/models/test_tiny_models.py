# SPDX-License-Identifier: MIT OR Apache-2.0
"""The tiny models are what they claim: whole, lively, and in the layouts of real repositories."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_models as tiny
from tokenizers import Tokenizer

TRANSFORMERS = [family for family in tiny.FAMILIES if family != "static"]
TEXTS = tiny.texts(20, seed=1)


def embed(model: tiny.TinyModel, texts: list[str] | None = None, **kwargs: str) -> np.ndarray:
    """Embed with sentence-transformers."""
    return tiny.load_reference(model).encode(texts or TEXTS, **kwargs)


def loading_info(folder: Path) -> dict:
    """Load the bare model with transformers and say which weights were missing or unknown."""
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder, output_loading_info=True)[1]


def theirs_and_ours(model: tiny.TinyModel) -> tuple[Callable[[str], list[int]], ...]:
    """Give the ids by transformers' tokenizer and by the file's own, both cut at 64."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(model.reference)
    ours = Tokenizer.from_file(str(model.folder / "tokenizer.json"))
    ours.no_padding()
    ours.enable_truncation(64)
    return (
        lambda text: theirs(text, truncation=True, max_length=64)["input_ids"],
        lambda text: ours.encode(text).ids,
    )


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_both_layouts_load_and_give_the_same_lively_vectors(family: str, tmp_path: Path) -> None:
    hub = embed(tiny.FAMILIES[family](tmp_path / "hub", hidden=32, normalize=True))
    v6 = embed(tiny.FAMILIES[family](tmp_path / "v6", hidden=32, normalize=True, layout="v6"))
    assert hub.shape == (len(TEXTS), 32)
    assert np.isfinite(hub).all()
    np.testing.assert_array_equal(hub, v6)
    similarities = (hub @ hub.T)[np.triu_indices(len(hub), 1)]
    assert similarities.mean() < 0.85, "the texts can hardly be told apart"
    assert similarities.max() < 0.999


@pytest.mark.parametrize("family", TRANSFORMERS)
@pytest.mark.parametrize("prefixed", [False, True], ids=["plain", "prefixed"])
def test_every_weight_is_read(family: str, prefixed: bool, tmp_path: Path) -> None:
    prefix = tiny.PREFIXES[family] if prefixed else ""
    model = tiny.FAMILIES[family](tmp_path / "model", prefix=prefix, shards=3)
    found = loading_info(model.reference)
    assert {name for name in found["missing_keys"] if not name.startswith("pooler.")} == set()
    # Tensors that real repositories carry and nobody reads.
    unread = ("embeddings.position_ids", "cls.", "lm_head.", "head.", "decoder.", "vocab_")
    rest = {name.removeprefix(prefix) for name in found["unexpected_keys"]}
    assert {name for name in rest if not name.startswith(unread)} == set()
    assert not found["mismatched_keys"]
    assert (model.folder / "model.safetensors.index.json").exists()
    assert len(list(model.folder.glob("model-0000?-of-00003.safetensors"))) == 3


@pytest.mark.parametrize("family", TRANSFORMERS)
@pytest.mark.parametrize("layout", ["hub", "v6"])
def test_transformers_and_tokenizers_read_the_same_tokenizer(
    family: str, layout: str, tmp_path: Path
) -> None:
    """transformers 5 rebuilds most tokenizers from their class, so the files have to agree."""
    model = tiny.FAMILIES[family](tmp_path / "model", layout=layout, tokenizer_padding=True)
    assert read(model.folder / "tokenizer.json")["padding"]["strategy"] == {"Fixed": 32}
    theirs, ours = theirs_and_ours(model)
    for text in [*tiny.ODD_TEXTS, *TEXTS]:
        assert ours(text) == theirs(text), text


def test_the_metaspace_only_tokenizer_is_split_by_transformers_all_the_same(tmp_path: Path) -> None:
    theirs, ours = theirs_and_ours(tiny.make_xlm_roberta(tmp_path / "model", metaspace_only=True))
    split, _ = theirs_and_ours(tiny.make_xlm_roberta(tmp_path / "split"))
    assert all(theirs(text) == split(text) for text in tiny.ODD_TEXTS)
    assert ours("river ") != theirs("river ")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_v6_is_what_sentence_transformers_saves(family: str, tmp_path: Path) -> None:
    options = {"prompts": {"query": "query: "}, "dense": (24, "tanh")}
    v6 = tiny.FAMILIES[family](tmp_path / "v6", layout="v6", **options).folder
    source = tiny.FAMILIES[family](tmp_path / "hub", **options)
    if family == "nomic_bert":  # whose hub configuration transformers can't read
        source = tiny.TinyModel(v6, v6)
    saved = tmp_path / "saved"
    tiny.load_reference(source).save(str(saved), create_model_card=False)

    def files(folder: Path) -> list[Path]:
        found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        return sorted(found)

    assert files(saved) == files(v6)
    for path in files(saved):
        if path.suffix == ".json":
            expected, written = read(saved / path), read(v6 / path)
            if path.name == "config_sentence_transformers.json":
                expected["__version__"] = written["__version__"]
            assert written == expected, path


@pytest.mark.parametrize("pooling", [*tiny.POOLING_MODES, ("cls", "mean")])
@pytest.mark.parametrize("layout", ["hub", "v6"])
def test_pooling_and_dense(pooling: str, layout: str, tmp_path: Path) -> None:
    options = {"pooling": pooling, "layout": layout, "normalize": False}
    plain = tiny.load_reference(tiny.make_bert(tmp_path / "plain", **options))
    modes = plain[1].pooling_mode
    assert modes == pooling
    vectors = plain.encode(TEXTS)
    for activation, function in (("tanh", np.tanh), ("identity", lambda x: x)):
        dense = tiny.load_reference(
            tiny.make_bert(tmp_path / activation, dense=(20, activation), **options)
        )
        weight, bias = (parameter.detach().numpy() for parameter in dense[2].parameters())
        expected = function(vectors @ weight.T + bias)
        np.testing.assert_allclose(dense.encode(TEXTS), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_rounded_float32(dtype: str, tmp_path: Path) -> None:
    full = embed(tiny.make_bert(tmp_path / "full"))
    half = embed(tiny.make_bert(tmp_path / "half", dtype=dtype))
    assert half.dtype == np.float32
    assert 1e-5 < np.abs(half - full).max() < 0.1


def test_prompts_and_their_exclusion_from_pooling(tmp_path: Path) -> None:
    options = {"prompts": {"query": "search the river: "}}
    included = tiny.make_bert(tmp_path / "with", **options)
    excluded = tiny.make_bert(tmp_path / "without", include_prompt=False, **options)
    vectors = [embed(model, prompt_name="query") for model in (included, excluded)]
    assert np.abs(vectors[0] - vectors[1]).max() > 0.01
    assert np.abs(vectors[0] - embed(included)).max() > 0.01


def test_legacy_norm_names_and_tokenizer_padding_change_no_vector(tmp_path: Path) -> None:
    plain = embed(tiny.make_bert(tmp_path / "plain"))
    padded = tiny.make_bert(tmp_path / "padded", tokenizer_padding=True)
    np.testing.assert_array_equal(plain, embed(padded))
    legacy = tiny.make_bert(tmp_path / "legacy", legacy_norm_names=True)
    assert not loading_info(legacy.folder)["missing_keys"]


@pytest.mark.parametrize("act", ["swiglu", "geglu", "glu"])
def test_nomic_conversion_is_transformers_own(act: str, tmp_path: Path) -> None:
    """Our converted reference equals what transformers makes of the hub's tensor names."""
    ours = tiny.make_nomic_bert(tmp_path / "ours", act=act)
    theirs = tiny.make_nomic_bert(tmp_path / "theirs", act=act, config_fields="both")
    assert ours.reference != ours.folder
    assert theirs.reference == theirs.folder
    weights = [path / "model.safetensors" for path in (ours.folder, theirs.folder)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    np.testing.assert_array_equal(embed(ours), embed(theirs))


def test_nomic_rotary_scaling_moves_only_long_inputs(tmp_path: Path) -> None:
    sizes = {"max_positions": 128, "max_seq_length": 128, "max_trained_positions": 32}
    plain = tiny.make_nomic_bert(tmp_path / "plain", **sizes)
    scaled = tiny.make_nomic_bert(tmp_path / "scaled", rotary_scaling_factor=2, **sizes)
    short, long = ["one river"], ["river city train " * 30]
    np.testing.assert_array_equal(embed(plain, short), embed(scaled, short))
    assert np.abs(embed(plain, long) - embed(scaled, long)).max() > 1e-3


@pytest.mark.parametrize("style", ["model2vec", "subfolder"])
@pytest.mark.parametrize("more", [{}, {"mapping": True}, {"token_weights": True}])
def test_static_styles(style: str, more: dict, tmp_path: Path) -> None:
    if style == "subfolder" and more:
        pytest.skip("only model2vec maps and weighs")
    model = tiny.make_static(tmp_path / "model", style=style, **more)
    vectors = embed(model, [*TEXTS, ""])
    np.testing.assert_allclose(np.linalg.norm(vectors[:-1], axis=1), 1, atol=1e-5)
    assert not vectors[-1].any()


def test_models_are_deterministic_by_seed(tmp_path: Path) -> None:
    for family, make in tiny.FAMILIES.items():
        first, again, other = (
            make(tmp_path / f"{family}-{index}", seed=seed).folder
            for index, seed in enumerate((0, 0, 1))
        )
        for path in first.rglob("*.*"):
            assert path.read_bytes() == (again / path.relative_to(first)).read_bytes()
        weights = next(first.rglob("model.safetensors"))
        assert weights.read_bytes() != (other / weights.relative_to(first)).read_bytes()


def test_texts_are_deterministic_and_mixed() -> None:
    made = tiny.texts(50, seed=7, max_words=30)
    assert made == tiny.texts(50, seed=7, max_words=30)
    assert made != tiny.texts(50, seed=8, max_words=30)
    lengths = [len(text.split()) for text in made]
    assert lengths[:2] == [1, 30]
    assert len(set(lengths)) > 10
    assert all(made)
