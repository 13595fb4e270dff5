# SPDX-License-Identifier: MIT OR Apache-2.0
"""A model with one key or one tensor changed gives sentence-transformers' vectors or is refused.

Every key that the installed transformers reads of a family's config.json, and every tensor of its
checkpoint, is changed one at a time. None may be ignored where it counts.
"""

from __future__ import annotations

import ast
import json
import logging
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import transformers
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from tiny_models import FAMILIES, TinyModel, load_reference

from embedding_server import Embedder
from embedding_server.backends.architectures import ARCHITECTURES, unknown_keys
from embedding_server.errors import ModelNotSupported

Vectors = NDArray[np.float32]
Change = Callable[[Path], object]

KINDS = {family: family.replace("xlm_roberta", "xlm-roberta") for family in FAMILIES}
TRANSFORMERS = [family for family in FAMILIES if family != "static"]
BACKENDS = ("onnx", "torch")
TEXTS = [
    "one",
    "a question of some length about a river, a train and the city",
    *tiny_models.texts(3, seed=3, max_words=25),
]
WEIGHTS = "model.safetensors"


def make(family: str, folder: Path) -> TinyModel:
    """One layer is enough, but where layers differ."""
    options: dict[str, Any] = {"layers": 2 if family == "modernbert" else 1}
    if family == "nomic_bert":  # whose older fields transformers doesn't read
        options["layout"] = "v6"
    if family == "static":
        options = {}
    if family == "bert":
        options["dense"] = (24, "tanh")
    return FAMILIES[family](folder, **options)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("mutations")
    return {family: make(family, root / family).folder for family in FAMILIES}


# ------------------------------------------------------------------------------- what is the truth


def embedded(folder: Path, backend: str) -> Vectors | str:
    """The vectors, or the reason of the refusal."""
    try:
        with Embedder(str(folder), backend=backend, threads=1) as embedder:
            vectors: Vectors = embedder.embed(TEXTS)
            return vectors
    except ModelNotSupported as refusal:
        return str(refusal)


def truth(folder: Path) -> list[Vectors]:
    """What sentence-transformers gives, loaded twice, and of texts together and alone.

    Empty if it fails: then there is no truth to miss.
    """
    found = []
    for _ in range(2):
        try:
            reference = load_reference(TinyModel(folder, folder)).float()
            together = reference.encode(TEXTS, normalize_embeddings=True)
            alone = [reference.encode(text, normalize_embeddings=True) for text in TEXTS]
        except Exception:
            return []
        found += [together, np.stack(alone)]
    return found


def outcomes(folder: Path) -> dict[str, str]:
    """``equal``, ``refused``, ``reference fails`` or ``wrong by …``, for each backend."""
    answers = {backend: embedded(folder, backend) for backend in BACKENDS}
    results = dict.fromkeys(BACKENDS, "refused")
    served = {name: answer for name, answer in answers.items() if not isinstance(answer, str)}
    expected = truth(folder) if served else []
    for name, vectors in served.items():
        errors = [float(np.abs(vectors - other).max()) for other in expected]
        if not errors:
            results[name] = "reference fails"
        else:
            results[name] = "equal" if max(errors) < 1e-5 else f"wrong by {max(errors):.1e}"
    return results


def check(
    model: Path,
    mutations: Iterator[tuple[str, Change]],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> Counter[str]:
    """Apply each change to a copy of ``model``; none may be served wrong."""
    for logger in ("transformers", "sentence_transformers"):
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    wrong = []
    counts: Counter[str] = Counter()
    for name, change in mutations:
        shutil.copytree(model, folder)
        change(folder)
        for backend, outcome in outcomes(folder).items():
            counts[outcome] += 1
            if outcome.startswith("wrong"):
                wrong.append(f"{name} on {backend}: {outcome}")
        counts["mutations"] += 1
        shutil.rmtree(folder)
    with capsys.disabled():
        # On stderr, which also comes through from a process of pytest-xdist.
        print(f"\n{model.name}: {dict(counts)}", file=sys.stderr)
    assert not wrong, "\n".join(wrong)
    return counts


# ------------------------------------------------------------------------------------ config.json

# Read by transformers of any config, whatever its class declares.
ANYWHERE: Mapping[str, list[Any]] = {
    "attention_chunk_size": [2],
    "attn_implementation": ["eager"],
    "auto_map": [{"AutoModel": "own.Model"}, {"AutoConfig": "own.Config"}],
    "embedding_size": [16],
    "experts_implementation": ["eager"],
    "fusion_config": [{"patch_embeddings": True}],
    "gradient_checkpointing": [True],
    "is_causal": [True, False],
    "num_labels": [3],
    "partial_rotary_factor": [0.5],
    "per_layer_config": [{"0": {"intermediate_size": 32}}, {"0": {"skip": ["attention"]}}],
    "pruned_heads": [{"0": [0]}],
    "quantization_config": [{"quant_method": "bitsandbytes", "load_in_8bit": True}],
    "rope_parameters": [{"rope_type": "default", "rope_theta": 777.0}],
    "rope_scaling": [
        {"type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1000.0},
    ],
    "rope_theta": [555.0],
    "sliding_window": [2],
    "some_key_of_tomorrow": [7],
    "tie_last_hidden_states": [False],
    "transformers_weights": ["other.safetensors"],
    "use_bidirectional_attention": [True],
}

OTHER_VALUES: Mapping[str, list[Any]] = {
    "activation": ["relu", "gelu_10"],
    "hidden_act": ["relu", "gelu_10", "gelu"],
    "hidden_activation": ["relu", "gelu_10"],
    "classifier_activation": ["relu"],
    "dtype": ["float16"],
    "torch_dtype": ["float16"],
    "architectures": [["BertForMaskedLM"], ["Qwen3ForCausalLM"], None],
    "classifier_pooling": ["cls", "mean"],
    "global_attn_every_n_layers": [1, 2],
    "id2label": [{"0": "a", "1": "b", "2": "c"}],
    "label2id": [{"a": 0, "b": 1, "c": 2}],
    "layer_types": [
        ["sliding_attention"],
        ["full_attention"],
        ["full_attention", "full_attention"],
        ["sliding_attention", "sliding_attention"],
    ],
    "model_type": ["bert", "roberta"],  # of others the defaults take gigabytes
    "position_embedding_type": ["relative_key", "relative_key_query"],
    "problem_type": ["regression"],
    "transformers_version": ["4.1.0"],
    "_name_or_path": ["other"],
}


def other_values(key: str, value: Any) -> list[Any]:
    """Valid values of a key that are not its own."""
    if key in OTHER_VALUES or key in ANYWHERE:
        values = OTHER_VALUES.get(key, ANYWHERE.get(key, []))
    elif isinstance(value, bool):
        values = [not value]
    elif isinstance(value, int):
        values = [value + 1, max(1, value // 2), 2 * value]
    elif isinstance(value, float):
        values = [value * 10 or 0.3]
    elif value is None:
        values = [0.3] if key.endswith("dropout") else [5]
    else:
        raise AssertionError(f"no other value of {key} {value!r} is known: add one")
    return [other for other in values if other != value]


def declared(family: str) -> dict[str, Any]:
    """Every key that the family's config class has, with its default."""
    config: dict[str, Any] = transformers.AutoConfig.for_model(KINDS[family]).to_dict()
    return config


def aliases(family: str) -> Mapping[str, str]:
    """Other names of keys, which transformers takes, too."""
    names: Mapping[str, str] = transformers.AutoConfig.for_model(KINDS[family]).attribute_map
    return names


def with_key(key: str, value: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
        if key == "transformers_weights":
            tensors = load_file(folder / WEIGHTS)
            save_file({name: 2 * tensor for name, tensor in tensors.items()}, folder / value)

    return change


def config_mutations(family: str, folder: Path) -> Iterator[tuple[str, Change]]:
    own = json.loads((folder / "config.json").read_text())
    values = {**dict.fromkeys(ANYWHERE), **declared(family), **own}
    values |= {alias: values[key] for alias, key in aliases(family).items()}
    for key, value_now in values.items():
        for value in other_values(key, value_now):
            yield f"{key}={value!r}", with_key(key, value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", TRANSFORMERS)
def test_every_key_of_the_config(
    family: str, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = models[family]
    counts = check(model, config_mutations(family, model), tmp_path / "mutant", capsys)
    assert counts["mutations"] > 60
    assert counts["equal"] > 50, "a model must not be refused for what changes nothing"


# What a config has beside keys: its methods, and what it keeps of how it is run.
NO_KEYS = {
    *("get_text_config", "to_dict", "sub_configs", "save_pretrained", "name_or_path"),
    *("nested_rope_parameter_keys", "is_heterogeneous", "per_layer_config"),
}


def read_in_code(family: str) -> set[str]:
    """The keys that the modelling code of a family reads, and the masks and rotary embeddings."""
    root = Path(transformers.__file__).parent
    files = [root / "models" / family / f"modeling_{family}.py", root / "masking_utils.py"]
    found = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            match node:
                case ast.Attribute(value=ast.Name(id="config"), attr=name):
                    found.add(name)
                case ast.Attribute(value=ast.Attribute(attr="config"), attr=name):
                    found.add(name)
                case ast.Call(
                    func=ast.Name(id="getattr"),
                    args=[ast.Name(id="config"), ast.Constant(value=str(name)), *_],
                ):
                    found.add(name)
    return {name for name in found if not name.startswith("_")} - NO_KEYS


# Keys that transformers reads and that are refused: windows of masks that no model here has, and
# a width that says only that the states' needs no multiple of the heads.
REFUSED = {"attention_chunk_size", "sliding_window", "embedding_size"}


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_every_key_that_transformers_reads_is_known(family: str, models: dict[str, Path]) -> None:
    """An upgrade of transformers that reads another key fails here, and says which."""
    own = json.loads((models[family] / "config.json").read_text())
    keys = {*declared(family), *read_in_code(family)} - REFUSED - set(aliases(family))
    config = {**dict.fromkeys(keys), **own}
    for key in ARCHITECTURES[KINDS[family]].allowed:
        config.setdefault(key, ARCHITECTURES[KINDS[family]].allowed[key][0])
    assert unknown_keys(config) == []


# ------------------------------------------------------------------------------------ the tensors


def in_weights(
    file: str, edit: Callable[[dict[str, NDArray[Any]], str], None], tensor: str
) -> Change:
    def change(folder: Path) -> None:
        tensors = load_file(folder / file)
        edit(tensors, tensor)
        save_file(tensors, folder / file, metadata={"format": "pt"})

    return change


def drop(tensors: dict[str, NDArray[Any]], name: str) -> None:
    del tensors[name]


def rename(tensors: dict[str, NDArray[Any]], name: str) -> None:
    tensors[f"{name}_"] = tensors.pop(name)


def duplicate(tensors: dict[str, NDArray[Any]], name: str) -> None:
    tensors[f"other.{name}"] = tensors[name].copy()


def cut(tensors: dict[str, NDArray[Any]], name: str) -> None:
    tensors[name] = np.ascontiguousarray(tensors[name][..., : max(1, tensors[name].shape[-1] // 2)])


EDITS = {"drop": drop, "rename": rename, "duplicate": duplicate, "cut": cut}


def tensor_mutations(model: Path) -> Iterator[tuple[str, Change]]:
    for path in sorted(model.rglob(WEIGHTS)):
        file = path.relative_to(model).as_posix()
        for tensor in sorted(load_file(path)):
            for what, edit in EDITS.items():
                yield f"{what} {file}:{tensor}", in_weights(file, edit, tensor)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor(
    family: str, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = models[family]
    counts = check(model, tensor_mutations(model), tmp_path / "mutant", capsys)
    if family == "static":  # whose table may have any width
        assert counts == {"mutations": 4, "refused": 6, "equal": 2}
    else:  # there are some heads and buffers, which may be there or not
        assert counts["refused"] > 0.8 * 2 * counts["mutations"]
