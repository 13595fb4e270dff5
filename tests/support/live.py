# SPDX-License-Identifier: MIT OR Apache-2.0
"""A real server process on a free loopback port, as a user would start it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

START_SECONDS = 60.0

_MODEL = "all-MiniLM-L6-v2"


@dataclass(frozen=True)
class LiveServer:
    """A running server: where it listens, its process, and what it has logged."""

    url: str
    process: subprocess.Popen[bytes]
    log_file: Path

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def stop(self) -> int:
        """End it with SIGTERM; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


def free_port() -> int:
    """A port of loopback that is free now, for a program that needs a number."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without settings of ours, and with no way to a real hub."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("EMBEDDING_SERVER_", "HF_"))}
    return {**kept, "HF_HUB_OFFLINE": "1", **(extra or {})}


def interruptible(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """Start ``command`` with SIGINT as in a terminal: a shell's background jobs ignore it."""
    return subprocess.Popen(
        command, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options
    )


@contextmanager
def running_server(
    *arguments: str,
    env: Mapping[str, str] | None = None,
    wait: bool = True,
    python: Sequence[str] = (sys.executable,),
    program: Sequence[str] = ("-m", "embedding_server.cli"),
    cwd: Path | None = None,
    listener: socket.socket | None = None,
) -> Iterator[LiveServer]:
    """``embedding-server serve`` with ``arguments``; with ``wait``, ready before the body runs.

    It listens on ``listener``, handed over as systemd does it, or else on a free port.
    """
    with tempfile.TemporaryDirectory() as folder:
        log_file = Path(folder) / "server.log"
        command = [*python, *program, "serve", *(() if listener else ("--port", "0")), *arguments]
        if listener:
            command = handed_over([listener], command)
        with log_file.open("wb") as log:
            process = subprocess.Popen(
                command,
                cwd=cwd,
                env=environment(env),
                stdout=log,
                stderr=log,
                pass_fds=[listener.fileno()] if listener else [],
            )
        server: LiveServer | None = None
        try:
            server = LiveServer(_address(process, log_file), process, log_file)
            if wait:
                _wait_until_ready(server)
            yield server
        finally:
            if server is not None:
                server.stop()
            elif process.poll() is None:
                process.kill()
                process.wait()


def handed_over(sockets: Sequence[socket.socket], command: Sequence[str]) -> list[str]:
    """``command`` with ``sockets``, which it inherits, as sd_listen_fds(3) says: from 3 on."""
    moved = " ".join(f"{n}<&{s.fileno()}" for n, s in enumerate(sockets, 3))
    names = ":".join(f"socket{n}" for n in range(len(sockets)))
    variables = f"LISTEN_PID=$$ LISTEN_FDS={len(sockets)} LISTEN_FDNAMES={names}"
    return ["bash", "-c", f'exec {moved}; export {variables}; exec "$@"', "-", *command]


def run_cli(
    *arguments: str,
    stdin: bytes = b"",
    env: Mapping[str, str] | None = None,
    timeout: float = 120,
) -> subprocess.CompletedProcess[bytes]:
    """``embedding-server`` with ``arguments``, to its end."""
    command: Sequence[str] = [sys.executable, "-m", "embedding_server.cli", *arguments]
    return subprocess.run(
        command, input=stdin, env=environment(env), capture_output=True, timeout=timeout
    )


def _address(process: subprocess.Popen[bytes], log_file: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        log = log_file.read_text()
        if "listening on " in log:
            return log.partition("listening on ")[2].split()[0]
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}:\n{log}")
        time.sleep(0.02)
    raise RuntimeError(f"the server did not listen:\n{log_file.read_text()}")


def _wait_until_ready(server: LiveServer) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise RuntimeError(f"the server ended:\n{server.log}")
        try:
            if httpx.get(server.url + "/health/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise RuntimeError(f"the server did not get ready:\n{server.log}")


@contextmanager
def under_way(server: LiveServer, seconds: float = 60) -> Iterator[Future[httpx.Response]]:
    """A request that a server of the real model takes a while for, and has begun."""
    body = {"model": _MODEL, "input": [f"{number} " + "a long text " * 60 for number in range(100)]}
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(httpx.post, f"{server.url}/v1/embeddings", json=body, timeout=seconds)
        taken = f'embedding_server_queue_requests{{model="{_MODEL}"}} 1.0'
        while taken not in httpx.get(f"{server.url}/metrics").text:
            assert not answer.done(), "the request was over before it was seen"
            time.sleep(0.005)
        yield answer


def signalled_again(server: LiveServer, number: int) -> bool:
    """Whether it has ended; if not, it is sent another signal to do so."""
    if server.process.poll() is not None:
        return True
    server.process.send_signal(number)
    return False


def resident_mib(server: LiveServer) -> float:
    """Memory that the server's process has now."""
    status = Path(f"/proc/{server.process.pid}/status").read_text(encoding="ascii")
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def sentence(done: subprocess.CompletedProcess[bytes]) -> str:
    """The one line on stderr of a command that failed."""
    assert done.returncode == 1
    assert done.stdout == b""
    log = done.stderr.decode()
    last = log.splitlines()[-1]
    assert last.startswith("embedding-server: ")
    assert log.count("embedding-server: ") == 1
    assert "Traceback" not in log
    return last.removeprefix("embedding-server: ")


def workers_of(server: LiveServer) -> list[int]:
    """The processes of its workers, in the order of their start."""
    pid = server.process.pid
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
