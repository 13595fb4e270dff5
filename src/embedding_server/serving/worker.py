# SPDX-License-Identifier: MIT OR Apache-2.0
"""A process of ``--workers``: serves, and does what its supervisor says.

Run as ``python -m embedding_server.serving.worker NUMBER STARTS LISTENER CONTROL``. STARTS is how
often it was started before; the last two are file descriptors: the listening socket, and a socket
to the supervisor. The settings come by standard input, pickled. By the control socket comes a
command a line: ``drain``, ``reload``, and ``siblings`` with what readiness should say of them, as
JSON; back go ``ready``, or ``failed`` with a message. Its end means that the supervisor has gone.
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

from prometheus_client import values

from embedding_server.errors import EmbeddingServerError
from embedding_server.logs import set_up_logging
from embedding_server.serving.service import Service
from embedding_server.settings import Settings

__all__ = ["main"]

logger = logging.getLogger(__name__)

# Of a message, which as JSON must fit into one line of the supervisor's reader (64 KiB).
_MESSAGE_CHARACTERS = 4096


def main(number: int, starts: int, listener_descriptor: int, control_descriptor: int) -> int:
    """Serve until told to stop; the exit code."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is something to be read again
    # Files of metrics are named by it, and not by a process that comes and goes.
    values.ValueClass = values.MultiProcessValue(  # type: ignore[no-untyped-call]
        process_identifier=lambda: number
    )
    control = socket.socket(fileno=control_descriptor)
    settings = Settings.model_construct(**pickle.load(sys.stdin.buffer))  # noqa: S301 - our parent's
    set_up_logging(settings.log_format, settings.log_level)
    try:
        worker = _Worker(settings, control, again=starts > 0)
        with socket.socket(fileno=listener_descriptor) as listener:
            return worker.service.run(listener) or int(worker.failed)
    except EmbeddingServerError as error:
        _tell(control, f"failed {json.dumps(str(error)[:_MESSAGE_CHARACTERS])}")
        return 1


class _Worker:
    def __init__(self, settings: Settings, control: socket.socket, *, again: bool) -> None:
        self.service = Service(
            settings,
            # Its siblings answer meanwhile; it could only refuse.
            load_first=again,
            on_start=self._start,
            on_loaded=lambda: _tell(control, "ready"),
        )
        self.failed = False
        """Whether a task that listens to the supervisor or watches the engines has failed."""
        self._control = control
        telemetry = self.service.app.state.telemetry
        telemetry.runs_in_worker(supervisor=os.getppid(), again=again)

    def _start(self) -> None:
        self._tasks = [
            asyncio.ensure_future(work) for work in (self._obey(), self._end_when_broken())
        ]
        for task in self._tasks:
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Nobody obeys or watches any more: the supervisor must start another worker."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self.failed = True
            logger.critical("a task of this worker failed: it drains and ends", exc_info=error)
            self.service.drain()

    async def _obey(self) -> None:
        reader, writer = await asyncio.open_connection(sock=self._control.dup())
        try:
            async for line in reader:
                command, _, argument = line.decode().strip().partition(" ")
                match command:
                    case "drain":
                        self.service.drain()
                    case "reload":
                        self.service.reload()
                    case "siblings":
                        self.service.app.state.condition.siblings = json.loads(argument)
        except ConnectionError:
            pass  # it was killed
        finally:
            writer.close()
            self.service.drain()

    async def _end_when_broken(self) -> None:
        """To be replaced: a probe would mostly reach a sibling, and find it alive."""
        registry = self.service.app.state.registry
        await registry.until_broken()
        logger.critical("a batch hangs or an engine has died: this worker drains and ends")
        self.service.drain()


def _tell(control: socket.socket, line: str) -> None:
    control.send(line.encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
