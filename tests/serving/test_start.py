# SPDX-License-Identifier: MIT OR Apache-2.0
"""The one promise about time: how soon the server answers after its start, and in what memory."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from live import environment

MEASURE = Path(__file__).parents[2] / "scripts" / "measure-start"
SECONDS = 2.0
MEGABYTES = 450.0


def start_once() -> tuple[float, float]:
    """Seconds from exec to the first embedding, and the resident memory after it."""
    command = [sys.executable, str(MEASURE), "--here"]
    done = subprocess.run(command, env=environment(), capture_output=True, check=True, text=True)
    found = re.search(r"after ([\d.]+) s, (\d+) MB resident", done.stdout)
    assert found is not None, done.stdout
    return float(found[1]), float(found[2])


def test_first_embedding_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    """The best of a few starts: the first warms the disk cache, and the machine may be busy."""
    starts: list[tuple[float, float]] = []
    for _ in range(5):
        starts.append(start_once())
        if len(starts) >= 3 and min(starts)[0] < SECONDS:
            break
    seconds = min(seconds for seconds, _ in starts)
    megabytes = max(megabytes for _, megabytes in starts)
    with capsys.disabled():
        print(f"\nfirst embedding after {seconds:.2f} s, {megabytes:.0f} MB resident")
    assert seconds < SECONDS
    assert megabytes < MEGABYTES
