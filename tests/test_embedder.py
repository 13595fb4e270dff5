# SPDX-License-Identifier: MIT OR Apache-2.0
"""``from embedding_server import Embedder``: the engine in a script, a notebook, a thread pool."""

from __future__ import annotations

import asyncio
import gc
import inspect
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
from live import environment
from numpy.typing import NDArray

from embedding_server import Embedder
from embedding_server.engine.parameters import EmbedParams
from embedding_server.errors import (
    ConfigurationError,
    ContextLengthExceeded,
    InvalidRequest,
    ModelNotSupported,
    ModelUnavailable,
    NotReady,
)

Vectors = NDArray[np.float32]

LIMIT = 64
LONG = "river " * 100


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prompts = {"query": "search the river: ", "document": "read: "}
    made = tiny.make_bert(
        tmp_path_factory.mktemp("models") / "tiny", max_seq_length=LIMIT, prompts=prompts
    )
    return made.folder


@pytest.fixture(scope="module")
def embedder(folder: Path) -> Iterator[Embedder]:
    with Embedder(str(folder)) as opened:
        yield opened


def test_golden_vectors(golden: tuple[list[str], Vectors]) -> None:
    texts, expected = golden
    with Embedder("all-MiniLM-L6-v2") as embedder:
        vectors = embedder.embed(texts)
        assert (embedder.info.dims, embedder.info.max_tokens) == (384, 256)
    assert vectors.dtype == np.float32
    assert np.abs(vectors - expected).max() < 1e-5


# ------------------------------------------------------------------------------------------ inputs


def test_what_a_list_of_texts_may_be(embedder: Embedder) -> None:
    expected = embedder.embed(["one", "two"])
    others: list[Any] = [("one", "two"), np.array(["one", "two"]), dict.fromkeys(["one", "two"])]
    for texts in others:
        np.testing.assert_array_equal(embedder.embed(texts), expected)


def test_one_text_is_not_a_list(embedder: Embedder) -> None:
    with pytest.raises(TypeError, match=r"embed\(\[text\]\)"):
        embedder.embed("text")


@pytest.mark.parametrize("value", [None, float("nan"), 7, ["nested"]], ids=repr)
def test_what_is_no_text_is_refused(embedder: Embedder, value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        embedder.embed(["text", value])
    assert caught.value.index == 1


@pytest.mark.parametrize(
    ("options", "shape", "dtype"),
    [
        ({}, (0, 32), np.float32),
        ({"dimensions": 32, "input_type": "query"}, (0, 32), np.float32),
        ({"output_dtype": "int8"}, (0, 32), np.int8),
        ({"output_dtype": "uint8"}, (0, 32), np.uint8),
        ({"output_dtype": "ubinary"}, (0, 4), np.uint8),
        ({"output_dtype": "binary"}, (0, 4), np.int8),
    ],
    ids=str,
)
def test_no_texts_are_no_vectors(
    embedder: Embedder, options: dict[str, Any], shape: tuple[int, int], dtype: type
) -> None:
    vectors = embedder.embed([], **options)
    assert (vectors.shape, vectors.dtype) == (shape, dtype)


@pytest.mark.parametrize("texts", [[], ["a text"]], ids=["no-texts", "one"])
@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"dimensions": 10**6}, "dimensions"),
        ({"dimensions": 8}, "dimensions"),
        ({"input_type": "poem"}, "input_type"),
        ({"input_type": "query", "prompt": "read: "}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
    ],
    ids=str,
)
def test_options_are_checked_with_texts_and_without(
    embedder: Embedder, texts: list[str], options: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        embedder.embed(texts, **options)
    assert caught.value.param == param


def test_its_options_are_those_of_a_request() -> None:
    """Editors and type checkers read them from the signature, which must say them again."""
    parameters = inspect.signature(Embedder.embed).parameters
    options = {
        name: (parameter.annotation, parameter.default)
        for name, parameter in parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    assert options == {field.name: (field.type, field.default) for field in fields(EmbedParams)}


def test_no_texts_are_cut_too(folder: Path) -> None:
    with Embedder(str(folder), matryoshka=(8, 16)) as embedder:
        assert embedder.embed([], dimensions=8).shape == (0, 8)
        assert embedder.embed([], dimensions=16, output_dtype="ubinary").shape == (0, 2)


def test_token_ids(embedder: Embedder) -> None:
    answer = embedder.embed_detailed(["river city"], EmbedParams())
    (encoding,) = answer.encodings
    vectors = embedder.embed([encoding.ids[1:-1]])
    np.testing.assert_allclose(vectors, answer.vectors, atol=1e-6)


def test_options(embedder: Embedder) -> None:
    plain, prompted = embedder.embed(["city"]), embedder.embed(["city"], input_type="query")
    assert np.abs(plain - prompted).max() > 1e-3
    np.testing.assert_array_equal(prompted, embedder.embed(["city"], prompt="search the river: "))
    unscaled = embedder.embed(["city"], normalize=False)
    np.testing.assert_allclose(unscaled / np.linalg.norm(unscaled), plain, atol=1e-6)
    assert embedder.embed(["city"], output_dtype="int8").dtype == np.int8


def test_a_prompt_that_pooling_leaves_out(tmp_path: Path) -> None:
    """As INSTRUCTOR models ask, with ``include_prompt: false``."""
    prompts = {"query": "search the river: "}
    model = tiny.make_bert(tmp_path / "model", include_prompt=False, prompts=prompts)
    texts = tiny.texts(12, seed=3)
    expected = tiny.load_reference(model).encode(texts, prompt_name="query")
    with Embedder(str(model.folder)) as embedder:
        assert np.abs(embedder.embed(texts, input_type="query") - expected).max() < 1e-5


# ------------------------------------------------------------------------------------------ length


def test_cut_texts_are_told(embedder: Embedder, caplog: pytest.LogCaptureFixture) -> None:
    embedder.embed(["short", LONG, LONG])
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"2 of 3 texts were cut to the {LIMIT} tokens that tiny takes" in record.getMessage()


def test_nothing_is_told_where_nothing_was_cut(
    embedder: Embedder, caplog: pytest.LogCaptureFixture
) -> None:
    embedder.embed(["short"])
    assert not caplog.records


def test_truncate_false(embedder: Embedder) -> None:
    with pytest.raises(ContextLengthExceeded, match=r"input\[1\] has 102 tokens"):
        embedder.embed(["short", LONG], truncate=False)


def test_detailed(embedder: Embedder) -> None:
    answer = embedder.embed_detailed(["short", LONG], EmbedParams())
    assert [encoding.truncated for encoding in answer.encodings] == [False, True]
    assert answer.encodings[1].total_tokens == 102
    assert answer.vectors.shape == (2, 32)


# ----------------------------------------------------------------------------------------- threads


def test_from_several_threads(embedder: Embedder) -> None:
    texts = tiny.texts(200, seed=6)
    expected = embedder.embed(texts)
    with ThreadPoolExecutor(8) as pool:
        vectors = list(pool.map(lambda text: embedder.embed([text])[0], texts))
    assert np.abs(np.array(vectors) - expected).max() < 1e-6


def test_inside_a_running_event_loop(folder: Path) -> None:
    """As in a notebook."""

    async def notebook() -> Vectors:
        with Embedder(str(folder)) as embedder:
            return embedder.embed(["river"])

    assert asyncio.run(notebook()).shape == (1, 32)


# ---------------------------------------------------------------------------------------- lifetime


def test_no_thread_survives_close(folder: Path) -> None:
    before = set(threading.enumerate())
    embedder = Embedder(str(folder))
    embedder.embed(["short", LONG * 50])
    assert set(threading.enumerate()) > before
    embedder.close()
    assert set(threading.enumerate()) == before


def test_a_forgotten_embedder_ends_its_threads(folder: Path) -> None:
    before = set(threading.enumerate())
    embedder = Embedder(str(folder))
    embedder.embed(["short"])
    del embedder
    gc.collect()
    assert set(threading.enumerate()) == before


def test_closed_is_closed(folder: Path) -> None:
    embedder = Embedder(str(folder))
    embedder.close()
    embedder.close()
    with pytest.raises(NotReady, match="closed"):
        embedder.embed(["text"])
    assert embedder.info.dims == 32


def test_closing_under_way_fails_what_waits(folder: Path) -> None:
    """Every call ends, with its vectors or with NotReady."""
    embedder = Embedder(str(folder))
    texts = tiny.texts(300, seed=8)
    started = threading.Barrier(9)

    def embed_until_closed() -> str:
        started.wait()
        try:
            while True:
                assert embedder.embed(texts).shape == (300, 32)
        except NotReady:
            return "not ready"

    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(embed_until_closed) for _ in range(8)]
        started.wait()
        embedder.embed(texts[:1])
        embedder.close()
        assert {future.result(60) for future in futures} == {"not ready"}


class Leaving(list[int]):
    """Ends the program that asks for its length."""

    def __len__(self) -> int:
        raise SystemExit(3)


def test_an_input_that_breaks_the_event_loop_off(folder: Path) -> None:
    with Embedder(str(folder)) as embedder:
        with pytest.raises(SystemExit):
            embedder.embed([Leaving()])
        assert embedder.embed(["river"]).shape == (1, 32)


def test_a_script_need_not_close(folder: Path) -> None:
    program = (
        "import sys; from embedding_server import Embedder;"
        "print(Embedder(sys.argv[1]).embed(['river']).shape)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, str(folder)],
        env=environment(),
        capture_output=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"(1, 32)\n", b"")


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        pytest.param("no model", {}, ModelUnavailable, "is no model", id="no-name"),
        pytest.param("./nowhere", {}, ModelUnavailable, "no folder", id="no-folder"),
        pytest.param(
            "tiny", {"backend": "jax"}, ConfigurationError, "no backend 'jax'", id="backend"
        ),
        pytest.param(
            "tiny", {"onnx_file": "onnx/none.onnx"}, ModelNotSupported, "none.onnx", id="onnx-file"
        ),
    ],
)
def test_a_model_that_cannot_be_had(
    folder: Path, model: str, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    before = set(threading.enumerate())
    with pytest.raises(error, match=message):
        Embedder(str(folder) if model == "tiny" else model, **options)
    for thread in set(threading.enumerate()) - before:
        thread.join(20)
    assert set(threading.enumerate()) == before


def test_load_models_from(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "all-MiniLM-L6-v2").symlink_to(folder)
    plain = tiny.make_bert(tmp_path / "org-name", seed=5)
    (tmp_path / "name").symlink_to(plain.folder)
    with Embedder("org/name", load_models_from=tmp_path) as embedder:
        assert embedder.info.name == "name"
        assert embedder.embed(["river"]).shape == (1, 32)
    # Another file than the catalog's digest says is never taken for the catalog's model.
    with pytest.raises(ModelUnavailable, match="sha256"):
        Embedder("all-MiniLM-L6-v2", load_models_from=tmp_path)


def test_forgotten_ones_end_in_silence(tmp_path: Path) -> None:
    """A script that never closes its embedders ends without a word on stderr."""
    folder = tiny.make_bert(tmp_path / "bert").folder
    code = (
        "from embedding_server import Embedder\n"
        f"made = [Embedder({str(folder)!r}) for _ in range(3)]\n"
        "print(len([one.embed(['river']) for one in made]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"3\n", b"")
