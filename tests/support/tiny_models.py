# SPDX-License-Identifier: MIT OR Apache-2.0
"""Tiny random-weight embedding models on disk, in the layouts of the Hugging Face hub.

Each ``make_*`` function writes one folder as a repository of that family has it: field names of
``config.json``, tensor names of ``model.safetensors``, ``modules.json``, pooling, tokenizer. The
same folder can then be loaded by this server and by sentence-transformers and compared. Neither
torch nor transformers is needed to write one.

``layout="hub"`` is what the published repositories look like, ``layout="v6"`` is what
``SentenceTransformer.save`` of sentence-transformers 6.2 with transformers 5.23 writes.
"""

from __future__ import annotations

import json
import math
import random
import string
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

__all__ = [
    "FAMILIES",
    "ODD_TEXTS",
    "POOLING_MODES",
    "PREFIXES",
    "TinyModel",
    "load_reference",
    "make_bert",
    "make_distilbert",
    "make_modernbert",
    "make_mpnet",
    "make_nomic_bert",
    "make_qwen3",
    "make_roberta",
    "make_static",
    "make_xlm_roberta",
    "texts",
]

POOLING_MODES = ("cls", "mean", "max", "lasttoken", "weightedmean", "mean_sqrt_len_tokens")

# The prefix that the tensor names of a family get when the repository was saved from a model with
# a head, such as BertForMaskedLM.
PREFIXES = {
    "bert": "bert.",
    "roberta": "roberta.",
    "xlm_roberta": "roberta.",
    "mpnet": "mpnet.",
    "distilbert": "distilbert.",
    "nomic_bert": "bert.",
    "modernbert": "model.",
    "qwen3": "model.",
}


@dataclass(frozen=True)
class TinyModel:
    """A written model: the folder to test, and the one that sentence-transformers can load.

    They are the same folder, except for NomicBERT in the hub's layout.
    """

    folder: Path
    reference: Path


def load_reference(model: TinyModel, **kwargs: Any) -> SentenceTransformer:
    """Load the model with sentence-transformers, on the CPU and in float32.

    float32 is asked for because transformers 5 otherwise computes in the checkpoint's own type, so
    that a float16 repository would give vectors that are only right to three digits.
    """
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(
        str(model.reference),
        device="cpu",
        local_files_only=True,
        model_kwargs={"dtype": "float32"},
        **kwargs,
    )


# ---------------------------------------------------------------------------------------- texts

_COMMON = (
    "the of and to in is that for it as was with on be by at he this from or had not are but "
    "have an they which one you were her all she there would their we him been has when who will "
    "more no if out so said what up its about into than them can only other new some could time "
    "these two may then do first any my now such like our over man me even most made after also "
    "did many before must through back years where much your way well down should because each "
    "just those people how too little state good very make world still own see men work long get "
    "here between both life being under never day same another know while last might us great old "
    "year off come since against go came right used take three water river city train music paper "
    "history science energy market garden window coffee winter summer doctor engine silver network "
    "language computer question answer document query search sentence vector model token phone"
)
_WORDS = _COMMON.split()

_AFFIXES = "s ed ing er ly tion ment ness able al ic ist un re pre dis est ity ous ive"
_PIECES = _AFFIXES.split()

# Words that no vocabulary here holds whole: accents both ways round, scripts, emoji with joiners,
# compatibility forms, digits, markup, long runs, characters that tokenizers strip.
_ODD = (
    "na\u00efve Z\u00fcrich e\u0301te\u0301 \u6771\u4eac \u65e5\u672c\u8a9e "
    "\u041c\u043e\u0441\u043a\u0432\u0430 \u0645\u0631\u062d\u0628\u0627 \U0001f642 "
    "\U0001f469\u200d\U0001f680 \ufb01ne \uff21\uff22 \u2460 it's C++ #tag a_b 3,141.59 2024 "
    "https://a.example/b?c=d antidisestablishmentarianism zero\u200bwidth ... ?! \u201cquoted\u201d"
)
_ODD_WORDS = _ODD.split()

ODD_TEXTS = (
    "",
    " ",
    "   two  spaces   around   ",
    "tabs\tand\nnew\r\nlines\u00a0and\u3000wide",
    "Caf\u00e9 cafe\u0301 CAF\u00c9 \u0130stanbul stra\u00dfe",
    "\u6771\u4eac\u90fd\u306f\u65e5\u672c\u306e\u9996\u90fd\u3002 \ud55c\uad6d\uc5b4",
    "\U0001f642\U0001f642 \U0001f469\u200d\U0001f680 \U0001f1e8\U0001f1ed",
    "control\x00\x07char \ufffd \ufeffmark zero\u200bwidth \u00adsoft",
    "\uff26\uff55\uff4c\uff4c \ufb01ne \u2460\u2122 \u2026",
    "I'm you're WE'LL don't 12345 1st 3.14 a+b=c ###",
    "x" * 150,
    "[CLS] one [SEP] [PAD] two [MASK] [UNK]",
    "<s> one </s> <pad> two <mask> three<unk>",
    "<|endoftext|> one <|im_start|> two <|im_end|>",
)
"""Texts that tokenizers disagree on: empty, blank, odd scripts, special tokens as plain text."""


def texts(n: int, seed: int = 0, max_words: int = 40) -> list[str]:
    """Give n deterministic texts of 1 to max_words words, most of them short, some words odd.

    The first has one word and the second max_words; none is empty.
    """
    rng = random.Random(seed)
    made = []
    for index in range(n):
        length = {0: 1, 1: max_words}.get(index, round(max_words ** rng.random()))
        words = [rng.choice(_ODD_WORDS if rng.random() < 0.12 else _WORDS) for _ in range(length)]
        if rng.random() < 0.5:
            words[0] = words[0].capitalize()
        words = [word + rng.choice([",", ".", "!", ""]) * (rng.random() < 0.1) for word in words]
        made.append(" ".join(words))
    return made


# ----------------------------------------------------------------------------------- tokenizers


@dataclass(frozen=True)
class _Tokenizer:
    """A tokenizer's files: the backend's JSON, its configuration, its older vocabulary files."""

    json: str
    config: Mapping[str, Any]
    special: Mapping[str, Any]
    files: Mapping[str, str]
    size: int
    pad_id: int


_CHARACTERS = [
    *string.ascii_lowercase,
    *string.digits,
    *string.punctuation,
    *"\u6771\u4eac\u65e5\u672c\u043c\u043e\u0441\u043a\u0432\u0430",
]


def _wordpiece_vocabulary(cased: bool) -> list[str]:
    """List BERT's vocabulary in miniature: the special tokens stand at their real ids."""
    characters = _CHARACTERS + (list(string.ascii_uppercase) if cased else [])
    words = sorted({*_WORDS, *(word.capitalize() for word in _WORDS)} if cased else set(_WORDS))
    unused = [f"[unused{index}]" for index in range(99)]
    tokens = ["[PAD]", *unused, "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters]
    tokens += [f"##{piece}" for piece in [*characters, *_PIECES]]
    tokens += [word for word in words if len(word) > 1]
    return list(dict.fromkeys(tokens))


def _is_merged(token: str) -> dict[str, Any]:
    """Write a mask token as RoBERTa-like repositories do: it swallows the space before it."""
    return {
        "content": token,
        "lstrip": True,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
    }


@lru_cache
def _wordpiece_tokenizer(kind: str, cased: bool) -> _Tokenizer:
    """Make a WordPiece tokenizer with the special tokens of ``bert`` or of ``mpnet``.

    transformers 5 takes only the vocabulary from tokenizer.json and rebuilds the normaliser from
    ``do_lower_case``, ``strip_accents`` and ``tokenize_chinese_chars`` of tokenizer_config.json,
    so the two files must agree here as they do in the real repositories.
    """
    vocabulary = _wordpiece_vocabulary(cased)
    if kind == "mpnet":
        vocabulary = ["<s>", "<pad>", "</s>", "<unk>", *vocabulary, "<mask>"]
        cls, sep, pad, mask = "<s>", "</s>", "<pad>", "<mask>"
    else:
        cls, sep, pad, mask = "[CLS]", "[SEP]", "[PAD]", "[MASK]"
    ids = {token: index for index, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=not cased
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    if kind == "mpnet":
        tokenizer.post_processor = processors.RobertaProcessing(
            (sep, ids[sep]), (cls, ids[cls]), trim_offsets=True, add_prefix_space=False
        )
    else:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{cls}:0 $A:0 {sep}:0",
            pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
            special_tokens=[(cls, ids[cls]), (sep, ids[sep])],
        )
    special: dict[str, Any] = {
        "unk_token": "[UNK]",
        "sep_token": sep,
        "pad_token": pad,
        "cls_token": cls,
        "mask_token": mask,
    }
    if kind == "mpnet":
        special |= {"bos_token": cls, "eos_token": sep, "mask_token": _is_merged(mask)}
    for token in sorted({cls, sep, pad, "[UNK]", mask}, key=ids.__getitem__):
        lstrip = kind == "mpnet" and token == mask
        tokenizer.add_special_tokens([AddedToken(token, lstrip=lstrip, normalized=False)])
    config = {
        "do_lower_case": not cased,
        **special,
        "mask_token": mask,
        "tokenize_chinese_chars": True,
        "strip_accents": None,
    }
    files = {"vocab.txt": "".join(f"{token}\n" for token in vocabulary)}
    return _Tokenizer(tokenizer.to_str(), config, special, files, len(vocabulary), ids[pad])


def _byte_pairs() -> tuple[list[str], list[tuple[str, str]]]:
    """List the tokens and merges of a byte-level vocabulary that spells most of the words whole.

    Each word is merged from left to right. Earlier merges can get in a later word's way, which
    leaves that word in pieces, as in a trained vocabulary.
    """
    tokens = dict.fromkeys(sorted(pre_tokenizers.ByteLevel.alphabet()))
    merges = dict[tuple[str, str], None]()
    # \u0120 is how byte-level vocabularies write the space before a word.
    for word in [*_PIECES, *(f"\u0120{word}" for word in _WORDS), *_WORDS[::3]]:
        for end in range(1, len(word)):
            merges.setdefault((word[:end], word[end]))
            tokens.setdefault(word[: end + 1])
    return list(tokens), list(merges)


# How GPT-4's and Qwen's tokenizers cut text into words before the byte pairs.
_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


_NO_AFFIXES = {"continuing_subword_prefix": "", "end_of_word_suffix": ""}


@lru_cache
def _byte_level_tokenizer(kind: str) -> _Tokenizer:
    """Make a byte-level BPE tokenizer with the special tokens of a family.

    In ``roberta`` the special tokens are part of the vocabulary; in ``modernbert`` and ``qwen3``
    they are added after it, and modernbert has runs of spaces as added tokens too.
    """
    tokens, merges = _byte_pairs()
    if kind == "roberta":
        tokens = ["<s>", "<pad>", "</s>", "<unk>", *tokens, "<mask>"]
    ids = {token: index for index, token in enumerate(tokens)}
    affixes = {} if kind == "modernbert" else _NO_AFFIXES
    tokenizer = Tokenizer(models.BPE(ids, merges, fuse_unk=False, **affixes))
    tokenizer.decoder = decoders.ByteLevel()
    special: dict[str, Any]
    if kind == "roberta":
        special = {
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "sep_token": "</s>",
            "pad_token": "<pad>",
            "cls_token": "<s>",
            "mask_token": _is_merged("<mask>"),
        }
        config = {
            **special,
            "mask_token": "<mask>",
            "add_prefix_space": False,
            "errors": "replace",
            "trim_offsets": True,
        }
        for token in ("<s>", "<pad>", "</s>", "<unk>", "<mask>"):
            added = AddedToken(token, lstrip=token == "<mask>", normalized=False)
            tokenizer.add_special_tokens([added])
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.post_processor = processors.RobertaProcessing(
            ("</s>", ids["</s>"]), ("<s>", ids["<s>"]), trim_offsets=True, add_prefix_space=False
        )
    elif kind == "modernbert":
        spaces = [AddedToken(" " * count, normalized=True) for count in (4, 3, 2)]
        tokenizer.add_tokens(spaces)
        for token in ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"):
            added = AddedToken(token, lstrip=token == "[MASK]", normalized=False)
            tokenizer.add_special_tokens([added])
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS]:0 $A:0 [SEP]:0",
            pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
            special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
        )
        special = {
            "cls_token": "[CLS]",
            "mask_token": _is_merged("[MASK]"),
            "pad_token": "[PAD]",
            "sep_token": "[SEP]",
            "unk_token": "[UNK]",
        }
        config = {
            **special,
            "mask_token": "[MASK]",
            "clean_up_tokenization_spaces": True,
            "extra_special_tokens": {},
            "model_input_names": ["input_ids", "attention_mask"],
            "added_tokens_decoder": _added_tokens_decoder(tokenizer),
        }
    else:
        for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_pad|>"):
            tokenizer.add_special_tokens([AddedToken(token, normalized=False)])
        tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_QWEN_WORDS), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        end = tokenizer.token_to_id("<|endoftext|>")
        tokenizer.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(
                    single="$A:0 <|endoftext|>:0",
                    pair="$A:0 $B:1 <|endoftext|>:1",
                    special_tokens=[("<|endoftext|>", end)],
                ),
            ]
        )
        special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
        config = {
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": _added_tokens_decoder(tokenizer),
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|vision_pad|>"],
            "bos_token": None,
            # Text embeddings ignore it: sentence-transformers turns to a chat template only where
            # sentence_bert_config.json lists the "message" modality.
            "chat_template": "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}",
            "clean_up_tokenization_spaces": False,
            **special,
            "errors": "replace",
            "padding_side": "left",
            "split_special_tokens": False,
            "unk_token": None,
        }
    files = {}
    if kind != "modernbert":
        files["vocab.json"] = json.dumps(ids, ensure_ascii=False)
        files["merges.txt"] = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges)
    pad_id = tokenizer.token_to_id(special["pad_token"])
    size = tokenizer.get_vocab_size()
    return _Tokenizer(tokenizer.to_str(), config, special, files, size, pad_id)


def _added_tokens_decoder(tokenizer: Tokenizer) -> dict[str, Any]:
    """List the added tokens as newer tokenizer_config.json files repeat them."""
    return {
        str(index): {
            "content": token.content,
            "lstrip": token.lstrip,
            "normalized": token.normalized,
            "rstrip": token.rstrip,
            "single_word": token.single_word,
            "special": token.special,
        }
        for index, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }


def _precompiled_charsmap(replacements: Mapping[str, str]) -> bytes:
    """Compile a character map as SentencePiece ships it: a double-array trie, then the targets.

    A unit holds its label in the low 8 bits, "has a leaf" in bit 8 and the offset to its children
    from bit 10 up; a leaf is bit 31 and the target's position.
    """
    targets = b""
    trie: dict[int, Any] = {}
    for source, target in replacements.items():
        node = trie
        for byte in source.encode():
            node = node.setdefault(byte, {})
        node[-1] = len(targets)  # -1 is no byte: it marks the end of a source
        targets += target.encode() + b"\0"
    units = {0: 0}

    def place(node: dict[int, Any], position: int) -> None:
        labels = [max(label, 0) for label in node]
        base = 1
        while any(base ^ label in units for label in labels):
            base += 1
        units[position] |= (base ^ position) << 10 | (-1 in node) << 8
        units.update({base ^ label: label for label in labels})
        for label, child in node.items():
            if label == -1:
                units[base] = 1 << 31 | child
            else:
                place(child, base ^ label)

    place(trie, 0)
    # Whole blocks of 256, as the search may look at any label beside a used one.
    size = (max(units) // 256 + 1) * 256
    packed = struct.pack(f"<{size}I", *(units.get(index, 0) for index in range(size)))
    return struct.pack("<I", len(packed)) + packed + targets


@lru_cache
def _unigram_tokenizer(metaspace_only: bool) -> _Tokenizer:
    """Make XLM-RoBERTa's tokenizer in miniature: Unigram, Metaspace, a precompiled normaliser."""
    pieces = [("\u2581", -2.5)]
    pieces += [(f"\u2581{word}", -4 - index / 100) for index, word in enumerate(_WORDS)]
    pieces += [(piece, -6 - index / 100) for index, piece in enumerate(_PIECES)]
    pieces += [(word, -7 - index / 100) for index, word in enumerate(_WORDS[::2]) if len(word) > 2]
    letters = [*_CHARACTERS, *string.ascii_uppercase, "\u00e9", "\u00ef", "\u00fc", "\U0001f642"]
    pieces += [(letter, -10 - index / 100) for index, letter in enumerate(letters)]
    scores: dict[str, float] = dict.fromkeys(("<s>", "<pad>", "</s>", "<unk>"), 0.0)
    for piece, score in pieces:
        scores.setdefault(piece, score)
    scores["<mask>"] = 0.0
    tokenizer = Tokenizer(models.Unigram(list(scores.items()), unk_id=3, byte_fallback=False))
    replacements = {"\t": " ", "\n": " ", "\r": " ", "\u00a0": " ", "\u3000": " ", "\u200b": " "}
    replacements |= {"\ufb01": "fi", "\u2122": "TM", "\u2026": "...", "\u2460": "1"}
    replacements |= {"\x07": "", "\ufeff": "", "\u00ad": "", "e\u0301": "\u00e9"}
    for offset, letter in enumerate(string.ascii_uppercase):
        replacements[chr(0xFF21 + offset)] = letter
        replacements[chr(0xFF41 + offset)] = letter.lower()
    charsmap = normalizers.Precompiled(_precompiled_charsmap(replacements))
    metaspace = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always")
    if metaspace_only:
        one_space = normalizers.Replace(Regex(" {2,}"), " ")
        tokenizer.normalizer = normalizers.Sequence([charsmap, one_space])
        tokenizer.pre_tokenizer = metaspace
    else:
        tokenizer.normalizer = charsmap
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), metaspace]
        )
    tokenizer.decoder = decoders.Metaspace(replacement="\u2581", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    for token in ("<s>", "<pad>", "</s>", "<unk>", "<mask>"):
        added = AddedToken(token, lstrip=token == "<mask>", normalized=False)
        tokenizer.add_special_tokens([added])
    special = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "sep_token": "</s>",
        "pad_token": "<pad>",
        "cls_token": "<s>",
        "mask_token": _is_merged("<mask>"),
    }
    config = {**special, "mask_token": {"__type": "AddedToken", **_is_merged("<mask>")}}
    return _Tokenizer(tokenizer.to_str(), config, special, {}, len(scores), 1)


# -------------------------------------------------------------------------------------- tensors

_Shapes = dict[str, tuple[int, ...]]


def _random_tensors(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Draw float32 tensors that keep every operation audible.

    Freshly initialised transformers hide errors: their weights are near zero, their biases zero
    and their norms one, so that a forgotten bias or a wrong activation hardly moves the output.
    """
    tensors = {}
    for name, shape in shapes.items():
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        if len(shape) == 1 and name.endswith(("bias", "beta")):
            values = rng.normal(0, 0.1 if "norm" in name.lower() else 0.2, shape)
        elif len(shape) == 1:
            values = rng.uniform(0.5, 1.5, shape)
        elif "relative_attention_bias" in name:
            values = rng.normal(0, 1, shape)
        elif "emb" in name:
            # Small, so that the first norm's epsilon is heard; and positions and token types
            # smaller than words, or all texts would look alike.
            shared = "position_emb" in name or "token_type" in name
            values = rng.normal(0, 0.04 if shared else 0.1, shape)
        else:
            values = rng.normal(0, 1.2 / math.sqrt(shape[1]), shape)
        tensors[name] = values.astype(np.float32)
    return tensors


def _linear(name: str, inputs: int, outputs: int, bias: bool = True) -> _Shapes:
    shapes: _Shapes = {f"{name}.weight": (outputs, inputs)}
    return shapes | {f"{name}.bias": (outputs,)} if bias else shapes


def _norm(name: str, size: int, bias: bool = True) -> _Shapes:
    shapes: _Shapes = {f"{name}.weight": (size,)}
    return shapes | {f"{name}.bias": (size,)} if bias else shapes


def _write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> int:
    """Write a safetensors file and give the size of its tensors in bytes.

    Written by hand, as the library's numpy half has no bfloat16. The metadata says that the
    tensors are torch's, as published files do.
    """
    names = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64"}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": names[tensor.dtype.name],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.writelines(np.ascontiguousarray(tensor).tobytes() for tensor in tensors.values())
    return end


_NUMPY_TYPES: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}


def _write_weights(
    folder: Path, tensors: Mapping[str, np.ndarray], *, dtype: str, shards: int
) -> None:
    """Write model.safetensors, or several shards and their index, in the given type."""
    cast = {
        name: tensor.astype(_NUMPY_TYPES[dtype]) if tensor.dtype == np.float32 else tensor
        for name, tensor in tensors.items()
    }
    if shards == 1:
        _write_tensors(folder / "model.safetensors", cast)
        return
    names = list(cast)
    weight_map, total_size = {}, 0
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        total_size += _write_tensors(folder / file, {name: cast[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / "model.safetensors.index.json", index)


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --------------------------------------------------------------------------------------- folders

_ACTIVATIONS = {
    "tanh": "torch.nn.modules.activation.Tanh",
    "identity": "torch.nn.modules.linear.Identity",
}

_MODULE_TYPES = {
    "Transformer": "sentence_transformers.base.modules.transformer.Transformer",
    "Pooling": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
    "Dense": "sentence_transformers.base.modules.dense.Dense",
    "Normalize": "sentence_transformers.base.modules.normalize.Normalize",
    "StaticEmbedding": (
        "sentence_transformers.sentence_transformer.modules.static_embedding.StaticEmbedding"
    ),
}

_POOLING_KEYS = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "max": "pooling_mode_max_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}


@dataclass(frozen=True, kw_only=True)
class _Options:
    """What every ``make_*`` function takes besides its architecture's own sizes.

    ``pooling`` is one of POOLING_MODES, or a tuple of them whose vectors are joined; ``dense`` is
    (output size, "tanh" or "identity"); ``max_seq_length=None`` leaves the length to
    tokenizer_config.json and config.json; ``prefix`` goes before every tensor name, see PREFIXES;
    ``tokenizer_padding`` switches on padding and truncation to 32 tokens in tokenizer.json, as
    all-MiniLM-L6-v2 does to 128; ``config`` and ``tokenizer_config`` are merged into those files.
    """

    layout: str = "hub"
    pooling: str | tuple[str, ...] = "mean"
    normalize: bool = True
    dense: tuple[int, str] | None = None
    include_prompt: bool = True
    max_seq_length: int | None = 64
    do_lower_case: bool = False
    prompts: Mapping[str, str] | None = None
    default_prompt_name: str | None = None
    prefix: str = ""
    dtype: str = "float32"
    shards: int = 1
    tokenizer_padding: bool = False
    config: Mapping[str, Any] | None = None
    tokenizer_config: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        modes = (self.pooling,) if isinstance(self.pooling, str) else self.pooling
        if self.layout not in ("hub", "v6") or not set(modes) <= set(POOLING_MODES):
            raise ValueError(f"no such layout or pooling: {self.layout!r}, {self.pooling!r}")
        if self.layout == "v6" and self.do_lower_case:
            raise ValueError("the v6 layout has no do_lower_case: it is saved in tokenizer.json")


def _saved_tokenizer_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a hub's tokenizer_config.json into what transformers 5 saves after reading it."""
    dropped = ("added_tokens_decoder", "add_bos_token", "extra_special_tokens")
    saved = {name: value for name, value in config.items() if name not in dropped}
    if "additional_special_tokens" in saved:
        saved["extra_special_tokens"] = saved.pop("additional_special_tokens")
    if isinstance(saved.get("mask_token"), dict):
        saved["mask_token"] = saved["mask_token"]["content"]
    if saved["tokenizer_class"] == "XLMRobertaTokenizer":
        saved["add_prefix_space"] = True
    return saved | {"backend": "tokenizers", "is_local": True, "local_files_only": True}


def _write_tokenizer(
    folder: Path, tokenizer: _Tokenizer, options: _Options, *, name: str, model_max_length: int
) -> None:
    """Write the tokenizer's files, with the class name and the length that a repository gives.

    In the v6 layout the model's length limit stands here, and special_tokens_map.json is gone.
    """
    backend = json.loads(tokenizer.json)
    if options.tokenizer_padding:
        limit = 32
        backend["truncation"] = {
            "direction": "Right",
            "max_length": limit,
            "strategy": "LongestFirst",
            "stride": 0,
        }
        backend["padding"] = {
            "strategy": {"Fixed": limit},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": tokenizer.pad_id,
            "pad_type_id": 0,
            "pad_token": tokenizer.special["pad_token"],
        }
    _write_json(folder / "tokenizer.json", backend)
    config: dict[str, Any] = {**tokenizer.config, "model_max_length": model_max_length}
    config["tokenizer_class"] = name
    if options.layout == "v6":
        config = _saved_tokenizer_config(config)
        if "chat_template" in config:
            template = config.pop("chat_template")
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    else:
        _write_json(folder / "special_tokens_map.json", tokenizer.special)
        for file, content in tokenizer.files.items():
            (folder / file).write_text(content, encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", {**config, **(options.tokenizer_config or {})})


def _write_modules(folder: Path, options: _Options, *, hidden: int, seed: int) -> None:
    """Write modules.json and everything sentence-transformers keeps beside the transformer."""
    v6 = options.layout == "v6"
    names = ["Transformer", "Pooling"]
    names += ["Dense"] if options.dense else []
    names += ["Normalize"] if options.normalize else []
    _write_modules_json(folder, options, names, paths={"Transformer": ""})

    modes = (options.pooling,) if isinstance(options.pooling, str) else options.pooling
    pooling: dict[str, Any]
    if v6:
        pooling = {
            "embedding_dimension": hidden,
            "pooling_mode": options.pooling,
            "include_prompt": options.include_prompt,
        }
    else:
        # Repositories older than 2024 know the first four modes only, and no include_prompt.
        new = options.include_prompt is False or not set(modes) <= set(list(_POOLING_KEYS)[:4])
        keys = list(_POOLING_KEYS.items())[: None if new else 4]
        pooling = {"word_embedding_dimension": hidden}
        pooling |= {key: mode in modes for mode, key in keys}
        pooling |= {"include_prompt": options.include_prompt} if new else {}
    _write_json(folder / "1_Pooling" / "config.json", pooling)

    if options.dense:
        _write_dense(folder / "2_Dense", options, inputs=hidden * len(modes), seed=seed)
    if v6:
        settings: dict[str, Any] = {
            "transformer_task": "feature-extraction",
            "modality_config": {
                "text": {"method": "forward", "method_output_name": "last_hidden_state"}
            },
            "module_output_name": "token_embeddings",
        }
    else:
        settings = {
            "max_seq_length": options.max_seq_length,
            "do_lower_case": options.do_lower_case,
        }
    if v6 or options.max_seq_length is not None:
        _write_json(folder / "sentence_bert_config.json", settings)


_FEATURE_KEYS = ("module_input_name", "module_output_name")


def _write_dense(folder: Path, options: _Options, *, inputs: int, seed: int) -> None:
    """Write the folder of a Dense module."""
    size, activation = options.dense or (inputs, "identity")
    config: dict[str, Any] = {
        "in_features": inputs,
        "out_features": size,
        "bias": True,
        "activation_function": _ACTIVATIONS[activation],
    }
    if options.layout == "v6":
        config |= dict.fromkeys(_FEATURE_KEYS, "sentence_embedding")
    _write_json(folder / "config.json", config)
    tensors = _random_tensors(_linear("linear", inputs, size), seed)
    _write_tensors(folder / "model.safetensors", tensors)


def _write_modules_json(
    folder: Path, options: _Options, names: list[str], paths: Mapping[str, str]
) -> None:
    """Write modules.json, Normalize's folder and config_sentence_transformers.json.

    On the hub Normalize has a path but no folder: git keeps no empty ones.
    """
    v6 = options.layout == "v6"
    modules = []
    for index, name in enumerate(names):
        path = paths.get(name, f"{index}_{name}")
        kind = _MODULE_TYPES[name] if v6 else f"sentence_transformers.models.{name}"
        modules.append({"idx": index, "name": str(index), "path": path, "type": kind})
        if name == "Normalize" and v6:
            features = dict.fromkeys(_FEATURE_KEYS, "sentence_embedding")
            _write_json(folder / path / "config.json", features)
    _write_json(folder / "modules.json", modules)

    prompts = {
        "prompts": dict(options.prompts or {}),
        "default_prompt_name": options.default_prompt_name,
        "similarity_fn_name": "cosine",
    }
    versions = {"sentence_transformers": "2.0.0", "transformers": "4.6.1", "pytorch": "1.8.1"}
    settings: dict[str, Any] = {"__version__": versions}
    if v6:
        versions.update(sentence_transformers="6.2.0", transformers="5.23.0", pytorch="2.13.0")
        prompts["prompts"] = {"document": "", "query": "", **(options.prompts or {})}
        settings |= {"model_type": "SentenceTransformer", **prompts}
    elif options.prompts or options.default_prompt_name:
        settings |= prompts
    _write_json(folder / "config_sentence_transformers.json", settings)


def _write_model(
    folder: Path,
    *,
    options: _Options,
    seed: int,
    hidden: int,
    config: dict[str, Any],
    own_config: dict[str, Any],
    shapes: _Shapes,
    head: _Shapes,
    tokenizer: _Tokenizer,
    tokenizer_class: str,
    model_max_length: int,
    buffers: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write a transformer's folder.

    ``own_config`` is what transformers 5 saves after reading ``config``, unknown fields and all
    (a NomicBERT's is what its own class saves, as it cannot read the hub's); ``head`` are
    the tensors that stand beside a prefixed model; ``buffers`` are tensors that older versions of
    transformers saved and today's ignore.
    """
    v6 = options.layout == "v6"
    tensors = _random_tensors(shapes, seed)
    if not v6:
        tensors |= buffers or {}
    tensors = {options.prefix + name: tensor for name, tensor in tensors.items()}
    if options.prefix:
        tensors |= _random_tensors(head, seed)
    written = {**config, "torch_dtype": options.dtype, "transformers_version": "4.41.0"}
    if v6:
        written = {**own_config, "dtype": options.dtype, "transformers_version": "5.23.0"}
        if options.max_seq_length is not None:
            model_max_length = options.max_seq_length
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", {**written, **(options.config or {})})
    _write_weights(folder, tensors, dtype=options.dtype, shards=options.shards)
    _write_tokenizer(
        folder, tokenizer, options, name=tokenizer_class, model_max_length=model_max_length
    )
    _write_modules(folder, options, hidden=hidden, seed=seed)


# -------------------------------------------------------------------------------------- families


def _bert_shapes(
    *, hidden: int, layers: int, intermediate: int, vocab: int, positions: int, types: int
) -> _Shapes:
    """List BERT's tensors; RoBERTa and XLM-RoBERTa have the same."""
    shapes: _Shapes = {
        "embeddings.word_embeddings.weight": (vocab, hidden),
        "embeddings.position_embeddings.weight": (positions, hidden),
        "embeddings.token_type_embeddings.weight": (types, hidden),
        **_norm("embeddings.LayerNorm", hidden),
    }
    for index in range(layers):
        layer = f"encoder.layer.{index}"
        for part in ("query", "key", "value"):
            shapes |= _linear(f"{layer}.attention.self.{part}", hidden, hidden)
        shapes |= _linear(f"{layer}.attention.output.dense", hidden, hidden)
        shapes |= _norm(f"{layer}.attention.output.LayerNorm", hidden)
        shapes |= _linear(f"{layer}.intermediate.dense", hidden, intermediate)
        shapes |= _linear(f"{layer}.output.dense", intermediate, hidden)
        shapes |= _norm(f"{layer}.output.LayerNorm", hidden)
    return shapes


_BERT_CONSTANTS = json.loads(
    """{"attention_probs_dropout_prob": 0.1, "gradient_checkpointing": false,
    "hidden_dropout_prob": 0.1, "initializer_range": 0.02, "position_embedding_type": "absolute",
    "use_cache": true}"""
)


def _make_bert_like(
    folder: Path,
    family: str,
    tokenizer: _Tokenizer,
    tokenizer_class: str,
    *,
    seed: int = 0,
    hidden: int = 32,
    layers: int = 2,
    heads: int = 4,
    intermediate: int = 64,
    act: str = "gelu",
    max_positions: int = 128,
    layer_norm_eps: float = 1e-12,
    types: int = 2,
    legacy_norm_names: bool = False,
    **options: Any,
) -> TinyModel:
    """Write BERT, RoBERTa or XLM-RoBERTa: one set of tensors, different positions."""
    settings = _Options(**options)
    # RoBERTa counts positions from padding_idx + 1 = 2, so its table has two rows more.
    positions = max_positions + (0 if family == "bert" else 2)
    shapes = _bert_shapes(
        hidden=hidden,
        layers=layers,
        intermediate=intermediate,
        vocab=tokenizer.size,
        positions=positions,
        types=types,
    )
    if legacy_norm_names:
        shapes = {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ): shape
            for name, shape in shapes.items()
        }
    if settings.prefix:  # the models with a language modelling head have no pooler
        name = {"bert": "BertForMaskedLM", "roberta": "RobertaForMaskedLM"}.get(family)
        architecture = name or "XLMRobertaForMaskedLM"
    else:
        shapes |= _linear("pooler.dense", hidden, hidden)
        name = {"bert": "BertModel", "roberta": "RobertaModel"}.get(family)
        architecture = name or "XLMRobertaModel"
    scope = "cls.predictions" if family == "bert" else "lm_head"
    config = {
        **_BERT_CONSTANTS,
        "architectures": [architecture],
        "hidden_act": act,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "layer_norm_eps": layer_norm_eps,
        "max_position_embeddings": positions,
        "model_type": family.replace("_", "-"),
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "pad_token_id": tokenizer.pad_id,
        "type_vocab_size": types,
        "vocab_size": tokenizer.size,
    }
    if family != "bert":
        config |= {"bos_token_id": 0, "eos_token_id": 2}
    own = json.loads(
        """{"add_cross_attention": false, "classifier_dropout": null, "is_decoder": false,
        "tie_word_embeddings": true, "use_cache": false}"""
    )
    own = {"bos_token_id": None, "eos_token_id": None, **config, **own}
    _write_model(
        folder,
        options=settings,
        seed=seed,
        hidden=hidden,
        config=config,
        own_config=own,
        shapes=shapes,
        head={f"{scope}.bias": (tokenizer.size,)},
        tokenizer=tokenizer,
        tokenizer_class=tokenizer_class,
        model_max_length=max_positions,
        buffers={"embeddings.position_ids": np.arange(positions, dtype=np.int64)[None]},
    )
    return TinyModel(folder, folder)


def make_bert(folder: Path, *, cased: bool = False, **arguments: Any) -> TinyModel:
    """Write a BERT as all-MiniLM, BGE, E5 and GTE are.

    Its own arguments are ``cased``, ``layer_norm_eps``, ``types`` (of tokens) and
    ``legacy_norm_names``, which are those of checkpoints converted from TensorFlow.
    """
    tokenizer = _wordpiece_tokenizer("bert", cased)
    return _make_bert_like(folder, "bert", tokenizer, "BertTokenizer", **arguments)


def make_roberta(folder: Path, **arguments: Any) -> TinyModel:
    """Write a RoBERTa as all-roberta-large-v1 is; the table has max_positions + 2 rows."""
    arguments = {"layer_norm_eps": 1e-5, "types": 1, **arguments}
    tokenizer = _byte_level_tokenizer("roberta")
    return _make_bert_like(folder, "roberta", tokenizer, "RobertaTokenizer", **arguments)


def make_xlm_roberta(folder: Path, *, metaspace_only: bool = False, **arguments: Any) -> TinyModel:
    """Write an XLM-RoBERTa as multilingual-e5 and bge-m3 are: RoBERTa with a Unigram tokenizer.

    ``metaspace_only=True`` writes tokenizer.json as newer converters do, without the split at
    white space. transformers 5 splits all the same, so that its tokens, and sentence-transformers'
    vectors, differ from the file's where a text ends with a space or has one at a special token.
    """
    arguments = {"layer_norm_eps": 1e-5, "types": 1, **arguments}
    if metaspace_only and arguments.get("layout") == "v6":
        raise ValueError("metaspace_only is a hub layout: transformers 5 saves what it has rebuilt")
    tokenizer = _unigram_tokenizer(metaspace_only)
    return _make_bert_like(folder, "xlm_roberta", tokenizer, "XLMRobertaTokenizer", **arguments)


def make_mpnet(
    folder: Path,
    *,
    seed: int = 0,
    hidden: int = 32,
    layers: int = 2,
    heads: int = 4,
    intermediate: int = 64,
    act: str = "gelu",
    max_positions: int = 128,
    layer_norm_eps: float = 1e-5,
    **options: Any,
) -> TinyModel:
    """Write an MPNet as all-mpnet-base-v2 is: no token types, one relative bias for all layers."""
    settings = _Options(**options)
    tokenizer = _wordpiece_tokenizer("mpnet", cased=False)
    positions = max_positions + 2
    shapes: _Shapes = {
        "embeddings.word_embeddings.weight": (tokenizer.size, hidden),
        "embeddings.position_embeddings.weight": (positions, hidden),
        **_norm("embeddings.LayerNorm", hidden),
        # transformers computes 32 buckets whatever the config says.
        "encoder.relative_attention_bias.weight": (32, heads),
    }
    for index in range(layers):
        layer = f"encoder.layer.{index}"
        for part in "qkvo":
            shapes |= _linear(f"{layer}.attention.attn.{part}", hidden, hidden)
        shapes |= _norm(f"{layer}.attention.LayerNorm", hidden)
        shapes |= _linear(f"{layer}.intermediate.dense", hidden, intermediate)
        shapes |= _linear(f"{layer}.output.dense", intermediate, hidden)
        shapes |= _norm(f"{layer}.output.LayerNorm", hidden)
    if not settings.prefix:
        shapes |= _linear("pooler.dense", hidden, hidden)
    config: dict[str, Any] = {
        "architectures": ["MPNetForMaskedLM" if settings.prefix else "MPNetModel"],
        "attention_probs_dropout_prob": 0.1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "hidden_act": act,
        "hidden_dropout_prob": 0.1,
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": intermediate,
        "layer_norm_eps": layer_norm_eps,
        "max_position_embeddings": positions,
        "model_type": "mpnet",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "pad_token_id": 1,
        "relative_attention_num_buckets": 32,
        "vocab_size": tokenizer.size,
    }
    _write_model(
        folder,
        options=settings,
        seed=seed,
        hidden=hidden,
        config=config,
        own_config=config | {"tie_word_embeddings": True},
        shapes=shapes,
        head={"lm_head.bias": (tokenizer.size,)},
        tokenizer=tokenizer,
        tokenizer_class="MPNetTokenizer",
        model_max_length=max_positions,
        buffers={"embeddings.position_ids": np.arange(positions, dtype=np.int64)[None]},
    )
    return TinyModel(folder, folder)


def make_distilbert(
    folder: Path,
    *,
    seed: int = 0,
    hidden: int = 32,
    layers: int = 2,
    heads: int = 4,
    intermediate: int = 64,
    act: str = "gelu",
    max_positions: int = 128,
    cased: bool = False,
    **options: Any,
) -> TinyModel:
    """Write a DistilBERT: no token types; LayerNorm's epsilon is 1e-12 and in no config."""
    settings = _Options(**options)
    tokenizer = _wordpiece_tokenizer("bert", cased)
    shapes: _Shapes = {
        "embeddings.word_embeddings.weight": (tokenizer.size, hidden),
        "embeddings.position_embeddings.weight": (max_positions, hidden),
        **_norm("embeddings.LayerNorm", hidden),
    }
    for index in range(layers):
        layer = f"transformer.layer.{index}"
        for part in ("q_lin", "k_lin", "v_lin", "out_lin"):
            shapes |= _linear(f"{layer}.attention.{part}", hidden, hidden)
        shapes |= _norm(f"{layer}.sa_layer_norm", hidden)
        shapes |= _linear(f"{layer}.ffn.lin1", hidden, intermediate)
        shapes |= _linear(f"{layer}.ffn.lin2", intermediate, hidden)
        shapes |= _norm(f"{layer}.output_layer_norm", hidden)
    config: dict[str, Any] = {
        "activation": act,
        "architectures": ["DistilBertForMaskedLM" if settings.prefix else "DistilBertModel"],
        "attention_dropout": 0.1,
        "dim": hidden,
        "dropout": 0.1,
        "hidden_dim": intermediate,
        "initializer_range": 0.02,
        "max_position_embeddings": max_positions,
        "model_type": "distilbert",
        "n_heads": heads,
        "n_layers": layers,
        "pad_token_id": 0,
        "qa_dropout": 0.1,
        "seq_classif_dropout": 0.2,
        "sinusoidal_pos_embds": False,
        "tie_weights_": True,
        "vocab_size": tokenizer.size,
    }
    own = {"bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": True}
    _write_model(
        folder,
        options=settings,
        seed=seed,
        hidden=hidden,
        config=config,
        own_config=config | own,
        shapes=shapes,
        head={"vocab_projector.bias": (tokenizer.size,)},
        tokenizer=tokenizer,
        tokenizer_class="DistilBertTokenizer",
        model_max_length=max_positions,
    )
    return TinyModel(folder, folder)


# The remote code of nomic-ai/nomic-bert-2048 gates fc11's output with the activation of fc12's:
# ``fc2(fc11(x) * silu(fc12(x)))``. transformers 5.23 agrees: "nomic_bert" in its
# conversion_mapping.py renames fc11 to up_proj and fc12 to gate_proj, and NomicBertMLP computes
# ``down_proj(act(gate_proj(x)) * up_proj(x))``. The same table cuts Wqkv into three equal parts
# along its rows: first all of q, then all of k, then all of v.
_NOMIC_ACTIVATIONS = {"swiglu": "silu", "geglu": "gelu", "glu": "sigmoid"}
_NOMIC_RENAMES = (
    ("encoder.layers", "layers"),
    ("emb_ln", "embeddings.LayerNorm"),
    ("attn.out_proj", "self_attn.o_proj"),
    ("mlp.fc11", "mlp.up_proj"),
    ("mlp.fc12", "mlp.gate_proj"),
    ("mlp.fc2", "mlp.down_proj"),
    ("norm1", "post_attention_layernorm"),
    ("norm2", "post_mlp_layernorm"),
)


_NOMIC_CONSTANTS = json.loads(
    """{"architectures": ["NomicBertModel"], "attn_pdrop": 0.0, "auto_map": {
    "AutoConfig": "nomic-ai/nomic-bert-2048--configuration_hf_nomic_bert.NomicBertConfig",
    "AutoModel": "nomic-ai/nomic-bert-2048--modeling_hf_nomic_bert.NomicBertModel"},
    "bos_token_id": null, "causal": false, "dense_seq_output": true, "embd_pdrop": 0.0,
    "eos_token_id": null, "fused_bias_fc": true, "fused_dropout_add_ln": true,
    "initializer_range": 0.02, "mlp_fc1_bias": false, "mlp_fc2_bias": false,
    "model_type": "nomic_bert", "pad_vocab_size_multiple": 64, "parallel_block": false,
    "parallel_block_tied_norm": false, "prenorm": false, "qkv_proj_bias": false,
    "reorder_and_upcast_attn": false, "resid_pdrop": 0.0, "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": false, "rotary_emb_scale_base": null,
    "scale_attn_by_inverse_layer_idx": false, "scale_attn_weights": true,
    "summary_activation": null, "summary_first_dropout": 0.0, "summary_proj_to_labels": true,
    "summary_type": "cls_index", "summary_use_proj": true, "type_vocab_size": 2,
    "use_cache": true, "use_flash_attn": true, "use_rms_norm": false, "use_xentropy": true}"""
)
_NOMIC_OWN_CONSTANTS = json.loads(
    """{"architectures": ["NomicBertModel"], "attention_probs_dropout_prob": 0.0,
    "bos_token_id": null, "classifier_dropout": null, "eos_token_id": null,
    "hidden_dropout_prob": 0.0, "initializer_range": 0.02, "model_type": "nomic_bert",
    "pad_token_id": 0, "type_vocab_size": 2}"""
)


def _nomic_reference_tensors(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rename and cut the hub's NomicBERT tensors into those of transformers' own class."""
    converted = {}
    for hub_name, tensor in tensors.items():
        name = hub_name
        for old, new in _NOMIC_RENAMES:
            name = name.replace(old, new)
        if "attn.Wqkv" in name:
            for part, rows in zip("qkv", np.split(tensor, 3), strict=True):
                converted[name.replace("attn.Wqkv", f"self_attn.{part}_proj")] = rows
        else:
            converted[name] = tensor
    return converted


def make_nomic_bert(
    folder: Path,
    *,
    seed: int = 0,
    hidden: int = 32,
    layers: int = 2,
    heads: int = 4,
    intermediate: int = 64,
    act: str = "swiglu",
    max_positions: int = 256,
    layer_norm_eps: float = 1e-12,
    rotary_base: float = 1000,
    rotary_scaling_factor: float | None = None,
    max_trained_positions: int = 128,
    config_fields: str = "gpt2",
    **options: Any,
) -> TinyModel:
    """Write a NomicBERT as nomic-embed-text-v1 and v1.5 are; ``act`` is swiglu, geglu or glu.

    ``config_fields="gpt2"`` gives the config.json of the repositories' first years, whose names
    (``n_embd``, ``n_head``, ...) transformers' own class does not read, so that the reference is a
    second folder beside this one, which ``config`` and ``prefix`` leave alone. ``"both"`` adds the
    names that it does read, as revisions adapted to transformers 5 do; then, and in the v6 layout,
    one folder serves for both. A rotary_scaling_factor stretches the rotary base for inputs over
    max_trained_positions; transformers does so by the longest input of a batch and remembers it,
    so such inputs have to be embedded alone and by a fresh reference each.
    """
    settings = _Options(**options)
    if config_fields not in ("gpt2", "both"):
        raise ValueError(f"config_fields is 'gpt2' or 'both', not {config_fields!r}")
    one_folder = settings.layout == "v6" or config_fields == "both"
    if one_folder and settings.prefix:
        raise ValueError("transformers strips no prefix from a NomicBERT: it would load noise")
    tokenizer = _wordpiece_tokenizer("bert", cased=False)
    vocab = -(-tokenizer.size // 64) * 64  # pad_vocab_size_multiple: rows that no token has
    shapes: _Shapes = {
        "embeddings.word_embeddings.weight": (vocab, hidden),
        "embeddings.token_type_embeddings.weight": (2, hidden),
        **_norm("emb_ln", hidden),
    }
    for index in range(layers):
        layer = f"encoder.layers.{index}"
        shapes |= _linear(f"{layer}.attn.Wqkv", hidden, 3 * hidden, bias=False)
        shapes |= _linear(f"{layer}.attn.out_proj", hidden, hidden, bias=False)
        shapes |= _linear(f"{layer}.mlp.fc11", hidden, intermediate, bias=False)
        shapes |= _linear(f"{layer}.mlp.fc12", hidden, intermediate, bias=False)
        shapes |= _linear(f"{layer}.mlp.fc2", intermediate, hidden, bias=False)
        shapes |= _norm(f"{layer}.norm1", hidden)
        shapes |= _norm(f"{layer}.norm2", hidden)
    config = {
        **_NOMIC_CONSTANTS,
        "activation_function": act,
        "layer_norm_epsilon": layer_norm_eps,
        "max_trained_positions": max_trained_positions,
        "n_embd": hidden,
        "n_head": heads,
        "n_inner": intermediate,
        "n_layer": layers,
        "n_positions": max_positions,
        "rotary_emb_base": rotary_base,
        "rotary_scaling_factor": rotary_scaling_factor,
        "vocab_size": vocab,
    }
    rope: dict[str, Any] = {"rope_theta": float(rotary_base), "rope_type": "default"}
    if rotary_scaling_factor is not None:
        # The same formula as the remote code's, over the length the model was trained for.
        rope |= {"rope_type": "dynamic", "factor": float(rotary_scaling_factor)}
    own_config = {
        **_NOMIC_OWN_CONSTANTS,
        "head_dim": hidden // heads,
        "hidden_act": _NOMIC_ACTIVATIONS[act],
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "layer_norm_eps": layer_norm_eps,
        "max_position_embeddings": max_trained_positions,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "rope_parameters": rope,
        "vocab_size": vocab,
    }
    if config_fields == "both":
        config |= {name: value for name, value in own_config.items() if name not in config}
    write = {
        "options": settings,
        "seed": seed,
        "hidden": hidden,
        "own_config": own_config,
        "shapes": shapes,
        "head": {"cls.predictions.decoder.bias": (vocab,)},
        "tokenizer": tokenizer,
        "tokenizer_class": "BertTokenizer",
        "model_max_length": max_positions,
    }
    _write_model(folder, config=config, **write)
    if one_folder:
        return TinyModel(folder, folder)
    reference = folder.with_name(f"{folder.name}-reference")
    plain = _Options(**{**options, "config": None, "prefix": "", "shards": 1})
    _write_model(reference, config=own_config, **{**write, "options": plain})
    tensors = _nomic_reference_tensors(_random_tensors(shapes, seed))
    _write_weights(reference, tensors, dtype=settings.dtype, shards=1)
    return TinyModel(folder, reference)


_MODERNBERT_CONSTANTS = json.loads(
    """{"attention_dropout": 0.0, "classifier_activation": "gelu", "classifier_bias": false,
    "classifier_dropout": 0.0, "classifier_pooling": "mean", "decoder_bias": true,
    "deterministic_flash_attn": false, "embedding_dropout": 0.0, "gradient_checkpointing": false,
    "initializer_cutoff_factor": 2.0, "initializer_range": 0.02, "mlp_dropout": 0.0,
    "model_type": "modernbert", "position_embedding_type": "absolute",
    "sparse_pred_ignore_index": -100, "sparse_prediction": false}"""
)


def make_modernbert(
    folder: Path,
    *,
    seed: int = 0,
    hidden: int = 32,
    layers: int = 4,
    heads: int = 4,
    intermediate: int = 64,
    act: str = "gelu",
    max_positions: int = 128,
    norm_eps: float = 1e-5,
    norm_bias: bool = False,
    attention_bias: bool = False,
    mlp_bias: bool = False,
    global_attn_every_n_layers: int = 3,
    local_attention: int = 16,
    global_rope_theta: float = 160000.0,
    local_rope_theta: float = 10000.0,
    **options: Any,
) -> TinyModel:
    """Write a ModernBERT as gte-modernbert-base is: layers 0, 3, ... global, the others local.

    The window of local layers is small, so that texts of a dozen words already feel it.
    """
    settings = _Options(**{"pooling": "cls", "normalize": False, **options})
    tokenizer = _byte_level_tokenizer("modernbert")
    vocab = tokenizer.size + 11  # the real table is longer than the vocabulary too
    shapes: _Shapes = {
        "embeddings.tok_embeddings.weight": (vocab, hidden),
        **_norm("embeddings.norm", hidden, norm_bias),
    }
    for index in range(layers):
        layer = f"layers.{index}"
        if index > 0:  # the embeddings' own norm stands in for the first layer's
            shapes |= _norm(f"{layer}.attn_norm", hidden, norm_bias)
        shapes |= _linear(f"{layer}.attn.Wqkv", hidden, 3 * hidden, attention_bias)
        shapes |= _linear(f"{layer}.attn.Wo", hidden, hidden, attention_bias)
        shapes |= _norm(f"{layer}.mlp_norm", hidden, norm_bias)
        shapes |= _linear(f"{layer}.mlp.Wi", hidden, 2 * intermediate, mlp_bias)
        shapes |= _linear(f"{layer}.mlp.Wo", intermediate, hidden, mlp_bias)
    shapes |= _norm("final_norm", hidden, norm_bias)
    backend = Tokenizer.from_str(tokenizer.json)
    config = {
        **_MODERNBERT_CONSTANTS,
        "architectures": ["ModernBertForMaskedLM" if settings.prefix else "ModernBertModel"],
        "attention_bias": attention_bias,
        **dict.fromkeys(("bos_token_id", "cls_token_id"), backend.token_to_id("[CLS]")),
        **dict.fromkeys(("eos_token_id", "sep_token_id"), backend.token_to_id("[SEP]")),
        "global_attn_every_n_layers": global_attn_every_n_layers,
        "hidden_activation": act,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "layer_norm_eps": norm_eps,  # in the real files too; transformers reads norm_eps alone
        "local_attention": local_attention,
        "max_position_embeddings": max_positions,
        "mlp_bias": mlp_bias,
        "norm_bias": norm_bias,
        "norm_eps": norm_eps,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "pad_token_id": tokenizer.pad_id,
        "vocab_size": vocab,
    }
    hub = {
        "global_rope_theta": global_rope_theta,
        "local_rope_theta": local_rope_theta,
        "reference_compile": False,
    }
    own = {
        "layer_types": [
            "sliding_attention" if index % global_attn_every_n_layers else "full_attention"
            for index in range(layers)
        ],
        "rope_parameters": {
            "full_attention": {"rope_theta": global_rope_theta, "rope_type": "default"},
            "sliding_attention": {"rope_theta": local_rope_theta, "rope_type": "default"},
        },
        "tie_word_embeddings": True,
    }
    _write_model(
        folder,
        options=settings,
        seed=seed,
        hidden=hidden,
        config=config | hub,
        own_config=config | own,
        shapes=shapes,
        head={"head.norm.weight": (hidden,), "decoder.bias": (vocab,)},
        tokenizer=tokenizer,
        tokenizer_class=(
            "TokenizersBackend" if settings.layout == "v6" else "PreTrainedTokenizerFast"
        ),
        model_max_length=max_positions,
    )
    return TinyModel(folder, folder)


def make_qwen3(
    folder: Path,
    *,
    seed: int = 0,
    hidden: int = 32,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    intermediate: int = 64,
    act: str = "silu",
    max_positions: int = 128,
    rms_norm_eps: float = 1e-6,
    rope_theta: float = 1000000,
    attention_bias: bool = False,
    **options: Any,
) -> TinyModel:
    """Write a Qwen3-Embedding: a causal decoder pooled at the end-of-text token.

    As in the real one, all heads together are wider than the model (head_dim is 2 * hidden / heads
    unless given) and there is no sentence_bert_config.json unless max_seq_length is given.
    """
    settings = _Options(**{"pooling": "lasttoken", "max_seq_length": None, **options})
    tokenizer = _byte_level_tokenizer("qwen3")
    size = head_dim or 2 * hidden // heads
    shapes: _Shapes = {"embed_tokens.weight": (tokenizer.size, hidden)}
    for index in range(layers):
        layer = f"layers.{index}"
        shapes |= _norm(f"{layer}.input_layernorm", hidden, bias=False)
        shapes |= _linear(f"{layer}.self_attn.q_proj", hidden, heads * size, attention_bias)
        shapes |= _linear(f"{layer}.self_attn.k_proj", hidden, kv_heads * size, attention_bias)
        shapes |= _linear(f"{layer}.self_attn.v_proj", hidden, kv_heads * size, attention_bias)
        shapes |= _linear(f"{layer}.self_attn.o_proj", heads * size, hidden, attention_bias)
        shapes |= _norm(f"{layer}.self_attn.q_norm", size, bias=False)
        shapes |= _norm(f"{layer}.self_attn.k_norm", size, bias=False)
        shapes |= _norm(f"{layer}.post_attention_layernorm", hidden, bias=False)
        shapes |= _linear(f"{layer}.mlp.gate_proj", hidden, intermediate, bias=False)
        shapes |= _linear(f"{layer}.mlp.up_proj", hidden, intermediate, bias=False)
        shapes |= _linear(f"{layer}.mlp.down_proj", intermediate, hidden, bias=False)
    shapes |= _norm("norm", hidden, bias=False)
    end = tokenizer.pad_id
    config: dict[str, Any] = {
        "architectures": ["Qwen3ForCausalLM"],  # the real file says so, though it has no head
        "attention_bias": attention_bias,
        "attention_dropout": 0.0,
        "bos_token_id": end,
        "eos_token_id": end,
        "head_dim": size,
        "hidden_act": act,
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": intermediate,
        "max_position_embeddings": max_positions,
        "max_window_layers": layers,
        "model_type": "qwen3",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": rms_norm_eps,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": tokenizer.size,
    }
    own = {
        "architectures": ["Qwen3Model"],
        "layer_types": ["full_attention"] * layers,
        "pad_token_id": None,
        "rope_parameters": {"rope_theta": rope_theta, "rope_type": "default"},
        "use_cache": False,
    }
    _write_model(
        folder,
        options=settings,
        seed=seed,
        hidden=hidden,
        config=config | {"rope_scaling": None, "rope_theta": rope_theta, "use_cache": True},
        own_config=config | own,
        shapes=shapes,
        head={"lm_head.weight": (tokenizer.size, hidden)},
        tokenizer=tokenizer,
        tokenizer_class="Qwen2Tokenizer",
        model_max_length=max_positions if settings.layout == "v6" else 131072,
    )
    return TinyModel(folder, folder)


def make_static(
    folder: Path,
    *,
    seed: int = 0,
    hidden: int = 32,
    style: str = "model2vec",
    mapping: bool = False,
    token_weights: bool = False,
    **options: Any,
) -> TinyModel:
    """Write a static embedding model: a table of token vectors and their mean.

    ``style="model2vec"`` is potion's layout, whose table may be smaller than the vocabulary, with a
    ``mapping`` from ids to rows, and may have ``weights``, one a token. ``"subfolder"`` is that of
    static-retrieval-mrl-en-v1. Pooling, prefix, shards and max_seq_length mean nothing here.
    sentence-transformers drops the padding of tokenizer.json but obeys its truncation.
    """
    settings = _Options(**options)
    if style not in ("model2vec", "subfolder"):
        raise ValueError(f"style is 'model2vec' or 'subfolder', not {style!r}")
    v6 = settings.layout == "v6"
    tokenizer = _wordpiece_tokenizer("bert", cased=False)
    name = "embeddings" if style == "model2vec" and not v6 else "embedding.weight"
    rows = tokenizer.size // 2 if mapping else tokenizer.size
    table = _random_tensors({"embeddings": (rows, hidden)}, seed)["embeddings"]
    tensors = {name: table.astype(_NUMPY_TYPES[settings.dtype])}
    rng = np.random.default_rng(seed)
    if mapping:
        tensors["mapping"] = rng.integers(0, rows, tokenizer.size)
    if token_weights:
        tensors["weights"] = rng.uniform(0.1, 2, tokenizer.size).astype(np.float32)

    path = {"model2vec": ".", "subfolder": "0_StaticEmbedding"}[style]
    home = folder if v6 else folder / path
    home.mkdir(parents=True, exist_ok=True)
    _write_tensors(home / "model.safetensors", tensors)
    _write_tokenizer(home, tokenizer, settings, name="BertTokenizer", model_max_length=512)
    if v6 or style == "subfolder":  # these keep nothing of the tokenizer but its own file
        for file in ("tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
            (home / file).unlink(missing_ok=True)
    else:
        config: dict[str, Any] = {
            "model_type": "model2vec",
            "architectures": ["StaticModel"],
            "tokenizer_name": "baai/bge-base-en-v1.5",
            "apply_pca": hidden,
            "apply_zipf": True,
            "hidden_dim": hidden,
            "seq_length": 1000000,
            "normalize": settings.normalize,
        }
        _write_json(folder / "config.json", {**config, **(settings.config or {})})
    names = ["StaticEmbedding"] + ["Dense"] * bool(settings.dense)
    names += ["Normalize"] * settings.normalize
    if settings.dense:
        _write_dense(folder / "1_Dense", settings, inputs=hidden, seed=seed)
    _write_modules_json(folder, settings, names, paths={"StaticEmbedding": "" if v6 else path})
    return TinyModel(folder, folder)


FAMILIES: dict[str, Callable[..., TinyModel]] = {
    "bert": make_bert,
    "roberta": make_roberta,
    "xlm_roberta": make_xlm_roberta,
    "mpnet": make_mpnet,
    "distilbert": make_distilbert,
    "nomic_bert": make_nomic_bert,
    "modernbert": make_modernbert,
    "qwen3": make_qwen3,
    "static": make_static,
}
"""All take seed, hidden and the fields of _Options; all but static also take layers, heads,
intermediate, act and max_positions."""
