# SPDX-License-Identifier: MIT OR Apache-2.0
"""The signals of a process that serves, or that supervises those that do."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable

__all__ = ["handle_signals"]

logger = logging.getLogger(__name__)

# `timeout` signals the process and its group at once; so do a terminal and a process manager at
# Ctrl-C. Within this time, two signals are one.
_SAME_SECONDS = 0.5


def handle_signals(
    *,
    drain: Callable[[], None],
    reload: Callable[[], None],
    cut: Callable[[], None] = lambda: None,
) -> None:
    """In the running event loop: SIGTERM and SIGINT call ``drain``, SIGHUP calls ``reload``.

    A later SIGTERM or SIGINT calls ``cut`` and ends the process now, with exit code 128 and the
    signal. On Windows, whose event loops handle no signals, nothing changes.
    """
    if sys.platform == "win32":
        return
    drained_at: float | None = None

    def end(number: int) -> None:
        nonlocal drained_at
        if drained_at is None:
            drained_at = loop.time()
            logger.info("draining: requests under way are finished")
            drain()
        elif loop.time() - drained_at >= _SAME_SECONDS:
            logger.warning("a second signal to end: requests under way are cut")
            cut()
            logging.shutdown()
            os._exit(128 + number)

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end, number)
    loop.add_signal_handler(signal.SIGHUP, reload)
