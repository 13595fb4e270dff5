# SPDX-License-Identifier: MIT OR Apache-2.0
"""What pages in browsers, and probes, may ask: CORS, nosniff, and HEAD where GET is."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import raw_http
from error_shape import error_of
from fake_backends import Blocked
from in_process import InProcessServer, serving, until

from embedding_server.app import create_app
from embedding_server.backends.base import BACKENDS
from embedding_server.errors import ConfigurationError
from embedding_server.serving.servers.base import SERVERS
from embedding_server.settings import Settings

ORIGIN, STRANGER, KEY = "https://app.example.com", "https://evil.example.com", "sesame-4711"
KEYED = {"authorization": f"Bearer {KEY}"}
PREFLIGHT = {
    "origin": ORIGIN,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-request-id,x-request-timeout,"
    "x-embedding-fingerprint",
}
EMBED = {"model": "tiny", "input": "river"}


@pytest.fixture(scope="module", params=SERVERS)
def open_to_pages(tiny_model: Path, request: pytest.FixtureRequest) -> Iterator[httpx.Client]:
    """A client of a server with a key that ``ORIGIN`` may send requests to."""
    origins = (ORIGIN, "http://localhost:3000")
    model = (str(tiny_model),)
    with (
        serving(model=model, api_key=(KEY,), cors_origin=origins, server=request.param) as server,
        httpx.Client(base_url=server.url, timeout=30) as client,
    ):
        yield client


@pytest.fixture(scope="module", params=SERVERS)
def plain(tiny_model: Path, request: pytest.FixtureRequest) -> Iterator[InProcessServer]:
    with serving(model=(str(tiny_model),), server=request.param) as server:
        yield server


def cors_headers(response: httpx.Response) -> set[str]:
    return {name for name in response.headers if name.startswith("access-control-")}


# -------------------------------------------------------------------------------------------- CORS


def test_without_origins_there_is_none(plain: InProcessServer) -> None:
    for origin in (ORIGIN, "null"):
        answer = httpx.get(f"{plain.url}/v1/models", headers={"origin": origin})
        assert answer.status_code == 200 and not cors_headers(answer)
    answer = httpx.options(f"{plain.url}/v1/embeddings", headers=PREFLIGHT)
    error_of(answer, 405)
    assert not cors_headers(answer)


@pytest.mark.parametrize("path", ["/v1/embeddings", "/openai/v1/embeddings", "/v1/models"])
def test_a_preflight_needs_no_key(open_to_pages: httpx.Client, path: str) -> None:
    answer = open_to_pages.options(path, headers=PREFLIGHT)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert "POST" in answer.headers["access-control-allow-methods"].split(", ")
    assert (
        answer.headers["access-control-allow-headers"]
        == (PREFLIGHT["access-control-request-headers"])
    )
    assert "access-control-allow-credentials" not in answer.headers
    assert answer.headers["x-request-id"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "Origin" in answer.headers["vary"]


@pytest.mark.parametrize(
    "changed",
    [
        {"origin": STRANGER},
        {"origin": "null"},
        {"origin": f"{ORIGIN}.evil.com"},
        {"origin": "http://app.example.com"},
        {"access-control-request-method": "DELETE"},
    ],
    ids=str,
)
def test_a_preflight_that_is_refused(open_to_pages: httpx.Client, changed: dict[str, str]) -> None:
    answer = open_to_pages.options("/v1/embeddings", headers={**PREFLIGHT, **changed})
    assert "--cors-origin" in error_of(answer, 400)["message"]
    if "origin" in changed:
        assert "access-control-allow-origin" not in answer.headers


def test_an_answer_can_be_read_by_its_page(open_to_pages: httpx.Client) -> None:
    headers = {**KEYED, "origin": ORIGIN}
    answer = open_to_pages.post("/v1/embeddings", json=EMBED, headers=headers)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    exposed = answer.headers["access-control-expose-headers"].lower().split(", ")
    ours = {"x-request-id", "x-truncated-inputs", "x-embedding-fingerprint"}
    assert set(exposed) == ours | {"retry-after"}
    assert answer.headers["vary"] == "Origin", "or a cache gives it to another"


@pytest.mark.parametrize("origin", [STRANGER, "null", "http://localhost:3001"])
def test_an_answer_can_not_be_read_by_another_page(
    open_to_pages: httpx.Client, origin: str
) -> None:
    headers = {**KEYED, "origin": origin}
    answer = open_to_pages.post("/v1/embeddings", json=EMBED, headers=headers)
    assert "access-control-allow-origin" not in answer.headers
    assert answer.headers["vary"] == "Origin"


@pytest.mark.parametrize(
    ("status", "method", "path", "headers"),
    [
        (401, "POST", "/v1/embeddings", {}),
        (401, "GET", "/v1/models", {"authorization": "Bearer wrong"}),
        (400, "POST", "/v1/embeddings", KEYED),
        (404, "GET", "/nowhere", KEYED),
        (405, "DELETE", "/v1/models", KEYED),
    ],
)
def test_errors_can_be_read_by_their_page(
    open_to_pages: httpx.Client, status: int, method: str, path: str, headers: dict[str, str]
) -> None:
    answer = open_to_pages.request(method, path, headers={**headers, "origin": ORIGIN})
    error_of(answer, status)
    assert answer.headers["access-control-allow-origin"] == ORIGIN


def test_a_plain_options_is_no_preflight(open_to_pages: httpx.Client) -> None:
    error_of(open_to_pages.options("/v1/models"), 401)
    answer = open_to_pages.options("/v1/models", headers=KEYED)
    error_of(answer, 405)
    assert answer.headers["allow"] == "GET, HEAD"


def test_faults_can_be_read_by_their_page(tiny_model: Path) -> None:
    with serving(model=(str(tiny_model),), cors_origin=("*",)) as server:
        server.app.state = None  # what nobody foresaw
        for method, path in (("POST", "/v1/embeddings"), ("GET", "/v1/models")):
            answer = httpx.request(
                method, server.url + path, json=EMBED, headers={"origin": STRANGER}
            )
            error_of(answer, 500)
            assert answer.headers["access-control-allow-origin"] == "*"


def test_a_full_queue_can_be_read_by_its_page(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BACKENDS, "onnx", "fake_backends:Blocked")
    Blocked.reset(load=True)
    limits = {"max_concurrent_requests": 1, "cors_origin": (ORIGIN,)}
    with (
        serving(model=(str(tiny_model),), backend="onnx", **limits) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        url = f"{server.url}/v1/embeddings"
        job = pool.submit(httpx.post, url, json=EMBED, timeout=30)
        try:
            metrics = f"{server.url}/metrics"
            until(lambda: 'queue_requests{model="tiny"} 1.0' in httpx.get(metrics).text)
            answer = httpx.post(url, json=EMBED, headers={"origin": ORIGIN})
        finally:
            Blocked.release()
        error_of(answer, 429)
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        assert "Retry-After" in answer.headers["access-control-expose-headers"]
        assert job.result().status_code == 200


@pytest.mark.parametrize(
    "origin",
    [
        "app.example.com", "//app.example.com", "https://", "https:app.example.com", "null",
        "https://app.example.com/", "https://app.example.com/path", "https://app.example.com?x",
        "https://App.example.com", "HTTPS://app.example.com", "https://app.example.com:443",
        "http://app.example.com:80", "https://*.example.com", "https://user@app.example.com",
        "https://büro.example.com", "https://a b", "https://app.example.com\n",
    ],
)  # fmt: skip
def test_what_is_no_origin_is_refused_at_the_start(origin: str) -> None:
    with pytest.raises(ConfigurationError, match="--cors-origin .* is no origin"):
        create_app(Settings(cors_origin=(ORIGIN, origin)))


@pytest.mark.parametrize(
    "origin",
    [
        "*", ORIGIN, "http://localhost", "http://localhost:3000", "http://127.0.0.1:8080",
        "http://[::1]:8080", "https://xn--bro-hoa.example.com", "http://app.example.com:443",
        "chrome-extension://abcdefghijklmnop", "tauri://localhost",
    ],
)  # fmt: skip
def test_what_is_an_origin_is_taken(origin: str) -> None:
    create_app(Settings(cors_origin=(origin,)))


# ----------------------------------------------------------------------------------------- nosniff


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v1/embeddings", 200),
        ("POST", "/openai/v1/embeddings", 200),
        ("GET", "/v1/models", 200),
        ("GET", "/metrics", 200),
        ("GET", "/health", 200),
        ("GET", "/docs", 200),
        ("GET", "/openapi.json", 200),
        ("HEAD", "/health", 200),
        ("GET", "/nowhere", 404),
        ("OPTIONS", "/v1/models", 405),
    ],
)
def test_headers_of_every_answer(
    plain: InProcessServer, method: str, path: str, status: int
) -> None:
    answer = httpx.request(method, plain.url + path, json=EMBED if method == "POST" else None)
    assert answer.status_code == status
    assert answer.headers.get_list("x-content-type-options") == ["nosniff"]
    assert answer.headers["x-request-id"]
    told = str(answer.headers).lower()
    assert "server" not in answer.headers and "x-powered-by" not in answer.headers
    assert not any(name in told for name in ("uvicorn", "hypercorn", "python", "fastapi", "h11"))


def test_headers_of_the_answer_to_nonsense(plain: InProcessServer) -> None:
    answer = raw_http.exchange(plain.url, b"\x16\x03\x01 nonsense\r\n\r\n")
    assert answer.status_code == 400
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "server" not in answer.headers


# -------------------------------------------------------------------------------------------- HEAD


@pytest.mark.parametrize(
    "path",
    [
        "/health", "/health/live", "/health/ready", "/metrics", "/docs", "/openapi.json",
        "/v1/models", "/v1/models/tiny", "/openai/v1/models", "/openai/v1/models/tiny",
        "/v1/models/nope",
    ],
)  # fmt: skip
def test_head_is_get_without_the_body(plain: InProcessServer, path: str) -> None:
    with httpx.Client(base_url=plain.url) as client:
        get, head = client.get(path), client.head(path)
        assert client.head("/health/live").status_code == 200, "the connection goes on"
    assert head.status_code == get.status_code
    assert head.content == b""
    varying = ("x-request-id", "date", *(("content-length",) if path == "/metrics" else ()))
    without = [
        {name: value for name, value in answer.headers.items() if name not in varying}
        for answer in (get, head)
    ]
    assert without[0] == without[1]


@pytest.mark.parametrize("path", ["/v1/embeddings", "/openai/v1/embeddings"])
def test_head_computes_nothing(plain: InProcessServer, path: str) -> None:
    answer = httpx.head(plain.url + path)
    assert answer.status_code == 405
    assert "HEAD" not in answer.headers["allow"]


def test_head_of_a_server_that_is_not_ready(tiny_model: Path) -> None:
    with serving(model=(str(tiny_model),)) as server:
        server.app.state.registry._loaded = False
        assert httpx.head(f"{server.url}/health/ready").status_code == 503
        assert httpx.head(f"{server.url}/health/live").status_code == 200
        server.app.state.registry._loaded = True


def test_options_of_everything(plain: InProcessServer) -> None:
    request = b"OPTIONS * HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    assert raw_http.exchange(plain.url, request).status_code in (400, 404)
