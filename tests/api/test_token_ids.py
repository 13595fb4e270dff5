# SPDX-License-Identifier: MIT OR Apache-2.0
"""Token ids with the special tokens of AutoTokenizer: their text's vector, in every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tiny_models
from error_shape import error_of
from live import LiveServer
from minilm import minilm_folder
from model_folders import export_onnx
from tiny_models import FAMILIES, TinyModel, load_reference

from embedding_server import Embedder
from embedding_server.engine.parameters import EmbedParams
from embedding_server.errors import InvalidRequest

MODEL = "all-MiniLM-L6-v2"
TRANSFORMERS = [family for family in FAMILIES if family != "static"]
TEXTS = ["", "test", "city " * 100, *tiny_models.texts(6, seed=11, max_words=30)]


def auto_tokenizer(folder: Path) -> Callable[[str], list[int]]:
    """What ``AutoTokenizer`` gives a client for a text, special tokens and all."""
    from transformers import AutoTokenizer

    auto = AutoTokenizer.from_pretrained(folder)
    return lambda text: list(auto(text)["input_ids"])


def assert_as_texts(model: TinyModel, **options: Any) -> None:
    ids = [auto_tokenizer(model.reference)(text) for text in TEXTS]
    with Embedder(str(model.folder), **options) as embedder:
        by_ids = embedder.embed_detailed(ids, EmbedParams())
        by_texts = embedder.embed_detailed(TEXTS, EmbedParams())
    expected = load_reference(model).float().encode(TEXTS, normalize_embeddings=True)
    assert np.abs(by_ids.vectors - expected).max() < 1e-5
    assert by_ids.encodings == by_texts.encodings
    assert by_ids.encodings[2].truncated


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_every_family(family: str, tmp_path: Path) -> None:
    assert_as_texts(FAMILIES[family](tmp_path / family), backend="onnx")


@pytest.mark.parametrize("family", ["bert", "roberta", "qwen3"])
def test_on_torch(family: str, tmp_path: Path) -> None:
    assert_as_texts(FAMILIES[family](tmp_path / family), backend="torch")


def test_on_an_onnx_file(tmp_path: Path) -> None:
    model = tiny_models.make_bert(tmp_path / "bert")
    export_onnx(model)
    assert_as_texts(model, onnx_file="model.onnx")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", TRANSFORMERS)
def test_padded_ids_are_refused(family: str, side: str, tmp_path: Path) -> None:
    """As a tokenizer gives them for a batch: the padding would be computed as if it were text."""
    from transformers import AutoTokenizer

    model = FAMILIES[family](tmp_path / family)
    auto = AutoTokenizer.from_pretrained(model.reference, padding_side=side)
    ids = auto(["one", "two of the city and three"], padding=True)["input_ids"]
    with Embedder(str(model.folder), backend="onnx") as embedder:
        with pytest.raises(InvalidRequest, match=r"padding|only a part of") as caught:
            embedder.embed(ids)
        assert caught.value.index == 0
        assert embedder.embed(ids[1:]).shape == (1, 32)


def test_a_static_model_has_no_special_tokens(tmp_path: Path) -> None:
    model = tiny_models.make_static(tmp_path / "static")
    texts = [text for text in TEXTS if text]
    reference = load_reference(model)
    encoded = reference[0].tokenizer.encode_batch(texts, add_special_tokens=False)
    ids = [encoding.ids for encoding in encoded]
    with Embedder(str(model.folder)) as embedder:
        found = embedder.embed(ids)
    expected = reference.encode(texts, normalize_embeddings=True)
    assert np.abs(found - expected).max() < 1e-5


@pytest.mark.parametrize("include_prompt", [True, False])
@pytest.mark.parametrize("family", ["bert", "roberta", "qwen3"])
def test_a_prompt_stands_after_the_first_special_token(
    family: str, include_prompt: bool, tmp_path: Path
) -> None:
    model = FAMILIES[family](tmp_path / family, include_prompt=include_prompt)
    tokenize = auto_tokenizer(model.reference)
    prompt, texts = "search:", [" one city", " river and river", ""]  # no token goes over its end
    with Embedder(str(model.folder), backend="onnx") as embedder:
        found = embedder.embed([tokenize(text) for text in texts], prompt=prompt)
    expected = load_reference(model).encode(texts, prompt=prompt, normalize_embeddings=True)
    assert np.abs(found - expected).max() < 1e-5


def test_the_real_model_over_http(server: LiveServer) -> None:
    def answer(input: Any) -> Any:
        response = httpx.post(f"{server.url}/v1/embeddings", json={"model": MODEL, "input": input})
        assert response.status_code == 200, response.text
        return response.json()

    tokenize = auto_tokenizer(minilm_folder())
    assert tokenize("test") == [101, 3231, 102]
    assert answer([[101, 3231, 102]]) == answer("test") == answer([3231])
    assert answer([101, 102]) == answer("")
    assert answer("test")["usage"]["prompt_tokens"] == 3


def test_a_part_of_the_special_tokens_over_http(server: LiveServer) -> None:
    body = {"model": MODEL, "input": [[101, 3231, 102], [101, 3231]]}
    error = error_of(httpx.post(f"{server.url}/v1/embeddings", json=body), 400)
    assert error["param"] == "input"
    assert error["message"].startswith("input[1] ")
