# SPDX-License-Identifier: MIT OR Apache-2.0
"""Every family's tokenizer gives transformers' ids, whatever the repository's files say."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models as tiny
from hypothesis import given
from hypothesis import strategies as st
from minilm import minilm_folder

from embedding_server.backends.torch import TorchBackend
from embedding_server.engine.tokenizer import Tokenizer
from embedding_server.errors import InvalidRequest, ModelNotSupported
from embedding_server.models.layout import read_layout
from embedding_server.models.tokenizers import load_static_tokenizer, load_tokenizer

FAMILIES = [family for family in tiny.FAMILIES if family != "static"]
LIMIT = 24

TEXTS = [
    *tiny.ODD_TEXTS,
    *tiny.texts(10, seed=4),
    " leading",
    "trailing ",
    "RIVER River river",
    "river </s> city <mask>  a <pad>b",
    "a [MASK] b [SEP]c",
    "<|im_end|> <think> A",
    "newword NEWWORD xnewwordx newword",
    "\u00c4" * 11,
    "\u00c4" * 101,
]

PIECES = ["river", "City", " ", "  ", "\n", "\u00e9", "e\u0301", "\u6771", "\U0001f642", "\u3000"]
PIECES += ["[CLS]", "[MASK]", "</s>", "<mask>", "<pad>", "<|endoftext|>", "##s", "\u2581", "'s"]
ODD_TEXT = st.lists(
    st.one_of(st.sampled_from(PIECES), st.characters(exclude_categories=["Cs"])), max_size=40
).map("".join)


# --------------------------------------------------------------------------------- two of a kind


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def load(folder: Path, limit: int = LIMIT) -> Tokenizer:
    # transformers hands out ids that the model has no vector for, too.
    config = read(folder / "config.json")
    config["vocab_size"] += 500
    return load_tokenizer(folder, config, max_tokens=limit)


def load_theirs(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    (encoding,) = tokenizer.encode([text])
    return list(encoding.ids)


def check_same(ours: Tokenizer, theirs: Any, texts: list[str] = TEXTS) -> None:
    for text in texts:
        expected = theirs(text, truncation=True, max_length=ours.max_tokens)["input_ids"]
        if expected:
            assert ids(ours, text) == expected, text
        else:
            with pytest.raises(InvalidRequest, match="has no token"):
                ids(ours, text)


def make(family: str, folder: Path, **options: Any) -> Path:
    """The folder that both can read: NomicBERT's configuration has to be transformers' own."""
    if family == "nomic_bert":
        options.setdefault("layout", "v6")
    return tiny.FAMILIES[family](folder, **options).folder


# ----------------------------------------------------------------------------------- the families


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["hub", "v6"])
def test_families(family: str, layout: str, tmp_path: Path) -> None:
    model = tiny.FAMILIES[family](tmp_path / "model", layout=layout, tokenizer_padding=True)
    check_same(load(model.folder), load_theirs(model.reference))


@pytest.fixture(scope="module", params=[*FAMILIES, "all-MiniLM-L6-v2"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, Any]:
    """One tokenizer twice: ours and transformers'."""
    if request.param == "all-MiniLM-L6-v2":
        folder = minilm_folder()
    else:
        folder = make(request.param, tmp_path_factory.mktemp(request.param) / "model")
    return load(folder), load_theirs(folder)


@given(text=ODD_TEXT)
def test_any_text(pair: tuple[Tokenizer, Any], text: str) -> None:
    check_same(*pair, [text])


@pytest.mark.parametrize("limit", [3, 4, 256])
def test_the_real_model(limit: int) -> None:
    check_same(load(minilm_folder(), limit), load_theirs(minilm_folder()))


# ----------------------------------------------------------------------- tokenizer_config.json

ADDED = {
    "content": "newword",
    "lstrip": True,
    "normalized": True,
    "rstrip": False,
    "single_word": True,
    "special": False,
}

SETTINGS: list[dict[str, Any]] = [
    {"do_lower_case": True},
    {"do_lower_case": False},
    {"do_lower_case": False, "strip_accents": True},
    {"do_lower_case": True, "strip_accents": False},
    {"tokenize_chinese_chars": False},
    {"add_prefix_space": True},
    {"add_prefix_space": False},
    {"tokenizer_class": None},
    {"tokenizer_class": "PreTrainedTokenizerFast"},
    {"tokenizer_class": "TokenizersBackend", "do_lower_case": False, "add_prefix_space": True},
    {"split_special_tokens": True},
    {"truncation_side": "left"},
    {"add_bos_token": True, "add_eos_token": True},
    {"additional_special_tokens": ["newword", "river"]},
    {"extra_special_tokens": [{"__type": "AddedToken", **ADDED}]},
    {"added_tokens_decoder": {}},
    {"added_tokens_decoder": {"9": ADDED}, "pad_token": "city", "unk_token": None},
]


@pytest.mark.parametrize("values", SETTINGS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_settings(family: str, values: dict[str, Any], tmp_path: Path) -> None:
    if family in ("bert", "distilbert", "nomic_bert", "mpnet") and "unk_token" in values:
        values = {**values, "unk_token": "[UNK]"}  # WordPiece can't do without
    folder = make(family, tmp_path / "model", tokenizer_config=values)
    check_same(load(folder), load_theirs(folder))


@pytest.mark.parametrize(("do_lower_case", "lowers"), [(False, False), (True, True), (None, True)])
def test_cased(do_lower_case: bool | None, lowers: bool, tmp_path: Path) -> None:
    """What the settings leave out is the class's, however the file's normaliser is cased."""
    folder = make("bert", tmp_path / "model", cased=True)
    path = folder / "tokenizer_config.json"
    values = {**read(path), "do_lower_case": do_lower_case}
    write(
        path,
        {
            key: value
            for key, value in values.items()
            if key == "strip_accents" or value is not None
        },
    )
    ours = load(folder)
    check_same(ours, load_theirs(folder))
    assert (ids(ours, "RIVER") == ids(ours, "river")) == lowers


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "none"])
def test_no_tokenizer_config(family: str, name: str, tmp_path: Path) -> None:
    """The class is config.json's, or else that of the model's type."""
    folder = make(family, tmp_path / "model")
    (folder / "tokenizer_config.json").unlink()
    if name != "none":
        write(folder / "config.json", {**read(folder / "config.json"), "tokenizer_class": name})
    check_same(load(folder), load_theirs(folder))


# -------------------------------------------------------------------------------- tokenizer.json


def other_normalizer(file: dict[str, Any]) -> None:
    file["normalizer"] = {
        "type": "Sequence",
        "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}],
    }


def no_normalizer(file: dict[str, Any]) -> None:
    file["normalizer"] = None


def other_pre_tokenizer(file: dict[str, Any]) -> None:
    file["pre_tokenizer"] = {"type": "Whitespace"}


def no_post_processor(file: dict[str, Any]) -> None:
    file["post_processor"] = None


def model_options(file: dict[str, Any]) -> None:
    if file["model"]["type"] == "WordPiece":
        file["model"] |= {"max_input_chars_per_word": 10, "unk_token": "river"}
    elif file["model"]["type"] == "BPE":
        file["model"] |= {"ignore_merges": True, "fuse_unk": True, "byte_fallback": True}


def one_more_token(file: dict[str, Any]) -> None:
    vocabulary = file["model"]["vocab"]
    size = max(len(vocabulary), *(token["id"] + 1 for token in file["added_tokens"]))
    file["added_tokens"].append({"id": size, **ADDED})


def one_token_less(file: dict[str, Any]) -> None:
    file["added_tokens"].pop()


def cut_left(file: dict[str, Any]) -> None:
    file["truncation"] = {
        "direction": "Left",
        "max_length": 9,
        "strategy": "LongestFirst",
        "stride": 2,
    }


def padded_with_another_token(file: dict[str, Any]) -> None:
    file["padding"] = {
        "strategy": {"Fixed": 12},
        "direction": "Left",
        "pad_to_multiple_of": 8,
        "pad_id": 5,
        "pad_type_id": 0,
        "pad_token": "newword",
    }


CHANGES = [
    *(other_normalizer, no_normalizer, other_pre_tokenizer, no_post_processor, model_options),
    *(one_more_token, one_token_less, cut_left, padded_with_another_token),
]


@pytest.mark.parametrize("as_it_is", [False, True], ids=["own-class", "as-it-is"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_counts_of_the_file(
    family: str, change: Callable[[dict[str, Any]], None], as_it_is: bool, tmp_path: Path
) -> None:
    values = {"tokenizer_class": "PreTrainedTokenizerFast"} if as_it_is else {}
    folder = make(family, tmp_path / "model", tokenizer_config=values)
    if change is padded_with_another_token:
        path = folder / "tokenizer_config.json"
        write(path, {key: value for key, value in read(path).items() if key != "pad_token"})
    file = read(folder / "tokenizer.json")
    change(file)
    write(folder / "tokenizer.json", file)
    check_same(load(folder), load_theirs(folder))


def test_a_metaspace_alone_becomes_the_class_s(tmp_path: Path) -> None:
    """bge-m3's tokenizer.json splits otherwise than its class does."""
    folder = tiny.make_xlm_roberta(tmp_path / "model", metaspace_only=True).folder
    ours, theirs = load(folder), load_theirs(folder)
    check_same(ours, theirs)
    path = folder / "tokenizer_config.json"
    write(path, {**read(path), "tokenizer_class": "PreTrainedTokenizerFast"})
    as_it_is = load(folder)
    check_same(as_it_is, load_theirs(folder))
    assert ids(as_it_is, "river ") != ids(ours, "river ")


def test_older_lists_of_added_tokens(tmp_path: Path) -> None:
    """added_tokens.json, and a special_tokens_map.json that wins over tokenizer_config.json."""
    for family in ("bert", "roberta", "xlm_roberta"):
        folder = tiny.FAMILIES[family](tmp_path / family).folder
        write(folder / "added_tokens.json", {"newword": 9000, "city": 9001})
        path = folder / "special_tokens_map.json"
        write(path, {**read(path), "additional_special_tokens": ["newword"], "eos_token": ADDED})
        check_same(load(folder), load_theirs(folder))


# ----------------------------------------------------------------------------- real repositories

_PLAIN_BERT = {
    "do_lower_case": True,
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
    "tokenize_chinese_chars": True,
    "strip_accents": None,
}
_PLAIN_ROBERTA = {
    "unk_token": "<unk>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "sep_token": "</s>",
    "cls_token": "<s>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
}
_MASK = {
    "__type": "AddedToken",
    "content": "<mask>",
    "lstrip": True,
    "normalized": True,
    "rstrip": False,
    "single_word": False,
}
_CALL_OPTIONS = {
    "max_length": 128,
    "pad_to_multiple_of": None,
    "pad_token_type_id": 0,
    "padding_side": "right",
    "stride": 0,
    "truncation_side": "right",
    "truncation_strategy": "longest_first",
}

REPOSITORIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "BAAI/bge-base-en-v1.5": (
        "bert",
        "bert",
        {
            **_PLAIN_BERT,
            "clean_up_tokenization_spaces": True,
            "do_basic_tokenize": True,
            "never_split": None,
            "model_max_length": 512,
            "tokenizer_class": "BertTokenizer",
        },
    ),
    "Snowflake/snowflake-arctic-embed-m": (
        "bert",
        "bert",
        {**_PLAIN_BERT, **_CALL_OPTIONS, "tokenizer_class": "BertTokenizer"},
    ),
    "nomic-ai/nomic-embed-text-v1.5": (
        "bert",
        "nomic_bert",
        {**_PLAIN_BERT, "model_max_length": 8192, "tokenizer_class": "BertTokenizer"},
    ),
    "sentence-transformers/all-mpnet-base-v2": (
        "mpnet",
        "mpnet",
        {
            **_PLAIN_ROBERTA,
            "unk_token": "[UNK]",
            "do_lower_case": True,
            "tokenize_chinese_chars": True,
            "strip_accents": None,
            "model_max_length": 512,
            "special_tokens_map_file": None,
            "name_or_path": "microsoft/mpnet-base",
            "tokenizer_class": "MPNetTokenizer",
        },
    ),
    "sentence-transformers/multi-qa-distilbert-cos-v1": (
        "distilbert",
        "distilbert",
        {**_PLAIN_BERT, "model_max_length": 512, "tokenizer_class": "DistilBertTokenizer"},
    ),
    "sentence-transformers/all-distilroberta-v1": (
        "roberta",
        "roberta",
        {
            **_PLAIN_ROBERTA,
            "mask_token": _MASK,
            "add_prefix_space": False,
            "errors": "replace",
            "trim_offsets": True,
            "special_tokens_map_file": None,
            "tokenizer_class": "RobertaTokenizer",
        },
    ),
    "sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2": (
        "xlm_roberta",
        "bert",
        {
            **_PLAIN_BERT,
            **_PLAIN_ROBERTA,
            "mask_token": _MASK,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    ),
    "intfloat/multilingual-e5-small": (
        "xlm_roberta",
        "bert",
        {
            **_PLAIN_ROBERTA,
            "mask_token": _MASK,
            "sp_model_kwargs": {},
            "tokenizer_class": "XLMRobertaTokenizer",
        },
    ),
    "BAAI/bge-m3": (
        "xlm_roberta",
        "xlm-roberta",
        {
            **_PLAIN_ROBERTA,
            "clean_up_tokenization_spaces": True,
            "mask_token": _MASK,
            "model_max_length": 8192,
            "sp_model_kwargs": {},
            "tokenizer_class": "XLMRobertaTokenizer",
        },
    ),
    "BAAI/bge-m3 saved by transformers 5": (
        "xlm_roberta",
        "xlm-roberta",
        {
            **_PLAIN_ROBERTA,
            "add_prefix_space": True,
            "backend": "tokenizers",
            "is_local": False,
            "local_files_only": False,
            "tokenizer_class": "XLMRobertaTokenizer",
        },
    ),
}
"""Whose files, ``model_type`` and tokenizer_config.json of much used repositories. Those of
gte-modernbert-base and Qwen3-Embedding are ``tiny``'s own, and so are tested above."""


@pytest.mark.parametrize("name", REPOSITORIES)
def test_real_repositories(name: str, tmp_path: Path) -> None:
    family, model_type, values = REPOSITORIES[name]
    folder = tiny.FAMILIES[family](tmp_path / "model").folder
    write(folder / "tokenizer_config.json", values)
    write(folder / "config.json", {**read(folder / "config.json"), "model_type": model_type})
    check_same(load(folder), load_theirs(folder))


# ----------------------------------------------------------------------------------- the refusals

REFUSALS = [
    ("tokenizer_config.json", "tokenizer_class", "CamembertTokenizer", "'CamembertTokenizer'"),
    ("tokenizer_config.json", "tokenizer_class", "RobertaTokenizer", "of a WordPiece model"),
    ("tokenizer_config.json", "tokenizer_class", "", "tokenizer_class can't be ''"),
    ("tokenizer_config.json", "trust_remote_code", True, "sets trust_remote_code"),
    ("tokenizer_config.json", "gguf_file", "model.gguf", "sets gguf_file"),
    ("tokenizer_config.json", "do_lower_case", "yes", "do_lower_case can't be 'yes'"),
    ("tokenizer_config.json", "strip_accents", 1, "strip_accents can't be 1"),
    ("tokenizer_config.json", "truncation_side", "both", "truncation_side can't be 'both'"),
    ("tokenizer_config.json", "split_special_tokens", None, "split_special_tokens"),
    ("tokenizer_config.json", "bos_token", {"content": "[CLS]"}, "bos_token can't be"),
    ("tokenizer_config.json", "image_token", "<image>", "sets image_token"),
    ("tokenizer_config.json", "extra_special_tokens", {"image": "<i>"}, "extra_special_tokens"),
    ("tokenizer_config.json", "processor_class", "CLIPProcessor", "processor_class"),
    ("tokenizer_config.json", "fast_tokenizer_files", ["tokenizer.4.json"], "fast_tokenizer_files"),
    ("tokenizer_config.json", "auto_map", {"AutoTokenizer": ["a.B", None]}, "auto_map names code"),
    ("tokenizer_config.json", "added_tokens_decoder", {"0": "[PAD]"}, "as a token"),
    ("tokenizer_config.json", "added_tokens_decoder", {"a": ADDED}, "by token id"),
    ("special_tokens_map.json", "unk_token", "[NONE]", "lacks the unknown token"),
    ("special_tokens_map.json", "sep_token", None, "sep_token can't be None"),
    ("special_tokens_map.json", "do_lower_case", False, "sets do_lower_case"),
    ("added_tokens.json", "river", "9000", "a token id for each token"),
    ("processor_config.json", "processor_class", "CLIPProcessor", "other than text"),
    ("config.json", "model_type", "albert", "model_type 'albert'"),
    ("config.json", "processor_class", "CLIPProcessor", "other than text"),
    ("tokenizer.json", "added_tokens", None, "tokenizer"),
    ("tokenizer.json", "model", {}, "can't be read as a tokenizer"),
]


@pytest.mark.parametrize(("file", "key", "value", "says"), REFUSALS)
def test_refusals_name_file_and_value(
    file: str, key: str, value: object, says: str, tmp_path: Path
) -> None:
    folder = tiny.make_bert(tmp_path / "model").folder
    path = folder / file
    write(path, {**(read(path) if path.exists() else {}), key: value})
    with pytest.raises(ModelNotSupported, match=says) as caught:
        load(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("family", "options", "says"),
    [
        ("xlm_roberta", {"unk_id": 2}, "unk_id"),
        ("xlm_roberta", {"byte_fallback": True}, "byte_fallback"),
        ("roberta", {"continuing_subword_prefix": "x"}, "continuing_subword_prefix|can't be read"),
    ],
)
def test_models_that_the_class_would_not_keep(
    family: str, options: dict[str, Any], says: str, tmp_path: Path
) -> None:
    folder = tiny.FAMILIES[family](tmp_path / "model").folder
    file = read(folder / "tokenizer.json")
    file["model"] |= options
    write(folder / "tokenizer.json", file)
    with pytest.raises(ModelNotSupported, match=says):
        load(folder)


def text_twice(file: dict[str, Any]) -> None:
    file["post_processor"]["single"] *= 2


def second_token_type(file: dict[str, Any]) -> None:
    file["post_processor"]["single"][1]["Sequence"]["type_id"] = 1


def dropout(file: dict[str, Any]) -> None:
    file["model"]["dropout"] = 0.1


def twins(file: dict[str, Any]) -> None:
    last = file["added_tokens"][-1]["id"]
    plain = {**ADDED, "single_word": False}
    file["added_tokens"] += [
        {**plain, "id": last + 1, "content": "\u00e9"},
        {**plain, "id": last + 2, "content": "e\u0301"},
    ]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (text_twice, "repeats"),
        (second_token_type, "other token types than 0"),
        (dropout, "dropout splits texts at random"),
        (twins, "left to chance"),
    ],
)
def test_files_that_are_not_taken_as_they_are(
    change: Callable[[dict[str, Any]], None], says: str, tmp_path: Path
) -> None:
    folder = tiny.make_modernbert(tmp_path / "model").folder
    path = folder / "tokenizer.json"
    file = read(path)
    change(file)
    write(path, file)
    with pytest.raises(ModelNotSupported, match=says) as caught:
        load(folder)
    assert str(path) in str(caught.value)


# ------------------------------------------------------------- families with graphs of their own


def ids_of_all(tokenizer: Tokenizer) -> list[list[int]]:
    return [ids(tokenizer, text or "x") for text in TEXTS]


def test_families_that_are_not_known(tmp_path: Path) -> None:
    """Each gets the class that transformers would take, or is refused."""
    from transformers.models.auto import tokenization_auto as theirs

    folder = tiny.make_bert(tmp_path / "model").folder
    file = read(folder / "tokenizer.json")
    write(folder / "tokenizer.json", {**file, "pre_tokenizer": {"type": "Whitespace"}})
    path = folder / "tokenizer_config.json"
    settings = {**read(path), "tokenizer_class": "BertTokenizerFast"}
    write(path, settings)
    config = read(folder / "config.json")

    def load_as(model_type: str) -> Tokenizer:
        family = {**config, "model_type": model_type}
        return load_tokenizer(folder, family, max_tokens=LIMIT, any_family=True)

    as_bert = ids_of_all(load_as("bert"))
    check_same(load_as("bert"), load_theirs(folder))
    write(path, {**settings, "tokenizer_class": "TokenizersBackend"})
    as_it_is = ids_of_all(load_as("bert"))
    assert as_it_is != as_bert
    write(path, settings)
    taken = theirs.TOKENIZER_MAPPING_NAMES
    fixed = theirs.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
    for model_type in (*taken, "unknown"):
        if taken.get(model_type) == "TokenizersBackend":
            assert ids_of_all(load_as(model_type)) == as_it_is, model_type
        elif model_type in fixed:
            with pytest.raises(ModelNotSupported, match=f"model_type '{model_type}'|Qwen2Tok"):
                load_as(model_type)
        else:
            assert ids_of_all(load_as(model_type)) == as_bert, model_type
    for model_type in ("nystromformer", "xlm-roberta-xl", "albert", "unknown"):
        write(folder / "config.json", {**config, "model_type": model_type})
        check_same(load_as(model_type), load_theirs(folder))
        write(path, {**settings, "tokenizer_class": "AlbertTokenizer"})
        if model_type in ("albert", "unknown"):
            with pytest.raises(ModelNotSupported, match="'AlbertTokenizer' is not known"):
                load_as(model_type)
        write(path, settings)


@pytest.mark.parametrize(
    ("settings", "config", "says"),
    [
        ({"tokenizer_class": None}, {}, "model_type 'unknown'"),
        ({"fix_mistral_regex": True}, {}, "fix_mistral_regex can't be True"),
        ({}, {"model_name": "llava"}, "sets model_name"),
    ],
)
def test_what_may_name_another_class(
    settings: dict[str, Any], config: dict[str, Any], says: str, tmp_path: Path
) -> None:
    folder = tiny.make_bert(tmp_path / "model", tokenizer_config=settings).folder
    family = {**read(folder / "config.json"), "model_type": "unknown", **config}
    with pytest.raises(ModelNotSupported, match=says):
        load_tokenizer(folder, family, max_tokens=LIMIT, any_family=True)


# ------------------------------------------------------------------- as sentence-transformers does


def test_a_tokenizer_that_changes_texts_is_refused_on_torch() -> None:
    from transformers import PreTrainedTokenizerFast

    class Shouting(PreTrainedTokenizerFast):
        def __call__(self, text: str, **options: Any) -> Any:
            return super().__call__(f"{text}!", **options)

    model = SimpleNamespace(tokenizer=Shouting.from_pretrained(minilm_folder()))
    with pytest.raises(ModelNotSupported, match="Shouting changes a text"):
        TorchBackend(model, read_layout(minilm_folder()).pipeline)


def load_model(folder: Path) -> Tokenizer:
    """By way of the layout, as the loader does."""
    layout = read_layout(folder)
    pooling = layout.pipeline.modules[0].config
    return load_tokenizer(
        layout.pipeline.transformer,
        layout.pipeline.config,
        max_tokens=layout.max_tokens,
        lowercase=layout.lowercase,
        exclude_prompt=not pooling.get("include_prompt", True),
    )


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm_roberta", "modernbert"])
def test_do_lower_case(family: str, tmp_path: Path) -> None:
    options = {"cased": True} if family == "bert" else {}
    model = tiny.FAMILIES[family](tmp_path / "model", do_lower_case=True, **options)
    ours = load_model(model.folder)
    check_same(ours, tiny.load_reference(model).tokenizer)
    assert ids(ours, "RIVER \u00c9") == ids(ours, "river \u00e9")


def test_do_lower_case_where_the_file_has_it(tmp_path: Path) -> None:
    folder = tiny.make_modernbert(tmp_path / "model", do_lower_case=True).folder
    file = read(folder / "tokenizer.json")
    lower = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}
    write(folder / "tokenizer.json", {**file, "normalizer": lower})
    theirs = tiny.load_reference(tiny.TinyModel(folder, folder)).tokenizer
    # NFC after a Lowercase gives other ids here than before it.
    check_same(load_model(folder), theirs, [*TEXTS, "\u0130\u0307 \u1e9e\u0323\u0307"])


PROMPTS = ["", "query: ", "search the river:", " ", "\u6771 river", "<|im_end|>", "river " * 30]


@pytest.mark.parametrize("family", ["bert", "mpnet", "xlm_roberta", "modernbert", "qwen3"])
@pytest.mark.parametrize("ends", [True, False], ids=["ends", "no-ends"])
def test_prompt_lengths(family: str, ends: bool, tmp_path: Path) -> None:
    folder = make(family, tmp_path / "model", include_prompt=False, max_seq_length=LIMIT)
    if not ends:  # so that a prompt may end in a special token of its own
        no_ends = {**read(folder / "tokenizer.json"), "post_processor": None}
        write(folder / "tokenizer.json", no_ends)
        path = folder / "tokenizer_config.json"
        write(path, {**read(path), "tokenizer_class": "TokenizersBackend"})
    transformer = tiny.load_reference(tiny.TinyModel(folder, folder))[0]
    ours = load_model(folder)
    for prompt in PROMPTS:
        for text in ("", "a city", "city " * 40):
            if not ends and (prompt == " " or not prompt + text):
                continue  # no token at all, where sentence-transformers fails
            features = transformer.preprocess([text], prompt=prompt or None)
            (encoding,) = ours.encode([text], prompt=prompt)
            assert list(encoding.ids) == features["input_ids"][0].tolist()
            assert encoding.prompt_tokens == features.get("prompt_length", 0)


def test_prompts_are_pooled_by_default(tmp_path: Path) -> None:
    ours = load_model(tiny.make_bert(tmp_path / "model").folder)
    assert ours.encode(["river"], prompt="query: ")[0].prompt_tokens == 0


LENGTHS: list[dict[str, Any]] = [
    {"max_seq_length": 16},
    {"max_seq_length": None},
    {"max_seq_length": None, "tokenizer_config": {"model_max_length": 20}},
    {"max_seq_length": None, "tokenizer_config": {"model_max_length": None, "max_len": 20}},
    {"max_seq_length": None, "tokenizer_config": {"model_max_length": 1e30}},
    {"max_seq_length": None, "tokenizer_config": {"model_max_length": 10**30}},
    {"max_seq_length": 50, "max_positions": 32},
]


@pytest.mark.parametrize("options", LENGTHS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_lengths(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    """sentence-transformers' limit, and where its model fails at it, the longest that runs."""
    if family == "nomic_bert" and options["max_seq_length"] is None:
        options = {**options, "layout": "v6"}
    model = tiny.FAMILIES[family](tmp_path / "model", **options)
    reference = tiny.load_reference(model)
    ours = load_model(model.folder)
    long = "a " * 300
    assert ours.max_tokens <= reference.max_seq_length
    if ours.max_tokens == reference.max_seq_length:
        assert ids(ours, long) == reference.preprocess([long])["input_ids"][0].tolist()
    else:
        reference[0].max_seq_length = ours.max_tokens + 1
        with pytest.raises((IndexError, RuntimeError)):
            reference.encode(long)
    reference[0].max_seq_length = ours.max_tokens
    reference.encode(long)


def test_gpt2_style_positions_of_nomic(tmp_path: Path) -> None:
    model = tiny.make_nomic_bert(tmp_path / "model", max_seq_length=None, max_positions=96)
    assert read_layout(model.folder).max_tokens == 96


def test_missing_positions_are_the_class_s(tmp_path: Path) -> None:
    folder = tiny.make_qwen3(tmp_path / "model").folder
    config = read(folder / "config.json")
    del config["max_position_embeddings"]
    write(folder / "config.json", config)
    reference = tiny.load_reference(tiny.TinyModel(folder, folder))
    assert read_layout(folder).max_tokens == reference.max_seq_length == 32768


@pytest.mark.parametrize("value", [0, -5, "64", True])
def test_lengths_that_are_none(value: object, tmp_path: Path) -> None:
    folder = tiny.make_bert(tmp_path / "model").folder
    path = folder / "sentence_bert_config.json"
    write(path, {**read(path), "max_seq_length": value})
    with pytest.raises(ModelNotSupported, match=r"max_seq_length can't be"):
        read_layout(folder)


# ---------------------------------------------------------------- folders without a modules.json


def plain(folder: Path) -> Path:
    (folder / "modules.json").unlink()
    return folder


def test_a_plain_folder_has_none_of_sentence_transformers_settings(tmp_path: Path) -> None:
    options = {"max_seq_length": 16, "do_lower_case": True, "cased": True}
    folder = plain(tiny.make_bert(tmp_path / "model", **options).folder)
    reference = tiny.load_reference(tiny.TinyModel(folder, folder))
    ours = load_model(folder)
    assert ours.max_tokens == reference.max_seq_length == 128
    check_same(ours, reference.tokenizer)


def test_a_plain_folder_of_model2vec(tmp_path: Path) -> None:
    """sentence-transformers doesn't know it without a modules.json, which model2vec writes."""
    folder = plain(tiny.make_static(tmp_path / "model").folder)
    with pytest.raises(ValueError, match="model type `model2vec`"):
        tiny.load_reference(tiny.TinyModel(folder, folder))
    with pytest.raises(ModelNotSupported, match=r"no modules.json.*\.save_pretrained\(folder\)"):
        read_layout(folder)


def test_a_plain_causal_folder_is_pooled_at_its_last_token(tmp_path: Path) -> None:
    folder = plain(tiny.make_qwen3(tmp_path / "model").folder)
    path = folder / "tokenizer_config.json"
    with pytest.raises(ModelNotSupported, match="chat template"):
        read_layout(folder)
    write(path, {key: value for key, value in read(path).items() if key != "chat_template"})
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(ModelNotSupported, match="chat template"):
        read_layout(folder)
    (folder / "chat_template.jinja").unlink()
    reference = tiny.load_reference(tiny.TinyModel(folder, folder))
    (pooling,) = read_layout(folder).pipeline.modules
    assert pooling.config["pooling_mode"] == reference[1].pooling_mode == "lasttoken"


# ----------------------------------------------------------------------------------------- static


@pytest.mark.parametrize("truncated", [False, True], ids=["whole", "truncated"])
@pytest.mark.parametrize("style", ["model2vec", "subfolder"])
def test_static(style: str, truncated: bool, tmp_path: Path) -> None:
    model = tiny.make_static(tmp_path / "model", style=style, tokenizer_padding=truncated)
    module = tiny.load_reference(model)[0]
    (file,) = model.folder.rglob("tokenizer.json")
    ours = load_static_tokenizer(file)
    for text in TEXTS:
        assert ids(ours, text) == module.preprocess([text])["input_ids"].tolist()
        (encoding,) = ours.encode([text], prompt="query: ")
        expected = module.preprocess([text], prompt="query: ")["input_ids"].tolist()
        assert list(encoding.ids) == expected


# ------------------------------------------------------------------------------------------ speed


def test_neither_torch_nor_transformers_is_imported() -> None:
    code = (
        "import json, sys; from pathlib import Path;"
        "from embedding_server.models.tokenizers import load_tokenizer;"
        "folder = Path(sys.argv[1]);"
        "config = json.loads((folder / 'config.json').read_text());"
        "load_tokenizer(folder, config, max_tokens=64);"
        "print(sorted({'torch', 'transformers', 'sentence_transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(minilm_folder())],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_a_tokenizer_of_another_vocabulary(tmp_path: Path) -> None:
    folder = tiny.make_bert(tmp_path / "bert").folder
    config = {**read(folder / "config.json"), "vocab_size": 100}
    with pytest.raises(ModelNotSupported, match="don't belong together"):
        load_tokenizer(folder, config, max_tokens=64)


def test_a_token_that_the_model_has_no_vector_for(tmp_path: Path) -> None:
    folder = tiny.make_bert(tmp_path / "bert").folder
    listed = read(folder / "tokenizer.json")
    added = {**listed["added_tokens"][-1], "id": 456, "content": "[NEW]"}
    write(folder / "tokenizer.json", {**listed, "added_tokens": [*listed["added_tokens"], added]})
    (folder / "tokenizer_config.json").unlink()
    tokenizer = load_tokenizer(folder, read(folder / "config.json"), max_tokens=64)
    assert tokenizer.encode(["one text"])[0].ids
    with pytest.raises(InvalidRequest, match=r"input\[1\] holds a token that was added"):
        tokenizer.encode(["one text", "another [NEW] text"])
