# SPDX-License-Identifier: MIT OR Apache-2.0
"""A model's folder to what computes it: picks the backend and refuses what can't be exact."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from mmap import ACCESS_READ, mmap
from pathlib import Path

from embedding_server.backends.base import BackendOptions, Pipeline, load_backend
from embedding_server.backends.head import pooling_modes
from embedding_server.backends.weights import Weights
from embedding_server.engine.backend import Backend
from embedding_server.engine.engine import Limits
from embedding_server.engine.info import ModelInfo
from embedding_server.engine.tokenizer import Tokenizer, is_panic
from embedding_server.errors import ConfigurationError, ModelNotSupported
from embedding_server.models.catalog import CATALOG, CatalogModel
from embedding_server.models.fingerprint import fingerprint
from embedding_server.models.hub import LocatedModel, sha256_of
from embedding_server.models.json_files import read_text
from embedding_server.models.layout import Layout, read_layout
from embedding_server.models.reference import REFERENCE_FILE, ReferenceVectors
from embedding_server.models.spec import ModelSpec
from embedding_server.models.tokenizers import load_static_tokenizer, load_tokenizer

__all__ = ["NO_LIMITS", "LoadOptions", "LoadedModel", "load_model"]

logger = logging.getLogger(__name__)

NO_LIMITS = Limits(max_concurrent_requests=2**31, max_queued_tokens=2**63, max_request_tokens=2**63)
"""For one caller, who can wait."""


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How models are run; the same for all of a process."""

    backend: str
    threads: int
    limits: Limits
    onnx_file: str | None = None
    max_batch_tokens: int | None = None
    matryoshka: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Matryoshka sizes by the model's served name, over those of the catalog."""
    inference_timeout: float | None = None
    """Seconds after which a batch hangs; None: never."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that computes, and what its vectors are held against before it is served."""

    info: ModelInfo
    located: LocatedModel
    tokenizer: Tokenizer
    backend: Backend
    references: Sequence[ReferenceVectors]


def load_model(spec: ModelSpec, located: LocatedModel, options: LoadOptions) -> LoadedModel:
    """The model in the folder that was located for ``spec``, after `hub.verify`.

    Raises ModelNotSupported, saying what in the folder is to blame, if no backend that was
    asked for computes the model exactly.
    """
    name, why, layout, backend, tokenizer = _load(located.folder, options)
    row = _catalog_row(spec, located)
    files = _weights_files(layout.pipeline, name, options)
    digests = _digests(files, spec, located)
    digest = digests[0] if len(files) == 1 or name == "onnx-file" else None
    prompts = _prompts(layout, row)
    layer_norm = row is not None and row.layer_norm
    info = ModelInfo(
        name=spec.served_name,
        architecture=str(layout.pipeline.config.get("model_type", layout.pipeline.body)),
        dims=backend.dims,
        max_tokens=tokenizer.max_tokens,
        pooling=_pooling(layout.pipeline),
        dimensions=_dimensions(spec.served_name, backend.dims, options, row),
        prompts=prompts,
        default_prompt=layout.default_prompt,
        layer_norm=layer_norm,
        backend=name,
        backend_reason=why,
        revision=located.revision,
        sha256=digest,
        fingerprint=fingerprint(
            layout,
            weights=digests,
            max_tokens=tokenizer.max_tokens,
            prompts=prompts,
            layer_norm=layer_norm,
        ),
        created=int(files[0].stat().st_mtime),
        owned_by=spec.repo.partition("/")[0] if spec.repo else "local",
    )
    return LoadedModel(info, located, tokenizer, backend, _references(located, row, digest))


def _load(folder: Path, options: LoadOptions) -> tuple[str, str, Layout, Backend, Tokenizer]:
    """The first backend that takes the model: its name, why it was taken, and what it needs."""
    refusals: dict[str, list[str]] = {}
    backend_options = BackendOptions(threads=options.threads, onnx_file=options.onnx_file)
    for name, why in _candidates(folder, options):
        try:
            layout = read_layout(folder, own_tokenizer=name == "torch")
            backend = load_backend(name, layout.pipeline, backend_options)
            tokenizer = _load_tokenizer(layout, backend, any_family=name == "onnx-file")
        except ModelNotSupported as refusal:
            refusals.setdefault(str(refusal), []).append(name)
            continue
        except BaseException as error:  # files that lie in a way that nobody foresaw
            if not isinstance(error, Exception) and not is_panic(error):
                raise
            logger.debug("%s can't be loaded on %s", folder, name, exc_info=True)
            what = " ".join(f"{type(error).__name__}: {error}".split())
            refusals.setdefault(f"{folder} can't be loaded: {what}", []).append(name)
            continue
        if refusals:
            why = "; ".join([why, *_told(refusals)])
            logger.info("%s runs on %s: %s", folder, name, why)
        return name, why, layout, backend, tokenizer
    raise ModelNotSupported("; ".join(refusals if len(refusals) == 1 else _told(refusals)))


def _told(refusals: Mapping[str, Sequence[str]]) -> list[str]:
    return [f"{', '.join(names)}: {reason}" for reason, names in refusals.items()]


def _candidates(folder: Path, options: LoadOptions) -> Iterator[tuple[str, str]]:
    """Backends in the order to try, each with the reason for its place."""
    if options.onnx_file is not None:
        yield "onnx-file", "--onnx-file asks for it"
        return
    if options.backend == "torch":
        yield "torch", "--backend asks for it"
        return
    torch_too = options.backend == "auto" and _torch_installed()
    if torch_too and _gpu_usable():
        yield "torch", "a GPU is there"
    if _is_static(folder):
        yield "static", "its vectors need no graph"
    else:
        yield "onnx", "its graph is built here"
        if any(folder.glob("**/model.onnx")):
            yield "onnx-file", "it brings its own graph"
    if torch_too:
        yield "torch", "nothing lighter computes it"


def _is_static(folder: Path) -> bool:
    modules = folder / "modules.json"
    return modules.is_file() and ".StaticEmbedding" in read_text(modules)


def _torch_installed() -> bool:
    names = ("torch", "sentence_transformers")
    return all(importlib.util.find_spec(name) is not None for name in names)


def _gpu_usable() -> bool:
    """Whether torch has a GPU; it is asked, for seconds, only where there is likely one."""
    if sys.platform == "darwin":
        return os.uname().machine == "arm64"
    if not (Path("/dev/nvidiactl").exists() or Path("/proc/driver/nvidia/version").exists()):
        return False
    import torch

    return torch.cuda.is_available()


def _load_tokenizer(layout: Layout, backend: Backend, *, any_family: bool) -> Tokenizer:
    home, config = layout.pipeline.transformer, layout.pipeline.config
    if layout.max_tokens is None:
        return load_static_tokenizer(home / "tokenizer.json", vocab_size=backend.vocab_size)
    if backend.tokenizer is not None:
        return Tokenizer(
            backend.tokenizer.backend,
            max_tokens=layout.max_tokens,
            vocab_size=config.get("vocab_size"),
            special_ids=backend.tokenizer.special_ids,
            pad_id=backend.tokenizer.pad_id,
            exclude_prompt=layout.exclude_prompt,
            keep_end=backend.tokenizer.keep_end,
        )
    return load_tokenizer(
        home,
        config,
        max_tokens=layout.max_tokens,
        lowercase=layout.lowercase,
        exclude_prompt=layout.exclude_prompt,
        any_family=any_family,
    )


def _weights_files(pipeline: Pipeline, backend: str, options: LoadOptions) -> list[Path]:
    """The files that hold the first module's weights, in the order in which they are read."""
    if backend == "onnx-file":
        from embedding_server.backends.onnx import onnx_model_file

        graph = onnx_model_file(pipeline, options.onnx_file)
        return [graph, *_external_data(graph)]
    single = pipeline.transformer / "model.safetensors"
    if single.is_file():
        return [single]
    return list(dict.fromkeys(t.file for t in Weights.open(pipeline.transformer).values()))


def _external_data(graph: Path) -> list[Path]:
    """The files beside ``graph`` that it names: those in which it keeps tensors."""
    with graph.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
        names = (path.relative_to(graph.parent).as_posix() for path in graph.parent.rglob("*"))
        named = [n for n in names if not n.endswith(".onnx") and content.find(n.encode()) >= 0]
    return [graph.parent / name for name in sorted(named) if (graph.parent / name).is_file()]


def _digests(files: Sequence[Path], spec: ModelSpec, located: LocatedModel) -> list[str]:
    """The sha256 of each file; `hub.verify` has held the one in ``spec`` against its file."""
    if spec.sha256 and files == [located.folder / "model.safetensors"]:
        return [spec.sha256]
    with ThreadPoolExecutor() as pool:
        return list(pool.map(sha256_of, files))


def _references(
    located: LocatedModel, row: CatalogModel | None, digest: str | None
) -> list[ReferenceVectors]:
    """Those of the folder, and the catalog's if the weights are those of its row."""
    paths = [located.folder / REFERENCE_FILE]
    if row is not None and row.reference_vectors and digest == row.sha256:
        paths.append(row.reference_vectors)
    return [ReferenceVectors.read(path) for path in paths if path.exists()]


def _catalog_row(spec: ModelSpec, located: LocatedModel) -> CatalogModel | None:
    if spec.repo is not None:
        return next((row for row in CATALOG.values() if row.repo == spec.repo), None)
    row = CATALOG.get(located.folder.name)
    if row is not None:
        logger.info("%s is taken for the catalog's %s, by its name", located.folder, row.name)
    return row


def _pooling(pipeline: Pipeline) -> str:
    if pipeline.body == "StaticEmbedding":
        return "mean"
    poolings = [module.config for module in pipeline.modules if module.kind == "Pooling"]
    return "+".join(pooling_modes(poolings[0])) if poolings else "none"


def _prompts(layout: Layout, row: CatalogModel | None) -> Mapping[str, str]:
    """The folder's prompts over the catalog's; sentence-transformers saves empty ones for none."""
    if row is None or not row.prompts:
        return layout.prompts
    return {**row.prompts, **{name: text for name, text in layout.prompts.items() if text}}


def _dimensions(
    name: str, dims: int, options: LoadOptions, row: CatalogModel | None
) -> tuple[int, ...] | None:
    sizes = options.matryoshka.get(name)
    if sizes is not None and sizes[-1] > dims:
        raise ConfigurationError(
            f"The Matryoshka size {sizes[-1]} of {name} is over the model's {dims} dimensions."
        )
    if sizes is None and row is not None and row.dimensions is not None:
        sizes = (*(size for size in row.dimensions if size < dims), dims)
    return sizes
