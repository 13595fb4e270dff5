# SPDX-License-Identifier: MIT OR Apache-2.0
"""Resident memory of a server that has worked for a while."""

from __future__ import annotations

import json

import pytest
from live import LiveServer, resident_mib, run_cli, running_server

MODEL = "all-MiniLM-L6-v2"


def load(server: LiveServer, workload: str, seconds: float) -> int:
    """Requests that were answered."""
    done = run_cli(
        *("bench", "--url", server.url, "--model", MODEL, "--json"),
        *("--workload", workload, "--duration", str(seconds)),
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.decode().splitlines()[-1])
    return int(result["requests"])


@pytest.mark.slow
def test_memory_stays(capsys: pytest.CaptureFixture[str]) -> None:
    """After 20,000 requests of all kinds at most 1.3 times what it was after the first 500."""
    with running_server("--model", MODEL) as server:
        requests = 0
        while requests < 500:
            requests += load(server, "pair", 1)
        before = resident_mib(server)
        while requests < 20_000:
            requests += load(server, "chunks", 2) + load(server, "uniform", 2)
            requests += load(server, "query", 5) + load(server, "pair", 10)
        after = resident_mib(server)
        with capsys.disabled():
            print(f"\n{requests} requests: {before:.0f} MiB, then {after:.0f} MiB")
        assert after <= 1.3 * before
