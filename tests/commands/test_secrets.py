# SPDX-License-Identifier: MIT OR Apache-2.0
"""No key stands in the list of processes, in a log, in an error or in a metric."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest
from in_process import until
from live import environment, run_cli, running_server

from embedding_server.commands.argv import without_secrets
from embedding_server.errors import ConfigurationError

MODEL = "all-MiniLM-L6-v2"
KEY, OTHER, TOKEN, WRONG = "sesame-4711", "thistle-4712", "hf_4713", "guess-4714"
API_KEY, HF_TOKEN = "EMBEDDING_SERVER_API_KEY", "EMBEDDING_SERVER_HF_TOKEN"

LAUNCHERS = {
    "module": [sys.executable, "-m", "embedding_server.cli"],
    "with options of Python's": [sys.executable, "-W", "error", "-m", "embedding_server.cli"],
    "program": [sys.executable, "-c", "import sys; from embedding_server.cli import main; main()"],
    "checkout": [sys.executable, str(Path(__file__).parents[2] / "embedding-server.py")],
}

# ------------------------------------------------------------------------------- what is taken out


@pytest.mark.parametrize(
    ("arguments", "kept", "variables"),
    [
        ("serve", "serve", {}),
        ("serve --api-key a", "serve", {API_KEY: "a"}),
        ("serve --api-key=a --port 1", "serve --port 1", {API_KEY: "a"}),
        ("serve --api-key a --api-key=b=c", "serve", {API_KEY: "a,b=c"}),
        ("serve --hf-token a --hf-token b", "serve", {HF_TOKEN: "b"}),
        ("bench --api-key a --json", "bench --json", {API_KEY: "a"}),
        ("embed --hf-token a x.txt", "embed x.txt", {HF_TOKEN: "a"}),
        ("models pull m --hf-token a --to d", "models pull m --to d", {HF_TOKEN: "a"}),
        ("serve --api-key -1", "serve", {API_KEY: "-1"}),
        # What the command line refuses, it must be shown.
        ("embed --api-key a", "embed --api-key a", {}),
        ("serve --api-key", "serve --api-key", {}),
        ("serve --api-key --port 1", "serve --api-key --port 1", {}),
        ("serve --api-key=", "serve --api-key=", {}),
        ("serve -- --api-key a", "serve -- --api-key a", {}),
        ("--api-key a", "--api-key a", {}),
    ],
)
def test_secrets_become_variables(arguments: str, kept: str, variables: dict[str, str]) -> None:
    assert without_secrets(arguments.split(" ")) == (kept.split(" "), variables)


@pytest.mark.parametrize("key", ["one,two", " sesame", "sesame "])
def test_a_key_that_a_variable_can_not_hold_is_refused_by_name(key: str) -> None:
    with pytest.raises(ConfigurationError, match="--api-key: .* --api-key-file") as caught:
        without_secrets(["serve", "--api-key", key])
    assert key not in str(caught.value)
    done = run_cli("serve", "--api-key", key)
    assert done.returncode == 1
    assert b"--api-key-file" in done.stderr and b"one,two" not in done.stderr


# ------------------------------------------------------------------------------- the real process


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")


def processes(pid: int) -> list[int]:
    """The process and all that it has started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(below for child in children for below in processes(int(child)))]


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="there is no /proc here")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_server_shows_no_key(workers: int) -> None:
    flags = ["--api-key", KEY, f"--api-key={OTHER}", "--hf-token", TOKEN]
    flags += [] if workers == 1 else ["--workers", str(workers)]
    flags += ["--log-level", "debug", "--model", MODEL]
    with running_server(*flags) as server, httpx.Client(base_url=server.url) as client:
        pids = processes(server.process.pid)
        assert len(pids) >= workers
        shown = "\n".join(map(command_line, pids))
        assert f"--log-level debug --model {MODEL}" in shown
        ps = shutil.which("ps")
        if ps is not None:
            command = [ps, "-ww", "-o", "args=", "-p", ",".join(map(str, pids))]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            shown += done.stdout
        told = []
        for key in (KEY, OTHER, WRONG):
            headers = {"authorization": f"Bearer {key}"}
            for method, path in (
                ("GET", "/v1/models"), ("GET", "/v1/models/nope"), ("GET", "/nowhere"),
                ("GET", "/docs"), ("GET", "/openapi.json"), ("PUT", "/v1/models"),
                ("POST", "/v1/embeddings"), ("GET", "/metrics"),
            ):  # fmt: skip
                response = client.request(method, path, headers=headers)
                assert (response.status_code == 401) is (key == WRONG)
                told.append(f"{response.headers}{response.text}")
        headers = {"authorization": f"Bearer {KEY}"}
        body = {"model": MODEL, "input": "a"}
        assert client.post("/v1/embeddings", json=body, headers=headers).status_code == 200
        until(lambda: "tokens=3" in server.log)
        seen = shown + server.log + "".join(told)
    for secret in (KEY, OTHER, TOKEN, WRONG):
        assert secret not in seen


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("command", ["embed", "models"])
def test_every_launcher_runs_the_same_command_again(launcher: str, command: str) -> None:
    """Once: with what it was given, less the token."""
    rest = ["--hf-token", TOKEN, "--model", MODEL]
    arguments = ["embed", *rest] if command == "embed" else ["models", "list", *rest]
    done = subprocess.run(
        [*LAUNCHERS[launcher], *arguments], input=b"iPhone\n", env=environment(),
        capture_output=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (b'"embedding":[' if command == "embed" else MODEL.encode()) in done.stdout


def test_it_stays_one_process_and_runs_again_only_once(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        f"with open({str(tmp_path / 'starts')!r}, 'a') as starts:\n"
        "    print(os.getpid(), *sys.orig_argv, file=starts)\n"
    )
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    done = run_cli("models", "list", "--hf-token", TOKEN, env={"PYTHONPATH": path})
    assert done.returncode == 0
    first, second = (tmp_path / "starts").read_text().splitlines()
    assert first.split()[0] == second.split()[0], "a supervisor knows it by its id"
    assert TOKEN in first and TOKEN not in second


def test_the_flag_wins_over_the_variable() -> None:
    env = {API_KEY: OTHER, API_KEY.lower(): OTHER}
    with running_server("--model", MODEL, "--api-key", KEY, env=env) as server:
        for key, status in ((KEY, 200), (OTHER, 401)):
            headers = {"authorization": f"Bearer {key}"}
            assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == status


# ----------------------------------------------------------------------------------- what is said


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve", "--apikey", KEY],
        ["serve", f"--api-keys={KEY}"],
        ["serve", "--api-key", OTHER, KEY],
        ["embed", "--api-key", KEY],
        ["serve", "--api-key", KEY, "--port", "none"],
        ["serve", "--api-key", KEY, "--api-key", ""],
        ["serve", "--api-key", KEY, "--config", "/no/such/file"],
        ["serve", "--api-key", KEY, "--model", "/no/such/folder", "--log-level", "debug"],
        ["serve", "--api-key", f"{KEY} {KEY}"],
        ["serve", "--port", "0", "--model", "a/b", "--hf-token", KEY, "--log-level", "debug"],
    ],
    ids=lambda arguments: " ".join(arguments)[:60],
)
def test_errors_at_the_start(arguments: Sequence[str]) -> None:
    done = run_cli(*arguments)
    assert done.returncode in (1, 2)
    told = (done.stdout + done.stderr).decode()
    assert KEY not in told and OTHER not in told
    assert "Traceback" not in told or "debug" in arguments
    assert re.search(r"embedding-server|error", told)


@pytest.mark.parametrize(
    "line", ["api_key = [{key}", "api_keys = ['{key}']", "api_key = [['{key}']]"]
)
def test_errors_of_the_settings_file(tmp_path: Path, line: str) -> None:
    config = tmp_path / "settings.toml"
    config.write_text(line.replace("{key}", KEY) + "\n")
    done = run_cli("serve", "--config", str(config))
    assert done.returncode == 1
    assert KEY.encode() not in done.stderr
    assert b"settings.toml" in done.stderr or b"--api-key" in done.stderr


def test_a_traceback_tells_no_key(tmp_path: Path) -> None:
    """Of a fault that nobody foresaw, while the settings are at hand."""
    (tmp_path / "sitecustomize.py").write_text(
        "import embedding_server.app\n"
        "def create_app(settings, **options):\n"
        "    raise RuntimeError(f'{settings!r} {settings.api_key} {vars(settings)}')\n"
        "embedding_server.app.create_app = create_app\n"
    )
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    done = run_cli("serve", "--api-key", KEY, "--hf-token", TOKEN, env={"PYTHONPATH": path})
    assert b"RuntimeError" in done.stderr and b"api_key" in done.stderr
    assert KEY.encode() not in done.stderr and TOKEN.encode() not in done.stderr
