"""The table of architectures: ``config.json`` of a family to the one form that is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from embedding_server.backends.weights import Weights
from embedding_server.errors import ModelNotSupported

__all__ = ["ARCHITECTURES", "Architecture", "LayerNames", "architecture_of"]

Config = Mapping[str, Any]
Activation = Literal["gelu", "gelu_tanh", "relu", "silu", "quick_gelu"]

_ACTIVATIONS: Mapping[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "quick_gelu": "quick_gelu",
}
"""transformers' names (``ACT2FN``) of the functions that are computed here."""


@dataclass(frozen=True, slots=True)
class LayerNames:
    """A layer's tensors, relative to the layer, without ``.weight`` and ``.bias``."""

    query: str
    key: str
    value: str
    attention_output: str
    attention_norm: str
    mlp_up: str
    mlp_down: str
    mlp_norm: str


@dataclass(frozen=True, slots=True)
class Architecture:
    """An encoder, as the graph builder needs it."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocab_size: int
    positions: int
    """Rows of the table of learned positions."""
    types: int
    """Rows of the table of token types, of which the first is used; 0 if there is none."""
    activation: Activation
    norm_eps: float
    embeddings: str
    """Prefix of the embeddings' tensors."""
    layer: str
    """Prefix of a layer's tensors, with ``{}`` for its number."""
    names: LayerNames
    prefixes: tuple[str, ...]
    """What some checkpoints put before every name."""

    def open_weights(self, weights: Weights) -> Weights:
        """``weights`` with the checkpoint's prefix taken off."""
        known = f"{self.embeddings}word_embeddings.weight"
        return weights.without_prefix(*self.prefixes, known=known)


def _bert(config: Config) -> Architecture:
    _refuse_unless(config, position_embedding_type=("absolute",), is_decoder=(False,))
    return Architecture(
        hidden=_positive(config, "hidden_size"),
        layers=_positive(config, "num_hidden_layers"),
        heads=_positive(config, "num_attention_heads"),
        intermediate=_positive(config, "intermediate_size"),
        vocab_size=_positive(config, "vocab_size"),
        positions=_positive(config, "max_position_embeddings"),
        types=int(config.get("type_vocab_size", 2)),
        activation=_activation(config, "hidden_act"),
        norm_eps=float(config.get("layer_norm_eps", 1e-12)),
        embeddings="embeddings.",
        layer="encoder.layer.{}.",
        names=LayerNames(
            query="attention.self.query",
            key="attention.self.key",
            value="attention.self.value",
            attention_output="attention.output.dense",
            attention_norm="attention.output.LayerNorm",
            mlp_up="intermediate.dense",
            mlp_down="output.dense",
            mlp_norm="output.LayerNorm",
        ),
        prefixes=("bert.",),
    )


ARCHITECTURES: Mapping[str, Callable[[Config], Architecture]] = {"bert": _bert}
"""``model_type`` -> what reads its config."""


def architecture_of(config: Config) -> Architecture:
    """The architecture of a ``config.json``.

    Raises ModelNotSupported for a family that isn't built, and for a value that would change
    the result and isn't implemented.
    """
    kind = config.get("model_type")
    read = ARCHITECTURES.get(str(kind))
    if read is None:
        raise ModelNotSupported(
            f"The architecture {kind!r} is not supported yet; there are: "
            f"{', '.join(ARCHITECTURES)}."
        )
    _refuse_unless(config, quantization_config=(None,), add_cross_attention=(False,))
    architecture = read(config)
    if architecture.hidden % architecture.heads:
        raise ModelNotSupported(
            f"config.json: hidden_size {architecture.hidden} doesn't divide into "
            f"{architecture.heads} heads."
        )
    return architecture


def _refuse_unless(config: Config, **allowed: tuple[object, ...]) -> None:
    for key, values in allowed.items():
        if key in config and config[key] not in values:
            raise ModelNotSupported(f"config.json: {key} {config[key]!r} is not supported.")


def _positive(config: Config, key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise ModelNotSupported(f"config.json: {key} must be a positive number, not {value!r}.")
    return value


def _activation(config: Config, key: str) -> Activation:
    name = config.get(key, "gelu")
    if name not in _ACTIVATIONS:
        raise ModelNotSupported(f"config.json: {key} {name!r} is not supported.")
    return _ACTIVATIONS[name]
