# SPDX-License-Identifier: MIT OR Apache-2.0
"""The most memory that this process has had."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["peak_megabytes"]


def peak_megabytes() -> int:
    """Resident, in MB of 2**20 bytes, since this program was started.

    getrusage's begins with that of the process that started it, which may be far larger.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    peak = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert peak is not None
    return int(peak[1]) // 1024
