# SPDX-License-Identifier: MIT OR Apache-2.0
"""The dashboard and the alerts as data, and what may be wrong with them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml

from embedding_server.telemetry import METRICS

__all__ = [
    "DASHBOARD", "PROMETHEUS", "RULES", "alerts", "labels_in_legend", "load_dashboard", "panels_of",
    "problems_of", "series_in", "unknown_in",
]  # fmt: skip

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = ROOT / "deploy" / "grafana" / "embedding-server.json"
PROMETHEUS = ROOT / "deploy" / "prometheus" / "prometheus.yml"
RULES = ROOT / "deploy" / "prometheus" / "rules.yml"

_OF_TARGET = {"job", "instance"}
_OF_PROMETHEUS = {"up": set[str](), "ALERTS": {"alertname", "alertstate", "severity"}}
_KEYWORDS = {"and", "or", "unless", "bool", "offset", "by", "without", "on", "ignoring"}
_COLUMNS = 24
# Each was looked up in Grafana's own list: an unknown one is shown as text behind the number.
_UNITS = {"none", "short", "reqps", "percentunit", "s", "bytes", "dtdurations"}

Json = dict[str, Any]


def load_dashboard() -> Json:
    """The dashboard that is shipped."""
    loaded: Json = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return loaded


def alerts() -> list[Json]:
    """The alerts that are shipped."""
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def panels_of(dashboard: Json) -> list[Json]:
    """All but the rows that only head others."""
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def labels_in_legend(legend: str) -> set[str]:
    """``{{label}}``, as often as it is there."""
    return set(re.findall(r"\{\{\s*(\w+)\s*\}\}", legend))


# ----------------------------------------------------------------------------------------- PromQL


def _exposed() -> dict[str, set[str]]:
    """Each series that may be asked for, with the labels that the server gives it."""
    series = dict(_OF_PROMETHEUS)
    for row in METRICS:
        labels = set(row.labels)
        if row.kind == "histogram":
            series[f"{row.family}_bucket"] = labels | {"le"}
            series[f"{row.family}_sum"] = series[f"{row.family}_count"] = labels
        else:
            series[row.exposed_name] = labels
    return series


def series_in(query: str) -> set[str]:
    """The names of the series that a PromQL query asks for."""
    bare = re.sub(r'"[^"]*"', "", query)
    bare = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", "", bare)
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", bare)
    names = set(re.findall(r"(?<![\w.$])([A-Za-z_]\w*)\b(?!\s*\()", bare))
    return names - _KEYWORDS


def unknown_in(query: str) -> list[str]:
    """Series and labels of a PromQL query that no server exposes."""
    exposed = _exposed()
    unknown = [f"no metric {name}" for name in sorted(series_in(query) - set(exposed))]
    bare = re.sub(r'"[^"]*"', '""', query)
    for name, matchers in re.findall(r"(\w+)\{([^}]*)\}", bare):
        asked = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))
        unknown += [
            f"{name} has no label {label}"
            for label in sorted(asked - exposed.get(name, asked) - _OF_TARGET)
        ]
    known = _OF_TARGET.union(*(exposed.get(name, set()) for name in series_in(query)))
    for labels in re.findall(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)", bare):
        grouped = {label.strip() for label in labels.split(",")}
        unknown += [f"no label {label} to group by" for label in sorted(grouped - known)]
    return unknown


# ---------------------------------------------------------------------------------------- Grafana


def problems_of(dashboard: Json) -> list[str]:
    """What is wrong with a dashboard: nothing, one hopes."""
    return [
        *_misplaced(dashboard["panels"]),
        *(f"{panel['title']!r}: {told}" for panel in panels_of(dashboard) for told in _bad(panel)),
        *_bad_variables(dashboard),
    ]


def _misplaced(panels: list[Json]) -> Iterator[str]:
    ids = [panel["id"] for panel in panels]
    yield from (
        f"two panels have the id {id}" for id in sorted({i for i in ids if ids.count(i) > 1})
    )
    for panel in panels:
        place = panel["gridPos"]
        if place["x"] < 0 or place["w"] < 1 or place["h"] < 1 or place["x"] + place["w"] > _COLUMNS:
            yield f"{panel['title']!r} leaves the grid"
    for one, other in combinations(panels, 2):
        a, b = one["gridPos"], other["gridPos"]
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        above = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        if not (beside or above):
            yield f"{one['title']!r} and {other['title']!r} overlap"


def _bad(panel: Json) -> Iterator[str]:
    if not panel["title"]:
        yield f"panel {panel['id']} has no title"
    if not panel.get("description", "").endswith("."):
        yield "no description that says what to do"
    unit = panel["fieldConfig"]["defaults"].get("unit", "")
    if unit not in _UNITS and not unit.startswith("suffix:"):
        yield f"no unit of Grafana's: {unit!r}"
    if not panel["fieldConfig"]["defaults"]["thresholds"]["steps"]:
        yield "no threshold"
    references = [target["refId"] for target in panel["targets"]]
    if len(set(references)) < max(1, len(references)):
        yield "queries need a refId each"
    for target in panel["targets"]:
        if {panel["datasource"]["uid"], target["datasource"]["uid"]} != {"${datasource}"}:
            yield "not of the chosen data source"
        yield from unknown_in(target["expr"])
        grouped = {label for group in re.findall(r"by \(([^)]*)\)", target["expr"])
                   for label in group.split(", ")}  # fmt: skip
        for label in sorted(labels_in_legend(target["legendFormat"]) - grouped):
            yield f"the legend names {label}, by which nothing is grouped"


def _bad_variables(dashboard: Json) -> Iterator[str]:
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    known = set(variables) | {"__rate_interval"}
    queries = [t["expr"] for panel in panels_of(dashboard) for t in panel["targets"]]
    for variable in variables.values():
        if variable["type"] == "query":
            query = variable["query"]["query"]
            queries.append(query)
            asked = re.fullmatch(r"label_values\((.+), (\w+)\)", query)
            if asked is None:
                yield f"${variable['name']}: not label_values(series, label)"
            else:
                yield from (f"${variable['name']}: {told}" for told in unknown_in(asked[1]))
    used = {name for query in queries for name in re.findall(r"\$\{?(\w+)", query)}
    yield from (f"no variable ${name}" for name in sorted(used - known))
    yield from (f"${name} is not used" for name in sorted(known - used - {"datasource"}))
