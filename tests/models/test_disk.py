# SPDX-License-Identifier: MIT OR Apache-2.0
"""Full disks, caches that can't be written and downloads that broke off: reported, and survived.

The disks are real: small file systems in memory, in a mount namespace of the process's own.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
import pytest
import tiny_models
from hub_standin import HubStandIn
from in_process import until
from live import environment, running_server
from model_folders import put_in_cache

CLI = f"{shlex.quote(sys.executable)} -m embedding_server.cli"
UNSHARE = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "-Urm"]


def mounts_are_possible() -> bool:
    """Not in every container: a namespace needs root, or a kernel that lets users have theirs."""
    try:
        done = subprocess.run(
            [*UNSHARE, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True
        )
    except FileNotFoundError:
        return False
    return done.returncode == 0


needs_mounts = pytest.mark.skipif(not mounts_are_possible(), reason="mounting is not allowed here")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 4 MB, so that its weights are far larger than all the rest."""
    made = tiny_models.make_bert(
        tmp_path_factory.mktemp("repo") / "tiny", hidden=256, layers=2, intermediate=768
    )
    assert (made.folder / "model.safetensors").stat().st_size > 4_000_000
    return made.folder


@pytest.fixture
def hub(folder: Path) -> Iterator[HubStandIn]:
    with HubStandIn({"acme/tiny": folder}) as hub:
        yield hub


def env_of(hub: HubStandIn | None, cache: Path) -> Mapping[str, str]:
    where = {"HF_HOME": str(cache), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    if hub is not None:
        where |= {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
    return environment(where)


def shell(script: str, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run ``script`` where it may mount what nobody else sees."""
    return subprocess.run(
        [*UNSHARE, "sh", "-c", script], env=env, capture_output=True, text=True, timeout=120
    )


def sentences(log: str) -> list[str]:
    """The lines that a failed command ends with; none of them is a traceback."""
    assert "Traceback" not in log, log
    return [line for line in log.splitlines() if line.startswith("embedding-server: ")]


INFO = f"{CLI} models info acme/tiny --backend onnx"
SERVE = f"timeout 20 {CLI} serve --port 0 --backend onnx --model acme/tiny"


@needs_mounts
@pytest.mark.parametrize("size", ["16k", "1m", "4100k"])
@pytest.mark.parametrize("command", [INFO, SERVE], ids=["info", "serve"])
def test_a_full_disk_and_then_room(
    size: str, command: str, hub: HubStandIn, tmp_path: Path
) -> None:
    """Too small for the documents, for the weights, and for the last of the weights."""
    cache = tmp_path / "hf"
    cache.mkdir()
    done = shell(
        f"mount -t tmpfs -o size={size} none {cache} && {command}; echo first=$?;"
        f"mount -o remount,size=64m {cache} && {INFO}; echo second=$?",
        env_of(hub, cache),
    )
    assert "first=1" in done.stdout, done.stderr
    assert "second=0" in done.stdout, done.stderr
    (sentence,) = sentences(done.stderr)
    assert "could not be written to" in sentence
    assert str(cache) in sentence
    assert "No space left on device" in sentence
    assert "free space or allow writing there, or set HF_HOME to another folder" in sentence


@needs_mounts
def test_a_read_only_cache_without_the_model(hub: HubStandIn, tmp_path: Path) -> None:
    cache = tmp_path / "hf"
    cache.mkdir()
    done = shell(
        f"mount -t tmpfs none {cache} && mount -o remount,ro {cache} && {SERVE}; echo first=$?;"
        f"mount -o remount,rw {cache} && {INFO}; echo second=$?",
        env_of(hub, cache),
    )
    assert "first=1" in done.stdout, done.stderr
    assert "second=0" in done.stdout, done.stderr
    (sentence,) = sentences(done.stderr)
    assert "Read-only file system" in sentence
    assert "set HF_HOME to another folder" in sentence


@needs_mounts
def test_a_read_only_cache_with_the_model(folder: Path, tmp_path: Path) -> None:
    """Nothing is written to use it."""
    cache = tmp_path / "hf"
    put_in_cache(folder, cache / "hub", "acme/tiny")
    done = shell(
        f"mount --bind {cache} {cache} && mount -o remount,bind,ro {cache} && "
        f"! touch {cache}/x 2>/dev/null && {INFO}",
        env_of(None, cache),
    )
    assert done.returncode == 0, done.stderr
    assert "backend           onnx" in done.stdout


def test_a_cache_without_permission(hub: HubStandIn, tmp_path: Path) -> None:
    cache = tmp_path / "hf"
    cache.mkdir(mode=0o555)
    # root may write anywhere, unless it gives that up.
    obeying = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    command = [
        *obeying,
        sys.executable,
        "-m",
        "embedding_server.cli",
        "models",
        "info",
        "acme/tiny",
    ]
    env = env_of(hub, cache)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stderr
    (sentence,) = sentences(done.stderr)
    assert "Permission denied" in sentence
    assert "set HF_HOME to another folder" in sentence
    cache.chmod(0o755)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_download_that_was_killed(hub: HubStandIn, tmp_path: Path) -> None:
    """By the system, in the middle: the next start waits for no lock, and goes on from there."""
    cache = tmp_path / "hf"
    hub.cuts["model.safetensors"] = [2_500_000]
    arguments = ["serve", "--port", "0", "--model", "acme/tiny", "--backend", "onnx"]
    process = subprocess.Popen(
        [sys.executable, "-m", "embedding_server.cli", *arguments],
        env=env_of(hub, cache),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        # Two MiB are there, and the answer with the rest never comes.
        until(lambda: bool(hub.asked(part="/acme/tiny/model.safetensors")))
        hub.hangs.add("/acme/tiny/model.safetensors")
        until(lambda: len(hub.asked(part="/acme/tiny/model.safetensors")) >= 2)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    (part,) = cache.rglob("*.part")
    assert part.stat().st_size == 2 * 2**20
    hub.hangs.clear()
    hub.requests.clear()
    flags = ("--model", "acme/tiny", "--backend", "onnx")
    kept = {name: value for name, value in env_of(hub, cache).items() if name.startswith("HF_")}
    with running_server(*flags, env=kept) as server:
        body = {"model": "tiny", "input": "river"}
        assert httpx.post(f"{server.url}/v1/embeddings", json=body).status_code == 200
    ranges = [request.range for request in hub.asked(part="/acme/tiny/model.safetensors")]
    assert ranges == [f"bytes={2 * 2**20}-"]
    assert not list(cache.rglob("*.part"))


# ---------------------------------------------------------------------------------------- embed


@needs_mounts
@pytest.mark.parametrize("form", ["npy", "jsonl", "parquet"])
def test_a_full_disk_under_an_output(form: str, folder: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "texts").write_text("\n".join(tiny_models.texts(600, seed=5)))
    embed = f"{CLI} embed --model {folder} {tmp_path / 'texts'} --output {disk}/vectors.{form}"
    done = shell(
        f"mount -t tmpfs -o size=64k none {disk} && {embed}; echo first=$?; ls -A {disk};"
        f"mount -o remount,size=64m {disk} && {embed}; echo second=$?; ls -A {disk}",
        env_of(None, tmp_path),
    )
    # Nothing is left of the half, and no file by its name that would look like a whole.
    assert done.stdout.split() == ["first=1", "second=0", f"vectors.{form}"], done.stderr
    assert sentences(done.stderr) == [
        f"embedding-server: {disk}/vectors.{form}: No space left on device"
    ]


def test_a_full_standard_output(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "texts").write_text("river\ncity\n")
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "embedding_server.cli",
                "embed",
                "--model",
                str(folder),
                "texts",
            ],
            cwd=tmp_path,
            env=environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert done.returncode == 1
    assert sentences(done.stderr) == ["embedding-server: standard output: No space left on device"]


# ------------------------------------------------------------------------------- while it is served


def test_a_model_that_is_replaced_while_served(folder: Path, tmp_path: Path) -> None:
    """By another file under its name, as every download does it: the old one is served on."""
    copy = tmp_path / "tiny"
    copy.mkdir()
    for file in folder.rglob("*"):
        if file.is_file():
            (copy / file.relative_to(folder)).parent.mkdir(exist_ok=True, parents=True)
            (copy / file.relative_to(folder)).write_bytes(file.read_bytes())
    with running_server("--model", str(copy), "--backend", "onnx") as server:
        url, body = f"{server.url}/v1/embeddings", {"model": "tiny", "input": ["river", "a city"]}
        before = httpx.post(url, json=body).content
        other = tmp_path / "other"
        other.write_bytes(bytes((copy / "model.safetensors").stat().st_size))
        other.replace(copy / "model.safetensors")
        assert httpx.post(url, json=body).content == before
        (copy / "model.safetensors").unlink()
        assert httpx.post(url, json=body).content == before
