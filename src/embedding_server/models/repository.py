# SPDX-License-Identifier: MIT OR Apache-2.0
"""Which of a repository's files make up its model, by their names alone."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

from embedding_server.backends.base import ONNX_FILES

__all__ = ["documents", "essentials", "lacks", "weights"]

_DOCUMENTS = (
    *("*.json", "*.txt", "*.md", "LICEN[CS]E*", "NOTICE*", ".gitattributes"),
    *("*tokenizer.model", "*spiece.model", "*sentencepiece*.model"),
)
_ASIDE = re.compile(r"(.*/)?(onnx|openvino|[\w-]*checkpoint[\w-]*)/.*")
"""The same model in other forms, which may be as large."""
_ESSENTIAL = re.compile(
    r"(\d+_\w+/)?(modules|config|tokenizer|tokenizer_config|sentence_\w+_config"
    r"|config_sentence_transformers)\.json"
)
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")
_LATER_MODULE = re.compile(r"[1-9]\d*_\w+/.*")


def documents(names: Iterable[str]) -> list[str]:
    """The model's files other than weights: small text files, and never code."""
    return [
        name
        for name in names
        if not _ASIDE.fullmatch(name) and any(fnmatchcase(name, form) for form in _DOCUMENTS)
    ]


def weights(names: Collection[str], onnx_file: str | None) -> list[str]:
    """The safetensors; ``onnx_file`` and its data files replace those of the transformer.

    A transformer without safetensors has the first of ONNX_FILES.
    """
    tensors = [n for n in names if n.endswith(".safetensors") and not _ASIDE.fullmatch(n)]
    later = [name for name in tensors if _LATER_MODULE.fullmatch(name)]
    if onnx_file is None and len(later) == len(tensors):
        onnx_file = next((name for name in ONNX_FILES if name in names), None)
    if onnx_file is None:
        return tensors
    # A large graph keeps its tensors in files beside it.
    graph = re.compile(re.escape(onnx_file) + r"([._]data(_\d+)?)?")
    return later + [name for name in names if graph.fullmatch(name)]


def essentials(names: Collection[str], onnx_file: str | None) -> list[str]:
    """The files without which the model can't be read, or is read wrongly."""
    return [name for name in names if _ESSENTIAL.fullmatch(name)] + weights(names, onnx_file)


def lacks(names: Collection[str], onnx_file: str | None) -> str | None:
    """The first file that is missing from ``names`` to make up a model; None if it is complete."""
    if not {"config.json", "modules.json"} & set(names):
        return "config.json"
    if onnx_file is not None and onnx_file not in names:
        return onnx_file
    found = weights(names, onnx_file)
    if all(_LATER_MODULE.fullmatch(name) for name in found):
        return "model.safetensors"
    for shard in filter(None, map(_SHARD.fullmatch, found)):
        for number in range(1, int(shard[3]) + 1):
            if (name := f"{shard[1]}-{number:05d}-of-{shard[3]}.safetensors") not in found:
                return name
    if "tokenizer.json" not in {name.rpartition("/")[2] for name in documents(names)}:
        return "tokenizer.json"
    return None
