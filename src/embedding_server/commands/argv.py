# SPDX-License-Identifier: MIT OR Apache-2.0
"""Takes secrets out of the command line, which everyone on the machine can read with ``ps``.

It imports nothing heavy, so that they are visible for some hundredths of a second only.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from embedding_server.errors import ConfigurationError

__all__ = ["hide_secrets", "without_secrets"]


@dataclass(frozen=True, slots=True)
class _Secret:
    """The variable of the same setting as a flag, and the commands that take the flag."""

    variable: str
    commands: tuple[str, ...]


_SECRETS = {
    "--api-key": _Secret("EMBEDDING_SERVER_API_KEY", ("serve", "bench")),
    "--hf-token": _Secret("EMBEDDING_SERVER_HF_TOKEN", ("serve", "bench", "embed", "models")),
}


def hide_secrets() -> None:
    """Run this command again in the same process, with its secrets in the environment.

    Does nothing if there are no secrets, or on Windows, where users can't read each other's
    command lines. Raises ConfigurationError as ``without_secrets`` does.
    """
    arguments = sys.argv[1:]
    kept, variables = without_secrets(arguments)
    before = sys.orig_argv[: len(sys.orig_argv) - len(arguments)]
    if not variables or sys.platform == "win32" or [*before, *arguments] != sys.orig_argv:
        return
    for name in list(os.environ):
        if name.upper() in variables:  # settings are also read from lower-case names
            del os.environ[name]
    os.environ.update(variables)
    os.execv(sys.executable, [sys.executable, *before[1:], *kept])  # noqa: S606


def without_secrets(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """``arguments`` without the secrets that their command takes, and the secrets as variables.

    An argument that the command would refuse is left in place. Raises ConfigurationError, without
    the key in its text, for a key that the variable can't hold.
    """
    command = next((word for word in arguments if not word.startswith("-")), "")
    kept: list[str] = []
    found: dict[str, list[str]] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        if word == "--":
            kept += [word, *rest]
            break
        if flag not in _SECRETS or command not in _SECRETS[flag].commands:
            kept.append(word)
            continue
        if not equals:
            if not rest or (rest[0].startswith("-") and not rest[0][1:2].isdigit()):
                kept.append(word)
                continue
            value = rest.pop(0)
        if not value:
            return list(arguments), {}  # the command refuses it and says why
        found.setdefault(flag, []).append(value)
    if any("," in key or key != key.strip() for key in found.get("--api-key", ())):
        raise ConfigurationError(
            "--api-key: a key with a comma, or with a space at its start or end, can't be given on "
            "the command line; write it into a file for --api-key-file."
        )
    variables = {
        _SECRETS[flag].variable: ",".join(values) if flag == "--api-key" else values[-1]
        for flag, values in found.items()
    }
    return kept, variables
