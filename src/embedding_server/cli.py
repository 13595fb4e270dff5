# SPDX-License-Identifier: MIT OR Apache-2.0
"""The command line: ``embedding-server serve | models | embed | bench | health``."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from embedding_server import __version__
from embedding_server.commands.argv import hide_secrets
from embedding_server.errors import EmbeddingServerError

# All else is imported on use: secrets must leave the command line, and --help show, at once.

__all__ = ["build_parser", "main"]

logger = logging.getLogger(__name__)

_DESCRIPTION = """\
Turns text into sentence embeddings: exact to sentence-transformers, without torch.

  embedding-server serve                            serve on http://127.0.0.1:5000
  embedding-server serve --model all-MiniLM-L6-v2   serve one model
  embedding-server embed --model all-MiniLM-L6-v2 texts.txt -o vectors.npy
  embedding-server models list                      the models that 'serve' would serve
  embedding-server models verify all-MiniLM-L6-v2   compare with sentence-transformers
  embedding-server bench                            measure the speed on this machine
"""


@dataclass(frozen=True, slots=True)
class _Command:
    """A command: its ``module`` has ``add_options(parser)`` and ``run(settings, arguments)``."""

    module: str
    help: str


_COMMANDS = {
    "serve": _Command("embedding_server.commands.serve", "answer HTTP requests"),
    "models": _Command("embedding_server.commands.models", "list, show, save or verify models"),
    "embed": _Command(
        "embedding_server.commands.embed", "embed files or standard input, without a server"
    ),
    "bench": _Command(
        "embedding_server.commands.bench.command", "measure a server, or a model alone"
    ),
    "health": _Command(
        "embedding_server.commands.health", "ask a server on this machine whether it is ready"
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 after an error, 2 after a wrong usage."""
    try:
        if arguments is None:
            hide_secrets()
            arguments = sys.argv[1:]
            # In this program only, not where it is a library: the threads of tokenizers take a
            # third more CPU time for small requests, and cores from inference.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        return _run(arguments)
    except EmbeddingServerError as error:
        message = str(error)
    except OSError as error:  # a full disk, or a file without permission
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    except KeyboardInterrupt:
        return 130
    print(f"embedding-server: {message}", file=sys.stderr)  # noqa: T201
    return 1


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser of the whole command line, or with the options of ``command`` only."""
    parser = argparse.ArgumentParser(
        prog="embedding-server",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"embedding-server {__version__}")
    commands = parser.add_subparsers(dest="command", metavar=" | ".join(_COMMANDS))
    for name, row in _COMMANDS.items():
        single = commands.add_parser(
            name,
            help=row.help,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if command in (None, name):
            import_module(row.module).add_options(single)
    return parser


def _run(words: Sequence[str]) -> int:
    command = next((word for word in words if not word.startswith("-")), "")
    parser = build_parser(command)
    arguments, unknown = parser.parse_known_args(words)
    if unknown:
        parser.error(f"unrecognized arguments: {_without_values(unknown)}")
    if arguments.command is None:
        parser.print_help()
        return 2

    from embedding_server.commands.options import given_settings
    from embedding_server.logs import set_up_logging
    from embedding_server.settings import load_settings, unknown_variables

    settings = load_settings(given_settings(arguments), arguments.config)
    set_up_logging(settings.log_format, settings.log_level)
    for name in unknown_variables():
        logger.warning("%s is set, but there is no such setting", name)
    code: int = import_module(_COMMANDS[command].module).run(settings, arguments)
    return code


def _without_values(words: Sequence[str]) -> str:
    """Unknown ``words`` as an error may show them: one may be the key of a mistyped --apikey."""
    return " ".join(word.partition("=")[0] if word[:1] == "-" else "…" for word in words)


if __name__ == "__main__":
    sys.exit(main())
