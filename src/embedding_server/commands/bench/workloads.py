# SPDX-License-Identifier: MIT OR Apache-2.0
"""The requests of the benchmarks: texts from the docstrings of the standard library.

The sources are read and parsed, never imported. The same version of Python makes the same
texts. Each workload is a cycle of different requests, so that no cache can answer for a model.
"""

from __future__ import annotations

import ast
import functools
import json
import random
import re
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from embedding_server.errors import ConfigurationError

__all__ = [
    "BULK_WORDS",
    "CHUNK_WORDS",
    "MIXED",
    "QUERY_WORDS",
    "UNIFORM_WORDS",
    "WORKLOADS",
    "Workload",
    "WorkloadRow",
    "build_workload",
    "request_bodies",
]

QUERY_WORDS = (8, 20)
"""Words of a sentence of ``query``, from and to."""
UNIFORM_WORDS = 24
"""Words of every text of ``uniform``."""
CHUNK_WORDS = (8, 280)
"""Words of a text of ``chunks``: its 32 texts have 32 lengths, evenly spread."""
BULK_WORDS = (8, 120)
"""Words of a text of ``bulk``, evenly spread; a server takes 300,000 tokens in a request."""

MIXED = "mixed"
"""Not one workload but two at once: ``query`` beside ``bulk``."""

_TEXTS = 32
_BULK_TEXTS = 2048

_MODULES = (
    *("cmd", "codecs", "configparser", "difflib", "email/message", "fileinput", "ftplib"),
    *("http/client", "inspect", "ipaddress", "json/__init__", "logging/__init__"),
    *("logging/handlers", "os", "pkgutil", "platform", "random", "shutil", "smtplib", "socket"),
    *("socketserver", "statistics", "subprocess", "tempfile", "textwrap", "threading"),
    *("traceback", "typing", "unittest/case", "unittest/mock", "uuid", "xmlrpc/server"),
)
"""Modules rich in prose and quick to parse; those that a version of Python lacks are left out."""

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_PLAIN_WORD = re.compile(r"[(\"']?[A-Za-z][A-Za-z'-]*[.,;:!?)\"']*")
_MOSTLY = 0.8


@dataclass(frozen=True, slots=True)
class Workload:
    """A cycle of requests, each of one or more texts."""

    name: str
    requests: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class _Corpus:
    words: tuple[str, ...]
    """All prose, word after word."""
    sentences: tuple[str, ...]
    """Different sentences of 8 to 20 words."""
    single: tuple[str, ...]
    """Different plain words, in lower case."""


def build_workload(name: str) -> Workload:
    """The workload called ``name``, which must be in ``WORKLOADS``.

    Raises ConfigurationError where the standard library's sources aren't installed.
    """
    row = WORKLOADS[name]
    # A new generator for each workload: the order in which they are built must not matter.
    return Workload(name, tuple(row.build(_corpus(), random.Random(name))))  # noqa: S311


def request_bodies(workload: Workload, model: str) -> tuple[bytes, ...]:
    """The JSON body of each request, for ``POST /v1/embeddings`` and OpenAI's servers alike.

    A single text is sent as a string, several as a list.
    """
    return tuple(
        json.dumps(
            {"model": model, "input": texts[0] if len(texts) == 1 else texts},
            ensure_ascii=False,
        ).encode()
        for texts in workload.requests
    )


def _pair(corpus: _Corpus, chance: random.Random) -> Iterator[tuple[str, ...]]:
    words = chance.sample(corpus.single, 512)
    return zip(words[::2], words[1::2], strict=True)


def _query(corpus: _Corpus, chance: random.Random) -> Iterator[tuple[str, ...]]:
    return ((sentence,) for sentence in chance.sample(corpus.sentences, 256))


def _uniform(corpus: _Corpus, chance: random.Random) -> Iterator[tuple[str, ...]]:
    for _ in range(64):
        yield tuple(_passage(corpus, chance, UNIFORM_WORDS) for _ in range(_TEXTS))


def _chunks(corpus: _Corpus, chance: random.Random) -> Iterator[tuple[str, ...]]:
    for _ in range(32):
        yield _mixed_lengths(corpus, chance, CHUNK_WORDS, _TEXTS)


def _bulk(corpus: _Corpus, chance: random.Random) -> Iterator[tuple[str, ...]]:
    for _ in range(4):
        yield _mixed_lengths(corpus, chance, BULK_WORDS, _BULK_TEXTS)


@dataclass(frozen=True, slots=True)
class WorkloadRow:
    """A row of ``WORKLOADS``."""

    help: str
    connections: int
    """How many requests are under way at a time, unless the user says otherwise."""
    build: Callable[[_Corpus, random.Random], Iterator[tuple[str, ...]]]


WORKLOADS: Mapping[str, WorkloadRow] = {
    "pair": WorkloadRow("two words, each an input", 64, _pair),
    "query": WorkloadRow("one sentence of 8 to 20 words", 64, _query),
    "uniform": WorkloadRow("32 texts of 24 words", 8, _uniform),
    "chunks": WorkloadRow("32 texts of 8 to 280 words, evenly spread", 4, _chunks),
    "bulk": WorkloadRow("2,048 texts of 8 to 120 words, evenly spread", 1, _bulk),
}


def _mixed_lengths(
    corpus: _Corpus, chance: random.Random, words: tuple[int, int], count: int
) -> tuple[str, ...]:
    """``count`` texts of evenly spread lengths, shuffled: every request is about as much work."""
    shortest, longest = words
    lengths = [shortest + (longest - shortest) * i // (count - 1) for i in range(count)]
    chance.shuffle(lengths)
    return tuple(_passage(corpus, chance, length) for length in lengths)


def _passage(corpus: _Corpus, chance: random.Random, words: int) -> str:
    """Consecutive words of the corpus, from a random place."""
    start = chance.randrange(len(corpus.words) - words)
    return " ".join(corpus.words[start : start + words])


@functools.cache
def _corpus() -> _Corpus:
    paragraphs = tuple(dict.fromkeys(_paragraphs()))
    words = tuple(word for paragraph in paragraphs for word in paragraph.split())
    sentences = dict.fromkeys(
        sentence
        for paragraph in paragraphs
        for sentence in _SENTENCE_END.split(paragraph)
        if QUERY_WORDS[0] <= len(sentence.split()) <= QUERY_WORDS[1]
    )
    plain = (word.strip("\"'(),.;:!?") for word in words if _PLAIN_WORD.fullmatch(word))
    # Without names made of several words, which are many tokens.
    single = dict.fromkeys(word.lower() for word in plain if len(word) > 2 and word[1:].islower())
    return _Corpus(words, tuple(sentences), tuple(single))


def _paragraphs() -> Iterator[str]:
    """The paragraphs of prose of all docstrings, without code, signatures and tables."""
    library = Path(sysconfig.get_path("stdlib"))
    sources = [path for name in _MODULES if (path := library / f"{name}.py").is_file()]
    if len(sources) < len(_MODULES) // 2:
        raise ConfigurationError(
            f"The workloads are made from the standard library's docstrings, and {library} "
            "doesn't hold its sources."
        )
    for source in sources:
        for docstring in _docstrings(ast.parse(source.read_bytes())):
            for block in re.split(r"\n\s*\n", docstring):
                words = block.split()
                plain = sum(_PLAIN_WORD.fullmatch(word) is not None for word in words)
                if len(words) >= QUERY_WORDS[0] and plain >= _MOSTLY * len(words):
                    yield " ".join(words)


def _docstrings(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef,
) -> Iterator[str]:
    yield ast.get_docstring(node) or ""
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _docstrings(child)
