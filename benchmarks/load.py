# SPDX-License-Identifier: MIT OR Apache-2.0
"""wrk as the load, and what it counted."""

# ruff: noqa: S603

from __future__ import annotations

import json
import resource
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Load", "LoadFailed", "put_load", "write_bodies", "wrk_program"]

SCRIPT = Path(__file__).resolve().parent / "wrk.lua"

PATIENCE = 180
"""Seconds that the last answers may take."""


class LoadFailed(Exception):
    """The load couldn't be put on, or not every request had its answer."""


@dataclass(frozen=True, slots=True)
class Load:
    """What came back: all requests were answered with 200."""

    answers: int
    seconds: float
    """From the first request to the last answer."""
    bytes: int
    p50_ms: float
    p99_ms: float
    cpu_seconds: float
    """The generator's own."""


def wrk_program() -> str:
    """Where wrk is; raises LoadFailed, telling what to install, where it isn't."""
    program = shutil.which("wrk")
    if program is None:
        raise LoadFailed("wrk is not installed: `apt-get install wrk` (Debian, Ubuntu) brings it.")
    return program


def write_bodies(file: Path, bodies: Iterable[bytes]) -> None:
    """Write what ``wrk.lua`` reads: each body behind its length and a newline."""
    file.write_bytes(b"".join(b"%d\n%b" % (len(body), body) for body in bodies))


def put_load(url: str, bodies: Path, *, connections: int, seconds: float) -> Load:
    """Keep ``connections`` requests under way for ``seconds``, and wait for the last answer.

    Raises LoadFailed if an answer is missing or has another status than 200.
    """
    command = [
        *(wrk_program(), "-t1", f"-c{connections}", f"-d{int(seconds) + PATIENCE}s"),
        *(f"--timeout={PATIENCE}s", "-s", str(SCRIPT), url, "--", str(bodies), str(seconds)),
    ]
    before = _children_cpu()
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    cpu = _children_cpu() - before
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines or not lines[-1].startswith("{"):
        raise LoadFailed(f"wrk failed on {url}: {done.stdout[-500:]}{done.stderr[-500:]}")
    counted = json.loads(lines[-1])
    # A connection that rests may be closed by the server, so broken ones alone are no failure.
    if counted["refused"] or counted["unanswered"]:
        raise LoadFailed(
            f"{url}: of {counted['answers']} answers {counted['refused']} were errors, "
            f"{counted['unanswered']} never came, {counted['socket_errors']} connections broke. "
            f"{counted['refusal']}"
        )
    if not counted["answers"]:
        raise LoadFailed(f"{url}: wrk sent nothing.")
    return Load(
        answers=counted["answers"],
        seconds=counted["seconds"],
        bytes=counted["bytes"],
        p50_ms=counted["p50_ms"],
        p99_ms=counted["p99_ms"],
        cpu_seconds=cpu,
    )


def _children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
