# SPDX-License-Identifier: MIT OR Apache-2.0
"""``serve``: from settings to the exit code, in one process or in several."""

from __future__ import annotations

import argparse
import logging
import os
import signal
from types import FrameType
from typing import TYPE_CHECKING

from embedding_server.commands.options import add_settings
from embedding_server.serving.listener import listening
from embedding_server.serving.notify import Notifier
from embedding_server.settings import Settings

if TYPE_CHECKING:
    from embedding_server.serving.service import Service
    from embedding_server.serving.supervisor import Supervisor

__all__ = ["add_options", "run"]

logger = logging.getLogger(__name__)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``serve``, which are settings only."""
    parser.description = "Answer HTTP requests."
    add_settings(parser, "serve")


def run(settings: Settings, arguments: argparse.Namespace) -> int:
    """Serve until drained; the exit code is 0, or 128 and the second signal.

    Raises ConfigurationError if the address can't be listened on, the server isn't installed or
    a file of a setting can't be used, and ModelError if the models can't be served.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)  # until an event loop handles them
    if hasattr(signal, "SIGHUP"):  # not on Windows
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the files are read now
    for name in ("PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir"):
        os.environ.pop(name, None)  # of another program: a supervisor sets its workers' own
    notifier = Notifier.from_environment()
    runner: Service | Supervisor
    if settings.workers > 1:  # a supervisor imports nothing of a service
        from embedding_server.serving.supervisor import Supervisor

        runner = Supervisor(settings, notifier)
    else:
        from embedding_server.serving.service import Service

        runner = Service(settings, notifier)
    with listening(settings) as (listener, address):
        logger.info("listening on %s (API: /docs)", address)
        notifier.listening(address)
        code = runner.run(listener)
    logger.info("ended")
    return code


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)
