# SPDX-License-Identifier: MIT OR Apache-2.0
"""Reports the state of the server to the service manager, in the datagrams of sd_notify(3)."""

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

# How long a manager that reads no datagrams may hold up the event loop.
_SEND_SECONDS = 1.0


class Notifier:
    """Reports to the socket ``address``; without one, as in a test or a worker, to none.

    A manager that hears nothing for ``watchdog`` seconds restarts the server.
    """

    def __init__(self, address: str | None = None, watchdog: float | None = None) -> None:
        self._address = address
        self._watchdog = watchdog
        self._state = "starting"
        self._serving = "STATUS=serving"

    @classmethod
    def from_environment(cls) -> Notifier:
        """Take the manager's variables out of the environment: they are not for children."""
        address = os.environ.pop("NOTIFY_SOCKET", "")
        usec = os.environ.pop("WATCHDOG_USEC", "")
        pid = os.environ.pop("WATCHDOG_PID", "")
        if not address:
            return cls()
        if address[0] not in "/@":
            logger.warning("NOTIFY_SOCKET=%s is not a Unix socket: nothing is reported", address)
            return cls()
        watched = usec.isdecimal() and int(usec) > 0 and pid in ("", str(os.getpid()))
        return cls(address, int(usec) / 1e6 if watched else None)

    def listening(self, address: str) -> None:
        """The server listens on ``address``, and loads its models."""
        self._serving = f"STATUS=serving on {address}"
        self._send(f"STATUS=loading models; listening on {address}")

    def ready(self) -> None:
        """All models are loaded; reported once."""
        if self._state == "starting":
            self._state = "ready"
            self._send("READY=1", self._serving)

    @contextmanager
    def reloading(self) -> Iterator[None]:
        """Files are read again in the body; not reported while the server starts or ends."""
        if self._state == "ready":
            self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            yield
        finally:
            if self._state == "ready":
                self._send("READY=1")

    def stopping(self) -> None:
        """The server drains; reported once."""
        if self._state != "stopping":
            self._state = "stopping"
            self._send("STOPPING=1", "STATUS=draining: requests under way are finished")

    def watch(self, alive: Callable[[], bool]) -> None:
        """In the running event loop: feed the watchdog while ``alive()``, and not if it raises."""
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
            logger.warning("NOTIFY_SOCKET=%s: nothing can be reported: %s", self._address, error)
