# SPDX-License-Identifier: MIT OR Apache-2.0
"""A process connects to the configured hub and to nothing else.

Each test runs twice: Python's audit events show what Python opens or looks up, and strace, where it
is installed, shows the system calls of native code.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
import tiny_models
from hub_standin import HubStandIn
from in_process import until
from live import environment

import embedding_server

MODEL = "all-MiniLM-L6-v2"

# Variables that make libraries send telemetry, where they have any.
INVITING = {
    "HF_HUB_OFFLINE": "0",
    "FASTAPI_OTEL_AUTO_CONFIGURE": "true",
    "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9",
    "OTEL_TRACES_EXPORTER": "otlp",
    "DO_NOT_TRACK": "0",
}

AUDIT = """
import os, sys

def tell(event, args):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        where = args[1]
        if isinstance(where, tuple):
            print(event, where[0], where[1], file=events, flush=True)
    elif event == "socket.getaddrinfo":
        print(event, args[0], args[1], file=events, flush=True)
    elif event in ("socket.gethostbyname", "socket.gethostbyaddr"):
        print(event, args[0], 0, file=events, flush=True)

events = open(os.environ["AUDIT_FILE"], "a")
sys.addaudithook(tell)
"""

CALL = re.compile(r"(?:connect|sendto|sendmsg|sendmmsg)\(.*?sin6?_port=htons\((\d+)\).*?\"(.*?)\"")


@dataclass(frozen=True)
class Observed:
    """An observed process, and the addresses that it contacted."""

    process: subprocess.Popen[bytes]
    log: Path
    audit: Path
    strace: Path | None

    def reached(self) -> set[tuple[str, int]]:
        """Wait for its end; ``(host, port)`` of all that it connected to, sent to or looked up."""
        if self.strace is not None:
            strace = self.strace  # strace ends after the process that it observes
            end = re.compile(rf"^{self.process.pid} +\+\+\+ exited", re.MULTILINE)
            until(lambda: end.search(strace.read_text()) is not None)
            return {(host, int(port)) for port, host in CALL.findall(strace.read_text())}
        events = [line.split() for line in self.audit.read_text().splitlines()]
        return {(host, int(port) if port.isdecimal() else 0) for _, host, port in events}


def observe(
    folder: Path, *arguments: str, env: Mapping[str, str], traced: bool, stdin: bytes = b""
) -> Observed:
    """Start ``embedding-server`` with ``arguments``."""
    (folder / "sitecustomize.py").write_text(AUDIT)
    audit, log, strace = folder / "audit", folder / "log", folder / "strace"
    audit.touch()
    (folder / "stdin").write_bytes(stdin)
    # -D detaches strace, so that the process keeps its pid.
    tracer = ["strace", "-D", "-f", "-q", "-e", "signal=none"]
    tracer += ["-e", "trace=connect,sendto,sendmsg,sendmmsg,exit_group", "-o", str(strace)]
    command = [sys.executable, "-m", "embedding_server.cli", *arguments]
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    with log.open("wb") as output, (folder / "stdin").open("rb") as input:
        process = subprocess.Popen(
            [*(tracer if traced else []), *command],
            env=environment({**INVITING, "PYTHONPATH": path, "AUDIT_FILE": str(audit), **env}),
            stdin=input,
            stdout=output,
            stderr=output,
        )
    return Observed(process, log, audit, strace if traced else None)


@contextmanager
def ended(observed: Observed) -> Iterator[Observed]:
    try:
        yield observed
    finally:
        if observed.process.poll() is None:
            observed.process.kill()
        observed.process.wait(30)


def served(observed: Observed, model: str) -> None:
    """Wait until ``observed`` serves, use every route, and end it with SIGTERM."""

    def log() -> str:
        assert observed.process.poll() is None, observed.log.read_text()
        return observed.log.read_text()

    until(lambda: "listening on " in log() and "is ready" in log())
    url = log().partition("listening on ")[2].split()[0]
    with httpx.Client(base_url=url, timeout=60) as client:
        until(lambda: log() != "" and client.get("/health/ready").status_code == 200)
        for prefix in ("/v1", "/openai/v1"):
            body = {"model": model, "input": ["river", "x" * 200_000]}
            assert client.post(f"{prefix}/embeddings", json=body).status_code == 200
            assert client.get(f"{prefix}/models/{model}").status_code == 200
        for path in ("/health", "/metrics", "/docs", "/openapi.json", "/nowhere"):
            assert client.get(path).status_code in (200, 404)
    observed.process.send_signal(signal.SIGTERM)
    assert observed.process.wait(60) == 0, observed.log.read_text()


@pytest.fixture(params=["audited", "traced"])
def traced(request: pytest.FixtureRequest) -> bool:
    traced: bool = request.param == "traced"
    if traced and shutil.which("strace") is None:
        pytest.skip("strace is not installed: only what Python itself opens is seen")
    return traced


@pytest.mark.parametrize("server", ["uvicorn", "hypercorn"])
def test_a_server_connects_to_nothing(tmp_path: Path, traced: bool, server: str) -> None:
    arguments = ("serve", "--port", "0", "--model", MODEL, "--server", server)
    with ended(observe(tmp_path, *arguments, env={}, traced=traced)) as observed:
        served(observed, MODEL)
        listening_on = {("127.0.0.1", 0)}  # its own address, looked up to be listened on
        assert observed.reached() <= listening_on


def test_embed_connects_to_nothing(tmp_path: Path, traced: bool) -> None:
    arguments = ("embed", "--model", MODEL)
    texts = b"iPhone\nSamsung\n"
    with ended(observe(tmp_path, *arguments, env={}, traced=traced, stdin=texts)) as observed:
        assert observed.process.wait(60) == 0, observed.log.read_text()
        assert observed.log.read_text().count("embedding") == 2
        assert observed.reached() == set()


def test_a_server_connects_to_the_configured_hub(tmp_path: Path, traced: bool) -> None:
    tiny = tiny_models.make_bert(tmp_path / "tiny").folder
    with HubStandIn({"org/tiny": tiny}) as hub:
        env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
        arguments = ("serve", "--port", "0", "--model", "org/tiny", "--log-level", "debug")
        with ended(observe(tmp_path, *arguments, env=env, traced=traced)) as observed:
            served(observed, "tiny")
            ports = {urlsplit(url).port for url in (hub.url, hub.storage_url)}
            reached = observed.reached()
        assert hub.asked(part="config.json")
    assert {port for _, port in reached} - {0} == ports
    assert {host for host, _ in reached} <= {"127.0.0.1", "localhost", "::1"}


def test_a_connection_is_observed(tmp_path: Path, traced: bool) -> None:
    """A hub at an address without a server is contacted, and the observation shows it."""
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf")}
    arguments = ("serve", "--port", "0", "--model", "org/tiny")
    with ended(observe(tmp_path, *arguments, env=env, traced=traced)) as observed:
        assert observed.process.wait(60) == 1
        assert ("127.0.0.1", 9) in observed.reached()


def test_onnx_runtime_writes_no_telemetry_files(tmp_path: Path) -> None:
    """Its builds store ids and unsent telemetry in files unless telemetry is off.

    They don't if they detect CI, so this process must not look like CI.
    """
    home, temporary = tmp_path / "home", tmp_path / "temporary"
    home.mkdir()
    temporary.mkdir()
    program = "from embedding_server import Embedder; Embedder('all-MiniLM-L6-v2').embed(['a'])"
    kept = ("PATH", "PYTHONPATH")
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={
            **{name: os.environ[name] for name in kept if name in os.environ},
            "HOME": str(home),
            "TMPDIR": str(temporary),
            "HF_HUB_OFFLINE": "1",
        },
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_one_module_imports_onnx_runtime() -> None:
    source = Path(embedding_server.__file__).parent
    loading = [
        path.relative_to(source).as_posix()
        for path in source.rglob("*.py")
        if re.search(r"^\s*(import|from) onnxruntime", path.read_text(encoding="utf-8"), re.M)
    ]
    assert loading == ["backends/runtime.py"]
