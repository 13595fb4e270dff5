# SPDX-License-Identifier: MIT OR Apache-2.0
"""Located folder -> loaded model: chooses the backend, and refuses what none computes exactly."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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
from embedding_server.models.files import sha256_of
from embedding_server.models.fingerprint import fingerprint
from embedding_server.models.hub import LocatedModel
from embedding_server.models.layout import Layout, read_layout
from embedding_server.models.reference import REFERENCE_FILE, ReferenceVectors
from embedding_server.models.tokenizers import load_static_tokenizer, load_tokenizer

__all__ = ["NO_LIMITS", "LoadOptions", "LoadedModel", "load_model"]

logger = logging.getLogger(__name__)

NO_LIMITS = Limits(max_concurrent_requests=2**31, max_queued_tokens=2**63, max_request_tokens=2**63)
"""For a single caller, whose requests may wait."""


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How the models of a process are loaded and run."""

    backend: str
    threads: int
    limits: Limits
    onnx_file: str | None = None
    max_batch_tokens: int | None = None
    matryoshka: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Sizes by the model's served name; they replace those of the catalog."""
    inference_timeout: float | None = None
    """Seconds after which a batch counts as hung; None: never."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that computes, and the reference vectors to check before it is served."""

    info: ModelInfo
    located: LocatedModel
    tokenizer: Tokenizer
    backend: Backend
    references: Sequence[ReferenceVectors]


@dataclass(frozen=True, slots=True)
class _Choice:
    """The backend that was chosen for a model, and what was loaded for it."""

    name: str
    reason: str
    layout: Layout
    backend: Backend
    tokenizer: Tokenizer


def load_model(located: LocatedModel, options: LoadOptions) -> LoadedModel:
    """Load the model in a folder that `hub.verify` has accepted.

    Raises ModelNotSupported, naming the file and what is wrong with it, if no backend that
    ``options`` allow computes the model exactly.
    """
    spec = located.spec
    chosen = _choose(located.folder, options)
    layout, backend, max_tokens = chosen.layout, chosen.backend, chosen.tokenizer.max_tokens
    row = _catalog_row(located)
    files = _weights_files(layout.pipeline, chosen.name, options)
    digests = _digests(files, located)
    digest = digests[0] if len(files) == 1 or chosen.name == "onnx-file" else None
    prompts = _prompts(layout, row)
    layer_norm = row is not None and row.layer_norm
    info = ModelInfo(
        name=spec.served_name,
        architecture=str(layout.pipeline.config.get("model_type", layout.pipeline.body)),
        dims=backend.dims,
        max_tokens=max_tokens,
        pooling=_pooling(layout.pipeline),
        dimensions=_dimensions(spec.served_name, backend.dims, options, row),
        prompts=prompts,
        default_prompt=layout.default_prompt,
        layer_norm=layer_norm,
        backend=chosen.name,
        backend_reason=chosen.reason,
        revision=located.revision,
        sha256=digest,
        fingerprint=fingerprint(
            layout, weights=digests, max_tokens=max_tokens, prompts=prompts, layer_norm=layer_norm
        ),
        created=int(files[0].stat().st_mtime),
        owned_by=spec.repo.partition("/")[0] if spec.repo else "local",
    )
    references = _references(located, row, digest)
    return LoadedModel(info, located, chosen.tokenizer, backend, references)


def _choose(folder: Path, options: LoadOptions) -> _Choice:
    """Load the model in ``folder`` with the first backend that computes it."""
    with _damage_refused(folder):
        layout = read_layout(folder)
    backend_options = BackendOptions(threads=options.threads, onnx_file=options.onnx_file)
    refusals: dict[str, list[str]] = {}
    for name, reason in _candidates(layout.pipeline, options):
        try:
            with _damage_refused(folder):
                if name != "torch":
                    _check_tokenizer_file(layout.pipeline.transformer)
                backend = load_backend(name, layout.pipeline, backend_options)
                tokenizer = _load_tokenizer(layout, backend, any_family=name == "onnx-file")
        except ModelNotSupported as refusal:
            refusals.setdefault(str(refusal), []).append(name)
            continue
        if refusals:
            reason = "; ".join([reason, *_format_refusals(refusals)])
            logger.info("%s runs on %s: %s", folder, name, reason)
        return _Choice(name, reason, layout, backend, tokenizer)
    raise ModelNotSupported(
        "; ".join(refusals if len(refusals) == 1 else _format_refusals(refusals))
    )


@contextmanager
def _damage_refused(folder: Path) -> Iterator[None]:
    """Raise ModelNotSupported for any other error, for damaged files can lead to all of them."""
    try:
        yield
    except ModelNotSupported:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        logger.debug("%s can't be loaded", folder, exc_info=True)
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise ModelNotSupported(f"{folder} can't be loaded: {what}") from error


def _format_refusals(refusals: Mapping[str, Sequence[str]]) -> list[str]:
    return [f"{', '.join(names)}: {reason}" for reason, names in refusals.items()]


def _candidates(pipeline: Pipeline, options: LoadOptions) -> Iterator[tuple[str, str]]:
    """The backends in the order to try them, each with the reason for its place."""
    if options.onnx_file is not None:
        yield "onnx-file", "--onnx-file asks for it"
        return
    if options.backend == "torch":
        yield "torch", "--backend asks for it"
        return
    torch_too = options.backend == "auto" and _torch_installed()
    if torch_too and _gpu_usable():
        yield "torch", "a GPU is there"
    if pipeline.body == "StaticEmbedding":
        yield "static", "its vectors need no graph"
    else:
        yield "onnx", "its graph is built here"
        if any(pipeline.folder.glob("**/model.onnx")):
            yield "onnx-file", "it brings its own graph"
    if torch_too:
        yield "torch", "nothing lighter computes it"


def _torch_installed() -> bool:
    names = ("torch", "sentence_transformers")
    return all(importlib.util.find_spec(name) is not None for name in names)


def _gpu_usable() -> bool:
    """Whether torch finds a GPU; importing torch takes seconds, so first look for a driver."""
    if sys.platform == "darwin":
        return os.uname().machine == "arm64"
    if not (Path("/dev/nvidiactl").exists() or Path("/proc/driver/nvidia/version").exists()):
        return False
    import torch

    return torch.cuda.is_available()


def _check_tokenizer_file(transformer: Path) -> None:
    if not (transformer / "tokenizer.json").is_file():
        raise ModelNotSupported(
            f"{transformer} has no tokenizer.json. Save it with a fast tokenizer: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
        )


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
    """The files of the first module's weights, in the order in which they are read."""
    if backend == "onnx-file":
        from embedding_server.backends.onnx import onnx_model_file

        graph = onnx_model_file(pipeline, options.onnx_file)
        return [graph, *_external_data(graph)]
    single = pipeline.transformer / "model.safetensors"
    if single.is_file():
        return [single]
    return list(dict.fromkeys(t.file for t in Weights.open(pipeline.transformer).values()))


def _external_data(graph: Path) -> list[Path]:
    """The files beside ``graph`` that ``graph`` names, which hold its tensors."""
    with graph.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
        names = (path.relative_to(graph.parent).as_posix() for path in graph.parent.rglob("*"))
        named = [n for n in names if not n.endswith(".onnx") and content.find(n.encode()) >= 0]
    return [graph.parent / name for name in sorted(named) if (graph.parent / name).is_file()]


def _digests(files: Sequence[Path], located: LocatedModel) -> list[str]:
    if located.sha256 and files == [located.folder / "model.safetensors"]:
        return [located.sha256]
    with ThreadPoolExecutor() as pool:
        return list(pool.map(sha256_of, files))


def _references(
    located: LocatedModel, row: CatalogModel | None, digest: str | None
) -> list[ReferenceVectors]:
    """The folder's reference vectors, and the catalog's if its row has the same weights."""
    paths = [located.folder / REFERENCE_FILE]
    if row is not None and row.reference_vectors and digest == row.sha256:
        paths.append(row.reference_vectors)
    return [ReferenceVectors.read(path) for path in paths if path.exists()]


def _catalog_row(located: LocatedModel) -> CatalogModel | None:
    repo = located.spec.repo
    if repo is not None:
        return next((row for row in CATALOG.values() if row.repo == repo), None)
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
    """The folder's prompts over the catalog's; an empty one in the folder replaces nothing."""
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
