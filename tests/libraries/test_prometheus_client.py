# SPDX-License-Identifier: MIT OR Apache-2.0
"""How prometheus_client names its files, which a supervisor hands on to a worker's successor."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from live import environment

UPGRADE = "prometheus_client has changed: check serving/supervisor against it, then raise its cap"

PROGRAM = """
import os
from prometheus_client import Counter, Gauge
Counter("c", "c").inc()
Gauge("g", "g", multiprocess_mode="livesum").set(1)
Gauge("m", "m", multiprocess_mode="mostrecent").set(1)
print(os.getpid())
"""


def test_it_is_the_tested_version() -> None:
    assert version("prometheus_client").startswith("0.26."), UPGRADE


def test_files_are_named_by_their_process(tmp_path: Path) -> None:
    env = environment({"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)})
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env, capture_output=True, check=True, text=True
    )
    process = done.stdout.strip()
    kinds = ("counter", "gauge_livesum", "gauge_mostrecent")
    assert {file.name for file in tmp_path.iterdir()} == {
        f"{kind}_{process}.db" for kind in kinds
    }, UPGRADE
