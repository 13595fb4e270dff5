# SPDX-License-Identifier: MIT OR Apache-2.0
"""The reference: the whole sentence-transformers pipeline on PyTorch, on the device it finds."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from embedding_server.backends.architectures import (
    architecture_of,
    check_code,
    keys_that_count,
    unused_tensors,
)
from embedding_server.backends.base import BackendOptions, Pipeline
from embedding_server.backends.static import TABLE_TENSORS
from embedding_server.backends.weights import Weights, name_some, not_matching
from embedding_server.engine.backend import OwnTokenizer
from embedding_server.engine.batch import Batch, Encoding
from embedding_server.errors import ModelNotSupported

__all__ = ["TorchBackend", "load_sentence_transformer"]

# Vectors of one text that differ by more than this share of their largest value are not equal.
_ROUNDING = 1e-4

# Rotary embeddings that transformers scales by the longest input of a batch.
_SCALED_BY_BATCH = ("dynamic", "longrope")

# Keys that transformers takes from config.json and keeps under other names.
_OLDER_KEYS = (
    *("rope_scaling", "rope_theta", "global_rope_theta", "local_rope_theta"),
    *("partial_rotary_factor", "global_attn_every_n_layers", "is_causal", "per_layer_config"),
    *("architectures", "model_type", "quantization_config", "tokenizer_class"),
)

# Its messages where the CPU's memory or Apple's is full, for which it has no exception.
_NO_MEMORY = ("can't allocate memory", "out of memory")

_PROBE = " One text, two: CAF\u00c9\n \u6771\u4eac "
"""A tokenizer that does more than its tokenizer.json says gives other ids for this text."""


class TorchBackend:
    """sentence-transformers without its tokenizer and without a final ``Normalize``."""

    padded = True
    exclusive = True

    def __init__(self, model: Any, pipeline: Pipeline) -> None:
        self._model = model
        self._pad_token_id = pipeline.pad_token_id
        self._static = pipeline.body == "StaticEmbedding"
        self.vocab_size = int(model[0].num_embeddings) if self._static else None
        self.tokenizer = None if self._static else _own_tokenizer(model.tokenizer)
        self.dims = int(model.get_embedding_dimension())
        # A GPU fills up at thousands of tokens; a CPU gains nothing past a few hundred.
        self.default_batch_tokens = 1024 if str(model.device) == "cpu" else 16_384

    @classmethod
    def load(cls, pipeline: Pipeline, options: BackendOptions) -> Self:
        """Load ``pipeline.folder``; raises ModelNotSupported without the extra or if it fails."""
        model = load_sentence_transformer(pipeline)
        import torch

        torch.set_num_threads(options.threads)
        backend = cls(model, pipeline)
        backend._check_batching(pipeline)
        return backend

    def embed(self, batch: Batch, *, wide: bool = False) -> NDArray[np.float32]:
        """float32 [len(batch), dims]; see ``Backend.embed``."""
        if self._static:
            return self._forward(input_ids=batch.input_ids, offsets=batch.cu_seqlens[:-1])
        ids, mask = batch.padded(self._pad_token_id)
        vectors = np.empty((len(batch), self.dims), dtype=np.float32)
        # sentence-transformers takes one prompt length a batch.
        for prompt in np.unique(batch.prompt_lengths):
            rows = np.flatnonzero(batch.prompt_lengths == prompt)
            vectors[rows] = self._forward(
                int(prompt), input_ids=ids[rows], attention_mask=mask[rows]
            )
        return vectors

    def _check_batching(self, pipeline: Pipeline) -> None:
        """Raise ModelNotSupported if the other texts of a batch change a text's vector.

        transformers computes some configs so: with ``is_causal`` true an encoder attends to
        earlier tokens only, unless another text's padding brings a mask.
        """
        if self.tokenizer is None:
            return
        texts = ("one", "one two three four five six seven eight")
        self.tokenizer.backend.no_padding()
        encoded = [tuple(self.tokenizer.backend.encode(text).ids) for text in texts]
        if not all(encoded):
            return
        encodings = [Encoding(ids, len(ids)) for ids in encoded]
        alone = self.embed(Batch.from_encodings(encodings[:1]))[0]
        together = self.embed(Batch.from_encodings(encodings))[0]
        if np.abs(alone - together).max() > _ROUNDING * np.abs(alone).max():
            causal = pipeline.config.get("is_causal")
            named = f" (it sets is_causal {json.dumps(causal)})" if causal is not None else ""
            raise ModelNotSupported(
                f"{pipeline.transformer / 'config.json'} asks for a model{named} whose vectors "
                "depend on what else is in the batch."
            )

    def _forward(self, prompt: int = 0, **arrays: NDArray[np.int64]) -> NDArray[np.float32]:
        import torch

        features: dict[str, Any] = {
            name: torch.from_numpy(array).to(self._model.device) for name, array in arrays.items()
        }
        features["modality"] = "text"
        if prompt:
            features["prompt_length"] = prompt
        try:
            with torch.inference_mode():
                vectors = self._model(features)["sentence_embedding"]
            return np.asarray(vectors.float().cpu().numpy(), dtype=np.float32)
        except RuntimeError as error:
            message = str(error)
            out_of_memory = isinstance(error, torch.OutOfMemoryError)
            if not out_of_memory and not any(text in message for text in _NO_MEMORY):
                raise
        # Out here, so that the error's frames don't keep what filled the memory.
        raise MemoryError(message)


def _own_tokenizer(tokenizer: Any) -> OwnTokenizer:
    if not tokenizer.is_fast:
        raise ModelNotSupported(f"The tokenizer {type(tokenizer).__name__} is not a fast one.")
    # No copy, which would lack split_special_tokens; nothing else uses the original from here on.
    backend = tokenizer.backend_tokenizer
    if tokenizer(_PROBE)["input_ids"] != backend.encode(_PROBE).ids:
        raise ModelNotSupported(
            f"The tokenizer {type(tokenizer).__name__} changes a text before it splits it, which "
            "is not supported."
        )
    return OwnTokenizer(
        backend=backend,
        special_ids=frozenset(tokenizer.all_special_ids),
        pad_id=tokenizer.pad_token_id,
        keep_end=tokenizer.truncation_side == "left",
    )


def load_sentence_transformer(pipeline: Pipeline) -> Any:
    """The SentenceTransformer of ``pipeline``, in float32 and without a final ``Normalize``.

    Raises ModelNotSupported without the extra [torch], if it can't be loaded, and if weights are
    missing in the files or left over.
    """
    try:
        import torch
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.base.modules import Normalize
    except ImportError as error:
        raise ModelNotSupported(
            f"sentence-transformers can't be used ({error}): install the extra [torch], in a "
            "checkout with scripts/install '[torch]'."
        ) from None
    for home in (pipeline.transformer, *(module.folder for module in pipeline.modules)):
        pickle = next(home.glob("pytorch_model*.bin"), None)
        if pickle is not None and not any(home.glob("*.safetensors")):
            raise ModelNotSupported(
                f"{pickle} is a pickle, which can run code and is never read: save the model as "
                "safetensors."
            )
    check_code(pipeline.config)
    try:
        model = SentenceTransformer(
            str(pipeline.folder),
            trust_remote_code=False,
            local_files_only=True,
            # Half-precision weights are computed in float32, as every backend does.
            # A tensor of another shape is refused below, by its name.
            model_kwargs={
                "dtype": torch.float32,
                "use_safetensors": True,
                "ignore_mismatched_sizes": True,
            },
        )
    except Exception as error:
        reason = _reason(error, pipeline.config)
        raise ModelNotSupported(
            f"sentence-transformers can't load {pipeline.folder}: {reason}"
        ) from error
    if model.transformers_model is None:
        _check_table(pipeline.transformer)
    else:
        _check_config(pipeline, model.transformers_model.config)
        _check_weights(model.transformers_model, pipeline.transformer)
    # Scaling belongs to the request (`normalize`), so the model stops before it.
    while isinstance(model[-1], Normalize):
        del model[-1]
    return model.float().eval()


def _reason(error: Exception, config: Mapping[str, Any]) -> str:
    # transformers looks up names, of an activation for example, in dictionaries.
    if isinstance(error, KeyError) and error.args and isinstance(error.args[0], str):
        for key, value in config.items():
            if value == error.args[0] and key != "model_type":
                return f"config.json sets {key} to {value!r}, which transformers does not know."
    return " ".join(str(error).split())


def _check_table(home: Path) -> None:
    """Raise ModelNotSupported for a static model with a tensor that is not read."""
    weights, table = Weights.open(home), "embedding.weight"
    if unread := set(weights) - ({table} if table in weights else TABLE_TENSORS):
        raise _incomplete(home, "drop", unread)


def _check_weights(transformer: Any, home: Path) -> None:
    """Raise ModelNotSupported if ``transformer`` has not exactly the weights in ``home``.

    transformers initialises at random what the checkpoint lacks, drops what its class doesn't
    know, and warns of both.
    """
    prefix = f"{transformer.base_model_prefix}."
    Weights.open(home).check_copies(prefix)
    # The report comes with a model only, and sentence-transformers asks for none.
    _, report = type(transformer).from_pretrained(
        str(home),
        config=copy.deepcopy(transformer.config),
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        use_safetensors=True,
        local_files_only=True,
    )
    unused = unused_tensors(transformer.config.model_type)

    def check(names: Iterable[str], verb: str) -> None:
        if counted := not_matching((name.removeprefix(prefix) for name in names), unused):
            raise _incomplete(home, verb, counted)

    mismatched = (key[0] for key in report["mismatched_keys"])
    check([*report["missing_keys"], *mismatched], "initialise at random")
    check(report["unexpected_keys"], "drop")


def _incomplete(home: Path, verb: str, names: Iterable[str]) -> ModelNotSupported:
    return ModelNotSupported(
        f"{home}: sentence-transformers would {verb} {name_some(sorted(names))}: config.json and "
        "the weights don't belong together, or the model needs its authors' code."
    )


def _check_config(pipeline: Pipeline, config: Any) -> None:
    """Raise ModelNotSupported where transformers' ``config`` differs from what the file means."""
    file, given, values = pipeline.transformer / "config.json", pipeline.config, config.to_dict()
    rotary = values.get("rope_parameters") or {}
    for parameters in (rotary, *rotary.values()):
        kind = parameters.get("rope_type") if isinstance(parameters, dict) else None
        if kind in _SCALED_BY_BATCH:
            raise ModelNotSupported(
                f"{file}: transformers scales the rotary embedding {kind!r} by the longest text of "
                "a batch, so that vectors depend on what else is in it."
            )
    if values.get("attention_type") == "block_sparse":
        raise ModelNotSupported(
            f"{file}: transformers gives up attention_type 'block_sparse' at the first short text; "
            "set it to 'original_full'."
        )
    counted = keys_that_count(given) - {*config.attribute_map, *_OLDER_KEYS}
    if counted and (unread := sorted(counted - type(config)().to_dict().keys())):
        raise ModelNotSupported(
            f"{file} sets {name_some(unread)}, which transformers does not read."
        )
    try:
        meant = architecture_of(given, unknown_too=True)
    except ModelNotSupported:
        return  # not built here: transformers decides what it means
    if architecture_of({**values, "model_type": given["model_type"]}, unknown_too=True) != meant:
        raise ModelNotSupported(
            f"{file}: transformers reads another model from it than it describes."
        )
