# SPDX-License-Identifier: MIT OR Apache-2.0
"""The generated pages are up to date with the code: an undocumented row fails."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
from prometheus_client.parser import text_string_to_metric_families
from script_module import load_script

from embedding_server.settings import rows
from embedding_server.telemetry import METRICS, Telemetry

ROOT = Path(__file__).parent.parent
PAGES = [f"docs/{name}.md" for name in ("settings", "cli", "metrics", "models", "api")]


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    """scripts/docs as a module."""
    return load_script("docs")


@pytest.mark.parametrize("page", PAGES)
def test_pages_are_up_to_date(generator: ModuleType, page: str) -> None:
    assert set(generator.pages()) == set(PAGES)
    written = (ROOT / page).read_text(encoding="utf-8")
    assert written == generator.pages()[page], f"{page} is out of date: run scripts/docs"


@pytest.mark.parametrize("columns", ["20", "80", "400"])
def test_pages_do_not_depend_on_the_terminal(
    generator: ModuleType, columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert generator.pages()["docs/cli.md"] == (ROOT / "docs/cli.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("row", list(rows()), ids=lambda row: row.name)
def test_every_setting_is_in_help_and_pages(row: object) -> None:
    settings = (ROOT / "docs/settings.md").read_text(encoding="utf-8")
    commands = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
    for name in (row.flag, row.env, row.name):  # type: ignore[attr-defined]
        assert f"`{name}`" in settings
    assert f"`{row.flag}" in commands  # type: ignore[attr-defined]


def test_every_metric_that_is_exposed_is_in_the_table() -> None:
    telemetry = Telemetry()
    body, _ = telemetry.exposition()
    exposed = {
        family.name + ("_total" if family.type == "counter" else "")
        for family in text_string_to_metric_families(body.decode())
    }
    assert exposed == {metric.exposed_name for metric in METRICS}


def test_the_architecture_page_names_every_module() -> None:
    """Each file once, so that a reader finds the one to change from the page alone."""
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    drawing = re.findall(r"^```\n(.*?)^```", page.partition("## The package")[2], re.M | re.S)[0]
    modules = (ROOT / "src" / "embedding_server").rglob("*.py")
    named = Counter(re.findall(r"\w+\.py", drawing))
    assert named == Counter(path.name for path in modules if path.name != "__init__.py")


def test_the_architecture_page_names_only_files_that_exist() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    folders = (ROOT, ROOT / "src" / "embedding_server")
    for path in re.findall(r"`([\w./-]+/[\w.-]+\.\w+)`", page):
        assert any((folder / path).is_file() for folder in folders), path


def test_the_script_runs() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "docs", "--check"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
