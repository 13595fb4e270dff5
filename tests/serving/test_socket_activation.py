# SPDX-License-Identifier: MIT OR Apache-2.0
"""A listening socket that another process hands over, as systemd does."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from in_process import until
from live import environment, handed_over, running_server, under_way, workers_of

from embedding_server.serving.servers.base import SERVERS

MODEL = "all-MiniLM-L6-v2"
BODY = {"model": MODEL, "input": "iPhone"}


@contextmanager
def tcp() -> Iterator[tuple[socket.socket, str]]:
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        yield listener, f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize(("name", "workers"), [*((name, 1) for name in SERVERS), ("uvicorn", 2)])
def test_nothing_is_refused_during_a_restart(name: str, workers: int) -> None:
    """What comes in between waits in the socket; so does what comes while the first drains."""
    arguments = ("--model", MODEL, "--server", name, "--workers", f"{workers}")
    with tcp() as (listener, url), ThreadPoolExecutor(2) as pool:
        with running_server(*arguments, listener=listener) as first:
            assert f"listening on {url} " in first.log
            until(lambda: workers == 1 or first.log.count("is ready (process") == workers)
            assert httpx.post(f"{url}/v1/embeddings", json=BODY).status_code == 200
            for pid in (first.process.pid, *(workers_of(first) if workers > 1 else ())):
                environ = Path(f"/proc/{pid}/environ").read_bytes()
                assert pid == first.process.pid or b"LISTEN_" not in environ
            if workers == 1:  # of several one would be enough to hold it up, and which is chance
                with under_way(first) as answer:
                    first.process.terminate()
                    until(lambda: "draining" in first.log)
                    waiting = pool.submit(httpx.get, f"{url}/health/live", timeout=60)
                    assert answer.result().status_code == 200
                first.process.wait(20)
            assert first.stop() == 0
        between = pool.submit(httpx.get, f"{url}/health/live", timeout=60)
        with running_server(*arguments, listener=listener) as second:
            until(lambda: workers == 1 or second.log.count("is ready (process") == workers)
            assert between.result().status_code == 200
            assert workers > 1 or waiting.result().status_code == 200
            assert httpx.post(f"{url}/v1/embeddings", json=BODY).status_code == 200


@pytest.mark.parametrize("name", SERVERS)
def test_a_unix_socket_that_is_handed_over_stays(name: str, tmp_path: Path) -> None:
    file = tmp_path / "http.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(file))
        listener.listen()
        arguments = ("--model", MODEL, "--server", name)
        with running_server(*arguments, listener=listener, wait=False) as server:
            transport = httpx.HTTPTransport(uds=str(file))
            with httpx.Client(transport=transport, base_url="http://a", timeout=60) as client:
                until(lambda: client.get("/health/ready").status_code == 200)
                assert client.post("/v1/embeddings", json=BODY).status_code == 200
            assert f"listening on unix:{file} " in server.log
            assert server.stop() == 0
        assert file.is_socket()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has such sockets")
def test_a_unix_socket_without_a_file(tmp_path: Path) -> None:
    name = f"embedding-server-{tmp_path}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(b"\0" + name.encode() + b"\xff")  # of any bytes
        listener.listen()
        with running_server("--model", MODEL, listener=listener, wait=False) as server:
            assert f"listening on unix:@{name}\\xff " in server.log
            assert server.stop() == 0


def test_tls(tmp_path: Path) -> None:
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            *("-days", "2", "-subj", "/CN=a", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", tmp_path / "key.pem", "-out", tmp_path / "cert.pem"),
        ],
        check=True,
        capture_output=True,
    )
    files = ("--tls-cert", f"{tmp_path}/cert.pem", "--tls-key", f"{tmp_path}/key.pem")
    with (
        tcp() as (listener, url),
        running_server("--model", MODEL, *files, listener=listener, wait=False) as server,
    ):
        assert server.url == url.replace("http:", "https:")


def refused(*arguments: str, sockets: list[socket.socket]) -> str:
    """What a server says that doesn't take ``sockets``."""
    command = [sys.executable, "-m", "embedding_server.cli", "serve", "--model", MODEL]
    done = subprocess.run(
        handed_over(sockets, [*command, *arguments]),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        pass_fds=[each.fileno() for each in sockets],
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return done.stderr


def test_what_can_not_be_served_on_is_refused_by_name(tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        datagrams.bind(("127.0.0.1", 0))
        message = refused(sockets=[datagrams])
        assert "(socket0) is no stream: the socket unit needs ListenStream=" in message
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert "doesn't listen: the socket unit needs Accept=no" in refused(sockets=[theirs])
    with tcp() as (first, _), tcp() as (second, _):
        message = refused(sockets=[first, second])
        assert "2 sockets are handed over (socket0:socket1), and one is served" in message


@pytest.mark.parametrize("flag", ["--port=0", "--host=0.0.0.0", "--uds=here.sock"])
def test_an_address_of_its_own_is_refused(flag: str) -> None:
    name = flag.partition("=")[0]
    with tcp() as (listener, url):
        message = refused(flag, sockets=[listener])
    assert f"{name} is set, but the socket to listen on is handed over" in message
    assert f"{url}: leave {name} out" in message


def test_descriptors_for_another_process_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a shell's, which a server that is started from it inherits."""
    monkeypatch.setenv("LISTEN_PID", "1")
    monkeypatch.setenv("LISTEN_FDS", "1")
    with running_server("--model", MODEL) as server:
        assert httpx.post(f"{server.url}/v1/embeddings", json=BODY).status_code == 200
