# SPDX-License-Identifier: MIT OR Apache-2.0
"""The official ``openai`` client against a live server."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from error_shape import error_of
from in_process import until
from live import LiveServer, running_server
from minilm import minilm_folder
from numpy.typing import NDArray
from openai import OpenAI
from tokenizers import Tokenizer

MODEL = "all-MiniLM-L6-v2"
PREFIXES = ["/openai/v1", "/v1"]
KEY = "sesame-4711"
Golden = tuple[list[str], NDArray[np.float32]]


@pytest.fixture(scope="module", params=PREFIXES)
def client(request: pytest.FixtureRequest, server: LiveServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=server.url + request.param, api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def strict(server: LiveServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=server.url + "/openai/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def narrow() -> Iterator[LiveServer]:
    """A server with a key that takes one request at a time, and token ids everywhere."""
    flags = ("--api-key", KEY, "--max-concurrent-requests", "1", "--openai-token-ids")
    with running_server("--model", MODEL, *flags) as live:
        yield live


@pytest.mark.parametrize("form", ["default", "float", "base64"])
def test_texts(client: OpenAI, golden: Golden, form: Any) -> None:
    """By default the client asks for base64 and decodes it."""
    texts, expected = golden[0][:24], golden[1][:24]
    fields = {} if form == "default" else {"encoding_format": form}
    answer = client.embeddings.create(model=MODEL, input=texts, **fields)
    assert (answer.object, answer.model) == ("list", MODEL)
    assert [item.index for item in answer.data] == list(range(len(texts)))
    assert {item.object for item in answer.data} == {"embedding"}
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > len(texts)
    if form == "base64":  # then it is left to the caller
        assert all(isinstance(item.embedding, str) for item in answer.data)
    else:
        vectors = np.array([item.embedding for item in answer.data])
        assert np.abs(vectors - expected).max() < 1e-5


def test_one_text(client: OpenAI, golden: Golden) -> None:
    texts, expected = golden
    answer = client.embeddings.create(model=MODEL, input=texts[0], user="somebody")
    assert len(answer.data) == 1
    assert np.abs(np.array(answer.data[0].embedding) - expected[0]).max() < 1e-5


@pytest.mark.parametrize("prefix", PREFIXES)
def test_token_ids(narrow: LiveServer, golden: Golden, prefix: str) -> None:
    texts, expected = golden[0][:8], golden[1][:8]
    tokenizer = Tokenizer.from_file(str(minilm_folder() / "tokenizer.json"))
    tokenizer.no_padding()
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    with OpenAI(base_url=narrow.url + prefix, api_key=KEY, max_retries=0) as client:
        answer = client.embeddings.create(model=MODEL, input=ids)
        one = client.embeddings.create(model=MODEL, input=ids[0])
    vectors = np.array([item.embedding for item in answer.data])
    assert np.abs(vectors - expected).max() < 1e-5
    assert one.data[0].embedding == pytest.approx(vectors[0], abs=1e-6)


# "the cat" by cl100k_base: each id is a word of this model's vocabulary, too.
FOREIGN_IDS = [1820, 8415]


@pytest.mark.parametrize("input", [FOREIGN_IDS, [FOREIGN_IDS], [FOREIGN_IDS] * 3])
def test_token_ids_of_openais_models_are_refused(strict: OpenAI, input: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        strict.embeddings.create(model=MODEL, input=input)
    assert caught.value.param == "input"
    for hint in ("Send text", "check_embedding_ctx_length=False", "--openai-token-ids"):
        assert hint in caught.value.message


def test_a_body_as_langchain_sends_it(server: LiveServer) -> None:
    """``OpenAIEmbeddings(model=MODEL).embed_query("the cat")``, and with the hint's option."""
    langchain = {"input": [FOREIGN_IDS], "model": MODEL, "encoding_format": "base64"}
    error = error_of(httpx.post(server.url + "/openai/v1/embeddings", json=langchain), 400)
    assert "check_embedding_ctx_length=False" in error["message"]
    hinted = {**langchain, "input": ["the cat"]}
    assert httpx.post(server.url + "/openai/v1/embeddings", json=hinted).status_code == 200


def test_models(strict: OpenAI) -> None:
    (model,) = strict.models.list()
    assert (model.id, model.object, model.owned_by) == (MODEL, "model", "sentence-transformers")
    assert model.created > 0
    assert strict.models.retrieve(MODEL) == model


def test_the_strict_models_hold_openais_fields_only(server: LiveServer) -> None:
    fields = {"id", "object", "created", "owned_by"}
    listing = httpx.get(server.url + "/openai/v1/models").json()
    assert set(listing) == {"object", "data"}
    assert [set(model) for model in listing["data"]] == [fields]
    assert set(httpx.get(f"{server.url}/openai/v1/models/{MODEL}").json()) == fields


def test_the_strict_answer_holds_openais_fields_only(server: LiveServer) -> None:
    body = {"model": MODEL, "input": ["iPhone", "word " * 300]}
    answer = httpx.post(server.url + "/openai/v1/embeddings", json=body).json()
    assert set(answer) == {"object", "data", "model", "usage"}
    assert set(answer["usage"]) == {"prompt_tokens", "total_tokens"}
    for item in answer["data"]:
        assert set(item) == {"object", "index", "embedding"}


def test_strict_and_own_vectors_are_the_same(server: LiveServer) -> None:
    body = {"model": MODEL, "input": ["iPhone", "Samsung"]}
    own, strict = (
        httpx.post(f"{server.url}{prefix}/embeddings", json=body).json()["data"]
        for prefix in PREFIXES
    )
    assert [item["embedding"] for item in own] == [item["embedding"] for item in strict]


@pytest.mark.parametrize(
    "field", ["truncate", "normalize", "prompt", "input_type", "output_dtype", "extra"]
)
def test_the_strict_route_takes_openais_fields_only(strict: OpenAI, field: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        strict.embeddings.create(model=MODEL, input="a", extra_body={field: None})
    assert (caught.value.param, caught.value.code) == (field, "unknown_field")


def test_our_own_fields_go_through_extra_body(server: LiveServer) -> None:
    with OpenAI(base_url=server.url + "/v1", api_key="any") as client:
        answer = client.embeddings.create(
            model=MODEL, input="iPhone", encoding_format="float", extra_body={"normalize": False}
        )
    assert np.linalg.norm(answer.data[0].embedding) > 1.5


def test_the_models_full_size(client: OpenAI) -> None:
    answer = client.embeddings.create(model=MODEL, input="a", dimensions=384)
    assert len(answer.data[0].embedding) == 384


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"dimensions": 128}, "dimensions"),
        ({"input": []}, "input"),
        ({"input": [30522]}, "input"),
        ({"encoding_format": "hex"}, "encoding_format"),
    ],
    ids=["dimensions", "empty", "token", "format"],
)
def test_a_bad_request(client: OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(**{"model": MODEL, "input": "a", **fields})
    assert caught.value.status_code == 400
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
    assert caught.value.request_id


def test_an_unknown_model(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.embeddings.create(model="text-embedding-3-small", input="a")
    assert caught.value.code == "model_not_found"
    assert MODEL in caught.value.message
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("text-embedding-3-small")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_keys(narrow: LiveServer, prefix: str) -> None:
    with OpenAI(base_url=narrow.url + prefix, api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            client.embeddings.create(model=MODEL, input="a")
        assert caught.value.code == "invalid_api_key"
        right = client.with_options(api_key=KEY)
        assert len(right.embeddings.create(model=MODEL, input="a").data) == 1


def test_overload(narrow: LiveServer) -> None:
    """A request beside a large job is refused, and the job is answered."""
    keyed = {"authorization": f"Bearer {KEY}"}

    def busy() -> bool:
        page = httpx.get(narrow.url + "/metrics", headers=keyed).text
        return f'queue_requests{{model="{MODEL}"}} 1.0' in page

    with (
        OpenAI(base_url=narrow.url + "/openai/v1", api_key=KEY, max_retries=0) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        job = pool.submit(
            client.embeddings.create,
            model=MODEL,
            input=[[1000 + number] * 250 for number in range(24)],
        )
        until(lambda: busy() or job.done())
        with pytest.raises(openai.RateLimitError) as caught:
            client.embeddings.create(model=MODEL, input="a")
        assert caught.value.code == "overloaded"
        assert int(caught.value.response.headers["retry-after"]) >= 1
        assert len(job.result().data) == 24
