# SPDX-License-Identifier: MIT OR Apache-2.0
"""``/docs``: it holds all that the document does, loads nothing, and its commands work."""

from __future__ import annotations

import base64
import hashlib
import html
import os
import re
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import pytest
import raw_http
import tiny_models
from in_process import InProcessServer, serving

KEY = "sesame-4711"
VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """What a page is made of; every element must be closed where it was opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def values(self, attribute: str) -> list[str]:
        return [value for name, value in self.attributes if name == attribute]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make_bert(tmp_path_factory.mktemp("models") / "tiny").folder


@pytest.fixture(scope="module", params=["open", "with a key", "odd name"])
def server(model: Path, request: pytest.FixtureRequest) -> Iterator[InProcessServer]:
    keys = (KEY,) if request.param == "with a key" else ()
    name = ('it\'s <b>"odd"</b> $(id) & ü',) if request.param == "odd name" else ("tiny",)
    with serving(model=(str(model),), served_model_name=name, api_key=keys) as server:
        yield server


def get(server: InProcessServer, path: str, **headers: str) -> httpx.Response:
    response = httpx.get(
        server.url + path, headers={"authorization": f"Bearer {KEY}", **headers}, timeout=30
    )
    assert response.status_code == 200
    return response


def commands(page: str) -> list[str]:
    return [
        html.unescape(code) for code in re.findall(r"<pre><code>(.*?)</code></pre>", page, re.S)
    ]


def test_it_loads_nothing_and_runs_nothing(server: InProcessServer) -> None:
    response = get(server, "/docs")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    page = Page(response.text)
    assert not page.tags & {"script", "link", "img", "iframe", "object", "form", "base", "b"}
    assert {name for name, _ in page.attributes} <= {
        *("href", "id", "class", "lang", "charset", "name", "content"),
    }
    assert "@import" not in response.text and "url(" not in response.text
    assert {href for href in page.values("href") if not href.startswith("#")} == {"openapi.json"}
    policy = dict(
        part.strip().split(" ", 1)
        for part in response.headers["content-security-policy"].split(";")
    )
    (style,) = re.findall(r"<style>(.*?)</style>", response.text, re.S)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == {
        "default-src": "'none'",
        "style-src": f"'sha256-{digest}'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }


def test_its_links_lead_somewhere(server: InProcessServer) -> None:
    page = Page(get(server, "/docs").text)
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert {href[1:] for href in page.values("href") if href.startswith("#")} <= set(ids)


def test_it_tells_all_that_the_document_tells(server: InProcessServer) -> None:
    text = html.unescape(re.sub(r"<[^>]*>", "", get(server, "/docs").text))
    text = re.sub(r"\s+", " ", text)
    document: dict[str, Any] = get(server, "/openapi.json").json()

    def told(value: str) -> bool:
        return re.sub(r"\s+", " ", value.replace("`", "")) in text

    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert told(f"{method.upper()} {path} {operation['summary']}")
            assert told(operation["description"])
            assert all(told(one["name"]) for one in operation["parameters"])
            for status, answer in operation["responses"].items():
                assert status in text
                assert status == "200" or told(answer["description"])
                assert all(told(name) for name in answer["headers"])
    for name, schema in document["components"]["schemas"].items():
        assert name.endswith("Request") or (told(name) and told(schema["description"]))
        for field, row in schema["properties"].items():
            assert told(field) and told(row.get("description", ""))
            for value in row.get("enum", ()):
                assert told(f'"{value}"')


def test_every_command_works_word_for_word(server: InProcessServer) -> None:
    page = get(server, "/docs").text
    document = get(server, "/openapi.json").json()
    shown = commands(page)
    assert len(shown) == sum(map(len, document["paths"].values()))
    env = {**os.environ, "API_KEY": KEY}
    for command in shown:
        done = subprocess.run(
            ["bash", "-c", command.replace("curl ", "curl -sS --fail-with-body ", 1)],
            env=env, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        assert done.stdout.startswith(("{", "# HELP")), command
        keyed = bool(server.app.state.api_keys) and "/health" not in command
        assert ("$API_KEY" in command) is keyed


@pytest.mark.parametrize(
    "host",
    ["$(touch /tmp/x)", "a;id", "`id`", "a'b", '"><script>alert(1)</script>', "a/b", "", "ü"],
)
def test_a_host_that_is_none_is_not_repeated(server: InProcessServer, host: str) -> None:
    head = f"GET /docs HTTP/1.1\r\nAuthorization: Bearer {KEY}\r\nConnection: close\r\nHost: {host}"
    answer = raw_http.exchange(server.url, head.encode() + b"\r\n\r\n")
    if answer.status_code == 400:  # the server itself has refused it
        return
    assert answer.status_code == 200
    assert all("http://localhost:5000/" in command for command in commands(answer.text))
    assert "<script" not in answer.text


@pytest.mark.parametrize(
    ("headers", "base"),
    [
        ({"host": "api.example.com"}, "http://api.example.com/"),
        ({"host": "[::1]:8000"}, "http://[::1]:8000/"),
        (
            {"host": "api.example.com", "x-forwarded-proto": "https"},
            "https://api.example.com/",
        ),
        ({"host": "a.example", "x-forwarded-proto": "javascript"}, "http://a.example/"),
    ],
)
def test_commands_are_for_the_host_that_was_asked(
    server: InProcessServer, headers: dict[str, str], base: str
) -> None:
    for command in commands(get(server, "/docs", **headers).text):
        assert command.partition(" ")[2].lstrip("'").startswith(base)
