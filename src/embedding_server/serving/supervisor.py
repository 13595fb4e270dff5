# SPDX-License-Identifier: MIT OR Apache-2.0
"""``--workers``: several processes that accept from one socket; one that ends is replaced."""

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
from embedding_server.serving.signals import handle_signals
from embedding_server.settings import Settings

__all__ = ["Supervisor", "restart_wait"]

logger = logging.getLogger(__name__)

# A worker that was ready for so long is not in a crash loop.
_STEADY_SECONDS = 20.0

# The wait before a restart doubles with each end in a row, up to the longest. The exponent is
# bounded as a float overflows at some thousand doublings.
_FIRST_WAIT, _LONGEST_WAIT, _DOUBLINGS = 0.5, 30.0, 6

# So many ends in a row are a crash loop, which readiness reports.
_LOOP = 3

# After --drain-timeout, in which a worker cuts its requests and ends by itself.
_KILL_SECONDS = 5.0


@dataclass(slots=True)
class _Slot:
    """One of the workers: its process, and how those before it ended."""

    number: int
    ends: int = 0
    """Ends in a row, without a steady process between."""
    was_ready: bool = False
    """Whether any of its processes was ever ready."""
    process: Process | None = None
    last_process: int | None = None
    """The id of the process that ended last."""
    control: asyncio.StreamWriter | None = None
    steady: asyncio.TimerHandle | None = None

    def send(self, command: str) -> None:
        if self.control is not None and not self.control.is_closing():
            self.control.write(command.encode() + b"\n")

    def kill(self) -> None:
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()


class Supervisor:
    """Starts ``settings.workers`` processes, and replaces those that end.

    Raises ConfigurationError on Windows.
    """

    def __init__(self, settings: Settings, notifier: Notifier) -> None:
        if sys.platform == "win32":
            raise ConfigurationError("--workers is not available on Windows: leave it out.")
        self._settings = settings
        self._notifier = notifier
        self._slots = [_Slot(number) for number in range(1, settings.workers + 1)]
        self._draining = asyncio.Event()
        self._wake = asyncio.Event()  # ends the waits of all slots
        self._failure: str | None = None  # why no worker can serve

    def run(self, listener: socket.socket) -> int:
        """Keep the workers running until drained; the exit code.

        Raises ConfigurationError if no worker can serve.
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
        handle_signals(drain=self._draining.set, reload=self._reload, cut=self._cut)
        keepers = [asyncio.create_task(self._keep(slot, listener)) for slot in self._slots]
        self._notifier.watch(lambda: True)  # a worker that hangs is replaced from here
        await self._draining.wait()
        self._notifier.stopping()
        self._wake.set()
        listener.close()
        for slot in self._slots:
            slot.send("drain")
        _, late = await asyncio.wait(keepers, timeout=self._settings.drain_timeout + _KILL_SECONDS)
        if late:
            logger.error("%d workers did not end in time, and are killed", len(late))
            self._kill()
            await asyncio.wait(late)
        if self._failure is not None:
            raise ConfigurationError(self._failure)
        return 0

    async def _keep(self, slot: _Slot, listener: socket.socket) -> None:
        """Run a worker in ``slot`` again and again, whatever happens to it or its supervision."""
        while not self._draining.is_set():
            try:
                end = _describe(await self._run_once(slot, listener))
            except OSError as error:  # memory, processes or descriptors have run out
                end = f"no process ({error.strerror})"
            except Exception:
                logger.exception("supervising worker %d failed", slot.number)
                end = "an error of its supervisor"
            if self._draining.is_set():
                return
            if self._failure is not None:
                self._draining.set()  # a restart would fail, too
                return
            wait = restart_wait(slot.ends)
            logger.error(
                "worker %d ended with %s; it is started again in %g s", slot.number, end, wait
            )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), wait)

    async def _run_once(self, slot: _Slot, listener: socket.socket) -> int:
        """Run one process of ``slot`` from its start to its end; the exit code.

        The process does not outlive the call, whatever is raised.
        """
        try:
            process, messages = await self._start(slot, listener)
            with contextlib.suppress(ConnectionError):  # the process was killed
                async for line in messages:
                    self._receive(slot, process, line.decode().strip())
            try:
                async with asyncio.timeout(self._settings.drain_timeout + _KILL_SECONDS):
                    return await process.wait()
            except TimeoutError:
                logger.error("worker %d does not listen any more, and is killed", slot.number)
                slot.kill()
                return await process.wait()
        finally:
            await self._clear(slot)

    async def _start(
        self, slot: _Slot, listener: socket.socket
    ) -> tuple[Process, asyncio.StreamReader]:
        """Start a process in ``slot``; return it and the messages that it sends."""
        ours, theirs = socket.socketpair()
        with theirs, contextlib.ExitStack() as undo:
            undo.callback(ours.close)
            descriptors = (listener.fileno(), theirs.fileno())
            again = int(slot.last_process is not None)
            process = slot.process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "embedding_server.serving.worker"),
                *(str(number) for number in (*descriptors, again)),
                stdin=PIPE,
                pass_fds=descriptors,
                env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(self._metrics)},
            )
            undo.pop_all()
        messages, slot.control = await asyncio.open_connection(sock=ours)
        if slot.last_process is not None:
            _hand_on_counts(self._metrics, slot.last_process, process.pid)
        assert process.stdin is not None
        process.stdin.write(pickle.dumps(dict(self._settings)))
        process.stdin.close()
        self._report_siblings()
        if self._draining.is_set():  # since this start began
            slot.send("drain")
        return process, messages

    def _receive(self, slot: _Slot, process: Process, line: str) -> None:
        kind, _, message = line.partition(" ")
        if kind == "ready":
            slot.was_ready = True
            loop = asyncio.get_running_loop()
            slot.steady = loop.call_later(_STEADY_SECONDS, self._forgive, slot)
            logger.info("worker %d is ready (process %d)", slot.number, process.pid)
            self._report_siblings()
            if all(other.was_ready for other in self._slots):
                self._notifier.ready()
        elif kind == "failed":
            reason = json.loads(message)
            running = [other for other in self._slots if other.process and other is not slot]
            if running and any(other.was_ready for other in self._slots):
                logger.error("worker %d can't serve: %s", slot.number, reason)
            else:  # end, so that whatever restarts the server notices that no worker is left
                self._failure = reason

    async def _clear(self, slot: _Slot) -> None:
        """Note the end of the process in ``slot``; kill it if it runs."""
        slot.ends += 1
        if slot.process is not None:
            slot.kill()
            await slot.process.wait()
            slot.last_process, slot.process = slot.process.pid, None
        if slot.steady is not None:
            slot.steady.cancel()
        if slot.control is not None:
            slot.control.close()
        self._report_siblings()
        if slot.last_process is not None:
            with contextlib.suppress(OSError):  # gauges that stay are better than no restart
                _remove_live_gauges(self._metrics, slot.last_process)

    def _forgive(self, slot: _Slot) -> None:
        slot.ends = 0
        self._report_siblings()

    def _report_siblings(self) -> None:
        """Have each worker's readiness name those that were never ready or keep ending."""
        problems = []
        for slot in self._slots:
            name = f"worker {slot.number} of {len(self._slots)}"
            if slot.ends >= _LOOP:
                problems.append(f"{name} has ended {slot.ends} times in a row")
            elif not slot.was_ready:
                problems.append(f"{name} is starting")
        report = json.dumps("; ".join(problems))
        for slot in self._slots:
            slot.send(f"siblings {report}")

    def _reload(self) -> None:
        self._wake.set()  # a fault that kept a worker from starting may be repaired
        self._wake.clear()
        with self._notifier.reloading():  # until the commands are written
            for slot in self._slots:
                slot.send("reload")

    def _kill(self) -> None:
        for slot in self._slots:
            slot.kill()

    def _cut(self) -> None:
        self._kill()
        shutil.rmtree(self._metrics, ignore_errors=True)


def restart_wait(ends: int) -> float:
    """Seconds before a worker is started again that has ended ``ends`` times in a row."""
    return min(_FIRST_WAIT * 2.0 ** min(ends - 1, _DOUBLINGS), _LONGEST_WAIT)


def _remove_live_gauges(metrics: Path, process: int) -> None:
    """Remove the gauges of ``process``, which has ended: the requests it served are lost."""
    from prometheus_client.multiprocess import mark_process_dead  # needed only after an end

    mark_process_dead(process, str(metrics))  # type: ignore[no-untyped-call]


def _hand_on_counts(metrics: Path, ended: int, successor: int) -> None:
    """Let ``successor`` go on counting in the files of ``ended``, so that files don't pile up.

    ``tests/libraries/test_prometheus_client.py`` holds how the files are named.
    """
    for file in metrics.glob(f"*_{ended}.db"):
        file.rename(file.with_name(file.name.replace(f"_{ended}.db", f"_{successor}.db")))


def _describe(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:  # most real-time signals have no name
        return f"signal {-code}"
