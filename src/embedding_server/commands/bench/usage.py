# SPDX-License-Identifier: MIT OR Apache-2.0
"""CPU time and memory of the measured server: from the kernel for our child, else from /metrics."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from embedding_server.commands.bench.connections import Target, fetch
from embedding_server.commands.bench.report import number, progress, significant

__all__ = ["Costs", "Usage", "read_metric", "read_usage", "watch"]

_SECONDS = 30.0
_LOOK_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Usage:
    """CPU seconds since the start and bytes of memory; None for an unknown value."""

    cpu_seconds: float | None = None
    resident_bytes: int | None = None
    peak_bytes: int | None = None
    """The most that was ever resident."""


@dataclass(slots=True)
class Costs:
    """The costs of a load, to both sides."""

    server_cpu_seconds: float | None = None
    generator_cpu_seconds: float = 0.0
    resident_bytes: int | None = None
    """Of the server, at the end."""
    peak_bytes: int | None = None
    """Of the server: since its start if it was started here, else the most seen."""

    def rows(self, seconds: float | None = None) -> list[tuple[str, str]]:
        """The costs for people; the CPU time of ``seconds`` also as a number of cores."""

        def cpu(used: float | None) -> str:
            if seconds is None:
                return number(used, "s")
            cores = used / seconds if used is not None and seconds else None
            return f"{number(used, 's')} ({number(cores)} cores)"

        return [
            ("server CPU", cpu(self.server_cpu_seconds)),
            ("generator CPU", cpu(self.generator_cpu_seconds)),
            ("server memory, peak", number(self.peak_bytes, "MB", scale=2**-20)),
        ]

    def figures(self) -> dict[str, object]:
        """The costs for programs."""
        return {
            "server_cpu_seconds": significant(self.server_cpu_seconds),
            "generator_cpu_seconds": significant(self.generator_cpu_seconds),
            "server_resident_bytes": self.resident_bytes,
            "server_peak_bytes": self.peak_bytes,
        }


@asynccontextmanager
async def watch(target: Target, pid: int | None, status: Callable[[], str]) -> AsyncIterator[Costs]:
    """Show ``status()`` while the body runs; the costs are complete when it has ended."""
    costs = Costs()
    residents: list[int] = []

    async def look() -> None:
        while True:
            usage = await read_usage(target, pid)
            if usage.resident_bytes is not None:
                residents.append(usage.resident_bytes)
            progress(f"{status()}, {time.perf_counter() - started:.0f} s")
            await asyncio.sleep(_LOOK_SECONDS)

    before = await read_usage(target, pid)
    cpu_before = time.process_time()
    started = time.perf_counter()
    looking = asyncio.create_task(look())
    try:
        yield costs
    finally:
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)
        progress("")
    costs.generator_cpu_seconds = time.process_time() - cpu_before
    after = await read_usage(target, pid)
    if after.cpu_seconds is not None and before.cpu_seconds is not None:
        costs.server_cpu_seconds = after.cpu_seconds - before.cpu_seconds
    costs.resident_bytes = after.resident_bytes
    if after.resident_bytes is not None:
        residents.append(after.resident_bytes)
    costs.peak_bytes = after.peak_bytes or max(residents, default=None)


async def read_usage(target: Target, pid: int | None) -> Usage:
    """The usage since the server's start; ``pid`` is its process if that is our child."""
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
    """The usage as Linux counts it; None on other systems."""
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
