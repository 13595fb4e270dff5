# SPDX-License-Identifier: MIT OR Apache-2.0
"""The ``bench`` command: a server under one workload, and how it stands it."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from embedding_server.commands.bench.measure import Measurement, measure
from embedding_server.commands.bench.mixed import JOB, QUERIES, Mixed, measure_mixed
from embedding_server.commands.bench.operations import ModelCost
from embedding_server.commands.bench.report import environment, print_json
from embedding_server.commands.bench.subject import Subject, subject_of
from embedding_server.commands.bench.workloads import MIXED, WORKLOADS, build_workload
from embedding_server.commands.tables import print_rows
from embedding_server.settings import Settings

__all__ = ["ServerBench", "bench_server"]

_MIXED_RATE = 10.0


@dataclass(frozen=True, slots=True)
class ServerBench:
    """What ``bench`` was asked for."""

    as_json: bool
    workload: str = "query"
    url: str | None = None
    """None: a server is started for it."""
    connections: int | None = None
    """None: as many as suit the workload."""
    duration: float = 10.0
    rate: float | None = None
    """Requests a second; None: as many as are answered."""


def bench_server(
    settings: Settings, flags: Mapping[str, object], config: Path | None, bench: ServerBench
) -> int:
    """Measure, and print the result; returns 1 if any request failed, else 0.

    ``flags`` and ``config`` are what ``settings`` came from, for the server to be started.
    Raises ConfigurationError if there is nothing to be measured.
    """
    connections = (
        bench.connections
        or WORKLOADS[QUERIES if bench.workload == MIXED else bench.workload].connections
    )
    rate = bench.rate or (_MIXED_RATE if bench.workload == "mixed" else None)

    async def run(subject: Subject) -> tuple[str, Measurement | Mixed]:
        model = await subject.model()
        if rate is not None and bench.workload == "mixed":
            return model, await measure_mixed(
                subject, model, connections=connections, seconds=bench.duration, rate=rate
            )
        return model, await measure(
            subject,
            build_workload(bench.workload),
            model,
            ModelCost.of_model(subject.local_model or model, settings.load_models_from),
            connections=connections,
            seconds=bench.duration,
            rate=rate,
        )

    with (
        subject_of(settings, bench.url, flags, config) as subject,
        asyncio.Runner(loop_factory=_fast_loop if rate is None else _punctual_loop) as runner,
    ):
        model, measured = runner.run(run(subject))
    settings_told = {
        "url": bench.url,
        "model": model,
        "workload": bench.workload,
        "connections": connections,
        "rate": rate,
        "duration": bench.duration,
    }
    result = measured.result()
    if not bench.as_json:
        pace = "each as fast as it is answered" if rate is None else f"{rate:g} requests/s"
        lanes = f"{connections} connection" + ("s" if connections > 1 else "")
        print_rows(
            [
                ("workload", f"{bench.workload}: {_help(bench.workload)}"),
                ("load", f"{lanes}, {pace}, {bench.duration:g} s"),
                ("server", bench.url or "started here"),
                ("model", model),
                *measured.rows(),
                ("failures", _told(measured)),
            ]
        )
    print_json({"benchmark": "server", **environment(), **settings_told, **result})
    return 1 if measured.failures or not measured.answered else 0


def _fast_loop() -> asyncio.AbstractEventLoop:
    """The one that costs the least for each request; its timers are whole milliseconds."""
    try:
        import uvloop
    except ImportError:  # there is none for Windows
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def _punctual_loop() -> asyncio.AbstractEventLoop:
    """One whose timers are exact to some ten microseconds: select(2) waits in microseconds."""
    return asyncio.SelectorEventLoop(selectors.SelectSelector())


def _help(workload: str) -> str:
    if workload == "mixed":
        return f"{WORKLOADS[QUERIES].help}, beside an endless job of {WORKLOADS[JOB].help}"
    return WORKLOADS[workload].help


def _told(measured: Measurement | Mixed) -> str:
    counts = ", ".join(f"{what}: {count}" for what, count in measured.failures.items())
    reason = f" (the first: {measured.first_failure})" if measured.first_failure else ""
    return f"{counts}{reason}" if counts else "none"
