# SPDX-License-Identifier: MIT OR Apache-2.0
"""Texts that are hard to cut in parts, and the tokenizer of a folder."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import strategies as st

from embedding_server.engine.tokenizer import Tokenizer
from embedding_server.models.tokenizers import load_static_tokenizer, load_tokenizer

UNCUT = 10**7


WORDS = ["river", "City", "a", "don't", "don'", "'s", "1", "42x", "x,y", "e\u0301", "\u1100\u1161"]


SPACES = [" ", "  ", "\n", "\r\n", "\t", " \n ", "\u3000", "\u00a0", "\u200b"]


MARKS = [
    ",",
    ".",
    "...",
    "!",
    "?!",
    "(",
    ")",
    "=",
    "+",
    "'",
    '"',
    "-",
    "\u2026",
    "\u3002",
    "\uff0c",
]


TOKENS = ["[MASK]", "<mask>", "[CLS]", "</s>", "<|endoftext|>", "<think>", "##s", "\u2581"]


OTHERS = ["\u6771", "\u304b\u3099", "\u0301", "\U0001f468\u200d", "\U0001f3fd", "\u0600", "\x00"]


TEXT = st.lists(
    st.one_of(
        *(st.sampled_from(parts) for parts in (WORDS, SPACES, MARKS, TOKENS, OTHERS)),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=300,
).map("".join)


def load(folder: Path, limit: int = UNCUT) -> Tokenizer:
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] == "model2vec":
        return load_static_tokenizer(folder / "tokenizer.json")
    return load_tokenizer(folder, config, max_tokens=limit)


LONG = 1_000_000


FORMS = {
    "prose": "the river runs past the old city ",
    "one word": "a",
    "words": "zqxj" * 25 + " ",
    "combining": "\u0301\u0323",
    "ideographs": "\u6771\u65b9\u5df2\u3002",
    "added tokens": "[MASK] <mask> ",
    "spaces": " ",
    "lines": " \n",
    "marks": "!",
    "letters and marks": "!a",
    "joined emoji": "\U0001f468\u200d",
    "flags": "\U0001f1e6",
    "hangul": "\u1100\u1161",
}
