# SPDX-License-Identifier: MIT OR Apache-2.0
"""The ``bench engine`` command: the backend alone, beside the machine's peak."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from embedding_server.backends.base import BackendOptions, load_backend
from embedding_server.commands.bench.operations import ModelCost, useful_operations
from embedding_server.commands.bench.peak import machine_peak
from embedding_server.commands.bench.report import (
    environment,
    number,
    print_json,
    progress,
    significant,
)
from embedding_server.commands.bench.workloads import build_workload
from embedding_server.commands.tables import print_rows, print_table
from embedding_server.engine.backend import Backend
from embedding_server.engine.batch import Batch, Encoding, Entry
from embedding_server.engine.scheduler import Scheduler
from embedding_server.machine import available_cores
from embedding_server.models.catalog import DEFAULT_MODELS
from embedding_server.models.hub import locate
from embedding_server.models.layout import read_layout
from embedding_server.models.spec import parse_spec
from embedding_server.settings import Settings

__all__ = ["bench_engine"]

_TOKENS = 512
"""A budget besides the one in use, for figures that can be compared."""
_LENGTHS = (32, 128, 512)
_REQUESTS = 16
"""Requests of ``pair`` and ``query``, a batch each, as when one client asks."""
_MIXED_REQUESTS = 2
_SECONDS = 0.3
"""The least time that a shape is run in a round."""


@dataclass(slots=True)
class _Shape:
    name: str
    batches: Sequence[Batch]
    operations: int
    at_once: int
    """The batches that are computed at a time."""
    seconds: list[float] = field(default_factory=list)
    """The median of each round, for all batches."""


def bench_engine(settings: Settings, *, rounds: int, as_json: bool) -> int:
    """Measure the model of ``settings``, print the result, and return 0.

    Raises ModelError if it is not available or can't run, or if its sizes aren't known.
    """
    spec = parse_spec(
        settings.model[0] if settings.model else DEFAULT_MODELS[0], revision=settings.revision
    )
    located = locate(
        spec,
        models_dir=settings.load_models_from,
        token=settings.hub_token,
        onnx_file=settings.onnx_file,
    )
    layout = read_layout(located.folder)
    cost = ModelCost(layout)
    threads = settings.threads or available_cores()
    name = _backend_name(settings)
    options = BackendOptions(threads=threads, onnx_file=settings.onnx_file)
    backend = load_backend(name, layout.pipeline, options)
    budget = settings.max_batch_tokens or backend.default_batch_tokens
    at_once = 1 if backend.exclusive else threads
    shapes = list(_shapes(cost, backend, budget, at_once))
    with machine_peak(threads) as peak, ThreadPoolExecutor(at_once) as cores:
        peaks = []
        for round in range(1, rounds + 1):
            progress(f"engine, round {round} of {rounds}")
            peaks.append(peak.measure())
            for shape in shapes:
                shape.seconds.append(_measure(backend, cores, shape))
        progress("")
    gflops = max(peaks)
    figures = [_figures(shape, gflops) for shape in shapes]
    result = {
        "benchmark": "engine",
        **environment(),
        "model": spec.name,
        "backend": name,
        "threads": threads,
        "max_batch_tokens": budget,
        "rounds": rounds,
        "peak": {"gflops": significant(gflops), "source": peak.source},
        "shapes": [_rounded(shape) for shape in figures],
    }
    if not as_json:
        print_rows(
            [
                ("model", f"{spec.name} ({name})"),
                ("threads", str(threads)),
                ("tokens a batch", str(budget)),
                ("peak", f"{number(gflops)} GFLOP/s ({peak.source})"),
            ]
        )
        print_table(
            ("batch", "tokens", "at once", "ms", "tokens/s", "GFLOP/s useful", "of peak"),
            [_cells(shape) for shape in figures],
            left=1,
        )
    print_json(result)
    return 0


def _backend_name(settings: Settings) -> str:
    if settings.onnx_file is not None:
        return "onnx-file"
    return "torch" if settings.backend == "torch" else "onnx"


def _shapes(cost: ModelCost, backend: Backend, budget: int, at_once: int) -> Iterator[_Shape]:
    """Small requests as they come, batches of one length, and mixed lengths as they are served."""

    def shape(name: str, batches: Sequence[Sequence[Encoding]], at_once: int) -> _Shape:
        lengths = [len(encoding.ids) for batch in batches for encoding in batch]
        operations = sum(useful_operations(cost.architecture, length) for length in lengths)
        packed = [Batch.from_encodings(batch) for batch in batches]
        return _Shape(name, packed, operations, at_once)

    for name in ("pair", "query"):
        requests = build_workload(name).requests[:_REQUESTS]
        yield shape(name, [cost.tokenizer.encode(texts) for texts in requests], 1)
    texts = [text for texts in build_workload("chunks").requests for text in texts]
    mixed = cost.tokenizer.encode(texts)
    words = itertools.cycle([token for encoding in mixed for token in encoding.ids])
    longest = _longest(cost)
    for tokens in dict.fromkeys((_TOKENS, budget)):
        for length in dict.fromkeys(min(length, longest, tokens) for length in _LENGTHS):
            count = tokens // length
            batch = [Encoding(tuple(itertools.islice(words, length)), length) for _ in range(count)]
            yield shape(f"{count} of {length}", [batch] * at_once, at_once)
        some = mixed[: _MIXED_REQUESTS * 32]
        name = f"mixed, to {tokens}"
        yield shape(name, list(_scheduled(some, tokens, padded=backend.padded)), at_once)


def _scheduled(
    encodings: Sequence[Encoding], tokens: int, *, padded: bool
) -> Iterator[list[Encoding]]:
    """The batches that the server would make of ``encodings``."""
    scheduler = Scheduler(max_batch_tokens=tokens, padded=padded)
    scheduler.add([Entry("request", (place,), each) for place, each in enumerate(encodings)])
    while entries := scheduler.next_batch():
        yield [entry.encoding for entry in entries]


def _longest(cost: ModelCost) -> int:
    """Tokens of the longest sequence that the model has positions for."""
    positions = cost.architecture.positions
    if positions is None:
        return max(*_LENGTHS, cost.tokenizer.max_tokens)
    counted_from = 0 if positions.padding_idx is None else positions.padding_idx + 1
    return positions.rows - counted_from


def _measure(backend: Backend, cores: Executor, shape: _Shape) -> float:
    """Seconds for all batches of ``shape``, with ``shape.at_once`` at a time."""
    found: list[float] = []
    end = time.perf_counter() + _SECONDS
    while not found or time.perf_counter() < end:
        started = time.perf_counter()
        run = map if shape.at_once == 1 else cores.map
        for _ in run(backend.embed, shape.batches):
            pass
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def _figures(shape: _Shape, peak: float) -> dict[str, Any]:
    count = len(shape.batches)
    tokens = sum(batch.tokens for batch in shape.batches)
    seconds = min(shape.seconds)  # in the slower rounds, other programs ran
    gflops = shape.operations / seconds / 1e9
    return {
        "batch": shape.name,
        "batches": count,
        "tokens": tokens / count,
        "at_once": shape.at_once,
        "ms": seconds / count * shape.at_once * 1000,
        "tokens_per_second": tokens / seconds,
        "gflops_useful": gflops,
        "share_of_peak": gflops / peak,
    }


def _rounded(figures: Mapping[str, Any]) -> dict[str, object]:
    return {
        name: significant(value) if isinstance(value, float) else value
        for name, value in figures.items()
    }


def _cells(figures: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        figures["batch"],
        number(figures["tokens"]),
        str(figures["at_once"]),
        number(figures["ms"]),
        number(figures["tokens_per_second"]),
        number(figures["gflops_useful"]),
        number(figures["share_of_peak"], "%", scale=100),
    )
