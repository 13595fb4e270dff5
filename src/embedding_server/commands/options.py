# SPDX-License-Identifier: MIT OR Apache-2.0
"""Options that several commands share: the flag of every setting, and numbers above 0."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from embedding_server.settings import ENV_PREFIX, Row, rows

__all__ = ["MODEL_NAME", "add_settings", "given_settings", "positive"]

MODEL_NAME = "a catalog name, a hub id with optional @revision, or a folder"

Number = TypeVar("Number", int, float)


def add_settings(
    parser: argparse.ArgumentParser, command: str, *, without: Sequence[str] = ()
) -> None:
    """Add --config and the flag of every setting of ``command``, but for those in ``without``."""
    group = parser.add_argument_group(
        "settings",
        f"Every setting is also an environment variable ({ENV_PREFIX}PORT=5000) and a key of the\n"
        "TOML file that --config names (port = 5000). A flag wins over the environment, which\n"
        "wins over the file.",
    )
    group.add_argument(
        "--config", type=Path, metavar="FILE", help=f"TOML file of settings [{ENV_PREFIX}CONFIG]"
    )
    for row in rows():
        if command in row.commands and row.name not in without:
            _add_flag(group, row)


def given_settings(arguments: argparse.Namespace) -> dict[str, object]:
    """The settings that were given as flags, by their names."""
    return {row.name: getattr(arguments, row.name) for row in rows() if row.name in arguments}


def positive(kind: type[Number], most: Number) -> Callable[[str], Number]:
    """A ``type`` for argparse: a number above 0 and up to ``most``."""

    def number(text: str) -> Number:
        value = kind(text)
        if not 0 < value <= most:  # also true of NaN
            raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most {most}")
        return value

    return number


def _add_flag(group: argparse._ArgumentGroup, row: Row) -> None:
    default = "" if row.default in (None, ()) else f" (default: {row.default})"
    help = f"{row.help}{default} [{row.env}]".replace("%", "%%")
    # SUPPRESS: an absent flag must not hide the environment and the file.
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
