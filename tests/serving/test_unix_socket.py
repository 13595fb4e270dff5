# SPDX-License-Identifier: MIT OR Apache-2.0
"""``--uds``."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from in_process import until
from live import run_cli, running_server

MODEL = "all-MiniLM-L6-v2"


def test_a_unix_socket(tmp_path: Path) -> None:
    file = tmp_path / "server.sock"
    for _ in range(2):  # the second finds what the first, killed, has left behind
        with running_server("--model", MODEL, "--uds", str(file), wait=False) as server:
            transport = httpx.HTTPTransport(uds=str(file))
            with httpx.Client(transport=transport, base_url="http://a", timeout=60) as client:
                until(lambda: client.get("/health/ready").status_code == 200)
                body = {"model": MODEL, "input": "iPhone"}
                assert client.post("/v1/embeddings", json=body).json()["data"][0]["dims"] == 384
            assert f"listening on unix:{file}" in server.log
            server.process.kill()
            server.process.wait()
        assert file.exists()
    with running_server("--model", MODEL, "--uds", str(file), wait=False) as server:
        done = run_cli("serve", "--model", MODEL, "--uds", str(file))
        assert done.returncode == 1
        assert b"another server listens" in done.stderr
        assert server.stop() == 0
    assert not file.exists()


def test_a_unix_socket_never_replaces_a_file(tmp_path: Path) -> None:
    file = tmp_path / "precious"
    file.write_text("kept")
    done = run_cli("serve", "--model", MODEL, "--uds", str(file))
    assert done.returncode == 1
    assert b"is no socket" in done.stderr
    assert file.read_text() == "kept"


def test_a_server_takes_over_from_one_that_drains(tmp_path: Path) -> None:
    file = tmp_path / "server.sock"
    transport = httpx.HTTPTransport(uds=str(file))
    body = {"model": MODEL, "input": [f"{number} river " * 90 for number in range(100)]}
    arguments = ("--model", MODEL, "--uds", str(file))
    with (
        httpx.Client(transport=transport, base_url="http://a", timeout=60) as client,
        ThreadPoolExecutor(1) as pool,
        running_server(*arguments, wait=False) as first,
    ):
        until(lambda: client.get("/health/ready").status_code == 200)
        last = pool.submit(client.post, "/v1/embeddings", json=body)
        with httpx.Client(
            transport=httpx.HTTPTransport(uds=str(file)), base_url="http://a"
        ) as other:
            taken = f'embedding_server_queue_requests{{model="{MODEL}"}} 1.0'
            until(lambda: taken in other.get("/metrics").text)
        first.process.send_signal(signal.SIGTERM)
        until(lambda: "draining" in first.log)
        with running_server(*arguments, wait=False) as second:
            assert last.result().status_code == 200
            assert first.process.wait(20) == 0
            until(lambda: client.get("/health/ready").status_code == 200)
            assert second.stop() == 0
        assert not file.exists()
