# SPDX-License-Identifier: MIT OR Apache-2.0
"""The names that a served model answers to, on every route, and those that it does not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tiny_models
from error_shape import error_of
from fake_backends import Blocked
from in_process import serving, until
from live import LiveServer, running_server
from model_folders import put_in_cache

from embedding_server.models.catalog import CATALOG
from embedding_server.models.spec import parse_spec

OLD, NEW = "1" * 40, "2" * 40
MINILM = CATALOG["all-MiniLM-L6-v2"]
NAMES = {
    "new": "new",
    "org/tiny@main": "new",
    f"org/tiny@{NEW}": "new",
    "old": "old",
    f"org/tiny@{OLD}": "old",
    "mine": "mine",
    MINILM.name: "mine",
    MINILM.repo: "mine",
    f"{MINILM.repo}@{MINILM.revision}": "mine",
}
"""What may be asked for, and the name that it is served under."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hub's cache with two revisions of org/tiny, of which the branch main has the newer."""
    folder = tmp_path_factory.mktemp("hub")
    for seed, commit in enumerate((OLD, NEW)):
        model = tiny_models.make_bert(folder / f"seed-{seed}", seed=seed)
        put_in_cache(model.folder, folder / "cache", "org/tiny", commit)
    return folder / "cache"


@pytest.fixture(scope="module")
def live(cache: Path) -> Iterator[LiveServer]:
    """A server of both revisions and of a model of the catalog, each under an alias."""
    models = ("org/tiny@main", f"org/tiny@{OLD}", MINILM.name)
    aliases = ("new", "old", "mine")
    flags = [part for model in models for part in ("--model", model)]
    flags += [part for alias in aliases for part in ("--served-model-name", alias)]
    env = {"HF_HUB_CACHE": str(cache)}
    with running_server(*flags, "--log-format", "json", env=env) as server:
        yield server


@pytest.fixture(scope="module")
def client(live: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=live.url, timeout=60) as client:
        yield client


def answer(client: httpx.Client, name: str, prefix: str = "/v1") -> dict[str, Any]:
    response = client.post(f"{prefix}/embeddings", json={"model": name, "input": "one city"})
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def vector(client: httpx.Client, name: str, prefix: str = "/v1") -> list[float]:
    embedding: list[float] = answer(client, name, prefix)["data"][0]["embedding"]
    return embedding


def test_the_models_can_be_told_apart(client: httpx.Client) -> None:
    assert not np.allclose(vector(client, "new"), vector(client, "old"), atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prefix", ["/v1", "/openai/v1"])
def test_every_name_finds_its_model_and_is_repeated(
    client: httpx.Client, prefix: str, name: str
) -> None:
    assert answer(client, name, prefix)["model"] == name
    assert vector(client, name, prefix) == vector(client, NAMES[name])
    shown = client.get(f"{prefix}/models/{name}").json()
    assert shown["id"] == name
    assert {**shown, "id": ""} == {**client.get(f"{prefix}/models/{NAMES[name]}").json(), "id": ""}


@pytest.mark.parametrize(
    "name",
    [
        *("tiny", "org/tiny"),  # which of both?
        f"org/tiny@{'3' * 40}",
        "org/tiny@",
        "ORG/tiny",
        "@main",
        f"{MINILM.name}@{MINILM.revision}",
        f"{MINILM.repo}@main",
    ],
)
def test_other_names_are_not_found(client: httpx.Client, name: str) -> None:
    for response in (
        client.post("/v1/embeddings", json={"model": name, "input": "a"}),
        client.get(f"/v1/models/{name}"),
        client.get(f"/openai/v1/models/{name}"),
    ):
        error = error_of(response, 404)
        assert error["code"] == "model_not_found"
        assert error["message"].endswith("there are: new, old, mine.")


def test_lists_metrics_and_logs_have_the_served_names(
    client: httpx.Client, live: LiveServer
) -> None:
    for name in NAMES:
        answer(client, name)
    assert client.get("/v1/models").json()["data"] == ["new", "old", "mine"]
    listed = client.get("/openai/v1/models").json()["data"]
    assert [model["id"] for model in listed] == ["new", "old", "mine"]
    assert "org/tiny" not in client.get("/metrics").text

    def logged() -> set[str]:
        lines = [json.loads(line) for line in live.log.splitlines() if line.startswith("{")]
        return {line["model"] for line in lines if "model" in line}

    until(lambda: logged() == {"new", "old", "mine"})


def test_an_alias_goes_before_another_models_hub_id_and_catalog_name(tmp_path: Path) -> None:
    folders = [tiny_models.make_bert(tmp_path / str(seed), seed=seed).folder for seed in range(2)]
    aliases = (MINILM.repo, MINILM.name, "mine")
    with (
        serving(model=(MINILM.name, *map(str, folders)), served_model_name=aliases[::-1]) as server,
        httpx.Client(base_url=server.url) as client,
    ):
        dims = {name: client.get(f"/v1/models/{name}").json()["dims"] for name in aliases}
        assert dims == {MINILM.repo: 32, MINILM.name: 32, "mine": 384}
        assert vector(client, MINILM.repo) != vector(client, MINILM.name)


def test_a_folder_has_no_other_name_than_its_alias(tiny_model: Path) -> None:
    with serving(model=(str(tiny_model),), served_model_name=("mine",)) as server:
        assert httpx.get(f"{server.url}/v1/models/mine").status_code == 200
        error_of(httpx.get(f"{server.url}/v1/models/{tiny_model.name}"), 404)


def test_every_name_is_starting_while_its_model_is_loaded(
    blocked: type[Blocked], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    blocked.reset(load=False)
    names = ("tiny", "org/tiny", "org/tiny@main", f"org/tiny@{NEW}")
    with (
        serving(wait=False, model=("org/tiny@main",), backend="onnx") as server,
        httpx.Client(base_url=server.url) as client,
    ):
        for name in names:
            post = client.post("/v1/embeddings", json={"model": name, "input": "a"})
            for response in (post, client.get(f"/v1/models/{name}")):
                assert "starting" in error_of(response, 503)["message"]
        blocked.release()
        until(lambda: client.get("/health/ready").status_code == 200)
        assert [answer(client, name)["model"] for name in names] == list(names)


def test_hub_ids_of_a_spec(tiny_model: Path) -> None:
    assert parse_spec("org/tiny").hub_ids(OLD) == (f"org/tiny@{OLD}",)
    assert parse_spec("org/tiny@v2").hub_ids(OLD) == (f"org/tiny@{OLD}", "org/tiny@v2")
    assert parse_spec("org/tiny@v2").hub_ids(None) == ()  # it may be any
    assert parse_spec(str(tiny_model)).hub_ids(OLD) == ()
