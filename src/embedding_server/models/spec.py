# SPDX-License-Identifier: MIT OR Apache-2.0
"""The model that a user names: by its name in the catalog, by its hub id, or by its folder."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from embedding_server.errors import ConfigurationError, ModelUnavailable
from embedding_server.models.catalog import CATALOG, CatalogModel

__all__ = ["ModelSpec", "is_folder", "is_model_folder", "parse_spec"]

_REPO = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_](?:[\w.-]*\w)?", re.ASCII)
_REVISION = re.compile(r"(?!.*(?:\.\.|//))\w[\w.+/-]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Where a model may come from, which file it must then have, and how it is served."""

    name: str
    """Its name in the catalog, on the hub or in the file system."""
    repo: str | None = None
    revision: str | None = None
    folder: Path | None = None
    """The only place that is searched, if the user names it."""
    sha256: str | None = None
    """Digest of ``model.safetensors``, if the catalog has it."""
    package: str | None = None
    """``package/folder`` of an installed Python package that contains the model."""
    requested: bool = True
    """Whether the user named it; otherwise it is one of the default models."""
    alias: str | None = None
    """The name it is served under, if that is another one."""

    @property
    def served_name(self) -> str:
        return self.alias or self.name

    @property
    def hub_id(self) -> str:
        """``org/name`` or ``org/name@revision``, as `parse_spec` takes it."""
        return f"{self.repo}@{self.revision}" if self.revision else str(self.repo)

    def hub_ids(self, commit: str | None) -> tuple[str, ...]:
        """``org/name@revision`` with the ``commit`` found, and with the revision that was named.

        Empty if the commit is not known.
        """
        if self.repo is None or commit is None:
            return ()
        return tuple(f"{self.repo}@{revision}" for revision in (commit, self.revision) if revision)

    @property
    def title(self) -> str:
        """The name, followed by the hub id."""
        return f"{self.name} ({self.hub_id})" if self.repo else self.name


def parse_spec(text: str, *, revision: str | None = None) -> ModelSpec:
    """Read a catalog name, a hub id, either with ``@revision``, or a folder.

    ``revision`` is the value of --revision. Raises ModelUnavailable for a missing folder and for
    text of none of these forms, and ConfigurationError where ``revision`` can't apply.
    """
    spec = _parse(text.strip(), revision)
    if revision and spec.revision != revision:
        conflict = "is a folder" if spec.folder else f"names the revision {spec.revision} itself"
        raise ConfigurationError(
            f"--revision {revision} can't apply to {text}, which {conflict}: leave one of the two "
            "out (--revision may also come from EMBEDDING_SERVER_REVISION or the TOML file)."
        )
    return spec


def _parse(text: str, revision: str | None) -> ModelSpec:
    # Path.expanduser raises for a user without a home, as in many containers.
    path = Path(os.path.expanduser(text))  # noqa: PTH111
    if text.startswith((".", "/", "~")) or path.is_absolute():
        if not is_folder(path):
            raise ModelUnavailable(f"there is no folder {text}: give the path of a model's folder")
        return _folder_spec(path)
    bare, at, own_revision = text.partition("@")
    if at or revision:
        revision = own_revision if at else revision
        if not _REVISION.fullmatch(revision or ""):
            raise ModelUnavailable(
                f"{revision!r} is no revision: give a branch, tag or commit, as in org/name@main"
            )
    if bare in CATALOG:
        return _catalog_spec(CATALOG[bare], revision)
    if text and is_folder(path) and ("/" not in text or is_model_folder(path)):
        return _folder_spec(path)
    if _REPO.fullmatch(bare):
        for row in CATALOG.values():
            if row.repo.lower() == bare.lower():
                return _catalog_spec(row, revision)
        name = bare.partition("/")[2]
        return ModelSpec(name=name, repo=bare, revision=revision)
    raise ModelUnavailable(
        f"{text!r} is no model: give one of {', '.join(CATALOG)}, a hub id as org/name or "
        "org/name@revision, or the path of a folder as ./folder"
    )


def is_folder(path: Path) -> bool:
    """Whether the folder exists; never raises."""
    # Path.is_dir raises for a name that is too long and below a folder without permission.
    return os.path.isdir(path)  # noqa: PTH112


def is_model_folder(path: Path) -> bool:
    """Whether the folder ``path`` holds config.json or modules.json; never raises."""
    names = ("config.json", "modules.json")
    return any(os.path.isfile(path / name) for name in names)  # noqa: PTH113


def _folder_spec(path: Path) -> ModelSpec:
    name = (path.resolve() if path.name in ("", "..") else path).name
    return ModelSpec(name=name or "model", folder=path)


def _catalog_spec(row: CatalogModel, revision: str | None) -> ModelSpec:
    pinned = revision is None or revision == row.revision
    return ModelSpec(
        name=row.name,
        repo=row.repo,
        revision=row.revision if pinned else revision,
        # The digest and the package are those of the row's revision only.
        sha256=row.sha256 if pinned else None,
        package=row.package if pinned else None,
    )
