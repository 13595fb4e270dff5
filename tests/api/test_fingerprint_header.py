# SPDX-License-Identifier: MIT OR Apache-2.0
"""``x-embedding-fingerprint``: on every answer with vectors, and a 409 for another model's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from error_shape import error_of
from in_process import serving
from live import LiveServer
from minilm import minilm_folder
from openai import OpenAI
from tokenizers import Tokenizer

MODEL = "all-MiniLM-L6-v2"
HEADER = "x-embedding-fingerprint"
ROUTES = [("POST", "/v1/embeddings"), ("GET", "/v1/embeddings"), ("POST", "/openai/v1/embeddings")]
OTHERS = ["another", "", "of-tiny, of-tiny", "OF-TINY", "\u00e9" * 300]

on_every_route = pytest.mark.parametrize(("method", "path"), ROUTES)


@pytest.fixture(scope="module")
def client(tiny_model: Path) -> Iterator[httpx.Client]:
    """A client of a server whose models tiny and all-MiniLM-L6-v2 have known fingerprints."""
    with (
        serving(model=(str(tiny_model), MODEL)) as server,
        httpx.Client(base_url=server.url, timeout=30) as client,
    ):
        for engine in server.app.state.registry:
            engine.info = replace(engine.info, fingerprint=f"of-{engine.info.name}")
        yield client


def embed(
    client: httpx.Client, path: str, input: Any, *, method: str = "POST", **headers: str
) -> httpx.Response:
    named = {name.replace("_", "-"): value.encode("latin-1") for name, value in headers.items()}
    body = {"model": "tiny", "input": input}
    return client.request(method, path, json=body, headers=named)  # type: ignore[arg-type]


@on_every_route
def test_answers_with_vectors_have_the_models(client: httpx.Client, method: str, path: str) -> None:
    for input in ("river", "river " * 300):
        assert embed(client, path, input, method=method).headers[HEADER] == "of-tiny"
    answer = client.request(method, path, json={"model": MODEL, "input": "river"})
    assert answer.headers[HEADER] == f"of-{MODEL}"


@on_every_route
def test_it_is_that_of_v1_models(server: LiveServer, method: str, path: str) -> None:
    """With the fingerprint that the model really has."""
    shown = httpx.get(f"{server.url}/v1/models/{MODEL}").json()["fingerprint"]
    body = {"model": MODEL, "input": "river"}
    answer = httpx.request(method, server.url + path, json=body)
    assert answer.headers[HEADER] == shown
    again = httpx.request(method, server.url + path, json=body, headers={HEADER: shown})
    assert (again.status_code, again.content) == (200, answer.content)
    other = {HEADER: f"not-{shown}"}
    error_of(httpx.request(method, server.url + path, json=body, headers=other), 409)


@on_every_route
def test_a_matching_one_changes_nothing(client: httpx.Client, method: str, path: str) -> None:
    plain = embed(client, path, "river", method=method)
    matching = embed(client, path, "river", method=method, x_embedding_fingerprint="of-tiny")
    assert (matching.status_code, matching.content) == (200, plain.content)


@pytest.mark.parametrize("sent", OTHERS, ids=ascii)
@on_every_route
def test_another_is_refused(client: httpx.Client, method: str, path: str, sent: str) -> None:
    answer = embed(client, path, "river", method=method, x_embedding_fingerprint=sent)
    error = error_of(answer, 409)
    assert (error["param"], error["code"]) == (HEADER, "fingerprint_mismatch")
    for part in (repr(sent[:100]), "'of-tiny'", "Embed your texts again", "serve the model"):
        assert part in error["message"]
    assert len(error["message"]) < 500
    assert HEADER not in answer.headers


def test_another_is_refused_before_tokenising(client: httpx.Client) -> None:
    """Whatever else is wrong with the inputs."""
    for input in ([[10**9]], ["a"] * 3000):
        answer = embed(client, "/v1/embeddings", input, x_embedding_fingerprint="another")
        error_of(answer, 409)


def test_of_an_unknown_model_none_is_asked(client: httpx.Client) -> None:
    body = {"model": "nope", "input": "a"}
    error_of(client.post("/v1/embeddings", json=body, headers={HEADER: "of-tiny"}), 404)


@on_every_route
def test_two_are_refused(client: httpx.Client, method: str, path: str) -> None:
    body = {"model": "tiny", "input": "river"}
    headers = [(HEADER, "of-tiny"), (HEADER, "of-tiny")]
    error = error_of(client.request(method, path, json=body, headers=headers), 400)
    assert error["param"] == HEADER
    assert "once" in error["message"]


def test_who_knows_the_model_may_send_token_ids_anywhere(client: httpx.Client) -> None:
    ids = Tokenizer.from_file(str(minilm_folder() / "tokenizer.json")).encode("the cat").ids[:4]
    with OpenAI(base_url=f"{client.base_url}/openai/v1", api_key="any", max_retries=0) as theirs:
        knowing = {HEADER: f"of-{MODEL}"}
        by_ids = theirs.embeddings.create(model=MODEL, input=[ids], extra_headers=knowing)
        by_text = theirs.embeddings.create(model=MODEL, input="the cat")
    assert by_ids.data[0].embedding == by_text.data[0].embedding
    error_of(embed(client, "/openai/v1/embeddings", [[7]], x_embedding_fingerprint="another"), 409)
    error_of(embed(client, "/openai/v1/embeddings", [[7]]), 400)


def test_openais_models_do_not_show_it(client: httpx.Client) -> None:
    assert client.get("/v1/models/tiny").json()["fingerprint"] == "of-tiny"
    assert "fingerprint" not in client.get("/openai/v1/models/tiny").json()
