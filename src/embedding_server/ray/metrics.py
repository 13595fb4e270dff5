# SPDX-License-Identifier: MIT OR Apache-2.0
"""``/metrics`` over all replicas: each tells what it has counted since, one actor adds up.

What a replica has counted stays when it is gone; what it had in hand goes with it. One that is
killed takes with it what it counted in its last second.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import operator
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric as Family

from embedding_server.telemetry import METRICS, Telemetry

__all__ = ["Metrics", "Samples", "reporting"]

logger = logging.getLogger(__name__)

_REPORT_SECONDS = 1.0

# A process that says nothing for so long has nothing in hand any more.
_SILENT_SECONDS = 10.0

Samples = dict[tuple[str, str, tuple[tuple[str, str], ...]], float]
"""Values by the family's name, by the sample's, and by its labels."""


class Metrics:
    """Adds up what the processes of one application report. It is a Ray Serve deployment."""

    def __init__(self) -> None:
        self._counted: Samples = {}
        self._in_hand: dict[str, tuple[float, Samples]] = {}

    async def report(self, source: str, counted: Samples, in_hand: Samples | None) -> None:
        """``counted`` is what has come since the last report; ``in_hand`` None says goodbye."""
        for key, value in counted.items():
            self._counted[key] = self._counted.get(key, 0.0) + value
        if in_hand is None:
            self._in_hand.pop(source, None)
        else:
            self._in_hand[source] = (time.monotonic(), in_hand)

    async def exposition(self) -> bytes:
        """All of it in Prometheus' text format."""
        silent = time.monotonic() - _SILENT_SECONDS
        self._in_hand = {k: v for k, v in self._in_hand.items() if v[0] > silent}
        registry = CollectorRegistry()
        registry.register(self)
        return generate_latest(registry)

    def collect(self) -> Iterator[Family]:
        """What prometheus_client asks a registered collector for."""
        totals = dict(self._counted)
        for _, in_hand in self._in_hand.values():
            for key, value in in_hand.items():
                totals[key] = _together(key[0])(totals[key], value) if key in totals else value
        families = {row.family: Family(row.family, row.help, row.kind) for row in METRICS}
        for (metric, sample, labels), value in totals.items():
            families[metric].add_sample(sample, dict(labels), value)
        yield from families.values()


@contextlib.asynccontextmanager
async def reporting(telemetry: Telemetry, source: str, metrics: Any) -> AsyncIterator[None]:
    """Report ``telemetry`` to ``metrics``, a handle of ``Metrics``, each second and at the end."""
    told: Samples = {}

    async def report(*, last: bool = False) -> None:
        counted, in_hand = _samples(telemetry)
        # Zeros, too: who adds up may have been started again, and would not know of the samples.
        new = {key: value - told.get(key, 0.0) for key, value in counted.items()}
        await metrics.report.remote(source, new, None if last else in_hand)
        told.update(counted)

    ending = asyncio.Event()

    async def report_until_the_end() -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ending.wait(), _REPORT_SECONDS)
                return
            try:
                await report()
            except Exception:  # nothing is lost: the next one tells it
                logger.warning("metrics could not be reported", exc_info=True)

    task = asyncio.create_task(report_until_the_end(), name="reporting metrics")
    try:
        yield
    finally:
        ending.set()
        # When everything ends, who adds up may be gone already.
        with contextlib.suppress(Exception):
            await asyncio.wait_for(task, _REPORT_SECONDS)
            await asyncio.wait_for(report(last=True), _REPORT_SECONDS)


_ADDED_UP = {row.family for row in METRICS if row.over_processes == "livesum"}


def _together(family: str) -> Callable[[float, float], float]:
    """What two processes' gauges of a family make."""
    if family == "process_start_time_seconds":
        return min
    # Of what isn't added up, as readiness, one that has it is enough.
    return operator.add if family in _ADDED_UP else max


def _samples(telemetry: Telemetry) -> tuple[Samples, Samples]:
    """What only grows, and what comes and goes."""
    counted: Samples = {}
    in_hand: Samples = {}
    for family in telemetry.registry.collect():
        into = in_hand if family.type == "gauge" else counted
        for sample in family.samples:
            into[family.name, sample.name, tuple(sample.labels.items())] = sample.value
    return counted, in_hand
