# SPDX-License-Identifier: MIT OR Apache-2.0
"""What an operator sees: the metrics page, the log lines, and health under load."""

from __future__ import annotations

import json
import os
import re
import resource
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from in_process import until
from live import LiveServer, resident_mib, running_server
from prometheus_client.parser import text_string_to_metric_families

from embedding_server.telemetry import METRICS, Telemetry

MODEL = "all-MiniLM-L6-v2"
KEY = "sesame-4711"
KEYED = {"authorization": f"Bearer {KEY}"}
LONG = "word " * 300
EMBED = {"route": "/v1/embeddings", "model": MODEL}
OF_MODEL = {"model": MODEL}

Labels = dict[str, str]


@dataclass
class Watched:
    """A live server with a key, a client of it, and its log from now on."""

    server: LiveServer
    client: httpx.Client
    seen: int = field(default=0)

    def embed(self, input: Any, **fields: Any) -> httpx.Response:
        return self.client.post("/v1/embeddings", json={"model": MODEL, "input": input, **fields})

    def samples(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        """Every sample of the page: (name, labels) -> value."""
        page = self.client.get("/metrics").text
        return {
            (sample.name.removeprefix("embedding_server_"), frozenset(sample.labels.items())): (
                sample.value
            )
            for family in text_string_to_metric_families(page)
            for sample in family.samples
        }

    def value(self, name: str, labels: Labels | None = None) -> float:
        return self.samples().get((name, frozenset((labels or {}).items())), 0.0)

    @contextmanager
    def counting(self, *counted: tuple[str, Labels, float]) -> Iterator[None]:
        """Expect each (name, labels) to have grown by that much when the body is through."""
        before = self.samples()
        yield
        after = self.samples()
        keys = [(name, frozenset(labels.items())) for name, labels, _ in counted]
        grown = {key: after.get(key, 0) - before.get(key, 0) for key in keys}
        expected = {key: by for key, (_, _, by) in zip(keys, counted, strict=True)}
        assert grown == pytest.approx(expected)

    def lines(self) -> list[str]:
        """What was logged since the last call."""
        # A line is written just after its answer is sent, and in the order of the answers.
        mark = uuid.uuid4().hex
        self.client.get("/v1/models", headers={"x-request-id": mark})
        until(lambda: bool(re.search(f"{mark}.*\n", self.server.log)))
        log = self.server.log
        new, self.seen = log[self.seen :], len(log)
        return [line for line in new.splitlines() if mark not in line]


@pytest.fixture(scope="module", params=["text", "json"])
def each_format(request: pytest.FixtureRequest) -> Iterator[tuple[str, Watched]]:
    with watched("--log-format", request.param) as it:
        yield request.param, it


@pytest.fixture(scope="module")
def live() -> Iterator[Watched]:
    with watched() as it:
        yield it


@contextmanager
def watched(*arguments: str) -> Iterator[Watched]:
    with (
        running_server("--model", MODEL, "--api-key", KEY, *arguments) as server,
        httpx.Client(base_url=server.url, headers=KEYED, timeout=60) as client,
    ):
        yield Watched(server, client)


# Metrics


def test_the_page_parses_and_is_called_what_prometheus_expects(live: Watched) -> None:
    response = live.client.get("/metrics")
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    names = [family.name for family in text_string_to_metric_families(response.text)]
    assert len(names) == len(set(names))
    assert response.text.endswith("\n")
    assert "_created" not in response.text


def test_every_metric_appears_with_its_labels_and_help(live: Watched) -> None:
    live.embed(["iPhone", LONG])
    live.embed([])
    page = live.client.get("/metrics").text
    families = {family.name: family for family in text_string_to_metric_families(page)}
    expected = {row.family: row for row in METRICS}
    assert set(families) == set(expected)
    for name, row in expected.items():
        family = families[name]
        assert (family.type, family.documentation) == (row.kind, row.help)
        assert family.samples, f"{name} has no sample"
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(row.labels)
            if row.kind != "histogram":
                assert sample.name == row.exposed_name


def test_a_served_model_is_told_with_all_there_is_to_know(live: Watched) -> None:
    details = live.client.get(f"/v1/models/{MODEL}").json()
    labels = {
        "model": MODEL,
        "backend": details["backend"],
        "revision": details["revision"] or "",
        "dims": "384",
        "max_tokens": "256",
    }
    assert live.value("model_info", labels) == 1


def test_readiness_and_limits_are_told(live: Watched) -> None:
    assert live.value("ready") == 1
    assert live.value("queue_requests_limit", OF_MODEL) == 512
    assert live.value("queue_tokens_limit", OF_MODEL) == 1_000_000
    assert live.value("worker_restarts_total") == 0


def test_what_the_system_tells_of_the_process(live: Watched) -> None:
    pid = live.server.process.pid
    before = live.value("process_cpu_seconds_total")
    live.embed([f"{number} {LONG}" for number in range(20)])
    assert live.value("process_cpu_seconds_total") > before > 0
    resident = live.value("process_resident_memory_bytes") / 2**20
    assert resident == pytest.approx(resident_mib(live.server), rel=0.2)
    # One more, perhaps, for the folder that is being read.
    assert 0 <= live.value("process_open_fds") - len(os.listdir(f"/proc/{pid}/fd")) <= 1
    (soft, _) = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    assert live.value("process_max_fds") == soft
    age = time.time() - live.value("process_start_time_seconds")
    assert 0 < age < 3600


def test_a_request_moves_its_counters(live: Watched) -> None:
    live.embed("a")
    with live.counting(
        ("requests_total", {**EMBED, "status": "200"}, 2),
        ("request_duration_seconds_count", EMBED, 2),
        ("tokenize_duration_seconds_count", OF_MODEL, 2),
        ("inputs_total", OF_MODEL, 5),
        ("queue_duration_seconds_count", OF_MODEL, 4),
        ("batch_size_sum", OF_MODEL, 5),
        ("tokens_total", OF_MODEL, 3 + 3 + 256 + 256 + 2),
        ("batch_tokens_sum", OF_MODEL, 3 + 3 + 256 + 256 + 2),
        ("truncated_inputs_total", OF_MODEL, 2),
        ("padding_tokens_total", OF_MODEL, 0),
        ("failed_batches_total", OF_MODEL, 0),
        ("errors_total", {"code": "invalid_request_error"}, 0),
    ):
        assert live.embed(["iPhone", "Samsung", LONG]).status_code == 200
        assert live.embed([LONG, ""]).status_code == 200
    samples = live.samples()
    batches = samples["batch_size_count", frozenset(OF_MODEL.items())]
    for name in ("batch_tokens_count", "inference_duration_seconds_count"):
        assert samples[name, frozenset(OF_MODEL.items())] == batches
    assert live.value("queue_requests", OF_MODEL) == 0
    assert live.value("queue_tokens", OF_MODEL) == 0
    assert live.value("requests_in_flight") == 1, "the one that asks"


def test_errors_move_their_counters(live: Watched) -> None:
    unserved = {"route": "/v1/embeddings", "model": ""}
    with live.counting(
        ("requests_total", {**EMBED, "status": "400"}, 2),
        ("requests_total", {**unserved, "status": "400"}, 2),
        ("requests_total", {**unserved, "status": "404"}, 1),
        ("requests_total", {**unserved, "status": "405"}, 1),
        ("requests_total", {**unserved, "status": "415"}, 1),
        ("requests_total", {"route": "unmatched", "model": "", "status": "404"}, 1),
        ("requests_total", {"route": "/v1/models", "model": "", "status": "401"}, 1),
        ("requests_total", {"route": "/v1/models/{name}", "model": "", "status": "404"}, 1),
        ("errors_total", {"code": "context_length_exceeded"}, 1),
        ("errors_total", {"code": "invalid_request_error"}, 3),
        ("errors_total", {"code": "unknown_field"}, 1),
        ("errors_total", {"code": "model_not_found"}, 2),
        ("errors_total", {"code": "method_not_allowed"}, 1),
        ("errors_total", {"code": "not_found"}, 1),
        ("errors_total", {"code": "invalid_api_key"}, 1),
        ("inputs_total", OF_MODEL, 0),
        ("tokens_total", OF_MODEL, 0),
        ("truncated_inputs_total", OF_MODEL, 0),
    ):
        live.embed(["a", LONG], truncate=False)  # context_length_exceeded
        live.embed([30522])
        live.embed([])
        live.embed("a", nonsense=1)
        live.client.post("/v1/embeddings", json={"model": "nope", "input": "a"})
        live.client.put("/v1/embeddings", json={"model": MODEL, "input": "a"})
        live.client.post("/v1/embeddings", data={"model": MODEL})
        live.client.get("/nowhere")
        live.client.get("/v1/models", headers={"authorization": "Bearer x"})
        live.client.get("/v1/models/nope")


def test_nothing_of_a_request_becomes_a_label(live: Watched) -> None:
    made_up = "zebra4711"
    embed = {"model": made_up, "input": made_up}
    for method, path, fields in (
        ("POST", "/v1/embeddings", {"json": embed}),
        ("POST", "/openai/v1/embeddings", {"json": embed}),
        ("POST", "/v1/embeddings", {"json": {"model": MODEL, "input": "a", made_up: 1}}),
        ("POST", "/v1/embeddings", {"json": {"model": MODEL, "input": "a", "user": made_up}}),
        ("POST", "/v1/embeddings", {"json": {**embed, "model": MODEL, "input_type": made_up}}),
        ("POST", "/v1/embeddings", {"content": made_up, "headers": {"content-type": made_up}}),
        ("GET", f"/v1/models/{made_up}", {}),
        ("GET", f"/openai/v1/models/{made_up}/{made_up}", {}),
        ("GET", f"/{made_up}", {}),
        ("GET", f"/v1/models?{made_up}={made_up}", {}),
        ("DELETE", f"/v1/models/{made_up}", {}),
        ("GET", "/v1/models", {"headers": {"x-request-id": made_up}}),
        ("GET", "/v1/models", {"headers": {"authorization": f"Bearer {made_up}"}}),
        ("GET", "/v1/models", {"headers": {"user-agent": made_up, "host": made_up}}),
    ):
        live.client.request(method, path, **fields)
    live.client.request("MKCOL", "/v1/models")
    page = live.client.get("/metrics").text
    assert made_up not in page
    assert "MKCOL" not in page
    labels = {label for key in live.samples() for label in key[1]}
    assert {value for name, value in labels if name == "model"} == {MODEL, ""}
    routes = {value for name, value in labels if name == "route"}
    assert routes <= {
        "unmatched", "/v1/embeddings", "/openai/v1/embeddings", "/v1/models", "/v1/models/{name}",
        "/openai/v1/models", "/openai/v1/models/{name}", "/health", "/health/live",
        "/health/ready", "/metrics", "/docs", "/openapi.json",
    }  # fmt: skip


def test_two_servers_in_a_process_count_apart() -> None:
    one, other = Telemetry(), Telemetry()
    one.for_model("a").inputs.inc(3)
    other.for_model("b")
    assert 'inputs_total{model="a"} 3.0' in one.exposition()[0].decode()
    assert 'model="a"' not in other.exposition()[0].decode()


def test_no_metric_is_declared_twice() -> None:
    names = [row.name for row in METRICS]
    assert len(names) == len(set(names))
    assert all(row.help.endswith(".") for row in METRICS)


# The log


def fields_of(line: str, log_format: str) -> dict[str, str]:
    """A request's fields, as strings."""
    if log_format == "json":
        return {name: str(value) for name, value in json.loads(line).items()}
    return dict(part.split("=", 1) for part in line.split() if "=" in part)


def test_a_request_is_one_line(each_format: tuple[str, Watched]) -> None:
    log_format, live = each_format
    live.lines()
    live.embed(["iPhone", LONG])
    live.client.get("/v1/models", headers={"x-request-id": "my-id"})
    live.client.post("/v1/embeddings", json={"model": "nope", "input": "a"})
    embedding, listing, unknown = live.lines()
    fields = fields_of(embedding, log_format)
    assert re.fullmatch(r"[0-9a-f]{32}", fields["id"])
    assert float(fields["ms"]) > 0
    shown = ("method", "route", "status", "model", "inputs", "tokens", "truncated")
    assert [fields[name] for name in shown] == [
        "POST", "/v1/embeddings", "200", MODEL, "2", "259", "1",
    ]  # fmt: skip
    assert "error" not in fields
    assert fields_of(listing, log_format)["id"] == "my-id"
    assert fields_of(unknown, log_format)["error"] == "model_not_found"
    assert "model" not in fields_of(unknown, log_format)
    if log_format == "json":
        line = json.loads(embedding)
        assert {"time", "level", "logger", "message"} <= set(line)
        assert (line["status"], line["inputs"], line["tokens"]) == (200, 2, 259)
        assert (line["level"], line["message"]) == ("info", "request")
    else:
        assert re.match(r"\d\d:\d\d:\d\d info +request id=", embedding)


def test_probes_and_scrapes_are_not_logged(each_format: tuple[str, Watched]) -> None:
    _, live = each_format
    live.lines()
    for path in ("/health", "/health/live", "/health/ready", "/metrics"):
        assert live.client.get(path).status_code == 200
    assert live.lines() == []


def test_the_log_holds_no_text_and_no_key(each_format: tuple[str, Watched]) -> None:
    _, live = each_format
    secret = "zebra4712"
    live.embed([secret, f"{secret} {LONG}"])
    live.embed(secret, prompt=secret, user=secret)
    live.embed(f"{secret} {LONG}", truncate=False)
    live.embed([secret, 5])
    live.embed(secret, input_type=secret)
    live.client.post("/v1/embeddings", content=f'{{"input": "{secret}"')
    live.client.post("/v1/embeddings", json={"model": secret, "input": secret})
    live.client.post("/openai/v1/embeddings", json={"model": MODEL, "input": secret, "x": secret})
    live.client.get("/v1/models", headers={"authorization": f"Bearer {secret}"})
    live.client.get(f"/{secret}?{secret}={secret}", headers={"cookie": secret})
    assert len(live.lines()) >= 10
    assert secret not in live.server.log
    assert KEY not in live.server.log


def test_every_line_of_a_log_has_its_format(each_format: tuple[str, Watched]) -> None:
    log_format, live = each_format
    live.client.put("/v1/models")
    live.lines()
    for line in live.server.log.splitlines():
        if log_format == "json":
            assert json.loads(line)["level"] == "info"
        else:
            assert re.match(r"\d\d:\d\d:\d\d info +\S", line)


# Health


def test_health_answers_while_a_large_job_runs(live: Watched) -> None:
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(live.embed, [[1000 + number] * 250 for number in range(40)])
        until(lambda: live.value("queue_tokens", OF_MODEL) > 0 or job.done())
        for path in ("/health/live", "/health/ready", "/health", "/v1/models"):
            response = live.client.get(path, headers={"connection": "close"})
            assert response.status_code == 200
        assert live.embed("a short question").status_code == 200
        assert not job.done(), "all of that came before the job's end"
        assert job.result().status_code == 200


def test_what_health_tells(live: Watched) -> None:
    assert live.client.get("/health/live").json() == {"status": "live"}
    for path in ("/health", "/health/ready"):
        assert live.client.get(path).json() == {"status": "ready", "models": {MODEL: "ready"}}
