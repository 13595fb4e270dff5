# SPDX-License-Identifier: MIT OR Apache-2.0
"""``embedding-server embed``, as its users run it: files and standard input to vectors."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import tiny_models as tiny
from live import environment, interruptible, run_cli
from numpy.typing import NDArray

from embedding_server import Embedder

Vectors = NDArray[np.float32]

TEXTS = ["river city", "", "train of the year", "  spaced\tout  ", "café — 数学"]
LIMIT = 64
LONG = "river " * 100


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model's folder, as ``--model`` takes it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    prompts = {"query": "search the river: "}
    return str(tiny.make_bert(folder, max_seq_length=LIMIT, prompts=prompts).folder)


@pytest.fixture(scope="module")
def embedder(model: str) -> Iterable[Embedder]:
    """The same model in this process, for what must come out."""
    with Embedder(model) as opened:
        yield opened


def rows_of(output: bytes) -> list[dict]:
    return [json.loads(line) for line in output.splitlines()]


def vectors_of(output: bytes) -> Vectors:
    rows = rows_of(output)
    assert [row["index"] for row in rows] == list(range(len(rows)))
    return np.array([row["embedding"] for row in rows], dtype=np.float32)


def embed(
    model: str, *arguments: str | Path, stdin: bytes = b"", code: int = 0
) -> subprocess.CompletedProcess[bytes]:
    done = run_cli("embed", "--model", model, *map(str, arguments), stdin=stdin)
    assert done.returncode == code, done.stderr.decode()
    assert b"Traceback" not in done.stderr
    return done


def same(vectors: Vectors, expected: Vectors) -> None:
    assert vectors.shape == expected.shape
    np.testing.assert_allclose(vectors, expected, atol=1e-6)


def lines(*texts: str) -> bytes:
    return "".join(f"{text}\n" for text in texts).encode()


# ----------------------------------------------------------------------------------- real vectors


def test_golden_vectors(golden: tuple[list[str], Vectors], tmp_path: Path) -> None:
    """sentence-transformers' vectors of the real model, through JSON lines to .npy."""
    texts, expected = golden
    source, output = tmp_path / "texts.jsonl", tmp_path / "vectors.npy"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    embed("all-MiniLM-L6-v2", source, "--field", "text", "-o", output)
    assert np.abs(np.load(output) - expected).max() < 1e-5


# ------------------------------------------------------------------------------------------ input


@pytest.mark.parametrize("arguments", [[], ["-"]], ids=["no-file", "dash"])
def test_standard_input(model: str, embedder: Embedder, arguments: list[str]) -> None:
    done = embed(model, *arguments, stdin=lines(*TEXTS))
    same(vectors_of(done.stdout), embedder.embed(TEXTS))


def test_several_files_and_standard_input_in_order(
    model: str, embedder: Embedder, tmp_path: Path
) -> None:
    first, last = tmp_path / "first.txt", tmp_path / "last.txt"
    first.write_bytes(lines("one", "two"))
    last.write_bytes(lines("five"))
    done = embed(model, first, "-", last, stdin=lines("three", "four"))
    expected = embedder.embed(["one", "two", "three", "four", "five"])
    same(vectors_of(done.stdout), expected)


def test_many_lines_stay_in_order(model: str, embedder: Embedder) -> None:
    texts = tiny.texts(1500, seed=4, max_words=12)
    done = embed(model, stdin=lines(*texts))
    same(vectors_of(done.stdout), embedder.embed(texts))


LINES = {
    "crlf": (b"one\r\ntwo\r\n", ["one", "two"]),
    "no-newline-at-the-end": (b"one\ntwo", ["one", "two"]),
    "blank-lines": (b"one\n\n\ntwo\n\n", ["one", "", "", "two", ""]),
    "bom": (b"\xef\xbb\xbfone\n\xef\xbb\xbftwo\n", ["one", "\ufefftwo"]),
    "other-line-breaks-are-text": (b"one\rtwo\x0b\x0c\n", ["one\rtwo\x0b\x0c"]),
    "unicode-line-breaks": ("a\u2028b\u0085c\n".encode(), ["a\u2028b\u0085c"]),
}


@pytest.fixture(scope="module")
def embedded_lines(
    model: str, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, list[list[float]]]:
    """What one run over a file for each row of ``LINES`` gives, by the row's name."""
    folder = tmp_path_factory.mktemp("lines")
    for name, (raw, _) in LINES.items():
        (folder / name).write_bytes(raw)
    rows = iter(rows_of(embed(model, *(folder / name for name in LINES)).stdout))
    by_name = {name: [next(rows)["embedding"] for _ in texts] for name, (_, texts) in LINES.items()}
    assert next(rows, None) is None
    return by_name


@pytest.mark.parametrize("name", LINES)
def test_what_a_line_is(
    embedder: Embedder, embedded_lines: Mapping[str, list[list[float]]], name: str
) -> None:
    same(np.array(embedded_lines[name], np.float32), embedder.embed(LINES[name][1]))


def test_json_lines(model: str, embedder: Embedder) -> None:
    raw = b'\xef\xbb\xbf{"id": 7, "body": "river \\u00e9\\ncity"}\r\n{"body": "", "more": [1]}\n'
    done = embed(model, "--field", "body", stdin=raw)
    same(vectors_of(done.stdout), embedder.embed(["river é\ncity", ""]))


# ----------------------------------------------------------------------------------------- output


@pytest.mark.parametrize("name", ["out.jsonl", "out.ndjson", "OUT.NPY", "out.parquet"])
@pytest.mark.parametrize("texts", [TEXTS, []], ids=["some", "none"])
def test_output_files(
    model: str, embedder: Embedder, tmp_path: Path, name: str, texts: list[str]
) -> None:
    output = tmp_path / name
    output.write_bytes(b"what was there before")
    done = embed(model, "-o", output, stdin=lines(*texts))
    assert done.stdout == b""
    if output.suffix == ".parquet":
        table = pyarrow.parquet.read_table(output)
        assert table["index"].to_pylist() == list(range(len(texts)))
        assert table["embedding"].type.list_size == 32
        vectors = np.array(table["embedding"].to_pylist(), np.float32).reshape(-1, 32)
    elif output.suffix == ".NPY":
        vectors = np.load(output, mmap_mode="r")
        assert vectors.dtype == np.float32
    else:
        vectors = vectors_of(output.read_bytes()).reshape(-1, 32)
    same(vectors, embedder.embed(texts))
    assert list(tmp_path.iterdir()) == [output]


def test_no_input_prints_nothing(model: str) -> None:
    assert embed(model).stdout == b""


@pytest.mark.parametrize(
    ("output", "message"),
    [
        pytest.param("vectors.csv", "must end in one of .jsonl", id="suffix"),
        pytest.param("vectors", "must end in one of .jsonl", id="no-suffix"),
        pytest.param("nowhere/vectors.npy", "folder of the output", id="no-folder"),
        pytest.param("folder.npy", "is a folder", id="a-folder"),
    ],
)
def test_an_output_that_cannot_be_written(
    model: str, tmp_path: Path, output: str, message: str
) -> None:
    (tmp_path / "folder.npy").mkdir()
    done = embed(model, "-o", tmp_path / output, code=1)
    assert message in done.stderr.decode()


# ----------------------------------------------------------------------------------------- options


def test_options_are_those_of_the_api(model: str, embedder: Embedder) -> None:
    arguments = ("--input-type", "query", "--no-normalize")
    done = embed(model, *arguments, stdin=lines("city"))
    expected = embedder.embed(["city"], input_type="query", normalize=False)
    same(vectors_of(done.stdout), expected)
    done = embed(model, "--prompt", "search the river: ", stdin=lines("city"))
    same(vectors_of(done.stdout), embedder.embed(["city"], input_type="query"))


@pytest.mark.parametrize("name", ["-", "out.npy", "out.parquet"])
def test_dimensions(model: str, embedder: Embedder, tmp_path: Path, name: str) -> None:
    output = tmp_path / name
    arguments = ("--matryoshka", "tiny=8,16", "--dimensions", "8")
    done = embed(model, *arguments, "-o", "-" if name == "-" else output, stdin=lines(*TEXTS))
    if name == "-":
        vectors = vectors_of(done.stdout)
    elif output.suffix == ".npy":
        vectors = np.load(output)
    else:
        table = pyarrow.parquet.read_table(output)
        vectors = np.array(table["embedding"].to_pylist(), np.float32)
    cut = embedder.embed(TEXTS, normalize=False)[:, :8]
    same(vectors, cut / np.linalg.norm(cut, axis=1, keepdims=True))


def test_the_models_full_size(model: str, embedder: Embedder) -> None:
    done = embed(model, "--dimensions", f"{embedder.info.dims}", stdin=lines(*TEXTS))
    same(vectors_of(done.stdout), embedder.embed(TEXTS))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--dimensions", "8"], "not trained for shorter vectors", id="dimensions"),
        pytest.param(["--input-type", "poem"], "has no prompt 'poem'", id="input-type"),
    ],
)
def test_options_that_the_model_cannot_take(model: str, arguments: list[str], message: str) -> None:
    assert message in embed(model, *arguments, stdin=b"text\n", code=1).stderr.decode()


@pytest.mark.parametrize("models", [[], ["a", "b"]], ids=["none", "two"])
def test_exactly_one_model(models: list[str]) -> None:
    done = run_cli("embed", *(part for name in models for part in ("--model", name)))
    assert done.returncode == 1
    assert b"exactly one --model" in done.stderr


# ---------------------------------------------------------------------------------------- bad lines


@pytest.mark.parametrize(
    ("arguments", "raw", "message"),
    [
        pytest.param([], b"one\ntw\xff\n", "line 2: not UTF-8 at byte 2", id="utf-8"),
        pytest.param(["--field", "t"], b'{"t": "a"}\n{"t": \n', "line 2: not JSON", id="json"),
        pytest.param(["--field", "t"], b'{"t": "a"}\n\n', "line 2: not JSON", id="blank-json"),
        pytest.param(
            ["--field", "t"],
            b'{"t": "a"}\n{"u": "a"}\n',
            "line 2: not an object with a string under 't'",
            id="missing-field",
        ),
        pytest.param(
            ["--field", "t"], b'{"t": "a"}\n{"t": 7}\n', "line 2: not an object", id="no-string"
        ),
        pytest.param(["--field", "t"], b'{"t": "a"}\n["t"]\n', "line 2: not an object", id="list"),
        pytest.param(
            ["--field", "t"], b'{"t": "a"}\n{"t": "\\ud800"}\n', "line 2: not JSON", id="surrogate"
        ),
        pytest.param(
            ["--no-truncate"],
            lines("one", LONG),
            f"line 2: has 102 tokens, but this model takes at most {LIMIT}",
            id="too-long",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["npy", "parquet"])
def test_a_bad_line_is_named_and_nothing_is_left_behind(
    model: str, tmp_path: Path, arguments: list[str], raw: bytes, message: str, kind: str
) -> None:
    source, output = tmp_path / "texts", tmp_path / f"vectors.{kind}"
    source.write_bytes(raw)
    output.write_bytes(b"what was there before")
    done = embed(model, source, *arguments, "-o", output, code=1)
    assert f"{source}, {message}" in done.stderr.decode()
    assert b"Traceback" not in done.stderr
    assert output.read_bytes() == b"what was there before"
    assert sorted(tmp_path.iterdir()) == [source, output]


def test_parquet_is_no_text(model: str, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.parquet"
    corpus.write_bytes(b"PAR1")
    assert b"Parquet is read with --ray only" in embed(model, corpus, code=1).stderr


def test_a_bad_line_of_standard_input(model: str) -> None:
    done = embed(model, stdin=b"\xff", code=1)
    assert b"standard input, line 1: not UTF-8" in done.stderr
    assert done.stdout == b""


def test_line_numbers_count_in_each_file(model: str, tmp_path: Path) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.write_bytes(lines(*TEXTS))
    bad.write_bytes(b"one\ntwo\n\xff\n")
    done = embed(model, good, bad, code=1)
    assert f"{bad}, line 3: not UTF-8" in done.stderr.decode()


@pytest.mark.parametrize("before", [1, 256, 700], ids=str)
@pytest.mark.parametrize("bad", [b"\xff\n", LONG.encode() + b"\n"], ids=["bytes", "too-long"])
def test_what_stands_before_a_bad_line_is_printed_and_nothing_after(
    model: str, embedder: Embedder, before: int, bad: bytes
) -> None:
    texts = [f"river {number}" for number in range(before)]
    raw = lines(*texts) + bad + lines(*["after"] * 2000)
    done = embed(model, "--no-truncate", stdin=raw, code=1)
    assert f"line {before + 1}:" in done.stderr.decode()
    same(vectors_of(done.stdout), embedder.embed(texts))


@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_a_file_that_cannot_be_read_fails_before_anything_is_embedded(
    model: str, tmp_path: Path, kind: str
) -> None:
    good, bad = tmp_path / "good", tmp_path / "folder"
    good.write_bytes(lines("one"))
    bad.mkdir()
    done = embed(model, good, bad if kind == "folder" else tmp_path / "missing", code=1)
    assert done.stdout == b""
    assert "is no file that exists and can be read" in done.stderr.decode()


# ------------------------------------------------------------------------------------------- length


def test_texts_that_were_cut_are_told(model: str, tmp_path: Path) -> None:
    source = tmp_path / "texts"
    source.write_bytes(lines("short", LONG, "short", LONG + LONG))
    done = embed(model, source)
    assert f"2 of 4 texts were cut to the {LIMIT} tokens" in done.stderr.decode()
    assert f"the first in {source}, line 2" in done.stderr.decode()
    cut = [(row.get("truncated"), row.get("tokens")) for row in rows_of(done.stdout)]
    assert cut == [(None, None), (True, 102), (None, None), (True, 202)]


def test_nothing_is_told_where_nothing_was_cut(model: str) -> None:
    assert b"were cut" not in embed(model, stdin=lines("short")).stderr


# ------------------------------------------------------------------------------ pipes and terminals


def start(model: str, *arguments: str, **options: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "embedding_server.cli", "embed", "--model", model]
    return interruptible([*command, *arguments], env=environment(), **options)


def test_a_reader_that_has_seen_enough(model: str, tmp_path: Path) -> None:
    """As ``| head -1``: no traceback, and no error."""
    source, log = tmp_path / "texts", tmp_path / "log"
    source.write_bytes(lines("river") * 20_000)
    with log.open("wb") as stderr:
        process = start(model, str(source), stdout=subprocess.PIPE, stderr=stderr)
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["index"] == 0
        process.stdout.close()
        assert process.wait(60) == 0
    assert b"Traceback" not in log.read_bytes()
    assert b"Broken" not in log.read_bytes()


@pytest.mark.parametrize(
    ("line", "few", "many"),
    [
        pytest.param(b"river city\n", 2000, 40_000, id="many-lines"),
        # One word to the tokenizer, so that the time goes into lines and not into tokens.
        pytest.param(b"x" * 16_383 + b"\n", 128, 1200, id="long-lines"),
    ],
)
def test_memory_is_bounded(model: str, line: bytes, few: int, many: int) -> None:
    """The peak does not grow with the number of lines."""
    program = (
        "import sys; from pathlib import Path; from embedding_server.cli import main;"
        "code = main(); status = Path('/proc/self/status').read_text();"
        "print(status.partition('VmHWM:')[2].split()[0], file=sys.stderr); sys.exit(code)"
    )

    def peak_megabytes(count: int) -> float:
        done = subprocess.run(
            [sys.executable, "-c", program, "embed", "--model", model],
            input=line * count,
            env=environment(),
            capture_output=True,
            check=True,
        )
        assert done.stdout.count(b"\n") == count
        return int(done.stderr.split()[-1]) / 1024

    small, large = peak_megabytes(few), peak_megabytes(many)
    print(f"peak memory: {small:.1f} MB after {few} lines, {large:.1f} MB after {many}")
    assert large - small < 10


def test_rows_come_while_standard_input_is_open(model: str) -> None:
    """Endless input: what was read is answered before the end that never comes."""
    process = start(model, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(lines("river") * 3000)
    process.stdin.flush()
    indices = [json.loads(process.stdout.readline())["index"] for _ in range(1500)]
    assert indices == list(range(1500))
    process.stdin.close()
    assert process.stdout.read().count(b"\n") == 1500
    process.stdout.close()
    assert process.wait(60) == 0


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "sigterm"]
)
def test_a_signal_leaves_nothing_behind(
    model: str, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    output = tmp_path / "vectors.npy"
    process = start(
        model,
        *("-o", str(output)),
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    process.stdin.write(lines("river") * 3000)
    process.stdin.flush()
    deadline = time.monotonic() + 60
    while not list(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, log = process.communicate(timeout=60)
    assert process.returncode == code
    assert b"Traceback" not in log
    assert list(tmp_path.iterdir()) == []


def test_the_progress_bar_is_for_terminals_only(model: str) -> None:
    controller, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    process = start(model, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=terminal)
    os.close(terminal)
    process.communicate(lines(*TEXTS), timeout=60)
    shown = b""
    try:
        while part := os.read(controller, 4096):
            shown += part
    except OSError:  # how a terminal says that its last user is gone
        pass
    finally:
        os.close(controller)
    assert b"5 texts" in shown
    assert b"texts/s" in shown
    assert b"texts/s" not in embed(model, stdin=lines(*TEXTS)).stderr


def test_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    """Long before the chunks that were read ahead would be done."""
    many = tmp_path / "many.txt"
    sentence = "a sentence that is not short at all " * 20
    many.write_text("".join(f"{number} {sentence}\n" for number in range(5000)))
    command = [
        sys.executable,
        "-m",
        "embedding_server.cli",
        "embed",
        "--model",
        "all-MiniLM-L6-v2",
        str(many),
    ]
    process = interruptible(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    process.stdout.readline()  # it is at work
    process.send_signal(signal.SIGINT)
    process.stdout.close()
    assert process.wait(15) in (130, -signal.SIGINT)
