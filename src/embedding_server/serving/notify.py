# SPDX-License-Identifier: MIT OR Apache-2.0
"""Tells the service manager what the server is at, in the datagrams of sd_notify(3)."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Notifier"]

logger = logging.getLogger(__name__)

# For a manager that doesn't read what it is told, in the event loop.
_SEND_SECONDS = 1.0


class Notifier:
    """To whom ``NOTIFY_SOCKET`` names; without it, as in a test or a worker, to nobody.

    ``watchdog`` is in seconds: hearing nothing for longer, the manager restarts the server.
    """

    def __init__(self, address: str | None = None, watchdog: float | None = None) -> None:
        self._address = address
        self._watchdog = watchdog
        self._state = "starting"
        self._serving = "STATUS=serving"

    @classmethod
    def from_environment(cls) -> Notifier:
        """As the manager wants it; its variables are taken out, as they are not for children."""
        address = os.environ.pop("NOTIFY_SOCKET", "")
        usec, pid = (os.environ.pop(f"WATCHDOG_{name}", "") for name in ("USEC", "PID"))
        if not address:
            return cls()
        if address[0] not in "/@":
            logger.warning("NOTIFY_SOCKET=%s names no Unix socket: nobody is told", address)
            return cls()
        watched = usec.isdecimal() and int(usec) > 0 and pid in ("", str(os.getpid()))
        return cls(address, int(usec) / 1e6 if watched else None)

    def listening(self, address: str) -> None:
        """The socket is there, and models are loaded."""
        self._serving = f"STATUS=serving on {address}"
        self._send(f"STATUS=loading models; listening on {address}")

    def ready(self) -> None:
        """All models are loaded; told once."""
        if self._state == "starting":
            self._state = "ready"
            self._send("READY=1", self._serving)

    @contextmanager
    def reloading(self) -> Iterator[None]:
        """Around reading files again; nothing is told of it while the server starts or ends."""
        if self._state == "ready":
            self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            yield
        finally:
            if self._state == "ready":
                self._send("READY=1")

    def stopping(self) -> None:
        """It drains; told once."""
        if self._state != "stopping":
            self._state = "stopping"
            self._send("STOPPING=1", "STATUS=draining: requests under way are finished")

    def watch(self, alive: Callable[[], bool]) -> None:
        """In the running event loop: be heard as often as the manager asks, while ``alive()``.

        Should it raise, the manager hears no more, and restarts the server.
        """
        if self._watchdog is None:
            return
        if alive():
            self._send("WATCHDOG=1")
        # Half of its time, as sd_watchdog_enabled(3) recommends.
        asyncio.get_running_loop().call_later(self._watchdog / 2, self.watch, alive)

    def _send(self, *lines: str) -> None:
        if self._address is None:
            return
        to = f"\0{self._address[1:]}" if self._address[0] == "@" else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.settimeout(_SEND_SECONDS)
                sender.sendto("\n".join(lines).encode(), to)
        except OSError as error:
            logger.warning("NOTIFY_SOCKET=%s can't be told: %s", self._address, error)
