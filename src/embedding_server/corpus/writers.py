# SPDX-License-Identifier: MIT OR Apache-2.0
"""Writes vectors as JSON lines, .npy or Parquet; a file appears only when it is complete."""

from __future__ import annotations

import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import orjson
from numpy.typing import NDArray

from embedding_server.engine.engine import Embeddings
from embedding_server.errors import ConfigurationError

__all__ = [
    "Writer",
    "check_output",
    "import_pyarrow",
    "open_writer",
    "vector_column",
    "whole_file",
]


class Writer(ABC):
    """Takes vectors of ``dims`` values in their order, some at a time."""

    def __init__(self, stream: BinaryIO, dims: int) -> None:
        self._stream = stream
        self._dims = dims
        self._rows = 0

    @abstractmethod
    def write(self, embeddings: Embeddings) -> None:
        """Append these vectors."""

    @abstractmethod
    def finish(self) -> None:
        """Complete the stream; nothing is written afterwards."""


class _JsonLines(Writer):
    def write(self, embeddings: Embeddings) -> None:
        for vector, encoding in zip(embeddings.vectors, embeddings.encodings, strict=True):
            row: dict[str, object] = {"index": self._rows, "embedding": vector}
            if encoding.truncated:
                row |= {"truncated": True, "tokens": encoding.total_tokens}
            option = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE
            self._stream.write(orjson.dumps(row, option=option))
            self._rows += 1
        self._stream.flush()

    def finish(self) -> None:
        """Every line is complete as it is written."""


class _Npy(Writer):
    """float32 [n, dims], with ``n`` filled in at the end: numpy leaves room for it to grow."""

    def __init__(self, stream: BinaryIO, dims: int) -> None:
        super().__init__(stream, dims)
        self._write_header()

    def write(self, embeddings: Embeddings) -> None:
        self._stream.write(np.ascontiguousarray(embeddings.vectors, dtype="<f4").data)
        self._rows += len(embeddings.vectors)

    def finish(self) -> None:
        self._stream.seek(0)
        self._write_header()

    def _write_header(self) -> None:
        header = {"descr": "<f4", "fortran_order": False, "shape": (self._rows, self._dims)}
        np.lib.format.write_array_header_1_0(self._stream, header)


class _Parquet(Writer):
    """Columns ``index`` and ``embedding``, a row group for each write."""

    def __init__(self, stream: BinaryIO, dims: int) -> None:
        super().__init__(stream, dims)
        self._arrow, parquet = import_pyarrow()
        vectors = self._arrow.list_(self._arrow.float32(), dims)
        self._schema = self._arrow.schema(
            [("index", self._arrow.int64()), ("embedding", vectors)],
        )
        self._writer = parquet.ParquetWriter(stream, self._schema)

    def write(self, embeddings: Embeddings) -> None:
        rows = len(embeddings.vectors)
        index = self._arrow.array(np.arange(self._rows, self._rows + rows))
        vectors = vector_column(embeddings.vectors)
        self._writer.write(self._arrow.table([index, vectors], schema=self._schema))
        self._rows += rows

    def finish(self) -> None:
        self._writer.close()


_FORMATS: dict[str, type[Writer]] = {
    ".jsonl": _JsonLines,
    ".ndjson": _JsonLines,
    ".npy": _Npy,
    ".parquet": _Parquet,
}


def check_output(output: str) -> None:
    """Raise ConfigurationError, before a model is loaded, if ``output`` can't be written."""
    if output == "-":
        return
    path = Path(output)
    suffix = path.suffix.lower()
    if suffix not in _FORMATS:
        raise ConfigurationError(
            f"The output {output} must end in one of {', '.join(_FORMATS)}, or be - for JSON lines."
        )
    if not path.absolute().parent.is_dir():
        raise ConfigurationError(f"The folder of the output {output} does not exist.")
    if path.is_dir():
        raise ConfigurationError(f"The output {output} is a folder; name a file.")
    if suffix == ".parquet":
        import_pyarrow()


@contextmanager
def open_writer(output: str, dims: int) -> Iterator[Writer]:
    """The writer for ``output``: its file is complete when the context ends without an error."""
    if output == "-":
        try:
            yield _JsonLines(sys.stdout.buffer, dims)
        except OSError as error:
            error.filename = error.filename or "standard output"
            raise
        return
    path = Path(output)
    with whole_file(path) as stream:
        writer = _FORMATS[path.suffix.lower()](stream, dims)
        try:
            yield writer
        finally:  # also after an error: pyarrow's writer would write to the closed stream
            writer.finish()


def vector_column(vectors: NDArray[np.float32]) -> Any:
    """[n, dims] as Arrow's fixed-size lists."""
    arrow, _ = import_pyarrow()
    flat = arrow.array(np.ascontiguousarray(vectors).ravel())
    return arrow.FixedSizeListArray.from_arrays(flat, vectors.shape[1])


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A stream that replaces ``path`` if the context ends without an error, else is deleted."""
    # The process id: two runs may write to the same place.
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as stream:
            yield stream
        part.replace(path)
    except OSError as error:  # that of a full disk names no file
        error.filename = error.filename or str(path)
        raise
    finally:
        part.unlink(missing_ok=True)


def import_pyarrow() -> tuple[Any, Any]:
    """``pyarrow`` and ``pyarrow.parquet``; raises ConfigurationError without the extra."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigurationError(
            "Parquet needs the extra [parquet]; install it in a checkout with "
            "scripts/install '[parquet]'."
        ) from None
    return pyarrow, pyarrow.parquet
