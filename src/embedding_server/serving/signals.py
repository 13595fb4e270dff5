# SPDX-License-Identifier: MIT OR Apache-2.0
"""What signals mean to a process that serves, or that minds those that do."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable

__all__ = ["mind_signals"]

logger = logging.getLogger(__name__)

# `timeout` signals the process and its group at once; at Ctrl-C, so do the terminal and a process
# manager.
_SAME_SECONDS = 0.5


def mind_signals(
    *, drain: Callable[[], None], cut: Callable[[], None], reload: Callable[[], None]
) -> None:
    """In the running event loop: SIGTERM and SIGINT ``drain``, a later one ends now after ``cut``.

    The exit code is then 128 and the signal; within half a second it is the same one again. SIGHUP
    calls ``reload``. On Windows, whose loops know no signals, it does nothing.
    """
    if sys.platform == "win32":
        return
    told_at: float | None = None

    def end(number: int) -> None:
        nonlocal told_at
        if told_at is not None:
            if loop.time() - told_at < _SAME_SECONDS:
                return
            logger.warning("told twice to end: requests under way are cut")
            cut()
            logging.shutdown()
            os._exit(128 + number)
        told_at = loop.time()
        logger.info("draining: requests under way are finished")
        drain()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end, number)
    loop.add_signal_handler(signal.SIGHUP, reload)
