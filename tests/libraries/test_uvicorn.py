# SPDX-License-Identifier: MIT OR Apache-2.0
"""The undocumented and private names of uvicorn that ``serving/servers`` uses."""

from __future__ import annotations

import asyncio
import inspect
from importlib.metadata import version

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

UPGRADE = "uvicorn has changed: check serving/servers against it, then raise its cap"

CONFIG = {"http", "ssl", "load", "timeout_graceful_shutdown"}
SERVER = {
    *("capture_signals", "run", "server_state", "should_exit", "shutdown", "startup"),
}
STATE = {"connections", "tasks"}
CONNECTION = {
    *("app", "client", "config", "connections", "cycle", "headers", "loop", "parser", "pipeline"),
    *("scheme", "server", "server_state", "timeout_keep_alive", "timeout_keep_alive_task"),
    *("transport", "timeout_keep_alive_handler", "shutdown", "on_response_complete"),
    *("on_message_begin", "on_url", "on_header", "on_headers_complete", "on_body"),
    *("on_message_complete", "_should_upgrade", "_unset_keepalive_if_required"),
}
CYCLE = {"scope", "keep_alive", "more_body", "response_started", "response_complete"}


async def application(scope: object, receive: object, send: object) -> None: ...


def test_it_is_the_tested_version() -> None:
    assert version("uvicorn").startswith("0.54."), UPGRADE


def test_the_names_are_there() -> None:
    config = uvicorn.Config(application, ws="none", lifespan="off", log_config=None)
    config.load()
    state = ServerState()

    async def connection() -> HttpToolsProtocol:
        return HttpToolsProtocol(config, state, {}, asyncio.get_running_loop())

    for thing, names in (
        (config, CONFIG),
        (uvicorn.Server(config), SERVER),
        (state, STATE),
        (asyncio.run(connection()), CONNECTION),
    ):
        missing = names - set(dir(thing))
        assert not missing, f"{UPGRADE}: {type(thing).__name__} has no {sorted(missing)}"
    source = inspect.getsource(RequestResponseCycle.__init__)
    assert all(f"self.{name} = " in source for name in CYCLE), UPGRADE
