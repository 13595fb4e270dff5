# SPDX-License-Identifier: MIT OR Apache-2.0
"""``embed --ray``: Parquet in, a folder of Parquet out, over a cluster, and resumable.

The input is cut into parts, each of some rows of one row group. An actor of Ray Data embeds one
and writes it to a file of its own, which gets its name when it is whole. So what has its name is
done, whatever was killed meanwhile, and a further run does the rest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import logging
import os
import sys
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from embedding_server.corpus.embedding import embed_lines
from embedding_server.corpus.lines import Line
from embedding_server.corpus.options import CorpusOptions
from embedding_server.corpus.writers import import_pyarrow, vector_column, whole_file
from embedding_server.embedder import Embedder
from embedding_server.engine.info import ModelInfo
from embedding_server.errors import ConfigurationError, EmbeddingServerError
from embedding_server.ray.options import with_whole_paths
from embedding_server.settings import Settings

__all__ = [
    "ClusterOptions",
    "PartEmbedder",
    "begun",
    "embed_on_ray",
    "parts_of",
    "shares_of",
]

logger = logging.getLogger(__name__)

COLUMN = "embedding"

# Beginning with an underscore, it is no data to those who read the folder as one table.
_MANIFEST = "_manifest.json"

# Rows that are lost at most, with what an actor had in hand, and that one task takes.
_PART_ROWS = 16_384

# Between two lines of the log where no terminal shows a bar.
_LOG_SECONDS = 30.0

# Of a part's file: what was cut in it.
_TOLD = b"embedding_server"


@dataclass(frozen=True, slots=True)
class ClusterOptions:
    """What the command line asks of Ray."""

    address: str | None = None
    actors: int | None = None
    gpus: float = 0.0


@dataclass(frozen=True, slots=True)
class _Part:
    """``rows`` rows of a row group, from its ``first`` on, which is the file's ``row``."""

    name: str
    file: str
    row_group: int
    first: int
    row: int
    rows: int


def embed_on_ray(settings: Settings, options: CorpusOptions, cluster: ClusterOptions) -> int:
    """Embed the column ``options.field`` of every file, as far as it isn't done already.

    Returns the exit code. Raises ConfigurationError for what can't be meant, and
    EmbeddingServerError, naming file and row, for one that can't be embedded.
    """
    _check_extra()
    settings = with_whole_paths(settings)
    files = _files(options.files)
    parts = parts_of(files, options.field)
    # Here, too, so that what the options can't mean is told before a cluster is busy.
    with Embedder.from_settings(settings.model[0], settings) as embedder:
        info = embedder.info
        embedder.embed_detailed(["text"], options.params)
    folder = begun(options.output, _manifest(settings, options, info, files))
    found = {part.name: _told(folder / part.name, part.rows) for part in parts}
    left = [part for part in parts if found[part.name] is None]
    total = sum(part.rows for part in parts)
    rows_left = sum(part.rows for part in left)
    if len(left) < len(parts):
        logger.info("%d of %d rows are done already", total - rows_left, total)
    told: list[Mapping[str, Any]] = [part for part in found.values() if part is not None]
    bar = tqdm(
        total=total, initial=total - rows_left, unit=" rows", disable=not sys.stderr.isatty()
    )
    done = total - rows_left
    logged = time.monotonic()
    results = _results(left, folder, settings, options, cluster)
    try:
        with bar, contextlib.closing(results):
            for result in results:
                if result["error"]:
                    raise EmbeddingServerError(str(result["error"]))
                told.append(result)
                done += int(result["rows"])
                bar.update(int(result["rows"]))
                if bar.disable and time.monotonic() - logged > _LOG_SECONDS:
                    logged = time.monotonic()
                    logger.info("%d of %d rows are done", done, total)
    except KeyboardInterrupt:
        logger.warning("interrupted: %d of %d rows are done; run it again to go on", done, total)
        raise
    logger.info("embedded %d rows; %d in all, in %s", rows_left, total, folder)
    cut = [result for result in told if result["truncated"]]
    if cut:
        logger.warning(
            "%d of %d texts were cut to the %d tokens that %s takes, as that in %s",
            *(sum(result["truncated"] for result in cut), total),
            *(info.max_tokens, info.name, cut[0]["first_cut"]),
        )
    return 0


class PartEmbedder:
    """An actor: one model on its share of a node."""

    def __init__(self, settings: Settings, options: CorpusOptions, folder: Path) -> None:
        self._embedder = Embedder.from_settings(settings.model[0], settings)
        self._options = options
        self._folder = folder

    def __call__(self, batch: Mapping[str, Any]) -> Mapping[str, Sequence[Any]]:
        """Do the one part of ``batch``; what is wrong with it comes back, and isn't tried again."""
        arrow, _ = import_pyarrow()
        part = _Part(**{name: values.tolist()[0] for name, values in batch.items()})
        result = {"truncated": 0, "first_cut": "", "error": ""}
        try:
            result |= self._do(part)
        except EmbeddingServerError as error:
            result["error"] = str(error)
        except (OSError, arrow.ArrowException) as error:  # which names no file of its own
            result["error"] = f"{part.file}, from row {part.row} on: {error}"
        return {key: [value] for key, value in (result | {"rows": part.rows}).items()}

    def _do(self, part: _Part) -> dict[str, Any]:
        _, parquet = import_pyarrow()
        field = self._options.field
        assert field is not None
        table = _rows(part)
        vectors = []
        cut: list[Line] = []
        lines = _lines(part, table.column(field))
        for chunk in embed_lines(self._embedder, lines, self._options.params):
            vectors.append(chunk.embeddings.vectors)
            cut += chunk.truncated
        told = {"truncated": len(cut), "first_cut": cut[0].place if cut else ""}
        table = table.append_column(COLUMN, vector_column(np.concatenate(vectors)))
        metadata = {**(table.schema.metadata or {}), _TOLD: json.dumps(told)}
        with whole_file(self._folder / part.name) as stream:
            parquet.write_table(table.replace_schema_metadata(metadata), stream)
        return told


def _results(
    parts: Sequence[_Part],
    folder: Path,
    settings: Settings,
    options: CorpusOptions,
    cluster: ClusterOptions,
) -> Generator[Mapping[str, Any], None, None]:
    """What the actors say, part by part as each is done; no cluster is asked for no part."""
    if not parts:
        return
    import ray
    import ray.data

    ours = not ray.is_initialized()
    if ours:
        address = cluster.address or os.environ.get("RAY_ADDRESS") or None
        alone = {} if address else {"include_dashboard": False}
        try:
            ray.init(address=address, logging_level="warning", log_to_driver=False, **alone)
        except (ValueError, RuntimeError, ConnectionError, ray.exceptions.RayError) as error:
            raise ConfigurationError(
                f"--ray-address or RAY_ADDRESS, {address}: no cluster can be had there: {error}"
                if address
                else f"No cluster can be had on this machine: {error}"
            ) from None
    try:
        threads, actors = shares_of(ray.nodes(), settings.threads, cluster)
        actors = min(actors, len(parts))
        free = ray.available_resources().get("CPU", 0.0)
        logger.info(
            "%d processes of %d threads, for which %g cores of the cluster are free",
            *(actors, threads, free),
        )
        if free < threads:
            logger.warning("waiting for %d cores of one node; see --threads", threads)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # there is one of ours
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what it says, we say
        rows = [dataclasses.asdict(part) for part in parts]
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            PartEmbedder,
            fn_constructor_args=(settings.model_copy(update={"threads": threads}), options, folder),
            batch_size=1,
            # As many at once as there is room for, and the others when there is.
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=actors, initial_size=actors),
            num_cpus=threads,
            num_gpus=cluster.gpus or None,
        )
        for batch in dataset.iter_batches(batch_size=None, prefetch_batches=0):
            names = list(batch)
            for values in zip(*(batch[name].tolist() for name in names), strict=True):
                yield dict(zip(names, values, strict=True))
    except ray.exceptions.RayError as error:
        raise EmbeddingServerError(f"Ray: {error}; run it again to go on.") from error
    finally:
        if ours:
            ray.shutdown()


def shares_of(
    nodes: Sequence[Mapping[str, Any]], threads: int | None, cluster: ClusterOptions
) -> tuple[int, int]:
    """Threads of an actor and how many actors.

    Without wishes one has an equal node, or of a node with GPUs the part that its GPUs are.
    """
    # Of each node its cores, and how many actors it should have.
    rooms = [
        (int(found.get("CPU", 0)), int(found.get("GPU", 0) / cluster.gpus) if cluster.gpus else 1)
        for found in (node["Resources"] for node in nodes if node["Alive"])
    ]
    equal = (max(1, cores // actors) for cores, actors in rooms if cores and actors)
    threads = threads or min(equal, default=1)
    room = sum(
        min(cores // threads, actors) if cluster.gpus else cores // threads
        for cores, actors in rooms
    )
    if not room:
        raise ConfigurationError(
            f"No node of the cluster has room for an actor of {threads} cores"
            + (f" and {cluster.gpus:g} GPUs." if cluster.gpus else "; see --threads.")
        )
    return threads, cluster.actors or room


def _files(given: Sequence[str]) -> list[Path]:
    """The files, and those of folders in the order of their names, by their whole paths."""
    files: list[Path] = []
    for name in given:
        path = Path(name).absolute()
        files += sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    for file in files:
        if file.suffix != ".parquet" or not file.is_file() or not os.access(file, os.R_OK):
            raise ConfigurationError(f"--ray: {file} is no .parquet file that can be read.")
    if not files:
        raise ConfigurationError(f"--ray: there is no .parquet file in {', '.join(given)}.")
    return files


def parts_of(files: Sequence[Path], field: str | None) -> list[_Part]:
    """Raises ConfigurationError unless all files are of one schema in which ``field`` is text."""
    arrow, parquet = import_pyarrow()
    parts = []
    schema = None
    for number, file in enumerate(files):
        try:
            with parquet.ParquetFile(file) as opened:
                metadata, its_schema = opened.metadata, opened.schema_arrow
        except arrow.ArrowInvalid as error:
            raise ConfigurationError(
                f"{file} is no Parquet file that can be read: {error}"
            ) from None
        _check_schema(file, its_schema, field)
        if schema is not None and not its_schema.equals(schema):
            raise ConfigurationError(
                f"{file} has other columns than {files[0]}: embed it by itself."
            )
        schema = its_schema
        row = 0
        for group in range(metadata.num_row_groups):
            rows = metadata.row_group(group).num_rows
            for place, first in enumerate(range(0, rows, _PART_ROWS)):
                parts.append(
                    _Part(
                        name=f"part-{number:05}-{group:05}-{place:05}.parquet",
                        file=str(file),
                        row_group=group,
                        first=first,
                        row=row + first,
                        rows=min(_PART_ROWS, rows - first),
                    )
                )
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
    if COLUMN in schema.names:
        raise ConfigurationError(
            f"{file} has a column {COLUMN!r} already, where the vectors go: rename it."
        )


def _rows(part: _Part) -> Any:
    """The part's rows, of which a large row group's others are let go as they are read."""
    arrow, parquet = import_pyarrow()
    found = []
    seen = 0
    with parquet.ParquetFile(part.file) as opened:
        for batch in opened.iter_batches(batch_size=1024, row_groups=[part.row_group]):
            start = max(part.first - seen, 0)
            stop = min(part.first + part.rows - seen, len(batch))
            if start < stop:
                found.append(batch.slice(start, stop - start))
            seen += len(batch)
            if seen >= part.first + part.rows:
                break
        return arrow.Table.from_batches(found, schema=opened.schema_arrow)


def _lines(part: _Part, column: Any) -> Iterator[Line]:
    for number, value in enumerate(column, part.row):
        line = Line(part.file, number, "", unit="row")
        try:
            text = value.as_py()
        except UnicodeDecodeError as error:
            raise line.error(f"not UTF-8 at byte {error.start}; the first row is 0") from None
        if text is None:
            raise line.error("null, and not a text; the first row is 0")
        yield dataclasses.replace(line, text=text)


def _manifest(
    settings: Settings, options: CorpusOptions, info: ModelInfo, files: Sequence[Path]
) -> dict[str, Any]:
    """All that a vector depends on, and what the parts are of."""
    asked = {"field": options.field, **dataclasses.asdict(options.params)}
    del asked["output_dtype"]
    stats = [(file, file.stat()) for file in files]
    return {
        "model": info.name,
        "revision": info.revision,
        "sha256": info.sha256,
        "onnx_file": settings.onnx_file,
        **asked,
        "part_rows": _PART_ROWS,
        "inputs": [
            {"file": str(file), "bytes": stat.st_size, "modified_ns": stat.st_mtime_ns}
            for file, stat in stats
        ],
    }


def begun(output: str, manifest: Mapping[str, Any]) -> Path:
    """The folder of the output, in which ``manifest`` is or was written.

    Raises ConfigurationError if the folder is of another.
    """
    folder = Path(output).absolute()
    file = folder / _MANIFEST
    if output == "-" or folder.is_file() or not folder.parent.is_dir():
        raise ConfigurationError("--ray: -o must name a folder, in one that exists.")
    folder.mkdir(exist_ok=True)
    for torn in (*folder.glob(".part-*.part"), *folder.glob(f".{_MANIFEST}.*.part")):
        torn.unlink(missing_ok=True)  # of a run that was killed
    if file.exists():
        before = json.loads(file.read_bytes())
        if before != manifest:
            others = sorted(k for k in {*before, *manifest} if before.get(k) != manifest.get(k))
            raise ConfigurationError(
                f"{folder} was begun with other values of {', '.join(others)}: {_MANIFEST} there "
                "has them. Go on with the same, or name another folder."
            )
    elif any(folder.iterdir()):
        raise ConfigurationError(f"{folder} holds other files: name an empty or a new folder.")
    else:
        with whole_file(file) as stream:
            stream.write(json.dumps(manifest, indent=1).encode())
    return folder


def _told(file: Path, rows: int) -> dict[str, Any] | None:
    """What a part's file says was cut in it; None if it isn't there, or not whole."""
    arrow, parquet = import_pyarrow()
    try:
        metadata = parquet.read_metadata(file)
    except (FileNotFoundError, arrow.ArrowInvalid):
        return None
    told = (metadata.metadata or {}).get(_TOLD)
    if told is None or metadata.num_rows != rows:
        return None
    answer: dict[str, Any] = json.loads(told)
    return answer


def _check_extra() -> None:
    if importlib.util.find_spec("ray") is None:
        raise ConfigurationError(
            "--ray needs the extra [ray]; install it with pip install 'embedding-server[ray]', in "
            "a checkout with scripts/install '[ray]'."
        )
