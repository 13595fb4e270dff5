# SPDX-License-Identifier: MIT OR Apache-2.0
"""What is reported to a service manager, by a real datagram socket in its place."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fake_backends import RELEASE
from faulty_server import PROGRAM
from faulty_workers import PROGRAM as BROKEN
from in_process import SECONDS, until
from live import running_server, under_way

from embedding_server.serving.notify import Notifier

MODEL = "all-MiniLM-L6-v2"


class ServiceManager:
    """The manager's end."""

    def __init__(self, address: str) -> None:
        self.environment = {"NOTIFY_SOCKET": address}
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(f"\0{address[1:]}" if address[0] == "@" else address)
        self.socket.settimeout(SECONDS)

    def next(self) -> list[str]:
        """The lines of the next datagram."""
        return self.socket.recv(4096).decode().split("\n")

    def until(self, line: str) -> list[str]:
        """All lines that come before a datagram that begins with ``line``."""
        lines: list[str] = []
        while (datagram := self.next())[0] != line:
            lines += datagram
        return lines


@pytest.fixture
def manager(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[ServiceManager]:
    """At a file, or with the parameter ``@`` at a name that is none."""
    manager = ServiceManager(f"{getattr(request, 'param', '')}{tmp_path}/notify")
    with manager.socket:
        yield manager


@pytest.mark.parametrize(
    ("manager", "workers"),
    [("", 1), ("@", 2)],
    indirect=["manager"],
    ids=["one process", "workers"],
)
def test_from_start_to_end(manager: ServiceManager, workers: int) -> None:
    arguments = ("--model", MODEL, "--workers", f"{workers}")
    with running_server(*arguments, env=manager.environment, wait=False) as server:
        assert manager.next() == [f"STATUS=loading models; listening on {server.url}"]
        assert manager.next() == ["READY=1", f"STATUS=serving on {server.url}"]
        assert httpx.get(f"{server.url}/health/ready").status_code == 200
        if workers > 1:
            assert server.log.count("is ready (process") == workers
        server.process.send_signal(signal.SIGHUP)
        assert manager.next()[0] == "RELOADING=1"
        assert manager.next() == ["READY=1"]
        with under_way(server) as answer:
            server.process.terminate()
            assert manager.next()[0] == "STOPPING=1"
            assert answer.result().status_code == 200
        server.process.wait(20)
    manager.socket.setblocking(False)
    with pytest.raises(BlockingIOError):  # nor do workers tell anything
        manager.next()


def test_a_reload_that_fails_is_over(manager: ServiceManager) -> None:
    """A manager that waited for its end would give the server up."""
    notifier = Notifier(manager.environment["NOTIFY_SOCKET"])
    notifier.ready()
    with pytest.raises(ZeroDivisionError), notifier.reloading():
        raise ZeroDivisionError
    assert [manager.next()[0] for _ in range(3)] == ["READY=1", "RELOADING=1", "READY=1"]


def test_the_watchdog_hears_nothing_when_an_engine_has_died(
    manager: ServiceManager, tiny_model: Path
) -> None:
    env = {**manager.environment, "WATCHDOG_USEC": "100000"}
    flags = ("--model", str(tiny_model))
    with running_server(*flags, env=env, program=BROKEN, wait=False) as server:
        manager.until("READY=1")
        manager.until("WATCHDOG=1")
        body = {"model": "tiny", "input": "iPhone"}
        assert httpx.post(f"{server.url}/v1/embeddings", json=body).status_code == 503
        assert httpx.get(f"{server.url}/health/live").status_code == 503
        until(lambda: silent(manager))


def silent(manager: ServiceManager) -> bool:
    """Whether nothing comes for a while."""
    manager.socket.settimeout(0.5)
    try:
        manager.next()
    except TimeoutError:
        return True
    return False


def test_it_is_not_ready_before_its_models_are(manager: ServiceManager, tmp_path: Path) -> None:
    """Also when a signal comes meanwhile."""
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    flags = ("--model", str(tmp_path))
    with running_server(*flags, env=manager.environment, wait=False) as server:
        server.process.send_signal(signal.SIGHUP)
        assert server.process.wait(60) == 1
    manager.socket.setblocking(False)
    assert manager.next()[0].startswith("STATUS=loading models")
    assert manager.next()[0] == "STOPPING=1"


def test_the_watchdog_hears_nothing_while_a_batch_hangs(
    manager: ServiceManager, tmp_path: Path
) -> None:
    """As long as /health/live would be 503."""
    release = tmp_path / "release"
    env = {**manager.environment, "WATCHDOG_USEC": "100000", RELEASE: str(release)}
    flags = ("--model", MODEL, "--threads", "1", "--inference-timeout", "0.3")
    with running_server(*flags, env=env, program=PROGRAM, wait=False) as server:
        manager.until("READY=1")
        for _ in range(3):
            manager.until("WATCHDOG=1")
        body = {"model": MODEL, "input": "please wait"}
        assert httpx.post(f"{server.url}/v1/embeddings", json=body).status_code == 503
        assert httpx.get(f"{server.url}/health/live").status_code == 503
        until(lambda: silent(manager))
        release.touch()
        manager.socket.settimeout(SECONDS)
        manager.until("WATCHDOG=1")
        assert httpx.get(f"{server.url}/health/live").status_code == 200


def test_the_watchdog_of_another_process(manager: ServiceManager) -> None:
    env = {**manager.environment, "WATCHDOG_USEC": "100000", "WATCHDOG_PID": "1"}
    with running_server("--model", MODEL, env=env, wait=False) as server:
        manager.until("READY=1")
        server.process.terminate()
        assert manager.until("STOPPING=1") == []


def test_several_processes_have_one_watchdog(manager: ServiceManager) -> None:
    env = {**manager.environment, "WATCHDOG_USEC": "200000"}
    with running_server("--model", MODEL, "--workers", "2", env=env, wait=False):
        manager.until("READY=1")
        for _ in range(3):
            manager.until("WATCHDOG=1")


@pytest.mark.parametrize("address", ["/nowhere/notify", "vsock:2:1234", "notify"])
def test_a_manager_that_is_not_there_costs_nothing(address: str) -> None:
    with running_server("--model", MODEL, env={"NOTIFY_SOCKET": address}) as server:
        assert f"NOTIFY_SOCKET={address}" in server.log
        assert server.stop() == 0
        assert "Traceback" not in server.log
