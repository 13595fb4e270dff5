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
import uvicorn
from fastapi import FastAPI

from embedding_server.app import create_app
from embedding_server.protocol import HttpProtocol
from embedding_server.settings import Settings

SECONDS = 30.0


@dataclass(frozen=True)
class InProcessServer:
    """A running application: where it listens, and what stops it."""

    url: str
    app: FastAPI
    uvicorn: uvicorn.Server


@contextmanager
def serving(*, wait: bool = True, **settings: Any) -> Iterator[InProcessServer]:
    """An application of ``settings``; with ``wait``, ready before the body runs."""
    app = create_app(Settings(**settings))
    server = uvicorn.Server(
        uvicorn.Config(app, http=HttpProtocol, ws="none", log_config=None, access_log=False)
    )
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            if wait:
                until(lambda: httpx.get(url + "/health/ready").status_code == 200)
            yield InProcessServer(url, app, server)
        finally:
            server.should_exit = True
            thread.join(SECONDS)
    assert not thread.is_alive(), "the server did not stop"


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread or process brings about."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)
