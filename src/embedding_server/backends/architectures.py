# SPDX-License-Identifier: MIT OR Apache-2.0
"""The table of families: each reads its ``config.json`` into the one form that is built."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from embedding_server.backends.weights import name_some
from embedding_server.errors import ModelNotSupported

__all__ = [
    "ACTIVATIONS",
    "ANY_FAMILY",
    "ARCHITECTURES",
    "Architecture",
    "Attention",
    "Family",
    "Positions",
    "Rotary",
    "Tensors",
    "architecture_of",
    "check_code",
    "keys_that_count",
    "unknown_keys",
    "unused_tensors",
]

Config = Mapping[str, Any]
Activation = Literal["gelu", "gelu_tanh", "relu", "silu", "quick_gelu"]

ACTIVATIONS: Mapping[str, Activation] = {
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

_MAX_LAYERS = 10_000
"""Each takes memory before the builder finds that its weights are missing."""

ANY_FAMILY: Mapping[str, tuple[object, ...]] = {
    "add_cross_attention": (None, False),
    "is_decoder": (None, False),
    "is_encoder_decoder": (None, False),
    "per_layer_config": (None, {}),
    "pruned_heads": (None, {}),
    "quantization_config": (None,),
    "return_dict": (None, True),
    "transformers_weights": (None,),
}
"""``Family.allowed`` of every family whose row has no other values for the key."""

_HARMLESS = frozenset(
    (
        # Read in models/: limits of length, tokenizers, the pooling that no file names.
        *("architectures", "max_position_embeddings", "model_type", "pad_token_id"),
        "tokenizer_class",
        # What the file is, and for which task it was saved.
        *("_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "language"),
        *("name", "finetuning_task", "problem_type", "id2label", "label2id", "num_labels"),
        *("_num_labels", "model_max_length", "emb_size"),
        # How it was trained.
        *("attention_dropout", "attention_probs_dropout_prob", "classifier_dropout"),
        *("hidden_dropout_prob", "gradient_checkpointing", "initializer_range", "torchscript"),
        # How it is run; everything is computed in float32.
        *("dtype", "torch_dtype", "use_bfloat16", "chunk_size_feed_forward", "use_cache"),
        *("output_past", "output_attentions", "output_hidden_states", "tie_word_embeddings"),
        *("attn_implementation", "_attn_implementation", "_attn_implementation_autoset"),
        *("pretraining_tp", "unsloth_version", "unsloth_fixed", "sentence_transformers"),
        # Ids of tokens, except the padding's, from which RoBERTa counts positions.
        *("bos_token_id", "cls_token_id", "eos_token_id", "mask_token_id", "sep_token_id"),
        *("unk_token_id", "decoder_start_token_id"),
        # Layers over the states that give no embedding.
        *("directionality", "pooler_fc_size", "pooler_num_attention_heads"),
        *("pooler_num_fc_layers", "pooler_size_per_head", "pooler_type"),
        *("summary_activation", "summary_first_dropout", "summary_proj_to_labels"),
        *("summary_type", "summary_use_proj"),
        # transformers reads it for BERT and RoBERTa alone, whose rows have it in ``allowed``.
        "position_embedding_type",
        # Generation of text, which transformers 5 keeps elsewhere.
        *("bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample"),
        *("early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty"),
        *("forced_bos_token_id", "forced_eos_token_id", "length_penalty", "max_length"),
        *("min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams"),
        *("num_return_sequences", "output_scores", "remove_invalid_values"),
        *("repetition_penalty", "return_dict_in_generate", "suppress_tokens", "temperature"),
        *("top_k", "top_p", "typical_p"),
    )
)
"""Keys of config.json that change no embedding of any family, whatever their value."""

_UNUSED_ANYWHERE = (
    *("pooler.*", "*.pooler.*", "*position_ids", "*inv_freq", "cls.*", "lm_head.*", "mlm_head.*"),
    *("classifier.*", "score.*", "qa_outputs.*", "predictions.*", "*_predictions.*"),
    "generator_lm_head.*",
)
"""``Tensors.unused`` of a family that isn't built here."""


@dataclass(frozen=True, slots=True)
class Positions:
    """A table of learned positions."""

    rows: int
    padding_idx: int | None = None
    """RoBERTa's way: positions begin after this one, and the token with this id has none."""


@dataclass(frozen=True, slots=True)
class Rotary:
    """Rotary position embedding over the two halves of a head (Su et al., 2021)."""

    theta: float
    head_dim: int
    factor: float | None = None
    """Dynamic NTK scaling of inputs over ``trained`` tokens, by the input's own length."""
    trained: int = 0


@dataclass(frozen=True, slots=True)
class Attention:
    """Which tokens of a sequence each token of one layer sees."""

    causal: bool = False
    window: int | None = None
    """How many tokens to each side are seen; None: all."""
    rotary: Rotary | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensors:
    """A checkpoint's names, without ``.weight`` and ``.bias``, a layer's relative to the layer."""

    words: str
    positions: str | None = None
    types: str | None = None
    """Token types; every token has the first."""
    embedding_norm: str | None = None
    layer: str
    """Prefix of a layer's tensors, with ``{}`` for its number."""
    qkv: tuple[str, ...]
    """Queries, keys and values: three tensors, or one with all."""
    attention_output: str
    attention_norm: str
    head_norms: tuple[str, str] | None = None
    """RMS norms over each head of queries and keys."""
    relative_bias: str | None = None
    """Bias of every layer's attention by distance in buckets (MPNet's, after T5)."""
    mlp_in: tuple[str, ...]
    """``(up,)``, ``(gate, up)``, or one tensor with both where the architecture is gated."""
    mlp_out: str
    mlp_norm: str
    final_norm: str | None = None
    prefixes: tuple[str, ...]
    """Some checkpoints put one of these before every name."""
    unused: tuple[str, ...]
    """Tensors that give no embedding, as patterns of fnmatch: heads of other tasks, buffers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A transformer, as the graph builder needs it."""

    tensors: Tensors
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab_size: int
    type_rows: int = 0
    """Rows of the table of token types."""
    positions: Positions | None = None
    attention: tuple[Attention, ...]
    """One for each layer."""
    activation: Activation
    gated: bool = False
    """The activation of a gate multiplies the up projection."""
    pre_norm: bool = False
    """Norms stand before the sublayers and not after their sums."""
    first_attention_norm: bool = True
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: float
    norm_bias: bool = True
    attention_bias: bool = True
    mlp_bias: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One row of the table of architectures.

    A key of config.json is refused, as it may change the vectors, unless ``read`` reads it or it
    stands in ``allowed`` or among the harmless keys.
    """

    examples: str
    """Well-known models."""
    read: Callable[[Config, Tensors], Architecture]
    tensors: Tensors
    allowed: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    """Keys of config.json that change the result, and the values that are computed."""
    harmless: tuple[str, ...] = ()
    """Keys of config.json that change no embedding of this family, whatever their value."""


def architecture_of(config: Config, *, unknown_too: bool = False) -> Architecture:
    """The architecture of a ``config.json``.

    Raises ModelNotSupported for a family that isn't built, for a value that would change the
    result and isn't implemented, and, unless ``unknown_too``, for a key that isn't known.
    """
    reading = _Reading(config)
    architecture = _read(reading)
    given = [key for key in _unread(reading) if config[key] is not None]
    if given and not unknown_too:
        raise ModelNotSupported(
            f"config.json sets {name_some(given)}, not known here for the family "
            f"{config['model_type']!r}: it may change the vectors. If it doesn't, remove it there, "
            "or run the model with --backend torch."
        )
    return architecture


def unknown_keys(config: Config) -> list[str]:
    """The keys of a ``config.json`` that are neither computed nor known to be harmless, sorted.

    Raises ModelNotSupported as ``architecture_of`` does, but not for these keys.
    """
    reading = _Reading(config)
    _read(reading)
    return _unread(reading)


def check_code(config: Config) -> None:
    """Raise ModelNotSupported if ``config.json`` names code of its authors that is not known to be
    equal to transformers' own: it may compute something else, and it is never run."""
    family = ARCHITECTURES.get(str(config.get("model_type")))
    if config.get("auto_map") and (family is None or "auto_map" not in family.harmless):
        raise ModelNotSupported(
            "config.json: auto_map names code, which may compute something else than transformers' "
            f"own {config.get('model_type')!r}, and a model's code is never run."
        )


def keys_that_count(config: Config) -> set[str]:
    """The keys of a ``config.json`` that change the vectors of its family, and are not set to what
    is computed; see ``Family.allowed``."""
    return set(_not_allowed(config, ARCHITECTURES.get(str(config.get("model_type")))))


def unused_tensors(model_type: str) -> tuple[str, ...]:
    """``Tensors.unused`` of a ``model_type``, also of one that isn't built here."""
    family = ARCHITECTURES.get(model_type)
    return _UNUSED_ANYWHERE if family is None else family.tensors.unused


class _Reading(Mapping[str, Any]):
    """A config that remembers which of its keys were looked up."""

    def __init__(self, config: Config) -> None:
        self.given = config
        self.keys_read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.keys_read.add(key)
        return self.given[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.given)

    def __len__(self) -> int:
        return len(self.given)


def _read(config: _Reading) -> Architecture:
    kind = config.get("model_type")
    family = ARCHITECTURES.get(str(kind))
    if family is None:
        raise ModelNotSupported(
            f"The architecture {kind!r} is not built here; these are: {', '.join(ARCHITECTURES)}."
        )
    check_code(config.given)  # which marks no key as read
    for key in _not_allowed(config, family):
        raise _not_supported(config, key)
    return family.read(config, family.tensors)


def _unread(reading: _Reading) -> list[str]:
    family = ARCHITECTURES[str(reading["model_type"])]
    return sorted(set(reading) - reading.keys_read - _HARMLESS - set(family.harmless))


def _not_allowed(config: Config, family: Family | None) -> list[str]:
    """The keys of config.json with values other than the allowed ones, in the order of the rows."""
    allowed = {**ANY_FAMILY, **(family.allowed if family else {})}
    return [
        key
        for key, values in allowed.items()
        if key in config and not any(_equal(config[key], value) for value in values)
    ]


def _not_supported(config: Config, key: str) -> ModelNotSupported:
    shown = json.dumps(config[key])[:100]
    return ModelNotSupported(f"config.json: {key} {shown} is not supported.")


def _equal(given: object, value: object) -> bool:
    """As JSON compares: 1 and 1.0 are equal, 1 and true are not."""
    return given == value and isinstance(given, bool) == isinstance(value, bool)


# ------------------------------------------------------------------------- the readers of families


def _bert(config: Config, tensors: Tensors, *, padding_idx: int | None = None) -> Architecture:
    """BERT, and what differs from it in names and in the counting of positions."""
    return Architecture(
        **_sizes(config),
        tensors=tensors,
        positions=Positions(_size(config, "max_position_embeddings"), padding_idx),
        type_rows=0 if tensors.types is None else _size(config, "type_vocab_size"),
        attention=(Attention(),) * _layers(config, "num_hidden_layers"),
        activation=_activation(config, "hidden_act"),
        norm_eps=_number(config, "layer_norm_eps", 1e-12),
    )


def _roberta(config: Config, tensors: Tensors) -> Architecture:
    padding_idx = config.get("pad_token_id", 1)
    if not isinstance(padding_idx, int) or isinstance(padding_idx, bool) or padding_idx < 0:
        raise ModelNotSupported(
            f"config.json: pad_token_id must be a token id, not {padding_idx!r}."
        )
    return _bert(config, tensors, padding_idx=padding_idx)


def _mpnet(config: Config, tensors: Tensors) -> Architecture:
    # transformers' MPNetEmbeddings fixes the padding index, whatever the config says.
    return _bert(config, tensors, padding_idx=1)


def _distilbert(config: Config, tensors: Tensors) -> Architecture:
    return Architecture(
        **_sizes(config, hidden="dim", heads="n_heads", intermediate="hidden_dim"),
        tensors=tensors,
        positions=Positions(_size(config, "max_position_embeddings")),
        attention=(Attention(),) * _layers(config, "n_layers"),
        activation=_activation(config, "activation"),
        norm_eps=1e-12,  # transformers' class has no setting for it
    )


def _nomic_bert(config: Config, tensors: Tensors) -> Architecture:
    """NomicBERT with its authors' GPT-2 style config, or with the fields of transformers."""
    if "n_embd" not in config:
        return _nomic_of_transformers(config, tensors)
    sizes = _sizes(config, hidden="n_embd", heads="n_head", intermediate="n_inner")
    rotary = Rotary(_number(config, "rotary_emb_base"), sizes["head_dim"])
    if config.get("rotary_scaling_factor") is not None:
        factor = _number(config, "rotary_scaling_factor")
        rotary = replace(rotary, factor=factor, trained=_size(config, "max_trained_positions"))
    architecture = Architecture(
        **sizes,
        tensors=tensors,
        type_rows=_size(config, "type_vocab_size"),
        attention=(Attention(rotary=rotary),) * _layers(config, "n_layer"),
        activation="silu",
        gated=True,
        norm_eps=_number(config, "layer_norm_epsilon"),
        attention_bias=False,
        mlp_bias=False,
    )
    # Some repositories have the fields of transformers, too.
    if "hidden_size" in config and _nomic_of_transformers(config, tensors) != architecture:
        raise ModelNotSupported(
            "config.json: n_embd, n_head and their like and the fields of transformers "
            "(hidden_size, num_attention_heads, ...) describe two different models."
        )
    return architecture


def _nomic_of_transformers(config: Config, tensors: Tensors) -> Architecture:
    sizes = _sizes(config)
    theta = _number(config, "rope_theta", 1000.0)
    parameters = _rope_parameters(config)
    if isinstance(parameters, Mapping) and parameters.get("rope_type") == "dynamic":
        if "n_embd" not in config:
            # transformers scales by the longest input of a batch, and of all batches before.
            raise ModelNotSupported("config.json: rotary embedding 'dynamic' is not supported.")
        rotary = replace(
            _rotary({**parameters, "rope_type": "default"}, theta, sizes["head_dim"]),
            factor=_number(parameters, "factor"),
            trained=_size(config, "max_position_embeddings"),
        )
    else:
        rotary = _rotary(parameters, theta, sizes["head_dim"])
    return Architecture(
        **sizes,
        tensors=tensors,
        type_rows=_size(config, "type_vocab_size"),
        attention=(Attention(rotary=rotary),) * _layers(config, "num_hidden_layers"),
        activation=_activation(config, "hidden_act", "silu"),
        gated=True,
        norm_eps=_number(config, "layer_norm_eps", 1e-12),
        attention_bias=False,
        mlp_bias=False,
    )


def _modernbert(config: Config, tensors: Tensors) -> Architecture:
    sizes = _sizes(config)
    every = _size(config, "global_attn_every_n_layers", 3)
    if config.get("rope_scaling"):  # which transformers does not read by kind
        raise _not_supported(config, "rope_scaling")
    ropes = config.get("rope_parameters") or {}
    if not isinstance(ropes, Mapping) or set(ropes) - {"full_attention", "sliding_attention"}:
        raise ModelNotSupported(
            "config.json: rope_parameters must be given for each kind of layer_types."
        )
    full_theta = _number(config, "global_rope_theta", 160_000.0)
    near_theta = _number(config, "local_rope_theta", 10_000.0)
    full = _rotary(ropes.get("full_attention"), full_theta, sizes["head_dim"])
    near = _rotary(ropes.get("sliding_attention"), near_theta, sizes["head_dim"])
    by_kind = {
        "full_attention": Attention(rotary=full),
        "sliding_attention": Attention(window=_size(config, "local_attention") // 2, rotary=near),
    }
    default = [
        "sliding_attention" if layer % every else "full_attention"
        for layer in range(_layers(config, "num_hidden_layers"))
    ]
    return Architecture(
        **sizes,
        tensors=tensors,
        attention=_attention(config, by_kind, default),
        activation=_activation(config, "hidden_activation"),
        gated=True,
        pre_norm=True,
        first_attention_norm=False,
        norm_eps=_number(config, "norm_eps", 1e-5),
        norm_bias=bool(config.get("norm_bias", False)),
        attention_bias=bool(config.get("attention_bias", False)),
        mlp_bias=bool(config.get("mlp_bias", False)),
    )


def _qwen3(config: Config, tensors: Tensors) -> Architecture:
    heads, kv_heads = _size(config, "num_attention_heads"), _size(config, "num_key_value_heads")
    if heads % kv_heads:
        raise ModelNotSupported(
            f"config.json: {heads} attention heads don't divide among {kv_heads} of keys."
        )
    head_dim = _size(config, "head_dim")
    rotary = _rotary(_rope_parameters(config), _number(config, "rope_theta", 10_000.0), head_dim)
    # transformers' masking_utils.py: false makes a decoder attend in both directions.
    causal = config.get("is_causal") is not False
    by_kind = {"full_attention": Attention(causal=causal, rotary=rotary)}
    default = ["full_attention"] * _layers(config, "num_hidden_layers")
    return Architecture(
        tensors=tensors,
        hidden=_size(config, "hidden_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=_size(config, "intermediate_size"),
        vocab_size=_size(config, "vocab_size"),
        attention=_attention(config, by_kind, default),
        activation=_activation(config, "hidden_act", "silu"),
        gated=True,
        pre_norm=True,
        norm="rms",
        norm_eps=_number(config, "rms_norm_eps", 1e-6),
        norm_bias=False,
        attention_bias=bool(config.get("attention_bias", False)),
        mlp_bias=False,
    )


# ---------------------------------------------------------------------------------- reading a value


def _size(config: Config, key: str, default: int | None = None) -> int:
    value = config.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelNotSupported(f"config.json: {key} must be a positive number, not {value!r}.")
    return value


def _layers(config: Config, key: str) -> int:
    layers = _size(config, key)
    if layers > _MAX_LAYERS:
        raise ModelNotSupported(f"config.json: {key} can't be {layers}.")
    return layers


def _number(config: Config, key: str, default: float | None = None) -> float:
    value = config.get(key, default)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value <= sys.float_info.max:
        raise ModelNotSupported(f"config.json: {key} must be a positive number, not {value!r}.")
    return float(value)


def _sizes(
    config: Config,
    *,
    hidden: str = "hidden_size",
    heads: str = "num_attention_heads",
    intermediate: str = "intermediate_size",
) -> dict[str, Any]:
    """The sizes of a family whose heads split the states among them, by the names of their keys."""
    width, count = _size(config, hidden), _size(config, heads)
    if width % count:
        raise ModelNotSupported(f"config.json: {width} values don't divide into {count} heads.")
    # transformers' fields have head_dim, too; it is unknown beside the names of others.
    head_dim = config.get("head_dim") if hidden == "hidden_size" else None
    if head_dim is not None and not _equal(head_dim, width // count):
        raise _not_supported(config, "head_dim")
    return {
        "hidden": width,
        "heads": count,
        "kv_heads": count,
        "head_dim": width // count,
        "intermediate": _size(config, intermediate),
        "vocab_size": _size(config, "vocab_size"),
    }


def _activation(config: Config, key: str, default: str = "gelu") -> Activation:
    name = config.get(key, default)
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ModelNotSupported(f"config.json: {key} {name!r} is not supported.")
    return ACTIVATIONS[name]


def _rope_parameters(config: Config) -> object:
    """As transformers 5 writes them, or under the older key, which wins where both are."""
    return config.get("rope_scaling") or config.get("rope_parameters") or None


_ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "factor"}


def _rotary(parameters: object, default_theta: float, head_dim: int) -> Rotary:
    """From ``rope_parameters`` as transformers 5 writes them, or from the older key's theta."""
    if parameters is None:
        return Rotary(default_theta, head_dim)
    if not isinstance(parameters, Mapping):
        raise ModelNotSupported(f"config.json: rope_parameters {parameters!r} is not supported.")
    if unknown := set(parameters) - _ROPE_KEYS:
        raise ModelNotSupported(
            f"config.json: rope_parameters sets {', '.join(sorted(unknown))}, not known here."
        )
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default" or parameters.get("partial_rotary_factor", 1) != 1:
        raise ModelNotSupported(f"config.json: rotary embedding {kind!r} is not supported.")
    return Rotary(_number(parameters, "rope_theta", default_theta), head_dim)


def _attention(
    config: Config, by_kind: Mapping[str, Attention], default: list[str]
) -> tuple[Attention, ...]:
    """The attention of each layer by its kind in ``layer_types``."""
    kinds = config.get("layer_types") or default
    named = isinstance(kinds, list) and all(kind in list(by_kind) for kind in kinds)
    if not named or len(kinds) != len(default):
        raise ModelNotSupported(
            f"config.json: layer_types must name one of {', '.join(by_kind)} for each layer."
        )
    return tuple(by_kind[kind] for kind in kinds)


# --------------------------------------------------------------------------------------- the table

_ROTARY = {"partial_rotary_factor": (None, 1)}
_BIDIRECTIONAL = {"is_causal": (None, False)}
_LEARNED = {**_BIDIRECTIONAL, "position_embedding_type": (None, "absolute")}

_BERT = Tensors(
    words="embeddings.word_embeddings",
    positions="embeddings.position_embeddings",
    types="embeddings.token_type_embeddings",
    embedding_norm="embeddings.LayerNorm",
    layer="encoder.layer.{}.",
    qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
    attention_output="attention.output.dense",
    attention_norm="attention.output.LayerNorm",
    mlp_in=("intermediate.dense",),
    mlp_out="output.dense",
    mlp_norm="output.LayerNorm",
    prefixes=("bert.",),
    unused=("pooler.*", "embeddings.position_ids", "cls.*", "classifier.*", "qa_outputs.*"),
)
_ROBERTA = replace(
    _BERT,
    prefixes=("roberta.",),
    unused=("pooler.*", "embeddings.position_ids", "lm_head.*", "classifier.*", "qa_outputs.*"),
)

ARCHITECTURES: Mapping[str, Family] = {
    "bert": Family(
        examples="MiniLM, BGE, E5, GTE, mxbai, Snowflake Arctic v1",
        read=_bert,
        tensors=_BERT,
        allowed=_LEARNED,
    ),
    "roberta": Family(
        examples="all-distilroberta-v1, all-roberta-large-v1",
        read=_roberta,
        tensors=_ROBERTA,
        allowed=_LEARNED,
    ),
    "xlm-roberta": Family(
        examples="multilingual-e5, bge-m3 (dense)",
        read=_roberta,
        tensors=_ROBERTA,
        allowed=_LEARNED,
    ),
    "mpnet": Family(
        examples="all-mpnet-base-v2, multi-qa-mpnet",
        read=_mpnet,
        tensors=replace(
            _BERT,
            types=None,
            qkv=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
            attention_output="attention.attn.o",
            attention_norm="attention.LayerNorm",
            relative_bias="encoder.relative_attention_bias",
            prefixes=("mpnet.",),
            unused=_ROBERTA.unused,
        ),
        allowed=_BIDIRECTIONAL,
        # transformers computes 32 buckets whatever it says; the builder checks the table's rows.
        harmless=("relative_attention_num_buckets",),
    ),
    "distilbert": Family(
        examples="msmarco-distilbert, multi-qa-distilbert",
        read=_distilbert,
        tensors=replace(
            _BERT,
            types=None,
            layer="transformer.layer.{}.",
            qkv=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
            attention_output="attention.out_lin",
            attention_norm="sa_layer_norm",
            mlp_in=("ffn.lin1",),
            mlp_out="ffn.lin2",
            mlp_norm="output_layer_norm",
            prefixes=("distilbert.",),
            unused=(
                *("vocab_transform.*", "vocab_layer_norm.*", "vocab_projector.*"),
                *("pre_classifier.*", "classifier.*", "qa_outputs.*"),
            ),
        ),
        allowed=_BIDIRECTIONAL,
        # Sinusoidal positions are the table's first values, which the checkpoint replaces.
        harmless=(
            *("dropout", "qa_dropout", "seq_classif_dropout", "sinusoidal_pos_embds"),
            "tie_weights_",
        ),
    ),
    "nomic_bert": Family(
        examples="nomic-embed-text-v1, v1.5",
        read=_nomic_bert,
        tensors=Tensors(
            words="embeddings.word_embeddings",
            types="embeddings.token_type_embeddings",
            embedding_norm="emb_ln",
            layer="encoder.layers.{}.",
            qkv=("attn.Wqkv",),
            attention_output="attn.out_proj",
            attention_norm="norm1",
            # fc12 is the gate: "nomic_bert" in transformers' conversion_mapping.py.
            mlp_in=("mlp.fc12", "mlp.fc11"),
            mlp_out="mlp.fc2",
            mlp_norm="norm2",
            prefixes=("bert.", "nomic_bert."),
            unused=("cls.*", "pooler.*", "*.rotary_emb.inv_freq"),
        ),
        allowed={
            **_BIDIRECTIONAL,
            **_ROTARY,
            "activation_function": ("swiglu",),
            "causal": (None, False),
            "mlp_fc1_bias": (False,),
            "mlp_fc2_bias": (False,),
            "moe_every_n_layers": (None, 0),
            "num_experts": (None, 0),
            "parallel_block": (None, False),
            "prenorm": (False,),
            "qkv_proj_bias": (False,),
            "rotary_emb_fraction": (1,),
            "rotary_emb_interleaved": (None, False),
            "rotary_emb_scale_base": (None,),
            "scale_attn_by_inverse_layer_idx": (None, False),
            "scale_attn_weights": (None, True),
            "use_rms_norm": (None, False),
        },
        harmless=(
            *("attn_pdrop", "auto_map", "dense_seq_output", "embd_pdrop", "fused_bias_fc"),
            *("fused_dropout_add_ln", "max_trained_positions", "n_positions"),
            *("pad_vocab_size_multiple", "parallel_block_tied_norm", "resid_pdrop"),
            *("reorder_and_upcast_attn", "use_flash_attn", "use_xentropy"),
        ),
    ),
    "modernbert": Family(
        examples="gte-modernbert-base, modernbert-embed-base",
        read=_modernbert,
        tensors=Tensors(
            words="embeddings.tok_embeddings",
            embedding_norm="embeddings.norm",
            layer="layers.{}.",
            qkv=("attn.Wqkv",),
            attention_output="attn.Wo",
            attention_norm="attn_norm",
            mlp_in=("mlp.Wi",),
            mlp_out="mlp.Wo",
            mlp_norm="mlp_norm",
            final_norm="final_norm",
            prefixes=("model.",),
            unused=("head.*", "decoder.*", "classifier.*"),
        ),
        allowed={**_BIDIRECTIONAL, **_ROTARY},
        harmless=(
            *("classifier_activation", "classifier_bias", "classifier_pooling"),
            *("decoder_bias", "deterministic_flash_attn", "embedding_dropout"),
            *("initializer_cutoff_factor", "mlp_dropout", "reference_compile"),
            *("repad_logits_with_grad", "sparse_pred_ignore_index", "sparse_prediction"),
            "layer_norm_eps",  # norm_eps counts
        ),
    ),
    "qwen3": Family(
        examples="Qwen3-Embedding",
        read=_qwen3,
        tensors=Tensors(
            words="embed_tokens",
            layer="layers.{}.",
            qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            attention_output="self_attn.o_proj",
            attention_norm="input_layernorm",
            head_norms=("self_attn.q_norm", "self_attn.k_norm"),
            mlp_in=("mlp.gate_proj", "mlp.up_proj"),
            mlp_out="mlp.down_proj",
            mlp_norm="post_attention_layernorm",
            final_norm="norm",
            prefixes=("model.",),
            unused=("lm_head.*", "score.*", "*.rotary_emb.inv_freq"),
        ),
        allowed={
            **_ROTARY,
            "is_causal": (None, False, True),
            "use_bidirectional_attention": (None, False),
            "use_sliding_window": (None, False),
        },
        # use_sliding_window, which must be off, makes them count.
        harmless=("max_window_layers", "sliding_window"),
    ),
}
"""Families by their ``model_type``."""
