# SPDX-License-Identifier: MIT OR Apache-2.0
"""``/metrics`` of all replicas: each reports what it has counted, and one actor adds it up.

The counts of a replica stay when it ends, without those of its last second if it is killed. Its
gauges go.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric as Family

from embedding_server.telemetry import METRICS, Telemetry

__all__ = ["Metrics", "Samples", "reporting"]

logger = logging.getLogger(__name__)

_REPORT_SECONDS = 1.0

# The gauges of a process that reports nothing for so long are dropped.
_SILENT_SECONDS = 10.0

Samples = dict[tuple[str, str, tuple[tuple[str, str], ...]], float]
"""Values by the family's name, the sample's name, and its labels."""

_SUMMED = {row.family for row in METRICS if row.over_processes == "livesum"}


class Metrics:
    """Adds up the reports of an application's processes: a deployment of Ray Serve."""

    def __init__(self) -> None:
        self._counts: Samples = {}
        self._gauges: dict[str, tuple[float, Samples]] = {}

    async def report(self, source: str, counts: Samples, gauges: Samples | None) -> None:
        """Add the ``counts`` since the last report; ``gauges`` is None in the last one."""
        for key, value in counts.items():
            self._counts[key] = self._counts.get(key, 0.0) + value
        if gauges is None:
            self._gauges.pop(source, None)
        else:
            self._gauges[source] = (time.monotonic(), gauges)

    async def exposition(self) -> bytes:
        """All samples in Prometheus' text format."""
        registry = CollectorRegistry()
        registry.register(self)
        return generate_latest(registry)

    def collect(self) -> Iterator[Family]:
        """The families, as prometheus_client collects them."""
        totals = dict(self._counts)
        silent = time.monotonic() - _SILENT_SECONDS
        self._gauges = {source: last for source, last in self._gauges.items() if last[0] > silent}
        for _, gauges in self._gauges.values():
            for key, value in gauges.items():
                totals[key] = _combine(key[0], totals[key], value) if key in totals else value
        families = {row.family: Family(row.family, row.help, row.kind) for row in METRICS}
        for (family, sample, labels), value in totals.items():
            families[family].add_sample(sample, dict(labels), value)
        yield from families.values()


def _combine(family: str, one: float, other: float) -> float:
    """The gauge of two processes."""
    if family == "process_start_time_seconds":
        return min(one, other)
    # The others, such as readiness, are true if they are true of one process.
    return one + other if family in _SUMMED else max(one, other)


@contextlib.asynccontextmanager
async def reporting(telemetry: Telemetry, source: str, metrics: Any) -> AsyncIterator[None]:
    """Report ``telemetry`` to ``metrics``, a handle of ``Metrics``, each second and at the end."""
    reported: Samples = {}
    ending = asyncio.Event()

    async def report(*, last: bool = False) -> None:
        counts, gauges = _samples(telemetry)
        # Zeros, too: a restarted Metrics doesn't know the samples.
        new = {key: value - reported.get(key, 0.0) for key, value in counts.items()}
        await metrics.report.remote(source, new, None if last else gauges)
        reported.update(counts)

    async def report_until_the_end() -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ending.wait(), _REPORT_SECONDS)
                return
            try:
                await report()
            except Exception:  # the next report includes this one
                logger.warning("metrics could not be reported", exc_info=True)

    task = asyncio.create_task(report_until_the_end(), name="reporting metrics")
    try:
        yield
    finally:
        ending.set()
        # When the application ends, Metrics may have ended already.
        with contextlib.suppress(Exception):
            await asyncio.wait_for(task, _REPORT_SECONDS)
            await asyncio.wait_for(report(last=True), _REPORT_SECONDS)


def _samples(telemetry: Telemetry) -> tuple[Samples, Samples]:
    """Counts, and gauges."""
    counts: Samples = {}
    gauges: Samples = {}
    for family in telemetry.registry.collect():
        samples = gauges if family.type == "gauge" else counts
        for sample in family.samples:
            samples[family.name, sample.name, tuple(sample.labels.items())] = sample.value
    return counts, gauges
