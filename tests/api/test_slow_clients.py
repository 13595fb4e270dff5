# SPDX-License-Identifier: MIT OR Apache-2.0
"""Clients that are slow, silent, greedy, or many."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from pathlib import Path

import httpx
import pytest
from error_shape import error_of
from in_process import serving, until
from live import resident_mib, running_server
from raw_http import HEALTH, ask, connect, exchange, parse

from embedding_server.serving.servers.base import SERVERS

MODEL = "all-MiniLM-L6-v2"


def drip(connection: socket.socket, drop: bytes) -> bytes:
    """Send ``drop`` again and again, so that it is never idle, until there is an answer."""
    connection.setblocking(False)
    answer = b""
    while not answer:
        connection.send(drop)
        time.sleep(0.02)
        with contextlib.suppress(BlockingIOError):
            answer = connection.recv(65536)
    return answer


@pytest.mark.parametrize("name", SERVERS)
def test_a_header_that_never_ends(tiny_model: Path, name: str) -> None:
    with (
        serving(model=(str(tiny_model),), server=name, header_timeout=0.5) as server,
        connect(server.url) as connection,
    ):
        connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: a\r\nx-slow: ")
        answer = drip(connection, b"a")
        error_of(parse(answer), 408)


@pytest.mark.parametrize("name", SERVERS)
def test_a_header_that_is_too_large(tiny_model: Path, name: str) -> None:
    with serving(model=(str(tiny_model),), server=name) as server:
        for field in (b"x: " + b"a" * 40_000 + b"\r\n\r\n", b"x: a\r\n" * 7000 + b"\r\n"):
            answer = exchange(server.url, b"GET /health/live HTTP/1.1\r\nHost: a\r\n" + field)
            error_of(answer, 431)
        assert httpx.get(f"{server.url}/health/live").status_code == 200


def send_until_cut(connection: socket.socket, content: bytes) -> None:
    """Send until the other end takes no more; it must not take all."""
    with pytest.raises(ConnectionError):
        for start in range(0, len(content), 10_000):
            connection.sendall(content[start : start + 10_000])


@pytest.mark.parametrize("name", SERVERS)
@pytest.mark.parametrize("field", [b"x: " + b"a" * 50_000_000, b"x: a\r\n" * 8_000_000], ids=len)
@pytest.mark.parametrize(
    "start",
    [
        b"GET /health/live HTTP/1.1\r\nHost: a\r\n",
        b"POST /nowhere HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n",
    ],
    ids=["header", "trailer"],
)
def test_fields_that_never_end(tiny_model: Path, name: str, start: bytes, field: bytes) -> None:
    with serving(model=(str(tiny_model),), server=name) as server:
        with connect(server.url) as connection:
            send_until_cut(connection, start + field)
        assert httpx.get(f"{server.url}/health/live").status_code == 200


def test_a_header_that_never_ends_behind_a_request_under_way() -> None:
    """The request is answered, the rest takes no memory, and the connection ends."""
    body = json.dumps({"model": MODEL, "input": [f"{n} river " * 90 for n in range(100)]}).encode()
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body)
    with running_server("--model", MODEL) as server, connect(server.url) as connection:
        before = resident_mib(server)
        connection.sendall(head + body + b"GET /health/live HTTP/1.1\r\n")
        for _ in range(400):
            connection.sendall(b"a:b\r\n" * 10_000)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
        assert parse(answer).status_code == 200
        assert resident_mib(server) < before + 100


@pytest.mark.parametrize("name", SERVERS)
def test_a_body_that_is_drip_fed(tiny_model: Path, name: str) -> None:
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n"
    with (
        serving(model=(str(tiny_model),), server=name, body_timeout=0.5) as server,
        connect(server.url) as connection,
    ):
        connection.sendall(head)
        answer = drip(connection, b" ")
        assert error_of(parse(answer), 408)["code"] == "request_timeout"


@pytest.mark.parametrize("name", SERVERS)
@pytest.mark.parametrize("first", [b"", HEALTH], ids=["silent", "after-an-answer"])
def test_an_idle_connection_is_closed(tiny_model: Path, name: str, first: bytes) -> None:
    with (
        serving(model=(str(tiny_model),), server=name, idle_timeout=0.5) as server,
        connect(server.url) as connection,
    ):
        if first:
            assert ask(connection).status_code == 200
        assert connection.recv(1) == b""


def test_a_body_that_nobody_waits_for_keeps_no_connection(tiny_model: Path) -> None:
    """It was answered before it came, and goes on coming for ever."""
    head = b"POST /nowhere HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n"
    with (
        serving(model=(str(tiny_model),), idle_timeout=0.5) as server,
        connect(server.url) as connection,
    ):
        assert ask(connection, head).status_code == 404
        with pytest.raises(ConnectionError):
            while True:
                connection.sendall(b" ")
                time.sleep(0.02)


@pytest.mark.parametrize("name", SERVERS)
def test_an_answer_that_nobody_reads(tiny_model: Path, name: str) -> None:
    body = json.dumps({"model": "tiny", "input": ["river"] * 2048}).encode()
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body)
    with serving(model=(str(tiny_model),), server=name, idle_timeout=0.5) as server:
        with connect(server.url) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall((head + body) * 20)
            until(lambda: is_accepted(connection))
            until(lambda: not is_accepted(connection))
        assert httpx.get(f"{server.url}/health/live").status_code == 200


def is_accepted(connection: socket.socket) -> bool:
    """Whether the other end of ``connection``, on this machine, holds it open."""
    ports = f"{connection.getpeername()[1]:04X}", f"{connection.getsockname()[1]:04X}"
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, remote, state, *_ = line.split()
        if (local.rpartition(":")[2], remote.rpartition(":")[2]) == ports:
            return state == "01"
    return False


def test_five_thousand_idle_connections() -> None:
    with running_server("--model", MODEL) as server:
        idle = [connect(server.url) for _ in range(5000)]
        try:
            body = {"model": MODEL, "input": "iPhone"}
            response = httpx.post(f"{server.url}/v1/embeddings", json=body)
            assert response.status_code == 200
        finally:
            for connection in idle:
                connection.close()
