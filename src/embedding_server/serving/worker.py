# SPDX-License-Identifier: MIT OR Apache-2.0
"""A process of ``--workers``: serves, and obeys its supervisor.

Run as ``python -m embedding_server.serving.worker LISTENER CONTROL AGAIN``. The first two are the
file descriptors of the listening socket and of a socket to the supervisor; AGAIN is 1 for one that
replaces another, else 0. The pickled settings are read from standard input. The control socket
brings one command a line: ``drain``, ``reload``, or ``siblings`` with what readiness says of the
other workers, in JSON. ``ready``, or ``failed`` with a message in JSON, is sent back. When the
control socket ends, the supervisor has gone, and the worker drains.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import pickle
import signal
import socket
import sys

from embedding_server.errors import EmbeddingServerError
from embedding_server.logs import set_up_logging
from embedding_server.serving.notify import Notifier
from embedding_server.serving.service import Service
from embedding_server.settings import Settings

__all__ = ["main"]

logger = logging.getLogger(__name__)

# Of a message: a line must fit into the supervisor's reader, which takes 64 KiB.
_MESSAGE_CHARACTERS = 4096


def main(listener_descriptor: int, control_descriptor: int, again: bool) -> int:
    """Serve until drained; the exit code."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there are files to read again
    control = socket.socket(fileno=control_descriptor)
    settings = Settings.model_construct(**pickle.load(sys.stdin.buffer))  # noqa: S301 - our parent's
    set_up_logging(settings.log_format, settings.log_level)
    try:
        worker = _Worker(settings, control, again=again)
        with socket.socket(fileno=listener_descriptor) as listener:
            return worker.run(listener) or int(worker.failed)
    except EmbeddingServerError as error:
        _send(control, f"failed {json.dumps(str(error)[:_MESSAGE_CHARACTERS])}")
        return 1


class _Worker(Service):
    failed = False
    """Whether a task that listens to the supervisor or watches the engines has failed."""

    def __init__(self, settings: Settings, control: socket.socket, *, again: bool) -> None:
        # One that replaces another loads first: its siblings serve, and it could only refuse.
        super().__init__(settings, Notifier(), load_first=again)
        self._control = control
        telemetry = self.app.state.telemetry
        telemetry.runs_in_worker(supervisor=os.getppid(), again=again)

    def started(self) -> None:
        super().started()
        self._tasks = [
            asyncio.ensure_future(work) for work in (self._obey(), self._end_when_broken())
        ]
        for task in self._tasks:
            task.add_done_callback(self._ended)

    def loaded(self) -> None:
        _send(self._control, "ready")
        super().loaded()

    async def _obey(self) -> None:
        reader, writer = await asyncio.open_connection(sock=self._control.dup())
        try:
            async for line in reader:
                command, _, argument = line.decode().strip().partition(" ")
                match command:
                    case "drain":
                        self.drain()
                    case "reload":
                        self.reload()
                    case "siblings":
                        self.app.state.condition.siblings = json.loads(argument)
        except ConnectionError:
            pass  # the supervisor was killed
        finally:
            writer.close()
            self.drain()

    async def _end_when_broken(self) -> None:
        """End, to be replaced: a probe would mostly reach a sibling, and find it alive."""
        await self._registry.until_broken()
        logger.critical("a batch hangs or an engine has died: this worker drains and ends")
        self.drain()

    def _ended(self, task: asyncio.Task[None]) -> None:
        """End if ``task`` failed: without it the worker neither obeys nor notices its faults."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self.failed = True
            logger.critical("a task of this worker failed: it drains and ends", exc_info=error)
            self.drain()


def _send(control: socket.socket, line: str) -> None:
    control.send(line.encode() + b"\n")


if __name__ == "__main__":
    listener_number, control_number, restarted = map(int, sys.argv[1:])
    sys.exit(main(listener_number, control_number, bool(restarted)))
