# SPDX-License-Identifier: MIT OR Apache-2.0
"""A Ray cluster on this machine's loopback interface, in another process, and its processes.

Run as a program it starts one, with Ray Serve's proxy on the port of its argument, prints the
cluster's address and ends with its standard input.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_START_SECONDS = 60


@dataclass(frozen=True)
class Cluster:
    """A running cluster of two cores."""

    process: subprocess.Popen[str]
    env: dict[str, str]
    url: str
    folder: Path

    def replicas(self, deployment: str) -> list[int]:
        """The processes of ``application:deployment``'s replicas, as Ray names them."""
        name = f"ray::ServeReplica:{deployment}".encode()
        titles = {pid: _read(f"/proc/{pid}/cmdline") for pid in _descendants(self.process.pid)}
        # A method that runs stands behind a dot.
        return sorted(
            pid for pid, title in titles.items() if title.rstrip(b"\0 ").partition(b".")[0] == name
        )

    @contextmanager
    def running(self, command: list[str]) -> Iterator[Path]:
        """``command`` until the body ends; the file of its output."""
        log_file = self.folder / f"{secrets.token_hex(4)}.log"
        with log_file.open("wb") as log:
            process = subprocess.Popen(command, env=self.env, stdout=log, stderr=log)
        try:
            yield log_file
        finally:
            process.terminate()
            process.wait(30)


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """The cluster; nothing that it started outlives the body."""
    from live import environment, free_port  # not in the program's path

    port = free_port()
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: sockets' paths must be
    env = environment(
        {
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),  # or Ray leaves one in the home folder
            "RAY_DEDUP_LOGS": "0",
            "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
        }
    )
    process = subprocess.Popen(
        [sys.executable, __file__, str(port), str(folder)],
        env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        timer = threading.Timer(_START_SECONDS, process.kill)
        timer.start()
        address = process.stdout.readline().strip()
        timer.cancel()
        assert address, "the cluster did not start"
        url = f"http://127.0.0.1:{port}"
        yield Cluster(process, {**env, "RAY_ADDRESS": address}, url, folder)
    finally:
        started = _descendants(process.pid)
        process.stdin.close()
        try:
            process.wait(30)
            wait_until(lambda: not any(map(_lives, started)), "the cluster's end", 20)
        finally:
            for pid in (process.pid, *filter(_lives, started)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()
            shutil.rmtree(folder, ignore_errors=True)


def _descendants(pid: int) -> list[int]:
    children = [
        int(child)
        for task in Path(f"/proc/{pid}/task").glob("*")
        for child in _read(f"{task}/children").split()
    ]
    return [*children, *(below for child in children for below in _descendants(child))]


def _lives(pid: int) -> bool:
    """Whether it runs, and isn't a zombie."""
    return _read(f"/proc/{pid}/stat").rpartition(b") ")[2][:1] not in (b"", b"Z", b"X")


def _read(file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError:  # it has ended
        return b""


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
    """Raise unless ``condition`` comes true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.1)


def _main(port: int, folder: str) -> None:
    import ray
    from ray import serve

    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=128 * 2**20,
        logging_level="warning",
        log_to_driver=False,
        _temp_dir=folder,
        _node_ip_address="127.0.0.1",
    )
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    print(ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.read()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    _main(int(sys.argv[1]), sys.argv[2])
