# SPDX-License-Identifier: MIT OR Apache-2.0
"""What the measured server has used: from the kernel for a process of ours, else from /metrics."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from embedding_server.commands.bench.connections import Target, fetch

__all__ = ["Usage", "read_metric", "read_usage"]

_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Usage:
    """CPU seconds since its start, and bytes of memory; None for what isn't told."""

    cpu_seconds: float | None = None
    resident_bytes: int | None = None
    peak_bytes: int | None = None
    """The most that was ever resident."""


async def read_usage(target: Target, pid: int | None) -> Usage:
    """What the server has used until now; ``pid`` is its process, if that is a child of ours."""
    if pid is not None and (usage := _from_kernel(Path(f"/proc/{pid}"))):
        return usage
    metrics = await _metrics(target)
    resident = _value(metrics, "process_resident_memory_bytes")
    return Usage(
        cpu_seconds=_value(metrics, "process_cpu_seconds_total"),
        resident_bytes=None if resident is None else int(resident),
    )


async def read_metric(target: Target, name: str) -> float | None:
    """The sum over all labels of the series ``name`` in /metrics; None if it isn't there."""
    return _value(await _metrics(target), name)


def _from_kernel(process: Path) -> Usage | None:
    """What Linux tells; None elsewhere."""
    try:
        stat, status = ((process / name).read_text() for name in ("stat", "status"))
    except OSError:
        return None
    # The second field is the program's name, which may hold spaces.
    fields = stat.rpartition(")")[2].split()
    ticks = int(fields[11]) + int(fields[12])
    return Usage(
        cpu_seconds=ticks / os.sysconf("SC_CLK_TCK"),
        resident_bytes=_kilobytes(status, "VmRSS"),
        peak_bytes=_kilobytes(status, "VmHWM"),
    )


def _kilobytes(status: str, name: str) -> int | None:
    found = re.search(rf"^{name}:\s*(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


async def _metrics(target: Target) -> str:
    try:
        answer = await fetch(target, target.get("/metrics"), seconds=_SECONDS)
    except TimeoutError:
        return ""
    return answer.body.decode(errors="replace") if answer.status == 200 else ""


def _value(metrics: str, name: str) -> float | None:
    found = re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", metrics, re.MULTILINE)
    return sum(map(float, found)) if found else None
