# SPDX-License-Identifier: MIT OR Apache-2.0
"""Measures this server against its peers, in turns; ``compare`` is its command."""

# ruff: noqa: S603, T201

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

import numpy as np
from ceiling import Ceiling
from load import LoadFailed, put_load, write_bodies, wrk_program
from report import (
    ENGINE,
    Comparison,
    Sample,
    WorkloadResult,
    replace_section,
    section,
    summary,
    svg,
    table,
)
from servers import KINDS, MODEL, Peers, Server, ServerFailed, running

import embedding_server
from embedding_server.backends.runtime import onnxruntime
from embedding_server.commands.bench.workloads import WORKLOADS, build_workload, request_bodies
from embedding_server.machine import available_cores

__all__ = ["run"]

_HERE = Path(__file__).resolve().parent
_ROOT = _HERE.parent
_PAGE = _ROOT / "docs" / "performance.md"
_PLOT = _ROOT / "docs" / "performance.svg"
_GOLDEN = _ROOT / "tests" / "data" / "all-MiniLM-L6-v2.npz"

_CONNECTIONS = {
    name: WORKLOADS[name].connections for name in ("pair", "query", "uniform", "chunks")
}
"""The workloads, and how many requests of each are under way at a time."""

_TOLERANCE = 1e-5
"""How far a value may be off sentence-transformers'."""

_PACKAGES = ("infinity-emb", "sentence-transformers", "torch", "optimum-onnx", "onnxruntime")


def run(description: str) -> int:
    """The whole command; the exit code is 1 for what went wrong, told on stderr."""
    try:
        _run(description)
    except (ServerFailed, LoadFailed, ValueError, OSError) as error:
        _tell(f"compare: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _run(description: str) -> None:
    options = _read_options(description)
    # Else a SIGTERM would leave the servers behind.
    signal.signal(signal.SIGTERM, _end)
    if options.read:
        parts = [json.loads(_last_line(file))["comparison"] for file in options.read]
        comparison = Comparison.merged([Comparison.from_json(part) for part in parts])
    else:
        comparison = _compare(options)
    if options.write:
        page = replace_section(_PAGE.read_text(encoding="utf-8"), section(comparison))
        _PAGE.write_text(page, encoding="utf-8")
        _PLOT.write_text(svg(comparison), encoding="utf-8")
        _tell(f"wrote {_PAGE} and {_PLOT}")
    print(table(comparison))
    print(json.dumps({"summary": summary(comparison), "comparison": comparison.to_json()}))


def _read_options(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--workload", action="append", choices=_CONNECTIONS, help="may be repeated; default: all"
    )
    parser.add_argument(
        "--only", action="append", choices=KINDS, help="a server; may be repeated; default: all"
    )
    parser.add_argument("--rounds", type=_positive, default=5, metavar="N", help="default: 5")
    parser.add_argument(
        "--seconds", type=_positive, default=6, metavar="S",
        help="how long each server is under load in a round; default: 6",
    )  # fmt: skip
    parser.add_argument(
        "--peers", type=Path, default=_HERE / ".venv", metavar="DIR",
        help="where benchmarks/setup-peers has installed them; default: benchmarks/.venv",
    )  # fmt: skip
    parser.add_argument(
        "--write", action="store_true", help="write docs/performance.md's section and its plot"
    )
    parser.add_argument(
        "--read", action="append", type=Path, metavar="FILE",
        help="measure nothing, but take the output of an earlier run; may be repeated",
    )  # fmt: skip
    return parser.parse_args()


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


def _compare(options: argparse.Namespace) -> Comparison:
    """Start everything, measure every workload, end everything."""
    wrk_program()
    peers = Peers(options.peers)
    kinds = [KINDS[name] for name in KINDS if name in (options.only or KINDS)]
    if any(kind.is_peer for kind in kinds) and not peers.onnx_model.is_dir():
        raise ServerFailed(
            f"The peers are not installed in {peers.folder}: run benchmarks/setup-peers, name "
            "their folder with --peers, or leave them out with --only embedding-server."
        )
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        _tell("starting " + ", ".join(kind.name for kind in kinds))
        servers = stack.enter_context(running(kinds, peers, folder))
        ceiling = stack.enter_context(Ceiling(MODEL))
        for server in servers:
            _check_vectors(server)
        tested = [
            _measure(name, servers, ceiling, folder, options)
            for name in options.workload or _CONNECTIONS
        ]
        return Comparison(
            date=datetime.datetime.now(datetime.UTC).date().isoformat(),
            machine=_machine(),
            versions=_versions(peers, servers),
            commands=[*(["benchmarks/setup-peers"] if len(kinds) > 1 else []), _command(options)],
            tested=tested,
        )


def _check_vectors(server: Server) -> None:
    """Nobody wins by wrong answers: raises ServerFailed past ``_TOLERANCE``."""
    with np.load(_GOLDEN) as data:
        texts, expected = [str(text) for text in data["texts"]], data["embeddings"]
    server.wake()
    # Empty texts are left out: not every server takes them, and no workload has any.
    asked = [(text, vector) for text, vector in zip(texts, expected, strict=True) if text.strip()]
    error = 0.0
    for part in range(0, len(asked), 32):
        chosen = asked[part : part + 32]
        vectors = np.array(server.embed([text for text, _ in chosen]), dtype=np.float32)
        error = max(error, float(np.abs(vectors - [vector for _, vector in chosen]).max()))
    server.sleep()
    _tell(f"{server.name}: {len(asked)} texts, at most {error:.1e} off sentence-transformers")
    if error > _TOLERANCE:
        raise ServerFailed(f"{server.name} gives vectors that are {error:.1e} off.")


def _measure(
    name: str,
    servers: Sequence[Server],
    ceiling: Ceiling,
    folder: Path,
    options: argparse.Namespace,
) -> WorkloadResult:
    """One workload, in rounds; who is first changes from round to round."""
    connections = _CONNECTIONS[name]
    workload = build_workload(name)
    bodies = folder / f"{name}.bodies"
    write_bodies(bodies, request_bodies(workload, MODEL))
    turns: list[Server | None] = [*servers, None]  # None is the engine alone
    samples: dict[str, list[Sample]] = {
        label: [] for label in (*(server.name for server in servers), ENGINE)
    }
    for number in range(options.rounds + 1):
        # Round 0 only warms up: first batches of a shape cost more.
        seconds = options.seconds if number else 1
        shift = number % len(turns)
        for server in turns[shift:] + turns[:shift]:
            if server is None:
                label = ENGINE
                found = ceiling.measure(name, connections=connections, seconds=seconds)
                sample = Sample(int(found["requests"]), found["seconds"], found["cpu_seconds"])
            else:
                label = server.name
                sample = _measure_server(server, bodies, connections, seconds)
            if number:
                samples[label].append(sample)
                _tell(f"{name}, round {number}: {label} {sample.rate:.2f} requests/s")
    return WorkloadResult(
        name=name,
        help=WORKLOADS[name].help,
        connections=connections,
        seconds=options.seconds,
        samples=samples,
        memory_mib={server.name: server.peak_memory() / 2**20 for server in servers},
    )


def _measure_server(server: Server, bodies: Path, connections: int, seconds: float) -> Sample:
    server.wake()
    try:
        before = server.cpu_seconds()
        load = put_load(server.url, bodies, connections=connections, seconds=seconds)
        cpu = server.cpu_seconds() - before
    except LoadFailed as error:
        raise server.failure(f"failed under load: {error}") from None
    finally:
        server.sleep()
    return Sample(
        requests=load.answers,
        seconds=load.seconds,
        cpu_seconds=cpu,
        p50_ms=load.p50_ms,
        p99_ms=load.p99_ms,
        load_cpu_seconds=load.cpu_seconds,
    )


def _machine() -> str:
    """The processor, how many of its cores may be used, and its widest vector unit."""
    model, flags = platform.processor() or platform.machine(), ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() == "flags":
                flags = value
    unit = next((name for name in ("avx512f", "avx2") if name in flags.split()), "")
    unit = {"avx512f": " with AVX-512", "avx2": " with AVX2"}.get(unit, "")
    return f"{available_cores()} cores of {model}{unit}"


def _versions(peers: Peers, servers: Sequence[Server]) -> dict[str, str]:
    """Of this server, and of what the peers run on."""
    own = {"embedding-server": embedding_server.__version__}
    own |= {"its ONNX Runtime": onnxruntime.__version__, "Python": platform.python_version()}
    if all(not server.kind.is_peer for server in servers):
        return own
    program = (
        "import importlib.metadata as m, json, sys;"
        "print(json.dumps({name: m.version(name) for name in sys.argv[1:]}))"
    )
    done = subprocess.run(
        [peers.python, "-c", program, *_PACKAGES], capture_output=True, text=True, check=True
    )
    return own | {f"the peers' {name}": value for name, value in json.loads(done.stdout).items()}


def _command(options: argparse.Namespace) -> str:
    """This call, without what changes nothing in the result."""
    words = ["benchmarks/compare"]
    words += [word for name in options.workload or () for word in ("--workload", name)]
    words += [word for name in options.only or () for word in ("--only", name)]
    words += ["--rounds", str(options.rounds), "--seconds", str(options.seconds)]
    return shlex.join(words)


def _last_line(file: Path) -> str:
    return file.read_text(encoding="utf-8").strip().splitlines()[-1]


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
