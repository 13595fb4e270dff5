# SPDX-License-Identifier: MIT OR Apache-2.0
"""Four times the load that a server can bear: it does as much as ever, and refuses the rest."""

from __future__ import annotations

import asyncio
import json
import os
import re
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
import pytest
import uvloop
from live import LiveServer, resident_mib, running_server

from embedding_server.commands.bench.connections import Connection, connected, parse_target
from embedding_server.commands.bench.load import Load, closed_loop, fixed_rate

MODEL = "all-MiniLM-L6-v2"
QUEUED_TOKENS = 4000
TIMES = 4
CONNECTIONS = 200
TEXT = "a text that is as long as some that people would send to a server of embeddings "


@dataclass(frozen=True)
class Measured:
    """A load, and what it cost the server."""

    load: Load
    cpu_seconds: float

    @property
    def tokens(self) -> int:
        assert self.load.tokens is not None
        return self.load.tokens

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.load.seconds

    @property
    def efficiency(self) -> float:
        """Tokens a second of computing, which doesn't depend on what else the machine does."""
        return self.tokens / self.cpu_seconds


def bodies() -> list[bytes]:
    """Requests of four texts, some 210 tokens each."""
    made = []
    for number in range(200):
        texts = [f"{number} {place} {TEXT * (1 + place)}" for place in range(4)]
        made.append(json.dumps({"model": MODEL, "input": texts}).encode())
    return made


def put_under(
    server: LiveServer,
    connections: int,
    load: Callable[[list[Connection], list[bytes]], Awaitable[Load]],
) -> Measured:
    target = parse_target(server.url)
    requests = [target.post(body) for body in bodies()]

    async def run() -> Load:
        async with connected(target, connections) as pool:
            return await load(pool, requests)

    before = cpu_seconds(server)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        done = runner.run(run())
    return Measured(done, cpu_seconds(server) - before)


def cpu_seconds(server: LiveServer) -> float:
    stat = Path(f"/proc/{server.process.pid}/stat").read_text(encoding="ascii")
    user, system = stat.rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


@contextmanager
def watching_the_queue(server: LiveServer) -> Iterator[list[float]]:
    """The tokens that wait, again and again."""
    seen: list[float] = []
    over = threading.Event()

    def watch() -> None:
        with httpx.Client(timeout=60) as client:
            while not over.wait(0.5):
                page = client.get(f"{server.url}/metrics").text
                found = re.search(r"^embedding_server_queue_tokens\S* (\S+)$", page, re.M)
                assert found is not None
                seen.append(float(found[1]))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize(
    ("seconds", "quiet"),
    [
        pytest.param(8, False, id="brief"),
        pytest.param(60, True, id="long", marks=pytest.mark.slow),
    ],
)
def test_overload(seconds: float, quiet: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """``quiet`` on a machine that does nothing else, so that what it does in a second counts."""
    with running_server("--model", MODEL, "--max-queued-tokens", f"{QUEUED_TOKENS}") as server:
        put_under(server, 8, partial(closed_loop, seconds=1))
        peak = put_under(server, 8, partial(closed_loop, seconds=seconds / 3))
        requests_per_second = TIMES * len(peak.load.answered) / peak.load.seconds
        memory = resident_mib(server)
        overload = partial(fixed_rate, rate=requests_per_second, seconds=seconds)
        with watching_the_queue(server) as queued_tokens:
            over = put_under(server, CONNECTIONS, overload)
        growth = resident_mib(server) / memory
        ready = httpx.get(f"{server.url}/health/ready").status_code
    assert not peak.load.failures
    assert set(over.load.failures) == {"429"}, "no 5xx, and whatever is accepted is answered"
    answers = len(over.load.answered) + over.load.failures.total()
    assert answers == round(requests_per_second * seconds)
    assert ready == 200
    wait, full = over.load.percentile(0.99), QUEUED_TOKENS / over.rate
    assert wait is not None
    with capsys.disabled():
        print(
            f"\n{answers} requests at {requests_per_second:.0f}/s, "
            f"{len(over.load.answered)} answered: {over.rate:.0f} tokens/s, "
            f"{over.rate / peak.rate:.2f} of the peak, {over.efficiency / peak.efficiency:.2f} of "
            f"its tokens a CPU second; p99 {wait / full:.2f} of a full queue's {full:.2f} s; "
            f"memory {memory:.0f} MiB, then {growth:.2f} times that"
        )
    assert QUEUED_TOKENS / 2 < max(queued_tokens) <= QUEUED_TOKENS
    assert over.efficiency > 0.7 * peak.efficiency
    assert growth < (1.1 if quiet else 1.25)
    if quiet:
        assert over.rate > 0.9 * peak.rate
        # Requests take turns. While one is computed, only the rest of it counts as queued, so at
        # worst twice the limit is in the house, beside the batches under way.
        assert wait < 2.25 * full
