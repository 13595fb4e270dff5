# SPDX-License-Identifier: MIT OR Apache-2.0
"""``--workers``: several processes behind one port; one that ends is replaced."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import pickle
import shutil
import signal
import socket
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from dataclasses import dataclass
from pathlib import Path

from embedding_server.errors import ConfigurationError
from embedding_server.serving.notify import Notifier
from embedding_server.serving.signals import mind_signals
from embedding_server.settings import Settings

__all__ = ["Supervisor", "restart_wait"]

logger = logging.getLogger(__name__)

# A worker that has been ready for so long doesn't keep ending.
_STEADY_SECONDS = 20.0

# Waits before a worker that keeps ending is started again: doubled each time, and past so many
# doublings over the longest. A float ends at some thousand of them.
_FIRST_WAIT, _LONGEST_WAIT, _DOUBLINGS = 0.5, 30.0, 6

# So many ends in a row are a crash loop: readiness says so.
_LOOP = 3

# Over --drain-timeout, in which a worker cuts what is under way and ends by itself.
_KILL_SECONDS = 5.0


@dataclass(slots=True)
class _Worker:
    number: int
    starts: int = 0
    """Until now."""
    ends: int = 0
    """In a row, none of which came late."""
    was_ready: bool = False
    """Ever."""
    process: Process | None = None
    control: asyncio.StreamWriter | None = None
    steady: asyncio.TimerHandle | None = None

    def command(self, line: str) -> None:
        if self.control is not None and not self.control.is_closing():
            self.control.write(line.encode() + b"\n")


class Supervisor:
    """Starts ``settings.workers`` processes that accept from one socket, and minds them.

    Raises ConfigurationError on Windows.
    """

    def __init__(self, settings: Settings, notifier: Notifier) -> None:
        if sys.platform == "win32":
            raise ConfigurationError("--workers can't be had on Windows: leave it out.")
        self._settings = settings
        self._notifier = notifier
        self._workers = [_Worker(number) for number in range(1, settings.workers + 1)]
        self._draining = asyncio.Event()
        self._wake = asyncio.Event()  # ends the waits of all
        self._failure: str | None = None  # why none can serve

    def run(self, listener: socket.socket) -> int:
        """Keep the workers running until told to stop; the exit code.

        Raises ConfigurationError if they can't be started at all.
        """
        try:
            metrics = tempfile.TemporaryDirectory(prefix="embedding-server-")
        except OSError as error:
            raise ConfigurationError(
                f"--workers needs a folder for metrics, and none can be made: {error.strerror}. "
                "Set TMPDIR to one that can be written to."
            ) from None
        with metrics as folder:
            self._metrics = Path(folder)
            return asyncio.run(self._run(listener))

    async def _run(self, listener: socket.socket) -> int:
        mind_signals(drain=self._draining.set, cut=self._cut, reload=self._reload)
        keepers = [asyncio.create_task(self._keep(worker, listener)) for worker in self._workers]
        self._notifier.watch(lambda: True)  # a worker that hangs is replaced from here
        await self._draining.wait()
        self._notifier.stopping()
        self._wake.set()
        listener.close()
        for worker in self._workers:
            worker.command("drain")
        _, late = await asyncio.wait(keepers, timeout=self._settings.drain_timeout + _KILL_SECONDS)
        if late:
            logger.error("%d workers did not end in time, and are killed", len(late))
            self._kill()
            await asyncio.wait(late)
        if self._failure is not None:
            raise ConfigurationError(self._failure)
        return 0

    async def _keep(self, worker: _Worker, listener: socket.socket) -> None:
        """Run ``worker``, again and again, whatever happens to it or to its supervision."""
        while not self._draining.is_set():
            try:
                end = _describe(await self._run_once(worker, listener))
            except OSError as error:  # no memory, process or descriptor is available now
                end = f"no process ({error.strerror})"
            except Exception:
                logger.exception("supervising worker %d failed", worker.number)
                end = "an error of its supervisor"
            if self._draining.is_set():
                return
            if self._failure is not None:
                self._draining.set()  # nothing would be better the next time
                return
            wait = restart_wait(worker.ends)
            logger.error(
                "worker %d ended with %s; it is started again in %g s",
                *(worker.number, end, wait),
            )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), wait)

    async def _run_once(self, worker: _Worker, listener: socket.socket) -> int:
        """Run ``worker`` from its start to its end; its exit code.

        Its process does not outlive the call, whatever is raised.
        """
        try:
            reader = await self._start(worker, listener)
            assert worker.process is not None
            with contextlib.suppress(ConnectionError):  # it was killed
                async for line in reader:
                    self._hear(worker, line.decode().strip())
            limit = self._settings.drain_timeout + _KILL_SECONDS
            try:
                return await asyncio.wait_for(worker.process.wait(), limit)
            except TimeoutError:
                logger.error("worker %d does not listen any more, and is killed", worker.number)
                worker.process.kill()
                return await worker.process.wait()
        finally:
            worker.ends += 1
            process, worker.process = worker.process, None
            if process is not None and process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
            if worker.steady is not None:
                worker.steady.cancel()
            if worker.control is not None:
                worker.control.close()
            _forget_gauges(worker, self._metrics)
            self._tell_siblings()

    async def _start(self, worker: _Worker, listener: socket.socket) -> asyncio.StreamReader:
        """Start the process of ``worker``; what it writes."""
        ours, theirs = socket.socketpair()
        with theirs, contextlib.ExitStack() as undo:
            undo.callback(ours.close)
            descriptors = (listener.fileno(), theirs.fileno())
            worker.process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "embedding_server.serving.worker"),
                *(str(number) for number in (worker.number, worker.starts, *descriptors)),
                stdin=PIPE,
                pass_fds=descriptors,
                env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(self._metrics)},
            )
            undo.pop_all()
        worker.starts += 1
        reader, worker.control = await asyncio.open_connection(sock=ours)
        assert worker.process.stdin is not None
        worker.process.stdin.write(pickle.dumps(dict(self._settings)))
        worker.process.stdin.close()
        self._tell_siblings()
        if self._draining.is_set():  # since it was begun
            worker.command("drain")
        return reader

    def _hear(self, worker: _Worker, line: str) -> None:
        what, _, message = line.partition(" ")
        if what == "ready":
            worker.was_ready = True
            assert worker.process is not None
            loop = asyncio.get_running_loop()
            worker.steady = loop.call_later(_STEADY_SECONDS, self._steady, worker)
            logger.info("worker %d is ready (process %d)", worker.number, worker.process.pid)
            self._tell_siblings()
            if all(other.was_ready for other in self._workers):
                self._notifier.ready()
        elif what == "failed":
            reason = json.loads(message)
            running = [other for other in self._workers if other.process and other is not worker]
            if running and any(other.was_ready for other in self._workers):
                logger.error("worker %d can't serve: %s", worker.number, reason)
            else:  # who restarts the server must know that nobody answers any more
                self._failure = reason

    def _steady(self, worker: _Worker) -> None:
        worker.ends = 0
        self._tell_siblings()

    def _cut(self) -> None:
        self._kill()
        shutil.rmtree(self._metrics, ignore_errors=True)

    def _reload(self) -> None:
        self._wake.set()  # what kept a worker from starting may be mended
        self._wake.clear()
        with self._notifier.reloading():  # until they are told
            for worker in self._workers:
                worker.command("reload")

    def _kill(self) -> None:
        for worker in self._workers:
            if worker.process is not None:
                with contextlib.suppress(ProcessLookupError):
                    worker.process.kill()

    def _tell_siblings(self) -> None:
        """Let every worker's readiness say which of them was never ready, or keeps ending."""
        problems = []
        for worker in self._workers:
            name = f"worker {worker.number} of {len(self._workers)}"
            if worker.ends >= _LOOP:
                problems.append(f"{name} has ended {worker.ends} times in a row")
            elif not worker.was_ready:
                problems.append(f"{name} is starting")
        told = "; ".join(problems)
        for worker in self._workers:
            worker.command(f"siblings {json.dumps(told)}")


def _forget_gauges(worker: _Worker, metrics: Path) -> None:
    """What it had in hand is gone; what it has counted stays, and its successor goes on."""
    for file in metrics.glob(f"gauge_live*_{worker.number}.db"):
        file.unlink(missing_ok=True)


def restart_wait(ends: int) -> float:
    """Seconds before a worker is started again that has ended ``ends`` times in a row."""
    return min(_FIRST_WAIT * 2.0 ** min(ends - 1, _DOUBLINGS), _LONGEST_WAIT)


def _describe(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:  # most real-time signals have no name
        return f"signal {-code}"
