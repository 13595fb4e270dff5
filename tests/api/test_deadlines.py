# SPDX-License-Identifier: MIT OR Apache-2.0
"""``x-request-timeout``: 504 past it, wherever the request is by then, and no work for it after."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from error_shape import error_of
from fake_backends import RELEASE
from faulty_server import PROGRAM
from in_process import until
from live import LiveServer, running_server
from raw_http import connect, parse

from embedding_server.serving.servers.base import SERVERS

MODEL = "all-MiniLM-L6-v2"
ROUTES = ("/v1/embeddings", "/openai/v1/embeddings")


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """The file that ends ``please wait``."""
    return tmp_path / "release"


def embed(
    server: LiveServer, input: object, timeout: str | None = None, route: str = ROUTES[0]
) -> httpx.Response:
    headers = {} if timeout is None else {"x-request-timeout": timeout}
    body = {"model": MODEL, "input": input}
    return httpx.post(server.url + route, json=body, headers=headers, timeout=60)


def metric(server: LiveServer, name: str) -> float:
    page = httpx.get(f"{server.url}/metrics", timeout=60).text
    found = re.search(rf'^embedding_server_{name}{{model="{MODEL}"}} (\S+)$', page, re.M)
    assert found, name
    return float(found[1])


@pytest.mark.parametrize("name", SERVERS)
def test_what_waits_past_its_deadline_is_never_computed(name: str, release: Path) -> None:
    flags = ("--model", MODEL, "--threads", "1", "--server", name)
    with (
        running_server(*flags, env={RELEASE: str(release)}, program=PROGRAM) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        blocker = pool.submit(embed, server, "please wait", "60")
        until(lambda: metric(server, "queue_requests") == 1)
        until(lambda: metric(server, "queue_tokens") == 0)
        for route in ROUTES:
            error = error_of(embed(server, ["river"] * 3 + ["sea"], "0.2", route), 504)
            assert error["code"] == "deadline_exceeded"
            assert "x-request-timeout" in error["message"]
        assert metric(server, "queue_tokens") == 0
        assert metric(server, "queue_requests") == 1, "the one that is being computed"
        release.touch()
        assert blocker.result().status_code == 200
        assert metric(server, "batch_size_sum") == 1, "nothing else was computed"
        assert embed(server, "river", "60").status_code == 200
        assert metric(server, "batch_size_sum") == 2


def test_a_request_that_is_being_computed_is_answered_at_its_deadline(release: Path) -> None:
    flags = ("--model", MODEL, "--threads", "1")
    with running_server(*flags, env={RELEASE: str(release)}, program=PROGRAM) as server:
        error_of(embed(server, ["please wait", "a much longer text " * 40], "0.3"), 504)
        assert metric(server, "queue_requests") == metric(server, "queue_tokens") == 0
        release.touch()
        assert embed(server, "river").status_code == 200
        assert metric(server, "batch_size_sum") == 2, "not the rest of what was given up"


@pytest.fixture(scope="module", params=SERVERS)
def plain(request: pytest.FixtureRequest) -> Iterator[LiveServer]:
    with running_server("--model", MODEL, "--server", request.param) as server:
        yield server


@pytest.mark.parametrize("sent", [b"", b'{"model": "all-MiniLM-L6-v2", "inp'], ids=["none", "half"])
def test_a_deadline_while_the_body_is_read(plain: LiveServer, sent: bytes) -> None:
    head = (
        b"POST /v1/embeddings HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"
        b"X-Request-Timeout: 0.2\r\nContent-Length: 1000\r\n\r\n"
    )
    with connect(plain.url) as connection:
        connection.sendall(head + sent)
        answer = b""
        while b"\r\n\r\n" not in answer or not answer.endswith(b"}}"):
            received = connection.recv(65536)
            assert received, answer
            answer += received
    assert error_of(parse(answer), 504)["code"] == "deadline_exceeded"


def test_a_deadline_while_texts_are_tokenised(plain: LiveServer) -> None:
    """Of what must take longer than it may; the server goes on meanwhile and after."""
    text = "some words " * 250_000
    batches = metric(plain, "batch_size_count")
    error_of(embed(plain, text, "0.1"), 504)
    assert metric(plain, "queue_requests") == 0
    assert embed(plain, "river", "60").status_code == 200
    assert metric(plain, "batch_size_count") == batches + 1


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("timeout", ["30", "2.5", "60.", ".9999", "999999999", "007"])
def test_a_deadline_that_is_met(plain: LiveServer, route: str, timeout: str) -> None:
    assert embed(plain, "river", timeout, route).status_code == 200


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "timeout",
    ["0", "0.000", "-1", "+1", "1e3", "inf", "nan", "", ".", "1,5", "2s", "0x10", "1 2", "1" * 99],
)
def test_what_is_no_deadline(plain: LiveServer, route: str, timeout: str) -> None:
    error = error_of(embed(plain, "river", timeout, route), 400)
    assert error["param"] == "x-request-timeout"
    assert "x-request-timeout" in error["message"]


def test_a_deadline_is_documented(plain: LiveServer) -> None:
    document = httpx.get(f"{plain.url}/openapi.json").json()
    for route in ROUTES:
        for operation in document["paths"][route].values():
            (parameter,) = (p for p in operation["parameters"] if p["name"] == "x-request-timeout")
            assert parameter["in"] == "header"
            assert not parameter["required"]
            assert "504" in operation["responses"]
