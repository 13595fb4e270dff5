# SPDX-License-Identifier: MIT OR Apache-2.0
"""How many bytes of bodies a server holds at a time, and what it says past them."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from error_shape import error_of
from in_process import serving, until
from live import LiveServer, running_server
from raw_http import connect

from embedding_server.api import body as body_module
from embedding_server.api.parsing import check_extent
from embedding_server.serving.servers.base import SERVERS

MODEL = "all-MiniLM-L6-v2"
LIMIT = 400_000


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest) -> Iterator[LiveServer]:
    flags = ("--model", MODEL, "--max-body-bytes", str(LIMIT), "--server", request.param)
    with running_server(*flags) as live:
        yield live


def embed(server: LiveServer, *, padding: int = 0, chunked: bool = False) -> httpx.Response:
    body = b'{"model": "%b", "input": "river", "user": "%b"}' % (MODEL.encode(), b"x" * padding)
    content = iter([body]) if chunked else body
    headers = {"content-type": "application/json"}
    url = f"{server.url}/v1/embeddings"
    return httpx.post(url, content=content, headers=headers, timeout=60)


def half_sent(stack: ExitStack, server: LiveServer, size: int) -> socket.socket:
    """Send the head of a body of the largest size, and ``size`` bytes of it."""
    connection = stack.enter_context(connect(server.url))
    connection.sendall(
        b"POST /v1/embeddings HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (LIMIT, b" " * size)
    )
    return connection


@pytest.mark.parametrize("chunked", [False, True], ids=["with-length", "chunked"])
def test_bodies_past_what_memory_holds_are_refused(server: LiveServer, chunked: bool) -> None:
    def large() -> httpx.Response:
        return embed(server, padding=300_000, chunked=chunked)

    assert large().status_code == 200
    with ExitStack() as clients:
        for _ in range(4):
            half_sent(clients, server, 390_000)
        until(lambda: large().status_code == 429)
        refused = large()
        assert error_of(refused, 429)["code"] == "overloaded"
        assert int(refused.headers["retry-after"]) >= 1
        announced = half_sent(clients, server, 0)
        assert announced.recv(20).startswith(b"HTTP/1.1 429"), "before any of it is sent"
        assert embed(server).status_code == 200, "a short one needs no room"
        assert httpx.get(f"{server.url}/health/ready").status_code == 200
    until(lambda: large().status_code == 200)
    for _ in range(8):
        assert large().status_code == 200, "what is answered makes room"


def test_errors_make_room(server: LiveServer) -> None:
    too_large = b" " * (LIMIT + 1)
    headers = {"content-type": "application/json"}
    for _ in range(8):
        for content in (iter([too_large]), b"{" + b" " * (LIMIT - 10)):
            url = f"{server.url}/v1/embeddings"
            answer = httpx.post(url, content=content, headers=headers, timeout=60)
            assert answer.status_code in (400, 413)
    assert embed(server, padding=300_000).status_code == 200


def test_a_body_has_its_room_while_a_thread_holds_it(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Past its deadline, too, whether a thread reads it or it waits for one."""
    go_on = threading.Event()
    read: list[int] = []

    def slow(body: bytes, *, inputs: int, ids: int) -> None:
        read.append(len(body))
        go_on.wait()
        check_extent(body, inputs=inputs, ids=ids)

    monkeypatch.setattr(body_module, "check_extent", slow)
    with serving(model=(str(tiny_model),), max_body_bytes=1_200_000) as server:
        body = {"model": "tiny", "input": "river", "user": "x" * 300_000}

        def status(timeout: str) -> int:
            headers = {"x-request-timeout": timeout}
            url = f"{server.url}/v1/embeddings"
            return httpx.post(url, json=body, headers=headers, timeout=60).status_code

        try:
            until(lambda: status("0.1") == 429)
            begun = len(read)
            assert server.app.state.bodies.held > 4_400_000
        finally:
            go_on.set()
        until(lambda: server.app.state.bodies.held == 0)
        assert len(read) == begun, "what nobody waits for is not read"
        assert status("60") == 200
    assert "asyncio" not in [record.name for record in caplog.records]
