# SPDX-License-Identifier: MIT OR Apache-2.0
"""Prompts and Matryoshka sizes, through a live server, against sentence-transformers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tiny_models
from live import running_server
from numpy.typing import NDArray
from tiny_models import load_reference, make_bert, make_nomic_bert

TEXTS = tiny_models.texts(12, seed=9, max_words=30)
OWN_PROMPTS = {
    "query": "search for this : ",
    "passage": "answer : ",
    "topic": "cluster by topic : ",
}


@dataclass(frozen=True)
class Served:
    """A live server of tiny models, and the references of those."""

    url: str
    references: dict[str, Any]

    def embed(self, model: str, texts: list[str] = TEXTS, **fields: Any) -> NDArray[np.float32]:
        response = self.post(model, texts, **fields)
        assert response.status_code == 200, response.text
        return np.array([item["embedding"] for item in response.json()["data"]], np.float32)

    def post(self, model: str, texts: list[str] = TEXTS, **fields: Any) -> httpx.Response:
        body = {"model": model, "input": texts, **fields}
        return httpx.post(f"{self.url}/v1/embeddings", json=body)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("models")
    made = {
        # By these names the catalog knows their prompts and sizes.
        "nomic-embed-text-v1": make_nomic_bert(folder / "nomic-embed-text-v1", hidden=96),
        "nomic-embed-text-v1.5": make_nomic_bert(
            folder / "nomic-embed-text-v1.5", hidden=768, heads=12, normalize=False
        ),
        "prompted": make_bert(
            folder / "prompted", prompts=OWN_PROMPTS, default_prompt_name="topic"
        ),
        "excluding": make_bert(
            folder / "excluding", prompts=OWN_PROMPTS, include_prompt=False, max_seq_length=24
        ),
        "plain": make_bert(folder / "plain"),
    }
    flags = [flag for model in made.values() for flag in ("--model", str(model.folder))]
    references = {name: load_reference(model) for name, model in made.items()}
    with running_server(*flags, "--matryoshka", "plain=8,16,32") as server:
        yield Served(server.url, references)


def difference(left: NDArray[np.float32], right: NDArray[np.float32]) -> float:
    return float(np.abs(left - right).max())


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("name", ["query", "passage", "topic"])
@pytest.mark.parametrize("model", ["prompted", "excluding"])
def test_a_models_own_prompts(served: Served, model: str, name: str) -> None:
    expected = served.references[model].encode(TEXTS, prompt_name=name, normalize_embeddings=True)
    assert difference(served.embed(model, input_type=name), expected) < 1e-5


def test_the_default_prompt(served: Served) -> None:
    expected = served.references["prompted"].encode(TEXTS, normalize_embeddings=True)
    assert difference(served.embed("prompted"), expected) < 1e-5
    by_name = served.embed("prompted", input_type="topic")
    assert difference(served.embed("prompted"), by_name) == 0


def test_document_finds_passage(served: Served) -> None:
    """As encode_document's own words have it, too, but for an empty 'document' it always finds."""
    expected = served.references["prompted"].encode(
        TEXTS, prompt_name="passage", normalize_embeddings=True
    )
    assert difference(served.embed("prompted", input_type="document"), expected) < 1e-5


def test_a_prompt_of_the_request(served: Served) -> None:
    reference = served.references["excluding"]
    expected = reference.encode(TEXTS, prompt="river train : ", normalize_embeddings=True)
    assert difference(served.embed("excluding", prompt="river train : "), expected) < 1e-5


def test_prompt_tokens_count(served: Served) -> None:
    plain = served.post("excluding", ["one two"]).json()["usage"]["prompt_tokens"]
    prompted = served.post("excluding", ["one two"], prompt="one two three : ").json()
    assert prompted["usage"]["prompt_tokens"] == plain + 4
    long = served.post("excluding", ["one " * 21], prompt="one two three : ").json()["data"][0]
    assert long["truncated"] is True
    assert long["tokens"] == 21 + 4 + 2


@pytest.mark.parametrize(
    ("input_type", "prefix"),
    [
        ("query", "search_query: "),
        ("search_query", "search_query: "),
        ("document", "search_document: "),
        ("search_document", "search_document: "),
        ("clustering", "clustering: "),
        ("classification", "classification: "),
    ],
)
def test_nomics_prompts(served: Served, input_type: str, prefix: str) -> None:
    expected = served.references["nomic-embed-text-v1"].encode(
        [prefix + text for text in TEXTS], normalize_embeddings=True
    )
    assert difference(served.embed("nomic-embed-text-v1", input_type=input_type), expected) < 1e-5


@pytest.mark.parametrize("dimensions", [None, 1, 64, 100, 256, 512, 768])
def test_nomic_v1_5_as_its_authors_define_it(served: Served, dimensions: int | None) -> None:
    import torch

    embeddings = served.references["nomic-embed-text-v1.5"].encode(TEXTS, convert_to_tensor=True)
    normed = torch.nn.functional.layer_norm(embeddings, normalized_shape=(768,))
    cut = normed[:, :dimensions]
    expected = torch.nn.functional.normalize(cut, p=2, dim=1).cpu().numpy()
    found = served.embed("nomic-embed-text-v1.5", dimensions=dimensions)
    assert found.shape == (len(TEXTS), dimensions or 768)
    assert difference(found, expected) < 1e-5


def test_nomic_v1_5_unscaled(served: Served) -> None:
    expected = served.references["nomic-embed-text-v1.5"].encode(TEXTS)
    found = served.embed("nomic-embed-text-v1.5", normalize=False)
    assert difference(found, expected) < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("dimensions", [0, -1, 769])
def test_sizes_out_of_range(served: Served, dimensions: int) -> None:
    answer = served.post("nomic-embed-text-v1.5", dimensions=dimensions)
    assert answer.status_code == 400
    assert "64, 128, 256, 512, 768" in answer.json()["error"]["message"]


def test_nomic_v1_has_one_size(served: Served) -> None:
    answer = served.post("nomic-embed-text-v1", dimensions=64)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "dimensions"
    full = served.embed("nomic-embed-text-v1")
    assert difference(served.embed("nomic-embed-text-v1", dimensions=96), full) == 0
    unscaled = served.embed("nomic-embed-text-v1", normalize=False)
    sized = served.embed("nomic-embed-text-v1", dimensions=96, normalize=False)
    assert difference(sized, unscaled) == 0


def test_sizes_given_by_a_setting(served: Served) -> None:
    full = served.embed("plain")
    assert difference(served.embed("plain", dimensions=16), unit(full[:, :16])) < 1e-6
    shown = httpx.get(f"{served.url}/v1/models/plain").json()
    assert shown["dimensions"] == [8, 16, 32]


def test_models_tell_their_sizes_and_prompts(served: Served) -> None:
    shown = httpx.get(f"{served.url}/v1/models/nomic-embed-text-v1.5").json()
    assert shown["dimensions"] == [64, 128, 256, 512, 768]
    assert shown["prompts"]["search_query"] == "search_query: "
    assert shown["dims"] == 768
    assert httpx.get(f"{served.url}/v1/models/prompted").json()["prompts"] == OWN_PROMPTS


def test_a_size_over_the_models(tmp_path: Path) -> None:
    from embedding_server import Embedder
    from embedding_server.errors import ConfigurationError

    folder = make_bert(tmp_path / "bert").folder
    with pytest.raises(ConfigurationError, match="64 of bert is over the model's 32"):
        Embedder(str(folder), matryoshka=(16, 64))
