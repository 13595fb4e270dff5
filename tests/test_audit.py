# SPDX-License-Identifier: MIT OR Apache-2.0
"""scripts/audit: a known vulnerability fails it, and an unavailable index is reported."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from script_module import load_script

ROOT = Path(__file__).parent.parent
FOUND = {
    "name": "shop",
    "version": "1.0",
    "vulns": [{"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["1.1"]}],
}
SOUND = {"name": "sound", "version": "1.0", "vulns": []}
SKIPPED = {"name": "unknown", "skip_reason": "Dependency not found"}
STAND_IN = """#!{python}
import json, sys
path = next(word[9:] for word in sys.argv if word.startswith("--output="))
json.dump({{"dependencies": {report}, "fixes": []}}, open(path, "w"))
sys.exit({code})
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "audit", tmp_path / "scripts")
    shutil.copy(ROOT / "constraints.txt", tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("audit")


def run(checkout: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, checkout / "scripts" / "audit"],
        env={**os.environ, **env}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("report", "code", "message"),
    [
        ([FOUND, SOUND, SKIPPED], 1, "shop 1.0: PYSEC-1, CVE-1 (fixed in 1.1)"),
        ([FOUND, SOUND, SKIPPED], 1, "2 versions audited, 1 known vulnerabilities, 1 not known"),
        ([SOUND, SOUND], 0, "2 versions audited, 0 known vulnerabilities."),
        ([SKIPPED, SKIPPED], 0, "is not audited: the index has no advisories"),
    ],
)
def test_reports(
    checkout: Path, script: ModuleType, report: list[dict[str, Any]], code: int, message: str
) -> None:
    """The stand-in ends with 1 after a finding, as pip-audit does."""
    program = checkout / ".venv" / f"pip-audit-{script.VERSION}" / "bin" / "pip-audit"
    program.parent.mkdir(parents=True)
    program.write_text(STAND_IN.format(python=sys.executable, report=report, code=code))
    program.chmod(0o755)
    done = run(checkout)
    assert done.returncode == code
    assert message in done.stderr


def test_a_failing_program_is_reported(checkout: Path, script: ModuleType) -> None:
    program = checkout / ".venv" / f"pip-audit-{script.VERSION}" / "bin" / "pip-audit"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!{sys.executable}\nraise SystemExit('no way to the index')\n")
    program.chmod(0o755)
    done = run(checkout)
    assert done.returncode == 0
    assert "constraints.txt is not audited: no way to the index" in done.stderr


def test_an_unavailable_index_is_reported(checkout: Path) -> None:
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_CONFIG_FILE": os.devnull}
    done = run(checkout, **nowhere, PIP_NO_INDEX="", PIP_EXTRA_INDEX_URL="", PIP_FIND_LINKS="")
    assert done.returncode == 0
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("constraints.txt is not audited: ")
    assert "Traceback" not in done.stderr


def test_the_check_runs_the_audit() -> None:
    assert (ROOT / "scripts" / "check").read_text().splitlines()[-1] == "scripts/audit"
