# SPDX-License-Identifier: MIT OR Apache-2.0
"""Nasty requests as bytes on a socket: each has its answer, and the next good one is served."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
from error_shape import error_of
from in_process import until
from live import LiveServer, running_server
from raw_http import HEALTH, ask, connect, exchange, parse
from tiny_models import load_reference, make_bert

from embedding_server.serving.servers.base import SERVERS

MODEL = "all-MiniLM-L6-v2"
LIMIT = 12_000_000
GOOD = json.dumps({"model": MODEL, "input": "iPhone"}).encode()


@pytest.fixture(scope="module", params=SERVERS)
def live(request: pytest.FixtureRequest) -> Iterator[LiveServer]:
    flags = ("--server", request.param, "--max-body-bytes", str(LIMIT))
    with running_server("--model", MODEL, *flags) as live:
        yield live


@pytest.fixture(scope="module")
def vector(live: LiveServer) -> list[float]:
    """What a good request is answered with."""
    return good(live)


@pytest.fixture(autouse=True)
def served_before_and_after(live: LiveServer, vector: list[float]) -> Iterator[None]:
    assert good(live) == vector
    yield
    assert good(live) == vector
    assert live.process.poll() is None
    assert "Traceback" not in live.log


def good(live: LiveServer) -> list[float]:
    answer = exchange(live.url, post(GOOD))
    assert answer.status_code == 200, answer.text
    embedding: list[float] = answer.json()["data"][0]["embedding"]
    return embedding


def post(body: bytes, *, length: bool = True, headers: bytes = b"") -> bytes:
    """A request with ``body``, after which the connection closes."""
    announced = b"Content-Length: %d\r\n" % len(body) if length else b""
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
    return head + announced + headers + b"\r\n" + body


def with_input(value: bytes, more: bytes = b"") -> bytes:
    return b'{"model": "all-MiniLM-L6-v2", "input": %b%b}' % (value, more)


# ------------------------------------------------------------------------------------ the content

BODIES = {
    "surrogate-escaped": with_input(rb'"\ud800"'),
    "surrogate-raw": with_input(b'"\xed\xa0\x80"'),
    "surrogate-in-the-prompt": with_input(b'"a"', rb', "prompt": "\udfff"'),
    "surrogate-as-a-field": with_input(b'"a"', rb', "\ud800": 1'),
    "surrogate-as-the-model": rb'{"model": "\ud800", "input": "a"}',
    "nul-raw": with_input(b'"\x00"'),
    "not-utf-8": with_input(b'"\xc0\xaf"'),
    "utf-16": with_input(b'"a"').decode().encode("utf-16"),
    "utf-16-without-a-mark": with_input(b'"a"').decode().encode("utf-16-le"),
    "utf-32": with_input(b'"a"').decode().encode("utf-32"),
    "utf-7": with_input(b'"+2AA-').decode().encode(),
    "byte-order-mark": b"\xef\xbb\xbf" + with_input(b'"a"'),
    "deep-lists": with_input(b"[" * 100_000 + b"]" * 100_000),
    "deep-lists-without-end": with_input(b"[" * 5_000_000),
    "deep-objects": with_input(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "a-field-twice": with_input(b'"a"', b', "input": "b"'),
    "a-field-twice-in-escapes": with_input(b'"a"', rb', "\u0069nput": "b"'),
    "a-field-twice-in-escapes-first": rb'{"\u0069nput": "a", ' + with_input(b'"b"')[1:],
    "a-field-twice-in-other-escapes": with_input(b'"a"', rb', "\u0075ser": "a", "us\u0065r": "b"'),
    "a-field-twice-before-blanks": with_input(b'"a"', b', "\\u0069nput" \r\n\t : "b"'),
    "a-field-twice-in-300-kb": with_input(b'["%b"]' % (b"a " * 150_000), rb', "\u0069nput": ["b"]'),
    "a-field-twice-after-300-kb": rb'{"\u006dodel": "%b", ' % (b"a" * 300_000)
    + with_input(b'"b"')[1:],
    "nan": with_input(b"[NaN]"),
    "infinity": with_input(b"[[-Infinity]]"),
    "huge-id": with_input(b"[1" + b"0" * 5000 + b"]"),
    "huge-dimensions": with_input(b'"a"', b', "dimensions": 1' + b"0" * 5000),
    "dimensions-of-2**63": with_input(b'"a"', b', "dimensions": 9223372036854775808'),
    "small-dimensions": with_input(b'"a"', b', "dimensions": -9223372036854775809'),
    "tiny-float": with_input(b"[1e-999999]"),
    "float-as-id": with_input(b"[7.0]"),
    "float-with-exponent-as-id": with_input(b"[7e0]"),
    "float-as-dimensions": with_input(b'"a"', b', "dimensions": 64.0'),
    "boolean-as-id": with_input(b"[[7, true]]"),
    "boolean-as-dimensions": with_input(b'"a"', b', "dimensions": true'),
    "integer-as-boolean": with_input(b'"a"', b', "truncate": 1'),
    "10-mb-text": with_input(b'"%b"' % (b"zqxj " * 2_000_000)),
    "10-mb-of-lists": with_input(b"[" + b"[7]," * 2_500_000 + b"[7]]"),
    "10-mb-of-objects": with_input(b"[" + b"{}," * 3_500_000 + b"{}]"),
    "10-mb-word": with_input(b'"%b"' % (b"a" * 10_000_000)),
    "10-mb-of-blanks": b" " * 10_000_000,
    "10-mb-of-ids": with_input(b"[" + b"7," * 5_000_000 + b"7]"),
    "a-million-empty-texts": with_input(b"[" + b'"",' * 1_000_000 + b'""]'),
    "a-million-empty-lists": with_input(b"[" + b"[]," * 1_000_000 + b"[]]"),
    "a-million-fields": b"{%b}" % b",".join(b'"%d":1' % n for n in range(1_000_000)),
    "10-mb-of-escapes-without-end": b'{"model": "a", "input": "' + rb"\"" * 5_000_000,
    "10-mb-of-backslashes-without-end": b'{"model": "a", "input": "' + b"\\" * 10_000_000,
    "10-mb-as-the-model": b'{"model": "%b", "input": 1}' % (b"a" * 10_000_000),
    "10-mb-as-a-field": b'{"%b": 1}' % (b"a" * 10_000_000),
    "10-mb-as-the-prompt": with_input(b'"a"', b', "prompt": "%b"' % (b"a " * 5_000_000)),
    "10-mb-as-the-input-type": with_input(b'"a"', b', "input_type": "%b"' % (b"a" * 10_000_000)),
}


@pytest.mark.parametrize("name", BODIES)
def test_content_that_is_refused(live: LiveServer, name: str) -> None:
    answer = exchange(live.url, post(BODIES[name]))
    error_of(answer, 400)
    assert len(answer.content) < 1000


@pytest.mark.parametrize("escapes", [140_000, 5_000_000])
def test_a_string_without_an_end_keeps_nobody_waiting(live: LiveServer, escapes: int) -> None:
    with connect(live.url) as connection:
        connection.sendall(post(b'{"model": "a", "input": "' + rb"\"" * escapes))
        for _ in range(3):
            assert httpx.get(f"{live.url}/health/live", timeout=30).status_code == 200
        answer = parse(b"".join(iter(lambda: connection.recv(65536), b"")))
    error_of(answer, 400)


def test_10_mb_of_escapes_are_a_text(live: LiveServer) -> None:
    answer = exchange(live.url, post(with_input(b'"%b"' % (rb"\u6771" * 1_600_000))))
    assert answer.json()["data"][0]["tokens"] == 1_600_002


def test_a_long_model_name_is_told_short(live: LiveServer) -> None:
    body = b'{"model": "%b", "input": "a"}' % (b"a" * 10_000_000)
    answer = exchange(live.url, post(body))
    error_of(answer, 404)
    assert len(answer.content) < 1000


def test_blank_texts_are_embedded_as_sentence_transformers_does(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    model = make_bert(tmp_path_factory.mktemp("blank") / "tiny")
    blanks = ["", " ", "\t\n\r", "\u00a0\u3000\u2003", "\u200b", "\0", "\0 \0", "\x07", "  " * 1000]
    expected = load_reference(model).encode(blanks, normalize_embeddings=True)
    with running_server("--model", str(model.folder), "--backend", "onnx") as server:
        answer = httpx.post(
            f"{server.url}/v1/embeddings", json={"model": "tiny", "input": blanks}
        ).json()
    found = [row["embedding"] for row in answer["data"]]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert [row.get("truncated") for row in answer["data"]] == [None] * len(blanks)


# ---------------------------------------------------------------------------------------- the head


def head(*lines: bytes, target: bytes = b"/health/live", version: bytes = b"1.1") -> bytes:
    """A request without a body, after which the connection closes."""
    start = b"GET %b HTTP/%b" % (target, version)
    return b"\r\n".join([start, *lines, b"Connection: close", b"", b""])


def test_a_request_of_http_1_1_names_its_host(live: LiveServer) -> None:
    answer = exchange(live.url, head())
    assert "Host" in error_of(answer, 400)["message"]
    assert answer.headers["connection"] == "close"
    assert exchange(live.url, head(version=b"1.0")).status_code == 200


HOSTS = [
    *(b"a", b"a:5000", b"a:", b"", b"127.0.0.1:1", b"[::1]", b"[::1]:5000", b"[fe80::1%25eth0]"),
    *(b"my_host.example.com", b"a.", b"%61", b"A-1", b"xn--bcher-kva.example"),
]


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
@pytest.mark.parametrize("host", HOSTS)
def test_hosts(live: LiveServer, host: bytes, version: bytes) -> None:
    assert exchange(live.url, head(b"HOST: " + host, version=version)).status_code == 200


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
@pytest.mark.parametrize(
    "lines",
    [
        *([b"Host: a", b"Host: b"], [b"Host: a", b"host: a"], [b"Host:", b"Host: a"]),
        *([b"Host: a b"], [b"Host: a, b"], [b"Host: a/b"], [b"Host: http://a"], [b"Host: u@a"]),
        *([b"Host: a:b"], [b"Host: a:1:2"], [b"Host: ::1"], [b"Host: [::1"], [b"Host: %6"]),
        *([b"Host: \xfc"], [b'Host: "a"'], [b"Host: a?b"], [b"Host: a#b"], [b"Host: a\\b"]),
    ],
    ids=lambda lines: ascii(b" ".join(lines))[2:-1],
)
def test_hosts_that_are_none(live: LiveServer, lines: list[bytes], version: bytes) -> None:
    answer = exchange(live.url, head(*lines, version=version))
    assert "Host" in error_of(answer, 400)["message"]
    assert answer.headers["connection"] == "close"


def test_a_bad_host_on_a_kept_connection(live: LiveServer) -> None:
    """Behind an answer, and behind one that came before the body of its request."""
    early = b"POST /nowhere HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\n"
    for request, rest, status in ((HEALTH, b"", 200), (early, b"x", 404)):
        with connect(live.url) as connection:
            assert ask(connection, request).status_code == status
            connection.sendall(rest + head(b"Host: a/b"))
            error_of(parse(b"".join(iter(lambda: connection.recv(65536), b""))), 400)


@pytest.mark.parametrize("version", [b"2.0", b"0.9", b"1.2", b"3.0", b"9.9"])
def test_other_versions(live: LiveServer, version: bytes) -> None:
    answer = exchange(live.url, head(b"Host: a", version=version))
    # httptools itself knows no more than these, and tells no reason.
    error_of(answer, 505 if version in (b"2.0", b"0.9") else 400)
    assert answer.headers["connection"] == "close"


def test_a_request_without_a_version(live: LiveServer) -> None:
    answer = exchange(live.url, b"GET /health/live\r\n\r\n")
    error_of(answer, 505)


@pytest.mark.parametrize("origin", [b"http://a", b"http://b:5000", b"HTTPS://a"])
@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
def test_targets_in_the_absolute_form(live: LiveServer, origin: bytes, version: bytes) -> None:
    request = head(b"Host: a", target=origin + b"/health/live?x=http://c/", version=version)
    assert exchange(live.url, request).json()["status"] == "live"
    embed = post(GOOD).replace(b"/v1", origin + b"/v1", 1)
    assert exchange(live.url, embed).status_code == 200
    error_of(exchange(live.url, embed.replace(b"Host: a\r\n", b"")), 400)


# ------------------------------------------------------------------------------------- the framing


def chunked(body: bytes, size: int, *, extension: bytes = b"", trailer: bytes = b"") -> bytes:
    parts = (body[start : start + size] for start in range(0, len(body), size))
    chunks = b"".join(b"%x%b\r\n%b\r\n" % (len(part), extension, part) for part in parts)
    return chunks + b"0\r\n" + trailer + b"\r\n"


TE = b"Transfer-Encoding: chunked\r\n"


@pytest.mark.parametrize(
    "body",
    [
        chunked(GOOD, 7),
        chunked(GOOD, 1),
        chunked(GOOD, 1000),
        chunked(GOOD, 9, extension=b";a=b"),
        chunked(GOOD, 9, trailer=b"x-sum: 1\r\n"),
        b"000" + chunked(GOOD, 1000).replace(b"0\r\n\r\n", b"0000\r\n\r\n"),
    ],
    ids=["7", "1", "whole", "extensions", "trailer", "zeros"],
)
def test_chunks(live: LiveServer, vector: list[float], body: bytes) -> None:
    answer = exchange(live.url, post(body, length=False, headers=TE))
    assert answer.status_code == 200, answer.text
    assert answer.json()["data"][0]["embedding"] == vector


@pytest.mark.parametrize("header", [b"content-type: application/json\r\n", b""])
def test_with_and_without_a_type(live: LiveServer, header: bytes) -> None:
    assert exchange(live.url, post(GOOD, headers=header)).status_code == 200


UNSUPPORTED = {
    "text": b"content-type: text/plain\r\n",
    "form": b"content-type: application/x-www-form-urlencoded\r\n",
    "gzip": b"content-encoding: gzip\r\n",
    "identity": b"content-encoding: identity\r\n",
    "no-encoding": b"content-encoding:\r\n",
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_body_that_is_no_plain_json(live: LiveServer, name: str) -> None:
    error_of(exchange(live.url, post(GOOD, headers=UNSUPPORTED[name])), 415)


CL = b"Content-Length: %d\r\n" % len(GOOD)
MISFRAMED = {
    "length-and-chunks": (CL + TE, chunked(GOOD, 9)),
    "chunks-and-length": (TE + CL, chunked(GOOD, 9)),
    "two-lengths": (CL + b"Content-Length: 5\r\n", GOOD),
    "two-lengths-in-one": (b"Content-Length: %d, 5\r\n" % len(GOOD), GOOD),
    "negative-length": (b"Content-Length: -1\r\n", GOOD),
    "signed-length": (b"Content-Length: +%d\r\n" % len(GOOD), GOOD),
    "hexadecimal-length": (b"Content-Length: 0x10\r\n", GOOD),
    "length-with-a-point": (b"Content-Length: 5.0\r\n", GOOD),
    "no-length": (b"Content-Length:\r\n", GOOD),
    "length-in-other-digits": ("Content-Length: \u00b2\r\n".encode("latin-1"), GOOD),
    "length-of-2**64": (b"Content-Length: 18446744073709551616\r\n", GOOD),
    "length-of-5000-digits": (b"Content-Length: %b\r\n" % (b"9" * 5000), GOOD),
    "space-before-the-colon": (b"Content-Length : %d\r\n" % len(GOOD), GOOD),
    "chunk-of-2**64": (TE, b"10000000000000000\r\n" + GOOD),
    "chunk-of-minus-one": (TE, b"-1\r\n" + GOOD),
    "chunk-longer-than-it-says": (TE, b"5\r\n" + GOOD + b"\r\n0\r\n\r\n"),
    "chunk-without-a-size": (TE, b"\r\n" + GOOD + b"\r\n0\r\n\r\n"),
    "chunk-of-text": (TE, b"size\r\n" + GOOD + b"\r\n0\r\n\r\n"),
    "unknown-transfer-encoding": (b"Transfer-Encoding: xchunked\r\n", chunked(GOOD, 9)),
    "another-transfer-encoding": (b"Transfer-Encoding: gzip, chunked\r\n", chunked(GOOD, 9)),
    "nul-in-a-header": (CL + b"x-a: b\0c\r\n", GOOD),
    "a-header-without-a-name": (CL + b": b\r\n", GOOD),
    "a-header-without-a-colon": (CL + b"nonsense\r\n", GOOD),
}


@pytest.mark.parametrize("name", MISFRAMED)
def test_a_body_whose_end_is_not_certain(live: LiveServer, name: str) -> None:
    """Two readers could take another part for the next request: refused, and the line is cut."""
    headers, body = MISFRAMED[name]
    answer = exchange(live.url, post(body, length=False, headers=headers))
    error_of(answer, 400)
    assert answer.headers["connection"] == "close"


def test_a_body_longer_than_it_says(live: LiveServer) -> None:
    """The rest is another request, and none: the connection ends with the answer to the first."""
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(GOOD)
    answer = exchange(live.url, head + GOOD + b"and more\r\n\r\n")
    assert answer.status_code == 200
    if b"HTTP/1.1" in answer.content:
        error_of(parse(answer.content[answer.content.index(b"HTTP/1.1") :]), 400)
    else:
        assert answer.headers["connection"] == "close"


@pytest.mark.parametrize(
    ("headers", "body"),
    [(b"Content-Length: 1000\r\n", GOOD), (TE, b"3e8\r\n" + GOOD), (TE, chunked(GOOD, 9)[:-5])],
    ids=["length", "chunk", "no-last-chunk"],
)
def test_a_body_shorter_than_it_says(live: LiveServer, headers: bytes, body: bytes) -> None:
    """Its client has gone: nothing is computed, and nothing is answered."""
    gone = live.log.count("status=499")
    with connect(live.url) as connection:
        connection.sendall(post(body, length=False, headers=headers))
        connection.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer == b""
    until(lambda: live.log.count("status=499") > gone)


@pytest.mark.parametrize(
    ("expect", "length"), [(b"100-continue", LIMIT + 1), (b"200-ok", len(GOOD))], ids=str
)
def test_expectations(live: LiveServer, expect: bytes, length: int) -> None:
    """A body that is too large is refused before it was sent."""
    headers = b"Expect: %b\r\nContent-Length: %d\r\n" % (expect, length)
    answer = exchange(
        live.url, post(GOOD if length == len(GOOD) else b"", length=False, headers=headers)
    )
    assert answer.status_code == (413 if length > LIMIT else 200)


def test_a_body_over_the_limit_without_a_length(live: LiveServer) -> None:
    """Refused at the first byte too many: the end is never sent."""
    body = chunked(b" " * (LIMIT + 1), 100_000).removesuffix(b"\r\n0\r\n\r\n")
    answer = exchange(live.url, post(body, length=False, headers=TE))
    assert error_of(answer, 413)["code"] == "request_too_large"
