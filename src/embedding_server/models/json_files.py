"""A model's JSON files, or a refusal that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from embedding_server.errors import ModelNotSupported

__all__ = ["read_json", "read_object"]


def read_object(path: Path) -> dict[str, Any]:
    """The object in ``path``; raises ModelNotSupported, also for any other value."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ModelNotSupported(f"{path} does not hold a JSON object.")
    return value


def read_json(path: Path) -> Any:
    """The value in ``path``; raises ModelNotSupported if there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelNotSupported(f"{path} is missing.") from None
    except (ValueError, OSError) as error:
        raise ModelNotSupported(f"{path} can't be read: {error}") from None
