# SPDX-License-Identifier: MIT OR Apache-2.0
"""A server of the benchmark's own: a child process on a free loopback port, stopped by its pid."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from embedding_server.errors import ConfigurationError
from embedding_server.settings import Row, rows

__all__ = ["ServerProcess", "own_server"]

_HOST = "127.0.0.1"
_STOP_SECONDS = 30.0
_SECRETS = ("api_key", "hf_token")


@dataclass(frozen=True, slots=True)
class ServerProcess:
    """Where it listens, and which process it is."""

    url: str
    pid: int


@contextmanager
def own_server(flags: Mapping[str, object], config: Path | None) -> Iterator[ServerProcess]:
    """``embedding-server serve`` with the settings ``flags``, ready while the body runs.

    Raises ConfigurationError with the end of the server's log if it doesn't get ready.
    """
    with tempfile.TemporaryFile() as log:
        port = _free_port()
        command = [sys.executable, "-m", "embedding_server.cli", "serve"]
        command += ["--host", _HOST, "--port", str(port), *_arguments(flags)]
        if config is not None:
            command += ["--config", str(config)]
        # SIGTERM must stop the server, too.
        before = signal.signal(signal.SIGTERM, _exit)
        process = None
        try:
            # Its output goes to a file, as a service's would, and is only read if it fails.
            process = subprocess.Popen(  # noqa: S603
                command, env={**os.environ, **_variables(flags)}, stdout=log, stderr=log
            )
            if not _becomes_ready(process, port):
                log.seek(0)
                told = log.read().decode(errors="replace").strip().splitlines()
                raise ConfigurationError(
                    "The server to be measured ended before it was ready: "
                    + (told[-1].removeprefix("embedding-server: ") if told else "it said nothing.")
                )
            yield ServerProcess(f"http://{_HOST}:{port}", process.pid)
        finally:
            if process is not None:
                _stop(process)
            signal.signal(signal.SIGTERM, before)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind((_HOST, 0))
        return int(listener.getsockname()[1])


def _arguments(flags: Mapping[str, object]) -> Iterator[str]:
    for row, value in _given(flags):
        if row.kind == "switch":
            yield row.flag if value else "--no-" + row.flag.removeprefix("--")
        elif row.name not in _SECRETS:
            for single in value if isinstance(value, list) else [value]:
                yield f"{row.flag}={single}"


def _variables(flags: Mapping[str, object]) -> dict[str, str]:
    """Secrets, which everyone on the machine could read in a command line."""
    return {
        row.env: ",".join(value) if isinstance(value, list) else str(value)
        for row, value in _given(flags)
        if row.name in _SECRETS
    }


def _given(flags: Mapping[str, object]) -> Iterator[tuple[Row, object]]:
    return ((row, flags[row.name]) for row in rows() if row.name in flags)


def _becomes_ready(process: subprocess.Popen[bytes], port: int) -> bool:
    """Wait, through a download if need be, until it can embed or has ended."""
    while process.poll() is None:
        connection = http.client.HTTPConnection(_HOST, port, timeout=10)
        try:
            connection.request("GET", "/health/ready")
            if connection.getresponse().status == 200:
                return True
        except (OSError, http.client.HTTPException):
            pass  # it doesn't listen yet
        finally:
            connection.close()
        time.sleep(0.05)
    return False
