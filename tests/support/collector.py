# SPDX-License-Identifier: MIT OR Apache-2.0
"""A collector of OpenTelemetry on loopback: takes OTLP over HTTP in protobuf, and keeps it."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span as SpanMessage
from opentelemetry.proto.trace.v1.trace_pb2 import Status

Attributes = dict[str, str | int]


@dataclass(frozen=True)
class Span:
    """One span as it was received; ids in hexadecimal, times in nanoseconds of Unix time."""

    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_id: str
    trace_state: str
    start: int
    end: int
    status: str
    attributes: Attributes
    resource: Attributes

    def contains(self, other: Span) -> bool:
        """Whether ``other`` began and ended while it lasted."""
        return self.start <= other.start <= other.end <= self.end


@dataclass
class Collector:
    """Where it listens, and what came there."""

    url: str
    spans: list[Span] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    headers: list[Mapping[str, str]] = field(default_factory=list)
    paths: set[str] = field(default_factory=set)

    def of_trace(self, trace_id: str) -> list[Span]:
        """Those of one trace, in the order of their beginnings."""
        return sorted(
            (span for span in list(self.spans) if span.trace_id == trace_id),
            key=lambda span: (span.start, -span.end),
        )

    def of_request(self, request_id: str) -> Span | None:
        """The span of the request that had this x-request-id."""
        return next(
            (
                span
                for span in list(self.spans)
                if span.attributes.get("embedding_server.request_id") == request_id
            ),
            None,
        )


@contextmanager
def collecting(*, silent: bool = False) -> Iterator[Collector]:
    """A running collector; a ``silent`` one takes everything and never answers."""
    over = threading.Event()

    class Intake(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if silent:
                over.wait()
                return
            if self.headers["content-encoding"] == "gzip":
                body = gzip.decompress(body)
            collector.paths.add(self.path)
            collector.headers.append({name.lower(): value for name, value in self.headers.items()})
            collector.bodies.append(body)
            collector.spans.extend(_spans(body))
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Intake) as server:
        server.daemon_threads = True
        collector = Collector(f"http://127.0.0.1:{server.server_address[1]}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield collector
        finally:
            over.set()
            server.shutdown()
            thread.join()


def _spans(body: bytes) -> Iterator[Span]:
    request = ExportTraceServiceRequest()
    request.ParseFromString(body)
    for resource_spans in request.resource_spans:
        resource = dict(map(_attribute, resource_spans.resource.attributes))
        for scope_spans in resource_spans.scope_spans:
            for span in scope_spans.spans:
                yield Span(
                    name=span.name,
                    kind=SpanMessage.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
                    trace_id=span.trace_id.hex(),
                    span_id=span.span_id.hex(),
                    parent_id=span.parent_span_id.hex(),
                    trace_state=span.trace_state,
                    start=span.start_time_unix_nano,
                    end=span.end_time_unix_nano,
                    status=Status.StatusCode.Name(span.status.code).removeprefix("STATUS_CODE_"),
                    attributes=dict(map(_attribute, span.attributes)),
                    resource=resource,
                )


def _attribute(pair: KeyValue) -> tuple[str, str | int]:
    kind = pair.value.WhichOneof("value")
    assert kind in ("string_value", "int_value"), f"{pair.key} is of another kind: {kind}"
    return pair.key, getattr(pair.value, kind)
