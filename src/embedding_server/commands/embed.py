# SPDX-License-Identifier: MIT OR Apache-2.0
"""The ``embed`` command: texts from files to vectors in files, without a server."""

from __future__ import annotations

import argparse
import signal
import sys

from embedding_server.commands.options import add_settings, positive
from embedding_server.engine.parameters import EmbedParams, ParameterRow, parameter_rows
from embedding_server.errors import ConfigurationError
from embedding_server.settings import Settings

__all__ = ["add_options", "run"]

_RAY_OPTIONS = ("address", "actors", "gpus")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``embed``."""
    parser.description = (
        "Embed a text a line, or a field of JSON lines, in order, without a server.\n\n"
        "  embedding-server embed --model all-MiniLM-L6-v2 texts.txt -o vectors.npy\n"
        "  embedding-server embed --model all-MiniLM-L6-v2 --field text < rows.jsonl\n"
    )
    parser.add_argument(
        "files",
        nargs="*",
        default=["-"],
        metavar="FILE",
        help="files to read; - or none for standard input",
    )
    parser.add_argument(
        "-o",
        "--output",
        default="-",
        metavar="FILE",
        help="FILE.jsonl, FILE.npy or FILE.parquet; - (default) for JSON lines to standard output",
    )
    parser.add_argument(
        "--field", help="the input is JSON lines; embed the string under this key of each"
    )
    for row in _parameters():
        flag = "--" + row.name.replace("_", "-")
        if row.type is bool:
            default = "on" if row.default else "off"
            parser.add_argument(
                flag,
                action=argparse.BooleanOptionalAction,
                default=row.default,
                help=f"{row.help} (default: {default})",
            )
        else:
            parser.add_argument(flag, type=row.type, default=row.default, help=row.help)
    _add_ray(parser)
    add_settings(parser, "embed")


def _add_ray(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "Ray",
        "With --ray, FILE is a .parquet file or a folder of them, --field its column, and\n"
        "--output a folder of .parquet files with all columns and 'embedding'. A run that was\n"
        "interrupted continues when it is started again with the same options.",
    )
    group.add_argument(
        "--ray", action="store_true", help="embed on a cluster (needs the extra [ray])"
    )
    group.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="the cluster's address, as host:6379; without it and RAY_ADDRESS, the cluster that "
        "runs on this machine, or else a new one for this run",
    )
    group.add_argument(
        "--ray-actors",
        type=positive(int, 100_000),
        metavar="N",
        help="processes with the model, each of --threads cores (default: as many as the cluster "
        "has room for, each with a whole node, or with its part of one by --ray-gpus)",
    )
    group.add_argument(
        "--ray-gpus",
        type=positive(float, 1000),
        metavar="N",
        help="GPUs for each process, as 1 or 0.25 (default: none)",
    )


def _parameters() -> list[ParameterRow]:
    """The options of a request that are flags of ``embed``: its files hold float32 values only."""
    return [row for row in parameter_rows() if row.name != "output_dtype"]


def run(settings: Settings, arguments: argparse.Namespace) -> int:
    """Embed every text of the files; returns the exit code.

    Raises BadLine, naming file and line, for a text that can't be embedded; the output file is
    then unchanged.
    """
    from embedding_server.corpus.options import CorpusOptions

    # SystemExit instead of a sudden end: no incomplete output may stay.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    if len(settings.model) != 1:
        raise ConfigurationError("embed needs exactly one --model, as --model all-MiniLM-L6-v2.")
    options = CorpusOptions(
        files=arguments.files,
        output=arguments.output,
        field=arguments.field,
        params=EmbedParams(**{row.name: getattr(arguments, row.name) for row in _parameters()}),
    )
    cluster = {name: getattr(arguments, f"ray_{name}") for name in _RAY_OPTIONS}
    cluster = {name: value for name, value in cluster.items() if value is not None}
    if arguments.ray:
        from embedding_server.ray.corpus import ClusterOptions, embed_on_ray

        return embed_on_ray(settings, options, ClusterOptions(**cluster))
    if cluster:
        raise ConfigurationError(f"--ray-{next(iter(cluster))} needs --ray.")
    from embedding_server.corpus.files import embed_files

    return embed_files(settings, options)
