# SPDX-License-Identifier: MIT OR Apache-2.0
"""The workflows in .github: correct as far as can be told without running them.

jactionlint knows keys, expressions, the inputs of well-known actions, pins, permissions, timeouts
and more, and check-jsonschema brings the public schemas. What they can't know is asserted here.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from script_module import load_script

import embedding_server

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted(path.name for path in (ROOT / ".github" / "workflows").iterdir())
BIN = Path(sys.executable).parent


def run(program: str, *arguments: str, cwd: Path) -> tuple[int, str]:
    """Exit code and output of a program that scripts/check-packaging installs."""
    if not (BIN / program).exists():
        pytest.skip(f"{program} is missing: scripts/check-packaging installs it")
    done = subprocess.run(
        [BIN / program, *arguments], cwd=cwd, capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout + done.stderr


def lint(checkout: Path, shellcheck: str = "") -> tuple[int, str]:
    """Every rule but those that ask GitHub; without ``shellcheck`` its own of shell syntax."""
    return run(
        "jactionlint", "--strict-exit", "--no-hints", f"--shellcheck={shellcheck}", cwd=checkout
    )


def missing_scripts(checkout: Path) -> set[str]:
    """Programs of the repository that a step runs and that aren't there."""
    steps = [step for name in WORKFLOWS for step in steps_of(checkout, name)]
    named = re.findall(
        r"(?<![\w/.-])(?:scripts|\.ci|tests)/[\w./-]+",
        "\n".join(step.get("run", "") for step in steps),
    )
    assert len(named) > 3
    return {name for name in named if not (checkout / name).is_file()}


def pythons(checkout: Path) -> list[str]:
    """The versions in the matrix of test.yml."""
    found: list[str] = workflow(checkout, "test.yml")["jobs"]["test"]["strategy"]["matrix"][
        "python"
    ]
    return found


def workflow(checkout: Path, name: str) -> dict[str, Any]:
    text = (checkout / ".github" / "workflows" / name).read_text(encoding="utf-8")
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def steps_of(checkout: Path, name: str) -> list[dict[str, Any]]:
    jobs = workflow(checkout, name)["jobs"].values()
    return [step for job in jobs for step in job.get("steps", ())]


def pins() -> set[tuple[str, str]]:
    """Each action with the hash and version that a line names."""
    text = "".join(path.read_text() for path in (ROOT / ".github" / "workflows").iterdir())
    uses = re.findall(r"uses: ([^.\s]\S+)(.*)", text)
    return {(use.partition("@")[0], use.partition("@")[2] + comment) for use, comment in uses}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The workflows and what they refer to, in what looks like a repository to the linter."""
    (tmp_path / ".git").mkdir()
    for name in (".github", "scripts", ".ci"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in re.findall(r"tests/\S+", (ROOT / ".github/workflows/release.yml").read_text()):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


# ------------------------------------------------------------------------------------- as they are


def test_there_are_workflows_for_each_thing_that_is_shipped() -> None:
    assert WORKFLOWS == ["image.yml", "nix.yml", "release.yml", "test.yml"]


@pytest.mark.packaging
def test_the_linter_finds_nothing(copy: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is missing: apt-get install shellcheck")
    assert lint(copy, "shellcheck") == (0, "")


@pytest.mark.packaging
@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("vendor.github-workflows", [f".github/workflows/{name}" for name in WORKFLOWS]),
        ("vendor.dependabot", [".github/dependabot.yml"]),
    ],
    ids=["workflows", "dependabot"],
)
def test_schemas(schema: str, files: list[str]) -> None:
    code, told = run("check-jsonschema", "--builtin-schema", schema, *files, cwd=ROOT)
    assert code == 0, told


def test_an_action_has_one_hash_and_a_full_version() -> None:
    """So that an update is one change, and that what is meant can be looked up."""
    actions = [action for action, _ in pins()]
    assert len(actions) == len(set(actions)) > 8
    for _, pin in pins():
        assert re.fullmatch(r"[0-9a-f]{40} # v\d+\.\d+\.\d+", pin)


def test_every_script_that_is_run_is_there(copy: Path) -> None:
    assert missing_scripts(ROOT) == missing_scripts(copy) == set()


def test_the_pythons_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    prefix = "Programming Language :: Python :: "
    named = [name.removeprefix(prefix) for name in project["classifiers"] if prefix in name]
    assert pythons(ROOT) == [version for version in named if "." in version]
    assert project["requires-python"] == f">={pythons(ROOT)[0]}"


def test_only_a_release_may_publish() -> None:
    """Trusted publishing is bound to this file and environment: see docs/deployment.md."""
    jobs = {name: workflow(ROOT, name)["jobs"] for name in WORKFLOWS}
    publishing = [
        (name, job["environment"], sorted(job["needs"]))
        for name in WORKFLOWS
        for job in jobs[name].values()
        if any("gh-action-pypi-publish" in step.get("uses", "") for step in job.get("steps", ()))
    ]
    assert publishing == [("release.yml", "pypi", ["build", "test"])]
    # PyYAML reads the key `on` as true.
    assert workflow(ROOT, "release.yml")[True] == {"push": {"tags": ["v*"]}}  # type: ignore[index]


def test_the_image_has_the_arguments_of_the_dockerfile() -> None:
    taken = re.findall(r"^ARG (\w+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    (build,) = [
        step for step in steps_of(ROOT, "image.yml") if "build-push" in step.get("uses", "")
    ]
    given = [line.partition("=")[0] for line in build["with"]["build-args"].splitlines()]
    assert set(given) <= set(taken)


# ------------------------------------------------------------------------------------ broken ones

BROKEN = [
    ("runs-on: ${{ matrix.runner }}", "run-on: ubuntu-24.04", "[workflow-syntax]"),
    ("timeout-minutes: 90", "timeout-minute: 90", "[workflow-syntax]"),
    ("    timeout-minutes: 90\n", "", "[missing-timeout]"),
    ("permissions: {}\n", "", "[excessive-permissions]"),
    ("@3d3c42e5aac5ba805825da76410c181273ba90b1 # v7.0.1", "@v7", "[unpinned-uses]"),
    ("273ba90b1 # v7.0.1", "273ba90b1", "[missing-version-comment]"),
    ("contents: read", "contents: raed", "[invalid-permissions]"),
    ("matrix.python }} on", "matrix.pyton }} on", "[undefined-property]"),
    ("python-version: ${{", "python-versoin: ${{", "[unknown-action-input]"),
    ("ubuntu-24.04-arm", "ubuntu-24.04-arn", "[unknown-runner-label]"),
    ("mkdir -p ~/.cache/pip\n", "if mkdir -p ~/.cache/pip\n", "[shell-syntax]"),
    ("vars.PIP_EXTRA_INDEX_URL", "vars.PIP_EXTRA_INDEX", "[undefined-property]"),
]


@pytest.mark.packaging
@pytest.mark.parametrize(("old", "new", "rule"), BROKEN, ids=[rule for *_, rule in BROKEN])
def test_the_linter_finds_what_is_broken(copy: Path, old: str, new: str, rule: str) -> None:
    path = copy / ".github" / "workflows" / "test.yml"
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    code, told = lint(copy)
    assert code == 1
    assert rule in told


def test_a_missing_script_is_found(copy: Path) -> None:
    (copy / "scripts" / "release-notes").unlink()
    assert missing_scripts(copy) == {"scripts/release-notes"}


# ------------------------------------------------------------------------------- notes of a release

CHANGELOG = """# Changelog

## Unreleased

## 1.2.0 - 2026-11-22

### Added
- This.

## 1.1.0 - 2026-10-01

## 1.10.0 - 2026-09-01
- That.
"""


def test_the_notes_are_the_section_of_the_version() -> None:
    notes = load_script("release-notes").notes
    assert notes("v1.2.0", "1.2.0", CHANGELOG) == "### Added\n- This.\n"
    assert notes("v1.10.0", "1.10.0", CHANGELOG) == "- That.\n"


@pytest.mark.parametrize(
    ("tag", "version", "told"),
    [
        ("v1.2.0", "1.2.1", "v1.2.0 is not the tag of version 1.2.1: tag v1.2.1"),
        ("1.2.0", "1.2.0", "1.2.0 is not the tag of version 1.2.0: tag v1.2.0"),
        ("v1.3.0", "1.3.0", "CHANGELOG.md tells nothing under '## 1.3.0 - YYYY-MM-DD'"),
        ("v1.1.0", "1.1.0", "CHANGELOG.md tells nothing under '## 1.1.0 - YYYY-MM-DD'"),
    ],
    ids=["another version", "no v", "no section", "an empty section"],
)
def test_a_release_that_is_not_ready_is_refused(tag: str, version: str, told: str) -> None:
    with pytest.raises(ValueError) as refused:
        load_script("release-notes").notes(tag, version, CHANGELOG)
    assert str(refused.value) == told


def test_the_version_is_read_where_the_package_has_it() -> None:
    assert load_script("release-notes").current_version() == embedding_server.__version__
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "release-notes", "v0"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("v0 is not the tag of version ")
