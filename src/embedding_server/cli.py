# SPDX-License-Identifier: MIT OR Apache-2.0
"""The command line: ``embedding-server serve | models | embed | bench | health``."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from embedding_server import __version__
from embedding_server.commands.argv import hide_secrets
from embedding_server.errors import ConfigurationError, EmbeddingServerError

if TYPE_CHECKING:  # it takes longer to import than secrets may stand in the command line
    from embedding_server.settings import Row, Settings

__all__ = ["build_parser", "main"]

logger = logging.getLogger(__name__)

Number = TypeVar("Number", int, float)

_DESCRIPTION = """\
Turns text into sentence embeddings: exact to sentence-transformers, without torch.

  embedding-server serve                            serve on http://127.0.0.1:5000
  embedding-server serve --model all-MiniLM-L6-v2   one model
  embedding-server embed --model all-MiniLM-L6-v2 texts.txt -o vectors.npy
  embedding-server models list                      what there is, and where
  embedding-server models verify all-MiniLM-L6-v2   compare with sentence-transformers
  embedding-server bench                            how fast it is on this machine
"""

_BENCH_DESCRIPTION = """\
Measure a server under load from this process: one started for it, or the one at --url; without
--model its first, or all-MiniLM-L6-v2. Ends with 1 if a request failed.

  embedding-server bench                          one sentence a request, 64 connections
  embedding-server bench --workload chunks        32 texts a request, 8 to 280 words each
  embedding-server bench --rate 50                latency at 50 requests a second
  embedding-server bench --url http://host:5000   a server that runs already
  embedding-server bench --workload mixed         queries beside a large job: what each loses
  embedding-server bench --json | jq .requests_per_second
  embedding-server bench engine                   the model alone, beside the machine's peak
"""

_BENCH_ENGINE_DESCRIPTION = """\
Measure the backend alone, in this process: tokens and useful floating-point operations a second
for batches of several shapes, as a share of what the machine can do at all.

  embedding-server bench engine
  embedding-server bench engine --threads 1 --max-batch-tokens 1024
"""

_WORKLOADS = {
    "pair": "two words, each an input (64 connections)",
    "query": "one sentence (64)",
    "uniform": "32 texts of 24 words (8)",
    "chunks": "32 texts of 8 to 280 words (4)",
    "bulk": "2,048 texts of 8 to 120 words (1)",
    "mixed": "queries at a fixed rate, an endless bulk job, and both, in three rounds",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 for what went wrong, 2 for a wrong usage."""
    try:
        if arguments is None:
            hide_secrets()
            # In this program only, not where it is a library: the threads of tokenizers take a
            # third more CPU time for small requests, and cores from inference.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        parser = build_parser()
        parsed, unknown = parser.parse_known_args(arguments)
        if unknown:
            parser.error(f"unrecognized arguments: {_without_values(unknown)}")
        options = vars(parsed)
        command = options.pop("command")
        if command is None:
            parser.print_help()
            return 2
        return _run(command, options)
    except EmbeddingServerError as error:
        print(f"embedding-server: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except OSError as error:  # a full disk, a file that may not be read
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        print(f"embedding-server: {what}", file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        return 130


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; every setting's flag comes from its row."""
    parser = argparse.ArgumentParser(
        prog="embedding-server",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"embedding-server {__version__}")
    commands = parser.add_subparsers(
        dest="command", metavar="serve | models | embed | bench | health"
    )
    serve = commands.add_parser(
        "serve",
        help="answer HTTP requests",
        description="Answer HTTP requests.",
        allow_abbrev=False,
    )
    _add_settings(serve, "serve")
    models = commands.add_parser(
        "models",
        help="list models, show, save or verify one",
        description="What can be served.",
        allow_abbrev=False,
    )
    actions = models.add_subparsers(
        dest="action", metavar="list | info | pull | verify", required=True
    )
    listing = actions.add_parser(
        "list",
        help="what would be served, where it is, and its size",
        description="What would be served, where it is, and its size.",
        allow_abbrev=False,
    )
    listing.add_argument("--json", action="store_true", help="one JSON object a line")
    _add_settings(listing, "list")
    for action, help in (
        ("info", "what a model is, and which backend computes it and why"),
        (
            "verify",
            "compare a model's vectors with sentence-transformers' own (needs the extra [torch]); "
            "exits with 1 past an error of 1e-5, with 2 if they can't be compared",
        ),
    ):
        single = actions.add_parser(
            action, help=help, description=f"{help[0].upper()}{help[1:]}.", allow_abbrev=False
        )
        single.add_argument(
            "name", help="a catalog name, a hub id with optional @revision, or a folder"
        )
        if action == "verify":
            single.add_argument(
                "--write", type=Path, metavar="DIR",
                help="if the model is exact, write some of sentence-transformers' vectors to "
                "DIR/reference_vectors.npz; a model's folder with that file is checked against it "
                "at each start",
            )  # fmt: skip
        _add_settings(single, action)
    pulling = actions.add_parser(
        "pull",
        help="save models in the hub's layout",
        description="Save models in the hub's layout, whole and byte for byte.",
        allow_abbrev=False,
    )
    pulling.add_argument(
        "name", nargs="+", help="a catalog name, a hub id with optional @revision, or a folder"
    )
    pulling.add_argument(
        "--to", required=True, type=Path, metavar="DIR", help="where to: DIR/<name>"
    )
    _add_settings(pulling, "pull")
    embed = commands.add_parser(
        "embed",
        help="embed files or standard input, without a server",
        description="Embed a text a line, or a field of JSON lines, in order.",
        allow_abbrev=False,
    )
    embed.add_argument(
        "files",
        nargs="*",
        default=["-"],
        metavar="FILE",
        help="files to read; - or none for standard input",
    )
    embed.add_argument(
        "-o", "--output", default="-", metavar="FILE",
        help="FILE.jsonl, FILE.npy or FILE.parquet; - (default) for JSON lines to standard output",
    )  # fmt: skip
    embed.add_argument(
        "--field", help="the input is JSON lines; embed the string under this key of each"
    )
    embed.add_argument("--dimensions", type=int, help="cut each vector to that many values")
    embed.add_argument("--input-type", help="query, document, or a prompt's name")
    embed.add_argument("--prompt", help="text to prepend to every input")
    embed.add_argument(
        "--truncate", action=argparse.BooleanOptionalAction, default=True,
        help="cut over-long texts (default), or stop at the first",
    )  # fmt: skip
    embed.add_argument(
        "--normalize", action=argparse.BooleanOptionalAction, default=True,
        help="scale vectors to length 1 (default), or leave the model's own output",
    )  # fmt: skip
    _add_ray(embed)
    _add_settings(embed, "embed")
    _add_bench(
        commands.add_parser(
            "bench",
            help="measure a server, or the model alone",
            description=_BENCH_DESCRIPTION,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
    )
    health = commands.add_parser(
        "health",
        help="ask a server on this machine whether it is ready",
        description="Ask a server on this machine whether it is ready; exits with 0 if it is. "
        "It is found by the same settings that it was started with.",
        allow_abbrev=False,
    )
    _add_settings(health, "health")
    return parser


def _add_ray(embed: argparse.ArgumentParser) -> None:
    group = embed.add_argument_group(
        "Ray",
        "With --ray, FILE is a .parquet file or a folder of them, --field its column, and --output "
        "a folder of .parquet files with all columns and 'embedding'. What was killed goes on when "
        "it is run again with the same options.",
    )
    group.add_argument(
        "--ray", action="store_true", help="embed on a cluster (needs the extra [ray])"
    )
    group.add_argument(
        "--ray-address", default=argparse.SUPPRESS, metavar="ADDRESS",
        help="the cluster's, as host:6379; without it and RAY_ADDRESS, the one that was started on "
        "this machine, or else one for this run",
    )  # fmt: skip
    group.add_argument(
        "--ray-actors", type=_positive(int, 100_000), default=argparse.SUPPRESS, metavar="N",
        help="processes with the model, of --threads cores each (default: as many as there is room "
        "for, each with a whole node, or with its part of one by --ray-gpus)",
    )  # fmt: skip
    group.add_argument(
        "--ray-gpus", type=_positive(float, 1000), default=argparse.SUPPRESS, metavar="N",
        help="GPUs for each of them, as 1 or 0.25 (default: none)",
    )  # fmt: skip


def _add_bench(bench: argparse.ArgumentParser) -> None:
    told = "; ".join(f"{name}: {what}" for name, what in _WORKLOADS.items())
    bench.add_argument(
        "--workload", choices=tuple(_WORKLOADS), default=argparse.SUPPRESS,
        help=f"what is sent, texts from the standard library's docstrings; {told} "
        "(default: query)",
    )  # fmt: skip
    bench.add_argument(
        "--url",
        default=argparse.SUPPRESS,
        help="measure the server there, as http://host:port; any with /v1/embeddings",
    )
    bench.add_argument(
        "--connections", type=_positive(int, 1000), default=argparse.SUPPRESS, metavar="N",
        help="keep-alive connections (default: the workload's, above)",
    )  # fmt: skip
    bench.add_argument(
        "--duration", type=_positive(float, 86_400), default=argparse.SUPPRESS,
        metavar="SECONDS",
        help="how long requests are sent, in 'mixed' in each phase (default: 10)",
    )  # fmt: skip
    bench.add_argument(
        "--rate", type=_positive(float, 100_000), default=argparse.SUPPRESS, metavar="N",
        help="send N requests a second at even times, and count latency from when each was due; "
        "without it each connection sends as fast as it is answered ('mixed': 10)",
    )  # fmt: skip
    bench.add_argument("--json", action="store_true", help="print the line of JSON only")
    _add_settings(bench, "serve", without=("host", "port"))
    kinds = bench.add_subparsers(dest="kind", metavar="[engine]")
    engine = kinds.add_parser(
        "engine",
        help="the backend alone, and the machine's peak",
        description=_BENCH_ENGINE_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    engine.add_argument(
        "--rounds", type=_positive(int, 1000), default=5, metavar="N",
        help="how often each shape is measured, in turn; the best counts (default: 5)",
    )  # fmt: skip
    engine.add_argument(
        "--json", action="store_true", default=argparse.SUPPRESS,
        help="print the line of JSON only",
    )  # fmt: skip
    _add_settings(engine, "embed", without=("matryoshka",))


def _without_values(arguments: Sequence[str]) -> str:
    """``arguments`` that nobody knows, as they may be told: one may be the key of an --apikey."""
    return " ".join(word.partition("=")[0] if word[:1] == "-" else "…" for word in arguments)


def _positive(kind: type[Number], most: Number) -> Callable[[str], Number]:
    """Reads a number over 0 and up to ``most``."""

    def number(text: str) -> Number:
        value = kind(text)
        if not 0 < value <= most:  # not a number isn't, either
            raise argparse.ArgumentTypeError(f"{text} is not over 0 and at most {most}")
        return value

    return number


def _add_settings(
    parser: argparse.ArgumentParser, command: str, *, without: Sequence[str] = ()
) -> None:
    from embedding_server.settings import ENV_PREFIX, rows

    group = parser.add_argument_group(
        "settings",
        f"Every setting is also an environment variable ({ENV_PREFIX}PORT=5000) and a key of a "
        "TOML file given with --config (port = 5000). A flag wins over the environment, which wins "
        "over the file.",
    )
    group.add_argument(
        "--config", type=Path, metavar="FILE", help=f"TOML file of settings [{ENV_PREFIX}CONFIG]"
    )
    for row in rows():
        if command in row.commands and row.name not in without:
            _add_flag(group, row)


def _add_flag(group: argparse._ArgumentGroup, row: Row) -> None:
    default = "" if row.default in (None, ()) else f" (default: {row.default})"
    help = f"{row.help}{default} [{row.env}]".replace("%", "%%")
    # Absent flags stay out of the way of the environment and the file.
    if row.kind == "switch":
        group.add_argument(
            row.flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=help
        )
        return
    group.add_argument(
        row.flag,
        action="append" if row.kind == "list" else "store",
        choices=row.choices,
        default=argparse.SUPPRESS,
        metavar=None if row.choices else row.name.upper(),
        help=help,
    )


def _run(command: str, options: dict[str, Any]) -> int:
    from embedding_server.settings import load_settings, rows, unknown_variables

    known = {row.name for row in rows()}
    flags = {name: options.pop(name) for name in list(options) if name in known}
    config = options.pop("config")
    settings = load_settings(flags, config)

    from embedding_server.logs import set_up_logging

    set_up_logging(settings.log_format, settings.log_level)
    for name in unknown_variables():
        logger.warning("%s is set, but there is no such setting", name)
    if command == "serve":
        from embedding_server.commands.serve import serve

        return serve(settings)
    if command == "embed":
        return _embed(settings, options)
    if command == "health":
        from embedding_server.commands.health import check_health

        return check_health(settings)
    if command == "bench":
        return _bench(settings, flags, config, options)
    from embedding_server.commands import models

    match options["action"]:
        case "list":
            return models.list_models(settings, as_json=options["json"])
        case "info":
            return models.show_model(settings, options["name"])
        case "verify":
            return models.verify_model(settings, options["name"], options["write"])
        case _:
            return models.pull_models(settings, options["name"], options["to"])


def _embed(settings: Settings, options: dict[str, Any]) -> int:
    from embedding_server.commands.embed import check_settings, embed_corpus
    from embedding_server.corpus.options import CorpusOptions
    from embedding_server.engine.parameters import EmbedParams

    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # leaving nothing half
    check_settings(settings)
    on_ray = options.pop("ray")
    names = ("address", "actors", "gpus")
    cluster = {name: options.pop(f"ray_{name}") for name in names if f"ray_{name}" in options}
    corpus = CorpusOptions(
        files=options.pop("files"),
        output=options.pop("output"),
        field=options.pop("field"),
        params=EmbedParams(**options),
    )
    if on_ray:
        from embedding_server.ray.corpus import ClusterOptions, embed_on_ray

        return embed_on_ray(settings, corpus, ClusterOptions(**cluster))
    if cluster:
        raise ConfigurationError(f"--ray-{next(iter(cluster))} needs --ray.")
    return embed_corpus(settings, corpus)


def _bench(
    settings: Settings, flags: dict[str, Any], config: Path | None, options: dict[str, Any]
) -> int:
    kind, as_json = options.pop("kind"), options.pop("json")
    if kind == "engine":
        from embedding_server.commands.bench.engine import bench_engine
        from embedding_server.settings import rows

        rounds = options.pop("rounds")
        only_server = {row.name for row in rows() if "embed" not in row.commands} & set(flags)
        if others := sorted({*options, *only_server}):
            told = ", ".join("--" + name.replace("_", "-") for name in others)
            raise ConfigurationError(f"'bench engine' needs no server and doesn't take {told}.")
        return bench_engine(settings, rounds=rounds, as_json=as_json)
    from embedding_server.commands.bench.command import ServerBench, bench_server

    return bench_server(settings, flags, config, ServerBench(**options, as_json=as_json))


if __name__ == "__main__":
    sys.exit(main())
