# SPDX-License-Identifier: MIT OR Apache-2.0
"""The dashboard against the types that Grafana publishes of its own."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from dashboard import load_dashboard

pytest.importorskip(
    "grafana_foundation_sdk",
    reason="needs Grafana's types: pip install -c constraints.txt grafana-foundation-sdk",
)
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

pytestmark = pytest.mark.packaging

Json = dict[str, Any]


def problems_of(dashboard: Json) -> list[str]:
    """What Grafana's types can't take, or don't know and so leave out."""
    register_default_plugins()
    try:
        read = Dashboard.from_json(copy.deepcopy(dashboard))
        again = json.loads(JSONEncoder().encode(read))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return [f"Grafana's types refuse it: {error}"]
    return list(_lost(dashboard, again, ""))


def _lost(value: Any, read: Any, place: str) -> Iterator[str]:
    if isinstance(value, dict) and isinstance(read, dict):
        for key, inner in value.items():
            if key in read:
                yield from _lost(inner, read[key], f"{place}.{key}")
            else:
                yield f"Grafana knows no {place}.{key}"
    elif isinstance(value, list) and isinstance(read, list) and len(value) == len(read):
        for index, (inner, again) in enumerate(zip(value, read, strict=True)):
            yield from _lost(inner, again, f"{place}[{index}]")
    elif value != read:
        yield f"Grafana reads {place} as {read!r}"


def test_grafana_knows_all_that_the_dashboard_says() -> None:
    dashboard = load_dashboard()
    assert problems_of(dashboard) == []
    assert dashboard["schemaVersion"] == Dashboard().schema_version


def _misspelt(dashboard: Json) -> None:
    options = dashboard["panels"][1]["options"]
    options["colourMode"] = options.pop("colorMode")


def _misplaced(dashboard: Json) -> None:
    dashboard["panels"][1]["unit"] = "s"


def _wrong_kind(dashboard: Json) -> None:
    dashboard["panels"][1]["fieldConfig"]["defaults"]["thresholds"] = ["green", "red"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_misspelt, "Grafana knows no .panels[1].options.colourMode"),
        (_misplaced, "Grafana knows no .panels[1].unit"),
        (_wrong_kind, ".panels[1].fieldConfig.defaults.thresholds"),
    ],
)
def test_a_broken_dashboard_is_caught(change: Callable[[Json], None], told: str) -> None:
    broken = load_dashboard()
    change(broken)
    assert any(told in problem for problem in problems_of(broken)), problems_of(broken)
