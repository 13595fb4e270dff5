# SPDX-License-Identifier: MIT OR Apache-2.0
"""Half an hour of everything at once; ``SOAK_SECONDS`` makes it shorter."""

from __future__ import annotations

import json
import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
import pytest
from faulty_server import PROGRAM
from live import LiveServer, resident_mib, running_server
from numpy.typing import NDArray
from raw_http import connect

MODEL = "all-MiniLM-L6-v2"
SECONDS = float(os.environ.get("SOAK_SECONDS", "1800"))
SAMPLE_SECONDS = 5.0
# The heap finds its size first.
WARM_UP = 0.25

FAULTS = (
    *("please raise", "please return none", "please double", "please return nan"),
    *("please give one too many", "please need much memory", "please leave"),
)
NONSENSE: tuple[tuple[bytes, int], ...] = (
    (b"{", 400),
    (b'{"model": "nope", "input": "a"}', 404),
    (b'{"model": "all-MiniLM-L6-v2", "input": []}', 400),
    (b'{"model": "all-MiniLM-L6-v2", "input": "a", "dimensions": 7}', 400),
    (b'{"model": "all-MiniLM-L6-v2", "input": [[999999]]}', 400),
    (b'{"model": "all-MiniLM-L6-v2", "input": "\\ud800"}', 400),
    (b"\xff" * 1000, 400),
)

Client = Callable[[httpx.Client, random.Random], str]


class Soak:
    """Clients in threads, until the time is over or one of them has seen what must not be."""

    def __init__(self, server: LiveServer, seconds: float) -> None:
        self._server = server
        self._end = time.monotonic() + seconds
        self.counts: Counter[str] = Counter()
        self.failures: list[BaseException] = []

    def run(self, client: Client, seed: int) -> None:
        generator = random.Random(seed)
        try:
            with httpx.Client(base_url=self._server.url, timeout=120) as http:
                while time.monotonic() < self._end and not self.failures:
                    self.counts[client(http, generator)] += 1
        except BaseException as failure:
            self.failures.append(failure)


def good(texts: list[str], vectors: NDArray[np.float32]) -> Client:
    """A client that compares every answer with the model's own vectors."""

    def client(http: httpx.Client, generator: random.Random) -> str:
        places = generator.choices(range(len(texts)), k=generator.choice((1, 1, 2, 8, 60)))
        body: dict[str, Any] = {"model": MODEL, "input": [texts[place] for place in places]}
        while True:
            response = http.post("/v1/embeddings", json=body)
            if response.status_code != 429:
                break
            time.sleep(min(float(response.headers["retry-after"]), 2.0))
        assert response.status_code == 200, response.text[:300]
        answered = np.array([row["embedding"] for row in response.json()["data"]], dtype=np.float32)
        np.testing.assert_allclose(answered, vectors[places], atol=1e-5)
        return "answers that are right"

    return client


def faulty(http: httpx.Client, generator: random.Random) -> str:
    """A text that the backend fails on."""
    text = generator.choice(FAULTS)
    body = {"model": MODEL, "input": text}
    response = http.post("/v1/embeddings", json=body)
    assert response.status_code in ((200,) if "much" in text else (500, 503)), response.text[:300]
    time.sleep(generator.random() / 2)
    return "faults of the backend"


def nonsense(http: httpx.Client, generator: random.Random) -> str:
    """What is no request."""
    content, status = generator.choice(NONSENSE)
    response = http.post(
        "/v1/embeddings",
        content=content,
        headers={"content-type": "application/json"},
    )
    assert response.status_code == status, response.text[:300]
    time.sleep(generator.random() / 4)
    return "requests refused"


def impatient(http: httpx.Client, generator: random.Random) -> str:
    """Hangs up: in the header, in the body, or before the answer."""
    body = json.dumps({"model": MODEL, "input": [f"{n} river " * 50 for n in range(50)]}).encode()
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body)
    request = head + body
    with connect(str(http.base_url)) as connection:
        connection.sendall(request[: generator.choice((20, len(head) + 100, len(request)))])
        time.sleep(generator.random() / 10)
        if generator.random() < 0.5:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    time.sleep(generator.random())
    return "clients that hung up"


def hurried(http: httpx.Client, generator: random.Random) -> str:
    """Gives the server less time than it needs."""
    body = {"model": MODEL, "input": [f"{n} river " * 50 for n in range(50)]}
    response = http.post(
        "/v1/embeddings", json=body, headers={"x-request-timeout": "0.05"}, timeout=120
    )
    assert response.status_code in (200, 429, 504), response.text[:300]
    time.sleep(generator.random())
    return "deadlines"


def watcher(http: httpx.Client, generator: random.Random) -> str:
    """A probe and a scrape, which must never fail."""
    for path in ("/health/live", "/health/ready", "/metrics", "/v1/models"):
        assert http.get(path).status_code == 200
    time.sleep(1)
    return "probes and scrapes"


@contextmanager
def memory_of(server: LiveServer) -> Iterator[list[float]]:
    """Resident MiB, every ``SAMPLE_SECONDS`` while the body runs."""
    samples: list[float] = []
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(SAMPLE_SECONDS):
            samples.append(resident_mib(server))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        ended.set()
        thread.join()


@pytest.mark.slow
def test_soak(
    golden: tuple[list[str], NDArray[np.float32]], capsys: pytest.CaptureFixture[str]
) -> None:
    """No wrong vector, no lost answer, no other status than is due, and memory stays."""
    clients = [*[good(*golden)] * 6, faulty, nonsense, impatient, hurried, watcher]
    with running_server("--model", MODEL, "--threads", "2", program=PROGRAM) as server:
        soak = Soak(server, SECONDS)
        threads = [
            threading.Thread(target=soak.run, args=(client, seed))
            for seed, client in enumerate(clients)
        ]
        with memory_of(server) as samples:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        if soak.failures:
            raise soak.failures[0]
        metrics = httpx.get(f"{server.url}/metrics").text
        assert f'queue_tokens{{model="{MODEL}"}} 0.0' in metrics
        assert "embedding_server_requests_in_flight 1.0" in metrics
        assert server.stop() == 0
    steady = samples[int(len(samples) * WARM_UP) :]
    hours = np.arange(len(steady)) * SAMPLE_SECONDS / 3600
    slope = float(np.polyfit(hours, steady, 1)[0])
    with capsys.disabled():
        print(f"\n{SECONDS:g} s: {dict(soak.counts)}")
        print(f"memory: {steady[0]:.0f} to {steady[-1]:.0f} MiB, {slope:+.1f} MiB an hour")
    # Of what it has at all, over the time of the test.
    assert slope * SECONDS / 3600 < 0.05 * steady[0]
