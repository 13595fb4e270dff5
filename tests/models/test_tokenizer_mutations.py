# SPDX-License-Identifier: MIT OR Apache-2.0
"""One change at a time to a tokenizer's files: transformers' ids, or a refusal, never other ids.

Every kind of tokenizer in tiny_models is changed in every key of tokenizer_config.json that
transformers reads, in every added token, and in every part of tokenizer.json.
"""

from __future__ import annotations

import ast
import copy
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny

from embedding_server import Embedder
from embedding_server.engine.tokenizer import Tokenizer, is_panic
from embedding_server.errors import InferenceFailed, InvalidRequest, ModelNotSupported
from embedding_server.models.tokenizers import (
    TOKENIZER_CLASSES,
    load_static_tokenizer,
    load_tokenizer,
)

LIMIT = 24

TEXTS = [
    *tiny.ODD_TEXTS,
    *tiny.texts(10, seed=4),
    "RIVER River river \u00c9t\u00e9 \u0130",
    "a [MASK] b [mask]c <mask> d  <MASK>e<mask>",
    "river </s> city <pad>b <|endoftext|> <|im_end|> x <think> y",
    "newword NewWord NEWWORD xnewwordx newword  newword\tn\u00e9wword",
    "city newword  city  newword city",
    "\u00c4" * 101,
    " leading and trailing ",
]

Files = dict[str, Any]
"""A tokenizer's JSON files by their names."""
Changes = Callable[[Files], Iterator[tuple[str, Files]]]
Loads = Callable[[Path], Tokenizer]
Ids = Callable[[Path], list[list[int]]]

JSON_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)


# ---------------------------------------------------------------------------------- the kinds


def nothing(files: Files) -> None:
    pass


def as_it_is(files: Files) -> None:
    files["tokenizer_config.json"]["tokenizer_class"] = "PreTrainedTokenizerFast"


def otherwise(files: Files) -> None:
    """A tokenizer.json whose parts the class replaces, so that none of them may be taken."""
    files["tokenizer.json"] |= {
        "normalizer": {"type": "Replace", "pattern": {"String": "e"}, "content": "o"},
        "pre_tokenizer": {"type": "Digits", "individual_digits": True},
    }


def no_end(files: Files) -> None:
    """As forks of Qwen3-Embedding have it, which ask for the end token in vain."""
    otherwise(files)
    files["tokenizer.json"]["post_processor"] = BYTE_LEVEL
    files["tokenizer_config.json"]["add_eos_token"] = True


def listed(files: Files) -> None:
    tokens = files["tokenizer.json"]["added_tokens"]
    files["tokenizer_config.json"]["added_tokens_decoder"] = by_id(tokens)


def by_id(tokens: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        str(token["id"]): {key: value for key, value in token.items() if key != "id"}
        for token in tokens
    }


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
BYTE_LEVEL["use_regex"] = False

KINDS: dict[str, tuple[str, dict[str, Any], Callable[[Files], None]]] = {
    "bert": ("bert", {}, nothing),
    "bert, added_tokens_decoder": ("bert", {"cased": True}, listed),
    "bert, as it is": ("bert", {}, as_it_is),
    "distilbert": ("distilbert", {}, otherwise),
    "nomic_bert": ("nomic_bert", {"layout": "v6"}, nothing),
    "mpnet": ("mpnet", {}, otherwise),
    "roberta": ("roberta", {}, otherwise),
    "xlm_roberta": ("xlm_roberta", {}, nothing),
    "xlm_roberta, as it is": ("xlm_roberta", {}, as_it_is),
    "modernbert": ("modernbert", {}, nothing),
    "qwen3": ("qwen3", {}, nothing),
    "qwen3, no end": ("qwen3", {}, no_end),
}


# ------------------------------------------------------------------------- tokenizer_config.json


def keys_that_transformers_reads() -> set[str]:
    """What its code takes from the settings by name, and every parameter of its classes."""
    import transformers

    home = Path(transformers.__file__).parent
    models = ("bert", "distilbert", "mpnet", "roberta", "xlm_roberta", "qwen2")
    paths = [home / "tokenization_utils_base.py", home / "tokenization_utils_tokenizers.py"]
    paths += [home / "models/auto/tokenization_auto.py"]
    paths += [home / f"models/{model}/tokenization_{model}.py" for model in models]
    settings = ("kwargs", "init_kwargs", "local_kwargs", "tokenizer_config")
    found: set[str] = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(
                    func=ast.Attribute(value=ast.Name(id=name), attr="pop" | "get" | "setdefault"),
                    args=[ast.Constant(value=str() as key), *_],
                ) if name in settings:
                    found.add(key)
                case ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=str() as key)):
                    found |= {key} if name in settings else set()
                case ast.Compare(
                    left=ast.Constant(value=str() as key), comparators=[ast.Name(id=name)]
                ) if name in settings:
                    found.add(key)
                case ast.FunctionDef(name=name, args=arguments) if name in (
                    *("__init__", "convert_to_native_format", "_patch_mistral_regex"),
                ):
                    found |= {arg.arg for arg in (*arguments.args, *arguments.kwonlyargs)}
    return found


COMPUTED = {
    *("tokenizer_class", "added_tokens_decoder", "additional_special_tokens", "bos_token"),
    *("eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
    *("extra_special_tokens", "do_lower_case", "strip_accents", "tokenize_chinese_chars"),
    *("add_prefix_space", "split_special_tokens", "truncation_side", "model_max_length"),
    "max_len",
}
REFUSED = {
    *("fast_tokenizer_files", "init_inputs", "model_specific_special_tokens", "processor_class"),
    *("tokenizer_object", "tokenizer_truncation", "tokenizer_padding", "post_processor"),
    *("_json_truncation", "_json_padding", "_spm_precompiled_charsmap", "gguf_file"),
    *("trust_remote_code", "auto_map", "image_token"),
}
"""With any value but an empty one; image_token stands for all tokens of other names."""
HARMLESS = {
    # What the hub's repositories have.
    *("add_bos_token", "add_eos_token", "padding_side", "clean_up_tokenization_spaces"),
    *("model_input_names", "name_or_path", "special_tokens_map_file", "legacy", "never_split"),
    *("do_basic_tokenize", "lowercase", "return_token_type_ids", "max_length", "stride"),
    *("truncation_strategy", "pad_to_multiple_of", "pad_token_type_id", "sp_model_kwargs"),
    *("from_slow", "byte_fallback", "model_type", "transformers_version", "errors"),
    *("trim_offsets", "chat_template", "response_schema", "response_template", "verbose"),
    *("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", "backend"),
    *("chat_control_tokens", "files_loaded", "is_local", "local_files_only"),
    # What only a call's own arguments set, or the files that are there.
    *("vocab", "merges", "vocab_file", "merges_file", "tokenizer_file", "unk_id", "token"),
    *("cache_dir", "force_download", "proxies", "revision", "subfolder", "repo_id", "config"),
    *("code_revision", "commit_message", "use_fast", "tokenizer_type", "mistral_format"),
    *("_commit_hash", "_from_auto", "_from_pipeline", "use_source_tokenizer", "device_map"),
    *("max_target_length", "add_generation_prompt", "sanitize_control_tokens"),
    *("save_jinja_files", "slow_tokenizer_class"),
    # For the vocabularies of Mistral; refused where a family is not known.
    *("fix_mistral_regex", "init_kwargs", "tokenizer", "pretrained_model_name_or_path"),
    # What other classes in the same files take, and the trainers.
    *("self", "cls", "content", "lstrip", "rstrip", "normalized", "single_word", "special"),
    *("data", "encoding", "tensor_type", "prepend_batch_axis", "n_sequences"),
    *("continuing_subword_prefix", "end_of_word_suffix", "initial_alphabet"),
}


def test_what_each_key_does_is_known() -> None:
    assert keys_that_transformers_reads() - COMPUTED - REFUSED - HARMLESS == set()


TOKEN = {"content": "newword", "lstrip": False, "normalized": True, "rstrip": False}
TOKEN |= {"single_word": False, "special": False}
FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")
TYPED = {"__type": "AddedToken", **TOKEN}

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
SPECIAL_VALUES = [
    *(None, "river", "NewWord", "[PAD]", "</s>", "<|endoftext|>", "<mask>", 7, dict(TOKEN)),
    *(TYPED, {**TYPED, "lstrip": True, "rstrip": True, "normalized": False, "special": True}),
]
LISTS = [
    *([], None, {}, ["river"], ["newword", "river", "newword"], [TYPED], [dict(TOKEN)], [7]),
    {"image_token": "<image>"},
]

SWITCHES = (
    *("add_bos_token", "add_eos_token", "add_prefix_space", "clean_up_tokenization_spaces"),
    *("do_basic_tokenize", "do_lower_case", "legacy", "split_special_tokens", "strip_accents"),
    *("tokenize_chinese_chars", "trim_offsets"),
)

VALUES: dict[str, list[Any]] = {
    **dict.fromkeys((*SPECIAL, "mask_token", "image_token"), SPECIAL_VALUES),
    **dict.fromkeys(("extra_special_tokens", "additional_special_tokens"), LISTS),
    "tokenizer_class": [
        *(name + end for name in TOKENIZER_CLASSES for end in ("", "Fast")),
        *(None, "", "NoSuchTokenizer", "AlbertTokenizer", "LlamaTokenizer", "GPT2Tokenizer"),
    ],
    "model_input_names": [
        *(["input_ids"], ["input_ids", "token_type_ids", "attention_mask"], ["attention_mask"]),
        ["input_ids", "attention_mask"],
    ],
    "truncation_side": ["left", "right", "both", None],
    "padding_side": ["left", "right", "both"],
    "model_max_length": [1, 512, 1e30, None],
    "never_split": [None, ["river", "newword"]],
    "auto_map": [{}, None, [], {"AutoTokenizer": ["a.B", None]}, {"AutoModel": "a.B"}],
    "fast_tokenizer_files": [[], None, ["tokenizer.json"], ["tokenizer.4.0.json"]],
    "tokenizer_truncation": [None, {"max_length": 5, "stride": 0, "strategy": "longest_first"}],
    "_json_truncation": [None, {"max_length": 5, "direction": "left"}],
    "added_tokens_decoder": [
        *({}, None, {"9": TOKEN}, {"9": {**TOKEN, "special": True, "lstrip": True}}),
        *({"4000": TOKEN, "12": {**TOKEN, "content": "river"}}, {"9": TYPED}, {"x": TOKEN}),
        {"3": TOKEN, "2": {**TOKEN, "single_word": True}, "1": TOKEN},
    ],
    "unk_id": [0, 3, 5],
    **{key: [True, False, None] for key in SWITCHES},
}
ANY_VALUE = [True, "river"]


def settings_changes(files: Files) -> Iterator[tuple[str, Files]]:
    settings = files["tokenizer_config.json"]
    for key in sorted({*settings, *COMPUTED, *REFUSED, *HARMLESS}):
        for value in VALUES.get(key, ANY_VALUE):
            if key not in settings or settings[key] != value:
                yield f"{key}={value!r}", {"tokenizer_config.json": {**settings, key: value}}
        if key in settings:
            less = {name: value for name, value in settings.items() if name != key}
            yield f"no {key}", {"tokenizer_config.json": less}
    for values in TOGETHER:
        yield str(values), {"tokenizer_config.json": {**settings, **values}}
    given = files.get("special_tokens_map.json", {})
    for key in MAP_KEYS:
        for value in MAP_VALUES:
            yield f"map {key}={value!r}", {"special_tokens_map.json": {**given, key: value}}


MAP_KEYS = (*SPECIAL, "mask_token", "do_lower_case", "add_eos_token", "additional_special_tokens")
MAP_VALUES = [None, "NewWord", {**TOKEN, "lstrip": True}, ["newword"], True]

TOGETHER: list[dict[str, Any]] = [
    {"trust_remote_code": True, "do_lower_case": False},
    *(
        {"add_bos_token": bos, "add_eos_token": eos, "bos_token": "river", "eos_token": "city"}
        for bos in (False, True)
        for eos in (False, True)
    ),
    {"add_bos_token": True, "add_eos_token": True, "bos_token": None, "eos_token": None},
    {"do_lower_case": True, "strip_accents": False},
    {"do_lower_case": False, "strip_accents": True, "tokenize_chinese_chars": False},
    {"do_lower_case": False, "strip_accents": False},
    {"split_special_tokens": True, "additional_special_tokens": ["newword"]},
    {"additional_special_tokens": ["newword"], "extra_special_tokens": ["river"]},
    {"additional_special_tokens": ["newword"], "extra_special_tokens": []},
]


# ------------------------------------------------------------------------------ the added tokens


def added_token_changes(files: Files) -> Iterator[tuple[str, Files]]:
    """Each token in one file, or in both where both list it."""
    for name, change in token_list_changes(files["tokenizer.json"]["added_tokens"]):
        file = {**files["tokenizer.json"], "added_tokens": change}
        yield f"json {name}", {"tokenizer.json": file}
        settings = {**files["tokenizer_config.json"], "added_tokens_decoder": by_id(change)}
        yield f"decoder {name}", {"tokenizer_config.json": settings}
        yield f"both {name}", {"tokenizer.json": file, "tokenizer_config.json": settings}
    for ids in ({"newword": 9000}, {"newword": 12, "river": 11}, {"[MASK]": 7}, {}, {"a": "b"}):
        yield f"added_tokens.json {ids}", {"added_tokens.json": ids}


def token_list_changes(tokens: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for index, token in enumerate(tokens):
        before, after = tokens[:index], tokens[index + 1 :]
        yield f"no {token['content']}", [*before, *after]
        yield f"two {token['content']}", [*tokens, {**token, "lstrip": not token["lstrip"]}]
        yield f"{token['content']} renamed", [*before, {**token, "content": "newword"}, *after]
        for flag in FLAGS if not before or not after else ():
            changed = {**token, flag: not token[flag]}
            yield f"{token['content']} {flag}={changed[flag]}", [*before, changed, *after]
    last = max(token["id"] for token in tokens) + 1
    for content in ("newword", "\u00c9t\u00e9", "  "):
        for flag in (None, *FLAGS):
            token = {**TOKEN, "content": content, "normalized": flag is None}
            if flag is not None:
                token[flag] = True
            yield f"+{content!r} {flag}", [*tokens, {"id": last, **token}]


# -------------------------------------------------------------------------------- tokenizer.json

BERT_NORMALIZER = {"type": "BertNormalizer", "clean_text": False, "handle_chinese_chars": False}
BERT_NORMALIZER |= {"strip_accents": False, "lowercase": False}
METASPACE = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "never", "split": True}


def template(*single: dict[str, Any], **ids: int) -> dict[str, Any]:
    tokens = {name: {"id": name, "ids": [index], "tokens": [name]} for name, index in ids.items()}
    return {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": tokens}


def piece(name: str, type_id: int = 0) -> dict[str, Any]:
    kind = "Sequence" if name == "A" else "SpecialToken"
    return {kind: {"id": name, "type_id": type_id}}


PARTS: dict[str, list[Any]] = {
    "normalizer": [
        *(None, {"type": "NFC"}, {"type": "NFKD"}, {"type": "Lowercase"}, BERT_NORMALIZER),
        {"type": "Sequence", "normalizers": [{"type": "NFD"}, {"type": "StripAccents"}]},
        {"type": "Sequence", "normalizers": []},
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Strip", "strip_left": True, "strip_right": True},
        {"type": "Replace", "pattern": {"String": "r"}, "content": "t"},
    ],
    "pre_tokenizer": [
        *(None, {"type": "Whitespace"}, {"type": "BertPreTokenizer"}, {"type": "Punctuation"}),
        *({**METASPACE, "prepend_scheme": scheme} for scheme in ("always", "first", "never")),
        {**METASPACE, "split": False},
        {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, METASPACE]},
        *(
            {**BYTE_LEVEL, "add_prefix_space": space, "use_regex": regex}
            for space in (False, True)
            for regex in (False, True)
        ),
        {"type": "Digits", "individual_digits": True},
        {"type": "Split", "pattern": {"String": "e"}, "behavior": "Removed", "invert": False},
    ],
    "post_processor": [
        *(None, BYTE_LEVEL, template(piece("A"))),
        template(piece("x"), piece("A"), x=5),
        template(piece("A"), piece("x"), piece("y"), x=5, y=6),
        template(piece("A", 1)),
        template(piece("A"), piece("x", 1), x=5),
        template(piece("A"), piece("A")),
        template(piece("x"), x=5),
        {"type": "BertProcessing", "sep": ["river", 8], "cls": ["city", 9]},
        {"type": "Sequence", "processors": [BYTE_LEVEL]},
    ],
    "truncation": [
        None,
        *(
            {"direction": side, "max_length": 9, "strategy": strategy, "stride": 2}
            for side in ("Left", "Right")
            for strategy in ("LongestFirst", "OnlyFirst", "OnlySecond")
        ),
    ],
    "padding": [
        None,
        *(
            {
                "strategy": strategy,
                "direction": "Left",
                "pad_to_multiple_of": 8,
                "pad_id": 5,
                "pad_type_id": 1,
                "pad_token": token,
            }
            for strategy in ("BatchLongest", {"Fixed": 12})
            for token in ("newword", "[PAD]")
        ),
    ],
    "decoder": [None],
    "version": ["1.1"],
}

MODEL_OPTIONS: dict[str, list[Any]] = {
    "unk_token": [None, "river", "newword", "[UNK]"],
    "max_input_chars_per_word": [3, 100],
    "continuing_subword_prefix": [None, "", "##", "x"],
    "end_of_word_suffix": [None, "", "s"],
    "dropout": [None, 0.0, 0.5],
    "fuse_unk": [True, False],
    "byte_fallback": [True, False],
    "ignore_merges": [True, False],
    "unk_id": [0, 3, None],
    "type": [None, "BPE", "WordPiece", "WordLevel", "Unigram"],
}


def file_changes(files: Files) -> Iterator[tuple[str, Files]]:
    file = files["tokenizer.json"]
    for part, values in PARTS.items():
        for value in values:
            yield f"{part}={value}", {"tokenizer.json": {**file, part: value}}
    for option, values in MODEL_OPTIONS.items():
        for value in values:
            model = {**file["model"], option: value}
            yield f"model {option}={value!r}", {"tokenizer.json": {**file, "model": model}}
    for part in file:
        rest = {name: value for name, value in file.items() if name != part}
        yield f"no {part}", {"tokenizer.json": rest}
    for option in file["model"]:
        rest = {name: value for name, value in file["model"].items() if name != option}
        yield f"no model {option}", {"tokenizer.json": {**file, "model": rest}}
    for name in JSON_FILES:
        yield f"no {name}", {name: None}


# ------------------------------------------------------------------------------- the comparison


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write(folder: Path, changed: Files) -> None:
    for name, content in changed.items():
        if content is None:
            (folder / name).unlink(missing_ok=True)
        else:
            text = json.dumps(content, ensure_ascii=False)
            (folder / name).write_text(text, encoding="utf-8")


def make(kind: str, folder: Path, **options: Any) -> tuple[Path, Files]:
    """A folder of the kind, and the tokenizer's files in it."""
    family, more, change = KINDS[kind]
    folder = tiny.FAMILIES[family](folder, **more, **options).folder
    paths = [folder / name for name in JSON_FILES]
    files: Files = {path.name: read(path) for path in paths if path.exists()}
    change(files)
    write(folder, files)
    return folder, files


def our_ids(tokenizer: Tokenizer) -> list[list[int]]:
    """The ids of each text, none where it is refused as it has none."""
    ids = []
    for text in TEXTS:
        try:
            (encoding,) = tokenizer.encode([text])
        except InvalidRequest as error:
            assert "has no token" in str(error)
            ids.append([])
        else:
            ids.append(list(encoding.ids))
    return ids


def load(folder: Path) -> Tokenizer:
    # transformers hands out ids that the model has no vector for, too.
    config = read(folder / "config.json")
    config["vocab_size"] += 500
    return load_tokenizer(folder, config, max_tokens=LIMIT)


def their_ids(folder: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids: list[list[int]] = tokenizer(TEXTS, truncation=True, max_length=LIMIT)["input_ids"]
    return ids


def load_static(folder: Path) -> Tokenizer:
    return load_static_tokenizer(folder / "tokenizer.json")


def their_static_ids(folder: Path) -> list[list[int]]:
    module = tiny.load_reference(tiny.TinyModel(folder, folder))[0]
    return [module.preprocess([text])["input_ids"].tolist() for text in TEXTS]


def outcome(folder: Path, loads: Loads = load, theirs: Ids = their_ids) -> str:
    try:
        ours = our_ids(loads(folder))
    except ModelNotSupported as refusal:
        return f"refused: {refusal}"
    except InferenceFailed:
        ours = []
    try:
        same = ours == theirs(folder)
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        return "the reference fails"
    return "equal" if same else "WRONG"


def check(folder: Path, files: Files, groups: Sequence[Changes], *how: Any) -> dict[str, str]:
    """Make each change alone; return its outcome by its name."""
    assert outcome(folder, *how) == "equal"
    outcomes: dict[str, str] = {}
    for changes in groups:
        for name, changed in changes(copy.deepcopy(files)):
            write(folder, changed)
            outcomes[name] = outcome(folder, *how)
            write(folder, {name: files.get(name) for name in changed})
    assert [name for name, result in outcomes.items() if result == "WRONG"] == []
    refusals = [result for result in outcomes.values() if result.startswith("refused")]
    assert [refusal for refusal in refusals if str(folder) not in refusal] == []
    counts = Counter(result.partition(":")[0] for result in outcomes.values())
    print(f"{folder}: {dict(counts)}")
    return outcomes


def how_many_equal(outcomes: dict[str, str]) -> int:
    return list(outcomes.values()).count("equal")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_any_change_gives_the_same_ids_or_is_refused(kind: str, tmp_path: Path) -> None:
    folder, files = make(kind, tmp_path / "model")
    outcomes = check(folder, files, (settings_changes, added_token_changes, file_changes))
    assert how_many_equal(outcomes) > 500
    refused = {
        name.partition("=")[0] for name, result in outcomes.items() if result.startswith("refused")
    }
    assert refused >= REFUSED
    assert not refused & HARMLESS


@pytest.mark.filterwarnings("ignore")
def test_any_change_to_a_static_model_s_file(tmp_path: Path) -> None:
    folder = tiny.make_static(tmp_path / "model").folder
    files = {"tokenizer.json": read(folder / "tokenizer.json")}

    def added(files: Files) -> Iterator[tuple[str, Files]]:
        for name, tokens in token_list_changes(files["tokenizer.json"]["added_tokens"]):
            yield name, {"tokenizer.json": {**files["tokenizer.json"], "added_tokens": tokens}}

    outcomes = check(folder, files, (added, file_changes), load_static, their_static_ids)
    assert how_many_equal(outcomes) > 80


# ----------------------------------------------------------------------------------- the vectors

VECTORS: list[tuple[str, dict[str, Any]]] = [
    *((family, {"padding_side": "left"}) for family in tiny.FAMILIES if family != "static"),
    ("bert", {"split_special_tokens": True}),
    ("bert", {"do_lower_case": False, "strip_accents": True}),
    ("bert", {"model_input_names": ["input_ids"]}),
    ("bert", {"additional_special_tokens": [{**TYPED, "content": "river", "lstrip": True}]}),
    ("bert", {"added_tokens_decoder": {"9": {**TOKEN, "content": "ri", "single_word": True}}}),
    ("roberta", {"add_prefix_space": True}),
    ("roberta", {"tokenizer_class": "PreTrainedTokenizerFast", "split_special_tokens": True}),
    ("mpnet", {"pad_token": "river", "tokenizer_class": "MPNetTokenizerFast"}),
    ("xlm_roberta", {"truncation_side": "left", "add_eos_token": False}),
    ("modernbert", {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}),
    ("qwen3", {"add_eos_token": True, "add_bos_token": True, "bos_token": "<|im_start|>"}),
]


@pytest.mark.parametrize(("family", "settings"), VECTORS, ids=str)
def test_the_vectors_follow(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    options = {"layout": "v6"} if family == "nomic_bert" else {}
    model = tiny.FAMILIES[family](tmp_path / "model", tokenizer_config=settings, **options)
    # One at a time: padding on the left shifts the reference's absolute positions.
    reference = tiny.load_reference(model)
    expected = np.stack([reference.encode(text, normalize_embeddings=True) for text in TEXTS])
    for backend in ("onnx", "torch"):
        with Embedder(str(model.folder), backend=backend) as embedder:
            assert np.abs(embedder.embed(TEXTS) - expected).max() < 1e-5
