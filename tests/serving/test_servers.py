# SPDX-License-Identifier: MIT OR Apache-2.0
"""What every ``--server`` must do the same, over real sockets; and what only one can."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h2.config
import h2.connection
import h2.events
import httpx
import numpy as np
import pytest
from error_shape import error_of
from fake_backends import Blocked
from in_process import serving, until
from live import LiveServer, run_cli, running_server
from numpy.typing import NDArray
from raw_http import connect, exchange, parse

from embedding_server.serving.servers.base import SERVERS
from embedding_server.settings import rows

MODEL = "all-MiniLM-L6-v2"
BODY_LIMIT = 1_000_000
OFFER = (
    b"Connection: Upgrade, HTTP2-Settings\r\n"
    b"HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\n"
    b"Upgrade: h2c\r\n"
)
"""What every ``java.net.http.HttpClient`` sends with its requests on a plain connection."""


def start(name: str) -> Any:
    return running_server("--server", name, "--model", MODEL, "--max-body-bytes", str(BODY_LIMIT))


@pytest.fixture(scope="module", params=SERVERS)
def live(request: pytest.FixtureRequest) -> Iterator[LiveServer]:
    """A server of each kind in turn."""
    with start(request.param) as live:
        yield live


@pytest.fixture(scope="module")
def client(live: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=live.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def hypercorn() -> Iterator[LiveServer]:
    with start("hypercorn") as live:
        yield live


def embed(client: httpx.Client, input: Any, model: str = MODEL) -> httpx.Response:
    return client.post("/v1/embeddings", json={"model": model, "input": input})


# ------------------------------------------------------------------------------------------ choice


def test_the_setting_names_the_servers() -> None:
    (row,) = (row for row in rows() if row.name == "server")
    assert row.choices == tuple(SERVERS)
    assert row.default in SERVERS


def test_a_server_that_is_not_installed(tmp_path: Path) -> None:
    """As in an install without the extra: neither it nor what it brings is there."""
    blocked = "".join(f"sys.modules[{name!r}] = None\n" for name in ("hypercorn", "h2"))
    (tmp_path / "sitecustomize.py").write_text(f"import sys\n{blocked}")
    arguments = ("serve", "--port", "0", "--server", "hypercorn", "--model", MODEL)
    done = run_cli(*arguments, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1
    assert b"pip install 'embedding-server[hypercorn]'" in done.stderr
    assert b"Traceback" not in done.stderr


# ------------------------------------------------------------------------------- start and failure


def test_an_address_of_another_machine() -> None:
    done = run_cli("serve", "--model", MODEL, "--host", "192.0.2.1", "--port", "5000")
    assert done.returncode == 1
    assert b"See --host." in done.stderr
    assert b"--port" not in done.stderr


@pytest.mark.parametrize("name", SERVERS)
def test_a_taken_port_fails_at_once(name: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run_cli("serve", "--server", name, "--model", MODEL, "--port", port)
    assert done.returncode == 1
    assert f"Can't listen on 127.0.0.1 port {port}".encode() in done.stderr
    assert b"--port" in done.stderr
    assert b"is ready" not in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("name", SERVERS)
def test_a_model_that_can_not_be_loaded(name: str, tiny_model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "nothing"}')
    done = run_cli(
        "serve", "--server", name, "--port", "0", "--model", str(tiny_model), "--model", str(broken)
    )
    assert done.returncode == 1
    assert b"embedding-server: " in done.stderr
    assert b"broken" in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("name", SERVERS)
@pytest.mark.parametrize(
    "request_head",
    [
        pytest.param(b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\n", id="head"),
        pytest.param(
            b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Length: 99\r\n\r\n{", id="body"
        ),
    ],
)
def test_a_request_that_never_ends_does_not_keep_the_server(
    name: str, request_head: bytes, tiny_model: Path
) -> None:
    with (
        serving(model=(str(tiny_model),), server=name, drain_timeout=1) as server,
        connect(server.url) as connection,
    ):
        connection.sendall(request_head)
        httpx.get(f"{server.url}/health/live")
        server.server.stop()
        server.thread.join(20)
        assert not server.thread.is_alive()


@pytest.mark.parametrize("name", SERVERS)
def test_an_idle_connection_does_not_keep_the_server(name: str, tiny_model: Path) -> None:
    """With a drain far longer than a test would wait for."""
    with (
        serving(model=(str(tiny_model),), server=name, drain_timeout=1000) as server,
        httpx.Client(base_url=server.url) as client,
        connect(server.url),
    ):
        client.get("/health/live")
        server.server.stop()
        server.thread.join(20)
        assert not server.thread.is_alive()


# --------------------------------------------------------------------------------------- answering


def test_answers_are_right(
    client: httpx.Client, golden: tuple[list[str], NDArray[np.float32]]
) -> None:
    texts, expected = golden
    response = embed(client, texts)
    vectors = [row["embedding"] for row in response.json()["data"]]
    np.testing.assert_allclose(np.array(vectors, dtype=np.float32), expected, atol=1e-5)


def test_headers(client: httpx.Client) -> None:
    """Of an answer, of errors of the application and of none: an id, and no server's name."""
    answers = [
        embed(client, "a"),
        embed(client, "a", "nope"),
        client.get("/nowhere"),
        client.delete("/v1/embeddings"),
        client.head("/docs"),
        client.get("/health/live", headers={"x-request-id": "mine"}),
    ]
    assert [answer.status_code for answer in answers] == [200, 404, 404, 405, 200, 200]
    assert answers[-1].headers["x-request-id"] == "mine"
    for answer in answers:
        assert answer.headers["x-request-id"]
        assert answer.headers["date"]
        assert answer.headers["content-length"].isdecimal()
        assert "server" not in answer.headers


def test_a_connection_is_kept(live: LiveServer) -> None:
    request = b"GET /health/live HTTP/1.1\r\nHost: a\r\n\r\n"
    with connect(live.url) as connection:
        for _ in range(1100):  # some servers close it after a thousand
            connection.sendall(request)
            received = b""
            while not received.endswith(b"}"):
                chunk = connection.recv(65536)
                assert chunk, received
                received += chunk
        assert parse(received).status_code == 200


@pytest.mark.parametrize("size", [BODY_LIMIT + 1, 20_000_000])
def test_a_body_over_the_limit(client: httpx.Client, size: int) -> None:
    """The answer comes before the body has, and must not be lost."""

    def chunks() -> Iterator[bytes]:
        yield from [b" " * 50_000] * (size // 50_000)
        yield b" " * (size % 50_000)

    for content in (b" " * size, chunks()):
        response = client.post(
            "/v1/embeddings", content=content, headers={"content-type": "application/json"}
        )
        assert error_of(response, 413)["code"] == "request_too_large"
    at_limit = json.dumps({"model": MODEL, "input": "a"}).encode().ljust(BODY_LIMIT)
    response = client.post(
        "/v1/embeddings", content=at_limit, headers={"content-type": "application/json"}
    )
    assert response.status_code == 200


def test_an_announced_body_is_refused_before_it_comes(live: LiveServer) -> None:
    with connect(live.url) as connection:
        connection.sendall(
            b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Length: 100000000000\r\n\r\n"
        )
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_a_body_that_waits_to_be_asked_for(live: LiveServer) -> None:
    body = b'{"model": "all-MiniLM-L6-v2", "input": "a"}'
    with connect(live.url) as connection:
        connection.sendall(
            b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n"
            b"Expect: 100-continue\r\nConnection: close\r\n\r\n" % len(body)
        )
        assert connection.recv(65536).startswith(b"HTTP/1.1 100 ")
        connection.sendall(body)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert parse(answer).status_code == 200


# ---------------------------------------------------------------------------------------- nonsense


@pytest.mark.parametrize(
    "request_line",
    [b"nonsense", b"GET / HTTP/9", b"GET \xff HTTP/1.1", b"GET /a b HTTP/1.1", b"\x16\x03\x01\x02"],
    ids=["nonsense", "http-9", "not-ascii", "spaces", "tls"],
)
def test_what_is_not_http(live: LiveServer, request_line: bytes) -> None:
    answer = exchange(live.url, request_line + b"\r\nHost: a\r\n\r\nSM\r\n\r\n")
    error_of(answer, 400)
    assert f"not HTTP id={answer.headers['x-request-id']}" in live.log


def test_a_body_that_breaks_off_in_nonsense(live: LiveServer) -> None:
    answer = exchange(
        live.url,
        b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"1\r\n{\r\nzz\r\n",
    )
    error_of(answer, 400)


@pytest.mark.parametrize(
    "value", [b"a\nset-cookie: b", b"a\rset-cookie: b", b"a\x00b", b"a\r\n folded"]
)
def test_an_id_never_becomes_another_header(live: LiveServer, value: bytes) -> None:
    response = exchange(
        live.url,
        b"GET /v1/models HTTP/1.1\r\nHost: a\r\nConnection: close\r\nx-request-id: %b\r\n\r\n"
        % value,
    )
    if response.status_code == 200:  # h11 ends a line at a bare newline, and unfolds
        assert value in (b"a\nset-cookie: b", b"a\r\n folded")
    else:
        error_of(response, 400)
    assert "set-cookie" not in response.headers
    assert re.fullmatch(r"[0-9a-f]{32}|a", response.headers["x-request-id"])


def test_a_tunnel_is_refused(live: LiveServer) -> None:
    head = b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    answer = exchange(live.url, head)
    error_of(answer, answer.status_code)
    assert 400 <= answer.status_code < 500


def test_http_2_is_nonsense_to_uvicorn() -> None:
    with start("uvicorn") as live:
        error_of(exchange(live.url, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), 400)


# --------------------------------------------------------------------- offers of another protocol


@pytest.mark.parametrize("pause", [False, True], ids=["at-once", "in-parts"])
def test_a_client_that_offers_http_2(client: httpx.Client, live: LiveServer, pause: bool) -> None:
    body = b'{"model": "all-MiniLM-L6-v2", "input": ["iPhone", "Samsung"]}'
    expected = embed(client, ["iPhone", "Samsung"]).content
    head = (
        b"POST /v1/embeddings HTTP/1.1\r\n%b"
        b"Content-Length: %d\r\n"
        b"Host: localhost\r\n"
        b"User-Agent: Java-http-client/21\r\n"
        b"Content-Type: application/json\r\n\r\n" % (OFFER, len(body))
    )
    with connect(live.url) as connection:
        for _ in range(3):  # on one connection, each with its offer
            for part in (head, body[:9], body[9:]) if pause else (head + body,):
                connection.sendall(part)
                if pause:  # let the parts come one by one
                    client.get("/health/live")
            received = b""
            while not received.endswith(expected):
                chunk = connection.recv(65536)
                assert chunk, received
                received += chunk
            assert parse(received).status_code == 200


def test_many_offers_at_once(live: LiveServer) -> None:
    request = b"GET /health/live HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n"
    last = b"GET /health/live HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    response = exchange(live.url, request * 1500 + last)
    assert response.status_code == 200
    assert response.content.count(b"HTTP/1.1 200 ") == 1500


def test_an_offer_of_a_web_socket(live: LiveServer) -> None:
    response = exchange(
        live.url,
        b"GET /health/live HTTP/1.1\r\nHost: a\r\nConnection: upgrade, close\r\n"
        b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
    )
    assert (response.status_code, response.json()["status"]) == (200, "live")
    assert response.headers["x-request-id"]


@pytest.mark.parametrize("name", SERVERS)
def test_a_hang_up_is_heard_after_an_offer(
    blocked: type[Blocked], tiny_model: Path, name: str
) -> None:
    """While the answer is computed."""
    body = json.dumps(
        {"model": "tiny", "input": ["river " * count for count in range(1, 40)]}
    ).encode()
    with (
        serving(model=(str(tiny_model),), backend="onnx", server=name) as server,
        httpx.Client(base_url=server.url) as client,
    ):
        with connect(server.url) as connection:
            connection.sendall(
                b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\n%bContent-Length: %d\r\n\r\n%b"
                % (OFFER, len(body), body)
            )
            until(lambda: 'queue_requests{model="tiny"} 1.0' in client.get("/metrics").text)
        until(lambda: 'queue_requests{model="tiny"} 0.0' in client.get("/metrics").text)
        assert 'queue_tokens{model="tiny"} 0.0' in client.get("/metrics").text
        blocked.release()
        assert embed(client, "river", "tiny").status_code == 200


# ------------------------------------------------------------------------------------------ HTTP/2


def test_http_2(hypercorn: LiveServer, golden: tuple[list[str], NDArray[np.float32]]) -> None:
    """Of a client that knows that it is spoken; many requests share its connection."""
    texts, expected = golden

    async def ask() -> list[httpx.Response]:
        # One event loop: threads that share a connection of httpx mix up its streams.
        one = httpx.Limits(max_connections=1)
        async with httpx.AsyncClient(
            base_url=hypercorn.url, timeout=60, http1=False, http2=True, limits=one
        ) as client:
            bodies = [{"model": MODEL, "input": text} for text in texts]
            bodies.append({"model": "nope", "input": "a"})
            return await asyncio.gather(
                *(client.post("/v1/embeddings", json=body) for body in bodies)
            )

    *answers, unknown = asyncio.run(ask())
    for answer in answers:
        assert (answer.status_code, answer.http_version) == (200, "HTTP/2")
        assert answer.headers["x-request-id"]
        assert "server" not in answer.headers
    vectors = [answer.json()["data"][0]["embedding"] for answer in answers]
    np.testing.assert_allclose(np.array(vectors, dtype=np.float32), expected, atol=1e-5)
    error_of(unknown, 404)


def test_an_offer_of_http_2_is_taken(hypercorn: LiveServer) -> None:
    """For a request without a body; its answer is the first stream, and others follow."""
    http = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    settings = http.initiate_upgrade_connection()
    assert settings is not None
    with connect(hypercorn.url) as connection:
        connection.sendall(
            b"GET /health/ready HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\n"
            b"HTTP2-Settings: %b\r\nUpgrade: h2c\r\n\r\n" % settings
        )
        received = b""
        while b"\r\n\r\n" not in received:
            received += connection.recv(65536)
        head, _, rest = received.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 ")
        connection.sendall(http.data_to_send())
        status, content = _stream(http, connection, 1, rest)
        assert (status, json.loads(content)["status"]) == (b"200", "ready")
        body = json.dumps({"model": MODEL, "input": "iPhone"}).encode()
        _send(http, 3, body)
        status, content = _stream(http, connection, 3)
        assert status == b"200"
        assert json.loads(content)["data"][0]["dims"] == 384


def test_http_2_in_parts(hypercorn: LiveServer) -> None:
    """Its preface may arrive in any number of them."""
    http = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    http.initiate_connection()
    with connect(hypercorn.url) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        start = http.data_to_send()
        for part in (start[:1], start[1:20], start[20:]):
            connection.sendall(part)
            httpx.get(f"{hypercorn.url}/health/live")  # let the parts be read one by one
        _send(http, 1, json.dumps({"model": MODEL, "input": "iPhone"}).encode())
        assert _stream(http, connection, 1)[0] == b"200"


def test_an_idle_connection_of_http_2_is_closed(tiny_model: Path) -> None:
    with serving(model=(str(tiny_model),), server="hypercorn", idle_timeout=0.5) as server:
        for requests in ((), (1,)):
            http = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
            http.initiate_connection()
            with connect(server.url) as connection:
                connection.sendall(http.data_to_send())
                for stream in requests:
                    _send(http, stream, b'{"model": "tiny", "input": "river"}')
                    assert _stream(http, connection, stream)[0] == b"200"
                while connection.recv(65536):
                    pass


def test_a_connection_whose_only_stream_was_reset_is_idle(
    blocked: type[Blocked], tiny_model: Path
) -> None:
    settings: dict[str, Any] = {"backend": "onnx", "server": "hypercorn", "idle_timeout": 0.5}
    with (
        serving(model=(str(tiny_model),), **settings) as server,
        connect(server.url) as connection,
        httpx.Client(base_url=server.url) as client,
    ):
        http = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
        http.initiate_connection()
        _send(http, 1, b'{"model": "tiny", "input": "river"}')
        connection.sendall(http.data_to_send())
        until(lambda: 'queue_requests{model="tiny"} 1.0' in client.get("/metrics").text)
        http.reset_stream(1)
        connection.sendall(http.data_to_send())
        while connection.recv(65536):
            pass


@pytest.mark.parametrize("start", [b"P", b"PRI * HTTP/2.0\r\n"])
def test_a_preface_of_http_2_that_stops(tiny_model: Path, start: bytes) -> None:
    settings: dict[str, Any] = {"header_timeout": 0.5, "idle_timeout": 1000}
    with (
        serving(model=(str(tiny_model),), server="hypercorn", **settings) as server,
        connect(server.url) as connection,
    ):
        connection.sendall(start)
        answer = b""
        while part := connection.recv(65536):
            answer += part
        assert answer.startswith(b"HTTP/1.1 408 ")


def test_a_drain_of_http_2(blocked: type[Blocked], tiny_model: Path) -> None:
    """A request under way is answered; an idle connection does not keep the server."""
    settings: dict[str, Any] = {"backend": "onnx", "server": "hypercorn", "drain_timeout": 1000}
    with (
        serving(model=(str(tiny_model),), **settings) as server,
        connect(server.url) as connection,
        connect(server.url) as idle,
        connect(server.url) as late,
        httpx.Client(base_url=server.url) as client,
    ):
        https = [
            h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
            for _ in range(3)
        ]
        for http in https:
            http.initiate_connection()
        for http, stream in zip(https, (connection, idle), strict=False):
            stream.sendall(http.data_to_send())
        _send(https[0], 1, b'{"model": "tiny", "input": "river"}')
        connection.sendall(https[0].data_to_send())
        until(lambda: 'queue_requests{model="tiny"} 1.0' in client.get("/metrics").text)
        server.server.stop()
        while idle.recv(65536):
            pass
        late.sendall(https[2].data_to_send())  # it is open, and asks for HTTP/2 only now
        while late.recv(65536):
            pass
        assert server.thread.is_alive()
        blocked.release()
        assert _stream(https[0], connection, 1)[0] == b"200"
        server.thread.join(20)
        assert not server.thread.is_alive()


def test_http_2_answers_before_all_of_the_body_has_come(hypercorn: LiveServer) -> None:
    """The rest of it is taken and forgotten; other requests of the connection go on."""
    http = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    http.initiate_connection()
    with connect(hypercorn.url) as connection:
        http.send_headers(1, [*_HEAD[:-1], ("content-type", "text/plain")])
        http.send_data(1, b"{")
        assert _stream(http, connection, 1)[0] == b"415"
        for _ in range(3):
            http.send_data(1, b" " * 9000)
        http.end_stream(1)
        _send(http, 3, json.dumps({"model": MODEL, "input": "iPhone"}).encode())
        assert _stream(http, connection, 3)[0] == b"200"
    assert "Traceback" not in hypercorn.log


@pytest.mark.parametrize(
    "headers",
    [
        [(b":method", b"CONNECT"), (b":authority", b"a:80")],
        [(b":method", b"GET"), (b":path", b"/\xff"), (b":scheme", b"http"), (b":authority", b"a")],
    ],
    ids=["tunnel", "not-ascii"],
)
def test_a_strange_request_of_http_2(
    hypercorn: LiveServer, headers: list[tuple[bytes, bytes]]
) -> None:
    """It is refused, and other requests of the connection go on."""
    http = h2.connection.H2Connection(
        h2.config.H2Configuration(client_side=True, validate_outbound_headers=False)
    )
    http.initiate_connection()
    with connect(hypercorn.url) as connection:
        http.send_headers(1, headers, end_stream=True)
        assert _stream(http, connection, 1) == (b"", b"")
        _send(http, 3, json.dumps({"model": MODEL, "input": "iPhone"}).encode())
        assert _stream(http, connection, 3)[0] == b"200"
    assert "Traceback" not in hypercorn.log


_HEAD = [
    (":method", "POST"),
    (":path", "/v1/embeddings"),
    (":scheme", "http"),
    (":authority", "a"),
    ("content-type", "application/json"),
]


def _send(http: h2.connection.H2Connection, stream: int, body: bytes) -> None:
    http.send_headers(stream, _HEAD)
    http.send_data(stream, body, end_stream=True)


def _stream(
    http: h2.connection.H2Connection, connection: socket.socket, stream: int, received: bytes = b""
) -> tuple[bytes, bytes]:
    """Send what ``http`` has to send, and wait for the status and body of one of its streams.

    Both are empty if the server refuses it.
    """
    status, body = b"", b""
    while True:
        for event in http.receive_data(received) if received else ():
            if getattr(event, "stream_id", None) != stream:
                continue
            if isinstance(event, h2.events.ResponseReceived):
                status = dict(event.headers)[b":status"]
            elif isinstance(event, h2.events.DataReceived):
                body += event.data
                http.acknowledge_received_data(event.flow_controlled_length, stream)
            elif isinstance(event, (h2.events.StreamEnded, h2.events.StreamReset)):
                return status, body
        connection.sendall(http.data_to_send())
        received = connection.recv(65536)
        assert received, "the server closed the connection"
