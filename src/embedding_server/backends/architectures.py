# SPDX-License-Identifier: MIT OR Apache-2.0
"""The table of architectures: ``config.json`` of each family to the one form that is built."""

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

_MOST_LAYERS = 10_000

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
"""What changes the result in every family: the values that are possible here."""

_HARMLESS = frozenset(
    (
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
        # Ids of tokens, but for the padding's, from which RoBERTa counts positions.
        *("bos_token_id", "cls_token_id", "eos_token_id", "mask_token_id", "sep_token_id"),
        *("unk_token_id", "decoder_start_token_id"),
        # Layers over the states that give no embedding.
        *("directionality", "pooler_fc_size", "pooler_num_attention_heads"),
        *("pooler_num_fc_layers", "pooler_size_per_head", "pooler_type"),
        *("summary_activation", "summary_first_dropout", "summary_proj_to_labels"),
        *("summary_type", "summary_use_proj"),
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
"""Keys of config.json that change no embedding of any family, whatever they are set to."""

_READ_ELSEWHERE = frozenset(
    ("architectures", "max_position_embeddings", "model_type", "pad_token_id", "tokenizer_class")
)
"""Keys that models/ reads: for limits of length, tokenizers, and a pooling that no file names."""


@dataclass(frozen=True, slots=True)
class Positions:
    """A table of learned positions."""

    tensor: str
    rows: int
    padding_idx: int | None = None
    """Where counting begins after, and which token id isn't counted (RoBERTa's way)."""


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
    """How the tokens of one layer see each other."""

    causal: bool = False
    window: int | None = None
    """How many tokens to each side are seen; None: all."""
    rotary: Rotary | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A transformer, as the graph builder needs it.

    Tensors are named without ``.weight`` and ``.bias``, those of a layer relative to it.
    """

    hidden: int
    heads: int
    intermediate: int
    vocab_size: int
    attention: tuple[Attention, ...]
    """One for each layer."""
    activation: Activation

    words: str
    positions: Positions | None = None
    types: str | None = None
    """Token types; the first is every token's."""
    type_rows: int = 0
    embedding_norm: str | None = None

    layer: str
    """Prefix of a layer's tensors, with ``{}`` for its number."""
    qkv: tuple[str, ...]
    """Queries, keys and values: three tensors, or one with all."""
    attention_output: str
    attention_norm: str
    mlp_in: tuple[str, ...]
    """``(up,)``, ``(gate, up)``, or with ``gated`` one tensor with both."""
    mlp_out: str
    mlp_norm: str
    gated: bool = False
    """The activation of a gate multiplies the up projection."""
    final_norm: str | None = None

    pre_norm: bool = False
    """Norms stand before the sublayers and not after their sums."""
    first_attention_norm: bool = True
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: float
    norm_bias: bool = True
    attention_bias: bool = True
    mlp_bias: bool = True
    kv_heads: int
    head_dim: int
    head_norms: tuple[str, str] | None = None
    """RMS norms over each head of queries and keys."""
    relative_bias: str | None = None
    """Bias of every layer's attention by distance in buckets (MPNet's, after T5)."""

    prefixes: tuple[str, ...]
    """What some checkpoints put before every name."""
    unused: tuple[str, ...] = ()
    """See ``Family``."""


def architecture_of(config: Config, *, unknown_too: bool = False) -> Architecture:
    """The architecture of a ``config.json``.

    Raises ModelNotSupported for a family that isn't built, for a value that would change the
    result and isn't implemented, and, unless ``unknown_too``, for a key that isn't known.
    """
    architecture, unknown = _read(config)
    if unknown_too:
        return architecture
    if given := [key for key in unknown if config[key] is not None]:
        raise ModelNotSupported(
            f"config.json sets {name_some(given)}, not known here for the family "
            f"{config['model_type']!r}: it may change the vectors. If it doesn't, remove it there, "
            "or run the model with --backend torch."
        )
    return architecture


def check_code(config: Config) -> None:
    """Raise ModelNotSupported if ``config.json`` names code of its authors that is not known to be
    equal to transformers' own: it may compute something else, and it is never run."""
    family = ARCHITECTURES.get(str(config.get("model_type")))
    if config.get("auto_map") and (family is None or "auto_map" not in family.harmless):
        raise ModelNotSupported(
            "config.json: auto_map names code, which may compute something else than transformers' "
            f"own {config.get('model_type')!r}, and a model's code is never run."
        )


def unknown_keys(config: Config) -> list[str]:
    """The keys of a ``config.json`` that are neither computed nor known to be harmless, sorted.

    Raises ModelNotSupported as ``architecture_of`` does, but for those.
    """
    return _read(config)[1]


def keys_that_count(config: Config) -> set[str]:
    """The keys of a ``config.json`` that are known to change the vectors of its family, and are not
    set to what is computed; see ``Family.allowed``."""
    family = ARCHITECTURES.get(str(config.get("model_type")))
    allowed = ANY_FAMILY if family is None else {**ANY_FAMILY, **family.allowed}
    return set(_not_allowed(config, allowed))


def unused_tensors(model_type: str) -> tuple[str, ...]:
    """``Family.unused`` of a ``model_type``, which needs not be built here."""
    family = ARCHITECTURES.get(model_type)
    return _UNUSED_ANYWHERE if family is None else family.unused


def _read(config: Config) -> tuple[Architecture, list[str]]:
    kind = config.get("model_type")
    family = ARCHITECTURES.get(str(kind))
    if family is None:
        raise ModelNotSupported(
            f"The architecture {kind!r} is not built here; there are: {', '.join(ARCHITECTURES)}."
        )
    check_code(config)
    reading = _Reading(config)
    _allow(reading, {**ANY_FAMILY, **family.allowed})
    architecture = replace(family.read(reading), unused=family.unused)
    known = _HARMLESS | _READ_ELSEWHERE | family.harmless | reading.keys_read
    return architecture, sorted(config.keys() - known)


class _Reading(Mapping[str, Any]):
    """A config that remembers which of its keys were asked for."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self.keys_read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.keys_read.add(key)
        return self._config[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._config)

    def __len__(self) -> int:
        return len(self._config)


def _bert(config: Config) -> Architecture:
    return _bert_like(
        config,
        positions=_learned(config),
        type_rows=_size(config, "type_vocab_size"),
        norm_eps=_number(config, "layer_norm_eps", 1e-12),
        prefixes=("bert.",),
    )


def _roberta(config: Config) -> Architecture:
    return _bert_like(
        config,
        positions=_learned(config, padding_idx=_padding_idx(config)),
        type_rows=_size(config, "type_vocab_size"),
        norm_eps=_number(config, "layer_norm_eps", 1e-12),
        prefixes=("roberta.",),
    )


def _bert_like(
    config: Config,
    *,
    positions: Positions,
    type_rows: int,
    norm_eps: float,
    prefixes: tuple[str, ...],
) -> Architecture:
    return Architecture(
        **_sizes(config),
        attention=(Attention(),) * _layers(config, "num_hidden_layers"),
        activation=_activation(config, "hidden_act"),
        words="embeddings.word_embeddings",
        positions=positions,
        types="embeddings.token_type_embeddings",
        type_rows=type_rows,
        embedding_norm="embeddings.LayerNorm",
        layer="encoder.layer.{}.",
        qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
        attention_output="attention.output.dense",
        attention_norm="attention.output.LayerNorm",
        mlp_in=("intermediate.dense",),
        mlp_out="output.dense",
        mlp_norm="output.LayerNorm",
        norm_eps=norm_eps,
        prefixes=prefixes,
    )


def _mpnet(config: Config) -> Architecture:
    return Architecture(
        **_sizes(config),
        attention=(Attention(),) * _layers(config, "num_hidden_layers"),
        activation=_activation(config, "hidden_act"),
        words="embeddings.word_embeddings",
        # transformers' MPNetEmbeddings fixes the padding index, whatever the config says.
        positions=_learned(config, padding_idx=1),
        embedding_norm="embeddings.LayerNorm",
        layer="encoder.layer.{}.",
        qkv=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
        attention_output="attention.attn.o",
        attention_norm="attention.LayerNorm",
        mlp_in=("intermediate.dense",),
        mlp_out="output.dense",
        mlp_norm="output.LayerNorm",
        norm_eps=_number(config, "layer_norm_eps", 1e-12),
        relative_bias="encoder.relative_attention_bias",
        prefixes=("mpnet.",),
    )


def _distilbert(config: Config) -> Architecture:
    hidden, heads = _size(config, "dim"), _size(config, "n_heads")
    return Architecture(
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=_head_dim(hidden, heads),
        intermediate=_size(config, "hidden_dim"),
        vocab_size=_size(config, "vocab_size"),
        attention=(Attention(),) * _layers(config, "n_layers"),
        activation=_activation(config, "activation"),
        words="embeddings.word_embeddings",
        positions=_learned(config),
        embedding_norm="embeddings.LayerNorm",
        layer="transformer.layer.{}.",
        qkv=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        attention_output="attention.out_lin",
        attention_norm="sa_layer_norm",
        mlp_in=("ffn.lin1",),
        mlp_out="ffn.lin2",
        mlp_norm="output_layer_norm",
        norm_eps=1e-12,  # transformers' class has no setting for it
        prefixes=("distilbert.",),
    )


def _nomic_bert(config: Config) -> Architecture:
    """NomicBERT with its authors' GPT-2 style config, or with the fields of transformers."""
    if "n_embd" not in config:
        architecture = _nomic_of_transformers(config)
        if any(attention.rotary.factor for attention in architecture.attention if attention.rotary):
            # transformers scales by the longest input of a batch, and of all batches before.
            raise ModelNotSupported("config.json: rotary embedding 'dynamic' is not supported.")
        return architecture
    hidden, heads = _size(config, "n_embd"), _size(config, "n_head")
    head_dim = _head_dim(hidden, heads)
    rotary = Rotary(_number(config, "rotary_emb_base"), head_dim)
    if config.get("rotary_scaling_factor") is not None:
        factor = _number(config, "rotary_scaling_factor")
        rotary = replace(rotary, factor=factor, trained=_size(config, "max_trained_positions"))
    architecture = Architecture(
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        intermediate=_size(config, "n_inner"),
        vocab_size=_size(config, "vocab_size"),
        attention=(Attention(rotary=rotary),) * _layers(config, "n_layer"),
        activation="silu",
        type_rows=_size(config, "type_vocab_size"),
        norm_eps=_number(config, "layer_norm_epsilon"),
        **_NOMIC_TENSORS,
    )
    # Some repositories have the fields of transformers, too.
    if "hidden_size" in config and _nomic_of_transformers(config) != architecture:
        raise ModelNotSupported(
            "config.json: n_embd, n_head and their like and the fields of transformers "
            "(hidden_size, num_attention_heads, ...) describe two different models."
        )
    return architecture


def _nomic_of_transformers(config: Config) -> Architecture:
    sizes = _sizes(config)
    theta = _number(config, "rope_theta", 1000.0)
    parameters = _rope_parameters(config)
    dynamic = None
    if isinstance(parameters, Mapping) and parameters.get("rope_type") == "dynamic":
        dynamic = _number(parameters, "factor")
        parameters = {**parameters, "rope_type": "default"}
    rotary = _rotary(parameters, theta, sizes["head_dim"])
    if dynamic is not None:
        rotary = replace(rotary, factor=dynamic, trained=_size(config, "max_position_embeddings"))
    return Architecture(
        **sizes,
        attention=(Attention(rotary=rotary),) * _layers(config, "num_hidden_layers"),
        activation=_activation(config, "hidden_act", "silu"),
        type_rows=_size(config, "type_vocab_size"),
        norm_eps=_number(config, "layer_norm_eps", 1e-12),
        **_NOMIC_TENSORS,
    )


_NOMIC_TENSORS: Mapping[str, Any] = {
    "words": "embeddings.word_embeddings",
    "types": "embeddings.token_type_embeddings",
    "embedding_norm": "emb_ln",
    "layer": "encoder.layers.{}.",
    "qkv": ("attn.Wqkv",),
    "attention_output": "attn.out_proj",
    "attention_norm": "norm1",
    # fc12 is the gate: "nomic_bert" in transformers' conversion_mapping.py.
    "mlp_in": ("mlp.fc12", "mlp.fc11"),
    "mlp_out": "mlp.fc2",
    "mlp_norm": "norm2",
    "gated": True,
    "attention_bias": False,
    "mlp_bias": False,
    "prefixes": ("bert.", "nomic_bert."),
}


def _modernbert(config: Config) -> Architecture:
    sizes = _sizes(config)
    every = _size(config, "global_attn_every_n_layers", 3)
    layers = _layers(config, "num_hidden_layers")
    kinds = config.get("layer_types") or [
        "sliding_attention" if layer % every else "full_attention" for layer in range(layers)
    ]
    window = _size(config, "local_attention") // 2
    ropes = _rope_parameters(config) or {}
    if not isinstance(ropes, Mapping) or set(ropes) - {"full_attention", "sliding_attention"}:
        raise ModelNotSupported(
            "config.json: rope_parameters must be given for each kind of layer_types."
        )
    by_kind = {
        "full_attention": Attention(
            rotary=_rotary(
                ropes.get("full_attention"),
                _number(config, "global_rope_theta", 160_000.0),
                sizes["head_dim"],
            )
        ),
        "sliding_attention": Attention(
            window=window,
            rotary=_rotary(
                ropes.get("sliding_attention"),
                _number(config, "local_rope_theta", 10_000.0),
                sizes["head_dim"],
            ),
        ),
    }
    _check_kinds(kinds, layers, by_kind)
    return Architecture(
        **sizes,
        attention=tuple(by_kind[kind] for kind in kinds),
        activation=_activation(config, "hidden_activation"),
        words="embeddings.tok_embeddings",
        embedding_norm="embeddings.norm",
        layer="layers.{}.",
        qkv=("attn.Wqkv",),
        attention_output="attn.Wo",
        attention_norm="attn_norm",
        mlp_in=("mlp.Wi",),
        mlp_out="mlp.Wo",
        mlp_norm="mlp_norm",
        gated=True,
        final_norm="final_norm",
        pre_norm=True,
        first_attention_norm=False,
        norm_eps=_number(config, "norm_eps", 1e-5),
        norm_bias=bool(config.get("norm_bias", False)),
        attention_bias=bool(config.get("attention_bias", False)),
        mlp_bias=bool(config.get("mlp_bias", False)),
        prefixes=("model.",),
    )


def _qwen3(config: Config) -> Architecture:
    layers = _layers(config, "num_hidden_layers")
    hidden, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
    kv_heads, head_dim = _size(config, "num_key_value_heads"), _size(config, "head_dim")
    if heads % kv_heads:
        raise ModelNotSupported(
            f"config.json: {heads} attention heads don't divide among {kv_heads} of keys."
        )
    theta = _number(config, "rope_theta", 10_000.0)
    rotary = _rotary(_rope_parameters(config), theta, head_dim)
    # transformers' masking_utils.py: false makes a decoder attend in both directions.
    causal = config.get("is_causal")
    _allow(config, {"is_causal": (None, False, True)})
    by_kind = {"full_attention": Attention(causal=causal is not False, rotary=rotary)}
    kinds = config.get("layer_types") or ["full_attention"] * layers
    _check_kinds(kinds, layers, by_kind)
    return Architecture(
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=_size(config, "intermediate_size"),
        vocab_size=_size(config, "vocab_size"),
        attention=tuple(by_kind[kind] for kind in kinds),
        activation=_activation(config, "hidden_act", "silu"),
        words="embed_tokens",
        layer="layers.{}.",
        qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        attention_output="self_attn.o_proj",
        attention_norm="input_layernorm",
        mlp_in=("mlp.gate_proj", "mlp.up_proj"),
        mlp_out="mlp.down_proj",
        mlp_norm="post_attention_layernorm",
        gated=True,
        final_norm="norm",
        pre_norm=True,
        norm="rms",
        norm_eps=_number(config, "rms_norm_eps", 1e-6),
        norm_bias=False,
        attention_bias=bool(config.get("attention_bias", False)),
        mlp_bias=False,
        head_norms=("self_attn.q_norm", "self_attn.k_norm"),
        prefixes=("model.",),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One row of the table of architectures.

    A key of config.json is one that ``read`` reads, one in ``allowed``, or a harmless one; any
    other is refused, as it may change the vectors.
    """

    examples: str
    """Models that people know."""
    read: Callable[[Config], Architecture]
    allowed: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    """Keys of config.json that would change the result, and the values that are computed."""
    harmless: frozenset[str] = frozenset()
    """Keys of config.json that change nothing, beside those that never do."""
    unused: tuple[str, ...]
    """Tensors that give no embedding, as patterns of fnmatch: heads of other tasks, buffers."""


_BIDIRECTIONAL = {"is_causal": (None, False)}
_LEARNED = {**_BIDIRECTIONAL, "position_embedding_type": (None, "absolute")}
_PLAIN_ROTARY = {"partial_rotary_factor": (None, 1)}

_BERT_UNUSED = ("pooler.*", "embeddings.position_ids", "cls.*", "classifier.*", "qa_outputs.*")
_ROBERTA_UNUSED = (
    *("pooler.*", "embeddings.position_ids", "lm_head.*", "classifier.*", "qa_outputs.*"),
)
_UNUSED_ANYWHERE = (
    *("pooler.*", "*.pooler.*", "*position_ids", "*inv_freq", "cls.*", "lm_head.*", "mlm_head.*"),
    *("classifier.*", "score.*", "qa_outputs.*", "predictions.*", "*_predictions.*"),
    "generator_lm_head.*",
)
"""Of a family that isn't built here."""

ARCHITECTURES: Mapping[str, Family] = {
    "bert": Family(
        examples="MiniLM, BGE, E5, GTE, mxbai, Snowflake Arctic v1",
        read=_bert,
        allowed=_LEARNED,
        unused=_BERT_UNUSED,
    ),
    "roberta": Family(
        examples="all-distilroberta-v1, all-roberta-large-v1",
        read=_roberta,
        allowed=_LEARNED,
        unused=_ROBERTA_UNUSED,
    ),
    "xlm-roberta": Family(
        examples="multilingual-e5, bge-m3 (dense)",
        read=_roberta,
        allowed=_LEARNED,
        unused=_ROBERTA_UNUSED,
    ),
    "mpnet": Family(
        examples="all-mpnet-base-v2, multi-qa-mpnet",
        read=_mpnet,
        allowed=_BIDIRECTIONAL,
        # transformers computes 32 buckets whatever it says; the table's own rows are looked at.
        harmless=frozenset({"relative_attention_num_buckets", "position_embedding_type"}),
        unused=_ROBERTA_UNUSED,
    ),
    "distilbert": Family(
        examples="msmarco-distilbert, multi-qa-distilbert",
        read=_distilbert,
        allowed=_BIDIRECTIONAL,
        # Sinusoidal positions are the table's first values, which the checkpoint replaces.
        harmless=frozenset(
            (
                *("dropout", "qa_dropout", "seq_classif_dropout", "sinusoidal_pos_embds"),
                *("tie_weights_", "position_embedding_type"),
            )
        ),
        unused=(
            *("vocab_transform.*", "vocab_layer_norm.*", "vocab_projector.*", "pre_classifier.*"),
            *("classifier.*", "qa_outputs.*"),
        ),
    ),
    "nomic_bert": Family(
        examples="nomic-embed-text-v1, v1.5",
        read=_nomic_bert,
        allowed={
            **_BIDIRECTIONAL,
            **_PLAIN_ROTARY,
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
        harmless=frozenset(
            (
                *("attn_pdrop", "auto_map", "dense_seq_output", "embd_pdrop", "fused_bias_fc"),
                *("fused_dropout_add_ln", "max_trained_positions", "n_positions"),
                *("pad_vocab_size_multiple", "parallel_block_tied_norm", "resid_pdrop"),
                *("position_embedding_type", "reorder_and_upcast_attn", "use_flash_attn"),
                "use_xentropy",
            )
        ),
        unused=("cls.*", "pooler.*", "*.rotary_emb.inv_freq"),
    ),
    "modernbert": Family(
        examples="gte-modernbert-base, modernbert-embed-base",
        read=_modernbert,
        allowed={**_BIDIRECTIONAL, **_PLAIN_ROTARY},
        harmless=frozenset(
            (
                *("classifier_activation", "classifier_bias", "classifier_pooling"),
                *("decoder_bias", "deterministic_flash_attn", "embedding_dropout"),
                *("initializer_cutoff_factor", "mlp_dropout", "reference_compile"),
                *("repad_logits_with_grad", "sparse_pred_ignore_index", "sparse_prediction"),
                "position_embedding_type",  # all of them rotate
                "layer_norm_eps",  # norm_eps counts
            )
        ),
        unused=("head.*", "decoder.*", "classifier.*"),
    ),
    "qwen3": Family(
        examples="Qwen3-Embedding",
        read=_qwen3,
        allowed={
            **_PLAIN_ROTARY,
            "use_bidirectional_attention": (None, False),
            "use_sliding_window": (None, False),
        },
        # The first two are of no use by themselves.
        harmless=frozenset({"max_window_layers", "sliding_window", "position_embedding_type"}),
        unused=("lm_head.*", "score.*", "*.rotary_emb.inv_freq"),
    ),
}
"""Families by their ``model_type``."""


def _allow(config: Config, allowed: Mapping[str, tuple[object, ...]]) -> None:
    """Refuse each key that is there with a value other than these."""
    for key in _not_allowed(config, allowed):
        shown = json.dumps(config[key])[:100]
        raise ModelNotSupported(f"config.json: {key} {shown} is not supported.")


def _not_allowed(config: Config, allowed: Mapping[str, tuple[object, ...]]) -> list[str]:
    """The keys that are there with a value other than these, in the order of ``allowed``."""
    return [
        key
        for key, values in allowed.items()
        if key in config and not any(_equal(config[key], value) for value in values)
    ]


def _equal(given: object, value: object) -> bool:
    """As JSON compares: 1 and 1.0 are equal, 1 and true are not."""
    return given == value and isinstance(given, bool) == isinstance(value, bool)


def _size(config: Config, key: str, default: int | None = None) -> int:
    value = config.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelNotSupported(f"config.json: {key} must be a positive number, not {value!r}.")
    return value


def _layers(config: Config, key: str) -> int:
    layers = _size(config, key)
    if layers > _MOST_LAYERS:  # of which each takes memory before its weights are missed
        raise ModelNotSupported(f"config.json: {key} can't be {layers}.")
    return layers


def _number(config: Config, key: str, default: float | None = None) -> float:
    value = config.get(key, default)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value <= sys.float_info.max:
        raise ModelNotSupported(f"config.json: {key} must be a positive number, not {value!r}.")
    return float(value)


def _sizes(config: Config) -> dict[str, Any]:
    """The sizes that most families give under the same keys."""
    hidden, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
    head_dim = _head_dim(hidden, heads)
    _allow(config, {"head_dim": (None, head_dim)})
    return {
        "hidden": hidden,
        "heads": heads,
        "kv_heads": heads,
        "head_dim": head_dim,
        "intermediate": _size(config, "intermediate_size"),
        "vocab_size": _size(config, "vocab_size"),
    }


def _head_dim(hidden: int, heads: int) -> int:
    if hidden % heads:
        raise ModelNotSupported(f"config.json: {hidden} values don't divide into {heads} heads.")
    return hidden // heads


def _learned(config: Config, padding_idx: int | None = None) -> Positions:
    rows = _size(config, "max_position_embeddings")
    return Positions("embeddings.position_embeddings", rows, padding_idx)


def _padding_idx(config: Config) -> int:
    value = config.get("pad_token_id", 1)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ModelNotSupported(f"config.json: pad_token_id must be a token id, not {value!r}.")
    return value


def _activation(config: Config, key: str, default: str = "gelu") -> Activation:
    name = config.get(key, default)
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ModelNotSupported(f"config.json: {key} {name!r} is not supported.")
    return ACTIVATIONS[name]


_ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "factor"}


def _rope_parameters(config: Config) -> object:
    """As transformers 5 writes them, or under the older key, which wins where both are."""
    return config.get("rope_scaling") or config.get("rope_parameters") or None


def _rotary(parameters: object, default_theta: float, head_dim: int) -> Rotary:
    """From ``rope_parameters`` as transformers 5 writes them, or the older keys' ``theta``."""
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


def _check_kinds(kinds: Any, layers: int, known: Mapping[str, Attention]) -> None:
    named = isinstance(kinds, list) and all(kind in list(known) for kind in kinds)
    if not named or len(kinds) != layers:
        raise ModelNotSupported(
            f"config.json: layer_types must name one of {', '.join(known)} for each layer."
        )
