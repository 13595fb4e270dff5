# SPDX-License-Identifier: MIT OR Apache-2.0
"""``embed --ray``: Parquet files in, a folder of Parquet files out, over a cluster, resumable."""

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

from tqdm import tqdm

from embedding_server.corpus.options import CorpusOptions
from embedding_server.corpus.writers import whole_file
from embedding_server.embedder import Embedder
from embedding_server.engine.info import ModelInfo
from embedding_server.errors import ConfigurationError, EmbeddingServerError
from embedding_server.ray.options import send_no_usage_stats, with_absolute_paths
from embedding_server.ray.parts import (
    PART_ROWS,
    Part,
    PartEmbedder,
    PartResult,
    find_files,
    parts_of,
    read_result,
)
from embedding_server.settings import Settings

__all__ = ["ClusterOptions", "connect", "embed_on_ray", "open_folder", "shares_of"]

logger = logging.getLogger(__name__)

# Readers of the folder as one table skip names that begin with an underscore.
_MANIFEST = "_manifest.json"

# Between two lines of the log where no terminal shows a progress bar.
_LOG_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class ClusterOptions:
    """The options of the cluster and its actors."""

    address: str | None = None
    actors: int | None = None
    gpus: float = 0.0


def embed_on_ray(settings: Settings, options: CorpusOptions, cluster: ClusterOptions) -> int:
    """Embed the column ``options.field`` of all parts that are not done; returns the exit code.

    Raises ConfigurationError for options that can't work, and EmbeddingServerError, naming file
    and row, for a text that can't be embedded.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigurationError(
            "--ray needs the extra [ray]; install it with pip install 'embedding-server[ray]', in "
            "a checkout with scripts/install '[ray]'."
        )
    settings = with_absolute_paths(settings)
    files = find_files(options.files)
    parts = parts_of(files, options.field)
    # Here, too, so that wrong options are refused before a cluster is busy.
    with Embedder.from_settings(settings.model[0], settings) as embedder:
        info = embedder.info
        embedder.embed_detailed(["text"], options.params)
    folder = open_folder(options.output, _manifest(settings, options, info, files))
    stored = {part.name: read_result(folder, part) for part in parts}
    left = [part for part in parts if stored[part.name] is None]
    results = [result for result in stored.values() if result is not None]
    total = sum(part.rows for part in parts)
    rows_left = sum(part.rows for part in left)
    if results:
        logger.info("%d of %d rows are done already", total - rows_left, total)
    for result in _with_progress(
        _embed_parts(left, folder, settings, options, cluster), total, rows_left
    ):
        results.append(result)
    logger.info("embedded %d rows; %d in all, in %s", rows_left, total, folder)
    cut = [result for result in results if result.truncated]
    if cut:
        logger.warning(
            "%d of %d texts were cut to the %d tokens that %s takes, as that in %s",
            sum(result.truncated for result in cut),
            total,
            info.max_tokens,
            info.name,
            cut[0].first_cut,
        )
    return 0


def _with_progress(
    results: Generator[PartResult, None, None], total: int, rows_left: int
) -> Iterator[PartResult]:
    """``results``, shown on the terminal or in the log; raises the first that is an error."""
    done = total - rows_left
    logged = time.monotonic()
    on_terminal = sys.stderr.isatty()
    bar = tqdm(total=total, initial=done, unit=" rows", disable=not on_terminal)
    try:
        with bar, contextlib.closing(results):
            for result in results:
                if result.error:
                    raise EmbeddingServerError(result.error)
                done += result.rows
                bar.update(result.rows)
                if not on_terminal and time.monotonic() - logged > _LOG_SECONDS:
                    logged = time.monotonic()
                    logger.info("%d of %d rows are done", done, total)
                yield result
    except KeyboardInterrupt:
        logger.warning("interrupted: %d of %d rows are done; run it again to go on", done, total)
        raise


def _embed_parts(
    parts: Sequence[Part],
    folder: Path,
    settings: Settings,
    options: CorpusOptions,
    cluster: ClusterOptions,
) -> Generator[PartResult, None, None]:
    """Each part's result as soon as it is done; without parts no cluster is needed."""
    if not parts:
        return
    import ray

    with connect(cluster.address):
        try:
            yield from _computed(parts, folder, settings, options, cluster)
        except ray.exceptions.RayError as error:
            raise EmbeddingServerError(f"Ray: {error}; run it again to go on.") from error


def _computed(
    parts: Sequence[Part],
    folder: Path,
    settings: Settings,
    options: CorpusOptions,
    cluster: ClusterOptions,
) -> Generator[PartResult, None, None]:
    """Each part's result, on the cluster that this process is connected to."""
    import ray
    import ray.data

    threads, actors = shares_of(ray.nodes(), settings.threads, cluster)
    actors = min(actors, len(parts))
    free = ray.available_resources().get("CPU", 0.0)
    logger.info("%d processes of %d threads; %g cores are free", actors, threads, free)
    if free < threads:
        logger.warning("waiting for %d cores of one node; see --threads", threads)
    ray.data.DataContext.get_current().enable_progress_bars = False  # we show our own
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # we report its errors
    rows = [dataclasses.asdict(part) for part in parts]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        PartEmbedder,
        fn_constructor_args=(settings.model_copy(update={"threads": threads}), options, folder),
        # Actors start as the cluster has room for them.
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=actors, initial_size=actors),
        num_cpus=threads,
        num_gpus=cluster.gpus or None,
    )
    # Without prefetching, which would hold back each result until the next is there.
    for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for result in table.to_pylist():
            yield PartResult(**result)


def connect(address: str | None) -> Any:
    """Connect to the cluster at ``address`` or RAY_ADDRESS, or start one on this machine.

    The connection is a context that ends it, unless the process has one already. Raises
    ConfigurationError.
    """
    import ray

    if ray.is_initialized():
        return contextlib.nullcontext()
    send_no_usage_stats()
    address = address or os.environ.get("RAY_ADDRESS") or None
    alone = {} if address else {"include_dashboard": False}
    try:
        return ray.init(address=address, logging_level="warning", log_to_driver=False, **alone)
    except (ValueError, RuntimeError, ConnectionError, ray.exceptions.RayError) as error:
        raise ConfigurationError(
            f"--ray-address or RAY_ADDRESS, {address}: no cluster is available there: {error}"
            if address
            else f"No cluster can be started on this machine: {error}"
        ) from None


def shares_of(
    nodes: Sequence[Mapping[str, Any]], threads: int | None, cluster: ClusterOptions
) -> tuple[int, int]:
    """The threads of an actor, and the number of actors.

    By default an actor has a whole node, of the smallest size, or the part of a node that belongs
    to its GPUs.
    """
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    # Of each node its cores, and how many actors share them.
    shares = [
        (int(found.get("CPU", 0)), int(found.get("GPU", 0) / cluster.gpus) if cluster.gpus else 1)
        for found in resources
    ]
    if threads is None:
        equal = (max(1, cores // actors) for cores, actors in shares if cores and actors)
        threads = min(equal, default=1)
    room = 0
    for cores, actors in shares:
        room += min(cores // threads, actors) if cluster.gpus else cores // threads
    if not room:
        raise ConfigurationError(
            f"No node of the cluster has room for an actor of {threads} cores"
            + (f" and {cluster.gpus:g} GPUs." if cluster.gpus else "; see --threads.")
        )
    return threads, cluster.actors or room


def _manifest(
    settings: Settings, options: CorpusOptions, info: ModelInfo, files: Sequence[Path]
) -> dict[str, Any]:
    """Everything that the vectors and the parts depend on."""
    params = dataclasses.asdict(options.params)
    del params["output_dtype"]
    stats = [(file, file.stat()) for file in files]
    return {
        "model": info.name,
        "revision": info.revision,
        "sha256": info.sha256,
        "onnx_file": settings.onnx_file,
        "field": options.field,
        **params,
        "part_rows": PART_ROWS,
        "inputs": [
            {"file": str(file), "bytes": stat.st_size, "modified_ns": stat.st_mtime_ns}
            for file, stat in stats
        ],
    }


def open_folder(output: str, manifest: Mapping[str, Any]) -> Path:
    """The output folder, to which ``manifest`` is written unless it is there already.

    Raises ConfigurationError if the folder has another manifest, or other files.
    """
    folder = Path(output).absolute()
    file = folder / _MANIFEST
    if output == "-" or folder.is_file() or not folder.parent.is_dir():
        raise ConfigurationError("--ray: -o must name a folder, in one that exists.")
    folder.mkdir(exist_ok=True)
    for incomplete in (*folder.glob(".part-*.part"), *folder.glob(f".{_MANIFEST}.*.part")):
        incomplete.unlink(missing_ok=True)  # of a run that was killed
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
