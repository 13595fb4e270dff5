# SPDX-License-Identifier: MIT OR Apache-2.0
"""Keys: which are taken, what a request without one is told, and a file that is read again."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import raw_http
from error_shape import error_of
from in_process import InProcessServer, serving, until
from live import run_cli

from embedding_server.api.keys import ApiKeys
from embedding_server.errors import ConfigurationError, Unauthenticated
from embedding_server.serving.servers.base import SERVERS
from embedding_server.settings import load_settings

FIRST, SECOND, GIVEN = "first-4711", "second-4712", "given-4713"


def is_accepted(keys: ApiKeys, key: str) -> bool:
    try:
        keys.check({"headers": [(b"authorization", f"Bearer {key}".encode())]})
    except Unauthenticated:
        return False
    return True


def taken(keys: ApiKeys) -> set[str]:
    return {key for key in (FIRST, SECOND, GIVEN, "") if is_accepted(keys, key)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.touch(mode=0o600)
    return path


# ---------------------------------------------------------------------------------------- the file


@pytest.mark.parametrize(
    "content",
    [
        f"{FIRST}\n{SECOND}\n",
        f"{FIRST}\r\n{SECOND}",
        f"\ufeff{FIRST}\n{SECOND}",
        f"# of the shop\n  {FIRST} \n\n   # of the search\n\t{SECOND}\t\n# {GIVEN}",
    ],
    ids=["plain", "windows", "byte-order-mark", "remarks"],
)
def test_a_file_of_keys(file: Path, content: str) -> None:
    file.write_bytes(content.encode())
    assert taken(ApiKeys(file=file)) == {FIRST, SECOND}
    assert taken(ApiKeys([GIVEN], file)) == {FIRST, SECOND, GIVEN}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "holds no key"),
        (b"# nothing\n\n", "holds no key"),
        (b"\xff\xfe", "is not UTF-8"),
        (b"ok\nsecret word\n", "line 2: a key must be of printable ASCII"),
        ("schlüssel".encode(), "line 1: a key must be of printable ASCII"),
        (b"secret\0", "line 1: a key must be of printable ASCII"),
        (b"x" * 2**21, "is over 1048576 bytes"),
        (None, "can't be read: No such file"),
    ],
)
def test_a_file_that_is_none(file: Path, content: bytes | None, told: str) -> None:
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(ConfigurationError, match="--api-key-file .*keys") as caught:
        ApiKeys(file=file)
    assert told in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("path", [Path("/"), Path("/dev/zero")], ids=str)
def test_a_path_that_is_no_file_of_keys(path: Path) -> None:
    with pytest.raises(ConfigurationError, match="--api-key-file"):
        ApiKeys(file=path)


@pytest.mark.parametrize("key", ["two words", " sesame", "schlüssel", "line\nbreak", "\udcff", ""])
def test_a_key_that_no_header_carries(key: str) -> None:
    with pytest.raises(ConfigurationError, match="--api-key: a key must be of printable") as caught:
        ApiKeys([key])
    assert not key or key not in str(caught.value)


@pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o640, False), (0o644, True)])
def test_a_file_that_others_can_read(
    file: Path, mode: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    file.write_text(FIRST)
    file.chmod(mode)
    ApiKeys(file=file)
    assert ("can be read by everyone" in caplog.text) is warned


def test_reading_again(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    file.write_text(FIRST)
    keys = ApiKeys([GIVEN], file)
    file.write_text(SECOND)
    assert taken(keys) == {FIRST, GIVEN}
    keys.reload()
    assert taken(keys) == {SECOND, GIVEN}
    assert "(2 known)" in caplog.text
    assert not any(key in caplog.text for key in (FIRST, SECOND, GIVEN))


@pytest.mark.parametrize("content", [None, b"", b"\xff", b"two words"], ids=ascii)
def test_a_bad_file_changes_nothing(
    file: Path, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    file.write_text(FIRST)
    keys = ApiKeys(file=file)
    file.unlink() if content is None else file.write_bytes(content)
    keys.reload()
    assert taken(keys) == {FIRST}
    (error,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "stay as they were" in error.getMessage()
    file.write_text(SECOND)
    keys.reload()
    assert taken(keys) == {SECOND}


def test_without_a_file_there_is_nothing_to_read_again() -> None:
    keys = ApiKeys([GIVEN])
    keys.reload()
    assert taken(keys) == {GIVEN}
    assert not ApiKeys()


def test_no_key_stays_in_the_object(file: Path) -> None:
    file.write_text(SECOND)
    keys = ApiKeys([FIRST], file)
    assert not any(key in repr(vars(keys)) for key in (FIRST, SECOND))


# ------------------------------------------------------------------------------------ at the start


@pytest.mark.parametrize("content", [None, b"", b"two secrets"], ids=ascii)
def test_a_bad_file_is_refused_at_the_start(file: Path, content: bytes | None) -> None:
    file.unlink() if content is None else file.write_bytes(content)
    done = run_cli("serve", "--port", "0", "--api-key-file", str(file))
    assert done.returncode == 1
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith(f"embedding-server: --api-key-file {file}")
    assert "secret" not in line


@pytest.mark.parametrize("name", ["API_KEY", "API_KEY_FILE"])
@pytest.mark.parametrize("value", ["", ",", " , "])
def test_an_empty_variable_opens_nothing(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"EMBEDDING_SERVER_{name}", value)
    with pytest.raises(ConfigurationError, match=r"is empty|can't be read"):
        settings = load_settings({})
        ApiKeys((), settings.api_key_file)


def test_an_empty_key_in_the_settings_file_opens_nothing(tmp_path: Path) -> None:
    config = tmp_path / "settings.toml"
    config.write_text('api_key = ""\n')
    with pytest.raises(ConfigurationError, match="--api-key .* is empty"):
        load_settings({}, config)


# ------------------------------------------------------------------------------------ over the wire


@pytest.fixture(scope="module")
def guarded(tiny_model: Path) -> Iterator[InProcessServer]:
    with serving(model=(str(tiny_model),), api_key=(GIVEN,), metrics_public=True) as server:
        yield server


@pytest.mark.parametrize("name", ["uvicorn", "hypercorn"])
def test_a_new_file_is_taken_while_serving(tiny_model: Path, file: Path, name: str) -> None:
    file.write_text(FIRST)

    def status(key: str) -> int:
        headers = {"authorization": f"Bearer {key}"}
        return httpx.get(f"{server.url}/v1/models", headers=headers).status_code

    with serving(model=(str(tiny_model),), api_key_file=file, server=name) as server:
        assert (status(FIRST), status(SECOND)) == (200, 401)
        file.write_text(SECOND)
        server.app.state.api_keys.reload()
        assert (status(FIRST), status(SECOND)) == (401, 200)
        file.write_text("")
        server.app.state.api_keys.reload()
        assert (status(FIRST), status(SECOND)) == (401, 200)


def test_public_metrics(guarded: InProcessServer) -> None:
    assert httpx.get(f"{guarded.url}/metrics").status_code == 200
    assert httpx.head(f"{guarded.url}/metrics").status_code == 200
    for path in ("/v1/models", "/docs", "/openapi.json", "/metrics/", "/metricsx", "/nowhere"):
        error_of(httpx.get(guarded.url + path), 401)


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (b"", "is missing"),
        (b"Authorization:\r\n", "is missing"),
        (b"Authorization: Bearer\r\n", "is missing"),
        (b"Authorization: Bearer    \r\n", "is missing"),
        (b"Authorization: Basic Z2l2ZW4\r\n", "is not valid"),
        (b"Authorization: Bearer wrong\r\n", "is not valid"),
        (b"Authorization: Bearer \xc3\xa9\xff\r\n", "is not valid"),
        (b"Authorization: Bearer " + b"x" * 30_000 + b"\r\n", "is not valid"),
        (
            f"Authorization: Bearer {GIVEN}\r\nAuthorization: Bearer {GIVEN}\r\n".encode(),
            "There are 2 Authorization headers",
        ),
        (
            f"Authorization: Bearer x\r\nauthorization: Bearer {GIVEN}\r\n".encode(),
            "There are 2 Authorization headers",
        ),
        (f"Authorization: bearer {GIVEN}\r\n".encode(), None),
        (f"AUTHORIZATION: BEARER   {GIVEN}  \r\n".encode(), None),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_headers(guarded: InProcessServer, lines: bytes, told: str | None) -> None:
    head = b"GET /v1/models HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
    answer = raw_http.exchange(guarded.url, head + lines + b"\r\n")
    if told is None:
        assert answer.status_code == 200
        return
    error = error_of(answer, 401)
    assert told in error["message"]
    assert answer.headers["www-authenticate"] == "Bearer"
    assert GIVEN not in answer.text


def test_a_body_that_is_sent_without_a_key_is_not_waited_for(guarded: InProcessServer) -> None:
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n{"
    with raw_http.connect(guarded.url) as connection:
        connection.sendall(head)
        assert connection.recv(12) == b"HTTP/1.1 401"
        connection.shutdown(socket.SHUT_RDWR)


def test_refusals_are_counted_by_their_route(guarded: InProcessServer) -> None:
    def counted(route: str) -> bool:
        metrics = httpx.get(f"{guarded.url}/metrics").text
        return f'requests_total{{model="",route="{route}",status="401"}}' in metrics

    for path, route in (
        ("/v1/embeddings", "/v1/embeddings"),
        ("/openai/v1/models/a/b", "/openai/v1/models/{name}"),
        ("/docs", "/docs"),
        ("/no/such/path", "unmatched"),
    ):
        httpx.get(guarded.url + path)
        until(lambda route=route: counted(route))  # type: ignore[misc]
    assert "/no/such/path" not in httpx.get(f"{guarded.url}/metrics").text


@pytest.mark.parametrize("name", SERVERS)
def test_a_key_after_the_body_is_none(tiny_model: Path, name: str) -> None:
    """A field there is no header; a proxy in front may not even look at it."""
    with serving(model=(str(tiny_model),), api_key=(GIVEN,), server=name) as server:
        answer = raw_http.exchange(
            server.url,
            b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n"
            b"Authorization: Bearer %b\r\n\r\n" % GIVEN.encode(),
        )
    error_of(answer, 401)
