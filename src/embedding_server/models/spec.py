# SPDX-License-Identifier: MIT OR Apache-2.0
"""A model as asked for, read from a name: of the catalog, of the hub, or of a folder."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from embedding_server.errors import ModelUnavailable
from embedding_server.models.catalog import CATALOG, CatalogModel

__all__ = ["ModelSpec", "is_folder", "is_model_folder", "parse_spec"]

_REPO = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_](?:[\w.-]*\w)?", re.ASCII)
_REVISION = re.compile(r"(?!.*(?:\.\.|//))\w[\w.+/-]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model as asked for: where it may come from, and what it must then be."""

    name: str
    """Its name in the catalog, on the hub or in the file system."""
    repo: str | None = None
    revision: str | None = None
    folder: Path | None = None
    """Given by the user: nowhere else is looked."""
    sha256: str | None = None
    """Of ``model.safetensors``."""
    package: str | None = None
    """``package/folder`` of an installed Python package that carries the model."""
    requested: bool = True
    """Asked for by name, rather than one of the defaults."""
    alias: str | None = None
    """What it is served as, if not by its name."""

    @property
    def served_name(self) -> str:
        return self.alias or self.name

    @property
    def hub_id(self) -> str:
        """``org/name`` or ``org/name@revision``, as `parse_spec` takes it."""
        return f"{self.repo}@{self.revision}" if self.revision else str(self.repo)

    def hub_ids(self, commit: str | None) -> tuple[str, ...]:
        """``org/name@revision`` with the ``commit`` found, and with the revision asked for.

        Empty where it is not known which commit it is.
        """
        if self.repo is None or commit is None:
            return ()
        return tuple(f"{self.repo}@{revision}" for revision in (commit, self.revision) if revision)

    @property
    def title(self) -> str:
        """The name, and what it stands for."""
        return f"{self.name} ({self.hub_id})" if self.repo else self.name


def parse_spec(text: str, *, revision: str | None = None, requested: bool = True) -> ModelSpec:
    """Read a catalog name, a hub id, either with ``@revision``, or a folder.

    ``revision`` is for names that carry none, and means nothing to a folder.
    Raises ModelUnavailable for a missing folder and for what is none of these.
    """
    text = text.strip()
    # Path.expanduser raises for a user without a home, as many a container's has none.
    path = Path(os.path.expanduser(text))  # noqa: PTH111
    if text.startswith((".", "/", "~")) or path.is_absolute():
        if not is_folder(path):
            raise ModelUnavailable(f"there is no folder {text}: give the path of a model's folder")
        return _folder_spec(path, requested)
    bare, at, own_revision = text.partition("@")
    if at or revision:
        revision = own_revision if at else revision
        if not _REVISION.fullmatch(revision or ""):
            raise ModelUnavailable(
                f"{revision!r} is no revision: give a branch, tag or commit, as in org/name@main"
            )
    if (row := CATALOG.get(bare)) is not None:
        return _catalog_spec(row, revision, requested)
    if text and is_folder(path) and ("/" not in text or is_model_folder(path)):
        return _folder_spec(path, requested)
    if _REPO.fullmatch(bare):
        for row in CATALOG.values():
            if row.repo.lower() == bare.lower():
                return _catalog_spec(row, revision, requested)
        name = bare.partition("/")[2]
        return ModelSpec(name=name, repo=bare, revision=revision, requested=requested)
    raise ModelUnavailable(
        f"{text!r} is no model: give one of {', '.join(CATALOG)}, a hub id as org/name or "
        "org/name@revision, or the path of a folder as ./folder"
    )


def is_folder(path: Path) -> bool:
    """Whether there is such a folder; never raises."""
    # Path.is_dir raises for a name too long and in a folder that we may not look into.
    return os.path.isdir(path)  # noqa: PTH112


def is_model_folder(path: Path) -> bool:
    """Whether the folder ``path`` holds config.json or modules.json; never raises."""
    names = ("config.json", "modules.json")
    return any(os.path.isfile(path / name) for name in names)  # noqa: PTH113


def _folder_spec(path: Path, requested: bool) -> ModelSpec:
    name = (path.resolve() if path.name in ("", "..") else path).name
    return ModelSpec(name=name or "model", folder=path, requested=requested)


def _catalog_spec(row: CatalogModel, revision: str | None, requested: bool) -> ModelSpec:
    pinned = revision is None or revision == row.revision
    return ModelSpec(
        name=row.name,
        repo=row.repo,
        revision=row.revision if pinned else revision,
        # The digest and the package are of the row's own revision and say nothing of another.
        sha256=row.sha256 if pinned else None,
        package=row.package if pinned else None,
        requested=requested,
    )
