# SPDX-License-Identifier: MIT OR Apache-2.0
"""The cores that this process may use."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

__all__ = ["available_cores", "cores_of_quotas"]


def available_cores() -> int:
    """Count the cores of this process' affinity, within the quotas of its control groups (v2)."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        groups = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return cores
    for line in groups:
        if line.startswith("0::/"):  # the one group of version 2
            group = line.removeprefix("0::/")
            return min(cores, cores_of_quotas(Path("/sys/fs/cgroup"), group) or cores)
    return cores


def cores_of_quotas(root: Path, group: str) -> int | None:
    """Whole cores that the ``cpu.max`` of ``group`` and of its parents up to ``root`` allow.

    At least 1; None without a quota. Source: cgroup-v2.rst of the Linux kernel.
    """
    cores: list[int] = []
    for folder in (root / group, *(root / group).parents):
        with contextlib.suppress(OSError, ValueError):  # no such file at the root, or "max"
            quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
            cores.append(max(1, int(quota) // int(period)))
        if folder == root:
            break
    return min(cores, default=None)
