# SPDX-License-Identifier: MIT OR Apache-2.0
"""The OpenAPI document is whole, and true of what the routes take and answer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute
from in_process import serving
from live import LiveServer, running_server
from pydantic import BaseModel

from embedding_server.api import embeddings, health, models
from embedding_server.api.parsing import parse
from embedding_server.api.schemas import (
    EmbeddingsRequest,
    EmbedRequest,
    OpenAIEmbeddingsRequest,
)
from embedding_server.app import create_app
from embedding_server.errors import InvalidRequest
from embedding_server.settings import Settings

MODEL = "all-MiniLM-L6-v2"
KEY = "sesame-4711"
KEYED = {"authorization": f"Bearer {KEY}"}
ROUTERS = (embeddings.router, models.router, health.router)
METHODS = ("get", "put", "post", "delete", "options", "head", "patch", "trace")
ERRORS = {
    "/v1/embeddings": {400, 401, 404, 408, 409, 413, 415, 429, 500, 503, 504},
    "/openai/v1/embeddings": {400, 401, 404, 408, 409, 413, 415, 429, 500, 503, 504},
    "/v1/models": {400, 401, 503},
    "/openai/v1/models": {400, 401, 503},
    "/v1/models/{name}": {400, 401, 404, 503},
    "/openai/v1/models/{name}": {400, 401, 404, 503},
    "/health/live": {400, 503},
    "/health/ready": {400, 503},
    "/health": {400, 503},
    "/metrics": {400, 401},
}
TYPES: dict[str, tuple[type, ...]] = {
    "null": (type(None),),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "string": (str,),
    "array": (list,),
    "object": (dict,),
}
ANNOTATIONS = {"title", "description", "examples", "default"}
CHECKED = {
    "$ref", "additionalProperties", "anyOf", "const", "enum", "items", "minItems", "minimum",
    "oneOf", "properties", "required", "type",
}  # fmt: skip

Schema = Mapping[str, Any]


@pytest.fixture(scope="module")
def live() -> Iterator[LiveServer]:
    with running_server("--model", MODEL, "--api-key", KEY, "--max-body-bytes", "100000") as live:
        yield live


@pytest.fixture(scope="module")
def client(live: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=live.url, headers=KEYED, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def document(client: httpx.Client) -> dict[str, Any]:
    """What the live server serves."""
    response = client.get("/openapi.json")
    assert response.headers["content-type"] == "application/json"
    served: dict[str, Any] = response.json()
    return served


def operations(document: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def resolve(document: Mapping[str, Any], reference: str) -> Any:
    assert reference.startswith("#/"), reference
    found: Any = document
    for part in reference.removeprefix("#/").split("/"):
        found = found[part]
    return found


def mismatch(document: Mapping[str, Any], schema: Schema, value: Any, at: str = "") -> str | None:
    """Where and how ``value`` breaks ``schema``; the part of JSON Schema that we use."""
    assert set(schema) <= ANNOTATIONS | CHECKED, f"unknown keywords in {schema}"

    def inner(part: Schema, item: Any, where: str) -> str | None:
        return mismatch(document, part, item, f"{at}{where}")

    if "$ref" in schema:
        return inner(resolve(document, schema["$ref"]), value, "")
    for keyword in ("anyOf", "oneOf"):
        problems = [inner(part, value, "") for part in schema.get(keyword, ())]
        fitting = problems.count(None)
        if problems and (fitting == 0 or (keyword == "oneOf" and fitting > 1)):
            return f"{at}: fits {fitting} of {keyword}: {problems}"
    if "type" in schema:
        fits = isinstance(value, TYPES[schema["type"]])
        if not fits or (isinstance(value, bool) and schema["type"] != "boolean"):
            return f"{at}: {value!r} is not of type {schema['type']}"
    if "const" in schema and value != schema["const"]:
        return f"{at}: {value!r} is not {schema['const']!r}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{at}: {value!r} is none of {schema['enum']}"
    if "minimum" in schema and value < schema["minimum"]:
        return f"{at}: {value!r} is too small"
    problems = []
    if isinstance(value, list):
        if len(value) < schema.get("minItems", 0):
            return f"{at}: too few items"
        if "items" in schema:
            problems = [inner(schema["items"], item, f"[{i}]") for i, item in enumerate(value)]
    if isinstance(value, dict):
        known = schema.get("properties", {})
        if missing := set(schema.get("required", ())) - set(value):
            return f"{at}: {missing} missing"
        more = schema.get("additionalProperties", True)
        for name, item in value.items():
            if name in known:
                problems.append(inner(known[name], item, f".{name}"))
            elif isinstance(more, dict):
                problems.append(inner(more, item, f".{name}"))
            elif not more:
                return f"{at}: {name!r} is not known"
    return next((problem for problem in problems if problem), None)


def undocumented(
    document: Mapping[str, Any], method: str, path: str, response: httpx.Response
) -> str | None:
    """What the document does not tell of ``response``, or tells otherwise."""
    operation = document["paths"][path][method]
    if str(response.status_code) not in operation["responses"]:
        return f"status {response.status_code}"
    told = operation["responses"][str(response.status_code)]
    headers = {name.lower() for name in told["headers"]}
    standard = {"content-type", "content-length", "date", "connection", "x-content-type-options"}
    if unknown := set(response.headers) - headers - standard:
        return f"headers {unknown}"
    media_type = response.headers["content-type"].partition(";")[0]
    if media_type not in told["content"]:
        return f"content type {media_type}"
    schema = told["content"][media_type]["schema"]
    value = response.json() if media_type == "application/json" else response.text
    # Answers hold no more than is told, whatever the schema leaves open.
    return mismatch(_closed(document), schema, value)


def _closed(node: Any) -> Any:
    """``node`` with every object of named properties closed to others."""
    if isinstance(node, dict):
        closed = {key: _closed(value) for key, value in node.items()}
        is_schema = "properties" in node and node.get("type") == "object"
        return {**closed, "additionalProperties": False} if is_schema else closed
    return [_closed(item) for item in node] if isinstance(node, list) else node


# The document by itself


def test_its_skeleton(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1.")
    assert document["info"]["title"] == "embedding-server"
    assert document["info"]["version"]
    assert set(document) == {"openapi", "info", "paths", "components"}
    assert set(document["components"]) == {"schemas", "securitySchemes"}
    ids = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(ids) == len(set(ids))


def test_every_operation_is_described(document: dict[str, Any]) -> None:
    for path, method, operation in operations(document):
        assert method in METHODS
        assert operation["summary"], path
        assert operation["description"], path
        assert "200" in operation["responses"]
        placeholders = {part[1:-1] for part in path.split("/") if part.startswith("{")}
        parameters = {(p["name"], p["in"]): p for p in operation["parameters"]}
        assert {name for name, place in parameters if place == "path"} == placeholders
        assert ("x-request-id", "header") in parameters
        for parameter in parameters.values():
            assert parameter["required"] is (parameter["in"] == "path")
            assert "schema" in parameter
        for response in operation["responses"].values():
            assert response["description"]
            assert response["content"]
            assert "x-request-id" in response["headers"]


def test_every_reference_leads_somewhere_and_every_schema_is_used(document: dict[str, Any]) -> None:
    used: set[str] = set()

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            if isinstance(node.get("$ref"), str):
                assert isinstance(resolve(document, node["$ref"]), dict)
                used.add(node["$ref"].rpartition("/")[2])
            node = list(node.values())
        if isinstance(node, list):
            for item in node:
                walk(item)

    walk(document)
    assert used == set(document["components"]["schemas"])


def test_keys_are_told(document: dict[str, Any]) -> None:
    assert document["components"]["securitySchemes"] == {
        "key": {"type": "http", "scheme": "bearer"}
    }
    for path, _, operation in operations(document):
        if path.startswith("/health"):
            assert "security" not in operation
        else:
            assert operation["security"] == [{"key": []}]
    for path, _, operation in operations(create_app(Settings(model=(MODEL,))).openapi()):
        if not path.startswith("/health"):
            assert operation["security"] == [{}, {"key": []}], "without a key set all may come"


@pytest.mark.parametrize("keys", [(), (KEY,)], ids=["without-keys", "with-keys"])
def test_public_metrics_need_no_key(keys: tuple[str, ...], tiny_model: Path) -> None:
    with serving(model=(str(tiny_model),), api_key=keys, metrics_public=True) as server:
        metrics = httpx.get(f"{server.url}/metrics")
        served = httpx.get(f"{server.url}/openapi.json", headers=KEYED).json()
        assert undocumented(served, "get", "/metrics", metrics) is None
    assert metrics.status_code == 200
    operation = served["paths"]["/metrics"]["get"]
    assert "security" not in operation
    assert "401" not in operation["responses"]
    others = [served["paths"][path]["get"]["security"] for path in ("/v1/models", "/v1/embeddings")]
    assert others == [[{"key": []}] if keys else [{}, {"key": []}]] * 2


# The document and the application


def test_it_lists_every_route_and_no_other(document: dict[str, Any]) -> None:
    routes = {
        (route.path_format, method.lower())
        for router in ROUTERS
        for route in router.routes
        if isinstance(route, APIRoute)
        for method in route.methods
    }
    assert {(path, method) for path, method, _ in operations(document)} == routes


def test_it_lists_the_errors_of_each_route(document: dict[str, Any]) -> None:
    told = {
        path: {int(status) for status in operation["responses"]} - {200}
        for path, _, operation in operations(document)
    }
    assert told == ERRORS
    for _, _, operation in operations(document):
        for status, response in operation["responses"].items():
            of_answers = {"x-request-id", "x-truncated-inputs", "x-embedding-fingerprint"}
            headers = set(response["headers"]) - of_answers
            special = {"401": {"WWW-Authenticate"}, "429": {"Retry-After"}, "503": {"Retry-After"}}
            assert headers == special.get(status, set())


def test_embeddings_routes_document_the_fingerprint(document: dict[str, Any]) -> None:
    for path, _, operation in operations(document):
        sent = "x-embedding-fingerprint" in {p["name"] for p in operation["parameters"]}
        answered = "x-embedding-fingerprint" in operation["responses"]["200"]["headers"]
        assert sent is answered is path.endswith("/embeddings")


@pytest.mark.parametrize(
    ("path", "schema"),
    [("/v1/embeddings", EmbeddingsRequest), ("/openai/v1/embeddings", OpenAIEmbeddingsRequest)],
)
def test_request_fields_are_those_that_are_parsed(
    document: dict[str, Any], path: str, schema: type[BaseModel]
) -> None:
    for method in document["paths"][path].values():
        body = method["requestBody"]
        assert body["required"] is True
        (media_type,) = body["content"]
        assert media_type == "application/json"
        told = resolve(document, body["content"][media_type]["schema"]["$ref"])
        assert list(told["properties"]) == list(schema.model_fields)
        assert set(told["required"]) == {"model", "input"}
        assert told["additionalProperties"] is False
        assert all(field.get("description") for field in told["properties"].values())


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"input": ["a", "b"]},
        {"input": [1, 2]},
        {"input": [[1], [2, 3]]},
        {"input": []},
        {"input": [[]]},
        {"input": None},
        {"input": ["a", 1]},
        {"input": [True]},
        {"input": [1.5]},
        {"model": None},
        {"encoding_format": "base64"},
        {"encoding_format": "hex"},
        {"encoding_format": None},
        {"dimensions": 64},
        {"dimensions": "64"},
        {"dimensions": True},
        {"user": "u"},
        {"user": 1},
        {"truncate": False},
        {"truncate": 0},
        {"normalize": None},
        {"prompt": "p"},
        {"prompt": 1},
        {"input_type": "query"},
        {"output_dtype": "ubinary"},
        {"output_dtype": "int4"},
        {"unknown": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("schema", [EmbeddingsRequest, OpenAIEmbeddingsRequest])
def test_the_schema_refuses_what_the_server_refuses(
    document: dict[str, Any],
    schema: type[EmbedRequest],
    fields: dict[str, Any],
) -> None:
    body = {"model": MODEL, "input": "a", **fields}
    told = document["components"]["schemas"][schema.__name__]
    try:
        parse(schema, json.dumps(body).encode())
        taken = True
    except InvalidRequest:
        taken = False
    assert (mismatch(document, told, body) is None) is taken


def test_the_served_document_is_the_applications(document: dict[str, Any]) -> None:
    assert create_app(Settings(model=(MODEL,), api_key=(KEY,))).openapi() == document


# The document and real answers

EMBED = {"model": MODEL, "input": ["iPhone", "word " * 300]}
UNLIKE_ANY = {"x-embedding-fingerprint": "unlike any"}


@pytest.mark.parametrize(
    ("status", "method", "path", "request_fields"),
    [
        (200, "post", "/v1/embeddings", {"json": EMBED}),
        (200, "get", "/v1/embeddings", {"json": EMBED}),
        (200, "post", "/v1/embeddings", {"json": {**EMBED, "encoding_format": "base64"}}),
        (200, "post", "/v1/embeddings", {"json": {**EMBED, "output_dtype": "binary"}}),
        (200, "post", "/openai/v1/embeddings", {"json": EMBED}),
        (200, "post", "/openai/v1/embeddings", {"json": {**EMBED, "encoding_format": "base64"}}),
        (200, "get", "/v1/models", {}),
        (200, "get", "/v1/models/{name}", {}),
        (200, "get", "/openai/v1/models", {}),
        (200, "get", "/openai/v1/models/{name}", {}),
        (200, "get", "/health", {}),
        (200, "get", "/health/live", {}),
        (200, "get", "/health/ready", {}),
        (200, "get", "/metrics", {}),
        (400, "post", "/v1/embeddings", {"json": {**EMBED, "truncate": False}}),
        (400, "get", "/v1/embeddings", {}),
        (400, "post", "/openai/v1/embeddings", {"json": {**EMBED, "truncate": False}}),
        *(
            (400, "get", path, {"headers": [("x-request-id", "a"), ("x-request-id", "b")]})
            for path in ("/v1/models", "/v1/models/{name}", "/health/live", "/metrics")
        ),
        (401, "post", "/v1/embeddings", {"headers": {"authorization": ""}}),
        (401, "post", "/openai/v1/embeddings", {"headers": {"authorization": ""}}),
        (401, "get", "/v1/models", {"headers": {"authorization": "Bearer x"}}),
        (401, "get", "/v1/models/{name}", {"headers": {"authorization": "Bearer x"}}),
        (401, "get", "/metrics", {"headers": {"authorization": "Bearer x"}}),
        (404, "post", "/v1/embeddings", {"json": {"model": "x", "input": "a"}}),
        (404, "post", "/openai/v1/embeddings", {"json": {"model": "x", "input": "a"}}),
        (409, "post", "/v1/embeddings", {"json": EMBED, "headers": UNLIKE_ANY}),
        (409, "get", "/v1/embeddings", {"json": EMBED, "headers": UNLIKE_ANY}),
        (409, "post", "/openai/v1/embeddings", {"json": EMBED, "headers": UNLIKE_ANY}),
        (413, "post", "/v1/embeddings", {"json": {"model": MODEL, "input": "a" * 100_000}}),
        (415, "post", "/v1/embeddings", {"data": {"model": MODEL, "input": "a"}}),
        (415, "post", "/openai/v1/embeddings", {"data": {"model": MODEL, "input": "a"}}),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value),
)
def test_an_answer_is_as_told(
    client: httpx.Client,
    document: dict[str, Any],
    status: int,
    method: str,
    path: str,
    request_fields: dict[str, Any],
) -> None:
    response = client.request(method, path.replace("{name}", MODEL), **request_fields)
    assert response.status_code == status, response.text[:300]
    assert undocumented(document, method, path, response) is None


@pytest.mark.parametrize("path", ["/v1/models/{name}", "/openai/v1/models/{name}"])
def test_an_unknown_model_is_as_told(
    client: httpx.Client, document: dict[str, Any], path: str
) -> None:
    response = client.get(path.replace("{name}", "nope"))
    assert response.status_code == 404
    assert undocumented(document, "get", path, response) is None


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "integer"}, True),
        ({"type": "number"}, "1"),
        ({"type": "array", "items": {"type": "string"}}, ["a", 1]),
        ({"type": "array", "minItems": 1}, []),
        ({"type": "object", "required": ["a"]}, {}),
        ({"properties": {"a": {"type": "null"}}}, {"a": 1}),
        ({"additionalProperties": False}, {"a": 1}),
        ({"additionalProperties": {"type": "string"}}, {"a": 1}),
        ({"anyOf": [{"type": "null"}, {"type": "string"}]}, 1),
        ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, 1),
        ({"enum": ["a"]}, "b"),
        ({"const": "a"}, "b"),
        ({"type": "integer", "minimum": 1}, 0),
        ({"$ref": "#/components/schemas/Usage"}, {"prompt_tokens": 1}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_the_check_itself_finds_what_does_not_fit(
    document: dict[str, Any], schema: Schema, value: Any
) -> None:
    assert mismatch(document, schema, value) is not None
