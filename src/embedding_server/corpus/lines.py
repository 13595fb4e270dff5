# SPDX-License-Identifier: MIT OR Apache-2.0
"""Reads texts from files: a text a line, or a field of JSON lines."""

from __future__ import annotations

import codecs
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import orjson

from embedding_server.errors import ConfigurationError, EmbeddingServerError

__all__ = ["BadLine", "Line", "check_readable", "read_lines"]


class BadLine(EmbeddingServerError):
    """A line that can't be read or embedded."""


@dataclass(frozen=True, slots=True)
class Line:
    """One text and its place: lines of a file count from 1, rows of a table from 0."""

    file: str
    number: int
    text: str
    unit: str = "line"

    @property
    def place(self) -> str:
        return f"{self.file}, {self.unit} {self.number}"

    def error(self, reason: str) -> BadLine:
        return BadLine(f"{self.place}: {reason}")


def check_readable(files: Sequence[str]) -> None:
    """Raise ConfigurationError before a model is loaded, rather than at the last of many files."""
    for file in files:
        if Path(file).suffix == ".parquet":
            raise ConfigurationError(f"{file}: Parquet is read with --ray only (extra [ray]).")
        if file != "-" and (Path(file).is_dir() or not os.access(file, os.R_OK)):
            raise ConfigurationError(f"{file} is no file that exists and can be read.")


def read_lines(files: Sequence[str], field: str | None) -> Iterator[Line]:
    """Every line of ``files``, in order; raises BadLine for one that can't be read."""
    for file in files:
        name = "standard input" if file == "-" else file
        with contextlib.ExitStack() as stack:
            stream = sys.stdin.buffer if file == "-" else stack.enter_context(Path(file).open("rb"))
            for number, raw in enumerate(stream, start=1):
                yield _read_line(Line(name, number, ""), raw, field)


def _read_line(line: Line, raw: bytes, field: str | None) -> Line:
    if line.number == 1:
        raw = raw.removeprefix(codecs.BOM_UTF8)  # which editors on Windows write
    try:
        text = raw.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise line.error(f"not UTF-8 at byte {error.start}; convert the file first") from None
    if field is None:
        return replace(line, text=text)
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise line.error(f"not JSON ({error})") from None
    if not isinstance(value, dict) or not isinstance(value.get(field), str):
        raise line.error(f"not an object with a string under {field!r}")
    return replace(line, text=value[field])
