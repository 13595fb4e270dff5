# SPDX-License-Identifier: MIT OR Apache-2.0
"""A folder's tokenizer, with the ids that transformers' ``AutoTokenizer`` gives.

transformers 5 takes tokenizer.json as it stands for a few classes only. The others it builds anew:
vocabulary and merges come from tokenizer.json, the added tokens from the files too, and the rest
from the class's code and its settings in tokenizer_config.json. So two repositories with the same
tokenizer.json may give different ids. ``TOKENIZER_CLASSES`` has one row a class.

Read from transformers 5.23: which class in ``AutoTokenizer.from_pretrained``, what of the files in
``TokenizersBackend``, the rows in the ``__init__`` of models/*/tokenization_*.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors

from embedding_server.engine.cuts import QWEN_WORDS
from embedding_server.engine.tokenizer import Tokenizer
from embedding_server.errors import ModelNotSupported
from embedding_server.models.tokenizer_files import (
    SPECIAL_TOKENS,
    Token,
    TokenizerFiles,
    read_backend,
    read_tokenizer_files,
)

__all__ = ["TOKENIZER_CLASSES", "UNLIMITED", "load_static_tokenizer", "load_tokenizer"]

UNLIMITED = 2**31 - 1
"""The limit in tokens of a model that has none."""


def load_tokenizer(
    folder: Path,
    config: Mapping[str, Any],
    *,
    max_tokens: int,
    lowercase: bool = False,
    exclude_prompt: bool = False,
    any_family: bool = False,
) -> Tokenizer:
    """The tokenizer in a transformer's ``folder``, whose ``config.json`` is ``config``.

    With ``any_family`` an unknown family is taken, if its tokenizer's class is known.
    ``lowercase`` is sentence_bert_config.json's ``do_lower_case``. Raises ModelNotSupported,
    naming file and value, for settings that can't be followed exactly.
    """
    files = read_tokenizer_files(folder)
    name = _class_name(files, config, any_family)
    row = TOKENIZER_CLASSES[name]
    special = {**row.special, **files.special_tokens()}
    if row.build is None:
        made = files.backend
        if made.padding is not None:
            special.setdefault("pad_token", made.padding["pad_token"])
    elif isinstance(files.backend.model, row.model):
        made = row.build(files, special)
    else:
        kind = type(files.backend.model).__name__
        raise ModelNotSupported(f"{files.path}: no {name} can be made of a {kind} model.")
    made.encode_special_tokens = files.flag("split_special_tokens", False)
    named = {key: token for key in SPECIAL_TOKENS if (token := special.get(key)) is not None}
    extra = files.extra_tokens()
    _add_tokens(made, files.added, named, extra)
    contents = list(dict.fromkeys(str(token) for token in (*named.values(), *extra)))
    if row.readds_special:
        made.add_tokens([AddedToken(content, special=True) for content in contents])
    if row.ends is not None:
        first, last = (_end(files, key, named, made) for key in row.ends)
        # The post-processor that takes any two tokens; there are no pairs of texts here.
        made.post_processor = processors.BertProcessing(last, first)
    if lowercase:  # as sentence-transformers does
        parts = _parts(made.normalizer)
        if not any(isinstance(part, normalizers.Lowercase) for part in parts):
            made.normalizer = normalizers.Sequence([normalizers.Lowercase(), *parts])
    return _tokenizer(
        files.path,
        made,
        max_tokens=max_tokens,
        vocab_size=config.get("vocab_size"),
        pad_id=made.token_to_id(str(named["pad_token"])) if "pad_token" in named else None,
        special_ids=[i for content in contents if (i := made.token_to_id(content)) is not None],
        exclude_prompt=exclude_prompt,
        keep_end=files.keeps_end(),
    )


def load_static_tokenizer(path: Path, *, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer.json at ``path`` as sentence-transformers' ``StaticEmbedding`` uses it:
    without special tokens, and with the file's own limit.

    Raises ModelNotSupported if it can't be read.
    """
    _, backend = read_backend(path)
    limit: dict[str, Any] = backend.truncation or {"max_length": UNLIMITED}
    if limit.get("strategy") == "only_second":
        raise ModelNotSupported(f"{path} cuts the second text of a pair, and there is but one.")
    return _tokenizer(
        path,
        backend,
        max_tokens=limit["max_length"],
        vocab_size=vocab_size,
        add_special_tokens=False,
        keep_end=limit.get("direction") == "left",
    )


def _tokenizer(path: Path, made: tokenizers.Tokenizer, **options: Any) -> Tokenizer:
    """The Tokenizer of ``made``; a refusal names the file at ``path``."""
    try:
        return Tokenizer(made, **options)
    except ModelNotSupported as refusal:
        raise ModelNotSupported(f"{path}: {refusal}") from None


# ----------------------------------------------------------------------------------- the classes

_Special = dict[str, Token | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Class:
    """How transformers makes one class of tokenizer."""

    build: Callable[[TokenizerFiles, _Special], tokenizers.Tokenizer] | None = None
    """Makes it without added tokens, and may replace special ones; None: tokenizer.json as it is,
    with its post-processor."""
    model: type[models.Model] = models.Model
    special: Mapping[str, Token | None]
    """The named special tokens by default."""
    ends: tuple[str, str] | None = None
    """The special tokens before and after a text; None: the file's post-processor puts them."""
    readds_special: bool = False
    """The special tokens lose what the files say of them, such as ``lstrip``."""


def _bert(files: TokenizerFiles, special: _Special) -> tokenizers.Tokenizer:
    model: models.WordPiece = files.backend.model
    model.unk_token = str(special["unk_token"])
    model.continuing_subword_prefix = "##"
    model.max_input_chars_per_word = 100
    if model.token_to_id(model.unk_token) is None:
        raise ModelNotSupported(f"{files.path} lacks the unknown token {model.unk_token!r}.")
    made = tokenizers.Tokenizer(model)
    made.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=files.flag("tokenize_chinese_chars", True),
        strip_accents=files.optional_flag("strip_accents"),
        lowercase=files.flag("do_lower_case", True),
    )
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return made


def _mpnet(files: TokenizerFiles, special: _Special) -> tokenizers.Tokenizer:
    for key, token in special.items():
        if isinstance(token, str):  # the mask takes the space before it along
            special[key] = AddedToken(token, lstrip=key == "mask_token")
    return _bert(files, special)


def _roberta(files: TokenizerFiles, special: _Special) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(_bare_byte_pairs(files))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=files.flag("add_prefix_space", False)
    )
    return made


def _xlm_roberta(files: TokenizerFiles, special: _Special) -> tokenizers.Tokenizer:
    # A Unigram of tokenizers shows neither option. No piece of the vocabulary can look like such
    # a key: within a string its quotes would be escaped.
    if not re.search(r'"unk_id"\s*:\s*3\b', files.text):
        raise ModelNotSupported(f"{files.path}: an XLMRobertaTokenizer has the unk_id 3.")
    if re.search(r'"byte_fallback"\s*:\s*true', files.text):
        raise ModelNotSupported(f"{files.path}: an XLMRobertaTokenizer has no byte_fallback.")
    made = tokenizers.Tokenizer(files.backend.model)
    for part in _parts(files.backend.normalizer):
        if isinstance(part, normalizers.Precompiled):
            made.normalizer = part
            break
    scheme = "always" if files.flag("add_prefix_space", True) else "never"
    metaspace = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme=scheme)
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
    return made


def _qwen2(files: TokenizerFiles, special: _Special) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(_bare_byte_pairs(files))
    made.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(QWEN_WORDS), behavior="isolated")
    space = bool(files.optional_flag("add_prefix_space"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    if files.backend.post_processor is not None:
        made.post_processor = files.backend.post_processor
    return made


def _bare_byte_pairs(files: TokenizerFiles) -> models.BPE:
    """The file's vocabulary and merges, without its options."""
    model: models.BPE = files.backend.model
    prefix = model.continuing_subword_prefix
    if prefix:  # the merges were read with it
        raise ModelNotSupported(f"{files.path}: continuing_subword_prefix can't be {prefix!r}.")
    model.dropout = None
    model.unk_token = None
    model.end_of_word_suffix = ""
    model.fuse_unk = False
    model.byte_fallback = False
    model.ignore_merges = False
    return model


_BERT_TOKENS = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
_ROBERTA_TOKENS = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "sep_token": "</s>",
    "cls_token": "<s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
}
_CLS_SEP = ("cls_token", "sep_token")
_BERT = _Class(build=_bert, model=models.WordPiece, special=_BERT_TOKENS, ends=_CLS_SEP)
_AS_IT_IS = _Class(special={})

TOKENIZER_CLASSES: Mapping[str, _Class] = {
    "BertTokenizer": _BERT,
    "DistilBertTokenizer": _BERT,
    "MPNetTokenizer": _Class(
        build=_mpnet,
        model=models.WordPiece,
        special={**_ROBERTA_TOKENS, "unk_token": "[UNK]"},
        ends=_CLS_SEP,
    ),
    "RobertaTokenizer": _Class(
        build=_roberta, model=models.BPE, special=_ROBERTA_TOKENS, ends=_CLS_SEP
    ),
    "XLMRobertaTokenizer": _Class(
        build=_xlm_roberta,
        model=models.Unigram,
        special=_ROBERTA_TOKENS,
        ends=("bos_token", "eos_token"),
    ),
    "Qwen2Tokenizer": _Class(
        build=_qwen2,
        model=models.BPE,
        special=dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>"),
        readds_special=True,
    ),
    "PreTrainedTokenizer": _AS_IT_IS,
    "TokenizersBackend": _AS_IT_IS,
}
"""Class, without the ``Fast`` at its end that older repositories have, to what makes it."""

_CLASS_OF_MODEL: Mapping[str, str] = {
    "bert": "BertTokenizer",
    "distilbert": "BertTokenizer",
    "electra": "BertTokenizer",
    "nomic_bert": "BertTokenizer",
    "mpnet": "MPNetTokenizer",
    "roberta": "RobertaTokenizer",
    "xlm-roberta": "XLMRobertaTokenizer",
    "modernbert": "TokenizersBackend",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
}
"""``model_type`` -> the class where the repository names none (``TOKENIZER_MAPPING_NAMES``)."""

_CLASS_IS_FIXED = ("modernbert", "qwen2")
"""Whatever the repository names (``MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS``)."""

_OTHER_AS_IT_IS = (
    *("arctic", "aria", "beam", "bigbird_pegasus", "camembertv2-base", "canary", "chatlm"),
    *("cohere_asr", "ernie4_5", "ernie4_5_moe", "EvollaModel", "flex_olmo", "fuyu", "glm"),
    *("glm4", "glm4_moe", "glm4_moe_lite", "glm4v", "glm4v_moe", "glm_image", "glmasr"),
    *("got_ocr2", "gpt_bigcode", "gradium_phonon_tts", "granite", "granitemoe"),
    *("granitemoehybrid", "granitemoeshared", "h2ovl_chat", "hyperclovax", "hyperclovax_vlm"),
    *("internlm2", "internlm3", "iquestcoder", "jamba", "kimi_k25", "kimi_linear", "kosmos-2"),
    *("llava", "llava_next", "mimo_v2_flash", "minicpm3", "minicpm_ocr", "minicpmv"),
    *("minicpmv4_6", "minicpmv4_7", "minimax_m2", "ministral", "ministral3", "mistral"),
    *("mistral3", "mistral_large4", "mixtral", "modernbert-decoder", "molmo", "molmo2"),
    *("nemo_speechlm", "nemotron", "nvfp4", "nystromformer", "olmo2", "olmo3", "olmo_hybrid"),
    *("opencua", "openvla", "paddleocr_vl", "pegasus_x", "persimmon", "phi3", "phi3_v", "phimoe"),
    *("pix2struct", "pixtral", "pocket_tts", "smolvlm", "stablelm", "step3_vl", "umt5"),
    *("vipllava", "voxtral", "voxtral_realtime", "xlm-roberta-xl"),
)
"""Families that run on a graph that they bring, with a TokenizersBackend whatever they name."""

_OTHER_FIXED = (
    *("hyperclovax_vision_v2", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen4_exp"),
    "siglip2",
)
"""The same, with a class that is not known here."""


def _class_name(files: TokenizerFiles, config: Mapping[str, Any], any_family: bool) -> str:
    config_path = files.path.with_name("config.json")
    if config.get("processor_class"):
        raise ModelNotSupported(f"{config_path}: inputs other than text are not supported.")
    model_type = config.get("model_type")
    usual = _CLASS_OF_MODEL.get(str(model_type))
    named = files.settings.get("tokenizer_class")
    if named is None:
        named = config.get("tokenizer_class")
    elif not named:  # transformers takes it for a class that it doesn't know
        raise files.wrong("tokenizer_class", named)
    if usual is not None and (not named or model_type in _CLASS_IS_FIXED):
        return usual
    if usual is None:
        if any_family and files.settings.get("fix_mistral_regex"):
            raise files.wrong("fix_mistral_regex", True)
        if any_family and model_type in _OTHER_AS_IT_IS:
            return "TokenizersBackend"
        if not any_family or not named or model_type in _OTHER_FIXED:
            raise ModelNotSupported(
                f"{config_path}: the tokenizers of model_type {model_type!r} are not known here; "
                f"those of {', '.join(_CLASS_OF_MODEL)} are."
            )
    name = str(named).removesuffix("Fast")
    if name not in TOKENIZER_CLASSES:
        raise ModelNotSupported(
            f"{files.settings_path}: tokenizer_class {named!r} is not known here; "
            f"{', '.join(TOKENIZER_CLASSES)} are."
        )
    if name != usual and config.get("model_name"):  # where it is a model_type, it counts as one
        raise ModelNotSupported(
            f"{config_path} sets model_name, which may stand for another class of tokenizer than "
            f"{named!r}: remove it."
        )
    return name


# ---------------------------------------------------------------------------------- added tokens


def _add_tokens(
    made: tokenizers.Tokenizer,
    added: Sequence[AddedToken],
    named: Mapping[str, Token],
    extra: Sequence[Token],
) -> None:
    """Add the tokens that ``made`` lacks; the order matters, as new ones get the next ids."""
    tokens: list[Token] = list(added)
    known = {str(token) for token in (*made.get_added_tokens_decoder().values(), *tokens)}
    for token in (*named.values(), *extra):
        if str(token) not in known and token not in tokens:
            tokens.append(token)
    names = {str(token) for token in named.values()}
    for index, token in enumerate(tokens):
        if isinstance(token, str):
            tokens[index] = AddedToken(token, special=True)
        elif str(token) in names:
            token.special = True
    made.add_tokens(tokens)


def _end(
    files: TokenizerFiles, key: str, named: Mapping[str, Token], made: tokenizers.Tokenizer
) -> tuple[str, int]:
    """The special token ``key``, which stands at one end of every text, and its id."""
    content = str(named[key]) if key in named else None
    index = made.token_to_id(content) if content is not None else None
    if content is None or index is None:
        raise files.wrong(key, files.settings.get(key))
    listed = {str(token) for token in files.added}
    if content not in listed and files.backend.token_to_id(content) is None:
        raise ModelNotSupported(
            f"{files.path} lacks the token {content!r}, which stands around every text: it is of "
            "another model."
        )
    return content, index


def _parts(normalizer: normalizers.Normalizer | None) -> list[normalizers.Normalizer]:
    if normalizer is None:
        return []
    if isinstance(normalizer, normalizers.Sequence):
        return [normalizer[index] for index in range(len(normalizer))]
    return [normalizer]
