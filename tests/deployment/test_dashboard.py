# SPDX-License-Identifier: MIT OR Apache-2.0
"""Dashboard and alerts against our metrics and against what each must have; nothing is run."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from dashboard import (
    PROMETHEUS,
    alerts,
    load_dashboard,
    panels_of,
    problems_of,
    series_in,
    unknown_in,
)

from embedding_server.telemetry import METRICS

ROOT = Path(__file__).resolve().parents[2]
TESTS = Path(__file__).parent / "data_monitoring" / "alerts.yml"

Json = dict[str, Any]


def test_the_dashboard_is_in_order() -> None:
    assert problems_of(load_dashboard()) == []


def test_every_metric_is_shown() -> None:
    queries = [
        target["expr"] for panel in panels_of(load_dashboard()) for target in panel["targets"]
    ]
    shown = {name for query in queries for name in series_in(query)}
    for row in METRICS:
        names = {row.exposed_name, f"{row.exposed_name}_bucket"}
        assert shown & names, f"{row.exposed_name} is in no panel"


def _panel(dashboard: Json, title: str) -> Json:
    (found,) = (panel for panel in panels_of(dashboard) if panel["title"] == title)
    return found


def _replace(title: str, old: str, new: str) -> Callable[[Json], None]:
    def change(dashboard: Json) -> None:
        for target in _panel(dashboard, title)["targets"]:
            assert old in target["expr"]
            target["expr"] = target["expr"].replace(old, new)

    return change


def _move(dashboard: Json) -> None:
    _panel(dashboard, "Latency of embeddings")["gridPos"]["w"] += 1


def _leave(dashboard: Json) -> None:
    _panel(dashboard, "Queue")["gridPos"]["x"] = 22


def _same_id(dashboard: Json) -> None:
    _panel(dashboard, "Queue")["id"] = _panel(dashboard, "Up")["id"]


def _fixed_source(dashboard: Json) -> None:
    _panel(dashboard, "Up")["targets"][0]["datasource"]["uid"] = "P1809F7CD0C75ACF3"


def _no_description(dashboard: Json) -> None:
    del _panel(dashboard, "Memory")["description"]


def _wrong_unit(dashboard: Json) -> None:
    _panel(dashboard, "Memory")["fieldConfig"]["defaults"]["unit"] = "byte"


def _wrong_legend(dashboard: Json) -> None:
    _panel(dashboard, "Memory")["targets"][0]["legendFormat"] = "{{model}}"


def _no_variable(dashboard: Json) -> None:
    variables = dashboard["templating"]["list"]
    variables[:] = [variable for variable in variables if variable["name"] != "model"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_replace("Memory", "_resident_", "_residnt_"), "no metric process_residnt_memory_bytes"),
        (
            _replace("Tokens a second", "tokens_total", "tokens"),
            "no metric embedding_server_tokens",
        ),
        (_replace("Tokens a second", "model=~", "modle=~"), "has no label modle"),
        (
            _replace("Latency p99 by route", "(route, le)", "(rout, le)"),
            "no label rout to group by",
        ),
        (_replace("Memory", "$job", "$jobs"), "no variable $jobs"),
        (_move, "'Latency of embeddings' and 'Where the time goes (p95)' overlap"),
        (_leave, "'Queue' leaves the grid"),
        (_same_id, "two panels have the id"),
        (_fixed_source, "'Up': not of the chosen data source"),
        (_no_description, "'Memory': no description"),
        (_wrong_unit, "'Memory': no unit of Grafana's: 'byte'"),
        (_wrong_legend, "the legend names model"),
        (_no_variable, "no variable $model"),
    ],
)
def test_a_broken_dashboard_is_caught(change: Callable[[Json], None], told: str) -> None:
    broken = load_dashboard()
    change(broken)
    assert any(told in problem for problem in problems_of(broken)), problems_of(broken)


@pytest.mark.parametrize("rule", alerts(), ids=lambda rule: rule["alert"])
def test_an_alert_is_in_order(rule: Json) -> None:
    assert unknown_in(rule["expr"]) == []
    assert rule["labels"]["severity"] in ("critical", "warning")
    notes = rule["annotations"]
    assert set(notes) == {"summary", "description", "runbook"}
    assert notes["description"].endswith(".")
    page, _, anchor = notes["runbook"].partition("#")
    headings = re.findall(r"^#+ (.*)$", (ROOT / page).read_text(encoding="utf-8"), re.M)
    assert anchor in {re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in headings}


def test_a_broken_alert_is_caught() -> None:
    query = 'up{job="a"} and on (job) rate(embedding_server_request_total{statuss="5"}[5m]) > 0'
    assert unknown_in(query) == ["no metric embedding_server_request_total"]
    query = 'sum by (modle) (rate(embedding_server_requests_total{statuss="5"}[5m])) > 0'
    assert unknown_in(query) == [
        "embedding_server_requests_total has no label statuss",
        "no label modle to group by",
    ]


def test_alerts_and_dashboard_ask_for_the_job_that_is_scraped() -> None:
    (scraped,) = yaml.safe_load(PROMETHEUS.read_text(encoding="utf-8"))["scrape_configs"]
    jobs = {job for rule in alerts() for job in re.findall(r'job="([^"]*)"', rule["expr"])}
    assert jobs == {scraped["job_name"]}


def test_every_alert_is_tested() -> None:
    """That it fires, and in the test of the server in order that it doesn't."""
    tests = yaml.safe_load(TESTS.read_text(encoding="utf-8"))["tests"]
    expected = [
        sample["labels"]
        for test in tests
        for query in test["promql_expr_test"]
        for sample in query.get("exp_samples", ())
    ]
    for rule in alerts():
        severity = rule["labels"]["severity"]
        assert f'{{alertname="{rule["alert"]}", severity="{severity}"}}' in expected
    assert not any("exp_samples" in query for query in tests[0]["promql_expr_test"])
    series = {name for given in tests[0]["input_series"] for name in series_in(given["series"])}
    assert {name for rule in alerts() for name in series_in(rule["expr"])} <= series
