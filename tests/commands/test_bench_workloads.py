# SPDX-License-Identifier: MIT OR Apache-2.0
"""The benchmarks' workloads: the same texts everywhere, and of the stated lengths."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import pytest
from live import environment

from embedding_server.cli import build_parser
from embedding_server.commands.bench.workloads import (
    BULK_WORDS,
    CHUNK_WORDS,
    MIXED,
    QUERY_WORDS,
    UNIFORM_WORDS,
    WORKLOADS,
    Workload,
    build_workload,
    request_bodies,
)

DIGESTS = """
import hashlib, json
from embedding_server.commands.bench.workloads import WORKLOADS, build_workload
digests = {
    name: hashlib.sha256(repr(build_workload(name).requests).encode()).hexdigest()
    for name in reversed(WORKLOADS)
}
print(json.dumps(digests))
"""


def lengths(texts: tuple[str, ...]) -> list[int]:
    return [len(text.split()) for text in texts]


@pytest.mark.parametrize("seed", ["0", "1"])
def test_every_process_builds_the_same(seed: str) -> None:
    """Whatever the hashes, and in whichever order the workloads are built."""
    done = subprocess.run(
        [sys.executable, "-c", DIGESTS],
        env=environment({"PYTHONHASHSEED": seed}),
        capture_output=True,
        check=True,
    )
    assert json.loads(done.stdout) == {
        name: hashlib.sha256(repr(build_workload(name).requests).encode()).hexdigest()
        for name in WORKLOADS
    }


def test_nothing_is_imported_for_its_docstrings() -> None:
    program = (
        "import sys\n"
        "from embedding_server.commands.bench import workloads\n"
        "workloads.build_workload('pair')\n"
        "print({'xmlrpc.server', 'unittest.mock', 'ftplib'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, check=True
    )
    assert done.stdout.decode().strip() == "set()"


def test_pair_is_two_words() -> None:
    requests = build_workload("pair").requests
    assert len(requests) == 256
    assert all(lengths(texts) == [1, 1] for texts in requests)
    words = [word for texts in requests for word in texts]
    assert len(set(words)) == len(words)
    assert all(word.islower() for word in words)


def test_query_is_a_sentence() -> None:
    requests = build_workload("query").requests
    assert len(requests) == 256
    shortest, longest = QUERY_WORDS
    assert (shortest, longest) == (8, 20)
    for (text,) in requests:
        assert shortest <= len(text.split()) <= longest


def test_uniform_is_32_texts_of_24_words() -> None:
    requests = build_workload("uniform").requests
    assert UNIFORM_WORDS == 24
    assert {tuple(lengths(texts)) for texts in requests} == {(24,) * 32}


@pytest.mark.parametrize(
    ("name", "count", "words"), [("chunks", 32, CHUNK_WORDS), ("bulk", 2048, BULK_WORDS)]
)
def test_mixed_lengths_are_evenly_spread(name: str, count: int, words: tuple[int, int]) -> None:
    """Every request has the same lengths, in an order of its own."""
    requests = build_workload(name).requests
    shortest, longest = words
    each = [sorted(lengths(texts)) for texts in requests]
    assert all(found == each[0] for found in each)
    assert len(each[0]) == count
    assert (each[0][0], each[0][-1]) == (shortest, longest)
    assert abs(sum(each[0]) / count - (shortest + longest) / 2) < 1
    assert len({tuple(lengths(texts)) for texts in requests}) == len(requests)


@pytest.mark.parametrize("name", WORKLOADS)
def test_requests_differ(name: str) -> None:
    workload = build_workload(name)
    assert workload.name == name
    assert len(set(workload.requests)) == len(workload.requests) > 1


def test_bodies_are_requests_of_the_api() -> None:
    workload = Workload("some", (("naïve “quotes”",), ("one", "two")))
    bodies = [json.loads(body) for body in request_bodies(workload, "my/model")]
    assert bodies == [
        {"model": "my/model", "input": "naïve “quotes”"},
        {"model": "my/model", "input": ["one", "two"]},
    ]


@pytest.mark.parametrize("name", [*WORKLOADS, MIXED])
def test_the_command_line_names_them_all(name: str) -> None:
    assert build_parser().parse_args(["bench", "--workload", name]).workload == name
