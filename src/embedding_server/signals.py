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


def mind_signals(
    *, drain: Callable[[], None], cut: Callable[[], None], reload: Callable[[], None]
) -> None:
    """In the running event loop: SIGTERM and SIGINT ``drain``, a second one ends now after ``cut``.

    The exit code is then 128 and the signal. SIGHUP calls ``reload``. On Windows, whose loops know
    no signals, it does nothing.
    """
    if sys.platform == "win32":
        return
    told_to_end = False

    def end(number: int) -> None:
        nonlocal told_to_end
        if told_to_end:
            logger.warning("told twice to end: requests under way are cut")
            cut()
            logging.shutdown()
            os._exit(128 + number)
        told_to_end = True
        logger.info("draining: requests under way are finished")
        drain()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end, number)
    loop.add_signal_handler(signal.SIGHUP, reload)
