# SPDX-License-Identifier: MIT OR Apache-2.0
"""Reads a sentence-transformers folder: its modules, its longest input and its prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedding_server.backends.base import Module, Pipeline
from embedding_server.errors import ModelNotSupported
from embedding_server.models.files import read_json, read_object

__all__ = ["Layout", "read_layout"]

_FAMILIES = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
"""sentence-transformers reads the first of sentence_<family>_config.json, in this order."""

_TRANSFORMER_KEYS = {"max_seq_length", "do_lower_case", "unpad_inputs"}
_TRANSFORMER_VALUES: Mapping[str, Any] = {
    "transformer_task": "feature-extraction",
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
    "module_output_name": "token_embeddings",
}
"""Values that sentence-transformers 6 also writes; others are for input other than text."""
_MODEL_KEYS = {
    *("__version__", "model_type", "prompts", "default_prompt_name", "similarity_fn_name"),
    "truncate_dim",
}
_ROUTERS = ("Router", "Asym")
_UNBOUNDED = 10**9
"""transformers writes a length like 1e30 for a tokenizer without a limit."""
_DEFAULT_POSITIONS: Mapping[str, int] = {
    **dict.fromkeys(("bert", "distilbert", "electra", "mpnet", "roberta", "xlm-roberta"), 512),
    **dict.fromkeys(("qwen2", "qwen3"), 32768),
    "modernbert": 8192,
    "nomic_bert": 2048,
}
"""``max_position_embeddings`` if config.json has none: the defaults of transformers' classes."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The settings in a model's folder."""

    pipeline: Pipeline
    max_tokens: int | None
    """The longest input that isn't cut; None for a static model, whose tokenizer has it."""
    lowercase: bool
    exclude_prompt: bool
    """Whether pooling excludes the prompt's tokens."""
    prompts: Mapping[str, str]
    default_prompt: str | None


def read_layout(folder: Path) -> Layout:
    """Read ``folder``.

    Raises ModelNotSupported, naming file and key, for settings that no backend computes exactly.
    """
    has_modules = (folder / "modules.json").is_file()
    first, *modules = _read_modules(folder) if has_modules else _default_modules(folder)
    if first.kind not in ("Transformer", "StaticEmbedding"):
        raise ModelNotSupported(
            f"{folder / 'modules.json'} begins with {first.kind}; only a Transformer or a "
            "StaticEmbedding can be run."
        )
    static = first.kind == "StaticEmbedding"
    home = first.folder
    _check_weights(home)
    config = {} if static else read_object(home / "config.json")
    # sentence-transformers reads its own settings only if there is a modules.json.
    own = _read_transformer_config(home) if has_modules and not static else {}
    prompts, default_prompt = _read_prompts(folder) if has_modules else ({}, None)
    poolings = [module for module in modules if module.kind == "Pooling"]
    return Layout(
        pipeline=Pipeline(folder, first.kind, home, config, tuple(modules)),
        max_tokens=None if static else _max_tokens(home, own, config),
        lowercase=bool(own.get("do_lower_case")),
        exclude_prompt=any(not module.config.get("include_prompt", True) for module in poolings),
        prompts=prompts,
        default_prompt=default_prompt,
    )


def _read_modules(folder: Path) -> list[Module]:
    path = folder / "modules.json"
    entries = read_json(path)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ModelNotSupported(f"{path} is not a list of modules.")
    if not entries:
        raise ModelNotSupported(f"{path} names no module.")
    found = []
    for entry in entries:
        type_name = str(entry.get("type", ""))
        if not type_name.startswith("sentence_transformers."):
            # Loading it would run code of the model or of another package.
            raise ModelNotSupported(
                f"{path} names the class {type_name!r}; only those of sentence_transformers are "
                "known, and a model's own code is never run."
            )
        kind = type_name.rpartition(".")[2]
        if kind in _ROUTERS:
            raise ModelNotSupported(
                f"{path} names a {kind}, which computes queries and documents in different ways: "
                "that is not supported."
            )
        where = _inside(folder, str(entry.get("path", "")), path)
        has_config = where != folder and (where / "config.json").is_file()
        if kind in ("Pooling", "Dense") and not has_config:
            raise ModelNotSupported(f"{where / 'config.json'} is missing: the copy is incomplete.")
        found.append(Module(kind, where, read_object(where / "config.json") if has_config else {}))
    names = [entry.get("name") for entry in entries]
    if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        # Of two modules with one name, sentence-transformers runs only the later.
        raise ModelNotSupported(f"{path} must give each module a name that no other has.")
    return found


def _default_modules(folder: Path) -> list[Module]:
    """The modules that sentence-transformers adds to a plain transformers folder."""
    path = folder / "tokenizer_config.json"
    template = path.is_file() and read_object(path).get("chat_template")
    files = (folder / "chat_template.jinja", *folder.glob("additional_chat_templates/*.jinja"))
    if template or any(file.is_file() for file in files):
        raise ModelNotSupported(
            f"{folder} has a chat template and no modules.json: sentence-transformers would put "
            "every text into the template. A modules.json keeps them as they are."
        )
    config = read_object(folder / "config.json")
    if config.get("model_type") == "model2vec":
        raise ModelNotSupported(
            f"{folder} has a static model of model2vec and no modules.json, without which "
            "sentence-transformers can't load it either. Save it again to write one: "
            "StaticModel.from_pretrained(folder).save_pretrained(folder)."
        )
    names = config.get("architectures") or [""]
    if not isinstance(names, list):
        raise ModelNotSupported(f"{folder / 'config.json'}: architectures can't be {names!r}.")
    causal = str(names[0]).endswith("ForCausalLM") and config.get("is_causal", True)
    mode = "lasttoken" if causal else "mean"
    return [Module("Transformer", folder, {}), Module("Pooling", folder, {"pooling_mode": mode})]


def _inside(folder: Path, relative: str, source: Path) -> Path:
    """``folder / relative``, refused if it leads out of the folder."""
    path = folder / relative
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
        path.exists()
    except (OSError, ValueError):  # too long, or with a NUL
        raise ModelNotSupported(
            f"{source} names the path {relative[:100]!r}, which is not valid."
        ) from None
    if not inside:
        raise ModelNotSupported(
            f"{source} names the path {relative!r}, outside the model's folder."
        )
    return path


def _check_weights(transformer: Path) -> None:
    if (transformer / "adapter_config.json").is_file():
        raise ModelNotSupported(
            f"{transformer / 'adapter_config.json'}: an adapter changes another model's weights. "
            "Merge the two (merge_and_unload of peft) and save the result."
        )
    names = ("model.safetensors", "model.safetensors.index.json")
    if any((transformer / name).is_file() for name in names) or any(transformer.glob("**/*.onnx")):
        return
    if (transformer / "pytorch_model.bin").exists():
        raise ModelNotSupported(
            f"{transformer} has its weights only as pytorch_model.bin, a pickle, which can run "
            "code and is never read. Save it as safetensors: "
            "AutoModel.from_pretrained(folder).save_pretrained(folder)."
        )
    raise ModelNotSupported(f"{transformer} has no model.safetensors.")


def _read_transformer_config(transformer: Path) -> Mapping[str, Any]:
    for family in _FAMILIES:
        path = transformer / f"sentence_{family}_config.json"
        if path.is_file():
            values = read_object(path)
            unknown = sorted(
                key
                for key, value in values.items()
                if key not in _TRANSFORMER_KEYS and value and value != _TRANSFORMER_VALUES.get(key)
            )
            if unknown:
                raise ModelNotSupported(
                    f"{path} sets {', '.join(unknown)} to values that are not supported."
                )
            return values
    return {}


def _max_tokens(transformer: Path, own: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    """sentence-transformers' limit, but at most the rows of the model's table of positions.

    sentence-transformers exceeds them if ``max_seq_length`` does, and in RoBERTa's family, whose
    table begins with unused rows; torch then fails on any text of that length.
    """
    positions = _positions(config)
    limits = {"max_seq_length": own.get("max_seq_length")}
    if limits["max_seq_length"] is None:
        path = transformer / "tokenizer_config.json"
        tokenizer = read_object(path) if path.is_file() else {}
        length = tokenizer.get("model_max_length", tokenizer.get("max_len"))
        limits = {"model_max_length": length, "max_position_embeddings": positions}
    limits["usable positions"] = _usable_positions(config, positions)
    for name, limit in limits.items():
        number = isinstance(limit, int | float) and not isinstance(limit, bool)
        if limit is not None and not (number and limit >= 1):
            raise ModelNotSupported(f"{transformer}: {name} can't be {limit!r}.")
    finite = [int(limit) for limit in limits.values() if limit is not None and limit < _UNBOUNDED]
    if not finite:
        raise ModelNotSupported(
            f"{transformer} doesn't say how many tokens the model takes: set max_seq_length in "
            "sentence_bert_config.json."
        )
    return min(finite)


def _positions(config: Mapping[str, Any]) -> Any:
    if "max_position_embeddings" in config:
        return config["max_position_embeddings"]
    kind = str(config.get("model_type"))
    if kind == "nomic_bert" and "n_positions" in config:  # as in Nomic's own repositories
        return config["n_positions"]
    return _DEFAULT_POSITIONS.get(kind)


def _usable_positions(config: Mapping[str, Any], positions: Any) -> int | None:
    """The number of tokens that the table of positions has rows for; None without a table."""
    if not isinstance(positions, int):
        return None
    match config.get("model_type"):
        case "bert" | "distilbert" | "electra":
            return positions
        case "roberta" | "xlm-roberta":
            padding = config.get("pad_token_id", 1)
            return positions - (padding if isinstance(padding, int) else 0) - 1
        case "mpnet":  # as RoBERTa with the padding index 1, whatever the config says
            return positions - 2
        case _:
            return None


def _read_prompts(folder: Path) -> tuple[Mapping[str, str], str | None]:
    path = folder / "config_sentence_transformers.json"
    if not path.is_file():
        return {}, None
    values = read_object(path)
    unknown = sorted(key for key, value in values.items() if key not in _MODEL_KEYS and value)
    if unknown:
        raise ModelNotSupported(f"{path} sets {', '.join(unknown)}, which are not supported.")
    if values.get("model_type", "SentenceTransformer") != "SentenceTransformer":
        raise ModelNotSupported(f"{path}: a {values['model_type']} gives no sentence embeddings.")
    if values.get("truncate_dim") is not None:
        raise ModelNotSupported(
            f"{path} sets truncate_dim. Remove it there and send 'dimensions' with each request."
        )
    given = values.get("prompts") or {}
    if not isinstance(given, dict) or not all(isinstance(v, str | None) for v in given.values()):
        raise ModelNotSupported(f"{path}: prompts must be texts by their names.")
    prompts = {name: text for name, text in given.items() if text is not None}
    default = values.get("default_prompt_name")
    if default is not None and (not isinstance(default, str) or default not in prompts):
        raise ModelNotSupported(
            f"{path} names the default prompt {default!r}, but has none of that name."
        )
    return prompts, default
