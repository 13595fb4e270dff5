# SPDX-License-Identifier: MIT OR Apache-2.0
"""Where a long text can be cut so that its pieces have the tokens of the whole.

tokenizers needs some 500 bytes for each character of a text. It splits the text into words first,
and no token reaches from one word into the next: a cut between two words changes nothing, where the
end of a word is certain.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import tokenizers
from tokenizers import models

__all__ = ["QWEN_WORDS", "cut_pattern", "pieces"]

# The pattern belongs to the vocabulary: tokenization_qwen.py in every repository of Qwen has it.
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_Component = Mapping[str, Any]

# Each ends with the character that begins the next piece. Only characters that no normaliser
# joins with a neighbour: a letter before a space or a mark always ends a word.
_IDEOGRAPHS = "\u4e00-\u9fff"
_LETTERS = f"A-Za-z\u3041-\u3096\u30a1-\u30fa{_IDEOGRAPHS}"
_MARKS = ",.;:!?+=)\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f"
_BEFORE_SPACE = re.compile(f"[{_LETTERS}0-9{_MARKS}] ")
_BEFORE_ANY_SPACE = re.compile(f"[{_LETTERS}0-9{_MARKS}][ \\n]")
_BEFORE_MARK = re.compile(f"[{_LETTERS}][ \\n{_MARKS}]|[0-9{_MARKS}] ")
_ANY_MARK = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
_COMPOSED = "<=>"
"""Marks that NFC joins with a stroke behind them, as in U+2260."""

_NORMALIZERS = {
    *("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt", "Precompiled"),
    "BertNormalizer",
}
"""Normalisers that look at a character and the marks on it, and no further."""


def cut_pattern(tokenizer: tokenizers.Tokenizer) -> re.Pattern[str] | None:
    """A pattern before whose last character a text can be cut; None if nothing is certain."""
    normalizers, splitting = _components(tokenizer)
    if not {part["type"] for part in normalizers} <= _NORMALIZERS:
        return None
    added = tokenizer.get_added_tokens_decoder().values()
    texts = {str(token) for token in added}
    if tokenizer.normalizer is not None:
        texts |= {tokenizer.normalizer.normalize_str(text) for text in texts}
    pattern = _of_words(splitting, normalizers, texts)
    # Added tokens are found before words: one may contain such a place, take the space after it,
    # or need the end of a word, which means something else there.
    if any(token.rstrip or token.single_word for token in added):
        return None
    if pattern is None or any(map(pattern.search, texts)):
        return None
    return pattern


def _of_words(
    splitting: list[_Component], normalizers: list[_Component], added: set[str]
) -> re.Pattern[str] | None:
    kinds = {part["type"] for part in normalizers}
    match splitting:
        case [{"type": "BertPreTokenizer"}]:
            # Spaces, marks and ideographs stand alone, whatever is beside them.
            taken = "".join(added) + (_COMPOSED if kinds - {"BertNormalizer"} else "")
            marks = "".join(mark for mark in _ANY_MARK if mark not in taken)
            alone = any(part.get("handle_chinese_chars") for part in normalizers)
            return re.compile(f"[ \\n{re.escape(marks)}{_IDEOGRAPHS if alone else ''}]")
        case _ if "BertNormalizer" in kinds:  # its spaces around ideographs join those of the text
            return None
        case [{"type": "ByteLevel", "use_regex": True, "add_prefix_space": prefix}]:
            return _BEFORE_SPACE if prefix else _BEFORE_MARK
        case [
            {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "use_regex": False, "add_prefix_space": prefix},
        ] if words == QWEN_WORDS:
            return _BEFORE_SPACE if prefix else _BEFORE_MARK
        case [{"type": "WhitespaceSplit"}, {"type": "Metaspace"}]:
            return _BEFORE_ANY_SPACE
        case [{"type": "Metaspace", "split": True}]:
            return _BEFORE_SPACE
        case _:
            return None


def _components(tokenizer: tokenizers.Tokenizer) -> tuple[list[_Component], list[_Component]]:
    """The JSON of each normaliser and of each pre-tokenizer, in order."""
    probe = tokenizers.Tokenizer(models.BPE())  # without the vocabulary, of up to 30 MB of JSON
    if tokenizer.normalizer is not None:
        probe.normalizer = tokenizer.normalizer
    if tokenizer.pre_tokenizer is not None:
        probe.pre_tokenizer = tokenizer.pre_tokenizer
    whole = json.loads(probe.to_str())
    normalizers = _flat(whole["normalizer"], "normalizers")
    return normalizers, _flat(whole["pre_tokenizer"], "pretokenizers")


def _flat(component: _Component | None, parts: str) -> list[_Component]:
    if component is None:
        return []
    return list(component[parts]) if component["type"] == "Sequence" else [component]


def pieces(text: str, pattern: re.Pattern[str] | None, size: int) -> Iterator[str]:
    """``text`` in pieces, each of ``size`` characters and on to the next place to cut."""
    start = 0
    while pattern is not None and len(text) - start > 2 * size:
        found = None
        # A window at a time: a search holds the interpreter's lock.
        for low in range(start + size, len(text), size):
            if found := pattern.search(text, low, low + size + 1):
                break
        if found is None:
            break
        yield text[start : found.end() - 1]
        start = found.end() - 1
    yield text[start:]
