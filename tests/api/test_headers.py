# SPDX-License-Identifier: MIT OR Apache-2.0
"""Headers that may be there once: two are refused by name, on every route that reads them."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import h2.config
import h2.connection
import h2.events
import pytest
from error_shape import error_of
from in_process import InProcessServer, serving, until
from raw_http import connect, exchange

import embedding_server.api
from embedding_server.serving.servers.base import SERVERS

ORIGIN = "https://app.example.com"
BODY = json.dumps({"model": "tiny", "input": "river"}).encode()
EMBED = ("POST /v1/embeddings", "POST /openai/v1/embeddings", "GET /v1/embeddings")
PLAIN = (
    *(
        "GET /v1/models",
        "GET /v1/models/tiny",
        "GET /openai/v1/models",
        "GET /openai/v1/models/tiny",
    ),
    *("GET /health", "GET /health/live", "GET /health/ready", "GET /metrics", "GET /openapi.json"),
    *("HEAD /v1/models",),
)
ALL = (*EMBED, *PLAIN, "GET /docs")

READ = {
    "x-request-id": (ALL, "mine", "other"),
    "origin": (ALL, ORIGIN, "https://b.example"),
    "content-type": (EMBED, "application/json", "text/plain"),
    "content-encoding": (EMBED, "identity", "gzip"),
    "x-request-timeout": (EMBED, "60", "1"),
    "x-forwarded-proto": (("GET /docs",), "https", "http"),
}
"""The routes that read each, and two values for it."""

NOT_READ = [
    *(f"{route} content-type" for route in PLAIN[:3]),
    *(f"{route} x-request-timeout" for route in PLAIN[:3]),
    *(
        f"{route} {name}"
        for route in ALL
        for name in ("accept", "user-agent", "traceparent", "via")
    ),
]


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest, tiny_model: Path) -> Iterator[InProcessServer]:
    with serving(
        model=(str(tiny_model),), server=request.param, cors_origin=(ORIGIN,)
    ) as in_process:
        yield in_process


def request(route: str, *fields: tuple[str, str]) -> bytes:
    lines = [f"{route} HTTP/1.1", "Host: a", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in fields]
    if "/embeddings" not in route:
        return "\r\n".join([*lines, "", ""]).encode()
    return "\r\n".join([*lines, f"Content-Length: {len(BODY)}", "", ""]).encode() + BODY


@pytest.mark.parametrize("name", READ)
def test_a_header_that_is_there_twice(server: InProcessServer, name: str) -> None:
    """Whatever the two say, however they are spelt, and wherever they stand."""
    routes, first, second = READ[name]
    others = [("Accept", "*/*"), ("Accept", "a/b")]
    for route in routes:
        for one, two in ((first, second), (second, first), (first, first), (first, "")):
            fields = [(name, one), *others, (name.title(), two)]
            answer = exchange(server.url, request(route, *fields))
            if route.startswith("HEAD"):
                assert (answer.status_code, answer.content) == (400, b"")
                continue
            error = error_of(answer, 400)
            assert error["param"] == name
            assert f"The header {name} is there 2 times" in error["message"]
            assert answer.headers["x-request-id"] not in (first, second)


@pytest.mark.parametrize("name", READ)
def test_once_beside_others_that_are_there_twice(server: InProcessServer, name: str) -> None:
    routes, first, _ = READ[name]
    if name == "content-encoding":
        return  # even one is refused
    for route in routes:
        fields = [("Accept", "*/*"), (name, first), ("Accept", "a/b"), ("Via", "a"), ("Via", "b")]
        assert exchange(server.url, request(route, *fields)).status_code == 200


@pytest.mark.parametrize("case", NOT_READ)
def test_what_a_route_does_not_read_is_left_alone(server: InProcessServer, case: str) -> None:
    route, _, name = case.rpartition(" ")
    answer = exchange(server.url, request(route, (name, "a"), (name, "b")))
    assert answer.status_code == 200


def test_a_preflight_for_two_methods(server: InProcessServer) -> None:
    fields = [("Origin", ORIGIN)] + [
        ("Access-Control-Request-Method", method) for method in ("GET", "PUT")
    ]
    error = error_of(exchange(server.url, request("OPTIONS /docs", *fields)), 400)
    assert error["param"] == "access-control-request-method"


def test_an_id_that_is_there_twice_has_a_log_line(
    server: InProcessServer, caplog: pytest.LogCaptureFixture
) -> None:
    fields = [("x-request-id", "a"), ("x-request-id", "b")]
    with caplog.at_level("INFO", "embedding_server.api.middleware"):
        answer = exchange(server.url, request("GET /v1/models", *fields))

        def lines() -> list[dict[str, object]]:
            """Of this request: an earlier test's last line may come after its answer."""
            found = (getattr(record, "fields", {}) for record in caplog.records)
            return [line for line in found if line.get("id") == answer.headers["x-request-id"]]

        until(lambda: lines() != [])
    (line,) = lines()
    assert line["status"] == 400


def test_http_2(tiny_model: Path) -> None:
    http = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    http.initiate_connection()
    head = [(":method", "POST"), (":path", "/v1/embeddings"), (":scheme", "http")]
    timeouts = [("x-request-timeout", "60"), ("x-request-timeout", "1")]
    http.send_headers(1, [*head, (":authority", "a"), *timeouts])
    http.send_data(1, BODY, end_stream=True)
    status = None
    with serving(model=(str(tiny_model),), server="hypercorn") as it, connect(it.url) as connection:
        while status is None:
            connection.sendall(http.data_to_send())
            for event in http.receive_data(connection.recv(65536)):
                if isinstance(event, h2.events.ResponseReceived):
                    status = dict(event.headers)[b":status"]
    assert status == b"400"


def test_headers_are_read_in_one_place() -> None:
    """But for the keys, which have an error of their own, and traces, which heed no two."""
    (folder,) = embedding_server.api.__path__
    found = set()
    for file in Path(folder).glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Subscript | ast.Attribute):
                source = ast.unparse(node)
                if source.endswith(("scope['headers']", "request.headers")):
                    found.add(f"{file.stem}: {source}")
    assert found == {
        "docs_page: request.headers",  # Host, of which the servers take one
        "headers: scope['headers']",
        "keys: scope['headers']",  # Authorization
        "tracing: scope['headers']",
    }
