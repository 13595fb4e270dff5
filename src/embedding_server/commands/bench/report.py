# SPDX-License-Identifier: MIT OR Apache-2.0
"""Figures for people and for programs, and the machine that they are of."""

from __future__ import annotations

import json
import platform
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from embedding_server import __version__
from embedding_server.machine import available_cores

__all__ = ["Outcome", "environment", "number", "print_json", "progress", "significant"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a benchmark of a server."""

    answered: int
    failures: Counter[str]
    """Requests that failed, by status."""
    first_failure: str | None
    """The server's reason for the first failure."""
    rows: list[tuple[str, str]]
    """The figures for people."""
    figures: dict[str, object]
    """The figures for programs."""


def environment() -> dict[str, object]:
    """The versions and the machine that a figure depends on."""
    try:
        runtime = version("onnxruntime")
    except PackageNotFoundError:  # a build under another name
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
    """Print one line of JSON."""
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()


def number(value: float | None, unit: str = "", *, scale: float = 1.0) -> str:
    """Three digits, or all before the point; ``-`` for an unknown value."""
    if value is None:
        return "-"
    scaled = value * scale
    digits = 0 if abs(scaled) >= 100 else 1 if abs(scaled) >= 10 else 2
    return f"{scaled:,.{digits}f} {unit}".rstrip()


def significant(value: float | None) -> float | None:
    """Four digits: measurements are no more exact."""
    return None if value is None else float(f"{value:.4g}")


def progress(text: str) -> None:
    """Replace the line of progress on a terminal; an empty ``text`` clears it."""
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
