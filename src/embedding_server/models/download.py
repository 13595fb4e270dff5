# SPDX-License-Identifier: MIT OR Apache-2.0
"""Downloads a model into the hub cache, in a child process that runs `models.fetch`.

huggingface_hub takes its limits from the environment and from settings of the whole process; only
a process made for one download can have them without changing this one.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from embedding_server.models.spec import ModelSpec

__all__ = ["DownloadFailed", "DownloadRequest", "download_model"]

_log = logging.getLogger("embedding_server.models")

_FIRST_ANSWER_SECONDS = 10.0
"""Until the hub has listed the repository: resolving its name and address has no other limit."""
_REMEMBER_SECONDS = 30.0

_unreachable: dict[str, tuple[float, str]] = {}
"""Hub address -> when and why it last failed, so that three models wait for a dead network once."""


@dataclass(frozen=True, slots=True)
class DownloadRequest:
    """What the child process is to download; it is sent as JSON."""

    repo: str
    revision: str | None
    cache: str
    onnx_file: str | None
    token: str | None
    endpoint: str | None


class DownloadFailed(Exception):
    """Why a download failed, and what would help, if not the usual advice."""

    def __init__(self, reason: str, fix: str | None = None, *, unreachable: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.fix = fix
        self.unreachable = unreachable


def download_model(
    spec: ModelSpec, cache: Path, *, token: str | None, onnx_file: str | None
) -> Path:
    """The model's snapshot in the hub cache ``cache``; raises DownloadFailed."""
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/")
    failed_at, reason = _unreachable.get(endpoint, (-_REMEMBER_SECONDS, ""))
    if time.monotonic() - failed_at < _REMEMBER_SECONDS:
        raise DownloadFailed(reason)
    request = DownloadRequest(
        repo=str(spec.repo),
        revision=spec.revision,
        cache=str(cache),
        onnx_file=onnx_file,
        token=token,
        endpoint=endpoint or None,
    )
    started = time.monotonic()
    try:
        snapshot = _run_child(request, spec)
    except DownloadFailed as failure:
        if failure.unreachable:
            _unreachable[endpoint] = (time.monotonic(), failure.reason)
        raise
    except OSError as error:
        raise DownloadFailed(f"the process that downloads failed ({error})") from error
    _log.log(_level(), "downloaded %s in %.1f s", spec.name, time.monotonic() - started)
    return snapshot


def _run_child(request: DownloadRequest, spec: ModelSpec) -> Path:
    outcome: dict[str, Any] = {}
    silent = threading.Event()
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "embedding_server.models.fetch"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=_child_environment(),
        text=True,
        start_new_session=True,  # Ctrl-C ends this process, and so the child's standard input
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None

        def give_up() -> None:
            silent.set()
            child.kill()

        child.stdin.write(json.dumps(asdict(request)) + "\n")
        child.stdin.flush()
        limit = threading.Timer(_FIRST_ANSWER_SECONDS, give_up)
        limit.daemon = True
        for line in child.stdout:
            message = _message(line)
            if "started" in message:  # the time before is this machine's, not the hub's
                limit.start()
                continue
            if not message:
                continue
            limit.cancel()
            outcome = message
            if "megabytes" in outcome:
                size = outcome["megabytes"]
                _log.log(
                    _level(), "downloading %s, %.1f MB, to %s", spec.title, size, request.cache
                )
        limit.cancel()
    if "snapshot" in outcome:
        return Path(outcome["snapshot"])
    if "reason" in outcome:
        _log.debug("the download of %s failed\n%s", spec.name, outcome.pop("traceback"))
        raise DownloadFailed(**outcome)
    if silent.is_set() and not outcome:
        raise DownloadFailed(
            f"the hub gave no answer within {_FIRST_ANSWER_SECONDS:.0f} s", unreachable=True
        )
    raise DownloadFailed(f"the process that downloads ended with status {child.returncode}")


def _message(line: str) -> dict[str, Any]:
    """What the child reports; empty for a line that anything else has written there."""
    try:
        message = json.loads(line)
    except ValueError:
        return {}
    return message if isinstance(message, dict) else {}


def _child_environment() -> Mapping[str, str]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "HF_HUB_VERBOSITY": "error",
        # The hub would be sent one request more, with facts about this process.
        "HF_HUB_DISABLE_TELEMETRY": "1",
        # Xet has its own client, with other hosts and without these limits.
        "HF_HUB_DISABLE_XET": "1",
    }
    if not _on_terminal():
        environment["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    return environment


def _on_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def _level() -> int:
    """A terminal shows progress bars instead of log lines."""
    return logging.DEBUG if _on_terminal() else logging.INFO
