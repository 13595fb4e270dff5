# SPDX-License-Identifier: MIT OR Apache-2.0
"""Saves a model as a folder, for a machine without network."""

from __future__ import annotations

import filecmp
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from embedding_server.errors import ModelUnavailable
from embedding_server.models.files import names_in
from embedding_server.models.hub import LocatedModel, locate, verify
from embedding_server.models.reference import REFERENCE_FILE
from embedding_server.models.spec import ModelSpec

__all__ = ["pull"]

_log = logging.getLogger("embedding_server.models")


def pull(
    spec: ModelSpec,
    destination: Path,
    *,
    models_dir: Path | None = None,
    token: str | None = None,
    onnx_file: str | None = None,
) -> Path:
    """Save the model as ``destination/<name>`` in one rename, and return that folder.

    A folder with the same files is left as it is; other files are never overwritten.
    Raises ModelUnavailable, also if the destination can't be written.
    """
    located = locate(spec, models_dir=models_dir, token=token, onnx_file=onnx_file)
    verify(located, onnx_file=onnx_file)
    target = destination / spec.name
    # On the same file system as the target, so that it can be renamed.
    part = destination / f".{spec.name}.{os.getpid()}.part"
    try:
        files = _files_to_copy(located)
        if target.exists():
            if _same_files(files, target):
                return target
            raise ModelUnavailable(
                f"{target} is there already and is not {spec.title} as found in "
                f"{located.folder}: remove it, or pull into another folder"
            )
        _log.info("copying %s from %s to %s", spec.name, located.folder, target)
        for name, source in files.items():
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, part / name)
        part.rename(target)
    except OSError as error:
        raise ModelUnavailable(
            f"{spec.name} could not be saved to {target} ({error.strerror or error}): "
            "pull into a folder that can be written and has the room"
        ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def _files_to_copy(located: LocatedModel) -> dict[str, Path]:
    """Relative name -> file; in a folder of the user, links that leave it are refused."""
    root = located.folder
    files = {}
    for path in sorted(root.rglob("*")):
        if located.origin == "package" and (path.name == "__init__.py" or path.suffix == ".pyc"):
            continue
        if path.is_symlink() and located.origin in ("folder", "models-dir"):
            real = path.resolve()
            if not real.is_relative_to(root.resolve()) or not real.is_file():
                raise ModelUnavailable(
                    f"{path} links to {real}, which is no file of that folder: "
                    "put the file itself there"
                )
        if path.is_file():
            files[path.relative_to(root).as_posix()] = path
    return files


def _same_files(files: Mapping[str, Path], folder: Path) -> bool:
    # The reference file may have been added by `models verify --write`.
    return names_in(folder) in (set(files), {*files, REFERENCE_FILE}) and all(
        filecmp.cmp(source, folder / name, shallow=False) for name, source in files.items()
    )
