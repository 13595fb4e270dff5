"""Reads a sentence-transformers folder: what is to be computed, how long, with which prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedding_server.backends.base import Module, Pipeline
from embedding_server.errors import ModelNotSupported

__all__ = ["Layout", "read_layout"]

_TRANSFORMER_CONFIGS = (
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_camembert_config.json",
    "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
)
"""Where sentence-transformers looks for its own settings of the transformer, in its order."""

_TRANSFORMER_KEYS = {"max_seq_length", "do_lower_case"}
_TRANSFORMER_VALUES: Mapping[str, Any] = {
    "transformer_task": "feature-extraction",
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
    "module_output_name": "token_embeddings",
    "unpad_inputs": False,
}
"""What sentence-transformers 6 also writes; other values ask for something else than text."""
_MODEL_KEYS = {
    *("__version__", "model_type", "prompts", "default_prompt_name", "similarity_fn_name"),
    "truncate_dim",
}
_UNBOUNDED = 10**9
"""transformers writes a length like 1e30 for a tokenizer without a limit."""


@dataclass(frozen=True, slots=True)
class Layout:
    """A model's folder, read."""

    pipeline: Pipeline
    tokenizer_file: Path
    max_tokens: int
    lowercase: bool
    prompts: Mapping[str, str]
    default_prompt: str | None


def read_layout(folder: Path) -> Layout:
    """Read ``folder``.

    Raises ModelNotSupported, naming file and key, for what no backend can do exactly.
    """
    transformer, modules = _read_modules(folder)
    config = _read_object(transformer / "config.json")
    tokenizer_file = transformer / "tokenizer.json"
    if not tokenizer_file.is_file():
        raise ModelNotSupported(
            f"{transformer} has no tokenizer.json. Save it with a fast tokenizer: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
        )
    _check_weights(transformer)
    own = _read_transformer_config(transformer)
    prompts, default_prompt = _read_prompts(folder)
    return Layout(
        pipeline=Pipeline(folder, "Transformer", transformer, config, modules),
        tokenizer_file=tokenizer_file,
        max_tokens=_max_tokens(transformer, own, config),
        lowercase=bool(own.get("do_lower_case")),
        prompts=prompts,
        default_prompt=default_prompt,
    )


def _read_modules(folder: Path) -> tuple[Path, tuple[Module, ...]]:
    """The transformer's folder and the modules after it."""
    path = folder / "modules.json"
    if not path.is_file():
        # A plain transformers folder: sentence-transformers adds mean pooling to it.
        return folder, (Module("Pooling", folder, {"pooling_mode": "mean"}),)
    entries = _read_json(path)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ModelNotSupported(f"{path} is not a list of modules.")
    found = []
    for entry in entries:
        kind = str(entry.get("type", "")).rpartition(".")[2]
        where = _inside(folder, str(entry.get("path", "")), path)
        has_config = where != folder and (where / "config.json").is_file()
        found.append(Module(kind, where, _read_object(where / "config.json") if has_config else {}))
    if not found or found[0].kind != "Transformer":
        kind = found[0].kind if found else "nothing"
        raise ModelNotSupported(f"{path} begins with {kind}; only a Transformer can be run.")
    return found[0].folder, tuple(found[1:])


def _inside(folder: Path, relative: str, source: Path) -> Path:
    """``folder / relative``, refused if it leads out of the folder."""
    path = folder / relative
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ModelNotSupported(
            f"{source} names the path {relative!r}, outside the model's folder."
        )
    return path


def _check_weights(transformer: Path) -> None:
    names = ("model.safetensors", "model.safetensors.index.json")
    if any((transformer / name).is_file() for name in names):
        return
    if any(transformer.glob("**/*.onnx")):
        return
    if (transformer / "pytorch_model.bin").exists():
        raise ModelNotSupported(
            f"{transformer} has its weights only as pytorch_model.bin, a pickle, which can run "
            "code and is never read. Save it as safetensors: "
            "AutoModel.from_pretrained(folder).save_pretrained(folder)."
        )
    raise ModelNotSupported(f"{transformer} has no model.safetensors.")


def _read_transformer_config(transformer: Path) -> Mapping[str, Any]:
    for name in _TRANSFORMER_CONFIGS:
        path = transformer / name
        if path.is_file():
            values = _read_object(path)
            unknown = sorted(
                key
                for key, value in values.items()
                if key not in _TRANSFORMER_KEYS and value and value != _TRANSFORMER_VALUES.get(key)
            )
            if unknown:
                raise ModelNotSupported(
                    f"{path} sets {', '.join(unknown)} to what is not computed here."
                )
            return values
    return {}


def _max_tokens(transformer: Path, own: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    """sentence-transformers' limit, never past the positions that the model has."""
    tokenizer_config = transformer / "tokenizer_config.json"
    limits = [config.get("max_position_embeddings"), config.get("n_positions")]
    if own.get("max_seq_length") is not None:
        limits.append(own["max_seq_length"])
    elif tokenizer_config.is_file():
        limits.append(_read_object(tokenizer_config).get("model_max_length"))
    numbers = [int(limit) for limit in limits if limit is not None and 0 < limit < _UNBOUNDED]
    if not numbers:
        raise ModelNotSupported(
            f"{transformer} doesn't say how many tokens the model takes: set max_seq_length in "
            "sentence_bert_config.json."
        )
    return min(numbers)


def _read_prompts(folder: Path) -> tuple[Mapping[str, str], str | None]:
    path = folder / "config_sentence_transformers.json"
    if not path.is_file():
        return {}, None
    values = _read_object(path)
    unknown = sorted(key for key, value in values.items() if key not in _MODEL_KEYS and value)
    if unknown:
        raise ModelNotSupported(f"{path} sets {', '.join(unknown)}, not known here.")
    if values.get("truncate_dim") is not None:
        raise ModelNotSupported(
            f"{path} sets truncate_dim. Remove it there and send 'dimensions' with each request."
        )
    prompts = {str(k): str(v) for k, v in (values.get("prompts") or {}).items() if v is not None}
    default = values.get("default_prompt_name")
    if default is not None and default not in prompts:
        raise ModelNotSupported(f"{path} names the default prompt {default!r}, which it lacks.")
    return prompts, default


def _read_object(path: Path) -> dict[str, Any]:
    value = _read_json(path)
    if not isinstance(value, dict):
        raise ModelNotSupported(f"{path} does not hold a JSON object.")
    return value


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelNotSupported(f"{path} is missing.") from None
    except (ValueError, OSError) as error:
        raise ModelNotSupported(f"{path} can't be read: {error}") from None
