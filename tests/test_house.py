# SPDX-License-Identifier: MIT OR Apache-2.0
"""The house rules that a machine can hold: floors, names, and what is imported when."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import httpx
import pytest
from live import environment, running_server

import embedding_server

PACKAGE = "embedding_server"
SOURCE = Path(embedding_server.__file__).parent
ROOT = Path(__file__).resolve().parent.parent

# From the ground up. A module stands on the floor of its longest prefix here; it may import what
# is below it, and what stands under the same prefix.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "logs", "machine", "processes"),
    ("telemetry",),
    ("settings",),
    ("engine",),
    ("backends",),
    ("models",),
    ("api", "embedder"),
    ("app", "corpus"),
    ("serving",),
    ("ray",),
    ("commands",),
    ("cli",),
    ("",),
)

WEB = {
    *("fastapi", "starlette", "pydantic"),
    *("uvicorn", "httptools", "hypercorn", "h11", "h2"),
}
HEAVY = {"torch", "transformers", "sentence_transformers"}


def module_name(path: Path) -> str:
    """``engine.batch`` of ``engine/batch.py``; the package itself is the empty name."""
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix("__init__")


MODULES = {
    module_name(path).removesuffix("."): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(SOURCE.rglob("*.py"))
}


def imports_of(name: str) -> Iterator[tuple[str, str | None]]:
    """``(module, name)`` of every import, wherever it stands in the module."""
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are absolute"
            assert node.module is not None
            yield from ((node.module, alias.name) for alias in node.names)


def own_imports_of(name: str) -> Iterator[str]:
    """The modules of this package that ``name`` imports, without the package's prefix."""
    for module, attribute in imports_of(name):
        if module == PACKAGE and attribute == "__version__":
            continue
        if module.partition(".")[0] == PACKAGE:
            own = module.removeprefix(PACKAGE).removeprefix(".")
            below = f"{own}.{attribute}".removeprefix(".")
            yield below if below in MODULES else own


def top_level_imports_of(name: str) -> set[str]:
    return {module.partition(".")[0] for module, _ in imports_of(name)}


def place_of(name: str) -> tuple[int, str]:
    """The floor that a module stands on, and the prefix that puts it there."""
    prefixes = [
        (floor, prefix)
        for floor, names in enumerate(FLOORS)
        for prefix in names
        if name == prefix or (prefix and name.startswith(prefix + "."))
    ]
    return max(prefixes, key=lambda place: len(place[1]))


# ------------------------------------------------------------------------------------------ floors


@pytest.mark.parametrize("name", MODULES, ids=lambda name: name or PACKAGE)
def test_imports_point_downwards(name: str) -> None:
    floor, prefix = place_of(name)
    for imported in own_imports_of(name):
        below, imported_prefix = place_of(imported)
        assert below < floor or imported_prefix == prefix, (
            f"{name} imports {imported}, which does not stand below it"
        )


def test_imports_go_in_no_circle() -> None:
    graph = {name: set(own_imports_of(name)) - {name} for name in MODULES if name}
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("name", MODULES, ids=lambda name: name or PACKAGE)
def test_only_the_http_layer_knows_the_web(name: str) -> None:
    http = place_of(name)[1] in ("api", "app", "serving", "ray")
    allowed = WEB if http else {"pydantic"} if name == "settings" else set()
    assert top_level_imports_of(name) & WEB <= allowed


@pytest.mark.parametrize(
    "name",
    [
        *("engine.scheduler", "engine.postprocess", "engine.batch"),
        *("engine.parameters", "engine.throughput"),
    ],
)
def test_decisions_are_pure(name: str) -> None:
    """No event loop, clock, thread, model or log where it is decided what is done next."""
    pure = {"__future__", "collections", "dataclasses", "heapq", "itertools", "typing", "numpy"}
    assert top_level_imports_of(name) - pure <= {PACKAGE}


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("api")])
def test_the_http_layer_computes_nothing(name: str) -> None:
    assert not {i for i in own_imports_of(name) if i.startswith("backends")}


# ------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", [name for name, tree in MODULES.items() if tree.body])
def test_all_is_explicit_and_true(name: str) -> None:
    """``__all__`` names what is there; other classes and functions have private names.

    Functions with a decorator are left out: FastAPI tells its users the names of routes.
    """
    module = importlib.import_module(f"{PACKAGE}.{name}".removesuffix("."))
    exported = module.__all__
    assert len(set(exported)) == len(exported)
    for attribute in exported:
        assert hasattr(module, attribute), f"{name} has no {attribute}"
    defined = {
        node.name
        for node in MODULES[name].body
        if isinstance(node, ast.ClassDef)
        or (isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not node.decorator_list)
    }
    public = {attribute for attribute in defined if not attribute.startswith("_")}
    assert public <= set(exported)


@pytest.mark.parametrize("name", MODULES, ids=lambda name: name or PACKAGE)
def test_only_exported_names_are_imported(name: str) -> None:
    for module, attribute in imports_of(name):
        own = module.removeprefix(PACKAGE).removeprefix(".")
        if module.partition(".")[0] != PACKAGE or f"{own}.{attribute}".strip(".") in MODULES:
            continue
        assert attribute in importlib.import_module(module).__all__, f"{module}.{attribute}"


@pytest.mark.parametrize("name", [name for name, tree in MODULES.items() if tree.body])
def test_every_module_says_what_it_is(name: str) -> None:
    docstring = ast.get_docstring(MODULES[name])
    assert docstring, f"{name} has no docstring"


def test_every_file_of_code_names_its_licence() -> None:
    """In the form of https://spdx.dev/learn/handling-license-info, which scanners read."""
    folders = ("src", "tests", "scripts", "benchmarks", ".ci", "deploy", "nix", ".github")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*") if file.is_file()]
    files += [ROOT / name for name in ("Dockerfile", "flake.nix", "embedding-server.py")]
    code = [
        file
        for file in files
        if file.exists() and file.stat().st_size and "__pycache__" not in file.parts
        if file.suffix in {".py", ".c", ".lua", ".nix", ".yml", ".yaml", ".service", ".socket"}
        or file.name == "Dockerfile"
        or file.read_bytes()[:2] == b"#!"
    ]
    assert len(code) > 150
    for file in code:
        head = file.read_text(encoding="utf-8").splitlines()[:2]
        named = [line for line in head if "SPDX-License-Identifier: MIT OR Apache-2.0" in line]
        assert named, f"{file} has no SPDX line"


def test_no_name_says_nothing() -> None:
    """``Manager``, ``Handler``, ``Helper`` and ``utils`` name no thing."""
    for name, tree in MODULES.items():
        names = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
        for said in (*names, *name.split(".")):
            assert not said.lower().endswith(("manager", "handler", "helper", "utils", "util"))


# --------------------------------------------------------------------------- what is imported when


def test_no_module_loads_torch() -> None:
    program = (
        "import importlib, json, sys\n"
        "for name in json.loads(sys.argv[1]): importlib.import_module(name)\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    names = [f"{PACKAGE}.{name}".removesuffix(".") for name in MODULES]
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(names)],
        env=environment(),
        capture_output=True,
        check=True,
    )
    assert HEAVY & set(json.loads(done.stdout)) == set()


def test_serving_needs_no_torch(tmp_path: Path) -> None:
    """With torch and transformers out of reach, as in an install without the extra."""
    blocked = "".join(f"sys.modules[{name!r}] = None\n" for name in sorted(HEAVY))
    (tmp_path / "sitecustomize.py").write_text(f"import sys\n{blocked}")
    env = {"PYTHONPATH": str(tmp_path)}
    with running_server("--model", "all-MiniLM-L6-v2", env=env) as server:
        request = {"model": "all-MiniLM-L6-v2", "input": "iPhone"}
        response = httpx.post(f"{server.url}/v1/embeddings", json=request)
    assert response.status_code == 200
    assert response.json()["data"][0]["dims"] == 384
