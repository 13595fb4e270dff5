# SPDX-License-Identifier: MIT OR Apache-2.0
"""Behind a real proxy with a prefix, be it one that takes the prefix off or one that doesn't."""

from __future__ import annotations

import html
import http.client
import re
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpx
import pytest
import tiny_models
from error_shape import error_of
from in_process import InProcessServer, serving

from embedding_server.app import create_app
from embedding_server.errors import ConfigurationError
from embedding_server.settings import Settings

KEY = "sesame-4711"
KEYED = {"authorization": f"Bearer {KEY}"}
EMBED = {"model": "tiny", "input": "river"}


@dataclass(frozen=True)
class Proxied:
    """A server, and where a proxy in front shows it."""

    server: InProcessServer
    url: str
    client: httpx.Client


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make_bert(tmp_path_factory.mktemp("models") / "tiny").folder


@pytest.fixture(scope="module", params=["uvicorn", "hypercorn"])
def server(model: Path, request: pytest.FixtureRequest) -> Iterator[InProcessServer]:
    options = {"api_key": (KEY,), "root_path": "/ai/embeddings/", "server": request.param}
    with serving(model=(str(model),), **options) as server:
        yield server


@pytest.fixture(scope="module", params=["strips", "passes on"])
def proxied(server: InProcessServer, request: pytest.FixtureRequest) -> Iterator[Proxied]:
    prefix = "/ai/embeddings"
    upstream = urlsplit(server.url)

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def forward(self) -> None:
            if not self.path.startswith(f"{prefix}/"):
                self.send_error(404)
                return
            path = self.path.removeprefix(prefix) if request.param == "strips" else self.path
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            connection = http.client.HTTPConnection(upstream.netloc, timeout=30)
            connection.request(self.command, path, body, dict(self.headers.items()))
            answer = connection.getresponse()
            content = answer.read()
            self.send_response_only(answer.status)
            for name, value in answer.getheaders():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)
            connection.close()

        do_GET = do_POST = do_HEAD = do_OPTIONS = do_PUT = forward  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        url = f"http://127.0.0.1:{proxy.server_address[1]}{prefix}"
        with httpx.Client(headers=KEYED, timeout=30) as client:
            yield Proxied(server, url, client)
        proxy.shutdown()
        thread.join()


def test_every_route_works(proxied: Proxied) -> None:
    document = proxied.client.get(f"{proxied.url}/openapi.json").json()
    for path, operations in document["paths"].items():
        for method in operations:
            body: dict[str, Any] = {"json": EMBED} if path.endswith("/embeddings") else {}
            url = proxied.url + path.replace("{name}", "tiny")
            answer = proxied.client.request(method, url, **body)
            assert answer.status_code == 200, f"{method} {path}: {answer.text}"
    assert proxied.client.head(f"{proxied.url}/health").status_code == 200


def test_the_document_says_where_it_is(proxied: Proxied) -> None:
    where = f"{proxied.url}/openapi.json"
    document = proxied.client.get(where).json()
    (told,) = document["servers"]
    assert urljoin(where, told["url"]) == proxied.url


def test_the_page_and_its_commands(proxied: Proxied) -> None:
    where = f"{proxied.url}/docs"
    page = proxied.client.get(where).text
    (link,) = set(re.findall(r'href="([^#"]*)"', page)) - {""}
    assert proxied.client.get(urljoin(where, link)).json()["openapi"]
    commands = re.findall(r"<pre><code>(.*?)</code></pre>", page, re.DOTALL)
    for command in map(html.unescape, commands):
        assert proxied.url in command
        command = command.replace("curl ", "curl -sS --fail-with-body ", 1)
        done = subprocess.run(
            ["bash", "-c", command],
            env={"API_KEY": KEY, "PATH": "/usr/bin:/bin"},
            capture_output=True,
            timeout=60,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout!r}{done.stderr!r}"


def test_keys_are_asked_for_as_ever(proxied: Proxied) -> None:
    for path in ("/health", "/health/live", "/health/ready"):
        assert httpx.get(proxied.url + path).status_code == 200
    for path in ("/v1/models", "/metrics", "/docs", "/nowhere", "/health/../metrics", "/healthy"):
        error_of(httpx.get(proxied.url + path), 401)
    error_of(httpx.post(f"{proxied.url}/v1/embeddings", json=EMBED), 401)


def test_the_prefix_counts_once(proxied: Proxied) -> None:
    """And what a prefix hides is no other way past the key."""
    twice = f"{proxied.server.url}/ai/embeddings/ai/embeddings"
    error_of(httpx.get(f"{twice}/v1/models"), 401)
    error_of(httpx.get(f"{twice}/health"), 401)
    error_of(httpx.get(f"{twice}/v1/models", headers=KEYED), 404)
    error_of(httpx.get(f"{proxied.server.url}/ai/embeddingsv1/models", headers=KEYED), 404)


def test_metrics_tell_the_servers_own_routes(proxied: Proxied) -> None:
    proxied.client.post(f"{proxied.url}/v1/embeddings", json=EMBED)
    httpx.post(f"{proxied.url}/v1/embeddings", json=EMBED)
    page = proxied.client.get(f"{proxied.url}/metrics").text
    assert 'requests_total{model="tiny",route="/v1/embeddings",status="200"}' in page
    assert 'requests_total{model="",route="/v1/embeddings",status="401"}' in page
    assert "/ai/" not in page


@pytest.mark.parametrize(
    "value",
    [
        "embeddings", "http://a/b", "/a b", "/a?b", "/a#b", "/a%20b", "/a//b", "/../a", "/a/.",
        "/ü", "/a\n",
    ],
)  # fmt: skip
def test_what_is_no_prefix_is_refused_at_the_start(value: str) -> None:
    with pytest.raises(ConfigurationError, match="--root-path .* must be the beginning of a path"):
        create_app(Settings(root_path=value))


@pytest.mark.parametrize("value", ["/v1", "/openai", "/openai/v1", "/health", "/docs", "/metrics/"])
def test_a_prefix_that_is_a_route_is_refused_at_the_start(value: str) -> None:
    with pytest.raises(ConfigurationError, match="a path of this server"):
        create_app(Settings(root_path=value))


@pytest.mark.parametrize("value", ["", "/"])
def test_no_prefix(value: str) -> None:
    assert "servers" not in create_app(Settings(root_path=value)).openapi()
