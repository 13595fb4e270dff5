# SPDX-License-Identifier: MIT OR Apache-2.0
"""The ``bench`` command: a server under one workload."""

from __future__ import annotations

import argparse
import asyncio
import selectors

from embedding_server.commands.bench.measure import measure
from embedding_server.commands.bench.mixed import JOB, QUERIES, measure_mixed
from embedding_server.commands.bench.operations import ModelCost
from embedding_server.commands.bench.report import Outcome, environment, print_json
from embedding_server.commands.bench.subject import Subject, subject_of
from embedding_server.commands.bench.workloads import MIXED, WORKLOADS, build_workload
from embedding_server.commands.tables import print_rows
from embedding_server.settings import Settings

__all__ = ["bench_server"]

_SECONDS = 10.0
_MIXED_RATE = 10.0


def bench_server(settings: Settings, arguments: argparse.Namespace) -> int:
    """Measure, and print the result; returns 1 if a request failed, else 0.

    Raises ConfigurationError if nothing can be measured.
    """
    workload = arguments.workload or QUERIES
    mixed = workload == MIXED
    row = WORKLOADS[QUERIES if mixed else workload]
    connections: int = arguments.connections or row.connections
    seconds: float = arguments.duration or _SECONDS
    rate: float | None = arguments.rate or (_MIXED_RATE if mixed else None)

    async def run(subject: Subject) -> tuple[str, Outcome]:
        model = await subject.model()
        if mixed:
            assert rate is not None
            return model, await measure_mixed(
                subject, model, connections=connections, seconds=seconds, rate=rate
            )
        cost = ModelCost.of_model(subject.local_model or model, settings.load_models_from)
        return model, await measure(
            subject,
            build_workload(workload),
            model,
            cost,
            connections=connections,
            seconds=seconds,
            rate=rate,
        )

    with (
        subject_of(settings, arguments) as subject,
        asyncio.Runner(loop_factory=_fast_loop if rate is None else _punctual_loop) as runner,
    ):
        model, outcome = runner.run(run(subject))
    if not arguments.json:
        help = f"{row.help}, beside an endless job of {WORKLOADS[JOB].help}" if mixed else row.help
        pace = "each as fast as it is answered" if rate is None else f"{rate:g} requests/s"
        lanes = f"{connections} connection" + ("s" if connections > 1 else "")
        print_rows(
            [
                ("workload", f"{workload}: {help}"),
                ("load", f"{lanes}, {pace}, {seconds:g} s"),
                ("server", arguments.url or "started here"),
                ("model", model),
                *outcome.rows,
                ("failures", _format_failures(outcome)),
            ]
        )
    print_json(
        {
            "benchmark": "server",
            **environment(),
            "url": arguments.url,
            "model": model,
            "workload": workload,
            "connections": connections,
            "rate": rate,
            "duration": seconds,
            **outcome.figures,
        }
    )
    return 1 if outcome.failures or not outcome.answered else 0


def _fast_loop() -> asyncio.AbstractEventLoop:
    """The event loop that costs the least for each request; its timers are whole milliseconds."""
    try:
        import uvloop
    except ImportError:  # on Windows
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def _punctual_loop() -> asyncio.AbstractEventLoop:
    """An event loop with timers exact to some ten microseconds: select(2) waits in microseconds."""
    return asyncio.SelectorEventLoop(selectors.SelectSelector())


def _format_failures(outcome: Outcome) -> str:
    counts = ", ".join(f"{status}: {count}" for status, count in outcome.failures.items())
    reason = f" (the first: {outcome.first_failure})" if outcome.first_failure else ""
    return f"{counts}{reason}" if counts else "none"
