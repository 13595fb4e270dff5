# SPDX-License-Identifier: MIT OR Apache-2.0
"""The ``models`` command: list models, show one, save some elsewhere, and verify one."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from embedding_server.commands.options import MODEL_NAME, add_settings
from embedding_server.commands.tables import print_rows, print_table
from embedding_server.errors import EmbeddingServerError, ModelUnavailable
from embedding_server.settings import Settings

if TYPE_CHECKING:  # what an action needs is imported by it, so that --help shows at once
    from embedding_server.models.spec import ModelSpec

__all__ = ["add_options", "list_models", "pull_models", "run", "show_model", "verify_model"]

_HELP = {
    "list": "what would be served, where it is, and its size",
    "info": "what a model is, and which backend computes it and why",
    "pull": "save models in the hub's layout, whole and byte for byte",
    "verify": "compare a model's vectors with those of sentence-transformers (needs the extra "
    "[torch]); exits with 1 if a value differs by more than 1e-5, with 2 if they can't be compared",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the actions of ``models`` and their options."""
    parser.description = "The models that can be served."
    actions = parser.add_subparsers(dest="action", metavar=" | ".join(_HELP), required=True)
    parsers = {}
    for action, help in _HELP.items():
        parsers[action] = actions.add_parser(
            action, help=help, description=f"{help[0].upper()}{help[1:]}.", allow_abbrev=False
        )
    parsers["list"].add_argument("--json", action="store_true", help="one JSON object a line")
    parsers["info"].add_argument("name", help=MODEL_NAME)
    parsers["pull"].add_argument("name", nargs="+", help=MODEL_NAME)
    parsers["pull"].add_argument(
        "--to", required=True, type=Path, metavar="DIR", help="the models are saved as DIR/<name>"
    )
    parsers["verify"].add_argument("name", help=MODEL_NAME)
    parsers["verify"].add_argument(
        "--write",
        type=Path,
        metavar="DIR",
        help="if the model is exact, write some of sentence-transformers' vectors to "
        "DIR/reference_vectors.npz; a model whose folder has that file is checked against it at "
        "each start",
    )
    for action, single in parsers.items():
        add_settings(single, action)


def run(settings: Settings, arguments: argparse.Namespace) -> int:
    """Run the chosen action; returns the exit code."""
    match arguments.action:
        case "list":
            return list_models(settings, as_json=arguments.json)
        case "info":
            return show_model(settings, arguments.name)
        case "pull":
            return pull_models(settings, arguments.name, arguments.to)
        case _:
            return verify_model(settings, arguments.name, arguments.write)


def list_models(settings: Settings, *, as_json: bool) -> int:
    """Print what ``serve`` would serve, where each model was found, and its size; returns 0."""
    from embedding_server.models.choice import specs_of

    models = [_describe(spec, settings) for spec in specs_of(settings)]
    if as_json:
        for model in models:
            sys.stdout.write(json.dumps(model) + "\n")
        return 0
    rows = [
        (
            str(model["name"]),
            str(model["origin"] or "-"),
            _megabytes(model["bytes"]),
            str(model["folder"] or model["problem"] or f"to be downloaded from {model['repo']}"),
        )
        for model in models
    ]
    print_table(("NAME", "FOUND IN", "SIZE", "WHERE"), rows, left=4)
    return 0


def pull_models(settings: Settings, names: Sequence[str], to: Path) -> int:
    """Save each of ``names`` as ``to/<name>``; returns 0, or raises ModelUnavailable."""
    from embedding_server.models.choice import specs_named
    from embedding_server.models.pull import pull

    specs = specs_named(names, settings.revision)
    to.mkdir(parents=True, exist_ok=True)
    for spec in specs:
        folder = pull(
            spec,
            to,
            models_dir=settings.load_models_from,
            token=settings.hub_token,
            onnx_file=settings.onnx_file,
        )
        sys.stdout.write(f"{folder}\n")
    return 0


def show_model(settings: Settings, name: str) -> int:
    """Load ``name`` and print what it is and how it would be computed; returns 0."""
    from embedding_server.embedder import Embedder

    with Embedder.from_settings(name, settings) as embedder:
        info = embedder.info
    prompts = ", ".join(f"{key} {text!r}" for key, text in info.prompts.items())
    sizes = ", ".join(map(str, info.dimensions or ()))
    rows = (
        ("name", info.name),
        ("architecture", info.architecture),
        ("dimensions", str(info.dims)),
        ("Matryoshka sizes", sizes or "none"),
        ("max tokens", str(info.max_tokens)),
        ("pooling", info.pooling),
        ("prompts", prompts or "none"),
        ("default prompt", info.default_prompt or "none"),
        ("backend", f"{info.backend} ({info.backend_reason})"),
        ("revision", info.revision or "unknown"),
        ("sha256", info.sha256 or "unknown"),
        ("fingerprint", info.fingerprint),
    )
    print_rows(rows)
    return 0


def verify_model(settings: Settings, name: str, write: Path | None) -> int:
    """Compare ``name`` with sentence-transformers and print the result.

    If it is exact, its reference vectors are written to the folder ``write``. Returns 0 if it is
    exact, 1 if not, and 2 if they could not be compared or written.
    """
    from embedding_server.commands.verify import (
        print_verification,
        verify_vectors,
        write_reference,
    )
    from embedding_server.embedder import Embedder

    try:
        with Embedder.from_settings(name, settings) as embedder:
            result = verify_vectors(embedder, embedder.folder)
        print_verification(result)
        if write is not None and result.exact:
            sys.stdout.write(f"{write_reference(result, write)}\n")
    except EmbeddingServerError as error:
        sys.stderr.write(f"embedding-server: {error}\n")
        return 2
    return 0 if result.exact else 1


def _describe(spec: ModelSpec, settings: Settings) -> dict[str, object]:
    from embedding_server.models.hub import locate

    model: dict[str, object] = {"name": spec.name, "repo": spec.repo, "revision": spec.revision}
    try:
        located = locate(
            spec,
            models_dir=settings.load_models_from,
            download=False,
            onnx_file=settings.onnx_file,
        )
    except ModelUnavailable as error:
        problem = None if spec.repo else str(error)
        return model | {"origin": None, "folder": None, "bytes": None, "problem": problem}
    files = (path for path in located.folder.rglob("*") if path.is_file())
    return model | {
        "revision": located.revision,
        "origin": located.origin,
        "folder": str(located.folder),
        "bytes": sum(path.stat().st_size for path in files),
        "problem": None,
    }


def _megabytes(size: object) -> str:
    return f"{size / 1e6:.1f} MB" if isinstance(size, int) else "-"
