# SPDX-License-Identifier: MIT OR Apache-2.0
"""The ``bench`` command: a server under load, or with ``bench engine`` a model alone."""

from __future__ import annotations

import argparse

from embedding_server.commands.bench.workloads import MIXED, WORKLOADS
from embedding_server.commands.options import add_settings, positive
from embedding_server.errors import ConfigurationError
from embedding_server.settings import Settings, rows

__all__ = ["add_options", "run"]

_DESCRIPTION = """\
Measure a server under load from this process: a new one, or the one at --url. Without --model
its first model is measured, of a new one all-MiniLM-L6-v2. Exits with 1 if a request failed.

  embedding-server bench                          one sentence a request, 64 connections
  embedding-server bench --workload chunks        32 texts a request, 8 to 280 words each
  embedding-server bench --rate 50                latency at 50 requests a second
  embedding-server bench --url http://host:5000   a server that is running
  embedding-server bench --workload mixed         queries beside a large job: what each loses
  embedding-server bench --json | jq .requests_per_second
  embedding-server bench engine                   the model alone, beside the machine's peak
"""

_ENGINE_DESCRIPTION = """\
Measure the backend alone, in this process: tokens and useful floating-point operations a second
for batches of several shapes, as a share of the machine's peak.

  embedding-server bench engine
  embedding-server bench engine --threads 1 --max-batch-tokens 1024
"""

_SERVER_OPTIONS = ("workload", "url", "connections", "duration", "rate")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``bench`` and the command ``bench engine``."""
    parser.description = _DESCRIPTION
    workloads = "; ".join(
        f"{name}: {row.help} ({row.connections})" for name, row in WORKLOADS.items()
    )
    parser.add_argument(
        "--workload",
        choices=[*WORKLOADS, MIXED],
        help=f"the requests to send, of texts from the standard library's docstrings; {workloads}; "
        f"{MIXED}: queries at a fixed rate, an endless bulk job, and both, in three rounds (64) "
        "(default: query)",
    )
    parser.add_argument(
        "--url", help="measure the server there, as http://host:port; any with /v1/embeddings"
    )
    parser.add_argument(
        "--connections",
        type=positive(int, 1000),
        metavar="N",
        help="keep-alive connections (default: the number in brackets above)",
    )
    parser.add_argument(
        "--duration",
        type=positive(float, 86_400),
        metavar="SECONDS",
        help="how long requests are sent, in 'mixed' in each phase (default: 10)",
    )
    parser.add_argument(
        "--rate",
        type=positive(float, 100_000),
        metavar="N",
        help="send N requests a second at even times, and count latency from when each was due; "
        "without it each connection sends its next request when the last is answered ('mixed': "
        "10)",
    )
    parser.add_argument("--json", action="store_true", help="print the line of JSON only")
    add_settings(parser, "serve", without=("host", "port"))

    kinds = parser.add_subparsers(dest="kind", metavar="[engine]")
    engine = kinds.add_parser(
        "engine",
        help="the backend alone, and the machine's peak",
        description=_ENGINE_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    engine.add_argument(
        "--rounds",
        type=positive(int, 1000),
        default=5,
        metavar="N",
        help="how often each shape is measured, in turn; the best counts (default: 5)",
    )
    engine.add_argument(
        "--json",
        action="store_true",
        default=argparse.SUPPRESS,  # else its False would replace that of 'bench --json engine'
        help="print the line of JSON only",
    )
    add_settings(engine, "embed", without=("matryoshka",))


def run(settings: Settings, arguments: argparse.Namespace) -> int:
    """Measure, print the result, and return the exit code."""
    if len(settings.model) > 1:
        raise ConfigurationError("One model is measured at a time: give one --model.")
    if arguments.kind == "engine":
        from embedding_server.commands.bench.engine import bench_engine

        _refuse_server_options(arguments)
        return bench_engine(settings, rounds=arguments.rounds, as_json=arguments.json)

    from embedding_server.commands.bench.server import bench_server

    return bench_server(settings, arguments)


def _refuse_server_options(arguments: argparse.Namespace) -> None:
    refused = [name for name in _SERVER_OPTIONS if getattr(arguments, name) is not None]
    refused += [row.name for row in rows() if row.name in arguments and "embed" not in row.commands]
    if refused:
        flags = ", ".join("--" + name.replace("_", "-") for name in sorted(refused))
        raise ConfigurationError(f"'bench engine' needs no server and doesn't take {flags}.")
