# SPDX-License-Identifier: MIT OR Apache-2.0
"""The cores that a process may use."""

from __future__ import annotations

from pathlib import Path

import pytest

from embedding_server.machine import cores_of_quotas


@pytest.mark.parametrize(
    ("quotas", "cores"),
    [
        ({}, None),
        ({"a/b": "max 100000", "a": "max 100000"}, None),
        ({"": "250000 100000"}, 2),
        ({"a/b": "400000 100000", "a": "150000 50000"}, 3),
        ({"a/b": "50000 100000"}, 1),
        ({"c": "100000 100000"}, None),
    ],
    ids=["none", "max", "container", "slice", "fraction", "another"],
)
def test_cores_of_quotas(quotas: dict[str, str], cores: int | None, tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    (root / "a" / "b").mkdir(parents=True)
    (tmp_path / "cpu.max").write_text("100000 100000\n")  # above the root, and so none of ours
    for group, quota in quotas.items():
        (root / group).mkdir(exist_ok=True)
        (root / group / "cpu.max").write_text(f"{quota}\n")
    assert cores_of_quotas(root, "a/b") == cores
