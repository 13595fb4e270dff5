# SPDX-License-Identifier: MIT OR Apache-2.0
"""A short hash that identifies a model's vectors: of files and settings, never of paths."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from embedding_server.backends.base import Module
from embedding_server.backends.head import pooling_modes
from embedding_server.models.files import read_json, read_object, sha256_of
from embedding_server.models.layout import Layout

__all__ = ["ARITHMETIC", "fingerprint"]

ARITHMETIC = 1
"""Raise it when any vector of any model moves by more than 1e-5."""

_HARMLESS_KEYS = frozenset(
    {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}
)
"""Keys of config.json that can't change a vector; the modules contain the pooling that
``architectures`` implies. The list is not that of backends/architectures.py, whose every new key
would change fingerprints but no vector."""

_TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_HARMLESS_SETTINGS = frozenset(
    {
        *("backend", "is_local", "local_files_only", "name_or_path", "special_tokens_map_file"),
        *("tokenizer_file", "chat_template", "clean_up_tokenization_spaces"),
        *("model_max_length", "max_len"),
    }
)
"""Keys of tokenizer_config.json that can't change a vector, or that ``max_tokens`` stands for."""

_VOCABULARIES = ("vocab.*", "merges.txt", "*.model", "bpe.codes")
"""The files from which transformers builds a tokenizer if there is no tokenizer.json."""


def fingerprint(
    layout: Layout,
    *,
    weights: Sequence[str],
    max_tokens: int,
    prompts: Mapping[str, str],
    layer_norm: bool,
) -> str:
    """16 hex digits of a SHA-256 over all that determines the vectors of the model in ``layout``.

    ``weights`` are the digests of the first module's files, in the order in which they are read.
    """
    pipeline = layout.pipeline
    static = layout.max_tokens is None
    parts = {
        "arithmetic": ARITHMETIC,
        "body": pipeline.body,
        "weights": list(weights),
        "config": _without(pipeline.config, _HARMLESS_KEYS),
        "tokenizer": _tokenizer(pipeline.transformer, static=static),
        "modules": [_module(module, pipeline.folder) for module in pipeline.modules],
        "lowercase": layout.lowercase,
        "max_tokens": max_tokens,
        "prompts": dict(prompts),
        "default_prompt": layout.default_prompt,
        "exclude_prompt": layout.exclude_prompt,
        "layer_norm": layer_norm,
    }
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _tokenizer(home: Path, *, static: bool) -> Mapping[str, Any]:
    """The tokenizer's files; a static model reads only its tokenizer.json."""
    path = home / "tokenizer.json"
    files = [path] if path.is_file() else [f for form in _VOCABULARIES for f in home.glob(form)]
    parts: dict[str, Any] = {file.name: sha256_of(file) for file in files}
    for name in () if static else _TOKENIZER_SETTINGS:
        if (home / name).is_file():
            parts[name] = _without(read_object(home / name), _HARMLESS_SETTINGS)
    return parts


def _module(module: Module, root: Path) -> Sequence[Any]:
    if module.kind == "Pooling":  # its options can be written in two ways
        return [module.kind, pooling_modes(module.config)]
    if module.kind == "Normalize" or module.folder == root:
        return [module.kind]
    files = {file.relative_to(module.folder).as_posix(): file for file in module.folder.rglob("*")}
    settings = {name: read_json(file) for name, file in files.items() if name.endswith(".json")}
    weights = {n: sha256_of(file) for n, file in files.items() if n.endswith(".safetensors")}
    return [module.kind, settings, weights]


def _without(values: Mapping[str, Any], keys: Collection[str]) -> Mapping[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}
