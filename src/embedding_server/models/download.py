# SPDX-License-Identifier: MIT OR Apache-2.0
"""A repository of the hub -> a snapshot in the hub cache, by huggingface_hub, with limits.

Whatever goes wrong ends in seconds, as a DownloadFailed that says why and what would help.
huggingface_hub is imported on use: it takes 0.4 s.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import logging
import os
import re
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

from embedding_server.models.client import (
    DownloadFailed,
    bounded_client,
    explained,
    first_answer,
)
from embedding_server.models.repository import documents, lacks, weights
from embedding_server.models.spec import ModelSpec

__all__ = ["download_model"]

_log = logging.getLogger("embedding_server.models")

_ANSWER_SECONDS = 5.0
_REMEMBER_SECONDS = 30.0

_lock = threading.Lock()
_unreachable: dict[str, tuple[float, str]] = {}
"""Hub address -> when and why it last failed, so that three models wait for a dead network once."""


def download_model(
    spec: ModelSpec, cache: Path, *, token: str | None, onnx_file: str | None
) -> Path:
    """The model's snapshot in the hub cache ``cache``; raises DownloadFailed and nothing else."""
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or None
    # One at a time: the client's limits are set for the process, and a snapshot's files are
    # fetched side by side anyway.
    with _lock:
        failed_at, why = _unreachable.get(endpoint or "", (-_REMEMBER_SECONDS, ""))
        if time.monotonic() - failed_at < _REMEMBER_SECONDS:
            raise DownloadFailed(why)
        try:
            with bounded_client():
                return _fetch(spec, cache, token, onnx_file, endpoint)
        except Exception as error:
            _log.debug("the download of %s failed", spec.name, exc_info=True)
            told = explained(error, spec, cache)
            if told.unreachable:
                _unreachable[endpoint or ""] = (time.monotonic(), told.reason)
            raise told from None


def _fetch(
    spec: ModelSpec, cache: Path, token: str | None, onnx_file: str | None, endpoint: str | None
) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, hf_hub_url, snapshot_download
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    repo, started = str(spec.repo), time.monotonic()
    info = first_answer(
        lambda: HfApi(endpoint=endpoint, token=token).model_info(
            repo, revision=spec.revision, timeout=_ANSWER_SECONDS, files_metadata=True
        )
    )
    files = {file.rfilename: file for file in info.siblings or ()}
    for name in files:
        _check_name(name, repo)
    if lacking := lacks(files, onnx_file):
        advice = "give a repository that has it"
        if lacking == "model.safetensors" and "pytorch_model.bin" in files:
            advice = "save its pytorch_model.bin, a pickle, as safetensors and give that folder"
        raise DownloadFailed(f"the hub's repository {repo} has no {lacking}", advice)
    small, large = documents(files), weights(files, onnx_file)
    # A terminal shows bars instead.
    level = logging.DEBUG if sys.stderr is not None and sys.stderr.isatty() else logging.INFO
    megabytes = sum(files[name].size or 0 for name in (*small, *large)) / 1e6
    _log.log(level, "downloading %s, %.1f MB, to %s", spec.title, megabytes, cache)

    # The weights come last, so that a snapshot that has them has all the rest.
    snapshot = Path(
        snapshot_download(
            repo,
            revision=spec.revision or "main",
            cache_dir=cache,
            endpoint=endpoint,
            token=token,
            allow_patterns=[glob.escape(name) for name in small],
            tqdm_class=_terminal_bar(),
        )
    )
    storage, commit = snapshot.parent.parent, snapshot.name
    for name in large:
        lfs = files[name].lfs
        # The digest becomes a file's name, and so must be one.
        known = lfs is not None and re.fullmatch("[0-9a-f]{64}", lfs.sha256) is not None
        if lfs is not None and known and not (snapshot / name).is_file():
            url = hf_hub_url(repo, name, revision=commit, endpoint=endpoint)
            headers = {**build_hf_headers(token=token), "Accept-Encoding": "identity"}
            _fetch_large(url, headers, storage, lfs.sha256, lfs.size, name=name)
        hf_hub_download(
            repo, name, revision=commit, cache_dir=cache, endpoint=endpoint, token=token
        )
    for name in (*small, *large):
        if not (snapshot / name).is_file():
            raise DownloadFailed(f"the download from the hub left out {name}", "try again")
    _log.log(level, "downloaded %s in %.1f s", spec.name, time.monotonic() - started)
    return snapshot


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
        with part.open("a+b") as file:
            if (have := file.tell()) < size:
                if shutil.disk_usage(storage).free < size - have:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(storage))
                http_get(
                    url,
                    file,
                    resume_size=have,
                    headers=headers,
                    expected_size=size,
                    displayed_filename=name,
                )
            file.seek(0)
            whole = hashlib.file_digest(file, "sha256").hexdigest() == sha256
        if not whole:
            part.unlink()
            raise DownloadFailed(f"what the hub sent as {name} was damaged", "try again")
        part.replace(blob)


def _terminal_bar() -> type[Any]:
    """huggingface_hub's progress bar, shown on a terminal only, as all its others are."""
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    class Bar(tqdm):
        def __init__(self, *args: Any, disable: bool | None = None, **options: Any) -> None:
            super().__init__(*args, disable=disable, **options)  # type: ignore[no-untyped-call]

    return Bar


def _check_name(name: str, repo: str) -> None:
    parts = re.split(r"[/\\]", name)
    if ".." in parts or "" in parts or ":" in parts[0] or "\0" in name:
        raise DownloadFailed(
            f"the hub's repository {repo} lists a file outside of itself ({name!r})",
            "give another repository, for this one is not to be trusted",
        )
