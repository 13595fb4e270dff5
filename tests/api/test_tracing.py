# SPDX-License-Identifier: MIT OR Apache-2.0
"""Traces as a collector gets them, over a real socket, from a real server."""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fake_backends
import httpx
import pytest
from collector import Collector, Span, collecting
from error_shape import error_of
from fake_backends import Blocked
from in_process import serving, until
from live import LiveServer, run_cli, running_server

from embedding_server import __version__
from embedding_server.api.tracing import Tracing
from embedding_server.backends.base import BACKENDS
from embedding_server.errors import ConfigurationError
from embedding_server.serving.servers.base import SERVERS
from embedding_server.settings import load_settings

MODEL = "all-MiniLM-L6-v2"
KEY = "sesame-4711"
KEYED = {"authorization": f"Bearer {KEY}"}
LONG = "word " * 300
STAGES = ["tokenize", "queue", "inference"]
SOON = {"OTEL_BSP_SCHEDULE_DELAY": "20"}  # milliseconds until finished spans are sent
NEVER = {"OTEL_BSP_SCHEDULE_DELAY": "600000"}


@dataclass(frozen=True)
class Traced:
    """A live server that sends its traces to ``collector``, and a client of it."""

    server: LiveServer
    client: httpx.Client
    collector: Collector

    def embed(self, input: Any, **headers: str) -> httpx.Response:
        body = {"model": MODEL, "input": input}
        return self.client.post("/v1/embeddings", json=body, headers=headers)

    def trace_of(self, response: httpx.Response) -> list[Span]:
        """All spans of the answer's trace, its own first."""
        request_id = response.headers["x-request-id"]
        # It ends last, and so all below it has come before it or with it.
        until(lambda: self.collector.of_request(request_id) is not None)
        own = self.collector.of_request(request_id)
        assert own is not None
        return self.collector.of_trace(own.trace_id)

    def logged(self, response: httpx.Response) -> dict[str, Any]:
        """The answer's line in the log."""
        request_id = response.headers["x-request-id"]
        lines: list[dict[str, Any]] = []

        def found() -> bool:
            whole = self.server.log.rpartition("\n")[0].splitlines()
            lines[:] = [json.loads(line) for line in whole if request_id in line]
            return bool(lines)

        until(found)
        return lines[0]


@contextmanager
def tracing_server(
    collector: Collector, *arguments: str, env: dict[str, str] | None = None
) -> Iterator[Traced]:
    with (
        running_server(
            *("--model", MODEL, "--api-key", KEY, "--log-format", "json"),
            *("--otlp-endpoint", collector.url, *arguments),
            env=env,
        ) as server,
        httpx.Client(base_url=server.url, headers=KEYED, timeout=60) as client,
    ):
        yield Traced(server, client, collector)


@pytest.fixture(scope="module")
def traced() -> Iterator[Traced]:
    with collecting() as collector:
        environment = {
            **SOON,
            "OTEL_EXPORTER_OTLP_HEADERS": "x-tenant=search",
            "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test,service.version=7",
            # FastAPI would make spans of its own then, and send them itself.
            "FASTAPI_OTEL_AUTO_CONFIGURE": "true",
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        }
        with tracing_server(collector, env=environment) as traced:
            yield traced


@pytest.fixture
def use_backend(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts one of ``fake_backends`` in the place of onnx, and has spans sent soon."""
    for name, value in SOON.items():
        monkeypatch.setenv(name, value)

    def use(backend: type[fake_backends.Working]) -> None:
        monkeypatch.setitem(BACKENDS, "onnx", f"fake_backends:{backend.__name__}")

    return use


def traceparent(*, flags: str = "01") -> tuple[str, str, str]:
    """``(trace id, span id, header)`` of a caller."""
    trace_id, span_id = secrets.token_hex(16), secrets.token_hex(8)
    return trace_id, span_id, f"00-{trace_id}-{span_id}-{flags}"


def assert_whole(trace: list[Span]) -> None:
    """A request's span with its three stages below it, one after the other."""
    own, tokenize, queue, inference = trace
    assert [span.name for span in trace[1:]] == STAGES
    assert {span.parent_id for span in trace[1:]} == {own.span_id}
    assert {span.kind for span in trace[1:]} == {"INTERNAL"}
    assert len({span.span_id for span in trace}) == 4
    assert own.kind == "SERVER"
    assert all(own.contains(stage) for stage in trace[1:])
    assert own.start < tokenize.start < tokenize.end <= queue.start < queue.end
    assert queue.end == inference.start < inference.end < own.end


# What a request's trace is


@pytest.mark.parametrize("path", ["/v1/embeddings", "/openai/v1/embeddings"])
def test_a_request_is_a_span_with_its_stages(traced: Traced, path: str) -> None:
    before = time.time_ns()
    response = traced.client.post(path, json={"model": MODEL, "input": ["iPhone", LONG]})
    after = time.time_ns()
    assert response.status_code == 200
    trace = traced.trace_of(response)
    assert_whole(trace)
    own, tokenize, queue, inference = trace
    assert own.name == f"POST {path}"
    assert (own.parent_id, own.status) == ("", "UNSET")
    assert own.attributes == {
        "http.request.method": "POST",
        "http.route": path,
        "http.response.status_code": 200,
        "url.path": path,
        "url.scheme": "http",
        "network.protocol.version": "1.1",
        "gen_ai.operation.name": "embeddings",
        "gen_ai.request.model": MODEL,
        "gen_ai.usage.input_tokens": 3 + 256,
        "embedding_server.request_id": response.headers["x-request-id"],
        "embedding_server.inputs": 2,
        "embedding_server.truncated": 1,
    }
    assert tokenize.attributes == queue.attributes == {}
    assert inference.attributes == {
        "embedding_server.batches": inference.attributes["embedding_server.batches"],
        "embedding_server.tokens": 3 + 256,
    }
    assert before < own.start < after, "in the clock that everyone goes by"
    assert before < inference.end < after
    assert traced.collector.paths == {"/v1/traces"}


@pytest.mark.parametrize("server_name", SERVERS)
def test_every_other_route_is_a_span_alone(server_name: str) -> None:
    with (
        collecting() as collector,
        tracing_server(collector, "--server", server_name, env=SOON) as traced,
    ):
        listing = traced.client.get("/v1/models")
        model = traced.client.get(f"/v1/models/{MODEL}")
        for response, route, path in (
            (listing, "/v1/models", {"url.path": "/v1/models"}),
            (model, "/v1/models/{name}", {}),
        ):
            assert response.status_code == 200
            (span,) = traced.trace_of(response)
            assert (span.name, span.kind) == (f"GET {route}", "SERVER")
            assert span.attributes == {
                "http.request.method": "GET",
                "http.route": route,
                "http.response.status_code": 200,
                "url.scheme": "http",
                "network.protocol.version": "1.1",
                "embedding_server.request_id": response.headers["x-request-id"],
                **path,
            }
        body = {"model": MODEL, "input": "iPhone"}
        by_get = traced.client.request("GET", "/v1/embeddings", json=body)
        assert_whole(traced.trace_of(by_get))


def test_fastapi_makes_no_spans_beside_ours(traced: Traced) -> None:
    trace_id, _, header = traceparent()
    traced.client.get("/v1/models", headers={"traceparent": header})
    # Its own would have come by the time that a later request's has.
    for _ in range(3):
        traced.trace_of(traced.client.get("/v1/models"))
    assert len(traced.collector.of_trace(trace_id)) == 1
    assert not [span for span in traced.collector.spans if span.name.startswith("fastapi.")]


def test_health_and_metrics_are_no_spans(traced: Traced) -> None:
    for path in ("/health", "/health/live", "/health/ready", "/metrics"):
        assert traced.client.get(path).status_code == 200
    traced.trace_of(traced.client.get("/v1/models"))
    told = {span.attributes.get("http.route") for span in traced.collector.spans}
    assert not {route for route in told if str(route).startswith(("/health", "/metrics"))}


def test_a_large_request_is_several_batches(traced: Traced) -> None:
    texts = [f"{number} words of some length that differ" * 4 for number in range(200)]
    response = traced.embed([*texts, texts[0]])
    trace = traced.trace_of(response)
    assert_whole(trace)
    own, _, _, inference = trace
    tokens = int(own.attributes["gen_ai.usage.input_tokens"])
    assert tokens == response.json()["usage"]["prompt_tokens"]
    once = tokens - traced.embed(texts[0]).json()["usage"]["prompt_tokens"]
    assert inference.attributes["embedding_server.tokens"] == once, "equal inputs are computed once"
    assert int(inference.attributes["embedding_server.batches"]) > 1


def test_requests_at_the_same_time_have_traces_of_their_own(traced: Traced) -> None:
    callers = [traceparent() for _ in range(8)]

    def ask(caller: tuple[str, str, str]) -> httpx.Response:
        texts = [f"{caller[0]} {number}" for number in range(20)]
        return traced.embed(texts, traceparent=caller[2])

    with ThreadPoolExecutor(len(callers)) as pool:
        answers = list(pool.map(ask, callers))
    for (trace_id, span_id, _), answer in zip(callers, answers, strict=True):
        trace = traced.trace_of(answer)
        assert_whole(trace)
        assert (trace[0].trace_id, trace[0].parent_id) == (trace_id, span_id)
        assert (
            trace[0].attributes["gen_ai.usage.input_tokens"]
            == (answer.json()["usage"]["prompt_tokens"])
        )


# Context in and out


def test_a_span_is_its_callers_and_the_log_says_which(traced: Traced) -> None:
    trace_id, span_id, header = traceparent()
    response = traced.embed("iPhone", traceparent=header, tracestate="vendor=opaque,other=1")
    trace = traced.trace_of(response)
    assert_whole(trace)
    assert (trace[0].trace_id, trace[0].parent_id) == (trace_id, span_id)
    assert {span.trace_state for span in trace} == {"vendor=opaque,other=1"}
    assert traced.logged(response)["trace_id"] == trace_id
    root = traced.embed("iPhone")
    assert traced.logged(root)["trace_id"] == traced.trace_of(root)[0].trace_id != trace_id


def test_what_its_caller_does_not_sample_is_not_sent(traced: Traced) -> None:
    trace_id, _, header = traceparent(flags="00")
    response = traced.embed("iPhone", traceparent=header)
    assert traced.logged(response)["trace_id"] == trace_id
    traced.trace_of(traced.embed("iPhone"))
    assert traced.collector.of_trace(trace_id) == []


def test_a_traceparent_that_is_none_is_ignored(traced: Traced) -> None:
    trace_id, span_id, valid = traceparent()
    broken = [
        "",
        "nonsense",
        valid.upper().replace("00-", "0A-", 1),
        f"00-{'0' * 32}-{span_id}-01",
        f"00-{trace_id}-{'0' * 16}-01",
        f"ff-{trace_id}-{span_id}-01",
        f"00-{trace_id}-{span_id}-01-more",
        f"00-{trace_id[1:]}-{span_id}-01",
        f"00-{trace_id}-{span_id}",
        valid + "-" + "x" * 1000,
    ]
    answers = [traced.embed("iPhone", traceparent=header) for header in broken]
    twice = [*KEYED.items(), ("traceparent", valid), ("traceparent", traceparent()[2])]
    body = {"model": MODEL, "input": "iPhone"}
    answers.append(httpx.post(f"{traced.server.url}/v1/embeddings", json=body, headers=twice))
    for answer in answers:
        assert answer.status_code == 200
        own, *_ = traced.trace_of(answer)
        assert own.parent_id == ""
    assert traced.collector.of_trace(trace_id) == []


def test_a_tracestate_that_is_none_is_dropped_and_not_told(traced: Traced) -> None:
    trace_id, _, header = traceparent()
    response = traced.embed("iPhone", traceparent=header, tracestate="zebra4713, zebra4713")
    own, *_ = traced.trace_of(response)
    assert (own.trace_id, own.trace_state) == (trace_id, "")
    assert "zebra4713" not in traced.server.log


# Errors


def test_a_clients_error_is_told_but_is_not_the_servers(traced: Traced) -> None:
    made_up = "zebra4714"
    wrong = {"authorization": "Bearer wrong"}
    body = {"model": MODEL, "input": "a"}
    for response, name, status, code in (
        (traced.embed([]), "POST /v1/embeddings", 400, "invalid_request_error"),
        (
            traced.client.post("/v1/embeddings", json={**body, "model": made_up}),
            "POST /v1/embeddings", 404, "model_not_found",
        ),
        (
            traced.client.post("/v1/embeddings", json=body, headers=wrong),
            "POST /v1/embeddings", 401, "invalid_api_key",
        ),
        (traced.client.get(f"/{made_up}"), "GET", 404, "not_found"),
        (
            traced.client.request("MKCOL", "/v1/models"),
            "HTTP /v1/models", 405, "method_not_allowed",
        ),
    ):  # fmt: skip
        own, *stages = traced.trace_of(response)
        assert (own.name, own.status, stages) == (name, "UNSET", [])
        assert own.attributes["http.response.status_code"] == response.status_code == status
        assert own.attributes["embedding_server.error_code"] == code
        assert "error.type" not in own.attributes
        assert "gen_ai.request.model" not in own.attributes or status == 400
    assert made_up not in str(traced.collector.spans)
    assert "MKCOL" not in str(traced.collector.spans)


def test_what_is_too_long_was_tokenised(traced: Traced) -> None:
    body = {"model": MODEL, "input": ["a", LONG], "truncate": False}
    own, *stages = traced.trace_of(traced.client.post("/v1/embeddings", json=body))
    assert own.attributes["embedding_server.error_code"] == "context_length_exceeded"
    (tokenize,) = stages
    assert tokenize.name == "tokenize"
    assert own.contains(tokenize)


def test_a_fault_is_the_servers(use_backend: Any, tiny_model: Path) -> None:
    use_backend(fake_backends.Failing)
    with (
        collecting() as collector,
        serving(model=(str(tiny_model),), otlp_endpoint=collector.url) as it,
    ):
        body = {"model": "tiny", "input": "iPhone"}
        response = httpx.post(f"{it.url}/v1/embeddings", json=body)
        error_of(response, 500)
        until(lambda: bool(collector.spans))
        trace = collector.of_trace(collector.spans[0].trace_id)
    assert_whole(trace)
    own = trace[0]
    assert own.status == "ERROR"
    assert own.attributes["http.response.status_code"] == 500
    assert own.attributes["error.type"] == "internal_error"
    assert "secret" not in str(trace)


def test_a_server_that_is_not_ready_is_told(use_backend: Any) -> None:
    Blocked.reset(load=False)
    use_backend(Blocked)
    with (
        collecting() as collector,
        serving(model=(MODEL,), otlp_endpoint=collector.url, wait=False) as it,
    ):
        try:
            body = {"model": MODEL, "input": "iPhone"}
            error_of(httpx.post(f"{it.url}/v1/embeddings", json=body), 503)
            until(lambda: bool(collector.spans))
        finally:
            Blocked.release()
    (own,) = collector.spans
    assert (own.status, own.attributes["error.type"]) == ("ERROR", "not_ready")


def test_a_deadline_that_passed_is_told_with_where(use_backend: Any, tiny_model: Path) -> None:
    Blocked.reset(load=True)
    use_backend(Blocked)
    with (
        collecting() as collector,
        serving(model=(str(tiny_model),), otlp_endpoint=collector.url) as it,
    ):
        try:
            body, soon = {"model": "tiny", "input": "iPhone"}, {"x-request-timeout": "0.1"}
            response = httpx.post(f"{it.url}/v1/embeddings", json=body, headers=soon)
            assert response.status_code == 504
            until(lambda: bool(collector.spans))
        finally:
            Blocked.release()
    own, *stages = collector.of_trace(collector.spans[0].trace_id)
    assert own.attributes["http.response.status_code"] == 504
    assert (own.status, own.attributes["error.type"]) == ("ERROR", "deadline_exceeded")
    assert [span.name for span in stages] == STAGES
    assert stages[-1].end == own.end


def test_a_client_that_hangs_up_is_told_with_where_it_waited(
    use_backend: Any, tiny_model: Path
) -> None:
    Blocked.reset(load=True)
    use_backend(Blocked)
    with (
        collecting() as collector,
        serving(model=(str(tiny_model),), otlp_endpoint=collector.url) as it,
    ):
        try:
            metric = 'embedding_server_queue_requests{model="tiny"}'
            for waiting in (1, 2):  # the first is computed, the second in the queue
                address = it.url.removeprefix("http://").split(":")
                client = socket.create_connection((address[0], int(address[1])))
                body = json.dumps({"model": "tiny", "input": f"text {waiting}"}).encode()
                client.sendall(
                    b"POST /v1/embeddings HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
                    b"x-request-id: %d\r\ncontent-length: %d\r\n\r\n%b" % (waiting, len(body), body)
                )
                until(lambda n=waiting: f"{metric} {n}.0" in httpx.get(f"{it.url}/metrics").text)
                if waiting == 1:
                    first = client
            first.close()
            client.close()
            until(lambda: collector.of_request("1") is not None)
            until(lambda: collector.of_request("2") is not None)
        finally:
            Blocked.release()
    for request_id, reached in (("1", STAGES), ("2", STAGES[:2])):
        own = collector.of_request(request_id)
        assert own is not None
        assert (own.status, own.attributes["http.response.status_code"]) == ("UNSET", 499)
        assert own.attributes["error.type"] == "client_disconnected"
        trace = collector.of_trace(own.trace_id)
        assert [span.name for span in trace] == ["POST /v1/embeddings", *reached]
        assert trace[-1].end == own.end, "it ended where it was"


# What is in it


def test_nothing_of_a_request_is_sent(traced: Traced) -> None:
    secret = "zebra4715"
    embed = {"model": MODEL, "input": secret}
    for method, path, fields in (
        ("POST", "/v1/embeddings", {"json": embed}),
        ("POST", "/v1/embeddings", {"json": {**embed, "prompt": secret, "user": secret}}),
        ("POST", "/v1/embeddings", {"json": {**embed, "model": secret}}),
        ("POST", "/v1/embeddings", {"json": {**embed, "input_type": secret}}),
        ("POST", "/v1/embeddings", {"json": {**embed, secret: secret}}),
        ("POST", "/v1/embeddings", {"content": secret, "headers": {"content-type": secret}}),
        ("POST", f"/v1/embeddings?{secret}={secret}", {"json": embed}),
        ("GET", f"/v1/models/{secret}", {}),
        ("GET", f"/{secret}", {"headers": {"user-agent": secret, "cookie": secret}}),
        ("GET", "/v1/models", {"headers": {"authorization": f"Bearer {secret}"}}),
        ("GET", "/v1/models", {"headers": {"baggage": f"{secret}={secret}", "host": secret}}),
    ):
        traced.trace_of(traced.client.request(method, path, **fields))
    sent = b"".join(traced.collector.bodies)
    assert MODEL.encode() in sent
    assert secret.encode() not in sent
    assert KEY.encode() not in sent


def test_the_resource_and_the_variables_of_the_sdk(traced: Traced) -> None:
    own, *_ = traced.trace_of(traced.client.get("/v1/models"))
    assert own.resource["service.name"] == "embedding-server"
    assert own.resource["service.version"] == "7", "as OTEL_RESOURCE_ATTRIBUTES has it"
    assert own.resource["deployment.environment.name"] == "test"
    assert own.resource["telemetry.sdk.language"] == "python"
    assert traced.collector.headers[-1]["x-tenant"] == "search"


@pytest.mark.parametrize("server_name", SERVERS)
def test_the_name_and_the_sampler_are_the_environments(server_name: str) -> None:
    environment = {
        **NEVER,
        "OTEL_SERVICE_NAME": "search-vectors",
        "OTEL_TRACES_SAMPLER": "parentbased_always_off",
        "OTEL_EXPORTER_OTLP_COMPRESSION": "gzip",
    }
    with collecting() as collector:
        with tracing_server(collector, "--server", server_name, env=environment) as traced:
            traced.embed("iPhone")
            trace_id, _, header = traceparent()
            response = traced.embed("iPhone", traceparent=header)
            assert traced.logged(response)["trace_id"] == trace_id
            assert collector.bodies == []
        assert traced.server.process.returncode == 0
    assert {span.trace_id for span in collector.spans} == {trace_id}, "sent at the end"
    assert_whole(collector.of_trace(trace_id))
    assert {span.resource["service.name"] for span in collector.spans} == {"search-vectors"}
    assert {span.resource["service.version"] for span in collector.spans} == {__version__}
    assert collector.headers[0]["content-encoding"] == "gzip"


def test_the_sdk_can_be_switched_off() -> None:
    with collecting() as collector:
        environment = {**NEVER, "OTEL_SDK_DISABLED": "true"}
        with tracing_server(collector, env=environment) as traced:
            assert "trace_id" not in traced.logged(traced.embed("iPhone"))
        assert collector.bodies == []


def test_each_worker_sends_its_own() -> None:
    def instances() -> set[str | int]:
        with httpx.Client(base_url=traced.server.url, headers=KEYED) as client:
            client.get("/v1/models")  # by whichever worker takes the connection
        return {span.resource["service.instance.id"] for span in list(collector.spans)}

    with collecting() as collector:
        with tracing_server(collector, "--workers", "2", env=SOON) as traced:
            until(lambda: len(instances()) == 2)
            traced.client.get("/v1/models", headers={"x-request-id": "the-last"})
        assert collector.of_request("the-last") is not None, "sent at the end, at the latest"


# Collectors that fail


def test_a_collector_that_is_gone_costs_a_line_now_and_then() -> None:
    with collecting() as collector:
        pass
    environment = {
        **SOON,
        "OTEL_EXPORTER_OTLP_TIMEOUT": "0.05",
        "OTEL_BSP_MAX_QUEUE_SIZE": "32",
        "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "8",
    }
    with tracing_server(collector, env=environment) as traced:
        for number in range(100):
            assert traced.embed(f"text {number}").status_code == 200
        until(lambda: "OpenTelemetry: " in traced.server.log)
        assert traced.server.stop() == 0
        lines = [json.loads(line) for line in traced.server.log.splitlines()]
    warnings = [line for line in lines if line["level"] != "info"]
    assert 1 <= len(warnings) <= 3, "one of each part of the SDK"
    for line in warnings:
        assert line["logger"] == "embedding_server.api.tracing"
        assert line["level"] == "warning"
        assert "exception" not in line


def test_a_collector_that_does_not_answer_holds_up_no_one() -> None:
    with collecting(silent=True) as collector, tracing_server(collector, env=SOON) as traced:
        for number in range(10):
            assert traced.embed(f"text {number}").status_code == 200
        # The SDK alone would wait for longer than this does.
        assert traced.server.stop() == 0
        assert "the last traces could not be sent" in traced.server.log
        assert "Traceback" not in traced.server.log


def test_warnings_are_told_once_a_minute_by_each_part(caplog: pytest.LogCaptureFixture) -> None:
    from embedding_server.api.tracing import _Relay

    now = 0.0
    relay = _Relay(clock=lambda: now)
    for minute in range(3):
        now = 60.0 * minute
        for name in ("opentelemetry.a", "opentelemetry.b", "opentelemetry.trace.span"):
            for _ in range(1000):
                relay.handle(logging.LogRecord(name, logging.ERROR, "", 0, name, None, None))
    told = [record.getMessage() for record in caplog.records]
    assert told == ["OpenTelemetry: opentelemetry.a", "OpenTelemetry: opentelemetry.b"] * 3
    fault = (OSError, OSError("disk"), None)
    relay.handle(logging.LogRecord("opentelemetry.c", logging.ERROR, "", 0, "fault", None, fault))
    assert caplog.messages[-1] == "OpenTelemetry: fault (OSError)"


def test_a_header_for_the_collector_is_never_logged() -> None:
    environment = {**SOON, "OTEL_EXPORTER_OTLP_HEADERS": 'x-a=1,authorization="zebra4717"'}
    with collecting() as collector, tracing_server(collector, env=environment) as traced:
        traced.trace_of(traced.client.get("/v1/models"))
        assert "OTEL_EXPORTER_OTLP_HEADERS has a part" in traced.server.log
        assert "zebra4717" not in traced.server.log
        assert collector.headers[0]["x-a"] == "1"


# On and off


def test_without_the_setting_nothing_is_loaded_and_nothing_sent() -> None:
    with collecting() as collector:
        environment = {
            "PYTHONPROFILEIMPORTTIME": "1",
            "FASTAPI_OTEL_AUTO_CONFIGURE": "true",
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
            **SOON,
        }
        with running_server("--model", MODEL, env=environment) as server:
            body = {"model": MODEL, "input": "iPhone"}
            header = {"traceparent": traceparent()[2]}
            response = httpx.post(f"{server.url}/v1/embeddings", json=body, headers=header)
            assert response.status_code == 200
            assert httpx.get(f"{server.url}/v1/models").status_code == 200
            assert server.stop() == 0
            log = server.log
    assert "embedding_server.api.middleware" in log, "what is imported stands there"
    # FastAPI itself loads OpenTelemetry's API, which does nothing.
    for package in ("sdk", "exporter", "proto"):
        assert f"opentelemetry.{package}" not in log
    assert "embedding_server.api.tracing" not in log
    assert "trace_id" not in log
    assert collector.bodies == []


def test_without_the_extra_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nsys.modules['opentelemetry.sdk'] = None"
    )
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = run_cli(
        *("serve", "--port", "0", "--model", MODEL, "--otlp-endpoint", "http://127.0.0.1:4318"),
        env={"PYTHONPATH": os.pathsep.join(paths)},
    )
    assert done.returncode == 1
    assert b"--otlp-endpoint" in done.stderr
    assert b"pip install 'embedding-server[otlp]'" in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    "url",
    [
        "localhost:4318",
        "http://",
        "grpc://localhost:4317",
        "http://localhost:port",
        "http://localhost:4318?a=b",
        "http://local host:4318",
        "http://[::1",
        "/v1/traces",
    ],
)
def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^--otlp-endpoint .* as http://localhost:4318"):
        load_settings({"otlp_endpoint": url})


def test_a_url_with_a_password_is_refused_and_not_told() -> None:
    with pytest.raises(ConfigurationError, match="OTEL_EXPORTER_OTLP_HEADERS") as refused:
        load_settings({"otlp_endpoint": "http://me:zebra4716@localhost:4318"})
    assert "zebra4716" not in str(refused.value)


def test_variables_that_the_sdk_refuses_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "-1")
    with pytest.raises(ConfigurationError, match="OTEL_.*max_queue_size"):
        Tracing("http://127.0.0.1:4318")


@pytest.mark.parametrize("suffix", ["", "/", "/v1/traces", "/behind/a/prefix"])
def test_the_path_is_added_to_the_endpoint(suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "600000")
    with collecting() as collector, serving(otlp_endpoint=collector.url + suffix, wait=False) as it:
        httpx.get(f"{it.url}/v1/models")
        it.server.stop()
        it.thread.join(30)
        assert collector.paths == {suffix.rstrip("/").removesuffix("/v1/traces") + "/v1/traces"}
