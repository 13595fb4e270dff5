# SPDX-License-Identifier: MIT OR Apache-2.0
"""The image: built, run and stopped for real, with the README's commands.

buildah builds in docker's place, podman runs. Both work on a machine of their own: namespaces for
mounts, processes and the network, so that mounts, bridges and port 5000 are nobody else's,
containers reach nothing, and all of it ends with the test.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import json
import os
import pty
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hub_standin import HubStandIn
from in_process import until
from live import LiveServer, environment, run_cli, under_way
from numpy.typing import NDArray
from readme import ROOT, commands, section

pytestmark = pytest.mark.packaging

TOOLS = ("mmdebstrap", "buildah", "podman", "crun", "unshare", "nsenter", "iptables", "ip")
MODEL = "all-MiniLM-L6-v2"
URL = "http://127.0.0.1:5000"
BUILD, SERVE, BUILD_BARE, SERVE_MOUNTED = commands(section("### A container"))
BASE = "localhost/base"
# Where Debian in a container, Ubuntu, and Debian as it is installed have their sources.
SOURCES = ("sources.list.d/debian.sources", "sources.list.d/ubuntu.sources", "sources.list")
TOKEN = "hf_a-token-that-must-not-stay"
SECONDS = 60.0

CLONE_NEWNET = 0x40000000

# What the tools write to /run and /var goes to memory. crun wants one kind of control groups, not
# the two of a hybrid system; containers here are in none.
SET_UP = """
ip link set lo up
mount -t tmpfs tmpfs "$1"
for place in run var; do
    mkdir -p "$1/$place/upper" "$1/$place/work"
    mount -t overlay overlay \
        -o "lowerdir=/$place,upperdir=$1/$place/upper,workdir=$1/$place/work" "/$place"
done
if mountpoint -q /sys/fs/cgroup/unified; then umount /sys/fs/cgroup/unified; fi
echo $$ is ready
# This is init: it reaps what loses its parent, and its end is that of all processes here.
sleep infinity &
wait
"""

# Limits that podman would raise otherwise, which not every root may.
CONTAINERS_CONF = """
[containers]
cgroups = "disabled"
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "none"
runtime = "crun"
tmp_dir = "{folder}/podman"
"""

STORAGE_CONF = """
[storage]
driver = "{driver}"
graphroot = "{folder}/storage"
runroot = "{folder}/storage-run"
"""

DOCKER = """#!/bin/sh
enter="nsenter --target {pid} --mount --pid --wd=$PWD"
if [ "$1" = build ]; then
    shift
    exec $enter buildah build --layers --isolation chroot --format docker --network host \
        --build-arg BASE={base} {volumes} "$@"
fi
exec $enter --net podman "$@"
"""


@dataclass(frozen=True)
class Machine:
    """Where the containers are, and a checkout with a folder of models."""

    folder: Path
    init: int
    env: dict[str, str]

    @property
    def checkout(self) -> Path:
        return self.folder / "checkout"

    def sh(self, command: str, *, check: bool = True) -> str:
        """What ``command`` prints, run in the checkout; ``docker`` in it is on this machine."""
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.checkout,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0 or not check, f"{command}: {done.stdout}\n{done.stderr}"
        return done.stdout if check else f"{done.returncode}\n{done.stdout}{done.stderr}"

    def inside(self, command: str) -> str:
        """``command`` with this machine's mounts."""
        return self.sh(f"nsenter --target {self.init} --mount --pid {command}")


def volumes_for_pip(folder: Path) -> str:
    """What lets pip in a build reach the index as it does here; no image keeps any of it."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    )
    wanted = {"cert", "proxy", "index-url", "extra-index-url", "find-links", "trusted-host"}
    options = {}
    for line in listed.stdout.splitlines():
        key, _, value = line.partition("=")
        name = key.rpartition(".")[2]
        if name in wanted:
            options[name] = str(ast.literal_eval(value))
    lines = (f"{name} = {' '.join(value.split())}\n" for name, value in options.items())
    (folder / "pip.conf").write_text("[global]\n" + "".join(lines))
    volumes = [f"-v {folder}/pip.conf:/etc/pip.conf:ro"]
    for word in " ".join(options.values()).split():
        # The pages of an index link to what lies beside them.
        path = Path(word.removeprefix("file://"))
        path = path.parent if word.startswith("file://") else path
        if path.is_absolute() and path.exists():
            volumes.append(f"-v {path}:{path}:ro")
    return " ".join(volumes)


def overlay_works(folder: Path) -> bool:
    for name in ("lower", "upper", "work"):
        (folder / "try" / name).mkdir(parents=True)
    options = "lowerdir=lower,upperdir=upper,workdir=work"
    command = ["unshare", "--mount", "mount", "-t", "overlay", "o", "-o", options, "lower"]
    return subprocess.run(command, cwd=folder / "try", capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(
            f"needs root and, to be installed as scripts/check-packaging does, {missing or TOOLS}"
        )
    folder = tmp_path_factory.mktemp("container")
    for name in ("scratch", "bin", "tmp", "checkout"):
        (folder / name).mkdir()
    # A file system of whole copies where there can be no layered one.
    driver = "overlay" if overlay_works(folder) else "vfs"
    (folder / "containers.conf").write_text(CONTAINERS_CONF.format(folder=folder))
    (folder / "storage.conf").write_text(STORAGE_CONF.format(folder=folder, driver=driver))
    settings = {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "TMPDIR": str(folder / "tmp"),
        "CONTAINERS_CONF": str(folder / "containers.conf"),
        "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
    }
    unshare = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    with subprocess.Popen(
        [*unshare, "sh", "-ec", SET_UP, "set-up", str(folder / "scratch")],
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "1 is ready\n"
            children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children")
            init = int(children.read_text(encoding="ascii"))
            docker = folder / "bin" / "docker"
            docker.write_text(DOCKER.format(pid=init, base=BASE, volumes=volumes_for_pip(folder)))
            docker.chmod(0o755)
            yield Machine(folder, init, {**environment(), **settings})
        finally:
            holder.kill()  # and with it init, and with that all processes and mounts
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def images(machine: Machine) -> dict[str, float]:
    """Base and images are built; the seconds that each took."""
    seconds, start = {}, time.monotonic()

    def took(name: str) -> None:
        nonlocal start
        seconds[name], start = time.monotonic() - start, time.monotonic()

    for name in ("Dockerfile", ".dockerignore", "pyproject.toml", "constraints.txt", "README.md"):
        shutil.copy(ROOT / name, machine.checkout)
    for licence in ROOT.glob("LICENSE-*"):
        shutil.copy(licence, machine.checkout)
    shutil.copytree(
        ROOT / "src", machine.checkout / "src", ignore=shutil.ignore_patterns("__pycache__")
    )
    (machine.checkout / "keys").write_text(TOKEN)
    pulled = run_cli("models", "pull", MODEL, "--to", str(machine.checkout / "models"))
    assert pulled.returncode == 0, pulled.stderr
    sources = next(filter(Path.is_file, map(Path("/etc/apt").joinpath, SOURCES)))
    # In memory, where what dpkg syncs costs nothing.
    scratch = machine.folder / "scratch"
    machine.inside(
        "sh -ec 'release=$(. /etc/os-release; echo $VERSION_CODENAME); "
        f"TMPDIR={scratch} mmdebstrap --quiet --variant=essential "
        "--include=python3,python3-venv,libstdc++6,ca-certificates "
        "--dpkgopt=path-exclude=/usr/share/doc/* --dpkgopt=path-exclude=/usr/share/locale/* "
        f"$release {scratch}/base.tar {sources}; "
        "it=$(buildah from scratch); "
        f"buildah add --quiet $it {scratch}/base.tar /; "
        f"buildah commit --quiet --rm $it {BASE}; rm {scratch}/base.tar'"
    )
    took("base")
    for name, command in (("image", BUILD), ("bare image", BUILD_BARE)):
        machine.sh(command)
        took(name)
    return seconds


def inspect(machine: Machine, image: str) -> dict[str, Any]:
    (found,) = json.loads(machine.sh(f"docker image inspect {image}"))
    assert isinstance(found, dict)
    return found


@pytest.fixture
def its_network(machine: Machine, images: dict[str, float]) -> Iterator[None]:
    """This process and what it starts have the machine's network, and no other."""
    setns = ctypes.CDLL(None, use_errno=True).setns
    with (
        Path("/proc/self/ns/net").open("rb") as own,
        Path(f"/proc/{machine.init}/ns/net").open("rb") as its,
    ):
        assert setns(its.fileno(), CLONE_NEWNET) == 0
        try:
            yield
        finally:
            assert setns(own.fileno(), CLONE_NEWNET) == 0


@dataclass(frozen=True)
class Container:
    """A container that runs at a terminal, and the client that runs it."""

    machine: Machine
    name: str
    server: LiveServer
    seconds: float

    def run(self, command: str) -> str:
        """What ``command`` prints in the container, as its user."""
        return self.machine.sh(f"docker exec {self.name} {command}")

    def fails(self, command: str) -> str:
        told = self.machine.sh(f"docker exec {self.name} {command}", check=False)
        assert not told.startswith("0\n"), told
        return told


@contextlib.contextmanager
def running(machine: Machine, command: str) -> Iterator[Container]:
    """``command``, a ``docker run`` of the README's, typed at a terminal; ready in the body."""
    terminal, end = pty.openpty()
    log = machine.folder / "terminal.log"
    start = time.monotonic()
    process = subprocess.Popen(
        ["bash", "-c", f"exec {command}"],
        cwd=machine.checkout,
        env=machine.env,
        stdin=end,
        stdout=end,
        stderr=end,
        start_new_session=True,
    )
    os.close(end)
    reader = threading.Thread(target=_copy, args=(terminal, log))
    reader.start()
    try:
        until(_is_ready(process))
        seconds = time.monotonic() - start
        (name,) = machine.sh("docker ps --quiet").split()
        yield Container(machine, name, LiveServer(URL, process, log), seconds)
    finally:
        if process.poll() is None:
            machine.sh("docker rm --all --force --time 0", check=False)
            process.kill()
        process.wait()
        reader.join()
        os.close(terminal)


def _copy(terminal: int, log: Path) -> None:
    """What is written to the terminal, to a file; to its end, so that no writer waits."""
    with log.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while said := os.read(terminal, 65_536):
            file.write(said)


def _is_ready(process: subprocess.Popen[bytes]) -> Callable[[], bool]:
    def ready() -> bool:
        assert process.poll() is None, "it ended"
        try:
            return httpx.get(f"{URL}/health/ready").status_code == 200
        except httpx.TransportError:
            return False

    return ready


def embed(texts: list[str]) -> NDArray[np.float32]:
    answer = httpx.post(f"{URL}/v1/embeddings", json={"model": MODEL, "input": texts}, timeout=60)
    assert answer.status_code == 200, answer.text
    return np.array([row["embedding"] for row in answer.json()["data"]], dtype=np.float32)


def test_it_serves_without_a_network_and_a_stop_loses_no_answer(
    machine: Machine,
    images: dict[str, float],
    its_network: None,
    golden: tuple[list[str], NDArray[np.float32]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    texts, expected = golden
    with running(machine, SERVE) as container:
        assert np.abs(embed(texts) - expected).max() < 1e-5
        served = httpx.get(f"{URL}/v1/models").json()["data"]
        assert served == [MODEL]
        # PID 1, as nobody that has a name, and with nothing to compile.
        assert container.run("cat /proc/1/cmdline").split("\0")[1:3] == [
            "/opt/venv/bin/embedding-server",
            "serve",
        ]
        assert container.run("id -u").strip() == "65532"
        assert "No module named 'torch'" in container.fails("python -c 'import torch'")
        assert "Permission denied" in container.fails("touch /opt/venv/x /models/x")
        imported = "import sys, fastapi, embedding_server.serving.service as s; print(s.__cached__)"
        cached = container.run(f"python -c '{imported}'").strip()
        verbose = container.run(f"sh -c \"python -v -c '{imported}' 2>&1\"")
        assert f"{cached} matches" in verbose
        container.run("embedding-server health")
        machine.sh(f"docker healthcheck run {container.name}")
        unreachable = "import socket; socket.create_connection(('192.0.2.1', 80), 5)"
        assert "Error" in container.fails(f'python -c "{unreachable}"')
        with under_way(container.server) as answer:
            machine.sh(f"docker stop --time 40 {container.name}")
            assert len(answer.result().json()["data"]) == 100
        assert container.server.process.wait(20) == 0
    size = inspect(machine, "embedding-server")["Size"] / 1e6
    base = inspect(machine, BASE)["Size"] / 1e6
    with capsys.disabled():
        print(
            f"\nimage: {size:.0f} MB, of which {base:.0f} MB base; ready in "
            f"{container.seconds:.2f} s; "
            + ", ".join(f"{name} built in {took:.0f} s" for name, took in images.items())
        )


def test_mounted_models_a_read_only_root_and_two_processes(
    machine: Machine, its_network: None, golden: tuple[list[str], NDArray[np.float32]]
) -> None:
    texts, expected = golden
    with running(machine, SERVE_MOUNTED) as container:

        def ready() -> int:
            return container.server.log.count(" is ready (process ")

        until(lambda: ready() == 2)  # each worker tells for itself
        assert np.abs(embed(texts[:20]) - expected[:20]).max() < 1e-5
        assert "Read-only file system" in container.fails("touch /cache/x")
        assert "Read-only file system" in container.fails("touch /models/x")
        children = container.run("cat /proc/1/task/1/children").split()
        assert len(children) == 2
        container.run(f"sh -c 'kill -9 {children[0]}'")

        until(lambda: ready() == 3)
        now = container.run("cat /proc/1/task/1/children").split()
        assert len(now) == 2 and children[0] not in now  # it was reaped
        machine.sh(f"docker stop --time 40 {container.name}")
        assert container.server.process.wait(20) == 0


@contextlib.contextmanager
def idle(machine: Machine, image: str) -> Iterator[str]:
    """A container of ``image`` that does nothing, to look into and to run commands in."""
    run = "docker run --detach --network none --entrypoint sleep"
    name = machine.sh(f"{run} {image} infinity").strip()
    yield name
    machine.sh(f"docker rm --force --time 0 {name}")


def test_the_health_check_turns_red(machine: Machine, its_network: None) -> None:
    with idle(machine, "embedding-server") as name:
        told = machine.sh(f"docker healthcheck run {name}", check=False)
        assert told.startswith("1\n"), told
    # It looks where the server is.
    name = machine.sh(
        "docker run --detach --env EMBEDDING_SERVER_UDS=/dev/shm/socket embedding-server"
    ).strip()
    until(lambda: machine.sh(f"docker healthcheck run {name}", check=False).startswith("0\n"))
    machine.sh(f"docker rm --force --time 0 {name}")


def test_what_the_image_says_and_what_is_not_in_it(
    machine: Machine, images: dict[str, float]
) -> None:
    image = inspect(machine, "embedding-server")
    config = image["Config"]
    prefix = "org.opencontainers.image."
    labels = {k.removeprefix(prefix): v for k, v in config["Labels"].items() if prefix in k}
    assert labels == {
        "title": "embedding-server",
        "description": "Sentence embeddings over HTTP",
        "licenses": "MIT OR Apache-2.0",
        "source": "unknown",
        "version": "unknown",
        "revision": "unknown",
    }
    assert config["User"] == "65532:65532"
    assert config["StopSignal"] == "SIGTERM"
    assert config["ExposedPorts"] == {"5000/tcp": {}}
    assert (config["Entrypoint"], config["Cmd"]) == (["embedding-server"], ["serve"])
    assert image["Healthcheck"]["Test"] == ["CMD", "embedding-server", "health"]
    with idle(machine, "embedding-server") as name:
        files = machine.sh(
            f"docker exec --user 0 {name} "
            "sh -c 'find /opt /models /cache /root /etc; command -v gcc cc pip pip3 || true'"
        ).splitlines()
    assert f"/models/{MODEL}/model.safetensors" in files
    needless = {"pip", "pip3", "gcc", "cc", "tests", "keys"}
    assert not [file for file in files if Path(file).name in needless]
    assert "/etc/pip.conf" not in files
    assert not [file for file in files if file.startswith(("/cache/", "/root/.cache"))]


def test_a_gated_model_with_a_secret(
    machine: Machine, images: dict[str, float], tmp_path: Path
) -> None:
    """What isn't in the folder of models comes from the hub; the token stays in no layer."""
    secret = tmp_path / "token"
    secret.write_text(TOKEN)
    with HubStandIn({"acme/gated": machine.checkout / "models" / MODEL}, token=TOKEN) as hub:
        machine.sh(
            f"docker build -t gated --build-arg MODELS='{MODEL} acme/gated' "
            f"--build-arg HF_ENDPOINT={hub.url} --secret id=HF_TOKEN,src={secret} "
            "--build-arg VERSION=1.2.3 ."
        )
        assert hub.asked(part="acme/gated")
    with idle(machine, "gated") as name:
        listed = machine.sh(f"docker exec {name} embedding-server models list --json").splitlines()
        searched = machine.sh(
            f"docker exec --user 0 {name} grep -rl {TOKEN} /models /cache /etc /root /run",
            check=False,
        )
    found = {row["name"]: row["origin"] for row in map(json.loads, listed)}
    assert found == {MODEL: "models-dir", "gated": "models-dir"}
    assert searched.startswith("1\n")  # nothing found
    image = inspect(machine, "gated")
    assert TOKEN not in json.dumps(image)
    assert image["Config"]["Labels"]["org.opencontainers.image.version"] == "1.2.3"
