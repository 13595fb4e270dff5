# SPDX-License-Identifier: MIT OR Apache-2.0
"""A server process whose backend fails on request, while other requests get right vectors."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from error_shape import error_of
from fake_backends import FAULTS, RELEASE
from faulty_server import PROGRAM
from in_process import until
from live import LiveServer, running_server
from numpy.typing import NDArray

MODEL = "all-MiniLM-L6-v2"

FAILING = [
    "please raise", "please leave", "please return none", "please return a string",
    "please double", "please give one too many", "please flatten", "please return nan",
    "please return infinity",
]  # fmt: skip

Golden = tuple[list[str], NDArray[np.float32]]


@contextmanager
def faulty_server(*arguments: str, release: Path | None = None) -> Iterator[LiveServer]:
    """On two cores, with JSON in its log."""
    flags = ("--model", MODEL, "--threads", "2", "--log-format", "json", *arguments)
    env = {RELEASE: str(release)}
    with running_server(*flags, env=env, program=PROGRAM) as live:
        yield live


@pytest.fixture(scope="module")
def faulty() -> Iterator[LiveServer]:
    with faulty_server() as live:
        yield live


@pytest.fixture(scope="module")
def long_golden(golden: Golden) -> Golden:
    """Texts so long that they share no batch with the short ones that fail."""
    texts, vectors = golden
    long = [place for place, text in enumerate(texts) if 60 < len(text.split()) < 400]
    assert len(long) >= 8
    return [texts[place] for place in long], vectors[long]


def embed(server: LiveServer, texts: str | Sequence[str], **headers: str) -> httpx.Response:
    body = {"model": MODEL, "input": texts}
    return httpx.post(f"{server.url}/v1/embeddings", json=body, headers=headers, timeout=60)


def vectors_of(response: httpx.Response) -> NDArray[np.float32]:
    assert response.status_code == 200, response.text
    return np.array([row["embedding"] for row in response.json()["data"]], dtype=np.float32)


def status(server: LiveServer, path: str) -> int:
    return httpx.get(server.url + path, timeout=60).status_code


def metric(server: LiveServer, name: str) -> float:
    page = httpx.get(f"{server.url}/metrics", timeout=60).text
    found = re.search(rf'^embedding_server_{name}{{model="{MODEL}"}} (\S+)$', page, re.M)
    assert found, name
    return float(found[1])


def logged(server: LiveServer, level: str) -> list[str]:
    lines = [json.loads(line) for line in server.log.splitlines() if line.startswith("{")]
    return [json.dumps(line) for line in lines if line["level"].lower() == level]


@contextmanager
def others(server: LiveServer, golden: Golden) -> Iterator[None]:
    """Clients that ask for right vectors all the while, and get them."""
    texts, expected = golden
    over = False
    answered = [0, 0]

    def ask(client: int) -> None:
        while not over:
            place = (answered[client] + client * 3) % len(texts)
            (vector,) = vectors_of(embed(server, texts[place]))
            np.testing.assert_allclose(vector, expected[place], atol=1e-5)
            answered[client] += 1

    with ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(ask, client) for client in (0, 1)]
        try:
            until(lambda: all(answered) or any(client.done() for client in asking))
            yield
            before = list(answered)
            until(
                lambda: (
                    all(now > then for now, then in zip(answered, before, strict=True))
                    or any(client.done() for client in asking)
                )
            )
        finally:
            over = True
        for client in asking:
            client.result()


# --------------------------------------------------------------------------------------- failures


def test_whatever_a_backend_does_fails_its_own_batch_only(
    faulty: LiveServer, long_golden: Golden
) -> None:
    with others(faulty, long_golden):
        for text in FAILING:
            before = metric(faulty, "failed_batches_total")
            error = error_of(embed(faulty, text), 500)
            assert error["code"] == "internal_error", text
            assert "secret" not in error["message"]
            assert metric(faulty, "failed_batches_total") == before + 1, text
            assert status(faulty, "/health/ready") == status(faulty, "/health/live") == 200
    assert "secret detail" in faulty.log
    assert not any(text in faulty.log for text in FAULTS), "texts are never logged"


def test_a_request_of_which_one_input_fails(faulty: LiveServer) -> None:
    error_of(embed(faulty, ["a", "please raise", "b"]), 500)
    assert len(vectors_of(embed(faulty, ["a", "b"]))) == 2


# ----------------------------------------------------------------------------------------- memory


def test_a_batch_without_memory_is_halved_until_it_fits(faulty: LiveServer) -> None:
    texts = [f"please need much memory {number}" for number in range(9)]
    alone = np.concatenate([vectors_of(embed(faulty, text)) for text in texts])
    events = metric(faulty, "out_of_memory_total")
    failed = metric(faulty, "failed_batches_total")
    warnings = len(logged(faulty, "warning"))
    together = vectors_of(embed(faulty, texts))
    np.testing.assert_allclose(together, alone, atol=1e-5)
    events = metric(faulty, "out_of_memory_total") - events
    assert 1 <= events <= 2, "of at most one batch a core"
    assert len(logged(faulty, "warning")) - warnings == events, "once each, however often halved"
    assert metric(faulty, "failed_batches_total") == failed


def test_an_input_that_has_no_memory_even_alone(faulty: LiveServer, long_golden: Golden) -> None:
    failed = metric(faulty, "failed_batches_total")
    with others(faulty, long_golden):
        response = embed(faulty, "please need all memory")
    error = error_of(response, 503)
    assert error["code"] == "out_of_memory"
    assert "6 tokens" in error["message"]
    assert response.headers["retry-after"]
    assert metric(faulty, "failed_batches_total") == failed + 1
    assert status(faulty, "/health/ready") == 200


def test_others_of_a_batch_without_memory_are_answered(tmp_path: Path) -> None:
    """Requests that wait for the only core, and then share a batch."""
    release = tmp_path / "release"
    with (
        faulty_server("--threads", "1", release=release) as server,
        ThreadPoolExecutor(8) as pool,
    ):
        first = pool.submit(embed, server, "please wait")
        until(lambda: metric(server, "queue_requests") == 1)
        until(lambda: metric(server, "queue_tokens") == 0)
        texts = [f"good {number}" for number in range(6)]
        hopeless = pool.submit(embed, server, "please need all memory")
        good = [pool.submit(embed, server, text) for text in texts]
        until(lambda: metric(server, "queue_requests") == 8)
        until(lambda: metric(server, "queue_tokens") == 6 + 6 * 4)
        release.touch()
        error_of(hopeless.result(), 503)
        vectors_of(first.result())
        together = np.concatenate([vectors_of(answer.result()) for answer in good])
        assert metric(server, "out_of_memory_total") == 1
        alone = np.concatenate([vectors_of(embed(server, text)) for text in texts])
        np.testing.assert_allclose(together, alone, atol=1e-5)


def test_memory_that_really_runs_out() -> None:
    """Of ONNX Runtime, in a process whose address space may grow by 24 MiB only."""
    texts = [f"{number} " + "words that go on and on " * 60 for number in range(24)]
    flags = ("--threads", "1", "--max-batch-tokens", "20000", "--log-format", "json")
    with running_server("--model", MODEL, *flags) as server:
        expected = vectors_of(embed(server, texts))
        assert metric(server, "batch_size_count") == 1
        pid = server.process.pid
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[0])
        most = pages * resource.getpagesize() + 24 * 2**20
        resource.prlimit(pid, resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
        vectors = vectors_of(embed(server, texts))
        np.testing.assert_allclose(vectors, expected, atol=1e-5)
        assert metric(server, "out_of_memory_total") == 1
        assert len(logged(server, "warning")) == 1
        assert "bad_alloc" not in server.log, "reported in our words"
        assert vectors_of(embed(server, "a short one")).shape == (1, 384)
        assert status(server, "/health/ready") == 200


# ------------------------------------------------------------------------------------------ hangs


def test_a_hang_is_answered_told_and_survived(long_golden: Golden) -> None:
    """One core hangs, then the other; at last SIGTERM ends the process all the same."""
    with faulty_server("--inference-timeout", "0.5") as server:
        with others(server, long_golden):
            response = embed(server, "please hang")
            error = error_of(response, 503)
            assert error["code"] == "inference_timeout"
            assert "--inference-timeout" in error["message"]
            assert response.headers["retry-after"]
            live = httpx.get(f"{server.url}/health/live")
            assert "restart" in error_of(live, 503)["message"]
            assert "is hung" in error_of(httpx.get(f"{server.url}/health/ready"), 503)["message"]
            assert metric(server, "timed_out_batches_total") == 1
            assert "\nembedding_server_ready 0.0\n" in httpx.get(f"{server.url}/metrics").text
        # The other core's hang, and what waits behind it.
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(embed, server, text) for text in ["please hang", "a", "b", "c"]]
            answers = [job.result() for job in asked]
        assert error_of(answers[0], 503)["code"] == "inference_timeout"
        for answer in answers[1:]:  # before it or behind it
            assert answer.status_code in (200, 503)
        for _ in range(3):
            assert error_of(embed(server, "d"), 503)["code"] == "inference_timeout"
        assert metric(server, "queue_requests") == metric(server, "queue_tokens") == 0
        assert status(server, "/health/live") == 503
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0


def test_a_batch_that_comes_back_turns_health_green(tmp_path: Path) -> None:
    release = tmp_path / "release"
    flags = ("--inference-timeout", "0.3", "--threads", "1")
    with faulty_server(*flags, release=release) as server:
        error_of(embed(server, "please wait"), 503)
        assert status(server, "/health/live") == status(server, "/health/ready") == 503
        error_of(embed(server, "a"), 503)
        release.touch()
        until(lambda: status(server, "/health/live") == 200)
        assert status(server, "/health/ready") == 200
        assert vectors_of(embed(server, "a")).shape == (1, 384)
        assert vectors_of(embed(server, "please wait")).shape == (1, 384)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0


def test_a_worker_that_hangs_is_replaced(tmp_path: Path) -> None:
    program = "from embedding_server.backends.base import BACKENDS\n"
    program += "BACKENDS['onnx'] = 'fake_backends:Faulty'\n"
    (tmp_path / "sitecustomize.py").write_text(program)
    path = [
        str(tmp_path),
        str(Path(__file__).parents[1] / "support"),
        os.environ.get("PYTHONPATH", ""),
    ]
    flags = ("--model", MODEL, "--workers", "2", "--threads", "2", "--inference-timeout", "0.5")
    with running_server(*flags, env={"PYTHONPATH": os.pathsep.join(path)}) as server:
        until(lambda: server.log.count(" is ready (process") == 2)
        error_of(embed(server, "please hang"), 503)
        until(lambda: server.log.count(" is ready (process") == 3)
        for number in range(20):
            assert vectors_of(embed(server, f"{number}")).shape == (1, 384)
            assert status(server, "/health/live") == 200
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0


def test_sigterm_ends_a_process_that_hangs_and_has_not_noticed() -> None:
    with (
        faulty_server("--drain-timeout", "0.2") as server,
        ThreadPoolExecutor(1) as pool,
    ):
        pool.submit(embed, server, "please hang")
        until(lambda: metric(server, "queue_requests") == 1)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(50) == 0
