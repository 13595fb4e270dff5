# SPDX-License-Identifier: MIT OR Apache-2.0
"""The process that downloads one model: a DownloadRequest on stdin, its outcome on stdout.

It writes JSON lines: ``started`` when it is about to ask the hub, ``megabytes`` as soon as the hub
has listed the repository, and at the end either ``snapshot`` or ``reason``, ``fix``,
``unreachable`` and ``traceback``.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import shutil
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from huggingface_hub import HfApi, constants, get_session, hf_hub_url, set_client_factory
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    WeakFileLock,
    build_hf_headers,
    hf_raise_for_status,
    tqdm,
)

from embedding_server.models.download import DownloadFailed, DownloadRequest
from embedding_server.models.repository import documents, lacks, weights

__all__ = ["fetch", "main"]

_ANSWER_SECONDS = 5.0
_CONNECT_SECONDS = 3.0
_STALL_SECONDS = 10.0
"""Or HF_HUB_DOWNLOAD_TIMEOUT, if that is longer."""
_TRIES = 3
_CHUNK_BYTES = 2**20


def main() -> None:
    """Do the download that is requested on stdin, unless stdin ends before."""
    request = DownloadRequest(**json.loads(sys.stdin.readline()))
    _report(started=True)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    try:
        _report(snapshot=str(fetch(request)))
    except DownloadFailed as failure:
        _report(**vars(failure), traceback=traceback.format_exc())


def fetch(request: DownloadRequest) -> Path:
    """The model's snapshot in the hub cache; raises DownloadFailed and nothing else."""
    try:
        _limit_client()
        return _fetch(request)
    except Exception as error:
        raise _explain(error, request) from error


def _exit_with_parent() -> None:
    # Not sys.stdin.read(), which would hold a lock that the interpreter needs at its end.
    os.read(0, 1)
    os._exit(1)


def _report(**message: object) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def _limit_client() -> None:
    """Limit each request's time and number of tries; huggingface_hub has no such settings."""
    patience = max(_STALL_SECONDS, constants.HF_HUB_DOWNLOAD_TIMEOUT)
    tries: Counter[tuple[str, str, str | None]] = Counter()

    def key(request: Any) -> tuple[str, str, str | None]:
        # A resumed download asks for another range: only tries without progress are counted.
        return request.method, str(request.url), request.headers.get("range")

    def before(request: Any) -> None:
        tries[key(request)] += 1
        if tries[key(request)] > _TRIES:
            raise DownloadFailed(f"the hub failed {_TRIES} times in a row")
        limits = request.extensions.setdefault("timeout", {})
        read = min(limits.get("read") or patience, patience)
        limits.update(connect=_CONNECT_SECONDS, read=read, write=read, pool=read)

    def after(response: Any) -> None:
        status = response.status_code
        if status == 429:
            raise DownloadFailed(
                "the hub takes no more requests from here for now (429)",
                "try again in some minutes, or set HF_TOKEN or --hf-token for a higher limit",
            )
        if status >= 500:
            response.headers.pop("retry-after", None)  # huggingface_hub would wait that long
            if tries[key(response.request)] >= _TRIES:
                raise DownloadFailed(f"the hub failed {_TRIES} times in a row ({status})")

    hooks: dict[str, list[Callable[[Any], None]]] = {"request": [before], "response": [after]}
    client = type(get_session())
    set_client_factory(lambda: client(event_hooks=hooks, follow_redirects=True))


def _fetch(request: DownloadRequest) -> Path:
    repo = request.repo
    api = HfApi(endpoint=request.endpoint, token=request.token)
    info = api.model_info(
        repo, revision=request.revision, timeout=_ANSWER_SECONDS, files_metadata=True
    )
    files = {file.rfilename: file for file in info.siblings or ()}
    for name in files:
        _check_name(name, repo)
    if lacking := lacks(files, request.onnx_file):
        advice = "give a repository that has it"
        if lacking == "model.safetensors" and "pytorch_model.bin" in files:
            advice = "save its pytorch_model.bin, a pickle, as safetensors and give that folder"
        raise DownloadFailed(f"the hub's repository {repo} has no {lacking}", advice)
    small, large = documents(files), weights(files, request.onnx_file)
    _report(megabytes=sum(files[name].size or 0 for name in (*small, *large)) / 1e6)

    # The weights come last, so that a snapshot that has them has all the rest.
    snapshot = Path(
        api.snapshot_download(
            repo,
            revision=request.revision or "main",
            cache_dir=request.cache,
            allow_patterns=[glob.escape(name) for name in small],
        )
    )
    storage, commit = snapshot.parent.parent, snapshot.name
    for name in large:
        lfs = files[name].lfs
        # The digest becomes a file's name, and so must be one.
        if lfs and re.fullmatch("[0-9a-f]{64}", lfs.sha256) and not (snapshot / name).is_file():
            url = hf_hub_url(repo, name, revision=commit, endpoint=request.endpoint)
            _fetch_large(url, request.token, storage, lfs.sha256, size=lfs.size, name=name)
        api.hf_hub_download(repo, name, revision=commit, cache_dir=request.cache)
    for name in (*small, *large):
        if not (snapshot / name).is_file():
            raise DownloadFailed(f"the download from the hub left out {name}", "try again")
    return snapshot


def _check_name(name: str, repo: str) -> None:
    parts = re.split(r"[/\\]", name)
    if ".." in parts or "" in parts or ":" in parts[0] or "\0" in name:
        raise DownloadFailed(
            f"the hub's repository {repo} lists a file outside of itself ({name!r})",
            "give another repository, for this one is not to be trusted",
        )


def _fetch_large(
    url: str, token: str | None, storage: Path, sha256: str, *, size: int, name: str
) -> None:
    """Put one large file into the cache, resuming what an earlier run has left.

    huggingface_hub resumes within a run only: at its end it deletes an incomplete file.
    """
    blob = storage / "blobs" / sha256
    part = blob.with_name(f"{sha256}.part")
    lock = storage.parent / ".locks" / storage.name / f"{sha256}.lock"  # as huggingface_hub's
    blob.parent.mkdir(parents=True, exist_ok=True)
    lock.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.exists():
            return
        with part.open("a+b") as file:
            if shutil.disk_usage(storage).free < size - file.tell():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(storage))
            _append(file, url, token, size=size, name=name)
            file.seek(0)
            whole = hashlib.file_digest(file, "sha256").hexdigest() == sha256
        if not whole:
            part.unlink()
            raise DownloadFailed(f"what the hub sent as {name} was damaged", "try again")
        part.replace(blob)


def _append(file: BinaryIO, url: str, token: str | None, *, size: int, name: str) -> None:
    """Append the rest of ``url`` to ``file``; the client's limit of tries ends this loop."""
    headers = {**build_hf_headers(token=token), "Accept-Encoding": "identity"}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    bar = tqdm(  # type: ignore[no-untyped-call]
        desc=name, total=size, initial=file.tell(), unit="B", unit_scale=True
    )
    with bar:
        while (start := file.tell()) < size:
            rest = {"Range": f"bytes={start}-"} if start else {}
            try:
                with get_session().stream(
                    "GET", url, headers=headers | rest, timeout=timeout
                ) as response:
                    hf_raise_for_status(response)
                    if response.status_code != 206:  # the whole file, whatever the range
                        file.seek(0)
                        file.truncate()
                    for chunk in response.iter_bytes(_CHUNK_BYTES):
                        file.write(chunk)
                        bar.update(len(chunk))
            except Exception as error:
                if not _is_transport_error(error) and _status_of(error) < 500:
                    raise
                time.sleep(1)


def _is_transport_error(error: BaseException) -> bool:
    """Whether ``error`` is of httpx or httpx2: huggingface_hub's version decides which of them."""
    return type(error).__module__ in ("httpx", "httpx2")


def _status_of(error: BaseException) -> int:
    """The status of the response that raised ``error``; 0 without one."""
    return int(getattr(getattr(error, "response", None), "status_code", 0))


def _explain(error: Exception, request: DownloadRequest) -> DownloadFailed:
    """Any failure of a download as a reason and a fix."""
    cause: BaseException = error
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        cause = error.__cause__  # the error itself only says that the cache has no copy either
    if isinstance(cause, DownloadFailed):
        return cause
    repo, status = request.repo, _status_of(cause)
    grant = "set HF_TOKEN or --hf-token to a token that may read it"
    if isinstance(cause, GatedRepoError) or status == 403:
        return DownloadFailed(
            f"the hub keeps {repo} behind a licence or other permission ({status})",
            f"accept the licence on the hub's page of {repo} and {grant}",
        )
    if isinstance(cause, RevisionNotFoundError):
        return DownloadFailed(
            f"the hub's repository {repo} has no revision {request.revision or 'main'}",
            "give a branch, a tag or a commit that it has",
        )
    if status in (401, 404):
        return DownloadFailed(
            f"the hub shows no repository {repo} to this user ({status})",
            f"check the name, or, if it is private, {grant}",
        )
    if status:
        return DownloadFailed(f"the hub answered with an error ({status})")
    if isinstance(cause, OSError) and cause.errno is not None:
        return DownloadFailed(
            f"the download could not be written to {cause.filename or request.cache} "
            f"({cause.strerror})",
            "free space or allow writing there, or set HF_HOME to another folder",
        )
    first_line = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
    if _is_transport_error(cause):
        return DownloadFailed(f"the hub is not reachable ({first_line})", unreachable=True)
    return DownloadFailed(f"the download from the hub failed ({first_line})")


if __name__ == "__main__":
    main()
