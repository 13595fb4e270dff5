# SPDX-License-Identifier: MIT OR Apache-2.0
"""The tokenizer: transformers' token ids, cut as sentence-transformers cuts, and never silently."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
from hypothesis import given
from hypothesis import strategies as st
from minilm import minilm_folder
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import processors

from embedding_server.engine.batch import Encoding
from embedding_server.engine.token_ids import Input
from embedding_server.engine.tokenizer import Tokenizer
from embedding_server.errors import ContextLengthExceeded, InvalidRequest, ModelNotSupported
from embedding_server.models.tokenizer_files import read_backend

CLS, SEP = 101, 102
VOCABULARY = 30522
LIMIT = 256

ODD_TEXTS = [
    "",
    " ",
    "\t\r\n \u00a0\u2003",
    "iPhone",
    "IPHONE iphone",
    "a" * 99,
    "a" * 101,
    "x" * 5000,
    "word " * 254,
    "word " * 255,
    "word " * 3000,
    "naïve café, Zürich, Ångström",
    "e\u0301 is not \u00e9",
    "数学は美しい。한국어 텍스트, русский текст",
    "👩\u200d👩\u200d👧\u200d👦 👍🏽 🇫🇷",
    "zero\u200bwidth\ufeffand\u00adsoft",
    "null\x00byte and \x07 bell \x7f",
    "\ufffd replacement",
    "[CLS] special [SEP] tokens [MASK] [PAD] [UNK]",
    "##ing ##s # # ##",
    "<|endoftext|> </s>",
    "price: 3,99 € (-20 %) -- #1!",
    "http://example.org/?q=a&b=c",
    "\U0010ffff\U000e0001 last of Unicode",
    "ﬁ ligature ½ ² Ⅻ",
    "مرحبا بالعالم שלום עולם",
    "नमस्ते दुनिया ไทย",
]

# What ASCII, scripts, marks and symbols look like side by side, rather than one in a thousand.
ODD_UNICODE = st.text(
    st.one_of(
        st.sampled_from(
            "abcXYZ 019.,-#[]\t\n\u0301\u200d\ufeff\u00ad\x00ßéŐ漢字ひらがな한글\u0627👍🏽"
        ),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=400,
)


def from_file(path: Path, **options: Any) -> Tokenizer:
    return Tokenizer(RawTokenizer.from_file(str(path)), **options)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """The real model's, as the loader opens it."""
    return from_file(minilm_folder() / "tokenizer.json", max_tokens=LIMIT, vocab_size=VOCABULARY)


@pytest.fixture(scope="module")
def theirs() -> Callable[..., list[int]]:
    """transformers' ids of one text, as sentence-transformers asks for them."""
    from transformers import AutoTokenizer

    auto = AutoTokenizer.from_pretrained(minilm_folder())

    def encode(text: str, **options: Any) -> list[int]:
        ids: list[int] = auto(text, **options)["input_ids"]
        return ids

    return encode


def encode_one(tokenizer: Tokenizer, value: Input, **options: Any) -> Encoding:
    (encoding,) = tokenizer.encode([value], **options)
    return encoding


# ------------------------------------------------------------------------- as transformers does


def check_against(
    theirs: Callable[..., list[int]], tokenizer: Tokenizer, texts: Sequence[str]
) -> None:
    for text, encoding in zip(texts, tokenizer.encode(texts), strict=True):
        assert list(encoding.ids) == theirs(text, truncation=True, max_length=LIMIT)
        assert encoding.total_tokens == len(theirs(text))
        assert encoding.truncated == (encoding.total_tokens > LIMIT)
        assert encoding.prompt_tokens == 0


def test_odd_texts(tokenizer: Tokenizer, theirs: Callable[..., list[int]]) -> None:
    check_against(theirs, tokenizer, ODD_TEXTS)


def test_golden_texts(
    tokenizer: Tokenizer,
    theirs: Callable[..., list[int]],
    golden: tuple[list[str], np.ndarray],
) -> None:
    check_against(theirs, tokenizer, golden[0])


@given(text=ODD_UNICODE)
def test_any_unicode(tokenizer: Tokenizer, theirs: Callable[..., list[int]], text: str) -> None:
    check_against(theirs, tokenizer, [text])


@pytest.mark.parametrize("limit", [3, 4, 17, 512])
def test_any_limit(theirs: Callable[..., list[int]], limit: int) -> None:
    tokenizer = from_file(minilm_folder() / "tokenizer.json", max_tokens=limit)
    for text in ODD_TEXTS:
        expected = theirs(text, truncation=True, max_length=limit)
        assert list(encode_one(tokenizer, text).ids) == expected


@pytest.mark.parametrize("family", [f for f in tiny.FAMILIES if f != "static"])
def test_other_families_are_cut_alike(family: str, tmp_path: Path) -> None:
    """Other special tokens, before and after: <s>…</s>, [CLS]…[SEP], and a lone <|endoftext|>."""
    from transformers import AutoTokenizer

    model = tiny.FAMILIES[family](tmp_path / "model", tokenizer_padding=True)
    auto = AutoTokenizer.from_pretrained(model.reference)
    ours = from_file(model.folder / "tokenizer.json", max_tokens=20)
    texts = [*tiny.ODD_TEXTS, *tiny.texts(20, seed=2)]
    for text, encoding in zip(texts, ours.encode(texts), strict=True):
        assert list(encoding.ids) == auto(text, truncation=True, max_length=20)["input_ids"]


# ----------------------------------------------------------------------------- length and order


def test_the_file_s_own_padding_and_truncation_are_off(tokenizer: Tokenizer) -> None:
    file = json.loads((minilm_folder() / "tokenizer.json").read_text(encoding="utf-8"))
    assert file["padding"]["strategy"] == {"Fixed": 128}
    assert file["truncation"]["max_length"] == 128
    short, long = tokenizer.encode(["iPhone", "word " * 200])
    assert list(short.ids) == [CLS, 18059, SEP]
    assert len(long.ids) == long.total_tokens == 202


@pytest.mark.parametrize(
    ("words", "kept"), [(253, 255), (254, 256), (255, 256), (1000, 256)], ids=str
)
def test_the_limit_counts_special_tokens(tokenizer: Tokenizer, words: int, kept: int) -> None:
    encoding = encode_one(tokenizer, "word " * words)
    assert len(encoding.ids) == kept
    assert encoding.total_tokens == words + 2
    assert encoding.truncated == (words > 254)
    assert (encoding.ids[0], encoding.ids[-1]) == (CLS, SEP)
    assert CLS not in encoding.ids[1:]
    assert SEP not in encoding.ids[:-1]


@pytest.mark.parametrize(
    "value", ["word " * 300, list(range(1000, 1300))], ids=["text", "token-ids"]
)
def test_truncate_false_names_input_length_and_limit(tokenizer: Tokenizer, value: Input) -> None:
    short: Input = "short" if isinstance(value, str) else [1000]
    with pytest.raises(ContextLengthExceeded) as caught:
        tokenizer.encode([short, value, value], truncate=False)
    assert caught.value.index == 1
    assert caught.value.param == "input"
    assert caught.value.code == "context_length_exceeded"
    for part in ("input[1]", "302 tokens", "at most 256"):
        assert part in str(caught.value)


def test_truncate_false_lets_the_longest_pass(tokenizer: Tokenizer) -> None:
    assert len(encode_one(tokenizer, "word " * 254, truncate=False).ids) == LIMIT


def test_many_texts_keep_their_order(tokenizer: Tokenizer) -> None:
    texts = [f"{number}" for number in range(2048)]
    together = tokenizer.encode(texts)
    assert [encoding.ids for encoding in together[::97]] == [
        encode_one(tokenizer, text).ids for text in texts[::97]
    ]


# ------------------------------------------------------------------------------------ token ids


@pytest.mark.parametrize("text", ["", "iPhone", "A longer sentence, with a comma.", "word " * 400])
def test_token_ids_are_the_text_s_without_special_tokens(
    tokenizer: Tokenizer, theirs: Callable[..., list[int]], text: str
) -> None:
    bare = theirs(text, add_special_tokens=False)
    assert encode_one(tokenizer, bare) == encode_one(tokenizer, text)


@pytest.mark.parametrize("text", ["", "iPhone", "word " * 400, "[SEP] in a text [CLS]"])
@pytest.mark.parametrize("prompt", ["", "query: "])
def test_token_ids_may_have_their_special_tokens(
    tokenizer: Tokenizer, theirs: Callable[..., list[int]], text: str, prompt: str
) -> None:
    whole = encode_one(tokenizer, theirs(text), prompt=prompt)
    assert whole == encode_one(tokenizer, text, prompt=prompt)


@pytest.mark.parametrize("ids", [[CLS], [SEP], [CLS, 7], [7, SEP], [SEP, CLS, 7, SEP]], ids=str)
def test_a_part_of_the_special_tokens_is_refused(tokenizer: Tokenizer, ids: list[int]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        tokenizer.encode([[7], [CLS, 7, SEP], ids])
    assert (caught.value.index, caught.value.param) == (2, "input")
    for part in ("input[2]", "(101 first, 102 last) or none"):
        assert part in str(caught.value)


def test_special_tokens_of_token_ids_count_once(tokenizer: Tokenizer) -> None:
    longest = [CLS, *range(1000, 1254), SEP]
    assert encode_one(tokenizer, longest, truncate=False).ids == tuple(longest)
    with pytest.raises(ContextLengthExceeded, match="257 tokens"):
        encode_one(tokenizer, [CLS, *longest[:-1], SEP], truncate=False)


@pytest.mark.parametrize("keep_end", [False, True])
def test_token_ids_with_special_tokens_are_cut_as_their_text(
    theirs: Callable[..., list[int]], keep_end: bool
) -> None:
    file = minilm_folder() / "tokenizer.json"
    tokenizer = from_file(file, max_tokens=6, keep_end=keep_end)
    text = "one two three four five six seven"
    assert encode_one(tokenizer, theirs(text)) == encode_one(tokenizer, text)


def test_a_template_with_one_end(tmp_path: Path) -> None:
    """Its end alone makes ids complete; a text's own is taken for it."""
    raw = RawTokenizer.from_file(str(tiny.make_qwen3(tmp_path).folder / "tokenizer.json"))
    end = raw.token_to_id("<|endoftext|>")
    tokenizer = Tokenizer(raw, max_tokens=20, pad_id=end)
    assert encode_one(tokenizer, "").ids == (end,)
    whole = encode_one(tokenizer, "one city")
    assert encode_one(tokenizer, whole.ids) == encode_one(tokenizer, whole.ids[:-1]) == whole
    assert encode_one(tokenizer, [end]) == encode_one(tokenizer, "")
    for padded in ([end, 7], [7, end, end]):  # with which this model pads
        with pytest.raises(InvalidRequest, match="padding"):
            encode_one(tokenizer, padded)


def test_equal_special_tokens_on_both_ends() -> None:
    """One of them is not both."""
    raw = RawTokenizer.from_file(str(minilm_folder() / "tokenizer.json"))
    raw.post_processor = processors.BertProcessing(("[SEP]", SEP), ("[SEP]", SEP))
    tokenizer = Tokenizer(raw, max_tokens=20)
    assert encode_one(tokenizer, [SEP, SEP]) == encode_one(tokenizer, "")
    with pytest.raises(InvalidRequest, match="only a part"):
        encode_one(tokenizer, [SEP])


def test_token_ids_may_be_numpy_s(tokenizer: Tokenizer) -> None:
    (encoding,) = tokenizer.encode(np.array([[18059, 7]]))  # type: ignore[arg-type]
    assert list(encoding.ids) == [CLS, 18059, 7, SEP]
    assert all(type(token) is int for token in encoding.ids)


@pytest.mark.parametrize("token", [1, VOCABULARY - 1])
def test_the_vocabulary_s_ends_are_inside(tokenizer: Tokenizer, token: int) -> None:
    assert list(encode_one(tokenizer, [token]).ids) == [CLS, token, SEP]


@pytest.mark.parametrize("token", [-1, VOCABULARY, 100_257, 2**70])
def test_ids_out_of_range_are_explained(tokenizer: Tokenizer, token: int) -> None:
    with pytest.raises(InvalidRequest) as caught:
        tokenizer.encode([[5], [7, token]])
    assert (caught.value.index, caught.value.param) == (1, "input")
    for part in ("input[1]", str(token), "0 to 30521", "check_embedding_ctx_length=False"):
        assert part in str(caught.value)


# --------------------------------------------------------------------------------------- prompt


def test_prompt_is_prepended_to_text(
    tokenizer: Tokenizer, theirs: Callable[..., list[int]]
) -> None:
    encoding = encode_one(tokenizer, "iPhone", prompt="search_query: ")
    assert list(encoding.ids) == theirs("search_query: iPhone")
    glued = encode_one(tokenizer, "phone", prompt="i")
    assert list(glued.ids) == theirs("iphone"), "one text, as sentence-transformers joins them"


def test_prompt_is_prepended_to_token_ids(
    tokenizer: Tokenizer, theirs: Callable[..., list[int]]
) -> None:
    bare = theirs("iPhone", add_special_tokens=False)
    encoding = encode_one(tokenizer, bare, prompt="search_query: ")
    assert list(encoding.ids) == theirs("search_query: iPhone")


def test_prompt_counts_towards_the_limit(tokenizer: Tokenizer) -> None:
    encoding = encode_one(tokenizer, "word " * 254, prompt="query: ")
    assert (len(encoding.ids), encoding.total_tokens) == (LIMIT, 258)


@pytest.mark.parametrize("family", ["bert", "roberta", "qwen3"])
@pytest.mark.parametrize("prompt", ["", "search the river: ", "river " * 40])
@pytest.mark.parametrize("text", ["", "one city", "city " * 60])
def test_excluded_prompt_tokens_are_counted_as_sentence_transformers_counts(
    family: str, prompt: str, text: str, tmp_path: Path
) -> None:
    model = tiny.FAMILIES[family](tmp_path / "model", include_prompt=False, max_seq_length=20)
    reference = tiny.load_reference(model)
    expected = reference.preprocess([text], prompt=prompt or None).get("prompt_length", 0)
    ours = from_file(model.folder / "tokenizer.json", max_tokens=20, exclude_prompt=True)
    encoding = encode_one(ours, text, prompt=prompt)
    assert encoding.prompt_tokens == expected
    assert encoding.prompt_tokens <= len(encoding.ids)


# --------------------------------------------------------------------------------- what is no text


@pytest.mark.parametrize("prompt", ["", "query: "])
@pytest.mark.parametrize("bad", ["\ud800", "a\udfff", "\udc80\ud800 b"], ids=ascii)
def test_lone_surrogates_are_refused(tokenizer: Tokenizer, bad: str, prompt: str) -> None:
    with pytest.raises(InvalidRequest, match=r"input\[1\] holds a lone surrogate") as caught:
        tokenizer.encode(["fine", bad], prompt=prompt)
    assert caught.value.index == 1


@pytest.mark.parametrize("value", ["text", [18059]], ids=["text", "token-ids"])
def test_lone_surrogates_in_the_prompt_are_refused(tokenizer: Tokenizer, value: Input) -> None:
    with pytest.raises(InvalidRequest, match="'prompt' holds a lone surrogate") as caught:
        tokenizer.encode([value], prompt="\ud800")
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(
    ("inputs", "index"),
    [
        pytest.param(["a", None], 1, id="none"),
        pytest.param(["a", 1.5], 1, id="float-among-texts"),
        pytest.param(["a", [1, 2]], 1, id="ids-among-texts"),
        pytest.param([[1], "a"], 1, id="text-among-ids"),
        pytest.param([[1.0]], 0, id="float-ids"),
        pytest.param([7, 8], 0, id="one-list-of-ids"),
        pytest.param([None], 0, id="only-none"),
        pytest.param([b"bytes"], 0, id="bytes"),
    ],
)
def test_other_inputs_are_refused(tokenizer: Tokenizer, inputs: list[Any], index: int) -> None:
    """Never ``str()`` of what is no text: a None would get the vector of the word."""
    with pytest.raises(InvalidRequest, match=r"all texts or all lists of token ids") as caught:
        tokenizer.encode(inputs)
    assert caught.value.index == index


# -------------------------------------------------------------------------------------- the file


def test_a_broken_file_is_not_supported(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    with pytest.raises(ModelNotSupported, match="can't be read as a tokenizer"):
        read_backend(file)


def test_a_limit_without_room_is_not_supported() -> None:
    raw = RawTokenizer.from_file(str(minilm_folder() / "tokenizer.json"))
    with pytest.raises(ModelNotSupported, match="leaves no room"):
        Tokenizer(raw, max_tokens=2)
