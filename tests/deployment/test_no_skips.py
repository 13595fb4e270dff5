# SPDX-License-Identifier: MIT OR Apache-2.0
"""Where no test may be skipped, one that is fails the run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from live import environment

pytestmark = pytest.mark.packaging

NIX = Path(__file__).with_name("test_nix.py")


@pytest.mark.parametrize(("flags", "code"), [((), 0), (("--no-skips",), 1)])
def test_a_missing_tool_fails_the_run(tmp_path: Path, flags: tuple[str, ...], code: int) -> None:
    """Here all of them are missing."""
    command = [sys.executable, "-m", "pytest", "-m", "packaging", NIX, *flags]
    done = subprocess.run(
        command, env=environment({"PATH": str(tmp_path)}), capture_output=True, text=True
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert ("none may be" in done.stdout) == bool(code)
