# SPDX-License-Identifier: MIT OR Apache-2.0
"""A model's files, read or hashed; what can't be read is refused by its path."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from embedding_server.errors import ModelNotSupported

__all__ = ["names_in", "read_json", "read_object", "read_text", "sha256_of"]

_MAX_BYTES = 512 * 2**20
"""The largest tokenizer.json of any known model has 33 MB."""


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; raises ModelNotSupported, also for any other value."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ModelNotSupported(f"{path} does not hold a JSON object.")
    return value


def read_json(path: Path) -> Any:
    """The JSON value in ``path``; raises ModelNotSupported if there is none."""
    text = read_text(path)
    try:
        return json.loads(text)
    except RecursionError:
        raise ModelNotSupported(f"{path} can't be read: it is nested too deeply.") from None
    except ValueError as error:
        raise ModelNotSupported(f"{path} can't be read: {error}") from None


def read_text(path: Path) -> str:
    """The text in ``path``; raises ModelNotSupported if it is missing, huge or not UTF-8."""
    try:
        if (size := path.stat().st_size) > _MAX_BYTES:
            raise ModelNotSupported(f"{path} has {size} bytes, too many for such a file.")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ModelNotSupported(f"{path} is missing.") from None
    except (ValueError, OSError) as error:
        raise ModelNotSupported(f"{path} can't be read: {error}") from None


def sha256_of(path: Path) -> str:
    """The file's SHA-256 in hex; raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def names_in(folder: Path) -> set[str]:
    """The paths of all files below ``folder``, relative to it; broken links don't count."""
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
