# SPDX-License-Identifier: MIT OR Apache-2.0
"""``--no-skips``: where every tool can be had, a test that is skipped is one that was lost."""

from __future__ import annotations

from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="fail if a test was skipped")


def _skipped(config: pytest.Config) -> list[Any]:
    if not config.getoption("--no-skips", False):
        return []
    terminal: Any = config.pluginmanager.get_plugin("terminalreporter")
    return list(terminal.stats.get("skipped", ()))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _skipped(session.config) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if skipped := _skipped(config):
        terminalreporter.write_line(f"{len(skipped)} skipped, and none may be here", red=True)
