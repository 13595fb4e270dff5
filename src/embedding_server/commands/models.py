# SPDX-License-Identifier: MIT OR Apache-2.0
"""The ``models`` command: what there is, what it is, where it lies, and saving it elsewhere."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from embedding_server.commands.verify import print_verification, verify_vectors, write_reference
from embedding_server.embedder import Embedder
from embedding_server.errors import EmbeddingServerError, ModelUnavailable
from embedding_server.models.choice import specs_named, specs_of
from embedding_server.models.hub import locate
from embedding_server.models.pull import pull
from embedding_server.models.spec import ModelSpec
from embedding_server.settings import Settings

__all__ = ["list_models", "pull_models", "show_model", "verify_model"]


def list_models(settings: Settings, *, as_json: bool) -> int:
    """Print what ``serve`` would serve, where each model was found, and its size; returns 0."""
    rows = [_row(spec, settings) for spec in specs_of(settings)]
    if as_json:
        for row in rows:
            sys.stdout.write(json.dumps(row) + "\n")
        return 0
    lines = [("NAME", "FOUND IN", "SIZE", "WHERE")]
    lines += [
        (
            str(row["name"]),
            str(row["origin"] or "-"),
            _megabytes(row["bytes"]),
            str(row["folder"] or row["problem"] or f"to be downloaded from {row['repo']}"),
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line[:3], widths, strict=True)]
        sys.stdout.write("  ".join([*cells, line[3]]) + "\n")
    return 0


def pull_models(settings: Settings, names: list[str], to: Path) -> int:
    """Save each of ``names`` as ``to/<name>``; returns 0, or raises ModelUnavailable."""
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
    for label, value in rows:
        sys.stdout.write(f"{label:<17} {value}\n")
    return 0


def verify_model(settings: Settings, name: str, write: Path | None) -> int:
    """Compare ``name`` with sentence-transformers and print the result.

    If it is exact, its reference vectors are written to the folder ``write``. Returns 0 if it is
    exact, 1 if not, and 2 if they could not be compared or written.
    """
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


def _row(spec: ModelSpec, settings: Settings) -> dict[str, object]:
    row: dict[str, object] = {"name": spec.name, "repo": spec.repo, "revision": spec.revision}
    try:
        located = locate(
            spec,
            models_dir=settings.load_models_from,
            download=False,
            onnx_file=settings.onnx_file,
        )
    except ModelUnavailable as error:
        problem = None if spec.repo else str(error)
        return row | {"origin": None, "folder": None, "bytes": None, "problem": problem}
    files = (path for path in located.folder.rglob("*") if path.is_file())
    return row | {
        "revision": located.revision,
        "origin": located.origin,
        "folder": str(located.folder),
        "bytes": sum(path.stat().st_size for path in files),
        "problem": None,
    }


def _megabytes(size: object) -> str:
    return f"{size / 1e6:.1f} MB" if isinstance(size, int) else "-"
