# SPDX-License-Identifier: MIT OR Apache-2.0
"""Any bytes as a body and any text for a tokenizer: a result within the limits, or a reason."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import fuzz_requests
import pytest
import tiny_models
from fuzz_requests import check_body, check_encoding
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from live import environment
from long_texts import TEXT, load
from minilm import minilm_folder

import embedding_server.engine.tokenizer as tokenizer_module
from embedding_server.engine.tokenizer import Tokenizer

fuzz = settings(
    max_examples=300,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

FIELDS = [
    *("model", "input", "encoding_format", "dimensions", "user", "input_type", "prompt"),
    *("truncate", "normalize", "output_dtype", "Input", "", "inputs"),
]
VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.integers(-(2**70), 2**70),
        st.floats(),
        st.text(max_size=8),
        st.sampled_from(["float", "base64", "int8", "input", "model", '"input"', "\ud800", "\0"]),
    ),
    lambda inner: st.lists(inner, max_size=60) | st.dictionaries(st.sampled_from(FIELDS), inner),
    max_leaves=80,
)
NEAR = st.fixed_dictionaries(
    {"model": st.just("a"), "input": VALUES | st.lists(st.text(max_size=9)) | st.just("a")},
    optional=dict.fromkeys(FIELDS[2:-3], VALUES),
)
BRACKETS = st.text('[]{}",:\\ 01aeu\n\ud800', max_size=200)


@fuzz
@given(body=st.binary(max_size=200))
def test_any_bytes(body: bytes) -> None:
    check_body(body)
    check_body(b'{"model": "a", "input": %b}' % body)


@fuzz
@given(text=BRACKETS)
@example('{"model": "a", "input": "b\\')
@example('{"model": "a", "input": "' + '\\"' * 140_000)
@example('{"model": "a", "input": "' + '\\"[{,' * 60_000 + "\\")
@example('{"model": "a", "input": "b", "input": "c"}')
@example('{"model": "a", "input": "\\"input\\""}')
def test_what_looks_like_json(text: str) -> None:
    for form in ("%s", '{"model": "a", "input": %s}', '{"model": "a", "input": "a", %s}'):
        check_body((form % text).encode("utf-8", "surrogatepass"))


@fuzz
@given(
    value=VALUES | NEAR,
    indent=st.sampled_from([None, 0, 2]),
    ascii_only=st.booleans(),
    cut=st.integers(0, 40),
)
def test_json_near_a_request(value: Any, indent: int | None, ascii_only: bool, cut: int) -> None:
    body = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    encoded = body.encode("utf-8", "surrogatepass")
    check_body(encoded)
    check_body(encoded[: len(encoded) - cut])


@fuzz
@given(
    pairs=st.lists(
        st.tuples(
            st.sampled_from(FIELDS),
            st.sampled_from(["a", "input", '"input": ', ":)", "\\", ["a"], [1], None, 1]),
            st.integers(-1, 6),
            st.sampled_from([": ", ":", " :", "\r\n\t : "]),
        ),
        max_size=6,
    )
)
def test_fields_again(pairs: list[tuple[str, object, int, str]]) -> None:
    """Of each key, one character may be spelt as an escape."""

    def spelt(name: str, place: int) -> str:
        escaped = (
            f"\\u{ord(char):04x}" if index == place else char for index, char in enumerate(name)
        )
        return f'"{"".join(escaped)}"'

    rows = [
        f"{spelt(name, place)}{colon}{json.dumps(value)}" for name, value, place, colon in pairs
    ]
    check_body(("{" + ", ".join(rows) + "}").encode())
    check_body(('{"model": "a", "input": "b"' + "".join(", " + row for row in rows) + "}").encode())


ENDLESS = {
    "escaped-quotes": ('"', r"\"", ""),
    "quotes": ('"', '""', ""),
    "backslashes": ('"', "\\", ""),
    "an-odd-number-of-backslashes": ('"', "\\", 'a"'),
    "quotes-and-backslashes": ("", '"\\', ""),
    "escaped-quotes-and-brackets": ('"', r"\"[{,:]}", ""),
    "strings-in-lists": ("", r'["\",', '"'),
    "a-backslash-at-last": ('"', "a", "\\"),
}
"""How each begins, what it goes on with, and how it ends."""

PROGRAM = """
import sys
from embedding_server.api.parsing import check_extent
from embedding_server.errors import InvalidRequest
try:
    check_extent(sys.stdin.buffer.read(), inputs=2048, ids=3_000_000)
except InvalidRequest:
    pass
"""


@pytest.mark.parametrize("name", ENDLESS)
def test_time_grows_no_faster_than_the_body(name: str) -> None:
    """32 MB take less than a second, and hours if they are read again from each quote."""
    first, form, last = ENDLESS[name]
    body = '{"model": "a", "input": ' + first + form * (32_000_000 // len(form)) + last
    subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=body.encode(),
        env=environment(),
        check=True,
        timeout=60,
    )


KINDS = {
    "wordpiece-real": "minilm",
    "wordpiece": "bert",
    "byte-level-bpe": "roberta",
    "unigram": "xlm_roberta",
    "bpe-as-it-is": "modernbert",
    "bpe-qwen": "qwen3",
    "static": "static",
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    kind = KINDS[request.param]
    if kind == "minilm":
        return load(minilm_folder(), 24)
    folder = tiny_models.FAMILIES[kind](tmp_path_factory.mktemp("fuzz") / "model").folder
    loaded = load(folder, 24)
    loaded.max_tokens = 24
    return loaded


ANY_TEXT = st.one_of(
    TEXT,
    st.text(max_size=300),
    st.text(st.characters(categories=["Mn", "Me", "Cf", "Cc", "Zs"]), max_size=300),
    st.text(st.characters(min_codepoint=0x10000), max_size=300),
    st.text(st.characters(categories=["Cs", "Ll"]), max_size=20),
    st.text("\0\ufffd\ufeff\u0301\u200d\ud800 a", max_size=300),
)
ANY_IDS = st.lists(st.integers(-3, 40_000) | st.integers(), max_size=60)


@pytest.mark.parametrize("part", [20, 64 * 1024])
@fuzz
@given(
    inputs=st.lists(ANY_TEXT, min_size=1, max_size=4) | st.lists(ANY_IDS, min_size=1, max_size=4)
)
def test_any_text_and_any_ids(
    tokenizer: Tokenizer, part: int, inputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_module, "_PART_CHARACTERS", part)
    monkeypatch.setattr(tokenizer_module, "_MOST_CHARACTERS", 8 * part)
    check_encoding(tokenizer, inputs)


@pytest.mark.slow
def test_atheris_finds_nothing_in_a_minute(tmp_path: Path) -> None:
    """Led by the branches that are taken; needs the extra [fuzz]."""
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "request").write_text('{"model": "a", "input": ["a", "b"]}')
    (tmp_path / "corpus" / "ids").write_text('[[1, 2], [3]], "dimensions": 3')
    options = ["-max_total_time=60", "-timeout=10", "-rss_limit_mb=2048", str(tmp_path / "corpus")]
    done = subprocess.run(
        [sys.executable, str(Path(fuzz_requests.__file__)), *options],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    assert "Done " in done.stderr
