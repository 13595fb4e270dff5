# SPDX-License-Identifier: MIT OR Apache-2.0
"""``embedding-server models``, and how ``serve`` starts and fails to start."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny_models as tiny
from hub_standin import HubStandIn
from live import environment, interruptible, run_cli, running_server, sentence
from minilm import minilm_folder

from embedding_server import Embedder
from embedding_server.commands import models
from embedding_server.errors import ConfigurationError, ModelUnavailable
from embedding_server.models.choice import specs_of
from embedding_server.models.reference import REFERENCE_FILE
from embedding_server.settings import Settings

MINILM = "all-MiniLM-L6-v2"
NOMIC = ("nomic-embed-text-v1", "nomic-embed-text-v1.5")


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """An environment with an empty hub cache and no way to the hub."""
    return {"HF_HOME": str(tmp_path_factory.mktemp("hf")), "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_bert(tmp_path_factory.mktemp("models") / "tiny").folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# --------------------------------------------------------------------------------- models list


def test_list_shows_what_serve_would_serve(offline: Mapping[str, str]) -> None:
    done = run_cli("models", "list", env=offline)
    assert (done.returncode, done.stderr) == (0, b"")
    heading, *lines = done.stdout.decode().splitlines()
    assert re.split(r"\s{2,}", heading) == ["NAME", "FOUND IN", "SIZE", "WHERE"]
    names, origins, sizes, places = zip(*(re.split(r"\s{2,}", line) for line in lines), strict=True)
    assert names == (MINILM, *NOMIC)
    assert origins == ("package", "-", "-")
    assert re.fullmatch(r"9\d\.\d MB", sizes[0])
    assert sizes[1:] == ("-", "-")
    assert places == (
        str(minilm_folder()),
        "to be downloaded from nomic-ai/nomic-embed-text-v1",
        "to be downloaded from nomic-ai/nomic-embed-text-v1.5",
    )
    starts = [line.index(place) for line, place in zip(lines, places, strict=True)]
    assert set(starts) == {heading.index("WHERE")}, "the columns are aligned"


def test_list_as_json(offline: Mapping[str, str]) -> None:
    done = run_cli("models", "list", "--json", env=offline)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["name"] for row in rows] == [MINILM, *NOMIC]
    assert rows[0] == {
        "name": MINILM,
        "repo": f"sentence-transformers/{MINILM}",
        "revision": "e4ce9877abf3edfe10b0d82785e83bdcb973e22e",
        "origin": "package",
        "folder": str(minilm_folder()),
        "bytes": sum(map(len, files_of(minilm_folder()).values())),
        "problem": None,
    }
    assert (rows[1]["origin"], rows[1]["folder"], rows[1]["bytes"]) == (None, None, None)
    assert rows[1]["revision"] == "02d96723811f4bb77a80857da07eda78c1549a4d"


def test_list_of_own_models(offline: Mapping[str, str], tiny_folder: Path) -> None:
    models = ("--model", str(tiny_folder), "--model", "org/name@v1")
    done = run_cli("models", "list", "--json", *models, env=offline)
    folder, repository = [json.loads(line) for line in done.stdout.splitlines()]
    assert (folder["name"], folder["origin"]) == ("tiny", "folder")
    assert folder["bytes"] == sum(map(len, files_of(tiny_folder).values()))
    assert (repository["name"], repository["repo"]) == ("name", "org/name")
    assert (repository["revision"], repository["folder"]) == ("v1", None)


def test_list_of_no_model(offline: Mapping[str, str]) -> None:
    assert "'no model' is no model" in sentence(
        run_cli("models", "list", "--model", "no model", env=offline)
    )


@pytest.mark.parametrize(
    "values",
    [
        {"model": ["{}", "{}"]},
        {"model": [MINILM, "{}"], "revision": "main"},
        {"revision": "main"},
        {"model": ["{}"], "revision": "main"},
        {"model": [f"{MINILM}@v1"], "revision": "v2"},
    ],
    ids=str,
)
def test_list_refuses_what_serve_refuses(values: dict[str, Any], tiny_folder: Path) -> None:
    values["model"] = tuple(text.format(tiny_folder) for text in values.get("model", ()))
    with pytest.raises(ConfigurationError) as refused:
        specs_of(Settings(**values))
    with pytest.raises(ConfigurationError, match=re.escape(str(refused.value))):
        models.list_models(Settings(**values), as_json=True)


def test_a_revision_applies_or_is_refused_by_name(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whatever names a single model takes one from the environment or the file."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    settings = Settings(revision="v2")
    calls: tuple[Callable[[str], object], ...] = (
        partial(models.show_model, settings),
        lambda name: models.pull_models(settings, [name], tmp_path / "to"),
        lambda name: Embedder.from_settings(name, settings),
        lambda name: Embedder(name, revision="v2"),
        lambda name: specs_of(Settings(model=(name,), revision="v2")),
    )
    for call in calls:
        with pytest.raises(ConfigurationError, match="--revision v2 can't apply to .* is a folder"):
            call(str(tiny_folder))
        with pytest.raises(ConfigurationError, match="which names the revision v1 itself"):
            call("org/name@v1")
    for call in calls[:4]:
        with pytest.raises(ModelUnavailable, match=r"\(org/name@v2\)"):
            call("org/name")
    assert models.verify_model(settings, str(tiny_folder), None) == 2
    assert "--revision v2 can't apply" in capsys.readouterr().err
    with pytest.raises(ConfigurationError, match="--revision .* one NAME"):
        models.pull_models(settings, [MINILM, "org/name"], tmp_path / "to")
    assert not any((tmp_path / "to").iterdir())


# --------------------------------------------------------------------------------- models pull


def test_pull_saves_byte_for_byte(
    offline: Mapping[str, str], tiny_folder: Path, tmp_path: Path
) -> None:
    target = tmp_path / "new" / "folder"
    command = ("models", "pull", MINILM, str(tiny_folder), "--to", str(target))
    for _ in range(2):
        done = run_cli(*command, env=offline)
        assert done.returncode == 0, done.stderr
        assert done.stdout.decode().splitlines() == [str(target / MINILM), str(target / "tiny")]
    assert files_of(target / MINILM) == files_of(minilm_folder())
    assert files_of(target / "tiny") == files_of(tiny_folder)
    assert sorted(os.listdir(target)) == [MINILM, "tiny"]

    texts = b"river\n"
    pulled = run_cli(
        *("embed", "--model", MINILM, "--load-models-from", str(target)), stdin=texts, env=offline
    )
    assert f"{target / MINILM} (models-dir)" in pulled.stderr.decode()
    assert pulled.stdout == run_cli("embed", "--model", MINILM, stdin=texts, env=offline).stdout


def test_pull_takes_the_revision_of_the_settings(tmp_path: Path) -> None:
    new, old = (tiny.make_bert(tmp_path / f"{seed}", seed=seed).folder for seed in (1, 2))
    with HubStandIn({"org/name": new}, folders={40 * "a": old}) as hub:
        hub.commits["v1"] = 40 * "a"
        env = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
        env["EMBEDDING_SERVER_REVISION"] = "v1"
        done = run_cli("models", "pull", "org/name", "--to", str(tmp_path), env=env)
    assert done.returncode == 0, done.stderr
    weights = "model.safetensors"
    assert (tmp_path / "name" / weights).read_bytes() == (old / weights).read_bytes()


def test_pull_leaves_reference_vectors_that_were_added(
    offline: Mapping[str, str], tiny_folder: Path, tmp_path: Path
) -> None:
    command = ("models", "pull", str(tiny_folder), "--to", str(tmp_path))
    run_cli(*command, env=offline)
    added = tmp_path / "tiny" / REFERENCE_FILE
    added.write_bytes(b"vectors")
    assert run_cli(*command, env=offline).returncode == 0
    assert added.read_bytes() == b"vectors"
    (tmp_path / "tiny" / "else").touch()
    assert "is there already" in sentence(run_cli(*command, env=offline))


def test_pull_never_overwrites_another_model(
    offline: Mapping[str, str], tiny_folder: Path, tmp_path: Path
) -> None:
    other = tiny.make_bert(tmp_path / "tiny", seed=9).folder
    before = files_of(other)
    done = run_cli("models", "pull", str(tiny_folder), "--to", str(tmp_path), env=offline)
    assert "is there already" in sentence(done)
    assert files_of(other) == before


@pytest.mark.parametrize("name", [NOMIC[0], "org/name", "no model"])
def test_pull_of_what_cannot_be_had(offline: Mapping[str, str], tmp_path: Path, name: str) -> None:
    assert name in sentence(run_cli("models", "pull", name, "--to", str(tmp_path), env=offline))
    assert list(tmp_path.iterdir()) == []


def test_pull_to_where_no_folder_can_be(
    offline: Mapping[str, str], tiny_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    target = tmp_path / "file" / "folder"
    done = run_cli("models", "pull", str(tiny_folder), "--to", str(target), env=offline)
    assert "Not a directory" in sentence(done)


# -------------------------------------------------------------------------------------------- serve


def test_defaults_that_cannot_be_had_are_one_warning_each(offline: Mapping[str, str]) -> None:
    with running_server(env=offline) as server:
        listed = httpx.get(f"{server.url}/v1/models").json()
        warnings = [line for line in server.log.splitlines() if " warning " in line]
    assert listed["data"] == [MINILM]
    assert len(warnings) == len(NOMIC)
    for name, warning in zip(NOMIC, warnings, strict=True):
        assert f"{name} is not served" in warning
        assert f"embedding-server models pull {name} --to DIR" in warning
        assert "HF_HUB_OFFLINE" in warning


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        pytest.param(
            NOMIC[0],
            ["the hub cache", "HF_HUB_OFFLINE", f"embedding-server models pull {NOMIC[0]} --to"],
            id="catalog",
        ),
        pytest.param(
            "org/name@v1",
            ["org/name@v1", "the hub cache", "embedding-server models pull org/name@v1 --to"],
            id="hub-id",
        ),
        pytest.param("all-minilm", ["'all-minilm' is no model", MINILM, "./folder"], id="no-name"),
        pytest.param("./nowhere", ["no folder ./nowhere"], id="no-folder"),
    ],
)
def test_a_model_asked_for_by_name_ends_the_start(
    offline: Mapping[str, str], name: str, parts: list[str]
) -> None:
    done = run_cli("serve", "--port", "0", "--model", MINILM, "--model", name, env=offline)
    told = sentence(done)
    for part in parts:
        assert part in told


def test_a_model_that_cannot_be_run_ends_the_start(
    offline: Mapping[str, str], tmp_path: Path
) -> None:
    folder = tiny.make_bert(tmp_path / "pickled").folder
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    told = sentence(run_cli("serve", "--port", "0", "--model", str(folder), env=offline))
    assert "pytorch_model.bin" in told
    assert "save_pretrained" in told


def test_models_from_a_folder_of_models(
    offline: Mapping[str, str], tiny_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "name").symlink_to(tiny_folder)
    flags = ("--load-models-from", str(tmp_path), "--model", "org/name")
    with running_server(*flags, env=offline) as server:
        assert httpx.get(f"{server.url}/v1/models").json()["data"] == ["name"]


def test_names_of_ones_own(offline: Mapping[str, str], tiny_folder: Path, tmp_path: Path) -> None:
    other = tiny.make_bert(tmp_path / "tiny", seed=3).folder
    models = ("--model", str(tiny_folder), "--model", str(other))
    names = ("--served-model-name", "first", "--served-model-name", "second")
    with running_server(*models, *names, env=offline) as server:
        assert httpx.get(f"{server.url}/v1/models").json()["data"] == ["first", "second"]
    told = sentence(run_cli("serve", "--port", "0", *models, env=offline))
    assert "More than one --model would be served as tiny" in told
    assert "--served-model-name" in told


def test_a_taken_port_fails_before_models_are_loaded(offline: Mapping[str, str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = run_cli("serve", "--port", str(port), "--model", MINILM, env=offline)
    told = sentence(done)
    assert f"127.0.0.1 port {port}" in told
    assert "--port" in told
    assert b"is ready" not in done.stderr


def test_an_address_that_is_not_here(offline: Mapping[str, str]) -> None:
    told = sentence(run_cli("serve", "--host", "no.such.host.invalid", env=offline))
    assert "--host 'no.such.host.invalid'" in told


@pytest.mark.parametrize("command", [["serve", "--port", "0"], ["embed"]], ids=["serve", "embed"])
def test_ctrl_c_does_not_wait_for_a_download(
    tiny_folder: Path, tmp_path: Path, command: list[str]
) -> None:
    """Here one that stands still, and would be given up after half a minute."""
    log = tmp_path / "log"
    with HubStandIn({"org/name": tiny_folder}, hangs={"model.safetensors"}) as hub:
        env = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
        with log.open("wb") as stderr:
            process = interruptible(
                [sys.executable, "-m", "embedding_server.cli", *command, "--model", "org/name"],
                env=environment(env),
                stdin=subprocess.DEVNULL,
                stderr=stderr,
            )
        deadline = time.monotonic() + 60
        while not hub.asked(part="model.safetensors") and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        try:
            code = process.wait(15)
        finally:
            process.kill()
    assert code == (130 if command == ["embed"] else 0)
    assert b"Traceback" not in log.read_bytes()


def test_sizes_for_a_model_that_is_not_served() -> None:
    for command in (
        ("serve", "--model", "all-MiniLM-L6-v2"),
        ("models", "info", "all-MiniLM-L6-v2"),
    ):
        done = run_cli(*command, "--matryoshka", "all-MiniLM-L6=64,128")
        assert done.returncode == 1
        assert b"--matryoshka names all-MiniLM-L6" in done.stderr


def test_a_folder_of_models_that_does_not_exist() -> None:
    done = run_cli("models", "list", "--load-models-from", "/no/such/folder")
    assert done.returncode == 1
    assert b"there is no folder /no/such/folder" in done.stderr


def test_list_tells_what_is_wrong_with_a_folder(tmp_path: Path) -> None:
    done = run_cli("models", "list", "--model", str(tmp_path))
    assert done.returncode == 0
    assert b"neither config.json nor modules.json" in done.stdout
