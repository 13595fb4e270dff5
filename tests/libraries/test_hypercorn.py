# SPDX-License-Identifier: MIT OR Apache-2.0
"""The undocumented and private names of hypercorn that ``serving/servers/hypercorn`` uses."""

from __future__ import annotations

import inspect
from importlib.metadata import version

from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.asyncio.task_group import TaskGroup
from hypercorn.asyncio.worker_context import WorkerContext
from hypercorn.config import Config
from hypercorn.events import Closed, RawData, Updated
from hypercorn.protocol.h2 import H2Protocol

UPGRADE = "hypercorn has changed: check serving/servers/hypercorn against it, then raise its cap"

PARAMETERS = {
    H2Protocol: [
        *("app", "config", "context", "task_group", "connection_state", "ssl", "client", "server"),
        "send",
    ],
    ASGIWrapper: ["app"],
    TaskGroup: ["loop"],
    WorkerContext: ["max_requests"],
    Closed: [],
    RawData: ["data", "address"],
    Updated: ["idle"],
}


def test_it_is_the_tested_version() -> None:
    assert version("hypercorn").startswith("0.18."), UPGRADE


def test_the_names_are_there() -> None:
    for made, parameters in PARAMETERS.items():
        assert list(inspect.signature(made).parameters) == parameters, f"{UPGRADE}: {made}"
    protocol = H2Protocol(
        ASGIWrapper(None), Config(), WorkerContext(None), None, {}, False, None, None, None
    )
    names = {"connection", "handle", "initiate", "streams", "_flush", "_handle_events"}
    assert names <= set(dir(protocol)), UPGRADE
    # The connection's own event stands in its place.
    assert hasattr(WorkerContext(None), "terminated"), UPGRADE
    assert "self.context.terminated.is_set()" in inspect.getsource(H2Protocol), UPGRADE
