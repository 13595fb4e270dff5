# SPDX-License-Identifier: MIT OR Apache-2.0
"""``embedding-server`` with an ASGI server that ends by itself: a program to be run."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from starlette.types import ASGIApp

from embedding_server import cli
from embedding_server.serving.servers.base import SERVERS, ServerOptions

__all__ = ["PROGRAM", "Ending"]

PROGRAM = (str(Path(__file__)),)
"""For ``running_server``."""


class Ending:
    """See ``AsgiServer``."""

    protocols: ClassVar = ["http/1.1"]

    def __init__(self, app: ASGIApp, options: ServerOptions) -> None: ...

    def run(self, listener: socket.socket, on_start: Callable[[], None]) -> None: ...

    def stop(self) -> None: ...


if __name__ == "__main__":
    SERVERS["uvicorn"] = "ending_server:Ending"  # type: ignore[index]
    sys.exit(cli.main())
