# SPDX-License-Identifier: MIT OR Apache-2.0
"""Tables for people, and one line of JSON for programs."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from embedding_server import __version__
from embedding_server.machine import available_cores

__all__ = [
    "environment",
    "number",
    "print_json",
    "progress",
    "significant",
]


def environment() -> dict[str, object]:
    """What a figure depends on beside the code: versions and the machine."""
    try:
        runtime = version("onnxruntime")
    except PackageNotFoundError:  # a build of it under another name
        runtime = None
    return {
        "version": __version__,
        "python": platform.python_version(),
        "onnxruntime": runtime,
        "machine": {
            "cpu": _processor(),
            "cores": available_cores(),
            "system": f"{platform.system()} {platform.machine()}",
        },
    }


def print_json(result: Mapping[str, object]) -> None:
    """One line."""
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()


def number(value: float | None, unit: str = "", *, scale: float = 1.0) -> str:
    """Three digits or all before the point, and ``-`` for what isn't known."""
    if value is None:
        return "-"
    scaled = value * scale
    digits = 0 if abs(scaled) >= 100 else 1 if abs(scaled) >= 10 else 2
    return f"{scaled:,.{digits}f} {unit}".rstrip()


def significant(value: float | None) -> float | None:
    """Four digits: more would claim more than was measured."""
    return None if value is None else float(f"{value:.4g}")


def progress(text: str) -> None:
    """Show ``text`` in place of the last one, if anybody is looking; an empty one clears."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model name"):
                return value.strip()
    return platform.processor() or platform.machine()
