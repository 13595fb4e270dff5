# SPDX-License-Identifier: MIT OR Apache-2.0
"""Reads a tokenizer's files and merges them as transformers 5.23 does before it makes a tokenizer.

The facts are those of ``PreTrainedTokenizerBase._from_pretrained``: where tokenizer_config.json
lists the added tokens, special_tokens_map.json and added_tokens.json are ignored; otherwise they
count, and so do the added tokens of tokenizer.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from embedding_server.engine.tokenizer import is_panic
from embedding_server.errors import ModelNotSupported
from embedding_server.models.files import read_object, read_text

__all__ = ["SPECIAL_TOKENS", "Token", "TokenizerFiles", "read_backend", "read_tokenizer_files"]

Token = str | AddedToken

SPECIAL_TOKENS = (
    *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
)
"""The named special tokens, in the order in which transformers adds them."""

_SPECIAL_LISTS = ("extra_special_tokens", "additional_special_tokens")
"""Special tokens without a name; the first that is there counts."""

_REFUSED = (
    *("fast_tokenizer_files", "init_inputs", "model_specific_special_tokens", "processor_class"),
    *("tokenizer_object", "tokenizer_truncation", "tokenizer_padding", "post_processor"),
    *("_json_truncation", "_json_padding", "_spm_precompiled_charsmap"),
    *("gguf_file", "trust_remote_code"),
)
"""Settings that would lead transformers to other files, or into its own constructors."""

_PROCESSOR_FILES = (
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
)
"""Where sentence-transformers first looks for something other than a tokenizer."""

_TOKEN_ID = re.compile("[0-9]{1,10}")


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """tokenizer.json, and the settings of tokenizer_config.json with what is merged into them."""

    path: Path
    """tokenizer.json"""
    text: str
    backend: tokenizers.Tokenizer
    """tokenizer.json as it stands."""
    settings_path: Path
    """tokenizer_config.json, which may be missing."""
    settings: Mapping[str, Any]
    added: Sequence[AddedToken]
    """The tokens to be found in a text before all else, in the order of their ids."""

    def flag(self, key: str, default: bool) -> bool:
        value = self.settings.get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, value)
        return value

    def optional_flag(self, key: str) -> bool | None:
        return None if self.settings.get(key) is None else self.flag(key, False)

    def special_tokens(self) -> dict[str, Token | None]:
        """The named special tokens that are set, some of them to None."""
        given = {key: self.settings[key] for key in SPECIAL_TOKENS if key in self.settings}
        for key, token in given.items():
            if token is not None and not _is_token(token):
                raise self.wrong(key, token)
        return given

    def extra_tokens(self) -> list[Token]:
        """The special tokens without a name."""
        key = next((key for key in _SPECIAL_LISTS if key in self.settings), None)
        tokens = (self.settings[key] if key else None) or []
        if not isinstance(tokens, list) or not all(map(_is_token, tokens)):
            raise self.wrong(str(key), tokens)
        return list(tokens)

    def keeps_end(self) -> bool:
        """Whether a long text loses its beginning, not its end."""
        limit = self.backend.truncation
        side = self.settings.get("truncation_side", limit["direction"] if limit else "right")
        if side not in ("left", "right"):
            raise self.wrong("truncation_side", side)
        return bool(side == "left")

    def wrong(self, key: str, value: object) -> ModelNotSupported:
        return ModelNotSupported(f"{self.settings_path}: {key} can't be {value!r}.")


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Read the tokenizer in ``folder``.

    Raises ModelNotSupported, naming file and key, for settings that can't be followed exactly.
    """
    for name in _PROCESSOR_FILES:
        if (folder / name).is_file():
            raise ModelNotSupported(f"{folder / name}: inputs other than text are not supported.")
    path, settings_path = folder / "tokenizer.json", folder / "tokenizer_config.json"
    text, backend = read_backend(path)
    settings = _read_optional(settings_path)
    _check(settings_path, settings)
    if "additional_special_tokens" in settings and not settings.get("extra_special_tokens"):
        settings["extra_special_tokens"] = settings.pop("additional_special_tokens")
    if settings.get("extra_special_tokens") == {}:  # ModernBERT's: names for tokens, but none
        del settings["extra_special_tokens"]
    if "added_tokens_decoder" in settings:
        listed = settings["added_tokens_decoder"]
        if not isinstance(listed, dict) or not all(map(_TOKEN_ID.fullmatch, listed)):
            raise ModelNotSupported(f"{settings_path}: added_tokens_decoder must be by token id.")
        added = {int(index): _added_token(settings_path, token) for index, token in listed.items()}
    else:
        _merge_special_tokens_map(folder / "special_tokens_map.json", settings)
        added = _read_added_tokens(folder / "added_tokens.json", settings)
        added |= _listed_tokens(path, text)
    settings = {key: _with_tokens(settings_path, value) for key, value in settings.items()}
    by_content = {str(token): token for token in added.values()}
    for key in SPECIAL_TOKENS:
        if settings.get(key) is not None:
            settings[key] = by_content.get(str(settings[key]), settings[key])
    in_order = [added[index] for index in sorted(added)]
    return TokenizerFiles(path, text, backend, settings_path, settings, in_order)


def read_backend(path: Path) -> tuple[str, tokenizers.Tokenizer]:
    """A tokenizer.json, as text and read; raises ModelNotSupported if it can't be."""
    try:
        text = read_text(path)
        return text, tokenizers.Tokenizer.from_str(text)
    except ModelNotSupported:
        raise
    except BaseException as error:  # tokenizers raises bare Exception, or panics
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise ModelNotSupported(f"{path} can't be read as a tokenizer: {error}") from None


def _read_optional(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _check(path: Path, settings: Mapping[str, Any]) -> None:
    unknown = [key for key in _REFUSED if settings.get(key)]
    unknown += [
        key
        for key, value in settings.items()
        if key.endswith("_token") and key not in SPECIAL_TOKENS and isinstance(value, str | dict)
    ]
    if unknown:
        raise ModelNotSupported(f"{path} sets {', '.join(sorted(unknown))}, not known here.")
    code = settings.get("auto_map")
    if code and (not isinstance(code, dict) or {"AutoTokenizer", "AutoProcessor"} & set(code)):
        raise ModelNotSupported(f"{path}: auto_map names code, and a model's code is never run.")


def _merge_special_tokens_map(path: Path, settings: dict[str, Any]) -> None:
    for key, value in _read_optional(path).items():
        named = key in SPECIAL_TOKENS
        if not named and (key not in _SPECIAL_LISTS or not isinstance(value, list)):
            raise ModelNotSupported(f"{path} sets {key} to {value!r}, not known here.")
        if named and isinstance(value, dict):
            settings[key] = _added_token(path, {**value, "special": True})
        elif key == "extra_special_tokens":
            tokens = list(settings.get(key) or [])
            for item in value:
                special = isinstance(item, dict)
                token = _added_token(path, {**item, "special": True}) if special else item
                tokens += [] if token in tokens else [token]
            settings[key] = tokens
        else:
            settings[key] = value


def _read_added_tokens(path: Path, settings: Mapping[str, Any]) -> dict[int, AddedToken]:
    """The tokens of added_tokens.json, which gives their ids and nothing else."""
    ids = _read_optional(path)
    if not all(isinstance(index, int) for index in ids.values()):
        raise ModelNotSupported(f"{path} must have a token id for each token.")
    special = {str(settings[key]) for key in SPECIAL_TOKENS if settings.get(key)}
    special |= {str(token) for token in settings.get("extra_special_tokens") or []}
    return {
        index: AddedToken(content, normalized=content not in special, special=content in special)
        for content, index in ids.items()
    }


def _listed_tokens(path: Path, text: str) -> dict[int, AddedToken]:
    """The added tokens of tokenizer.json, without parsing its vocabulary a second time."""
    # The first such key is the right one: within a string its quotes would be escaped.
    key = re.search(r'"added_tokens"\s*:\s*', text)
    tokens = json.JSONDecoder().raw_decode(text, key.end())[0] if key else None
    if not isinstance(tokens, list) or not all(isinstance(token, dict) for token in tokens):
        raise ModelNotSupported(f"{path} has no list of added_tokens.")
    return {token.pop("id"): _added_token(path, token) for token in tokens}


def _with_tokens(path: Path, value: Any) -> Any:
    """``value`` with an AddedToken for each object that says it is one."""
    if isinstance(value, list):
        return [_with_tokens(path, item) for item in value]
    if isinstance(value, dict) and value.get("__type") == "AddedToken":
        return _added_token(path, {key: item for key, item in value.items() if key != "__type"})
    return value


def _added_token(path: Path, token: Any) -> AddedToken:
    try:
        return AddedToken(**token)
    except TypeError as error:
        raise ModelNotSupported(f"{path} has {token!r} as a token: {error}") from None


def _is_token(value: Any) -> bool:
    return isinstance(value, Token) and str(value) != ""
