# SPDX-License-Identifier: MIT OR Apache-2.0
"""Takes secrets out of the command line, which everyone on the machine can read with ``ps``.

It imports nothing heavy, so that they stand there for some hundredths of a second only.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from embedding_server.errors import ConfigurationError

__all__ = ["hide_secrets", "without_secrets"]

# By the flag: the variable that is the same setting, and the commands that take it.
_VARIABLES = {
    "--api-key": ("EMBEDDING_SERVER_API_KEY", ("serve", "bench")),
    "--hf-token": ("EMBEDDING_SERVER_HF_TOKEN", ("serve", "bench", "embed", "models")),
}


def hide_secrets() -> None:
    """Run this process's command again, as the same process, with its secrets in the environment.

    Does nothing without any, or where a command line isn't for all to see. Raises
    ConfigurationError as ``without_secrets`` does.
    """
    arguments = sys.argv[1:]
    kept, variables = without_secrets(arguments)
    before = sys.orig_argv[: len(sys.orig_argv) - len(arguments)]
    if not variables or sys.platform == "win32" or [*before, *arguments] != sys.orig_argv:
        return
    for name in list(os.environ):
        if name.upper() in variables:  # settings are found in small letters, too
            del os.environ[name]
    os.environ.update(variables)
    os.execv(sys.executable, [sys.executable, *before[1:], *kept])  # noqa: S606


def without_secrets(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """``arguments`` without the secrets that their command takes, and these as variables.

    What the command would refuse stays where it is. Raises ConfigurationError, which tells no key,
    for one that the variable can't hold.
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
        if flag not in _VARIABLES or command not in _VARIABLES[flag][1]:
            kept.append(word)
            continue
        if not equals:
            if not rest or (rest[0].startswith("-") and not rest[0][1:2].isdigit()):
                kept.append(word)
                continue
            value = rest.pop(0)
        if not value:
            return list(arguments), {}  # refused with a word on it
        found.setdefault(flag, []).append(value)
    if any("," in key or key != key.strip() for key in found.get("--api-key", ())):
        raise ConfigurationError(
            "--api-key: a key that has a comma, or a blank at an end, can't stand on the command "
            "line; write it into a file for --api-key-file."
        )
    variables = {
        _VARIABLES[flag][0]: ",".join(values) if flag == "--api-key" else values[-1]
        for flag, values in found.items()
    }
    return kept, variables
