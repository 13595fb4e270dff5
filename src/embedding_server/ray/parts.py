# SPDX-License-Identifier: MIT OR Apache-2.0
"""Parts of Parquet files: some rows of one row group, embedded and written to a file of their own.

A part's file gets its name when it is complete. So a file that has its name is done, however the
run ended, and another run does the others.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embedding_server.corpus.embedding import embed_lines
from embedding_server.corpus.lines import Line
from embedding_server.corpus.options import CorpusOptions
from embedding_server.corpus.writers import import_pyarrow, vector_column, whole_file
from embedding_server.embedder import Embedder
from embedding_server.errors import ConfigurationError, EmbeddingServerError
from embedding_server.settings import Settings

__all__ = [
    "PART_ROWS",
    "Part",
    "PartEmbedder",
    "PartResult",
    "find_files",
    "parts_of",
    "read_result",
]

PART_ROWS = 16_384
"""Rows of a part: what one task embeds, and what an actor that ends loses at most."""

_COLUMN = "embedding"

# The key of a part's result in its file's metadata.
_METADATA_KEY = b"embedding_server"


@dataclass(frozen=True, slots=True)
class Part:
    """``rows`` rows of a row group from ``first`` on, which is row ``row`` of the file."""

    name: str
    file: str
    row_group: int
    first: int
    row: int
    rows: int


@dataclass(frozen=True, slots=True)
class PartResult:
    """A part that is done, or its ``error``."""

    rows: int
    truncated: int = 0
    first_cut: str = ""
    """The place of the first text that was truncated."""
    error: str = ""


class PartEmbedder:
    """One model that embeds part after part: an actor of Ray Data."""

    def __init__(self, settings: Settings, options: CorpusOptions, folder: Path) -> None:
        # As on the command line; an actor doesn't inherit the driver's environment.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._embedder = Embedder.from_settings(settings.model[0], settings)
        self._options = options
        self._folder = folder

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """The PartResult of the Part ``row``; Ray would retry an error that is raised."""
        part = Part(**row)
        arrow, _ = import_pyarrow()
        try:
            result = self._embed(part)
        except EmbeddingServerError as error:
            result = PartResult(part.rows, error=str(error))
        except (OSError, arrow.ArrowException) as error:  # these name no file
            result = PartResult(part.rows, error=f"{part.file}, from row {part.row} on: {error}")
        return dataclasses.asdict(result)

    def _embed(self, part: Part) -> PartResult:
        _, parquet = import_pyarrow()
        assert self._options.field is not None
        table = _read_table(part)
        vectors = []
        cut: list[Line] = []
        lines = _lines(part, table.column(self._options.field))
        for chunk in embed_lines(self._embedder, lines, self._options.params):
            vectors.append(chunk.embeddings.vectors)
            cut += chunk.truncated
        first_cut = cut[0].place if cut else ""
        stored = json.dumps({"truncated": len(cut), "first_cut": first_cut})
        table = table.append_column(_COLUMN, vector_column(np.concatenate(vectors)))
        table = table.replace_schema_metadata(
            {**(table.schema.metadata or {}), _METADATA_KEY: stored}
        )
        with whole_file(self._folder / part.name) as stream:
            parquet.write_table(table, stream)
        return PartResult(part.rows, len(cut), first_cut)


def read_result(folder: Path, part: Part) -> PartResult | None:
    """The result that a former run stored; None if the part's file is missing or damaged."""
    arrow, parquet = import_pyarrow()
    try:
        metadata = parquet.read_metadata(folder / part.name)
    except (FileNotFoundError, arrow.ArrowInvalid):
        return None
    stored = (metadata.metadata or {}).get(_METADATA_KEY)
    if stored is None or metadata.num_rows != part.rows:
        return None
    return PartResult(part.rows, **json.loads(stored))


def find_files(names: Sequence[str]) -> list[Path]:
    """The absolute paths of the files, and of those in folders, sorted by name.

    Raises ConfigurationError for a file that is not Parquet or not readable.
    """
    files: list[Path] = []
    for name in names:
        path = Path(name).absolute()
        files += sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    for file in files:
        if file.suffix != ".parquet" or not file.is_file() or not os.access(file, os.R_OK):
            raise ConfigurationError(f"--ray: {file} is no .parquet file that can be read.")
    if not files:
        raise ConfigurationError(f"--ray: there is no .parquet file in {', '.join(names)}.")
    return files


def parts_of(files: Sequence[Path], field: str | None) -> list[Part]:
    """Every part of ``files``, in order.

    Raises ConfigurationError unless all have the same columns, of which ``field`` is text.
    """
    arrow, parquet = import_pyarrow()
    parts = []
    common_schema = None
    for number, file in enumerate(files):
        try:
            with parquet.ParquetFile(file) as opened:
                metadata, schema = opened.metadata, opened.schema_arrow
        except arrow.ArrowInvalid as error:
            raise ConfigurationError(
                f"{file} is no Parquet file that can be read: {error}"
            ) from None
        _check_schema(file, schema, field)
        if common_schema is not None and not schema.equals(common_schema):
            raise ConfigurationError(
                f"{file} has other columns than {files[0]}: embed it by itself."
            )
        common_schema = schema
        row = 0
        for group in range(metadata.num_row_groups):
            rows = metadata.row_group(group).num_rows
            for place, first in enumerate(range(0, rows, PART_ROWS)):
                part = Part(
                    name=f"part-{number:05}-{group:05}-{place:05}.parquet",
                    file=str(file),
                    row_group=group,
                    first=first,
                    row=row + first,
                    rows=min(PART_ROWS, rows - first),
                )
                parts.append(part)
            row += rows
    return parts


def _check_schema(file: Path, schema: Any, field: str | None) -> None:
    arrow, _ = import_pyarrow()
    columns = ", ".join(schema.names)
    if field is None or field not in schema.names:
        missing = "--field is missing" if field is None else f"{file} has no column {field!r}"
        raise ConfigurationError(f"{missing}: name one of {columns} with --field.")
    if schema.names.count(field) > 1:
        raise ConfigurationError(f"{file} has several columns {field!r}: rename all but one.")
    kind = schema.field(field).type
    if arrow.types.is_dictionary(kind):
        kind = kind.value_type
    if kind not in (arrow.string(), arrow.large_string(), arrow.string_view()):
        raise ConfigurationError(f"{file}: the column {field!r} is {kind}, and must be text.")
    if _COLUMN in schema.names:
        raise ConfigurationError(
            f"{file} has a column {_COLUMN!r} already, the name of the vectors' column: rename it."
        )


def _read_table(part: Part) -> Any:
    """The part's rows; the other rows of its row group are freed while it is read."""
    arrow, parquet = import_pyarrow()
    batches = []
    start = -part.first  # of the batch, counted from the part's first row
    with parquet.ParquetFile(part.file) as opened:
        for batch in opened.iter_batches(batch_size=1024, row_groups=[part.row_group]):
            end = start + len(batch)
            if end > 0:
                skipped = max(-start, 0)
                batches.append(batch.slice(skipped, min(end, part.rows) - max(start, 0)))
            if end >= part.rows:
                break
            start = end
        return arrow.Table.from_batches(batches, schema=opened.schema_arrow)


def _lines(part: Part, column: Any) -> Iterator[Line]:
    for number, value in enumerate(column, part.row):
        line = Line(part.file, number, "", unit="row")
        try:
            text = value.as_py()
        except UnicodeDecodeError as error:
            raise line.error(f"not UTF-8 at byte {error.start}; the first row is 0") from None
        if text is None:
            raise line.error("null, and not a text; the first row is 0")
        yield dataclasses.replace(line, text=text)
