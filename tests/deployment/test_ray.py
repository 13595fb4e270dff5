# SPDX-License-Identifier: MIT OR Apache-2.0
"""The README's Ray section on a cluster of two cores: real replicas, weights and SIGKILLs."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import openai
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from ray_cluster import Cluster, running_cluster, wait_until
from readme import commands, section

pytestmark = pytest.mark.packaging

MODEL = "all-MiniLM-L6-v2"
PARTS = 12
_, SERVE, EMBED = commands(section("### Many machines: Ray"))
BIN = str(Path(sys.executable).parent)

Golden = tuple[list[str], NDArray[np.float32]]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as running:
        yield running


@pytest.fixture(scope="module")
def log(cluster: Cluster) -> Iterator[Path]:
    """The log of the README's command while it serves with two replicas."""
    command = shlex.split(SERVE.replace(".venv/bin", BIN))
    with cluster.running(command) as log_file:
        wait_until(lambda: len(cluster.replicas("default:models")) == 2, "two replicas")
        wait_until(lambda: status(f"{cluster.url}/health/ready") == 200, "readiness")
        wait_until(lambda: log_file.read_text().count("is ready: onnx") == 2, "their models")
        yield log_file


def status(url: str) -> int:
    try:
        return httpx.get(url, timeout=10).status_code
    except httpx.TransportError:
        return 0


def vectors_of(response: httpx.Response) -> NDArray[np.float32]:
    assert response.status_code == 200, response.text
    return np.array([item["embedding"] for item in response.json()["data"]], dtype=np.float32)


def counted(cluster: Cluster, line: str) -> float:
    """The value of the sample ``line`` in /metrics; 0 if it isn't there."""
    text = httpx.get(f"{cluster.url}/metrics").text
    found = [row for row in text.splitlines() if row.startswith(f"embedding_server_{line} ")]
    assert len(found) <= 1
    return float(found[0].rpartition(" ")[2]) if found else 0.0


# ----------------------------------------------------------------------------------------- serving


def test_the_same_api(cluster: Cluster, log: Path, golden: Golden) -> None:
    texts, expected = golden
    with httpx.Client(base_url=cluster.url, timeout=30) as client:
        body = {"model": MODEL, "input": texts}
        response = client.post("/v1/embeddings", json=body, headers={"x-request-id": "mine"})
        assert np.abs(vectors_of(response) - expected).max() < 1e-5
        assert response.headers.get_list("x-request-id") == ["mine"]
        line = "id=mine method=POST route=/v1/embeddings status=200"
        wait_until(lambda: line in log.read_text(), "the request's line in the log")
        by_get = client.request("GET", "/v1/embeddings", json={"model": MODEL, "input": "iPhone"})
        assert by_get.status_code == 200
        assert MODEL in client.get("/v1/models").text
        assert "<html" in client.get("/docs").text
        assert client.get("/openapi.json").json()["info"]["title"] == "embedding-server"
        assert client.get("/health/live").json() == {"status": "live"}
        assert client.get("/-/healthz").status_code == 200  # Ray's own, for a load balancer
        assert client.get("/nowhere").json()["error"]["code"] == "not_found"


def test_the_openai_client(cluster: Cluster, log: Path, golden: Golden) -> None:
    texts, expected = golden
    client = openai.OpenAI(base_url=f"{cluster.url}/openai/v1", api_key="unused", max_retries=0)
    answer = client.embeddings.create(model=MODEL, input=texts)
    vectors = np.array([item.embedding for item in answer.data], dtype=np.float32)
    assert np.abs(vectors - expected).max() < 1e-5


@pytest.mark.parametrize(
    ("headers", "content", "expected"),
    [
        ({"content-type": "text/plain"}, b"text", (415, None)),
        ({"x-request-timeout": "soon"}, b"{}", (400, None)),
        ({}, b'{"model": "none", "input": "text"}', (404, "model_not_found")),
        ({}, b"", (400, None)),
        ({}, b" " * (32 * 2**20 + 1), (413, "request_too_large")),
        ({"x-request-timeout": "0.05"}, None, (504, "deadline_exceeded")),
    ],
    ids=["type", "timeout", "model", "empty", "large", "deadline"],
)
def test_errors_have_their_one_shape(
    cluster: Cluster, log: Path, headers: dict[str, str], content: bytes | None, expected: object
) -> None:
    if content is None:
        content = json.dumps({"model": MODEL, "input": long_texts(500)}).encode()
    headers = {"content-type": "application/json", **headers}
    with httpx.Client(timeout=30) as client:
        response = client.post(f"{cluster.url}/v1/embeddings", content=content, headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == expected
    assert len(response.headers.get_list("x-request-id")) == 1


def long_texts(count: int) -> list[str]:
    """``count`` texts of which no two are equal, some 200 tokens each."""
    return [f"{number} of many " + "and a word " * 65 for number in range(count)]


def test_metrics_add_up(cluster: Cluster, log: Path) -> None:
    answered = 'requests_total{model="all-MiniLM-L6-v2",route="/v1/embeddings",status="200"}'
    inputs = 'inputs_total{model="all-MiniLM-L6-v2"}'
    wait_until(lambda: counted(cluster, "requests_in_flight") == 0, "the end of other requests")
    before, inputs_before = counted(cluster, answered), counted(cluster, inputs)

    def ask(number: int) -> None:
        body = {"model": MODEL, "input": [f"{number}", f"{number} again", "iPhone"]}
        assert httpx.post(f"{cluster.url}/v1/embeddings", json=body).status_code == 200

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(40)))
    wait_until(lambda: counted(cluster, answered) == before + 40, "the requests of all replicas")
    assert counted(cluster, inputs) == inputs_before + 120
    # Both served some of them.
    served = [pid for pid in cluster.replicas("default:models") if f"pid={pid}" in log.read_text()]
    assert len(served) == 2
    refused = 'requests_total{model="",route="/v1/embeddings",status="415"}'
    before = counted(cluster, refused)
    httpx.post(f"{cluster.url}/v1/embeddings", content=b"", headers={"content-type": "text/plain"})
    wait_until(lambda: counted(cluster, refused) == before + 1, "a request that reached no replica")
    info = httpx.get(f"{cluster.url}/metrics").text.partition("\nembedding_server_model_info{")[2]
    assert info.splitlines()[0].endswith(" 1.0")


def test_a_client_that_hangs_up_costs_no_more(cluster: Cluster, log: Path) -> None:
    gone = 'requests_total{model="all-MiniLM-L6-v2",route="/v1/embeddings",status="499"}'
    before = counted(cluster, gone)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{cluster.url}/v1/embeddings",
            json={"model": MODEL, "input": long_texts(900)},
            timeout=0.5,
        )
    wait_until(lambda: counted(cluster, gone) == before + 1, "a request without a client")
    queued = 'queue_tokens{model="all-MiniLM-L6-v2"}'
    wait_until(lambda: counted(cluster, queued) == 0, "an empty queue", 5)


def test_a_deadline_ends_the_work(cluster: Cluster, log: Path) -> None:
    ended = 'requests_total{model="all-MiniLM-L6-v2",route="/v1/embeddings",status="504"}'
    before = counted(cluster, ended)
    response = httpx.post(
        f"{cluster.url}/v1/embeddings",
        json={"model": MODEL, "input": long_texts(300)},
        headers={"x-request-timeout": "0.3"},
    )
    assert response.status_code == 504
    assert "The 0.3 s that x-request-timeout gave" in response.json()["error"]["message"]
    wait_until(lambda: counted(cluster, ended) == before + 1, "the replica's own count")
    queued = 'queue_tokens{model="all-MiniLM-L6-v2"}'
    wait_until(lambda: counted(cluster, queued) == 0, "an empty queue", 5)


def test_a_killed_replica_loses_no_answer(cluster: Cluster, log: Path, golden: Golden) -> None:
    texts, expected = golden
    answers: list[float] = []
    killed = threading.Event()
    replaced = threading.Event()

    def ask_until_replaced(client_number: int) -> int:
        """How many answers came after the kill; every one of them must be right."""
        after = 0
        with httpx.Client(timeout=60) as client:
            while after < 3 or not replaced.is_set():
                first = (client_number * 17 + len(answers)) % 100
                body = {"model": MODEL, "input": texts[first : first + 40]}
                response = client.post(f"{cluster.url}/v1/embeddings", json=body)
                error = np.abs(vectors_of(response) - expected[first : first + 40]).max()
                answers.append(float(error))
                after += killed.is_set()
        return after

    before = cluster.replicas("default:models")
    with ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(ask_until_replaced, number) for number in range(8)]
        try:
            wait_until(lambda: len(answers) > 20, "load")
            os.kill(before[0], signal.SIGKILL)
            killed.set()
            # The other one answers the requests that it was serving.
            wait_until(lambda: "has ended with a request" in log.read_text(), "a second try")
            wait_until(lambda: log.read_text().count("is ready: onnx") == 3, "another replica")
        finally:
            killed.set()
            replaced.set()
        assert all(client.result() >= 3 for client in clients)
    assert max(answers) < 1e-5
    assert before[0] not in cluster.replicas("default:models")
    assert len(cluster.replicas("default:models")) == 2


# ------------------------------------------------------------------------------------------ corpora


def corpus(file: Path, texts: list[str | None], *, row_group_size: int = 1000) -> Path:
    pq.write_table(
        pa.table({"id": pa.array(range(len(texts))), "text": pa.array(texts, pa.string())}),
        file,
        row_group_size=row_group_size,
    )
    return file


def embed(cluster: Cluster, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """The README's command in ``folder``, beside replicas that have half of the cores."""
    return subprocess.run(
        embed_command(*more),
        cwd=folder, env=cluster.env, stderr=subprocess.PIPE, text=True, timeout=60,
    )  # fmt: skip


def embed_command(*more: str) -> list[str]:
    return [*shlex.split(EMBED.replace(".venv/bin", BIN)), "--threads", "1", *more]


def test_a_killed_corpus_goes_on(cluster: Cluster, tmp_path: Path, golden: Golden) -> None:
    """Some rows are done, the command is killed, and run again: each row is there once."""
    texts, expected = golden
    repeated = [text for number in range(PARTS) for text in texts]
    corpus(tmp_path / "corpus.parquet", list(repeated), row_group_size=len(texts))
    output = tmp_path / "vectors"
    with subprocess.Popen(
        embed_command(), cwd=tmp_path, env=cluster.env, stderr=subprocess.PIPE
    ) as first:
        try:
            wait_until(lambda: len(list(output.glob("part-*"))) >= 2, "parts")
        finally:
            first.kill()
    assert first.returncode == -signal.SIGKILL
    done = {file: file.stat().st_mtime_ns for file in output.glob("part-*")}
    assert 2 <= len(done) < PARTS

    other = embed(cluster, tmp_path, "--no-normalize")
    assert other.returncode == 1
    assert "was begun with other values of normalize" in other.stderr

    second = embed(cluster, tmp_path)
    assert second.returncode == 0, second.stderr
    assert "rows are done already" in second.stderr
    assert f"{len(repeated)} in all" in second.stderr
    assert all(file.stat().st_mtime_ns == when for file, when in done.items())
    assert not list(output.glob(".part*"))
    table = pq.read_table(output)
    assert table.column("id").to_pylist() == list(range(len(repeated)))
    assert table.column("text").to_pylist() == repeated
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 384)
    vectors = table.column("embedding").combine_chunks().flatten().to_numpy().reshape(-1, 384)
    assert np.abs(vectors - np.tile(expected, (PARTS, 1))).max() < 1e-5


def test_a_row_that_is_no_text_is_named(cluster: Cluster, tmp_path: Path) -> None:
    corpus(tmp_path / "corpus.parquet", ["one", "two", None, "four"], row_group_size=2)
    process = embed(cluster, tmp_path)
    assert process.returncode == 1
    assert "corpus.parquet, row 2: null" in process.stderr


def test_truncated_texts_are_reported(cluster: Cluster, tmp_path: Path) -> None:
    corpus(tmp_path / "corpus.parquet", ["short", "long " * 300, "short"])
    process = embed(cluster, tmp_path)
    log = process.stderr
    assert process.returncode == 0, log
    assert "1 of 3 texts were cut to the 256 tokens that all-MiniLM-L6-v2 takes" in log
    assert "corpus.parquet, row 1" in log


# ------------------------------------------------------------------------------------------ scaling


def test_replicas_follow_the_queue(cluster: Cluster, log: Path) -> None:
    """A second application beside the first, under a prefix, with a key."""
    arguments = [
        *("model=all-MiniLM-L6-v2", "root_path=/scaled", "api_key=secret", "num_cpus=0.5"),
        *("max_replicas=2", "ingress_replicas=1", "target_queued_tokens=1000"),
        *(
            "max_concurrent_requests=3",
            "upscale_delay_s=0",
            "downscale_delay_s=1",
            "look_back_period_s=2",
        ),
    ]
    command = [f"{BIN}/serve", "run", "--name", "scaled", "--route-prefix", "/scaled"]
    url = f"{cluster.url}/scaled/v1/embeddings"
    body = {"model": MODEL, "input": long_texts(25)}
    enough = threading.Event()

    def ask() -> set[tuple[int, bool]]:
        """The statuses, each with whether the answer has a Retry-After."""
        answers = set()
        with httpx.Client(timeout=60, headers={"authorization": "Bearer secret"}) as client:
            while not enough.wait(0.1):
                response = client.post(url, json=body)
                answers.add((response.status_code, "retry-after" in response.headers))
        return answers

    with cluster.running([*command, "embedding_server.ray:app", *arguments]) as log_file:
        wait_until(lambda: status(f"{cluster.url}/scaled/health/ready") == 200, "readiness")
        assert httpx.post(url, json=body).status_code == 401
        # A request without a key never reaches a replica.
        ingress = "ServeReplica:scaled:ingress"
        wait_until(
            lambda: any(
                ingress in line and "status=401" in line
                for line in log_file.read_text().splitlines()
            ),
            "a refusal by the ingress",
        )
        assert len(cluster.replicas("scaled:models")) == 1
        with ThreadPoolExecutor(4) as pool:
            clients = [pool.submit(ask) for _ in range(4)]
            try:
                wait_until(lambda: len(cluster.replicas("scaled:models")) == 2, "a second replica")
            finally:
                enough.set()
            # One replica has room for three of the four.
            answers = set().union(*(client.result() for client in clients))
            assert answers == {(200, False), (429, True)}
        wait_until(lambda: len(cluster.replicas("scaled:models")) == 1, "one replica again")
