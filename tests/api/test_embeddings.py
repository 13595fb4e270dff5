# SPDX-License-Identifier: MIT OR Apache-2.0
"""Every field of ``/v1/embeddings``, and everything that may come instead of one."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from error_shape import error_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live import LiveServer
from minilm import minilm_folder
from numpy.typing import NDArray
from raw_http import exchange
from tokenizers import Tokenizer

MODEL = "all-MiniLM-L6-v2"
LIMIT = 256
DTYPES = {"int8": np.int8, "uint8": np.uint8, "binary": np.int8, "ubinary": np.uint8}
TEXTS = ["iPhone", "The quick brown fox jumps over the lazy dog.", "", "日本語 und Grüße", "a\tb\n"]
LONG = "word " * 300
LONG_TOKENS = 302

property_test = settings(
    max_examples=60,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """The model's own tokenizer, without special tokens and without a limit."""
    tokenizer = Tokenizer.from_file(str(minilm_folder() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def post(client: httpx.Client, input: Any, **fields: Any) -> httpx.Response:
    return client.post("/v1/embeddings", json={"model": MODEL, "input": input, **fields})


def answer(client: httpx.Client, input: Any, **fields: Any) -> dict[str, Any]:
    response = post(client, input, **fields)
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def embed(client: httpx.Client, input: Any, **fields: Any) -> NDArray[Any]:
    data = answer(client, input, **fields)["data"]
    return np.array([item["embedding"] for item in data], dtype=np.float32)


def refused(client: httpx.Client, input: Any, **fields: Any) -> dict[str, Any]:
    return error_of(post(client, input, **fields), 400)


# The answer


def test_the_shape_of_an_answer(client: httpx.Client) -> None:
    response = post(client, ["iPhone", "Samsung"])
    assert response.headers["content-type"] == "application/json"
    assert "x-truncated-inputs" not in response.headers
    body = response.json()
    assert list(body) == ["object", "model", "data", "usage"]
    assert (body["object"], body["model"]) == ("list", MODEL)
    assert body["usage"] == {"prompt_tokens": 6, "total_tokens": 6}
    for index, item in enumerate(body["data"]):
        assert list(item) == ["object", "index", "dims", "embedding"]
        assert (item["object"], item["index"], item["dims"]) == ("embedding", index, 384)
        assert len(item["embedding"]) == 384


def test_usage_counts_special_tokens_and_what_was_computed(
    client: httpx.Client, tokenizer: Tokenizer
) -> None:
    expected = sum(len(ids_of(tokenizer, text)) + 2 for text in TEXTS)
    assert answer(client, TEXTS)["usage"]["prompt_tokens"] == expected
    assert answer(client, [*TEXTS, LONG])["usage"]["total_tokens"] == expected + LIMIT


def test_the_answer_keeps_the_order_of_the_inputs(client: httpx.Client) -> None:
    texts = [f"{'word ' * (index * 7 % 50)}number {index}" for index in range(100)]
    body = answer(client, texts)
    assert [item["index"] for item in body["data"]] == list(range(100))
    together = np.array([item["embedding"] for item in body["data"]])
    alone = np.concatenate([embed(client, text) for text in texts[::9]])
    np.testing.assert_allclose(together[::9], alone, atol=1e-6)


# input


def test_a_string_is_a_list_of_one(client: httpx.Client) -> None:
    assert post(client, "iPhone").content == post(client, ["iPhone"]).content


def test_token_ids_give_their_texts_vector(client: httpx.Client, tokenizer: Tokenizer) -> None:
    texts = [text for text in TEXTS if text]
    lists = [ids_of(tokenizer, text) for text in texts]
    np.testing.assert_allclose(embed(client, lists), embed(client, texts), atol=1e-6)
    assert answer(client, lists)["usage"] == answer(client, texts)["usage"]
    assert post(client, lists[0]).content == post(client, [lists[0]]).content


@pytest.mark.parametrize("token", [30522, -1, 2**31, 2**63, 2**64 - 1], ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
def test_ids_outside_the_vocabulary(client: httpx.Client, token: int, nested: bool) -> None:
    error = refused(client, [[5], [7, token]] if nested else [7, token])
    assert error["param"] == "input"
    assert error["message"].startswith("input[1]" if nested else "input[0]")
    assert f"holds {token}," in error["message"]
    assert "from 0 to 30521" in error["message"]
    assert "check_embedding_ctx_length=False" in error["message"]


def test_the_empty_text_is_embedded(client: httpx.Client) -> None:
    body = answer(client, "")
    assert body["usage"]["prompt_tokens"] == 2
    assert np.linalg.norm(body["data"][0]["embedding"]) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("count", [1, 2048])
def test_as_many_inputs_as_are_taken(client: httpx.Client, count: int) -> None:
    assert len(answer(client, ["a"] * count, encoding_format="base64")["data"]) == count


@pytest.mark.parametrize(
    ("input", "count"), [(["a"] * 2049, 2049), ([[1]] * 3000, 3000)], ids=["texts", "ids"]
)
def test_more_inputs_than_are_taken(client: httpx.Client, input: Any, count: int) -> None:
    error = refused(client, input)
    assert error["param"] == "input"
    assert str(count) in error["message"]
    assert "2048" in error["message"]


def test_more_tokens_than_are_taken_together(client: httpx.Client) -> None:
    error = refused(client, [[7] * 200] * 2000)
    assert (error["param"], error["code"]) == ("input", "request_too_large")
    assert "404000 tokens" in error["message"]
    assert "300000" in error["message"]


@pytest.mark.parametrize(
    ("input", "message"),
    [
        pytest.param([], "is an empty list", id="no-inputs"),
        pytest.param([[]], "input[0] is an empty list", id="no-ids"),
        pytest.param([[1], []], "input[1] is an empty list", id="no-ids-later"),
        pytest.param(None, "must be a string", id="null"),
        pytest.param(5, "must be a string", id="number"),
        pytest.param(True, "must be a string", id="boolean"),
        pytest.param({"text": "a"}, "must be a string", id="object"),
        pytest.param(["a", 1], "input[1] is a whole number", id="text-then-id"),
        pytest.param([1, "a"], "input[1] is a string", id="id-then-text"),
        pytest.param([[1], "a"], "input[1] is a string", id="ids-then-text"),
        pytest.param(["a", None], "input[1] is null", id="null-among-texts"),
        pytest.param(["a", ["b"]], "input[1] is a list", id="list-among-texts"),
        pytest.param([["a"]], "input[0] must hold token ids", id="list-of-lists-of-texts"),
        pytest.param([{"text": "a"}], "input[0] is an object", id="list-of-objects"),
        pytest.param([True], "input[0] is a boolean", id="boolean-id"),
        pytest.param([1, True], "input[1] is a boolean", id="boolean-among-ids"),
        pytest.param([[1, True]], "input[0] must hold token ids", id="boolean-in-nested-ids"),
        pytest.param([1.0], "input[0] is a number", id="float-id"),
        pytest.param([[1.5]], "input[0] must hold token ids", id="float-in-nested-ids"),
        pytest.param([[[1]]], "input[0] must hold token ids", id="too-deep"),
        pytest.param([10**30], "input[0] is a number", id="huge-id"),
    ],
)
def test_inputs_that_are_none(client: httpx.Client, input: Any, message: str) -> None:
    error = refused(client, input)
    assert error["param"] == "input"
    assert message in error["message"]


# encoding_format


def test_base64_holds_the_very_bits_of_the_numbers(client: httpx.Client) -> None:
    numbers = embed(client, TEXTS, encoding_format="float")
    encoded = answer(client, TEXTS, encoding_format="base64")["data"]
    decoded = [np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in encoded]
    assert np.array_equal(numbers.view(np.uint32), np.array(decoded).view(np.uint32))
    assert [item["dims"] for item in encoded] == [384] * len(TEXTS)


# dimensions


@pytest.mark.parametrize("dimensions", [1, 128, 383, 385, 0, -1])
def test_other_sizes_need_a_model_trained_for_them(client: httpx.Client, dimensions: int) -> None:
    error = refused(client, "a", dimensions=dimensions)
    assert error["param"] == "dimensions"
    assert "leave out 'dimensions', or send its full size, 384" in error["message"]


@pytest.mark.parametrize("path", ["/v1/embeddings", "/openai/v1/embeddings"])
def test_the_full_size_is_given_by_every_model(client: httpx.Client, path: str) -> None:
    """LangChain, Dify and Weaviate always send it."""
    body = {"model": MODEL, "input": TEXTS}
    plain = client.post(path, json=body)
    sized = client.post(path, json={**body, "dimensions": 384})
    assert plain.status_code == sized.status_code == 200
    assert sized.json() == plain.json()


# input_type and prompt


@pytest.mark.parametrize("input_type", ["query", "document", None])
def test_a_model_without_prompts_takes_query_and_document(
    client: httpx.Client, input_type: str | None
) -> None:
    assert post(client, "iPhone", input_type=input_type).content == post(client, "iPhone").content


@pytest.mark.parametrize("input_type", ["clustering", "Query", "", "search_query"])
def test_a_prompt_that_the_model_does_not_have(client: httpx.Client, input_type: str) -> None:
    error = refused(client, "iPhone", input_type=input_type)
    assert error["param"] == "input_type"
    assert repr(input_type) in error["message"]


@pytest.mark.parametrize("prompt", ["query: ", "", "Represent this", "日本 "])
def test_prompt_is_prepended(client: httpx.Client, prompt: str) -> None:
    with_prompt = post(client, TEXTS, prompt=prompt)
    assert with_prompt.content == post(client, [prompt + text for text in TEXTS]).content


def test_prompt_is_prepended_to_token_ids(client: httpx.Client, tokenizer: Tokenizer) -> None:
    ids = [ids_of(tokenizer, text) for text in ("iPhone", "Samsung")]
    by_ids = embed(client, ids, prompt="query: ")
    np.testing.assert_allclose(
        by_ids, embed(client, ["query: iPhone", "query: Samsung"]), atol=1e-6
    )


def test_prompt_counts_as_tokens_and_can_be_what_is_too_long(client: httpx.Client) -> None:
    item = answer(client, "iPhone", prompt=LONG)["data"][0]
    assert (item["truncated"], item["tokens"]) == (True, LONG_TOKENS + 1)


def test_input_type_and_prompt_exclude_each_other(client: httpx.Client) -> None:
    error = refused(client, "a", input_type="query", prompt="query: ")
    assert error["param"] == "prompt"


# truncate


@pytest.mark.parametrize("fields", [{}, {"truncate": True}], ids=["default", "true"])
def test_an_over_long_input_is_cut_and_says_so(
    client: httpx.Client, fields: dict[str, Any]
) -> None:
    response = post(client, ["short", LONG, "also short", LONG + "tail"], **fields)
    assert response.headers["x-truncated-inputs"] == "2"
    data = response.json()["data"]
    assert [item.get("truncated") for item in data] == [None, True, None, True]
    assert [item.get("tokens") for item in data] == [None, LONG_TOKENS, None, LONG_TOKENS + 1]
    assert "truncated" not in data[0]
    assert data[1]["embedding"] == data[3]["embedding"]
    kept = embed(client, "word " * (LIMIT - 2))[0]
    np.testing.assert_allclose(data[1]["embedding"], kept, atol=1e-6)


@pytest.mark.parametrize("form", ["text", "ids"])
def test_truncate_false_refuses_an_over_long_input(
    client: httpx.Client, tokenizer: Tokenizer, form: str
) -> None:
    inputs: list[Any] = ["short", "word " * (LIMIT - 2), "word " * (LIMIT - 1)]
    if form == "ids":
        inputs = [ids_of(tokenizer, text) for text in inputs]
    response = post(client, inputs[:2], truncate=False)
    assert response.status_code == 200
    assert "x-truncated-inputs" not in response.headers
    error = refused(client, inputs, truncate=False)
    assert (error["param"], error["code"]) == ("input", "context_length_exceeded")
    assert error["message"].startswith("input[2] ")
    assert {str(LIMIT), str(LIMIT + 1)} <= set(re.findall(r"\d+", error["message"]))


# normalize


def test_normalize_false_leaves_the_models_own_length(client: httpx.Client) -> None:
    scaled = embed(client, TEXTS)
    own = embed(client, TEXTS, normalize=False)
    lengths = np.linalg.norm(own, axis=1, keepdims=True)
    np.testing.assert_allclose(np.linalg.norm(scaled, axis=1), 1, atol=1e-6)
    assert np.abs(lengths - 1).min() > 0.5
    np.testing.assert_allclose(own / lengths, scaled, atol=1e-6)


# output_dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_base64_of_quantised_values(client: httpx.Client, dtype: str) -> None:
    numbers = answer(client, TEXTS, output_dtype=dtype)["data"]
    encoded = answer(client, TEXTS, output_dtype=dtype, encoding_format="base64")["data"]
    for as_numbers, as_text in zip(numbers, encoded, strict=True):
        assert as_numbers["dims"] == as_text["dims"] == 384
        assert all(type(value) is int for value in as_numbers["embedding"])
        decoded = np.frombuffer(base64.b64decode(as_text["embedding"]), DTYPES[dtype])
        assert decoded.tolist() == as_numbers["embedding"]
        assert len(decoded) == (48 if "binary" in dtype else 384)


@pytest.mark.parametrize("dtype", ["binary", "ubinary"])
def test_bits_are_those_of_sentence_transformers(client: httpx.Client, dtype: str) -> None:
    from sentence_transformers.util import quantize_embeddings

    expected = quantize_embeddings(embed(client, TEXTS), dtype)
    np.testing.assert_array_equal(embed(client, TEXTS, output_dtype=dtype), expected)


@pytest.mark.parametrize(("dtype", "zero"), [("int8", 0), ("uint8", 128)])
def test_bytes_are_scaled_by_each_vectors_own_peak(
    client: httpx.Client, dtype: str, zero: int
) -> None:
    exact = embed(client, TEXTS)
    quantised = embed(client, TEXTS, output_dtype=dtype) - zero
    expected = np.rint(127 * exact / np.abs(exact).max(axis=1, keepdims=True))
    assert np.abs(quantised - expected).max() <= 1
    cosines = (quantised * exact).sum(axis=1) / np.linalg.norm(quantised, axis=1)
    assert cosines.min() > 0.9995
    alone = embed(client, TEXTS[0], output_dtype=dtype)[0] - zero
    np.testing.assert_array_equal(alone, quantised[0])


def test_output_dtype_float_is_the_default(client: httpx.Client) -> None:
    assert post(client, "a", output_dtype="float").content == post(client, "a").content


# user, null, unknown and wrong fields


def test_user_is_accepted(client: httpx.Client) -> None:
    assert post(client, "a", user="somebody").content == post(client, "a").content


def test_null_means_the_default(client: httpx.Client) -> None:
    fields = (
        "encoding_format", "dimensions", "input_type", "prompt", "truncate", "normalize",
        "output_dtype", "user",
    )  # fmt: skip
    assert post(client, [LONG], **dict.fromkeys(fields)).content == post(client, [LONG]).content


@pytest.mark.parametrize("field", ["model", "input"])
def test_what_is_required(client: httpx.Client, field: str) -> None:
    body = {"model": MODEL, "input": "a"}
    del body[field]
    error = error_of(client.post("/v1/embeddings", json=body), 400)
    assert error["param"] == field
    assert "required" in error["message"]


@pytest.mark.parametrize("field", ["inputs", "Input", "dimension", "task", "", "é\n"])
def test_an_unknown_field_is_named_beside_the_known_ones(client: httpx.Client, field: str) -> None:
    error = refused(client, "a", **{field: 1})
    assert (error["param"], error["code"]) == (field, "unknown_field")
    assert repr(field) in error["message"]
    assert "encoding_format" in error["message"]


def test_an_unknown_field_of_any_length_gets_a_short_answer(client: httpx.Client) -> None:
    assert len(post(client, "a", **{"x" * 100_000: 1}).content) < 1000


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", 1),
        ("model", None),
        ("model", ["all-MiniLM-L6-v2"]),
        ("encoding_format", "hex"),
        ("encoding_format", "Base64"),
        ("encoding_format", 1),
        ("dimensions", "384"),
        ("dimensions", 384.0),
        ("dimensions", True),
        ("dimensions", 10**30),
        ("input_type", 1),
        ("prompt", ["a"]),
        ("truncate", "false"),
        ("truncate", 0),
        ("truncate", "END"),
        ("normalize", 1),
        ("normalize", "yes"),
        ("output_dtype", "float32"),
        ("output_dtype", 8),
        ("user", 7),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_value_of_the_wrong_type(client: httpx.Client, field: str, value: Any) -> None:
    body = {"model": MODEL, "input": "a", field: value}
    error = error_of(client.post("/v1/embeddings", json=body), 400)
    assert error["param"] == field
    assert repr(field) in error["message"]


# The body


def body_of(input: bytes) -> bytes:
    return b'{"model": "all-MiniLM-L6-v2", "input": %b}' % input


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b" \n", id="blank"),
        pytest.param(b"[]", id="array"),
        pytest.param(b'["iPhone"]', id="array-of-texts"),
        pytest.param(b'"iPhone"', id="string"),
        pytest.param(b"null", id="null"),
        pytest.param(b"{", id="cut-off"),
        pytest.param(body_of(b'"a"') + b"}", id="trailing"),
        pytest.param(body_of(b"'a'"), id="single-quotes"),
        pytest.param(body_of(b'"a",'), id="trailing-comma"),
        pytest.param(b"\xef\xbb\xbf" + body_of(b'"a"'), id="byte-order-mark"),
        pytest.param(body_of(b'"a"').decode().encode("utf-16"), id="utf-16"),
        pytest.param(body_of(b'"\xff"'), id="not-utf-8"),
        pytest.param(body_of(b'"\xc3"'), id="half-a-character"),
        pytest.param(body_of(b'"\xed\xa0\x80"'), id="surrogate-in-utf-8"),
        pytest.param(body_of(rb'"\ud800"'), id="lone-high-surrogate"),
        pytest.param(body_of(rb'["a", "\udc00b"]'), id="lone-low-surrogate"),
        pytest.param(body_of(b'"a\x00b"'), id="bare-nul"),
        pytest.param(body_of(b"NaN"), id="nan"),
        pytest.param(body_of(b"[Infinity]"), id="infinity"),
        pytest.param(body_of(b"[1e400]"), id="overflow"),
        pytest.param(body_of(b"9" * 100_000), id="endless-number"),
        pytest.param(body_of(b"[" * 100_000 + b"]" * 100_000), id="deep"),
        pytest.param(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, id="deep-objects"),
        pytest.param(body_of(b"[" * 500 + b"]" * 500), id="rather-deep"),
    ],
)
def test_a_body_that_is_no_request(client: httpx.Client, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    response = client.post("/v1/embeddings", content=body, headers=headers)
    error_of(response, 400)
    assert len(response.content) < 1000


def test_an_escaped_nul_is_dropped_as_the_tokenizer_drops_it(client: httpx.Client) -> None:
    assert post(client, "iPh\0one").content == post(client, "iPhone").content


def test_a_paired_surrogate_is_one_character(client: httpx.Client) -> None:
    escaped = client.post(
        "/v1/embeddings",
        content=body_of(rb'"\ud83d\ude00 hi"'),
        headers={"content-type": "application/json"},
    )
    assert escaped.content == post(client, "😀 hi").content


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (body_of(b'"Samsung", "input": "iPhone"'), "input"),
        (body_of(b'"a", "input"\n: "a"'), "input"),
        (body_of(b'"a", "model": "all-MiniLM-L6-v2"'), "model"),
        (body_of(b'"a", "truncate": null, "truncate": false'), "truncate"),
    ],
    ids=["two-texts", "the-same-twice", "model", "null-first"],
)
def test_a_field_that_is_there_twice(client: httpx.Client, body: bytes, field: str) -> None:
    headers = {"content-type": "application/json; charset=utf-8"}
    error = error_of(client.post("/v1/embeddings", content=body, headers=headers), 400)
    assert (error["param"], error["message"]) == (
        field, f"The field {field!r} is there twice; send it once."
    )  # fmt: skip


@pytest.mark.parametrize("text", ["input", "model", '"input"', '{"input": "input"}'])
def test_texts_that_look_like_a_field_twice(client: httpx.Client, text: str) -> None:
    assert len(answer(client, [text, "input"], user="model")["data"]) == 2
    assert len(answer(client, text, prompt="input")["data"]) == 1


@property_test
@given(texts=st.lists(st.text(), min_size=1, max_size=3))
def test_any_unicode_text_is_embedded(client: httpx.Client, texts: list[str]) -> None:
    vectors = embed(client, texts)
    assert vectors.shape == (len(texts), 384)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.sampled_from([MODEL, "float", "base64", "query", "int8", "binary"]),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values),
    max_leaves=6,
)
fields = st.sampled_from(
    [
        "encoding_format",
        "dimensions",
        "input_type",
        "prompt",
        "truncate",
        "normalize",
        "output_dtype",
        "user",
    ]
)


@property_test
@given(input=json_values, more=st.dictionaries(fields | st.text(max_size=5), json_values))
def test_any_json_gets_vectors_or_a_reason(
    client: httpx.Client, input: Any, more: dict[str, Any]
) -> None:
    body = json.dumps({**more, "model": MODEL, "input": input})
    headers = {"content-type": "application/json"}
    response = client.post("/v1/embeddings", content=body, headers=headers)
    if response.status_code != 200:
        error_of(response, 400)


# GET


def test_get_with_a_body_answers_as_post_does(client: httpx.Client) -> None:
    body = {"model": MODEL, "input": ["iPhone", LONG], "encoding_format": "base64"}
    by_get = client.request("GET", "/v1/embeddings", json=body)
    by_post = client.post("/v1/embeddings", json=body)
    assert by_get.status_code == 200
    assert by_get.content == by_post.content
    changing = ("date", "x-request-id")
    assert {k: v for k, v in by_get.headers.items() if k not in changing} == {
        k: v for k, v in by_post.headers.items() if k not in changing
    }


def test_get_as_httpie_sends_it(client: httpx.Client, server: LiveServer) -> None:
    """``http get localhost:5000/v1/embeddings model=… input:='["iPhone", "Samsung"]'``."""
    body = b'{"model": "all-MiniLM-L6-v2", "input": ["iPhone", "Samsung"]}'
    response = exchange(
        server.url,
        b"GET /v1/embeddings HTTP/1.1\r\n"
        b"User-Agent: HTTPie/3.2.4\r\n"
        b"Accept-Encoding: gzip, deflate\r\n"
        b"Accept: application/json, */*;q=0.5\r\n"
        b"Connection: close\r\n"
        b"Content-Type: application/json\r\n"
        b"Content-Length: %d\r\n"
        b"Host: localhost:5000\r\n\r\n%b" % (len(body), body),
    )
    assert response.status_code == 200
    assert response.content == post(client, ["iPhone", "Samsung"]).content


def test_get_without_a_body(client: httpx.Client) -> None:
    error = error_of(client.get("/v1/embeddings"), 400)
    assert "body is empty" in error["message"]


# x-request-id


@pytest.mark.parametrize("route", ["/v1/embeddings", "/v1/models", "/health/live", "/nowhere"])
def test_every_answer_has_an_id(client: httpx.Client, route: str) -> None:
    first, second = (client.get(route).headers["x-request-id"] for _ in range(2))
    assert re.fullmatch(r"[0-9a-f]{32}", first)
    assert first != second


@pytest.mark.parametrize("value", ["a", "x" * 128, "{a/b}=%0a;\"'\\~!"])
def test_the_clients_own_id_comes_back(client: httpx.Client, value: str) -> None:
    response = client.get("/v1/models", headers={"x-request-id": value})
    assert response.headers["x-request-id"] == value


@pytest.mark.parametrize(
    "value",
    [b"", b"two words", b"x" * 129, b"x" * 10_000, "é".encode(), b"a\tb", b"\x80"],
    ids=["empty", "space", "129", "10k", "utf-8", "tab", "high-byte"],
)
def test_an_id_that_could_do_harm_is_replaced(client: httpx.Client, value: bytes) -> None:
    response = client.get("/v1/models", headers={"x-request-id": value})
    assert response.status_code == 200
    assert re.fullmatch(r"[0-9a-f]{32}", response.headers["x-request-id"])


def test_an_unknown_field_is_named_before_a_missing_one(client: httpx.Client) -> None:
    answer = client.post("/v1/embeddings", json={"model": MODEL, "inputs": "a"})
    error = error_of(answer, 400)
    assert (error["param"], error["code"]) == ("inputs", "unknown_field")
    assert "input" in error["message"]
