# SPDX-License-Identifier: MIT OR Apache-2.0
"""Several processes behind one port, and their supervisor."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from ending_server import PROGRAM as ENDING
from faulty_workers import NONSENSE, PROGRAM
from in_process import until
from live import (
    LiveServer,
    environment,
    run_cli,
    running_server,
    signalled_again,
    under_way,
    workers_of,
)

from embedding_server.serving.supervisor import restart_wait
from embedding_server.settings import Settings

MODEL = "all-MiniLM-L6-v2"


def embedded(text: str) -> int:
    """How many requests for embeddings /metrics has counted."""
    return sum(
        int(float(line.rpartition(" ")[2]))
        for line in text.splitlines()
        if line.startswith("embedding_server_requests_total{")
        and 'route="/v1/embeddings"' in line
        and 'status="200"' in line
    )


def value_of(name: str, server: LiveServer) -> float:
    """Of a metric without labels."""
    text = httpx.get(f"{server.url}/metrics").text
    return float(text.partition(f"\n{name} ")[2].split()[0])


def test_workers() -> None:
    """They share the port and add up their metrics; a killed one is replaced meanwhile."""
    body = {"model": MODEL, "input": "iPhone"}
    answered = 0
    with running_server("--model", MODEL, "--workers", "2") as server:
        until(lambda: server.log.count("is ready (process") == 2)
        first, second = workers_of(server)

        def embed() -> None:
            nonlocal answered
            assert httpx.post(f"{server.url}/v1/embeddings", json=body).status_code == 200
            answered += 1

        while not (used(server, 1) and used(server, 2)):
            embed()
        assert embedded(httpx.get(f"{server.url}/metrics").text) == answered
        used_before = value_of("process_cpu_seconds_total", server)
        os.kill(first, signal.SIGKILL)
        until(lambda: "worker 1 ended with SIGKILL" in server.log)
        for _ in range(5):
            embed()
        until(lambda: server.log.count("is ready (process") == 3)
        assert second in workers_of(server)
        text = httpx.get(f"{server.url}/metrics").text
        assert embedded(text) == answered
        assert 'queue_requests{model="all-MiniLM-L6-v2"} 0.0' in text
        assert "embedding_server_requests_in_flight 1.0" in text
        assert "embedding_server_worker_restarts_total 1.0" in text
        assert 'embedding_server_queue_requests_limit{model="all-MiniLM-L6-v2"} 1024.0' in text
        assert value_of("process_cpu_seconds_total", server) > used_before
        workers = workers_of(server)
        resident = sum(
            int(Path(f"/proc/{pid}/status").read_text().partition("VmRSS:")[2].split()[0]) * 1024
            for pid in (server.process.pid, *workers)
        )
        reported = value_of("process_resident_memory_bytes", server)
        assert reported == pytest.approx(resident, rel=0.2)
        # A limit is each process' own: that of the fullest shows whether there are too few.
        most = max(len(os.listdir(f"/proc/{pid}/fd")) for pid in (server.process.pid, *workers))
        assert abs(value_of("process_open_fds", server) - most) <= 2
        (soft, _) = resource.prlimit(workers[0], resource.RLIMIT_NOFILE)
        assert value_of("process_max_fds", server) == soft
        with under_way(server) as answer:
            server.process.send_signal(signal.SIGTERM)
            assert answer.result().status_code == 200
        assert server.process.wait(20) == 0
        assert "Traceback" not in server.log
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


@pytest.mark.parametrize("kind", ["uvicorn", "hypercorn"])
def test_no_request_reaches_a_worker_that_is_loading(kind: str) -> None:
    """Neither when the server says that it is ready, nor when one is replaced."""
    arguments = ("--model", MODEL, "--workers", "2", "--server", kind)
    with running_server(*arguments) as server, ThreadPoolExecutor(4) as pool:

        def embed(_: int) -> int | None:
            body = {"model": MODEL, "input": "iPhone"}
            try:
                return httpx.post(f"{server.url}/v1/embeddings", json=body).status_code
            except httpx.TransportError:
                return None  # it was the killed one that had accepted this

        assert server.log.count("is ready (process") == 2
        assert set(pool.map(embed, range(50))) == {200}
        os.kill(workers_of(server)[0], signal.SIGKILL)
        while server.log.count("is ready (process") < 3:
            assert set(pool.map(embed, range(20))) <= {200, None}
        assert set(pool.map(embed, range(50))) == {200}


def used(server: LiveServer, worker: int) -> bool:
    """Whether ``worker`` has answered a request: it then has metrics of its own."""
    process = workers_of(server)[worker - 1]
    environ = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    (folder,) = (
        line.partition(b"=")[2].decode()
        for line in environ
        if line.startswith(b"PROMETHEUS_MULTIPROC_DIR=")
    )
    file = Path(folder) / f"counter_{process}.db"
    return file.exists() and b"/v1/embeddings" in file.read_bytes()


def test_a_crash_loop_is_seen_in_readiness() -> None:
    with running_server("--model", MODEL, "--workers", "2") as server:
        until(lambda: server.log.count("is ready (process") == 2)
        _, kept = workers_of(server)
        for count in range(1, 4):
            until(lambda: len(workers_of(server)) == 2)
            (victim,) = set(workers_of(server)) - {kept}
            os.kill(victim, signal.SIGKILL)
            until(lambda count=count: server.log.count("ended with SIGKILL") == count)  # type: ignore[misc]
        waits = [
            line.rpartition("again in ")[2] for line in server.log.splitlines() if "SIGKILL" in line
        ]
        assert waits == ["0.5 s", "1 s", "2 s"]

        def reported() -> bool:
            response = httpx.get(f"{server.url}/health/ready")
            return response.status_code == 503 and "3 times in a row" in response.text

        until(reported)
        body = {"model": MODEL, "input": "iPhone"}
        assert httpx.post(f"{server.url}/v1/embeddings", json=body).status_code == 200
        until(lambda: httpx.get(f"{server.url}/health/ready").status_code == 200)
        assert server.stop() == 0


def test_workers_that_can_not_start(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    done = run_cli("serve", "--port", "0", "--workers", "2", "--model", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.count(b"embedding-server: ") == 1
    assert b"Traceback" not in done.stderr


def test_workers_do_not_outlive_their_supervisor() -> None:
    with running_server("--model", MODEL, "--workers", "2") as server:
        until(lambda: server.log.count("is ready (process") == 2)
        workers = workers_of(server)
        server.process.kill()
        server.process.wait()
        until(lambda: not any(_running(pid) for pid in workers))


def _running(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_a_second_signal_ends_workers_now() -> None:
    with running_server("--model", MODEL, "--workers", "2") as server:
        until(lambda: server.log.count("is ready (process") == 2)
        workers = workers_of(server)
        with under_way(server) as answer:
            server.process.send_signal(signal.SIGTERM)
            until(lambda: "draining" in server.log)
            until(lambda: signalled_again(server, signal.SIGTERM))
            assert server.process.wait(20) == 128 + signal.SIGTERM
            until(lambda: not any(_running(pid) for pid in workers))
            with pytest.raises(httpx.TransportError):
                answer.result()


def test_workers_that_are_being_started_drain_too() -> None:
    for _ in range(3):
        with running_server("--model", MODEL, "--workers", "6", wait=False) as server:
            until(lambda: bool(workers_of(server)))
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(30) == 0
            assert "are killed" not in server.log
            assert "Traceback" not in server.log


def test_a_worker_that_can_not_be_started_is_tried_again() -> None:
    """With no file descriptor left for it."""
    with running_server("--model", MODEL, "--workers", "2") as server:
        until(lambda: server.log.count("is ready (process") == 2)
        pid = server.process.pid
        limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, limits[1]))
        os.kill(workers_of(server)[0], signal.SIGKILL)
        until(lambda: server.log.count("ended with no process") == 2)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
        until(lambda: server.log.count("is ready (process") == 3)
        assert server.stop() == 0


@pytest.mark.parametrize(
    ("ends", "seconds"),
    [(1, 0.5), (2, 1), (6, 16), (7, 30), (10, 30), (1024, 30), (1025, 30), (10**6, 30)],
)
def test_waits_before_a_worker_is_started_again(ends: int, seconds: float) -> None:
    assert restart_wait(ends) == seconds


def test_a_signal_without_a_name() -> None:
    with running_server("--model", MODEL, "--workers", "2") as server:
        until(lambda: server.log.count("is ready (process") == 2)
        os.kill(workers_of(server)[0], signal.SIGRTMIN + 1)
        until(lambda: f"ended with signal {signal.SIGRTMIN + 1}" in server.log)
        until(lambda: server.log.count("is ready (process") == 3)
        assert "Traceback" not in server.log


def test_an_error_of_the_supervisor_ends_no_supervision(tiny_model: Path, tmp_path: Path) -> None:
    """The log has it, and the worker is started again, with none left behind."""
    nonsense = tmp_path / "nonsense"
    flags = ("--model", str(tiny_model), "--workers", "2")
    with running_server(*flags, program=PROGRAM, env={NONSENSE: str(nonsense)}) as server:
        until(lambda: server.log.count("is ready (process") == 2)
        nonsense.touch()
        os.kill(workers_of(server)[0], signal.SIGKILL)
        until(lambda: server.log.count("ended with an error of its supervisor") == 2)
        assert len(workers_of(server)) == 1
        assert "JSONDecodeError" in server.log
        nonsense.unlink()
        until(lambda: server.log.count("is ready (process") == 3)
        waits = [
            line.rpartition("again in ")[2]
            for line in server.log.splitlines()
            if "worker 1 ended" in line
        ]
        assert waits == ["0.5 s", "1 s", "2 s"]
        assert server.stop() == 0


def test_a_worker_whose_engine_dies_is_replaced(tiny_model: Path) -> None:
    """Probes would mostly reach its sibling."""
    with running_server("--model", str(tiny_model), "--workers", "2", program=PROGRAM) as server:
        until(lambda: server.log.count("is ready (process") == 2)
        body = {"model": "tiny", "input": "iPhone"}
        assert httpx.post(f"{server.url}/v1/embeddings", json=body).status_code == 503
        until(lambda: server.log.count("is ready (process") == 3)
        assert "the batch loop of tiny died" in server.log
        assert "an engine has died: this worker drains and ends" in server.log


def test_a_worker_that_fails_at_its_supervisors_words(tmp_path: Path) -> None:
    """It ends, and says why, so that another one is started."""
    ours, theirs = socket.socketpair()
    with ours, theirs, socket.create_server(("127.0.0.1", 0)) as listener:
        descriptors = (listener.fileno(), theirs.fileno())
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "embedding_server.serving.worker",
                *map(str, descriptors),
                "0",
            ],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=descriptors,
            env=environment({"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}),
        )
        assert process.stdin is not None
        process.stdin.write(pickle.dumps(dict(Settings(model=(MODEL,)))))
        process.stdin.close()
        assert ours.recv(100) == b"ready\n"
        ours.sendall(b"siblings {nonsense\n")
        assert process.stderr is not None
        with process.stderr as stream:
            log = stream.read()
        assert process.wait(30) == 1
    assert b"a task of this worker failed" in log
    assert b"JSONDecodeError" in log


def test_a_worker_with_much_to_tell(tiny_model: Path, tmp_path: Path) -> None:
    """What a file holds may be in its message; a line of any length would end the reading."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "config_sentence_transformers.json").write_text(json.dumps({"x" * 10**6: True}))
    done = run_cli("serve", "--port", "0", "--workers", "2", "--model", str(model))
    assert done.returncode == 1
    assert b"embedding-server: " in done.stderr
    assert b"xxx" in done.stderr
    assert b"Traceback" not in done.stderr


def test_a_server_that_ends_by_itself() -> None:
    """Who restarts it must know."""
    with running_server("--model", MODEL, program=ENDING, wait=False) as server:
        assert server.process.wait(30) == 1
        assert "the server has ended by itself" in server.log


def test_a_failure_that_is_over_is_forgotten(tiny_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    with running_server("--model", str(model), "--workers", "2") as server:
        until(lambda: server.log.count("is ready (process") == 2)
        model.rename(tmp_path / "away")
        os.kill(workers_of(server)[0], signal.SIGKILL)
        until(lambda: "ended with exit code 1" in server.log)
        (tmp_path / "away").rename(model)
        until(lambda: server.log.count("is ready (process") == 3)
        assert server.stop() == 0


def test_workers_of_a_supervisor_that_hears_nothing_any_more() -> None:
    """It is stopped, and killed with their words unread."""
    with running_server("--model", MODEL, "--workers", "2", wait=False) as server:
        # Before that a worker has no settings, and connections wait for one that has.
        assert httpx.get(f"{server.url}/health/live", timeout=60).status_code == 200
        workers = workers_of(server)
        server.process.send_signal(signal.SIGSTOP)
        until(lambda: server.log.count(f"{MODEL} is ready: ") == 2)
        server.process.kill()
        server.process.wait()
        until(lambda: not any(_running(pid) for pid in workers))


def test_nothing_is_left_of_the_folder_of_metrics(tmp_path: Path) -> None:
    with running_server(
        "--model", MODEL, "--workers", "2", env={"TMPDIR": str(tmp_path)}
    ) as server:
        assert list(tmp_path.iterdir())
        with under_way(server):
            server.process.send_signal(signal.SIGTERM)
            until(lambda: "draining" in server.log)
            until(lambda: signalled_again(server, signal.SIGTERM))
    assert not list(tmp_path.iterdir())


def test_a_folder_of_metrics_that_is_somebody_elses(tmp_path: Path) -> None:
    folder = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "missing")}
    with running_server("--model", MODEL, env=folder) as server:
        assert "embedding_server_model_info" in httpx.get(f"{server.url}/metrics").text


def test_workers_that_can_not_be_replaced(tmp_path: Path) -> None:
    """The log says why; without any left the server ends, so that its service manager notices."""
    keys = tmp_path / "keys"
    keys.write_text("first\n")
    keys.chmod(0o600)
    arguments = ("--model", MODEL, "--workers", "2", "--api-key-file", str(keys))
    with running_server(*arguments) as server:
        until(lambda: server.log.count("is ready (process") == 2)
        keys.rename(tmp_path / "away")
        first, second = workers_of(server)
        os.kill(first, signal.SIGKILL)
        until(lambda: f"worker 1 can't serve: --api-key-file {keys} can't be read" in server.log)
        os.kill(second, signal.SIGKILL)
        assert server.process.wait(30) == 1
        assert server.log.rstrip().splitlines()[-1].startswith("embedding-server: --api-key-file")


SCRAPES = """
import os, sys, threading
from pathlib import Path
from embedding_server.telemetry import Telemetry

telemetry = Telemetry()
telemetry.error_answered("none")
folder = Path(os.environ["PROMETHEUS_MULTIPROC_DIR"])
(file,) = folder.glob("counter_*.db")
ended = threading.Event()

def hand_on():
    number = 0
    while not ended.wait(0.001):
        number += 1
        (old,) = folder.glob("counter_*.db")
        old.rename(folder / f"counter_{number}.db")

thread = threading.Thread(target=hand_on)
thread.start()
try:
    for _ in range(500):
        text, _ = telemetry.exposition()
        assert b"embedding_server_errors_total" in text
finally:
    ended.set()
    thread.join()
"""


def test_metrics_are_read_while_a_successor_takes_over_the_files(tmp_path: Path) -> None:
    env = environment({"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)})
    subprocess.run([sys.executable, "-c", SCRAPES], env=env, check=True, timeout=120)
