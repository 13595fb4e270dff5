# SPDX-License-Identifier: MIT OR Apache-2.0
"""A model's JSON files, or a refusal that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from embedding_server.errors import ModelNotSupported

__all__ = ["read_json", "read_object", "read_text"]

_MOST_BYTES = 512 * 2**20
"""The largest tokenizer.json of any known model has 33 MB."""


def read_object(path: Path) -> dict[str, Any]:
    """The object in ``path``; raises ModelNotSupported, also for any other value."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ModelNotSupported(f"{path} does not hold a JSON object.")
    return value


def read_json(path: Path) -> Any:
    """The value in ``path``; raises ModelNotSupported if there is none."""
    text = read_text(path)
    try:
        return json.loads(text)
    except RecursionError:
        raise ModelNotSupported(f"{path} can't be read: it is nested too deeply.") from None
    except ValueError as error:
        raise ModelNotSupported(f"{path} can't be read: {error}") from None


def read_text(path: Path) -> str:
    """All of ``path``; raises ModelNotSupported if it is missing, huge or not UTF-8."""
    try:
        if (size := path.stat().st_size) > _MOST_BYTES:
            raise ModelNotSupported(f"{path} has {size} bytes, too many for what it should be.")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ModelNotSupported(f"{path} is missing.") from None
    except (ValueError, OSError) as error:
        raise ModelNotSupported(f"{path} can't be read: {error}") from None
