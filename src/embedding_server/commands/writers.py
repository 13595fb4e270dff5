# SPDX-License-Identifier: MIT OR Apache-2.0
"""Where the ``embed`` command puts vectors: JSON lines, ``.npy`` or Parquet, by the file's name."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import orjson
from numpy.typing import NDArray

from embedding_server.engine.engine import Embeddings
from embedding_server.errors import ConfigurationError

__all__ = ["Writer", "import_pyarrow", "vector_column", "whole_file", "writer_for"]


class Writer(Protocol):
    """Takes the vectors in their order, some at a time."""

    def write(self, embeddings: Embeddings) -> None:
        """Append these vectors."""
        ...


OpenWriter = Callable[[int], AbstractContextManager[Writer]]
"""``dims -> writer``: the output is complete, and in its place, when the context ends well."""


def writer_for(output: str) -> OpenWriter:
    """How to write ``output``; raises ConfigurationError for a name whose format isn't known."""
    if output == "-":
        return lambda dims: _standard_output()
    path = Path(output)
    formats: dict[str, Callable[[Path, int], AbstractContextManager[Writer]]] = {
        ".jsonl": _json_lines,
        ".ndjson": _json_lines,
        ".npy": _npy,
        ".parquet": _parquet,
    }
    opener = formats.get(path.suffix.lower())
    if opener is None:
        raise ConfigurationError(
            f"The output {output} must end in one of {', '.join(formats)}, or be - for JSON lines."
        )
    if not path.absolute().parent.is_dir():
        raise ConfigurationError(f"The folder of the output {output} does not exist.")
    if path.is_dir():
        raise ConfigurationError(f"The output {output} is a folder; name a file.")
    if opener is _parquet:
        import_pyarrow()
    return lambda dims: opener(path, dims)


class _JsonLines:
    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._index = 0

    def write(self, embeddings: Embeddings) -> None:
        for vector, encoding in zip(embeddings.vectors, embeddings.encodings, strict=True):
            row: dict[str, object] = {"index": self._index, "embedding": vector}
            if encoding.truncated:
                row |= {"truncated": True, "tokens": encoding.total_tokens}
            option = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE
            self._stream.write(orjson.dumps(row, option=option))
            self._index += 1
        self._stream.flush()


class _Npy:
    """float32 [n, dims], with ``n`` filled in at the end: numpy leaves room for it to grow."""

    def __init__(self, stream: BinaryIO, dims: int) -> None:
        self._stream = stream
        self._dims = dims
        self._rows = 0
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


class _Parquet:
    """Columns ``index`` and ``embedding``, a row group for each write."""

    def __init__(self, stream: BinaryIO, dims: int) -> None:
        self._arrow, parquet = import_pyarrow()
        self._rows = 0
        self._schema = self._arrow.schema(
            [
                ("index", self._arrow.int64()),
                ("embedding", self._arrow.list_(self._arrow.float32(), dims)),
            ]
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


def vector_column(vectors: NDArray[np.float32]) -> Any:
    """[n, dims] as Arrow's fixed-size lists."""
    arrow, _ = import_pyarrow()
    flat = arrow.array(np.ascontiguousarray(vectors).ravel())
    return arrow.FixedSizeListArray.from_arrays(flat, vectors.shape[1])


@contextmanager
def _standard_output() -> Iterator[Writer]:
    try:
        yield _JsonLines(sys.stdout.buffer)
    except BrokenPipeError:
        raise
    except OSError as error:
        error.filename = error.filename or "standard output"
        raise


@contextmanager
def _json_lines(path: Path, dims: int) -> Iterator[Writer]:
    with whole_file(path) as stream:
        yield _JsonLines(stream)


@contextmanager
def _npy(path: Path, dims: int) -> Iterator[Writer]:
    with whole_file(path) as stream:
        writer = _Npy(stream, dims)
        yield writer
        writer.finish()


@contextmanager
def _parquet(path: Path, dims: int) -> Iterator[Writer]:
    with whole_file(path) as stream:
        writer = _Parquet(stream, dims)
        try:
            yield writer
        finally:  # or it would do so itself, when its file is closed
            writer.finish()


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A stream that becomes ``path`` only if all goes well; else nothing is left of it."""
    # A name of our own, as two runs may write to the same place.
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as stream:
            yield stream
        part.replace(path)
    except OSError as error:  # of a full disk it says no name
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
