# SPDX-License-Identifier: MIT OR Apache-2.0
"""Prints tables for people on standard output."""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["print_rows", "print_table"]


def print_rows(rows: Sequence[tuple[str, str]]) -> None:
    """Print a label and a value on each line."""
    width = max(len(label) for label, _ in rows) + 1
    for label, value in rows:
        sys.stdout.write(f"{label:<{width}} {value}\n")


def print_table(heading: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> None:
    """Print columns below their heading; the first ``left`` are of words, the rest of numbers."""
    lines = [heading, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heading))]
    for line in lines:
        cells = [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        sys.stdout.write("  ".join(cells).rstrip() + "\n")
