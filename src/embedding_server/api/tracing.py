# SPDX-License-Identifier: MIT OR Apache-2.0
"""The OpenTelemetry spans of a request: one for all of it, and one for each of its stages.

They are made when the request is finished, from the times in its record. They contain route
templates, served models and counts; of the client's data only x-request-id and the trace context.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator

from opentelemetry import propagate
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.propagators.textmap import Getter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, StatusCode, format_trace_id, set_span_in_context
from starlette.types import Scope

from embedding_server import __version__
from embedding_server.api.record import RequestRecord
from embedding_server.engine.stages import Stages
from embedding_server.errors import ConfigurationError

__all__ = ["Tracing"]

logger = logging.getLogger(__name__)

# How long the end of the process waits for the last spans to be sent.
_FLUSH_SECONDS = 3.0

# While a collector is unavailable, each OpenTelemetry module logs one line in this time.
_WARNING_SECONDS = 60.0

_PATH = "/v1/traces"

# The semantic conventions call any other method "_OTHER", as a client may invent some.
_METHODS = frozenset(
    ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "CONNECT", "OPTIONS", "TRACE", "QUERY")
)

_Attributes = dict[str, str | int]


class Tracing:
    """Makes spans, and sends them to a collector from a separate thread.

    ``endpoint`` is the collector's URL, in the form of OTEL_EXPORTER_OTLP_ENDPOINT; the SDK reads
    all other OTEL_ variables. Only the "opentelemetry" logger is changed for the whole process.
    Raises ConfigurationError for variables that the SDK refuses.
    """

    def __init__(self, endpoint: str) -> None:
        _Relay.install()
        url = endpoint.rstrip("/").removesuffix(_PATH) + _PATH
        own = {"service.name": "embedding-server", "service.version": __version__}
        try:
            # The environment takes precedence.
            resource = Resource.create({**own, **OTELResourceDetector().detect().attributes})
            self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
            self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(url)))
        except (ValueError, RuntimeError, ImportError) as error:
            raise ConfigurationError(f"A variable OTEL_… can't work: {error}") from None
        self._tracer = self._provider.get_tracer("embedding_server", __version__)

    def request_finished(
        self, scope: Scope, record: RequestRecord, *, route: str, status: int
    ) -> str | None:
        """Make the spans of a request that has just ended; returns its trace id in hexadecimal.

        The id is None if OTEL_SDK_DISABLED is set. With a traceparent header the spans belong to
        the caller's trace, and are sampled if that is. ``status`` 499 means a client that hung up.
        """
        assert record.stages is not None
        now, now_ns = time.perf_counter(), time.time_ns()

        def wall(stamp: float) -> int:
            """``stamp`` in nanoseconds of Unix time."""
            return now_ns - round((now - stamp) * 1e9)

        method = scope["method"] if scope["method"] in _METHODS else "HTTP"
        span = self._tracer.start_span(
            method if route == "unmatched" else f"{method} {route}",
            context=propagate.extract(scope["headers"], getter=_HEADERS),
            kind=SpanKind.SERVER,
            attributes=_server_attributes(scope, record, route, status),
            start_time=wall(record.stages.request_start),
        )
        if span.is_recording():
            if status >= 500 or record.fault is not None:
                span.set_status(StatusCode.ERROR)
            below = set_span_in_context(span)
            for name, start, end, more in _stages(record.stages, now):
                child = self._tracer.start_span(
                    name, below, attributes=more, start_time=wall(start)
                )
                child.end(wall(end))
            span.end(now_ns)
        context = span.get_span_context()
        return format_trace_id(context.trace_id) if context.is_valid else None

    def close(self) -> None:
        """Send the last spans, for a few seconds at most, as the collector may be unavailable."""
        flushing = threading.Thread(target=self._provider.shutdown, name="last spans", daemon=True)
        flushing.start()
        flushing.join(_FLUSH_SECONDS)
        if flushing.is_alive():
            logger.warning("the last traces could not be sent within %d s", _FLUSH_SECONDS)


def _server_attributes(scope: Scope, record: RequestRecord, route: str, status: int) -> _Attributes:
    """Named by the semantic conventions for HTTP servers and GenAI, or with this package's name."""
    method = scope["method"]
    attributes: _Attributes = {
        "http.request.method": method if method in _METHODS else "_OTHER",
        "http.response.status_code": status,
        "url.scheme": scope.get("scheme", "http"),
        "network.protocol.version": scope["http_version"],
        "embedding_server.request_id": record.id,
    }
    if route != "unmatched":
        attributes["http.route"] = route
        if "{" not in route:  # otherwise the path contains a name that the client chose
            attributes["url.path"] = scope["path"]
    if route.endswith("/embeddings"):
        attributes["gen_ai.operation.name"] = "embeddings"
    if record.model:
        attributes |= {
            "gen_ai.request.model": record.model,
            "gen_ai.usage.input_tokens": record.tokens,
            "embedding_server.inputs": record.inputs,
            "embedding_server.truncated": record.truncated,
        }
    if status == 499:
        attributes["error.type"] = "client_disconnected"
    elif status >= 500 or record.fault is not None:
        attributes["error.type"] = record.error_code or "internal_error"
    elif record.error_code is not None:  # a client's error is no error of the server's span
        attributes["embedding_server.error_code"] = record.error_code
    return attributes


def _stages(stages: Stages, now: float) -> Iterator[tuple[str, float, float, _Attributes]]:
    """``(name, start, end, attributes)`` of each stage that was reached; ``now`` ends open ones."""
    if stages.tokenize_start:
        yield "tokenize", stages.tokenize_start, stages.tokenize_end or now, {}
    if stages.queue_start:
        yield "queue", stages.queue_start, stages.inference_start or now, {}
    if stages.inference_start:
        end = now if stages.running else stages.inference_end
        computed: _Attributes = {
            "embedding_server.batches": stages.batches,
            "embedding_server.tokens": stages.tokens,
        }
        yield "inference", stages.inference_start, end, computed


class _Headers(Getter[Iterable[tuple[bytes, bytes]]]):
    """ASGI's headers, for OpenTelemetry's propagators."""

    def get(self, carrier: Iterable[tuple[bytes, bytes]], key: str) -> list[str] | None:
        name = key.lower().encode("latin-1")
        values = [value.decode("latin-1") for header, value in carrier if header == name]
        # Joined, as HTTP defines it: two traceparents are then invalid, and both ignored.
        return [",".join(values)] if values else None

    def keys(self, carrier: Iterable[tuple[bytes, bytes]]) -> list[str]:
        return [header.decode("latin-1") for header, _ in carrier]


_HEADERS = _Headers()


class _Relay(logging.Handler):
    """Copies OpenTelemetry's warnings to our log: one line a minute for each of its modules."""

    # Their warnings quote what a client has sent.
    _ABOUT_CLIENTS = ("opentelemetry.trace.", "opentelemetry.baggage.", "opentelemetry.propagators")

    # Its warnings quote a malformed header for the collector, which may contain a key.
    _ABOUT_HEADERS = "opentelemetry.util.re"

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(logging.WARNING)
        self._clock = clock
        self._quiet_until: dict[str, float] = {}

    @classmethod
    def install(cls) -> None:
        """Replace the handlers of OpenTelemetry's logger, once in a process."""
        source = logging.getLogger("opentelemetry")
        source.propagate = False
        if not any(isinstance(handler, cls) for handler in source.handlers):
            source.addHandler(cls())

    def emit(self, record: logging.LogRecord) -> None:
        now = self._clock()
        if record.name.startswith(self._ABOUT_CLIENTS):
            return
        if now < self._quiet_until.get(record.name, now):
            return
        self._quiet_until[record.name] = now + _WARNING_SECONDS
        if record.name == self._ABOUT_HEADERS:
            message = "OTEL_EXPORTER_OTLP_HEADERS has a part that is no name=value, URL-encoded"
        else:
            message = record.getMessage()
        error = record.exc_info[1] if record.exc_info else None
        because = f" ({type(error).__name__})" if error else ""
        logger.warning("OpenTelemetry: %s%s", message, because)
