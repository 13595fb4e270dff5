# SPDX-License-Identifier: MIT OR Apache-2.0
"""The engine's own ceiling: how many requests a second the backend alone would do.

As a program it is a process of its own, as the servers are. It reads ``WORKLOAD CONNECTIONS
SECONDS`` from each line of its input, and answers with a line of JSON.
"""

# ruff: noqa: S603, T201

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from embedding_server.backends.base import BackendOptions, load_backend
from embedding_server.commands.bench.workloads import build_workload
from embedding_server.engine.backend import Backend
from embedding_server.engine.batch import Batch, Encoding
from embedding_server.engine.tokenizer import Tokenizer
from embedding_server.machine import available_cores
from embedding_server.models.hub import locate
from embedding_server.models.layout import read_layout
from embedding_server.models.spec import parse_spec
from embedding_server.models.tokenizers import load_tokenizer

__all__ = ["Ceiling", "full_batches"]


class Ceiling:
    """The measuring process: started when made, idle between measurements."""

    def __init__(self, model: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), model],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for `compare`, which ends this process
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def measure(self, workload: str, *, connections: int, seconds: float) -> dict[str, float]:
        """``requests`` in ``seconds`` with ``cpu_seconds``, of pools of ``connections`` each."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{workload} {connections} {seconds}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("The engine's process ended; its error is above.")
        measured: dict[str, float] = json.loads(line)
        return measured


def full_batches(encodings: Sequence[Encoding], budget: int) -> list[Batch]:
    """Batches of near lengths, as few as ``budget`` tokens allow and about equally full.

    What waits in a server is no better packed at any time: all of a pool is known here at once.
    """
    tokens = sum(len(encoding.ids) for encoding in encodings)
    count = -(-tokens // budget)
    share = tokens / count
    batches: list[list[Encoding]] = [[]]
    used = filled = 0
    for encoding in sorted(encodings, key=lambda encoding: len(encoding.ids)):
        length = len(encoding.ids)
        full = used + length > budget or filled >= share * len(batches)
        if batches[-1] and full:
            batches.append([])
            used = 0
        batches[-1].append(encoding)
        used += length
        filled += length
    return [Batch.from_encodings(batch) for batch in batches]


def _pools(
    workload: str, connections: int, tokenizer: Tokenizer, budget: int
) -> list[tuple[int, list[Batch]]]:
    """Requests that are under way together, packed: how many, and their batches."""
    requests = iter(build_workload(workload).requests)
    pools = []
    while pool := list(itertools.islice(requests, connections)):
        encodings = tokenizer.encode([text for texts in pool for text in texts])
        pools.append((len(pool), full_batches(encodings, budget)))
    return pools


def _run(
    backend: Backend, cores: Executor, pools: Iterator[tuple[int, list[Batch]]], seconds: float
) -> Any:
    requests = 0
    started = time.perf_counter()
    cpu = time.process_time()
    while (elapsed := time.perf_counter() - started) < seconds:
        count, batches = next(pools)
        for _ in cores.map(backend.embed, batches):
            pass
        requests += count
    return {
        "requests": requests,
        "seconds": elapsed,
        "cpu_seconds": time.process_time() - cpu,
    }


def _main(model: str) -> None:
    """Answer measurements until the input ends."""
    located = locate(parse_spec(model))
    layout = read_layout(located.folder)
    backend = load_backend("onnx", layout.pipeline, BackendOptions(available_cores()))
    assert layout.max_tokens is not None
    tokenizer = load_tokenizer(
        layout.pipeline.transformer,
        layout.pipeline.config,
        max_tokens=layout.max_tokens,
        lowercase=layout.lowercase,
        exclude_prompt=layout.exclude_prompt,
        any_family=False,
    )
    cores = ThreadPoolExecutor(1 if backend.exclusive else available_cores())
    pools: dict[tuple[str, int], Iterator[tuple[int, list[Batch]]]] = {}
    for line in sys.stdin:
        workload, connections, seconds = line.split()
        key = (workload, int(connections))
        if key not in pools:
            packed = _pools(*key, tokenizer, backend.default_batch_tokens)
            pools[key] = itertools.cycle(packed)
        print(json.dumps(_run(backend, cores, pools[key], float(seconds))), flush=True)


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    _main(sys.argv[1])
