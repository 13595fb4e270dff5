# SPDX-License-Identifier: MIT OR Apache-2.0
"""flake.nix: evaluated for every system, and its own steps built, on a stub of nixpkgs."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from live import START_SECONDS, environment, free_port
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from readme import ROOT, blocks, commands, section

import embedding_server
from embedding_server.models.catalog import CATALOG, DEFAULT_MODELS

pytestmark = [
    pytest.mark.packaging,
    pytest.mark.skipif(not shutil.which("nix"), reason="needs nix: apt-get install nix-bin"),
]

STUB = Path("tests/deployment/nixpkgs_stub")
README = [command.partition("  #")[0].rstrip() for command in commands(section("### Nix"))]
FEATURES = shlex.split(README[0])[1].removeprefix("NIX_CONFIG=")
LINUX = ("x86_64-linux", "aarch64-linux")
SYSTEMS = (*LINUX, "aarch64-darwin")
HERE = "x86_64-linux"
MODEL = "all-MiniLM-L6-v2"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Whatever is printed of a package has been evaluated, its build's inputs included.
PRINTED = "{ inherit (p) name drvPath; meta = p.meta or null; }"
APPLY = f"builtins.mapAttrs (_: builtins.mapAttrs (_: p: {PRINTED}))"


@dataclass(frozen=True)
class Nix:
    """The nix command with a store of its own, in ``folder``, for the flake in ``tree``."""

    folder: Path
    tree: Path

    @property
    def environment(self) -> dict[str, str]:
        state = {
            "NIX_STORE_DIR": "store",
            "NIX_STATE_DIR": "state",
            "NIX_LOCALSTATE_DIR": "state",
            "NIX_LOG_DIR": "log",
            "NIX_CONF_DIR": "etc",
            "HOME": "home",
            "XDG_CACHE_HOME": "cache",
            "TMPDIR": "tmp",
        }
        inherited = {k: v for k, v in os.environ.items() if k not in ("NIX_REMOTE", "NIX_PATH")}
        ours = {name: str(self.folder / place) for name, place in state.items()}
        return {**inherited, **ours, "NIX_CONFIG": FEATURES}

    @property
    def stub(self) -> str:
        """The flags that put the stub in the place of nixpkgs."""
        return f"--offline --no-write-lock-file --override-input nixpkgs path:{self.tree / STUB}"

    def run(self, command: str, **env: str) -> subprocess.CompletedProcess[str]:
        """``command`` in a shell in the tree, to its end, whatever that is."""
        return subprocess.run(
            ["bash", "-c", command],
            cwd=self.tree,
            env={**self.environment, **env},
            capture_output=True,
            text=True,
            timeout=120,
        )

    def eval(self, output: str, apply: str, **env: str) -> Any:
        """The flake's ``output`` with ``apply`` called on it; raises NixError."""
        command = f"nix eval {self.stub} --json .#{output} --apply {shlex.quote(apply)}"
        done = self.run(command, **env)
        if done.returncode:
            raise NixError(done.stderr)
        return json.loads(done.stdout)

    def show(self) -> Any:
        """What `nix flake show` tells of the flake."""
        done = self.run(f"nix flake show {self.stub} --json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def evaluate(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Every output that the flake has."""
        packages = ("packages", "devShells", "checks")
        outputs = {name: self.eval(name, APPLY) for name in packages}
        return {**outputs, "apps": self.eval("apps", "x: x")}


class NixError(Exception):
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nix's store and state, for one user and without its sandbox, which takes user namespaces."""
    folder = tmp_path_factory.mktemp("nix")
    for name in ("etc", "home", "tmp"):
        (folder / name).mkdir()
    registry = folder / "etc" / "registry.json"
    registry.write_text('{"flakes": [], "version": 2}')
    settings = (
        f"sandbox = false\nbuild-users-group =\nsubstituters =\nflake-registry = {registry}\n"
    )
    (folder / "etc" / "nix.conf").write_text(settings)
    return folder


@pytest.fixture
def nix(folder: Path, tmp_path: Path) -> Nix:
    """A copy of what git tracks, which is what Nix sees of a flake; its stub runs our Python."""
    tree = tmp_path / "tree"
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    (tree / STUB / "host.nix").write_text(host())
    return Nix(folder, tree)


def host(**versions: str) -> str:
    older = "".join(f'{name} = "{version}"; ' for name, version in versions.items())
    pytest_arguments = "tests/test_embedder.py -k golden"
    python = f'python = "{sys.executable}"; pytest = "{pytest_arguments}";'
    return f"{{ {python} versions = {{ {older}}}; }}\n"


def replace(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{file} has {old!r} {text.count(old)} times"
    file.write_text(text.replace(old, new), encoding="utf-8")


def value(nix: Nix, expression: str) -> Any:
    done = nix.run(f"nix eval --json --impure --expr {shlex.quote(expression)}")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def hashes(nix: Nix) -> dict[str, str]:
    """nix/model-hashes.nix, with "none yet" for its fakeHash."""
    return dict(value(nix, 'import ./nix/model-hashes.nix { fakeHash = "none yet"; }'))


# -------------------------------------------------------------------------------------- evaluation


def test_every_output_is_evaluated(nix: Nix) -> None:
    outputs = nix.evaluate()
    always = {"default", "embedding-server", *(f"model-{name}" for name in hashes(nix))}
    shown = nix.show()
    assert set(shown) == set(outputs)
    for name, kind in outputs.items():
        assert set(kind) == set(SYSTEMS), name
        assert {system: set(kind[system]) for system in kind} == {
            system: set(shown[name][system]) for system in shown[name]
        }
    for system in SYSTEMS:
        image = {"docker-image"} if system in LINUX else set()
        assert set(outputs["packages"][system]) == always | image
        assert set(outputs["apps"][system]) == {"default", "embedding-server"}
        assert set(outputs["devShells"][system]) == {"default"}
        assert set(outputs["checks"][system]) == {"tests"}
        assert (
            outputs["packages"][system]["default"]["meta"]["description"]
            == (PROJECT["description"])
        )
    assert (nix.tree / ".envrc").read_text() == "use flake\n"


def test_every_input_is_declared(nix: Nix) -> None:
    """Nix looks an undeclared one up in a registry, whatever that has on the day."""
    inputs = value(nix, "builtins.attrNames (import ./flake.nix).inputs")
    arguments = value(
        nix, "builtins.attrNames (builtins.functionArgs (import ./flake.nix).outputs)"
    )
    assert {*inputs, "self"} == set(arguments)


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("flake.nix", "{ self, nixpkgs }:", "{ self }:", "undefined variable 'nixpkgs'"),
        ("flake.nix", "{ self, nixpkgs }:", "{ self, nixpkgs, utils }:", "flake:utils"),
        ("flake.nix", '"checks"', '"check"', "attribute 'check' missing"),
        ("nix/default.nix", "requirements.runtime", "requirements.runtme", "'runtme' missing"),
        ("nix/default.nix", "pkgs.mkShell", "pkgs.makeShell", "'makeShell' missing"),
        ("nix/package.nix", "  dependencies =", "  dependancies =", "argument 'dependencies'"),
        ("nix/package.nix", "lib.licenses.asl20", "lib.licenses.apache2", "'apache2' missing"),
        ("nix/model.nix", "${cacert}", "${cacerts}", "undefined variable 'cacerts'"),
        ("nix/model.nix", "proxyImpureEnvVars", "proxyEnvVars", "'proxyEnvVars' missing"),
        ("nix/image.nix", "ExposedPorts", "ExposedPort", "argument 'ExposedPorts'"),
        ("nix/image.nix", "buildLayeredImage", "layeredImage", "'layeredImage' missing"),
        ("nix/tests.nix", "${tree}", "${three}", "undefined variable 'three'"),
        ("nix/model-package.nix", "${model}", "${modle}", "undefined variable 'modle'"),
        ("nix/model-hashes.nix", f"{MODEL} =", f"{MODEL}x =", f"attribute '{MODEL}' missing"),
        ("pyproject.toml", '"fastapi>', '"fastpai>', "nixpkgs has no Python package fastpai"),
        ("pyproject.toml", '"httpie>', '"httpy>', "nixpkgs has no Python package httpy"),
        ("pyproject.toml", '"hatchling>', '"hatchlin>', "nixpkgs has no Python package hatchlin"),
        ("pyproject.toml", "sys_platform != 'win32'", "os_name == 'nt'", "where its marker holds"),
        ("pyproject.toml", '"tqdm>=4.66"', '"tqdm @ file:///tqdm"', "can't read"),
    ],
)
def test_what_is_wrong_is_not_evaluated(nix: Nix, file: str, old: str, new: str, said: str) -> None:
    replace(nix.tree / file, old, new)
    with pytest.raises(NixError, match=re.escape(said)):
        nix.evaluate()


def names_of(requirements: Sequence[str]) -> list[str]:
    """Their normalised names, with an extra of our own for what it brings."""
    found = []
    for requirement in map(Requirement, requirements):
        if requirement.name == PROJECT["name"]:
            for extra in sorted(requirement.extras):
                found += names_of(PROJECT["optional-dependencies"][extra])
        else:
            found.append(str(canonicalize_name(requirement.name)))
    return found


def test_dependencies_are_those_of_pyproject(nix: Nix) -> None:
    names = "map (package: package.pname)"
    runtime, extras, relaxed = nix.eval(
        f"packages.{HERE}.embedding-server",
        f"p: [ ({names} p.propagatedBuildInputs) "
        f"(builtins.mapAttrs (_: {names}) p.optional-dependencies) p.pythonRelaxDeps ]",
    )
    assert runtime == names_of(PROJECT["dependencies"])
    assert {name: sorted(brought) for name, brought in extras.items()} == {
        name: sorted(names_of(extra)) for name, extra in PROJECT["optional-dependencies"].items()
    }
    assert relaxed == []


def test_an_older_nixpkgs_is_taken_and_said(nix: Nix) -> None:
    (nix.tree / STUB / "host.nix").write_text(host(onnxruntime="1.20.1", tqdm="4.66"))
    attribute = f".#packages.{HERE}.embedding-server.pythonRelaxDeps"
    done = nix.run(f"nix eval {nix.stub} --json {attribute}")
    assert json.loads(done.stdout) == ["onnxruntime"]
    wanted = next(Requirement(r) for r in PROJECT["dependencies"] if r.startswith("onnxruntime"))
    bound = next(s.version for s in wanted.specifier if s.operator == ">=")
    assert f"onnxruntime 1.20.1 (wanted: {bound})" in done.stderr


def test_only_models_need_impure_derivations(nix: Nix) -> None:
    flakes = "extra-experimental-features = nix-command flakes"
    assert nix.eval(f"packages.{HERE}.default", "p: p.drvPath", NIX_CONFIG=flakes)
    assert nix.eval(f"apps.{HERE}.default", "app: app.program", NIX_CONFIG=flakes)
    with pytest.raises(NixError, match="'impure-derivations' is disabled"):
        nix.eval(f"packages.{HERE}.docker-image", "p: p.drvPath", NIX_CONFIG=flakes)


# ------------------------------------------------------------------------------------------ models


def test_models_stand_in_the_catalog_alone(nix: Nix) -> None:
    table = hashes(nix)
    assert set(DEFAULT_MODELS) <= set(table)
    assert set(table) == {name for name, model in CATALOG.items() if model.revision}
    code = "".join(file.read_text() for file in sorted((ROOT / "nix").glob("*.nix")))
    for model in CATALOG.values():
        for fact in filter(None, (model.repo, model.revision, model.sha256, model.package)):
            assert fact not in code
    assert "safetensors" not in code
    assert ".json" not in code


def test_a_model_is_pulled_impurely_and_pinned(nix: Nix) -> None:
    """With the packaged copy of the model for the hub's, as there is no way to a hub here."""
    known = hashes(nix)[MODEL]
    build = f"nix build {nix.stub} --no-link --json '.#model-{MODEL}'"
    table = nix.tree / "nix" / "model-hashes.nix"
    pinned = table.read_text()

    # A model whose hash isn't known yet: the first build tells it.
    replace(table, f'"{known}"', "fakeHash")
    first = nix.run(build)
    assert first.returncode != 0
    assert f"{MODEL}-pulled.drv" in first.stderr
    got = re.search(r"got: +(sha256-\S+)", first.stderr)
    assert got is not None, first.stderr
    assert got[1] == known

    table.write_text(pinned)
    done = nix.run(build)
    assert done.returncode == 0, done.stderr
    output = Path(json.loads(done.stdout)[0]["outputs"]["out"])
    assert [path.name for path in output.iterdir()] == [MODEL]
    assert (output / MODEL / "model.safetensors").is_file()
    hashed = nix.run(f"nix hash path {output}")
    assert hashed.stdout.strip() == known

    # Once it is in the store, nothing is pulled.
    again = nix.run(build)
    assert json.loads(again.stdout) == json.loads(done.stdout)
    assert "building" not in again.stderr


# ---------------------------------------------------------------------------------------- commands


@contextmanager
def serving(
    command: Sequence[str], env: Mapping[str, str], cwd: Path, log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """What ``command`` starts, once it is ready on the port that ``env`` names."""
    with log.open("wb") as out:
        server = subprocess.Popen(command, env=env, cwd=cwd, stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + START_SECONDS
        ready = f"http://127.0.0.1:{env['EMBEDDING_SERVER_PORT']}/health/ready"
        while not answers(ready):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield server
        server.terminate()
        assert server.wait(30) == 0, log.read_text()
    finally:
        server.kill()
        server.wait()


def answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


def dimensions(port: str) -> int:
    request = {"model": MODEL, "input": "iPhone"}
    answer = httpx.post(f"http://127.0.0.1:{port}/v1/embeddings", json=request)
    return int(answer.raise_for_status().json()["data"][0]["dims"])


def lock_to_stub(nix: Nix) -> None:
    done = nix.run(f"nix flake lock --offline --override-input nixpkgs path:{nix.tree / STUB}")
    assert done.returncode == 0, done.stderr


def test_an_image_of_other_models(nix: Nix) -> None:
    """As docs/deployment.md has it; only planned, for its second model can't be had here."""
    page = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    (expression,) = blocks(page, "nix")
    lock_to_stub(nix)
    done = nix.run(f"nix build --offline --impure --dry-run --expr {shlex.quote(expression)}")
    assert done.returncode == 0, done.stderr
    planned = set(re.findall(r"/[a-z0-9]{32}-(\S+)-pulled\.drv", done.stderr))
    assert DEFAULT_MODELS[-1] in planned
    assert planned <= {MODEL, DEFAULT_MODELS[-1]}  # the first may be in the store


def test_readme(nix: Nix, tmp_path: Path) -> None:
    """Its commands, one after the other in one checkout, with the stub as its nixpkgs."""
    _, lock, serve, build, image, develop, check = README

    assert lock == "nix flake lock"
    lock_to_stub(nix)
    assert "nixpkgs" in json.loads((nix.tree / "flake.lock").read_text())["nodes"]

    port = str(free_port())
    env = {**environment(nix.environment), "EMBEDDING_SERVER_PORT": port}
    with serving(shlex.split(serve), env, nix.tree, tmp_path / "run.log"):
        assert dimensions(port) == 384

    done = nix.run(build)
    assert done.returncode == 0, done.stderr
    done = nix.run("result/bin/embedding-server --version")
    assert done.stdout == f"embedding-server {embedding_server.__version__}\n"

    done = nix.run(image)
    assert done.returncode == 0, done.stderr
    image_serves(nix.tree / "result", tmp_path / "image.log")

    done = nix.run(develop)
    assert done.returncode == 0, done.stderr
    assert "1 passed" in done.stdout
    # The model it found is not the one that is installed with our Python.
    package = str(CATALOG[MODEL].package).partition("/")[0]
    done = nix.run(f"nix develop --command python -c 'import {package} as p; print(p.__file__)'")
    assert done.stdout.startswith(str(nix.folder / "store")), done.stderr

    done = nix.run(f"{check} --print-build-logs")
    assert done.returncode == 0, done.stderr
    assert re.search(r"embedding-server-tests> .* 1 passed", done.stderr), done.stderr


def image_serves(image: Path, log: Path) -> None:
    """Its own command and environment serve its own model, on another port."""
    config = json.loads((image / "config.json").read_text())
    assert config["Cmd"] == ["serve"]
    assert config["ExposedPorts"] == {"5000/tcp": {}}
    assert config["User"] == "65532:65532"
    env = dict(line.split("=", 1) for line in config["Env"])
    assert env["EMBEDDING_SERVER_HOST"] == "0.0.0.0"
    assert env["EMBEDDING_SERVER_PORT"] == "5000"
    assert env["EMBEDDING_SERVER_LOAD_MODELS_FROM"] == "/models"
    assert env["HF_HUB_OFFLINE"] == "1"
    assert [path.name for path in (image / "root" / "models").iterdir()] == [MODEL]

    port = str(free_port())
    env["EMBEDDING_SERVER_HOST"] = "127.0.0.1"
    env["EMBEDDING_SERVER_PORT"] = port
    env["EMBEDDING_SERVER_LOAD_MODELS_FROM"] = str(image / "root" / "models")
    with serving([*config["Entrypoint"], *config["Cmd"]], env, image, log):
        assert dimensions(port) == 384
        assert httpx.get(f"http://127.0.0.1:{port}/v1/models").json()["data"] == [MODEL]
    assert "warning" not in log.read_text()
