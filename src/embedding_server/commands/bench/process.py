# SPDX-License-Identifier: MIT OR Apache-2.0
"""A server for the benchmark: a child process on a free loopback port."""

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

from embedding_server.errors import ConfigurationError
from embedding_server.settings import rows

__all__ = ["ServerProcess", "own_server"]

_HOST = "127.0.0.1"
_STOP_SECONDS = 30.0
_SECRETS = ("api_key", "hf_token")


@dataclass(frozen=True, slots=True)
class ServerProcess:
    """The address and the process of a server."""

    url: str
    pid: int


@contextmanager
def own_server(flags: Mapping[str, object], config: Path | None) -> Iterator[ServerProcess]:
    """Run ``embedding-server serve`` with the settings ``flags``; it is ready when the body starts.

    Raises ConfigurationError with the end of the server's log if it ends before it is ready.
    """
    with tempfile.TemporaryFile() as log:
        port = _free_port()
        arguments, variables = _command_line(flags)
        command = [sys.executable, "-m", "embedding_server.cli", "serve", *arguments]
        command += ["--host", _HOST, "--port", str(port)]
        if config is not None:
            command += ["--config", str(config)]
        # SIGTERM must stop the server, too, so it becomes SystemExit.
        before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        process = None
        try:
            # The log goes to a file, as that of a service, and is only read after a failure.
            process = subprocess.Popen(  # noqa: S603
                command, env={**os.environ, **variables}, stdout=log, stderr=log
            )
            if not _becomes_ready(process, port):
                log.seek(0)
                lines = log.read().decode(errors="replace").strip().splitlines() or ["no log."]
                reason = lines[-1].removeprefix("embedding-server: ")
                raise ConfigurationError(
                    f"The server to be measured ended before it was ready: {reason}"
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


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind((_HOST, 0))
        return int(listener.getsockname()[1])


def _command_line(flags: Mapping[str, object]) -> tuple[list[str], dict[str, str]]:
    """The settings ``flags`` as arguments, and secrets as environment variables.

    Everyone on the machine can read a command line.
    """
    arguments: list[str] = []
    variables: dict[str, str] = {}
    for row in rows():
        if row.name not in flags:
            continue
        value = flags[row.name]
        values = value if isinstance(value, list) else [value]
        if row.kind == "switch":
            arguments.append(row.flag if value else "--no-" + row.flag.removeprefix("--"))
        elif row.name in _SECRETS:
            variables[row.env] = ",".join(map(str, values))
        else:
            arguments += [f"{row.flag}={single}" for single in values]
    return arguments, variables


def _becomes_ready(process: subprocess.Popen[bytes], port: int) -> bool:
    """Wait until the server is ready or has ended; it may download the model first."""
    while process.poll() is None:
        connection = http.client.HTTPConnection(_HOST, port, timeout=10)
        try:
            connection.request("GET", "/health/ready")
            if connection.getresponse().status == 200:
                return True
        except (OSError, http.client.HTTPException):
            pass  # the server doesn't listen yet
        finally:
            connection.close()
        time.sleep(0.05)
    return False
