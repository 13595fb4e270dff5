# SPDX-License-Identifier: MIT OR Apache-2.0
"""A real systemd as the first process of namespaces of its own, on a copy of this machine's files.

The root folder is an overlay over this machine's, kept in memory; nothing of it is left. It has no
units but those that a test puts there, and can't change the kernel's settings.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CHECKOUT = "/srv/checkout"
SYSTEMD = Path("/lib/systemd/systemd")
START_SECONDS = 20.0
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"

_TARGETS = ("sysinit", "basic", "sockets", "multi-user", "shutdown", "network-online", "tested")

_BOOT = f"""
set -eu
root=$1/root checkout=$2
mkdir "$1/upper" "$root"
mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs "$1/upper"
mkdir "$1/upper/files" "$1/upper/work"
mount -t overlay -o "lowerdir=/,upperdir=$1/upper/files,workdir=$1/upper/work" overlay "$root"
mount -t proc proc "$root/proc"
mount --bind "$root/proc/sys" "$root/proc/sys"
mount -o remount,bind,ro "$root/proc/sys"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
for folder in dev run etc/systemd/system; do mount -t tmpfs -o mode=755 tmpfs "$root/$folder"; done
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
for device in null zero full random urandom tty; do
    touch "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
ln -s /proc/self/fd "$root/dev/fd"
ln -s pts/ptmx "$root/dev/ptmx"
mkdir "$root/dev/shm" "$root/dev/pts" "$root/old"
mkdir -p "$root{CHECKOUT}"
mount --bind -o ro "$checkout" "$root{CHECKOUT}"
for target in {" ".join(_TARGETS)}; do
    printf '[Unit]\\nDefaultDependencies=no\\n' > "$root/etc/systemd/system/$target.target"
done
mkdir "$root/etc/systemd/system/service.d"
printf '[Service]\\nStandardOutput=append:/run/log\\n' \\
    > "$root/etc/systemd/system/service.d/log.conf"
cd "$root"
pivot_root . old
umount -l /old
# As every machine is, for the mounts of credentials; in a container systemd leaves it to others.
mount --make-rshared /
exec env -i container=test PATH={_PATH} SYSTEMD_UNIT_PATH=/etc/systemd/system \
    SYSTEMD_GENERATOR_PATH=/nowhere {SYSTEMD} --system --unit=tested.target --log-target=null
"""


@dataclass(frozen=True)
class Machine:
    """What a systemd runs in."""

    pid: int

    def run(
        self, command: str, *, network: bool = False, check: bool = True, timeout: float = 120
    ) -> str:
        """What bash prints for ``command``, as root in the checkout.

        With ``network`` on that of this machine; else it has its own, with a loopback alone.
        """
        spaces = ["--mount", "--pid"] if network else ["--mount", "--pid", "--net", "--uts"]
        pip = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
        enter = ["nsenter", f"--target={self.pid}", *spaces, f"--wd={self._root}{CHECKOUT}"]
        done = subprocess.run(
            [*enter, "bash", "-c", command],
            env={**pip, "PATH": _PATH, "HOME": "/root", "LANG": "C.UTF-8"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == 0 or not check, f"{command}\n{done.stdout}\n{self.log}"
        return done.stdout

    def client(self, program: str, *arguments: str) -> subprocess.Popen[str]:
        """A Python of the tests, with their packages, on the machine's network."""
        enter = ["nsenter", f"--target={self.pid}", "--net", sys.executable, "-c", program]
        pipe = subprocess.PIPE
        return subprocess.Popen([*enter, *arguments], stdin=pipe, stdout=pipe, text=True)

    def write(self, file: str, text: str) -> None:
        """A file that root alone may read."""
        place = Path(f"{self._root}{file}")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch(mode=0o600)
        place.write_text(text)

    @property
    def log(self) -> str:
        """What all services have printed."""
        file = self._root / "run/log"
        return file.read_text() if file.exists() else ""

    def show(self, name: str, unit: str = "embedding-server.service") -> str:
        """A property of a unit."""
        return self.run(f"systemctl show --property={name} --value {unit}").strip()

    @property
    def _root(self) -> Path:
        return Path(f"/proc/{self.pid}/root")


def missing() -> str | None:
    """Why no systemd can be run here."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs Linux, and root for namespaces and mounts"
    for tool in ("unshare", "nsenter", "curl", str(SYSTEMD), "/usr/bin/python3"):
        if shutil.which(tool) is None:
            return f"needs {tool}: apt-get install systemd util-linux curl python3-venv"
    able = "import ensurepip, sys; sys.exit(sys.version_info < (3, 11))"
    if subprocess.run(["/usr/bin/python3", "-c", able], stderr=subprocess.DEVNULL).returncode:
        return "needs Python 3.11 of the system with venv: apt-get install python3-venv"
    if _control_groups() is None:
        return "needs a file system of control groups (cgroup2) that can be written to"
    return None


@contextmanager
def booted() -> Iterator[Machine]:
    """A systemd that has started, with no service yet."""
    groups = _control_groups()
    assert groups is not None
    group = Path(tempfile.mkdtemp(prefix="embedding-server-test-", dir=groups))
    folder = Path(tempfile.mkdtemp(prefix="booted-systemd-"))
    enter = f'echo $$ > {group}/cgroup.procs; exec unshare "$@"'
    spaces = ("--mount", "--pid", "--fork", "--cgroup", "--uts", "--ipc", "--net")
    process = subprocess.Popen(
        ["bash", "-c", enter, "-", *spaces, "bash", "-c", _BOOT, "-", str(folder), str(ROOT)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        yield _started(process)
    finally:
        if (first := _child(process)) is not None:
            os.kill(first, signal.SIGKILL)  # and so all the others
        process.communicate(timeout=START_SECONDS)
        _remove(group)
        shutil.rmtree(folder)


def _started(process: subprocess.Popen[bytes]) -> Machine:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0].decode()
        first = _child(process)
        if first is not None and Path(f"/proc/{first}/comm").read_text() == "systemd\n":
            machine = Machine(first)
            if machine.run("systemctl is-active tested.target", check=False) == "active\n":
                return machine
        time.sleep(0.05)
    raise AssertionError("systemd did not start")


def _child(process: subprocess.Popen[bytes]) -> int | None:
    try:
        pids = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    except OSError:
        return None
    return int(pids[0]) if pids else None


def _control_groups() -> Path | None:
    for line in Path("/proc/mounts").read_text().splitlines():
        _, place, kind, *_ = line.split()
        if kind == "cgroup2" and os.access(place, os.W_OK):
            return Path(place)
    return None


def _remove(group: Path) -> None:
    """Its processes are dead, but may not be gone."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            for folder, _, _ in os.walk(group, topdown=False):
                Path(folder).rmdir()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
