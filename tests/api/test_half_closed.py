# SPDX-License-Identifier: MIT OR Apache-2.0
"""Clients that close their sending half are answered; those that are gone free their work."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from fake_backends import Blocked
from in_process import InProcessServer, serving, until
from raw_http import connect, parse

from embedding_server.serving.servers.base import SERVERS

BODY = json.dumps({"model": "tiny", "input": "river"}).encode()
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


@pytest.fixture(scope="module", params=SERVERS)
def plain(request: pytest.FixtureRequest, tiny_model: Path) -> Iterator[InProcessServer]:
    with serving(model=(str(tiny_model),), server=request.param) as server:
        yield server


def post(body: bytes = BODY, version: bytes = b"1.1", path: bytes = b"/v1/embeddings") -> bytes:
    head = b"POST %b HTTP/%b\r\nHost: a\r\nContent-Length: %d\r\n\r\n"
    return head % (path, version, len(body)) + body


def get(path: bytes) -> bytes:
    return b"GET %b HTTP/1.1\r\nHost: a\r\n\r\n" % path


def rest_of(connection: socket.socket) -> bytes:
    """Everything until the server closes the connection."""
    return b"".join(iter(lambda: connection.recv(65536), b""))


def without_continue(answer: bytes) -> bytes:
    """``answer`` without what a client must skip, which a slow machine may have sent."""
    while answer.startswith(CONTINUE):
        answer = answer.removeprefix(CONTINUE)
    return answer


def half_close(server: InProcessServer, *parts: bytes) -> bytes:
    """Send ``parts`` one by one and close the sending half: all that comes back."""
    with connect(server.url) as connection:
        for part in parts:
            connection.sendall(part)
            httpx.get(f"{server.url}/health/live")  # so that the parts come one by one
        connection.shutdown(socket.SHUT_WR)
        return without_continue(rest_of(connection))


WHOLE = {
    "embeddings": (post(), 200),
    "openai": (post(path=b"/openai/v1/embeddings"), 200),
    "http-1.0": (post(version=b"1.0"), 200),
    "chunks": (
        b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY),
        200,
    ),
    "large": (post(BODY[:-1] + b', "user": "%b"}' % (b"u" * 1_000_000)), 200),
    "unknown-model": (post(b'{"model": "b", "input": "a"}'), 404),
    "no-json": (post(b"{"), 400),
    "models": (get(b"/v1/models"), 200),
    "model": (get(b"/v1/models/tiny"), 200),
    "openai-models": (get(b"/openai/v1/models"), 200),
    "live": (get(b"/health/live"), 200),
    "ready": (get(b"/health/ready"), 200),
    "metrics": (get(b"/metrics"), 200),
    "docs": (get(b"/docs"), 200),
    "nowhere": (get(b"/nowhere"), 404),
}


@pytest.mark.parametrize("at_once", [True, False], ids=["at-once", "later"])
@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_request_is_answered(plain: InProcessServer, name: str, at_once: bool) -> None:
    """Whether the end comes with the request or after it."""
    request, status = WHOLE[name]
    with connect(plain.url) as connection:
        connection.sendall(request)
        if not at_once:
            httpx.get(f"{plain.url}/health/live")
        connection.shutdown(socket.SHUT_WR)
        assert parse(without_continue(rest_of(connection))).status_code == status


def test_all_whole_requests_of_a_connection_are_answered(plain: InProcessServer) -> None:
    answer = half_close(plain, post() + get(b"/health/live") + post())
    assert answer.replace(CONTINUE, b"").count(b"HTTP/1.1 200 ") == 3


PARTS = {
    "nothing": b"",
    "request-line": b"POST /v1/emb",
    "header": post()[:40],
    "no-body": post().removesuffix(BODY),
    "half-a-body": post()[:-5],
    "no-last-chunk": WHOLE["chunks"][0][:-5],
    "body-that-nobody-reads": b"GET /health/live HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n",
}


@pytest.mark.parametrize("name", PARTS)
def test_a_part_of_a_request_holds_no_connection(plain: InProcessServer, name: str) -> None:
    """The connection ends; some servers say why."""
    answer = half_close(plain, PARTS[name])
    assert not answer or parse(answer).status_code in ({200, 400} if "nobody" in name else {400})


@contextmanager
def computing(
    server: str, tiny_model: Path, request: bytes
) -> Iterator[tuple[socket.socket, httpx.Client]]:
    """A connection whose ``request`` a backend computes until it is released."""
    Blocked.reset(load=True)
    with (
        serving(model=(str(tiny_model),), backend="onnx", server=server) as it,
        httpx.Client(base_url=it.url) as client,
        connect(it.url) as connection,
    ):
        try:
            connection.sendall(request)
            until(lambda: waiting(client) == 1)
            yield connection, client
        finally:
            Blocked.release()


def waiting(client: httpx.Client) -> float:
    """Requests that are under way in the engine."""
    page = client.get("/metrics").text
    return float(page.partition('queue_requests{model="tiny"} ')[2].split()[0])


@pytest.mark.usefixtures("blocked")
@pytest.mark.parametrize("name", SERVERS)
def test_a_half_closed_client_is_asked_whether_it_is_there(name: str, tiny_model: Path) -> None:
    """By answers of status 100, as often as the real one takes long; it follows them."""
    with computing(name, tiny_model, post()) as (connection, client):
        connection.shutdown(socket.SHUT_WR)
        received = b""
        while len(received) < 3 * len(CONTINUE):
            received += connection.recv(len(CONTINUE))
        assert received == 3 * CONTINUE
        assert waiting(client) == 1
        Blocked.release()
        assert parse(without_continue(rest_of(connection))).status_code == 200


@pytest.mark.usefixtures("blocked")
@pytest.mark.parametrize("name", SERVERS)
def test_http_1_0_is_not_asked(name: str, tiny_model: Path) -> None:
    """It knows no status 100."""
    with computing(name, tiny_model, post(version=b"1.0")) as (connection, _):
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(0.3)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        Blocked.release()
        connection.settimeout(30)
        assert parse(rest_of(connection)).status_code == 200


@pytest.mark.usefixtures("blocked")
@pytest.mark.parametrize("name", SERVERS)
def test_a_client_of_http_1_0_that_is_gone(name: str, tiny_model: Path) -> None:
    """It can't be asked: what takes long is given up."""
    with computing(name, tiny_model, post(version=b"1.0")) as (connection, client):
        connection.close()
        until(lambda: waiting(client) == 0)


@pytest.mark.usefixtures("blocked")
@pytest.mark.parametrize("name", SERVERS)
@pytest.mark.parametrize("first", ["whole", "half"])
def test_a_client_that_is_gone_frees_its_work(name: str, first: str, tiny_model: Path) -> None:
    """Also one that has waited for its answer with its sending half closed."""
    with computing(name, tiny_model, post()) as (connection, client):
        if first == "half":
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(len(CONTINUE)) == CONTINUE
        connection.close()
        until(lambda: waiting(client) == 0)
        until(lambda: 'status="499"' in client.get("/metrics").text)


@pytest.mark.usefixtures("blocked")
@pytest.mark.parametrize("name", SERVERS)
@pytest.mark.parametrize("part", ["request-line", "header", "no-body", "half-a-body"])
def test_a_part_of_a_request_behind_a_whole_one(name: str, part: str, tiny_model: Path) -> None:
    """The whole one is answered, and the connection ends."""
    with computing(name, tiny_model, post() + PARTS[part]) as (connection, client):
        connection.shutdown(socket.SHUT_WR)
        client.get("/health/live")
        Blocked.release()
        answers = without_continue(rest_of(connection))
        assert re.findall(rb"HTTP/1.1 (\d+) ", answers) in ([b"200"], [b"200", b"400"])
        until(lambda: waiting(client) == 0)
