# SPDX-License-Identifier: MIT OR Apache-2.0
"""Texts of many MB: the tokens of the whole, in bounded memory, without blocking other requests."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tiny_models
import tokenizers
from engine_bench import Bench, run_on, settle
from error_shape import error_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from in_process import until
from live import LiveServer, running_server
from long_texts import FORMS, TEXT, UNCUT, load
from minilm import minilm_folder
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers

import embedding_server.engine.tokenizer as tokenizer_module
from embedding_server.engine.cuts import (
    _ANY_MARK,
    _COMPOSED,
    _MARKS,
    QWEN_WORDS,
    cut_pattern,
    pieces,
)
from embedding_server.engine.tokenizer import Tokenizer
from embedding_server.errors import InvalidRequest

MODEL = "all-MiniLM-L6-v2"
FAMILIES = tuple(tiny_models.FAMILIES)


@pytest.fixture(scope="module", params=["minilm", *FAMILIES])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "minilm":
        return minilm_folder()
    return tiny_models.FAMILIES[request.param](tmp_path_factory.mktemp("long") / "model").folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load(folder)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever has more than 20 characters is long."""
    monkeypatch.setattr(tokenizer_module, "_PART_CHARACTERS", 20)
    monkeypatch.setattr(tokenizer_module, "_MOST_CHARACTERS", UNCUT)


# ----------------------------------------------------------------------------- the same tokens


@pytest.mark.usefixtures("small_parts")
@settings(
    max_examples=300,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(texts=st.lists(TEXT.filter(bool), min_size=1, max_size=3))
def test_pieces_have_the_tokens_of_the_whole(tokenizer: Tokenizer, texts: list[str]) -> None:
    raw = tokenizer._tokenizer
    special = tokenizer._add_special_tokens
    wholes = [raw.encode(text, add_special_tokens=special).ids for text in texts]
    if special and not all(wholes):
        return  # refused, in test_loading.py
    found = tokenizer.encode(texts)
    assert [list(encoding.ids) for encoding in found] == wholes
    assert [encoding.total_tokens for encoding in found] == [len(whole) for whole in wholes]


@settings(
    max_examples=300,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(text=TEXT)
def test_pieces_have_the_words_of_the_whole(tokenizer: Tokenizer, text: str) -> None:
    """Of a small vocabulary the tokens may be the same though the words are not."""
    check_words(tokenizer._tokenizer, text)


def check_words(raw: tokenizers.Tokenizer, text: str) -> None:
    def words(part: str) -> list[str]:
        normal = part if raw.normalizer is None else raw.normalizer.normalize_str(part)
        return [word for word, _ in raw.pre_tokenizer.pre_tokenize_str(normal)]

    parts = list(pieces(text, cut_pattern(raw), 3))
    assert "".join(parts) == text
    assert [word for part in parts for word in words(part)] == words(text)


NORMALIZERS = {
    "none": None,
    "nfc": normalizers.NFC(),
    "nfd": normalizers.NFD(),
    "nfkc": normalizers.NFKC(),
    "nfkd": normalizers.NFKD(),
    "nfd-stripped": normalizers.Sequence(
        [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]
    ),
    "nmt-nfkc": normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC()]),
    "bert": normalizers.BertNormalizer(),
    "bert-cased": normalizers.BertNormalizer(lowercase=False, strip_accents=False),
    "bert-nfc": normalizers.Sequence([normalizers.BertNormalizer(), normalizers.NFC()]),
    "nfkc-bert-without-ideographs": normalizers.Sequence(
        [normalizers.NFKC(), normalizers.BertNormalizer(handle_chinese_chars=False)]
    ),
}
PRE_TOKENIZERS = {
    "bert": pre_tokenizers.BertPreTokenizer(),
    "byte-level": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "byte-level-prefixed": pre_tokenizers.ByteLevel(add_prefix_space=True),
    "qwen": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
    "metaspace": pre_tokenizers.Metaspace(),
    "metaspace-first": pre_tokenizers.Metaspace(prepend_scheme="first"),
    "metaspace-never": pre_tokenizers.Metaspace(prepend_scheme="never"),
    "words-metaspace": pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    ),
    "words-metaspace-first": pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="first")]
    ),
}
ADVERSARIAL = [
    *("a", "B", "\u00e9", "\u6f22", "\u304b", "\u30ab", "\uac00", "\u1100", "\u1161", "0", "9"),
    *(
        " ",
        "  ",
        "\n",
        "\r",
        "\r\n",
        "\t",
        "\u00a0",
        "\u3000",
        "\u2581",
        "\u200b",
        "\x00",
        "\ufffd",
    ),
    *("\u0301", "\u0338", "\u3099", "\uff9e", "\u0345", "\u200d", "\ufe0f", "\u0600", "\u0e33"),
    *(
        "=",
        "<",
        ">",
        "+",
        "!",
        "?",
        ",",
        ".",
        ";",
        ":",
        "(",
        ")",
        "-",
        "_",
        "`",
        "'",
        "'s",
        "#",
        "|",
    ),
    *("\u3002", "\uff01", "\uff0c", "\uff1b", "\uff1d", "\u00df", "\u03a3", "\u0130", "\U0001f600"),
]


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("pre_tokenizer", PRE_TOKENIZERS)
def test_pieces_in_any_pair(normalizer: str, pre_tokenizer: str) -> None:
    """Also in those that no family here has, as a static model may bring its own tokenizer."""
    raw = tokenizers.Tokenizer(models.BPE())
    if (chosen := NORMALIZERS[normalizer]) is not None:
        raw.normalizer = chosen
    raw.pre_tokenizer = PRE_TOKENIZERS[pre_tokenizer]
    certain = pre_tokenizer == "bert" or "bert" not in normalizer
    assert (cut_pattern(raw) is not None) == certain
    generator = random.Random(7)
    for _ in range(150):  # of a few characters each, so that each meets each
        few = generator.sample(ADVERSARIAL, 5)
        check_words(raw, "".join(generator.choices([*few, "a", " "], k=60)))
    for mark in _ANY_MARK:
        check_words(raw, f"abc{mark}\u0338abc{mark} \u0338abc {mark}\u0301\u0338{mark}\u20d2abcabc")


def test_marks_that_are_joined_with_what_follows() -> None:
    """In Unicode itself, whatever its version."""
    composed = {
        unicodedata.normalize("NFD", chr(code))[0]
        for code in range(0x110000)
        if unicodedata.normalize("NFC", chr(code)) == chr(code)
        and len(unicodedata.normalize("NFD", chr(code))) > 1
    }
    for place in (_ANY_MARK, _MARKS):
        assert composed & set(place) <= set(_COMPOSED)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("limit", [8, 40, 100])
@pytest.mark.parametrize("keep_end", [False, True])
def test_long_texts_are_cut_as_others_are(folder: Path, limit: int, keep_end: bool) -> None:
    text = "the river runs past the old city, and on. " * 12
    whole, tokenizer = load(folder), load(folder)
    tokenizer.max_tokens = limit
    tokenizer._keep_end = keep_end
    (uncut,), (cut,) = whole.encode([text]), tokenizer.encode([text])
    assert cut.total_tokens == len(uncut.ids) == uncut.total_tokens
    first, last = len(tokenizer._template.prefix), len(tokenizer._template.suffix)
    content = uncut.ids[first : len(uncut.ids) - last]
    room = limit - first - last
    kept = content[-room:] if keep_end else content[:room]
    assert cut.ids[first : len(cut.ids) - last] == kept


def test_prose_is_cut_in_every_family(tokenizer: Tokenizer) -> None:
    text = "the river runs past the old city, and on. " * 1000
    parts = list(pieces(text, cut_pattern(tokenizer._tokenizer), 1000))
    assert "".join(parts) == text
    assert max(map(len, parts)) < 2100


@pytest.mark.parametrize(
    "token",
    [
        AddedToken("old city"),
        AddedToken("x. y"),
        AddedToken("city", rstrip=True),
        AddedToken("city", single_word=True),  # in "city_a" it isn't one
    ],
    ids=["a-space-inside", "a-mark-inside", "takes-the-space-after-it", "only-a-whole-word"],
)
def test_added_tokens_that_forbid_it(token: AddedToken) -> None:
    raw = load(minilm_folder())._tokenizer
    assert cut_pattern(raw) is not None
    raw.add_tokens([token])
    pattern = cut_pattern(raw)
    if token.content == "x. y":  # its mark alone is no longer a place
        assert pattern is None or "." not in pattern.pattern
    else:
        assert pattern is None


def test_an_unknown_pre_tokenizer_is_never_cut() -> None:
    raw = load(minilm_folder())._tokenizer
    raw.pre_tokenizer = None
    assert cut_pattern(raw) is None
    assert list(pieces("a " * 100, None, 10)) == ["a " * 100]


# --------------------------------------------------------------------------------- in any form


"""What a text of a million characters may be made of."""

PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from peak_memory import peak_megabytes
from long_texts import FORMS, LONG, load
from embedding_server.errors import InvalidRequest

tokenizer = load(Path(sys.argv[2]), 32)
tokenizer.encode(["a"])
texts = {name: (form * (LONG // len(form) + 1))[:LONG] for name, form in FORMS.items()}
before = peak_megabytes()
for name, text in texts.items():
    try:
        (encoding,) = tokenizer.encode([text])
        print(name, encoding.total_tokens)
    except InvalidRequest as error:
        print(name, "refused:", error.code)
print(peak_megabytes() - before)
"""


@pytest.mark.parametrize("kind", ["minilm", "roberta", "xlm_roberta", "qwen3", "static"])
def test_memory_of_a_million_characters(kind: str, tmp_path: Path) -> None:
    """Without pieces a million take up to 600 MB."""
    folder = minilm_folder() if kind == "minilm" else tiny_models.FAMILIES[kind](tmp_path / "m")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            PROGRAM,
            str(Path(tiny_models.__file__).parent),
            str(getattr(folder, "folder", folder)),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    *rows, megabytes = done.stdout.splitlines()
    assert len(rows) == len(FORMS)
    assert not any(row.startswith("prose refused") for row in rows)
    assert int(megabytes) < 150, done.stdout


def test_a_stretch_without_a_place_to_cut_it_at(tokenizer: Tokenizer) -> None:
    most = tokenizer_module._MOST_CHARACTERS
    with pytest.raises(InvalidRequest, match=rf"input\[1\] has a stretch of {most + 1} ") as caught:
        tokenizer.encode(["fine", "a" * (most + 1)])
    assert caught.value.code == "request_too_large"


def test_a_prompt_of_any_length() -> None:
    tokenizer = load(minilm_folder(), 256)
    for inputs in (["text"], [[7, 8]]):
        with pytest.raises(InvalidRequest, match="'prompt' has 65537 characters"):
            tokenizer.encode(inputs, prompt="a " * 32768 + "b")
        assert tokenizer.encode(inputs, prompt="a " * 32768)[0].truncated


# ------------------------------------------------------------------------------ over the network


@pytest.fixture(scope="module")
def live() -> Iterator[LiveServer]:
    """A server that lets 20 million characters into one request."""
    flags = ("--max-request-tokens", "2000000", "--max-body-bytes", "100000000")
    with running_server("--model", MODEL, *flags) as live:
        yield live


@pytest.fixture(scope="module")
def client(live: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=live.url, timeout=120) as client:
        yield client


def embed(client: httpx.Client, input: Any) -> httpx.Response:
    return client.post("/v1/embeddings", json={"model": MODEL, "input": input})


def admitted(client: httpx.Client) -> bool:
    page = client.get("/metrics").text
    return f'queue_requests{{model="{MODEL}"}} 3.0' in page


def test_long_texts_block_no_other_request(client: httpx.Client) -> None:
    """Three requests of 10 MB on fewer threads, and others are answered before any of them."""
    before = embed(client, ["iPhone"]).json()["data"][0]["embedding"]
    prose = FORMS["prose"]
    longs = [prose * 320_000, FORMS["ideographs"] * 1_000_000]
    # Refused, but last: the word stands behind as much as others have.
    refused = [prose * 9_000] * 33 + ["a" * 600_000]
    with ThreadPoolExecutor(3) as pool:
        longs_done = [pool.submit(embed, client, input) for input in (refused, *longs)]
        until(lambda: admitted(client) or any(done.done() for done in longs_done))
        short = embed(client, ["iPhone"])
        longer = embed(client, ["iPhone " * 2000])  # in the same threads as the long ones
        health = [client.get(f"/health/{name}").status_code for name in ("live", "ready")]
        assert not any(done.done() for done in longs_done), "they were not under way"
        assert health == [200, 200]
        assert short.json()["data"][0]["embedding"] == before
        assert longer.json()["data"][0]["tokens"] == 2002
        refusal, *answered = [done.result() for done in longs_done]
    assert error_of(refusal, 400)["code"] == "request_too_large"
    for response, text in zip(answered, longs, strict=True):
        (row,) = response.json()["data"]
        head = np.array(embed(client, text[:20_000]).json()["data"][0]["embedding"])
        np.testing.assert_allclose(row["embedding"], head, atol=1e-6)
        assert row["tokens"] > 256


def test_a_large_step_that_waits_for_another_keeps_no_thread() -> None:
    """One thread tokenises, and a stretch that can't be cut waits for one of another model."""
    bench = Bench(tokenizing_threads=1, real_tokenizer=load(minilm_folder(), 256))
    other_ends = threading.Event()

    async def scenario() -> None:
        other = bench.tokenizing_large.submit(other_ends.wait, 60)
        waiting = bench.send("a" * 200_000)
        await settle()
        assert bench.metric("queue_requests") == 1
        assert (await bench.send("river " * 2000)).tokens > 2
        assert not waiting.done()
        other_ends.set()
        assert (await waiting).tokens > 2
        assert other.result()

    run_on(bench, scenario)


def test_large_steps_are_announced() -> None:
    """Before each: also where they come first, and between others."""
    tokenizer = load(minilm_folder(), 256)
    large, small = "a" * 200_000, "river " * 10_000
    *steps, encodings = tokenizer.encode_in_steps([large, small, small, small + large])
    assert steps == [True, False, False, False, True]
    assert isinstance(encodings, list)
    assert len(encodings) == 4


def test_a_client_that_hangs_up_meanwhile_frees_its_place(
    live: LiveServer, client: httpx.Client
) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{live.url}/v1/embeddings",
            json={"model": MODEL, "input": FORMS["words"] * 190_000},
            timeout=httpx.Timeout(60, read=0.5),
        )
    until(lambda: f'queue_requests{{model="{MODEL}"}} 0.0' in client.get("/metrics").text)


def test_2048_texts_of_8_kb(server: LiveServer) -> None:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        error = error_of(embed(client, ["zqxj " * 1640] * 2048), 400)
        assert error["code"] == "request_too_large"
        assert "16793600 characters in 2048 inputs; at most 3000000" in error["message"]
        assert embed(client, "a").status_code == 200
