# SPDX-License-Identifier: MIT OR Apache-2.0
"""The application on a real socket of this process, where a test can put a fault into it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from embedding_server.app import Application, create_app
from embedding_server.serving.servers.base import AsgiServer, ServerOptions, server_class
from embedding_server.settings import Settings

SECONDS = 30.0


@dataclass(frozen=True)
class InProcessServer:
    """A running application: where it listens, what stops it, and the thread that then ends."""

    url: str
    app: Application
    server: AsgiServer
    thread: threading.Thread


@contextmanager
def serving(*, wait: bool = True, **values: Any) -> Iterator[InProcessServer]:
    """An application of the settings ``values``; with ``wait``, ready before the body runs."""
    settings = Settings(**values)
    app = create_app(settings)
    server = server_class(settings.server)(app, ServerOptions.from_settings(settings))
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=server.run, args=[listener, lambda: None])
        thread.start()
        try:
            # Until it answers, there may be no event loop that could be stopped.
            until(lambda: httpx.get(url + "/health/live").status_code == 200)
            if wait:
                until(lambda: httpx.get(url + "/health/ready").status_code == 200)
            yield InProcessServer(url, app, server, thread)
        finally:
            if thread.is_alive():
                server.stop()
            thread.join(SECONDS)
    assert not thread.is_alive(), "the server did not stop"


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread or process brings about."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)
