"""How a server ends: by the signals that supervisors and people send."""

from __future__ import annotations

import signal
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from live import running_server

from embedding_server.servers.base import SERVERS

MODEL = "all-MiniLM-L6-v2"


@pytest.mark.parametrize("server_name", SERVERS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_an_accepted_request_is_answered_and_the_exit_code_is_0(
    number: signal.Signals, server_name: str
) -> None:
    body = {"model": MODEL, "input": [f"{number} " + "a long text " * 60 for number in range(60)]}
    with (
        running_server("--model", MODEL, "--server", server_name) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        answer = pool.submit(httpx.post, f"{server.url}/v1/embeddings", json=body, timeout=60)
        taken = f'embedding_server_queue_requests{{model="{MODEL}"}} 1.0'
        while taken not in httpx.get(f"{server.url}/metrics").text:
            assert not answer.done(), "the request was over before the signal"
            time.sleep(0.005)
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
