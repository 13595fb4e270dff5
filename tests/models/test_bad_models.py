# SPDX-License-Identifier: MIT OR Apache-2.0
"""Model files that are cut, swapped, or that lie: refused at the start, by file and fault."""

from __future__ import annotations

import json
import logging
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny_models
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from live import run_cli, sentence
from model_folders import put_in_cache
from onnx import TensorProto, helper
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer as RawTokenizer

from embedding_server import Embedder
from embedding_server.backends.architectures import keys_that_count
from embedding_server.engine.tokenizer import Tokenizer
from embedding_server.errors import (
    InferenceFailed,
    InvalidRequest,
    ModelNotSupported,
    ModelUnavailable,
)
from embedding_server.models import hub
from embedding_server.models.spec import parse_spec

Change = Callable[[Path], object]
WEIGHTS = "model.safetensors"
WORDS = "embeddings.word_embeddings.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is as it should be, Dense and all."""
    made = tiny_models.make_bert(
        tmp_path_factory.mktemp("sound") / "bert", dense=(24, "tanh"), prompts={"query": "q: "}
    )
    return made.folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "model")


def refusal(folder: Path, **options: Any) -> str:
    """The sentence of the refusal, which is no repetition of an exception that nobody foresaw."""
    options = {"backend": "onnx", **options}
    with pytest.raises(ModelNotSupported) as caught:
        Embedder(str(folder), **options)
    message = str(caught.value)
    assert "can't be loaded: " not in message
    assert len(message) < 1000
    return message


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def test_the_sound_one(sound: Path) -> None:
    with Embedder(str(sound), backend="onnx") as embedder:
        assert embedder.embed(["one text"]).shape == (1, 24)


# ----------------------------------------------------------------------------- model.safetensors


def header_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    (size,) = struct.unpack("<Q", content[:8])
    header: dict[str, Any] = json.loads(content[8 : 8 + size])
    return header, content[8 + size :]


def with_header(header: object, data: bytes, *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def in_header(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    """Change the header in place; or return another."""

    def changed(content: bytes) -> bytes:
        header, data = header_of(content)
        other = change(header)
        return with_header(header if other is None else other, data)

    return changed


def of_words(**entry: Any) -> Callable[[bytes], bytes]:
    """Lie about one tensor."""
    return in_header(lambda header: header[WORDS].update(entry))


def shifted(by_begin: int, by_end: int) -> Callable[[bytes], bytes]:
    def shift(header: dict[str, Any]) -> None:
        begin, end = header[WORDS]["data_offsets"]
        header[WORDS]["data_offsets"] = [begin + by_begin, end + by_end]

    return in_header(shift)


def swapped(header: dict[str, Any]) -> None:
    begin, end = header[WORDS]["data_offsets"]
    header[WORDS]["data_offsets"] = [end, begin]


def overlapping(header: dict[str, Any]) -> None:
    first, second = [name for name in header if name != "__metadata__"][:2]
    header[first]["data_offsets"] = header[second]["data_offsets"]


def twice(content: bytes) -> bytes:
    """One name for two tensors: readers differ in which they take."""
    header, data = header_of(content)
    first, second = [name for name in header if name.endswith("attention.self.key.weight")]
    text = json.dumps(header).replace(f'"{second}"', f'"{first}"')
    return with_header(text.encode(), data)


LIES: Mapping[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "seven-bytes": lambda content: content[:7],
    "only-a-length": lambda content: content[:8],
    "header-cut": lambda content: content[:100],
    "data-cut": lambda content: content[:-1],
    "cut-in-half": lambda content: content[: len(content) // 2],
    "longer-than-it-says": lambda content: content + b"\0" * 64,
    "length-beyond-the-file": lambda content: struct.pack("<Q", len(content)) + content[8:],
    "length-of-2**40": lambda content: struct.pack("<Q", 2**40) + content[8:],
    "length-of-2**64": lambda content: b"\xff" * 8 + content[8:],
    "length-of-0": lambda content: b"\0" * 8 + content[8:],
    "header-of-101-MB": lambda content: with_header(b"{" + b" " * 101_000_000 + b"}", b""),
    "not-utf-8": in_header(lambda header: b'{"\xff\xfe": {}}'),
    "not-json": in_header(lambda header: b"{'a': 1}"),
    "a-list": in_header(lambda header: []),
    "a-number": in_header(lambda header: b"7"),
    "deep": in_header(lambda header: b'{"a":' * 5000 + b"1" + b"}" * 5000),
    "metadata-of-numbers": in_header(lambda header: header.update(__metadata__={"a": 1})),
    "no-tensor": lambda content: with_header({}, b""),
    "offsets-out-of-the-file": shifted(10**9, 10**9),
    "offsets-of-2**63": of_words(data_offsets=[2**63, 2**63 + 4]),
    "offsets-below-0": of_words(data_offsets=[-4, 0]),
    "offsets-of-text": of_words(data_offsets=["0", "4"]),
    "one-offset": of_words(data_offsets=[0]),
    "end-before-begin": in_header(swapped),
    "overlap": in_header(overlapping),
    "a-byte-further": shifted(1, 1),
    "a-value-less": shifted(0, -4),
    "wider-type-for-its-bytes": of_words(dtype="F64"),
    "narrower-type-for-its-bytes": of_words(dtype="F16"),
    "unknown-type": of_words(dtype="F33"),
    "no-type": in_header(lambda header: header[WORDS].pop("dtype") and None),
    "shape-too-large": of_words(shape=[10**6, 32]),
    "shape-below-0": of_words(shape=[-1, -32]),
    "shape-that-overflows": of_words(shape=[2**62, 2**62]),
    "shape-of-text": of_words(shape="456"),
    "a-name-twice": twice,
    "a-pointer-of-git-lfs": lambda content: b"version https://git-lfs.github.com/spec/v1\n",
    "a-web-page": lambda content: b"<!DOCTYPE html><html></html>",
    "a-zip-as-pickles-are": lambda content: b"PK\x03\x04" + content[4:],
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies(lie: str, folder: Path) -> None:
    file = folder / WEIGHTS
    file.write_bytes(LIES[lie](file.read_bytes()))
    message = refusal(folder)
    if lie == "no-tensor":
        assert f"{folder} have no tensor" in message
    else:
        assert f"{file} is damaged: " in message


def with_tensor(name: str, change: Callable[[np.ndarray], np.ndarray | None]) -> Change:
    def changed(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        value = change(tensors.pop(name))
        if value is not None:
            tensors[name] = np.ascontiguousarray(value)
        save_file(tensors, folder / WEIGHTS)

    return changed


QUERY = "encoder.layer.1.attention.self.query"
TENSORS: Mapping[str, tuple[str, Callable[[np.ndarray], np.ndarray | None]]] = {
    "missing": (f"{QUERY}.weight", lambda value: None),
    "missing-bias": (f"{QUERY}.bias", lambda value: None),
    "missing-words": (WORDS, lambda value: None),
    "fewer-words": (WORDS, lambda value: value[:-1]),
    "more-words": (WORDS, lambda value: np.concatenate([value, value])),
    "transposed": ("encoder.layer.0.intermediate.dense.weight", lambda value: value.T),
    "flat": (f"{QUERY}.weight", lambda value: value.ravel()),
    "a-number": ("embeddings.LayerNorm.weight", lambda value: np.float32(1)),
    "of-nothing": (f"{QUERY}.bias", lambda value: value[:0]),
    "integers": (f"{QUERY}.weight", lambda value: value.astype(np.int32)),
    "bytes": (WORDS, lambda value: value.astype(np.uint8)),
    "doubles": ("embeddings.LayerNorm.bias", lambda value: value.astype(np.float64)),
}


@pytest.mark.parametrize("what", TENSORS)
def test_a_tensor_that_does_not_fit(what: str, folder: Path) -> None:
    name, change = TENSORS[what]
    with_tensor(name, change)(folder)
    assert name in refusal(folder)


STATIC: Mapping[str, Callable[[dict[str, np.ndarray]], object]] = {
    "one-axis": lambda t: t.update(embeddings=t["embeddings"].ravel()),
    "no-values": lambda t: t.update(embeddings=t["embeddings"][:, :0]),
    "no-rows": lambda t: t.update(embeddings=t["embeddings"][:0]),
    "mapping-beyond": lambda t: t.update(mapping=np.full(len(t["embeddings"]), 10**6)),
    "mapping-below": lambda t: t.update(mapping=np.full(len(t["embeddings"]), -1)),
    "mapping-of-floats": lambda t: t.update(mapping=np.zeros(len(t["embeddings"]), np.float32)),
    "one-weight": lambda t: t.update(weights=np.ones(1, np.float32)),
    "fewer-weights": lambda t: t.update(weights=np.ones(7, np.float32)),
    "weights-of-two-axes": lambda t: t.update(weights=np.ones((7, 1), np.float32)),
    "another-name": lambda t: t.update(table=t.pop("embeddings")),
}


@pytest.mark.parametrize("what", STATIC)
def test_a_static_table_that_does_not_fit(what: str, tmp_path: Path) -> None:
    folder = tiny_models.make_static(tmp_path / "static").folder
    tensors = load_file(folder / WEIGHTS)
    STATIC[what](tensors)
    save_file(tensors, folder / WEIGHTS)
    assert f"{folder}" in refusal(folder)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_dense_of_another_precision_than_the_table(dtype: str, tmp_path: Path) -> None:
    """sentence-transformers rounds it as it loads it; saved in one precision it is the same."""
    model = tiny_models.make_static(tmp_path / "static", dtype=dtype, dense=(24, "tanh"))
    assert f"{model.folder / '1_Dense' / WEIGHTS} is F32" in refusal(model.folder)
    reference = tiny_models.load_reference(model).float()
    reference.save_pretrained(str(tmp_path / "saved"))
    texts = tiny_models.texts(20, seed=4)
    with Embedder(str(tmp_path / "saved"), backend="onnx") as embedder:
        difference = embedder.embed(texts) - reference.encode(texts, normalize_embeddings=True)
    assert np.abs(difference).max() < 1e-5


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors", "..", ".", "", "/etc/passwd", "sub/model.safetensors", "a\0b",
        "..\\outside.safetensors", "absent.safetensors", "pytorch_model.bin", 7, None, ["a"],
    ],
    ids=repr,
)  # fmt: skip
def test_an_index_that_leads_elsewhere(name: object, folder: Path) -> None:
    shutil.copy(folder / WEIGHTS, folder.parent / "outside.safetensors")
    (folder / WEIGHTS).rename(folder / "part.safetensors")
    index = {"weight_map": {WORDS: "part.safetensors", "other": name}}
    write(folder / f"{WEIGHTS}.index.json", index)
    message = refusal(folder)
    assert f"{WEIGHTS}.index.json" in message or "absent.safetensors is missing" in message


# ------------------------------------------------------------------------------------- the JSON

JSON_FILES = (
    *("config.json", "modules.json", "tokenizer.json", "tokenizer_config.json"),
    *("sentence_bert_config.json", "config_sentence_transformers.json", "special_tokens_map.json"),
    *("1_Pooling/config.json", "2_Dense/config.json"),
)
NO_OBJECTS: Mapping[str, bytes] = {
    "empty": b"",
    "cut": b'{"a": ',
    "null": b"null",
    "number": b"1",
    "text": b'"x"',
    "list": b"[1]",
    "deep": b"[" * 100_000 + b"]" * 100_000,
    "deep-objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "not-utf-8": b'{"a": "\xff"}',
    "binary": bytes(range(256)),
    "utf-16": '{"a": 1}'.encode("utf-16"),
}


@pytest.mark.parametrize("content", NO_OBJECTS)
@pytest.mark.parametrize("name", JSON_FILES)
def test_a_file_without_an_object(name: str, content: str, folder: Path) -> None:
    # It is read only where tokenizer_config.json doesn't list the added tokens itself.
    settings = read(folder / "tokenizer_config.json")
    settings.pop("added_tokens_decoder", None)
    write(folder / "tokenizer_config.json", settings)
    (folder / name).write_bytes(NO_OBJECTS[content])
    assert str(folder / name) in refusal(folder)


@pytest.mark.parametrize("name", JSON_FILES)
def test_a_file_of_a_terabyte(name: str, folder: Path) -> None:
    """Refused before a byte is read; on the disk it takes no room."""
    settings = read(folder / "tokenizer_config.json")
    settings.pop("added_tokens_decoder", None)
    write(folder / "tokenizer_config.json", settings)
    with (folder / name).open("r+b") as file:
        file.truncate(2**40)
    assert f"{folder / name} has {2**40} bytes" in refusal(folder)


def in_json(name: str, **values: Any) -> Change:
    return lambda folder: write(folder / name, {**read(folder / name), **values})


CONFIG_LIES: Mapping[str, tuple[Change, str]] = {
    "more-layers": (in_json("config.json", num_hidden_layers=3), "encoder.layer.2."),
    "layers-without-end": (in_json("config.json", num_hidden_layers=10**12), "num_hidden_layers"),
    "wider": (in_json("config.json", hidden_size=64), "2_Dense takes 32"),
    "width-without-end": (in_json("config.json", hidden_size=2**70), "2_Dense takes 32"),
    "more-tokens": (in_json("config.json", vocab_size=10**9), WORDS),
    "fewer-tokens": (in_json("config.json", vocab_size=10), WORDS),
    "more-positions": (in_json("config.json", max_position_embeddings=10**12), "position"),
    "another-family": (in_json("config.json", model_type="distilbert"), "config.json: dim"),
    "no-family": (in_json("config.json", model_type=["bert"]), "['bert']"),
    "an-activation-of-its-own": (in_json("config.json", hidden_act=["gelu"]), "hidden_act"),
    "an-epsilon-without-end": (in_json("config.json", layer_norm_eps=10**400), "layer_norm_eps"),
    "padding-of-text": (
        in_json("config.json", model_type="xlm-roberta", pad_token_id="1"),
        "pad_token_id",
    ),
    "a-length-of-text": (in_json("sentence_bert_config.json", max_seq_length="64"), "max_seq"),
    "prompts-as-a-list": (in_json("config_sentence_transformers.json", prompts=["q"]), "prompts"),
    "prompts-of-numbers": (
        in_json("config_sentence_transformers.json", prompts={"a": 5}),
        "prompts",
    ),
    "a-default-that-is-none": (
        in_json("config_sentence_transformers.json", default_prompt_name=["query"]),
        "default prompt",
    ),
    "pooling-by-number": (in_json("1_Pooling/config.json", pooling_mode=7), "Pooling 7"),
    "pooling-by-lists": (in_json("1_Pooling/config.json", pooling_mode=[["mean"]]), "Pooling"),
    "an-activation-by-list": (in_json("2_Dense/config.json", activation_function=[]), "2_Dense"),
    "an-activation-by-path": (
        in_json("2_Dense/config.json", activation_function="os.system"),
        "os.system",
    ),
    "an-adapter": (lambda folder: write(folder / "adapter_config.json", {}), "adapter_config"),
}


@pytest.mark.parametrize("lie", CONFIG_LIES)
def test_a_config_that_lies(lie: str, folder: Path) -> None:
    change, part = CONFIG_LIES[lie]
    change(folder)
    assert part in refusal(folder)


JSON_VALUES = st.recursive(
    st.sampled_from([None, True, False, 0, 1, -1, 2, 1.5, 10**9, 10**30, "", "a", "mean", "0"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner),
    max_leaves=3,
)


@pytest.fixture
def without_warnings() -> Iterator[None]:
    """Of the models that are taken all the same: some hundreds of lines."""
    ours = logging.getLogger("embedding_server")
    level = ours.level
    ours.setLevel(logging.CRITICAL)
    yield
    ours.setLevel(level)


@settings(
    max_examples=400,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_any_value_anywhere_is_taken_or_refused(
    data: st.DataObject, sound: Path, without_warnings: None
) -> None:
    """No other exception, and what is taken computes."""
    name = data.draw(st.sampled_from(JSON_FILES))
    path = sound / name
    original = path.read_text()
    content = root = {"root": json.loads(original)}
    key: Any = "root"
    while data.draw(st.booleans() if key != "root" else st.just(True)):
        inner = content[key]
        keys = (
            sorted(inner)
            if isinstance(inner, dict)
            else range(len(inner))
            if isinstance(inner, list)
            else ()
        )
        if not keys:
            break
        content, key = inner, data.draw(st.sampled_from(keys))
    if data.draw(st.integers(0, 4)):
        content[key] = data.draw(JSON_VALUES)
    else:
        del content[key]
    path.write_text(json.dumps(root.get("root")))
    try:
        with Embedder(str(sound), backend="onnx", threads=1) as embedder:
            vectors = embedder.embed(["one text, and more"])
            assert np.isfinite(vectors).all()
    except ModelNotSupported as error:
        assert "can't be loaded: " not in str(error), "nobody foresaw it"
    except InvalidRequest:
        pass  # no token in the text, or one that the model has no vector for
    finally:
        path.write_text(original)


# --------------------------------------------------------------------------------- the tokenizer


def test_the_tokenizer_of_another_family(folder: Path, tmp_path: Path) -> None:
    other = tiny_models.make_roberta(tmp_path / "roberta").folder
    shutil.copy(other / "tokenizer.json", folder)
    assert "no BertTokenizer can be made of a BPE model" in refusal(folder)


def with_vocabulary(folder: Path, change: Callable[[dict[str, int]], object]) -> None:
    tokenizer = read(folder / "tokenizer.json")
    change(tokenizer["model"]["vocab"])
    tokenizer["added_tokens"] = []
    write(folder / "tokenizer.json", tokenizer)
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    settings = read(folder / "tokenizer_config.json")
    settings.pop("added_tokens_decoder", None)
    write(folder / "tokenizer_config.json", settings)


def test_a_larger_vocabulary(folder: Path) -> None:
    with_vocabulary(folder, lambda vocab: vocab.update({f"new{n}": 456 + n for n in range(9)}))
    assert "don't belong together" in refusal(folder)


def test_a_smaller_vocabulary(folder: Path) -> None:
    """As a model of 5,000 tokens with the tokenizer of another that has 456."""
    with_tensor(WORDS, lambda words: np.resize(words, (5000, 32)))(folder)
    in_json("config.json", vocab_size=5000)(folder)
    assert "456 tokens and the model 5000: they don't belong together" in refusal(folder)


def test_rows_in_reserve_are_no_other_vocabulary(folder: Path) -> None:
    """Tables are often rounded up."""
    with_tensor(WORDS, lambda words: np.resize(words, (512, 32)))(folder)
    in_json("config.json", vocab_size=512)(folder)
    with Embedder(str(folder), backend="onnx") as embedder:
        assert embedder.embed(["one text"]).shape == (1, 24)


@pytest.mark.parametrize("token", ["[CLS]", "[SEP]", "[UNK]"])
def test_a_vocabulary_without_a_special_token(token: str, folder: Path) -> None:
    """It would be added with an id that the model has no vector for."""
    with_vocabulary(folder, lambda vocab: vocab.update({"other": vocab.pop(token)}))
    message = refusal(folder)
    assert "unknown token '[UNK]'" in message or f"lacks the token {token!r}" in message


def test_ids_with_a_gap(folder: Path) -> None:
    with_vocabulary(folder, lambda vocab: vocab.update(river=10**6))
    assert "don't belong together" in refusal(folder)


def as_it_is(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change tokenizer.json of a class that is not built anew."""
    tokenizer = read(folder / "tokenizer.json")
    change(tokenizer)
    write(folder / "tokenizer.json", tokenizer)
    in_json("tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")(folder)


PANICS: Mapping[str, Callable[[dict[str, Any]], object]] = {
    "no-unknown-token": lambda file: file["model"].update(unk_token="[NONE]"),
    "an-end-that-is-not-listed": lambda file: file["post_processor"]["special_tokens"].clear(),
    "a-map-of-characters-that-is-none": lambda file: file.update(
        normalizer={"type": "Precompiled", "precompiled_charsmap": 7}
    ),
}


@pytest.mark.parametrize("what", PANICS)
def test_what_makes_the_tokenizers_library_fail(what: str, folder: Path) -> None:
    """Some by a panic of Rust's, which is no Exception in Python."""
    as_it_is(folder, PANICS[what])
    assert "tokenizer" in refusal(folder)


def test_a_panic_while_it_is_served(folder: Path) -> None:
    """It fails that request, as any fault of the model does."""
    content = read(folder / "tokenizer.json")
    PANICS["an-end-that-is-not-listed"](content)
    with Embedder(str(folder), backend="onnx") as embedder:
        tokenizer = Tokenizer(RawTokenizer.from_file(str(folder / "tokenizer.json")), max_tokens=9)
        tokenizer._tokenizer = RawTokenizer.from_str(json.dumps(content))
        with pytest.raises(InferenceFailed):
            tokenizer.encode(["a text"])
        assert embedder.embed(["a text"]).shape == (1, 24)


# ------------------------------------------------------------- what would be ignored or made up


def in_weights(change: Callable[[dict[str, Any]], object]) -> Change:
    def changed(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return changed


@pytest.mark.parametrize("name", ["linear.weight", "score.weight", "lm_head.weight"])
@pytest.mark.parametrize("backend", ["auto", "onnx", "torch"])
def test_a_tensor_that_nothing_reads(backend: str, name: str, folder: Path) -> None:
    """As of a projection that the authors' own code applies: the true vectors are others."""
    projection = np.zeros((64, 32), np.float32)
    in_weights(lambda tensors: tensors.update({name: projection}))(folder)
    assert repr(name) in refusal(folder, backend=backend)


def test_rotation_of_a_family_without_it(folder: Path) -> None:
    """BERT has learned positions: its authors' own code rotates, and transformers' does not."""
    name = "encoder.layer.0.attention.self.rotary_emb.inv_freq"
    in_weights(lambda tensors: tensors.update({name: np.ones(8, np.float32)}))(folder)
    assert repr(name) in refusal(folder, backend="onnx")


def test_a_decoder_that_is_not_built_may_say_that_it_is_causal() -> None:
    assert keys_that_count({"model_type": "qwen2", "is_causal": True}) == set()
    assert keys_that_count({"model_type": "bert", "is_causal": True}) == {"is_causal"}


@pytest.mark.parametrize("value", [{}, [], False])
def test_code_that_is_named_by_nothing_is_still_unknown(value: object, folder: Path) -> None:
    in_json("config.json", auto_map=value)(folder)
    assert "'auto_map'" in refusal(folder, backend="onnx")


@pytest.mark.parametrize("backend", ["auto", "onnx", "torch"])
def test_tensors_that_are_missing(backend: str, folder: Path) -> None:
    """transformers would take random values, others at every start."""
    names = [f"encoder.layer.1.intermediate.dense.{kind}" for kind in ("weight", "bias")]
    in_weights(lambda tensors: [tensors.pop(name) for name in names])(folder)
    assert "encoder.layer.1.intermediate.dense." in refusal(folder, backend=backend)


@pytest.mark.parametrize("backend", ["auto", "onnx", "torch"])
def test_layers_that_the_config_leaves_out(backend: str, folder: Path) -> None:
    in_json("config.json", num_hidden_layers=1)(folder)
    assert "encoder.layer.1." in refusal(folder, backend=backend)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_experts_and_fields_that_transformers_does_not_read(backend: str, tmp_path: Path) -> None:
    """NomicBERT in its authors' fields: transformers' class would take its defaults for them."""
    model = tiny_models.make_nomic_bert(tmp_path / "nomic", config={"moe_every_n_layers": 2})
    assert "'moe_every_n_layers'" in refusal(model.folder, backend=backend)
    model = tiny_models.make_nomic_bert(tmp_path / "dense")
    assert "two different models" in refusal(model.folder, backend="torch")


@pytest.mark.parametrize("backend", ["onnx", "torch"])
@pytest.mark.parametrize("name", ["all-MiniLM-L6-v2", "tiny"])
def test_an_encoder_made_causal(name: str, backend: str, folder: Path, tmp_path: Path) -> None:
    """sentence-transformers' own vectors depend on the batch then, so that none is right."""
    if name != "tiny":
        packaged = hub.locate(parse_spec(name), download=False).folder
        folder = shutil.copytree(packaged, tmp_path / name)
    in_json("config.json", is_causal=True)(folder)
    assert "is_causal" in refusal(folder, backend=backend)


def test_a_key_that_nobody_knows(folder: Path) -> None:
    """transformers' own class doesn't read it, so that torch computes as it does without."""
    in_json("config.json", some_key_of_tomorrow=7, another=None)(folder)
    assert "config.json sets 'some_key_of_tomorrow', not known here" in refusal(folder)
    with Embedder(str(folder), backend="torch") as embedder:
        assert embedder.embed(["one text"]).shape == (1, 24)


@pytest.mark.parametrize("backend", ["onnx", "torch"])
def test_a_key_that_counts_and_that_transformers_drops(backend: str, folder: Path) -> None:
    in_json("config.json", position_embedding_type="relative_key")(folder)
    assert "position_embedding_type" in refusal(folder, backend=backend)


def test_positions_of_a_family_that_rotates(tmp_path: Path) -> None:
    """As multilingual ModernBERTs have it: their code reads no such key."""
    config = {"position_embedding_type": "sans_pos"}
    for backend in ("onnx", "torch"):
        folder = tiny_models.make_modernbert(tmp_path / backend, config=config).folder
        with Embedder(str(folder), backend=backend) as embedder:
            assert embedder.embed(["one text"]).shape == (1, 32)


@pytest.mark.parametrize("backend", ["auto", "onnx", "torch"])
def test_two_modules_of_one_name(backend: str, folder: Path) -> None:
    """sentence-transformers keeps the later one, at the earlier one's place."""
    modules = read(folder / "modules.json")
    modules[2]["name"] = modules[1]["name"]
    write(folder / "modules.json", modules)
    assert "a name that no other has" in refusal(folder, backend=backend)
    del modules[2]["name"]
    write(folder / "modules.json", modules)
    assert "a name that no other has" in refusal(folder, backend=backend)


@pytest.mark.parametrize("backend", ["auto", "onnx", "torch"])
def test_a_router(backend: str, folder: Path) -> None:
    modules = read(folder / "modules.json")
    modules[2]["type"] = "sentence_transformers.models.Router"
    write(folder / "modules.json", modules)
    assert "Router" in refusal(folder, backend=backend)


@pytest.mark.parametrize("backend", ["auto", "onnx", "torch"])
def test_a_rotary_embedding_that_depends_on_the_batch(backend: str, tmp_path: Path) -> None:
    model = tiny_models.make_nomic_bert(
        tmp_path / "nomic",
        layout="v6",
        rotary_scaling_factor=2.0,
        max_trained_positions=16,
        max_seq_length=64,
    )
    assert "'dynamic'" in refusal(model.folder, backend=backend)


def test_one_model_twice_is_the_same_or_refused(folder: Path) -> None:
    shutil.copy(folder / WEIGHTS, folder / "shard.safetensors")
    names = dict.fromkeys(load_file(folder / WEIGHTS), "shard.safetensors")
    write(folder / f"{WEIGHTS}.index.json", {"weight_map": names})
    Embedder(str(folder), backend="onnx").close()
    in_weights(lambda tensors: tensors.update({WORDS: tensors[WORDS] * 1.001}))(folder)
    assert f"disagree about the tensor '{WORDS}'" in refusal(folder)
    in_weights(lambda tensors: tensors.pop(WORDS))(folder)
    assert f"only one of them has '{WORDS}'" in refusal(folder)


@pytest.mark.parametrize("backend", ["auto", "onnx", "torch"])
def test_one_tensor_under_two_names(backend: str, folder: Path) -> None:
    """With a head's prefix and without, or by TensorFlow's name of a norm's weights."""
    for other in (f"bert.{WORDS}", "embeddings.LayerNorm.gamma"):
        name = WORDS if other.endswith(WORDS) else "embeddings.LayerNorm.weight"
        copy = shutil.copytree(folder, folder.parent / other)
        in_weights(lambda tensors: tensors.update({other: tensors[name] * 2}))(copy)  # noqa: B023
        message = refusal(copy, backend=backend)
        assert other in message or f"another tensor '{name}'" in message


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_static_table_beside_another(backend: str, tmp_path: Path) -> None:
    folder = tiny_models.make_static(tmp_path / "static", layout="v6").folder
    (file,) = folder.rglob(WEIGHTS)
    tensors = load_file(file)
    save_file({**tensors, "embeddings": 2 * tensors["embedding.weight"]}, file)
    assert "'embeddings'" in refusal(folder, backend=backend)


# -------------------------------------------------------------------------------- code and links

SENTINEL = "import pathlib; pathlib.Path(__file__).with_name('ran').touch()\n"
CODE = f"""{SENTINEL}
from sentence_transformers.models import Transformer
"""


@pytest.mark.parametrize("backend", ["auto", "onnx", "torch"])
@pytest.mark.parametrize(
    "class_path", ["custom.Transformer", "Transformer", "os.path", "sentence_transformersx.Pooling"]
)
def test_a_module_of_its_own(class_path: str, backend: str, folder: Path) -> None:
    modules = read(folder / "modules.json")
    modules[0]["type"] = class_path
    write(folder / "modules.json", modules)
    (folder / "custom.py").write_text(CODE)
    message = refusal(folder, backend=backend)
    assert f"{folder / 'modules.json'} names the class '{class_path}'" in message
    assert not list(folder.rglob("ran"))


@pytest.mark.parametrize("backend", ["onnx", "torch"])
def test_code_in_the_config(backend: str, folder: Path) -> None:
    """It may compute something else than the family of that name, and is not run."""
    in_json("config.json", auto_map={"AutoModel": "custom.Transformer", "AutoConfig": "custom.C"})(
        folder
    )
    (folder / "custom.py").write_text(CODE)
    assert "auto_map names code" in refusal(folder, backend=backend)
    assert not list(folder.rglob("ran"))


@pytest.mark.parametrize("backend", ["onnx", "torch"])
def test_a_family_of_its_own(backend: str, folder: Path) -> None:
    in_json("config.json", model_type="own", auto_map={"AutoConfig": "custom.C"})(folder)
    (folder / "custom.py").write_text(CODE)
    with pytest.raises(ModelNotSupported, match="own"):
        Embedder(str(folder), backend=backend)
    assert not list(folder.rglob("ran"))


@pytest.mark.parametrize(
    "path", ["..", "../outside", "/etc", "1_Pooling/../../outside", "link", "a\0b", "x" * 5000]
)
def test_a_module_outside_the_folder(path: str, folder: Path) -> None:
    outside = shutil.copytree(folder / "1_Pooling", folder.parent / "outside")
    (folder / "link").symlink_to(outside)
    modules = read(folder / "modules.json")
    modules[1]["path"] = path
    write(folder / "modules.json", modules)
    message = refusal(folder)
    assert f"{folder / 'modules.json'} names the path" in message


def test_a_cache_of_links_goes_on_working(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants  # noqa: F401

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    put_in_cache(sound, tmp_path / "cache", "org/tiny")
    with (
        Embedder("org/tiny", backend="onnx") as linked,
        Embedder(str(sound), backend="onnx") as own,
    ):
        assert np.array_equal(linked.embed(["a text"]), own.embed(["a text"]))


# ----------------------------------------------------------------------------------------- .onnx


def make_onnx(
    folder: Path, *, location: str | None = None, states: int = TensorProto.FLOAT, ids: int = 7
) -> Path:
    """A graph whose states are the words' vectors, in its own file or at ``location``."""
    words = load_file(folder / WEIGHTS)[WORDS]
    tensor = onnx.numpy_helper.from_array(words, "words")
    if location is not None:
        (folder / "words.bin").write_bytes(words.tobytes())
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {
            "location": location,
            "offset": "0",
            "length": str(words.nbytes),
        }.items():
            tensor.external_data.append(onnx.StringStringEntryProto(key=key, value=value))
    nodes = [helper.make_node("Gather", ["words", "input_ids"], ["found"])]
    nodes += [helper.make_node("Cast", ["found"], ["last_hidden_state"], to=states)]
    graph = helper.make_graph(
        nodes,
        "words",
        [
            helper.make_tensor_value_info("input_ids", ids, ["batch", "length"]),
            helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "length"]),
        ],
        [helper.make_tensor_value_info("last_hidden_state", states, ["batch", "length", 32])],
        [tensor],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder / "model.onnx"


def test_a_sound_onnx_file(folder: Path) -> None:
    make_onnx(folder, location="words.bin")
    with Embedder(str(folder), onnx_file="model.onnx") as embedder:
        assert embedder.embed(["one text"]).shape == (1, 24)


def test_an_onnx_file_hides_no_refusal(folder: Path) -> None:
    """It may have been made before the config said so; who asks for it gets it."""
    make_onnx(folder)
    in_json("config.json", is_causal=True)(folder)
    message = refusal(folder, backend="auto")
    assert "is_causal true is not supported" in message
    assert "depend on what else is in the batch" in message
    assert "--onnx-file model.onnx takes it all the same" in message
    with Embedder(str(folder), onnx_file="model.onnx") as embedder:
        assert embedder.embed(["one text"]).shape == (1, 24)


@pytest.mark.parametrize("damage", ["empty", "cut", "half", "text", "bits"])
def test_a_damaged_onnx_file(damage: str, folder: Path) -> None:
    file = make_onnx(folder)
    content = file.read_bytes()
    file.write_bytes(
        {
            "empty": b"",
            "cut": content[:-1],
            "half": content[: len(content) // 2],
            "text": b"version https://git-lfs.github.com/spec/v1\n",
            "bits": bytes(byte ^ 0x55 for byte in content),
        }[damage]
    )
    assert "model.onnx" in refusal(folder, onnx_file="model.onnx", backend="auto")


@pytest.mark.parametrize(
    "location", ["../outside.bin", "/etc/passwd", "link.bin", "sub/../../outside.bin", "absent.bin"]
)
def test_tensors_of_an_onnx_file_outside_the_folder(location: str, folder: Path) -> None:
    make_onnx(folder, location=location)
    (folder / "words.bin").rename(folder.parent / "outside.bin")
    (folder / "link.bin").symlink_to("../outside.bin")
    message = refusal(folder, onnx_file="model.onnx", backend="auto")
    assert location in message or "xternal" in message


def test_tensors_of_an_onnx_file_that_are_cut(folder: Path) -> None:
    make_onnx(folder, location="words.bin")
    with (folder / "words.bin").open("r+b") as file:
        file.truncate(1000)
    refusal(folder, onnx_file="model.onnx", backend="auto")


@pytest.mark.parametrize(
    ("types", "part"),
    [
        ({"states": TensorProto.FLOAT16}, "last_hidden_state is a tensor(float16)"),
        ({"ids": TensorProto.INT32}, "input_ids is a tensor(int32)"),
    ],
    ids=["states", "ids"],
)
def test_an_onnx_file_of_other_types(types: dict[str, int], part: str, folder: Path) -> None:
    """Told at the start, rather than to every request."""
    make_onnx(folder, **types)
    assert part in refusal(folder, onnx_file="model.onnx", backend="auto")


# ------------------------------------------------------------------------------ as a user sees it


def cut_weights(folder: Path) -> None:
    with (folder / WEIGHTS).open("r+b") as file:
        file.truncate(5000)


def only_a_pickle(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def own_module(folder: Path) -> None:
    write(folder / "modules.json", [{"type": "custom.Transformer", "path": ""}])


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        pytest.param(cut_weights, (f"model/{WEIGHTS} is damaged",), id="cut"),
        pytest.param(only_a_pickle, ("pytorch_model.bin", "never read"), id="pickle"),
        pytest.param(own_module, ("modules.json", "never run"), id="code"),
        pytest.param(
            lambda folder: (folder / "config.json").write_text("[]"),
            ("config.json does not hold a JSON object",),
            id="no-object",
        ),
        pytest.param(
            lambda folder: (folder / "tokenizer.json").write_text("{}"),
            ("tokenizer.json can't be read as a tokenizer",),
            id="no-tokenizer",
        ),
        pytest.param(
            in_json("config.json", intermediate_size=65),
            ("intermediate.dense.weight", "config.json gives [65, 32]"),
            id="config",
        ),
    ],
)
@pytest.mark.parametrize("command", ["serve", "info"])
def test_one_line_and_exit_code_1(
    command: str, change: Change, parts: tuple[str, ...], folder: Path
) -> None:
    change(folder)
    if command == "serve":
        done = run_cli("serve", "--port", "0", "--backend", "onnx", "--model", str(folder))
    else:
        done = run_cli("models", "info", str(folder), "--backend", "onnx")
    message = sentence(done)
    for part in parts:
        assert part in message


def test_a_swapped_file_is_named_by_its_digest(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "of").mkdir()
    folder.rename(tmp_path / "of" / "all-MiniLM-L6-v2")
    with pytest.raises(ModelUnavailable, match=r"model\.safetensors is not the file that"):
        Embedder("all-MiniLM-L6-v2", load_models_from=tmp_path / "of")
