# SPDX-License-Identifier: MIT OR Apache-2.0
"""The tensors of a model's safetensors files: where each lies, and its values when needed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from embedding_server.errors import ModelNotSupported

__all__ = ["Tensor", "Weights", "name_some", "not_matching"]

_HEADER_SIZE = 8  # little-endian uint64 before the JSON header, as the format defines

_SHARD_NAME = re.compile(r"[\w-][\w.-]*\.safetensors", re.ASCII)

_INTEGERS: Mapping[str, Any] = {"I32": np.dtype("<i4"), "I64": np.dtype("<i8")}
_DTYPES: Mapping[str, Any] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where one tensor lies: ``length`` bytes from ``offset`` of ``file``."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int

    @property
    def is_float32(self) -> bool:
        return self.dtype == "F32"


class Weights(Mapping[str, Tensor]):
    """Tensors by name, without what the checkpoint puts before every name (as ``bert.``).

    It remembers which were looked up: a tensor that is not read may change the result.
    """

    def __init__(self, tensors: Mapping[str, Tensor], folder: Path) -> None:
        self._tensors = dict(tensors)
        self._read: set[str] = set()
        self.folder = folder

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Read the headers of ``model.safetensors`` or its shards.

        Raises ModelNotSupported, naming the file, if one is missing, damaged or cut, and if two
        disagree about a tensor.
        """
        copies = []
        for files in _copies(folder):
            tensors: dict[str, Tensor] = {}
            for file in files:
                _merge(tensors, _read_header(file))
            copies.append(tensors)
        first, *others = copies
        for other in others:
            if odd := sorted(first.keys() ^ other.keys()):
                raise ModelNotSupported(
                    f"{folder} has model.safetensors and shards that disagree: only one of them "
                    f"has {name_some(odd)}. Delete the one that is not the model's."
                )
            _merge(first, other)
        return cls(first, folder)

    def without_prefix(self, *prefixes: str, known: str) -> Weights:
        """The same with the first of ``prefixes`` taken off that makes the name ``known`` appear.

        Raises ModelNotSupported if none does, and if two tensors get the same name by it.
        """
        for prefix in ("", *prefixes):
            if prefix + known in self._tensors:
                return self._stripped(prefix)
        raise ModelNotSupported(f"The weights in {self.folder} have no tensor {known!r}.")

    def check_copies(self, prefix: str) -> None:
        """Raise ModelNotSupported if a tensor is there with ``prefix`` and, another, without."""
        self._stripped(prefix)

    def _stripped(self, prefix: str) -> Weights:
        named: dict[str, Tensor] = {}
        for name, tensor in self._tensors.items():
            _merge(named, {name.removeprefix(prefix): tensor})
        return Weights(named, self.folder)

    def check_all_read(self, *ignored: str) -> None:
        """Raise ModelNotSupported if a tensor was not looked up and matches none of ``ignored``.

        These are patterns of ``fnmatch``, for heads that give no embedding.
        """
        if unread := not_matching(sorted(self._tensors.keys() - self._read), ignored):
            raise ModelNotSupported(
                f"The weights in {self.folder} have {name_some(unread)}, which nothing here reads: "
                "the model computes more than config.json says."
            )

    def __getitem__(self, name: str) -> Tensor:
        self._read.add(name)
        try:
            return self._tensors[name]
        except KeyError:
            raise ModelNotSupported(
                f"The weights in {self.folder} have no tensor {name!r}."
            ) from None

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def array(self, name: str) -> NDArray[np.float32]:
        """The tensor's values as float32; a view of the file where they are float32 there."""
        tensor = self[name]
        dtype = _DTYPES.get(tensor.dtype)
        if dtype is None:
            raise ModelNotSupported(
                f"The tensor {name!r} in {tensor.file} is {tensor.dtype}; only float32, float16 "
                "and bfloat16 weights are read."
            )
        raw = _read(tensor).view(dtype)
        if tensor.dtype == "BF16":  # the upper half of a float32
            raw = (raw.astype(np.uint32) << 16).view(np.float32)
        return np.asarray(raw, dtype=np.float32).reshape(tensor.shape)

    def integers(self, name: str) -> NDArray[np.int64]:
        """The values of a tensor of whole numbers."""
        tensor = self[name]
        dtype = _INTEGERS.get(tensor.dtype)
        if dtype is None:
            raise ModelNotSupported(
                f"The tensor {name!r} in {tensor.file} is {tensor.dtype}, not whole numbers."
            )
        return np.asarray(_read(tensor).view(dtype), dtype=np.int64).reshape(tensor.shape)


def not_matching(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The ``names`` that match none of the ``patterns``, which are those of ``fnmatch``."""
    return [name for name in names if not any(fnmatchcase(name, form) for form in patterns)]


def name_some(names: Sequence[str]) -> str:
    """The first few of ``names`` for an error, and how many more there are."""
    first = ", ".join(map(repr, names[:3]))
    more = len(names) - 3
    return f"{first} and {more} more" if more > 0 else first


def _merge(tensors: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    """Add ``more``; of a name that is there already, the values must be the same."""
    for name, tensor in more.items():
        there = tensors.setdefault(name, tensor)
        if there is not tensor and not _same(there, tensor):
            where = f"{tensor.file} has another tensor"
            if there.file != tensor.file:
                where = f"{there.file} and {tensor.file} disagree about the tensor"
            raise ModelNotSupported(f"{where} {name!r}: delete the one that is not the model's.")


def _same(one: Tensor, other: Tensor) -> bool:
    alike = one.dtype == other.dtype and one.shape == other.shape
    return alike and np.array_equal(_read(one), _read(other))


def _read(tensor: Tensor) -> NDArray[np.uint8]:
    """The tensor's bytes, mapped from its file."""
    return np.memmap(tensor.file, np.uint8, "r", tensor.offset, (tensor.length,))


def _copies(folder: Path) -> list[list[Path]]:
    """The files of the model; of each copy, where it is there as one file and in shards, too."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    # The hub's cache holds links; the runtime maps a file only from where it really lies.
    copies = [[single.resolve()]] if single.is_file() else []
    if not index.is_file():
        if copies:
            return copies
        raise ModelNotSupported(f"{folder} has no model.safetensors.")
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        names = sorted(set(listed))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError, OSError) as error:
        raise ModelNotSupported(f"{index} can't be read: {error!r}") from None
    for name in names:
        # By its name alone, as in the hub's cache every file is a link to somewhere else.
        if not isinstance(name, str) or not _SHARD_NAME.fullmatch(name):
            raise ModelNotSupported(f"{index} names {name!r}, which is not a file beside it.")
    return [*copies, [(folder / name).resolve() for name in names]]


def _read_header(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        # The library checks that the header is sound and that the file is as long as it says.
        with safe_open(file, framework="numpy"):
            pass
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(_HEADER_SIZE), "little")
            header = json.loads(stream.read(size))
    except FileNotFoundError:
        raise ModelNotSupported(f"{file} is missing.") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelNotSupported(f"{file} is damaged: {error}") from None
    start = _HEADER_SIZE + size
    tensors: dict[str, Tensor] = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            # Checkpoints converted from TensorFlow name a norm's weights its way.
            name = name.replace("LayerNorm.gamma", "LayerNorm.weight")
            name = name.replace("LayerNorm.beta", "LayerNorm.bias")
            tensor = Tensor(file, entry["dtype"], shape, start + begin, end - begin)
            _merge(tensors, {name: tensor})
    return tensors
