# SPDX-License-Identifier: MIT OR Apache-2.0
"""Every command and example of the README, run as a newcomer would, in a fresh checkout."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from live import environment, free_port
from readme import before_deployment, blocks, commands

ROOT = Path(__file__).parent.parent
README = before_deployment()
COMMANDS = commands(README)
# Long enough for the downloads of a first installation.
INSTALL_SECONDS = 900
SERVE = "scripts/serve --model all-MiniLM-L6-v2"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this checkout without installed or built files."""
    target = tmp_path_factory.mktemp("fresh") / "embedding-server"
    ignored = shutil.ignore_patterns(
        ".venv", ".git", "__pycache__", ".*_cache", ".hypothesis", "*.egg-info"
    )
    shutil.copytree(ROOT, target, ignore=ignored, symlinks=True)
    return target


def newcomer() -> dict[str, str]:
    # curl comes from the machine, HTTPie from the environment that runs the tests.
    path = f"{os.environ['PATH']}{os.pathsep}{Path(sys.executable).parent}"
    return {**environment(), "PATH": path, "HOME": os.environ.get("HOME", "/tmp")}


@contextmanager
def serving(checkout: Path, command: str, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """The server that ``command`` starts, on ``port`` instead of the README's 5000."""
    server = subprocess.Popen(
        ["bash", "-c", f"exec {command} --port {port}"], cwd=checkout, env=newcomer()
    )
    try:
        deadline = time.monotonic() + INSTALL_SECONDS
        while True:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            assert server.poll() is None, f"{command} ended with {server.returncode}"
            assert time.monotonic() < deadline, f"{command} did not get ready"
            time.sleep(0.1)
        yield server
    finally:
        if server.poll() is None:
            server.send_signal(signal.SIGTERM)
        server.wait(20)


@pytest.fixture(scope="module")
def port(checkout: Path) -> Iterator[int]:
    """The port of the server that the README's first command installs and starts."""
    assert COMMANDS[0] == SERVE
    # An interrupted first call leaves an environment without pip.
    left = [sys.executable, "-m", "venv", "--without-pip", str(checkout / ".venv")]
    subprocess.run(left, check=True)
    number = free_port()
    with serving(checkout, SERVE, number):
        yield number


def run(checkout: Path, command: str, timeout: float = 120) -> str:
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=checkout,
        env=newcomer(),
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_first_commands_serve_and_test() -> None:
    assert COMMANDS[0].startswith("scripts/serve")
    assert "scripts/test" in COMMANDS[:3]


def test_the_server_is_installed_without_torch(checkout: Path, port: int) -> None:
    listed = run(checkout, ".venv/bin/python -m pip list --format=freeze").lower()
    assert "embedding-server" in listed
    for package in ("torch==", "transformers==", "sentence-transformers=="):
        assert package not in listed


def test_a_second_start_needs_no_index(checkout: Path, port: int) -> None:
    """It starts although the index refuses every connection."""
    command = f"PIP_INDEX_URL=http://127.0.0.1:9 PIP_NO_CACHE_DIR=1 {SERVE}"
    with serving(checkout, f"env {command}", free_port()):
        pass


def test_the_request_and_its_answer(checkout: Path, port: int) -> None:
    (curl,) = [command for command in COMMANDS if command.startswith("curl")]
    found = json.loads(run(checkout, curl.replace(":5000/", f":{port}/")))
    shown = json.loads(blocks(README, "json")[0])
    for item, shown_item in zip(found["data"], shown["data"], strict=True):
        first = shown_item["embedding"][:-1]
        assert [round(value, 6) for value in item["embedding"][: len(first)]] == first
        item["embedding"] = shown_item["embedding"]
    assert found == shown


def test_httpie(checkout: Path, port: int) -> None:
    (command,) = [command for command in COMMANDS if command.startswith("http ")]
    command = command.replace("http get", "http --ignore-stdin --body get").replace(
        "5000", f"{port}"
    )
    found = json.loads(run(checkout, command))
    assert [len(item["embedding"]) for item in found["data"]] == [384, 384]


@pytest.mark.parametrize("code", blocks(README, "python"), ids=["openai", "embedder"])
def test_python_examples(code: str, checkout: Path, port: int) -> None:
    code = code.replace(":5000/", f":{port}/")
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    numbers = [float(number) for number in re.findall(r"[\d.]+", done.stdout)]
    if "openai" in code:
        assert numbers == [384]
    else:
        own, phone, roku = numbers
        assert own == pytest.approx(1) and phone > roku + 0.1


def other_commands() -> list[str]:
    return [
        command
        for command in COMMANDS
        if not command.startswith(("curl", "http ")) and command not in (SERVE, "scripts/test")
    ]


def test_the_other_commands(checkout: Path, port: int) -> None:
    """In the README's order, as one may need the output of another."""
    # scripts/test installs the extra that the comparison with sentence-transformers needs.
    run(checkout, "scripts/test --collect-only -q tests/test_readme.py", INSTALL_SECONDS)
    for command in other_commands():
        if command.startswith("scripts/serve"):
            with serving(checkout, command, free_port()):
                pass
        else:
            run(checkout, command, 300)
    assert (checkout / "vectors.npy").stat().st_size == 128 + 2 * 384 * 4
    assert (checkout / "models" / "all-MiniLM-L6-v2" / "model.safetensors").is_file()
