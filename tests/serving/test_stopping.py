# SPDX-License-Identifier: MIT OR Apache-2.0
"""How a server ends, and what a signal changes while it goes on."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from error_shape import error_of
from fake_backends import Blocked
from in_process import serving, until
from live import running_server, signalled_again, under_way
from raw_http import ask, connect

from embedding_server.serving.servers.base import SERVERS

MODEL = "all-MiniLM-L6-v2"


@pytest.mark.parametrize("server_name", SERVERS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_an_accepted_request_is_answered_and_the_exit_code_is_0(
    number: signal.Signals, server_name: str
) -> None:
    with (
        running_server("--model", MODEL, "--server", server_name) as server,
        under_way(server) as answer,
    ):
        server.process.send_signal(number)
        assert answer.result().status_code == 200
        assert server.process.wait(20) == 0
        assert "Traceback" not in server.log


@pytest.mark.parametrize("server_name", SERVERS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_stopping_while_models_are_loaded(number: signal.Signals, server_name: str) -> None:
    with running_server("--model", MODEL, "--server", server_name, wait=False) as server:
        server.process.send_signal(number)
        assert server.process.wait(20) in (0, 130)
        assert "Traceback" not in server.log


def test_a_drain_as_clients_see_it() -> None:
    """Readiness is red on open connections, work is finished, and new connections are refused."""
    with running_server("--model", MODEL) as server, connect(server.url) as kept:
        assert ask(kept).status_code == 200
        with under_way(server) as answer:
            server.process.send_signal(signal.SIGTERM)
            until(lambda: "draining" in server.log)
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"{server.url}/health/live")
            last = ask(kept)
            assert "draining" in error_of(last, 503)["message"]
            assert last.headers["connection"] == "close"
            assert kept.recv(1) == b""
            assert not answer.done()
            assert answer.result().status_code == 200
            assert answer.result().headers["connection"] == "close"
        assert server.process.wait(20) == 0
        assert "Traceback" not in server.log


@pytest.mark.parametrize("name", SERVERS)
def test_a_request_that_takes_longer_than_the_drain(
    blocked: type[Blocked], tiny_model: Path, name: str
) -> None:
    with (
        serving(model=(str(tiny_model),), backend="onnx", server=name, drain_timeout=0.3) as server,
        httpx.Client(base_url=server.url) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        body = {"model": "tiny", "input": "river"}
        answer = pool.submit(httpx.post, f"{server.url}/v1/embeddings", json=body, timeout=30)
        until(lambda: 'queue_requests{model="tiny"} 1.0' in client.get("/metrics").text)
        server.server.stop()
        assert "shutting down" in error_of(answer.result(), 503)["message"]
        blocked.release()


@pytest.mark.parametrize("name", SERVERS)
@pytest.mark.parametrize(
    ("first", "second"),
    [(signal.SIGTERM, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT)],
    ids=["twice", "and-ctrl-c"],
)
def test_a_second_signal_ends_it_now(
    first: signal.Signals, second: signal.Signals, name: str
) -> None:
    with running_server("--model", MODEL, "--server", name) as server:
        with under_way(server) as answer:
            server.process.send_signal(first)
            until(lambda: "draining" in server.log)
            until(lambda: signalled_again(server, second))
            assert server.process.wait(20) == 128 + second
            with pytest.raises(httpx.TransportError):
                answer.result()
        assert "a second signal to end" in server.log


@pytest.mark.parametrize("workers", ["1", "2"])
def test_two_signals_at_once_are_one(workers: str) -> None:
    """As `timeout` sends them, to the process and to its group."""
    with running_server("--model", MODEL, "--workers", workers) as server:
        with under_way(server) as answer:
            server.process.send_signal(signal.SIGINT)
            server.process.send_signal(signal.SIGTERM)
            assert answer.result().status_code == 200
        assert server.process.wait(20) == 0
        assert "a second signal" not in server.log


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_hang_up_while_it_starts(workers: str) -> None:
    with running_server("--model", MODEL, "--workers", workers, wait=False) as server:

        def ready() -> bool:
            server.process.send_signal(signal.SIGHUP)
            try:
                return httpx.get(f"{server.url}/health/ready").status_code == 200
            except httpx.TransportError:
                return False

        until(ready)
        assert server.stop() == 0


@pytest.mark.parametrize("workers", ["1", "2"])
def test_keys_are_read_again(tmp_path: Path, workers: str) -> None:
    keys = tmp_path / "keys"
    keys.write_text("first\n")
    keys.chmod(0o600)
    with running_server(
        *("--model", MODEL, "--api-key-file", str(keys), "--workers", workers)
    ) as server:

        def lets_in(key: str) -> bool:
            """As often as it takes for each worker to be asked."""
            headers = {"authorization": f"Bearer {key}"}
            statuses = {
                httpx.get(f"{server.url}/v1/models", headers=headers).status_code for _ in range(10)
            }
            return statuses == {200}

        until(lambda: lets_in("first"))
        keys.write_text("second\n")
        server.process.send_signal(signal.SIGHUP)
        until(lambda: lets_in("second"))
        assert not lets_in("first")
        keys.write_text("\n")
        server.process.send_signal(signal.SIGHUP)
        until(lambda: "The API keys stay as they were" in server.log)
        assert lets_in("second")
        assert server.stop() == 0
