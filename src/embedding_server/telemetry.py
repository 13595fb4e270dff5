# SPDX-License-Identifier: MIT OR Apache-2.0
"""Every metric, one row each; label values are only our routes and served models."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal, Self

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.multiprocess import MultiProcessCollector

from embedding_server.processes import PROCESS_METRICS, Processes

__all__ = ["METRICS", "Metric", "ModelMetrics", "Telemetry"]

_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SCRAPES = 5
"""Attempts to read the files of all workers."""

_SECONDS = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)  # fmt: skip
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
_TOKENS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the table of metrics."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] | None = None
    over_processes: Literal["livesum", "max", "mostrecent"] = "livesum"
    """How the gauges of a server's processes are combined."""

    @property
    def family(self) -> str:
        """The name in Prometheus' text format, before ``_total`` or ``_bucket``."""
        # Every client library gives these names to the figures of a process.
        standard = self.name.startswith("process_")
        return self.name if standard else f"embedding_server_{self.name}"

    @property
    def exposed_name(self) -> str:
        """The name as Prometheus shows it."""
        return self.family + ("_total" if self.kind == "counter" else "")


_COUNTED: tuple[Metric, ...] = (
    Metric(
        "ready", "gauge",
        "1 if /health/ready answers 200, else 0; with --workers, of the worker that answers.",
        over_processes="mostrecent",
    ),
    Metric("requests", "counter", "Requests answered.", ("route", "model", "status")),
    Metric("errors", "counter", "Errors answered, by the error's code.", ("code",)),
    Metric("requests_in_flight", "gauge", "Requests being served now."),
    Metric(
        "request_duration_seconds", "histogram",
        "Seconds from the request's first byte to the answer's last, by route and model.",
        ("route", "model"), _SECONDS,
    ),
    Metric(
        "tokenize_duration_seconds", "histogram", "Seconds to tokenise one request.",
        ("model",), _SECONDS,
    ),
    Metric(
        "queue_duration_seconds", "histogram",
        "Seconds a request waited for a batch, for each that it is in.",
        ("model",), _SECONDS,
    ),
    Metric(
        "inference_duration_seconds", "histogram", "Seconds one batch took in the backend.",
        ("model",), _SECONDS,
    ),
    Metric("tokens", "counter", "Tokens embedded, special tokens included.", ("model",)),
    Metric("inputs", "counter", "Inputs embedded.", ("model",)),
    Metric("truncated_inputs", "counter", "Inputs cut to the model's length.", ("model",)),
    Metric("batch_size", "histogram", "Inputs in a batch.", ("model",), _SIZES),
    Metric("batch_tokens", "histogram", "Tokens in a batch, without padding.", ("model",), _TOKENS),
    Metric(
        "padding_tokens", "counter", "Padding tokens that the linear layers computed.",
        ("model",),
    ),
    Metric("failed_batches", "counter", "Batches that failed in the backend.", ("model",)),
    Metric(
        "timed_out_batches", "counter", "Batches that took longer than --inference-timeout.",
        ("model",),
    ),
    Metric(
        "out_of_memory", "counter",
        "Batches that ran out of memory, and were halved and tried again.",
        ("model",),
    ),
    Metric("queue_requests", "gauge", "Requests waiting or being computed.", ("model",)),
    Metric("queue_tokens", "gauge", "Tokens waiting for a batch.", ("model",)),
    Metric(
        "queue_requests_limit", "gauge",
        "--max-concurrent-requests, of all workers together.", ("model",),
    ),
    Metric(
        "queue_tokens_limit", "gauge", "--max-queued-tokens, of all workers together.", ("model",)
    ),
    Metric("worker_restarts", "counter", "Workers that ended and were started again."),
    Metric(
        "model_info", "gauge", "Always 1; the labels describe the served model.",
        ("model", "backend", "revision", "dims", "max_tokens"), over_processes="max",
    ),
)  # fmt: skip

_OF_PROCESSES = tuple(
    Metric(
        name.removesuffix("_total"),
        "counter" if name.endswith("_total") else "gauge",
        text,
        over_processes="max" if name.endswith("_fds") else "livesum",
    )
    for name, text in PROCESS_METRICS.items()
)

METRICS: tuple[Metric, ...] = (*_COUNTED, *_OF_PROCESSES)


@dataclass(frozen=True, slots=True)
class ModelMetrics:
    """One model's metrics with the label bound, for the hot path."""

    tokenize_duration: Histogram
    queue_duration: Histogram
    inference_duration: Histogram
    tokens: Counter
    inputs: Counter
    truncated_inputs: Counter
    batch_size: Histogram
    batch_tokens: Histogram
    padding_tokens: Counter
    failed_batches: Counter
    timed_out_batches: Counter
    out_of_memory: Counter
    queue_requests: Gauge
    queue_tokens: Gauge
    queue_requests_limit: Gauge
    queue_tokens_limit: Gauge

    @classmethod
    def uncounted(cls) -> Self:
        """Metrics that count nothing, for an engine that no request reaches."""
        nothing: Any = _Uncounted()
        return cls(**{metric.name: nothing for metric in fields(cls)})


class _Uncounted:
    def inc(self, amount: float = 1) -> None: ...

    def set(self, value: float) -> None: ...

    def observe(self, amount: float) -> None: ...


class _Registry(CollectorRegistry):
    """A registry without the ``_created`` series, which would double the page.

    The library's own switch holds for the whole process, where others may have metrics.
    """

    def collect(self) -> Iterator[Family]:
        for family in super().collect():
            family.samples = [s for s in family.samples if not s.name.endswith("_created")]
            yield family


class Telemetry:
    """The registry and the metrics of one server.

    In a process that was started with the variable ``PROMETHEUS_MULTIPROC_DIR``, values are kept in
    files of that folder, and ``exposition`` adds them up over all processes that use it.
    """

    def __init__(self) -> None:
        self.registry: CollectorRegistry = _Registry()
        self._metrics: dict[str, Any] = {row.name: _create(row, self.registry) for row in _COUNTED}
        self._finished: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}
        self._processes = Processes()
        self.registry.register(self._processes)
        self.ready: Gauge = self._metrics["ready"]
        self.in_flight: Gauge = self._metrics["requests_in_flight"]

    def for_model(self, name: str) -> ModelMetrics:
        """The metrics of the served model ``name``."""
        bound = {
            row.name.removesuffix("_seconds"): self._metrics[row.name].labels(name)
            for row in _COUNTED
            if row.labels == ("model",)
        }
        return ModelMetrics(**bound)

    def model_loaded(
        self, name: str, *, backend: str, revision: str | None, dims: int, max_tokens: int
    ) -> None:
        """Set ``model_info`` of the served model ``name``."""
        labels = (name, backend, revision or "", str(dims), str(max_tokens))
        self._metrics["model_info"].labels(*labels).set(1)

    def runs_in_worker(self, *, supervisor: int, again: bool) -> None:
        """Count for a worker of ``supervisor``; ``again`` if it replaces one that ended."""
        self._processes.supervisor = supervisor
        if again:
            self._metrics["worker_restarts"].inc()

    def request_finished(self, *, route: str, model: str, status: int, seconds: float) -> None:
        """Count one answered request; ``route`` is a template, ``model`` a served name."""
        key = (route, model, status)
        found = self._finished.get(key)
        if found is None:  # a label's lookup takes longer than the count
            found = self._finished[key] = (
                self._metrics["requests"].labels(route, model, str(status)),
                self._metrics["request_duration_seconds"].labels(route, model),
            )
        requests, duration = found
        requests.inc()
        duration.observe(seconds)

    def error_answered(self, code: str) -> None:
        """Count one error answer by its ``code``."""
        self._metrics["errors"].labels(code).inc()

    @property
    def queued_tokens(self) -> float:
        """Tokens waiting for a batch, of all models."""
        gauge: Gauge = self._metrics["queue_tokens"]
        return sum(sample.value for family in gauge.collect() for sample in family.samples)

    def exposition(self) -> tuple[bytes, str]:
        """``(body, content type)`` in Prometheus' text format."""
        registry = self.registry
        if folder := os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
            registry = CollectorRegistry()
            MultiProcessCollector(registry, folder)  # type: ignore[no-untyped-call]
            registry.register(self._processes)
        for _ in range(_SCRAPES - 1):
            # A file of a worker that ended is renamed while its successor starts.
            with contextlib.suppress(FileNotFoundError):
                return generate_latest(registry), _CONTENT_TYPE
        return generate_latest(registry), _CONTENT_TYPE


def _create(row: Metric, registry: CollectorRegistry) -> Counter | Gauge | Histogram:
    name = row.family
    match row.kind:
        case "counter":
            return Counter(name, row.help, row.labels, registry=registry)
        case "gauge":
            return Gauge(
                name, row.help, row.labels, registry=registry, multiprocess_mode=row.over_processes
            )
        case "histogram":
            buckets = row.buckets or ()
            return Histogram(name, row.help, row.labels, buckets=buckets, registry=registry)
