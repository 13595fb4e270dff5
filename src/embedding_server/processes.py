# SPDX-License-Identifier: MIT OR Apache-2.0
"""The processor time, memory and file descriptors of a server's processes, added up.

The names are those of every Prometheus client library
(https://prometheus.io/docs/instrumenting/writing_clientlibs/#process-metrics).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from prometheus_client import ProcessCollector
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

__all__ = ["PROCESS_METRICS", "Processes"]

# Name in the exposition -> help.
PROCESS_METRICS = {
    "process_cpu_seconds_total": "Seconds of processor time, of all workers together.",
    "process_resident_memory_bytes": "Memory in use; what workers share is counted for each.",
    "process_open_fds": "Open file descriptors, of the worker that is nearest to its limit.",
    "process_max_fds": "How many there may be in one process.",
    "process_start_time_seconds": "When the server was started, since 1970.",
}


class Processes(Collector):
    """Reads ``PROCESS_METRICS`` from Linux' /proc at each scrape; elsewhere there are none."""

    supervisor: int | None = None
    """The process id of the supervisor, with ``--workers``."""

    def collect(self) -> Iterator[Metric]:
        first = self.supervisor or os.getpid()
        try:
            values = _values_of(first)
            if self.supervisor is not None:
                # A counter must not fall when a worker ends.
                values["process_cpu_seconds_total"] += _seconds_of_ended_children(first)
                children = Path(f"/proc/{first}/task/{first}/children").read_text(encoding="ascii")
                for worker in children.split():
                    _add(values, _values_of(int(worker)))
        except (OSError, KeyError):
            return
        for name, text in PROCESS_METRICS.items():
            family = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            yield family(name, text, value=values[name])


def _values_of(process: int) -> dict[str, float]:
    """Samples of ``process`` by name; none if there is no such process, or no /proc."""
    families = ProcessCollector(pid=lambda: process, registry=None).collect()
    return {sample.name: sample.value for family in families for sample in family.samples}


def _add(values: dict[str, float], others: Mapping[str, float]) -> None:
    """Add the samples of another process; one that has just ended has none."""
    for name in ("process_cpu_seconds_total", "process_resident_memory_bytes"):
        values[name] += others.get(name, 0.0)
    # Each process has a limit: a sum would hide one that has reached it.
    if _fullness(others) > _fullness(values):
        for name in ("process_open_fds", "process_max_fds"):
            values[name] = others[name]


def _fullness(values: Mapping[str, float]) -> float:
    return values.get("process_open_fds", 0.0) / values.get("process_max_fds", 1.0)


def _seconds_of_ended_children(process: int) -> float:
    """The fields cutime and cstime of proc(5), which follow a name that may hold brackets."""
    stat = Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()
    return (int(stat[13]) + int(stat[14])) / os.sysconf("SC_CLK_TCK")
