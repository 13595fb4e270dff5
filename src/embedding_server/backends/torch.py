# SPDX-License-Identifier: MIT OR Apache-2.0
"""The reference: the whole sentence-transformers pipeline on PyTorch, on the device it finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import numpy as np
import tokenizers
from numpy.typing import NDArray

from embedding_server.backends.base import BackendOptions, OwnTokenizer, Pipeline
from embedding_server.engine.batch import Batch
from embedding_server.errors import ModelNotSupported

__all__ = ["TorchBackend", "load_sentence_transformer"]


# What it says of the CPU's memory and of Apple's, for which it has no exception.
_NO_MEMORY = ("can't allocate memory", "out of memory")


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
        model = load_sentence_transformer(pipeline.folder)
        import torch

        torch.set_num_threads(options.threads)
        return cls(model, pipeline)

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
            told = any(said in message for said in _NO_MEMORY)
            if not told and not isinstance(error, torch.OutOfMemoryError):
                raise
        # Out here, so that the error's frames don't keep what filled the memory.
        raise MemoryError(message)


def _own_tokenizer(tokenizer: Any) -> OwnTokenizer:
    if not tokenizer.is_fast:
        raise ModelNotSupported(f"The tokenizer {type(tokenizer).__name__} is not a fast one.")
    return OwnTokenizer(
        backend=tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
        special_ids=frozenset(tokenizer.all_special_ids),
        keep_end=tokenizer.truncation_side == "left",
    )


def load_sentence_transformer(folder: Path) -> Any:
    """The SentenceTransformer in ``folder``, in float32 and without a final ``Normalize``.

    Raises ModelNotSupported without the extra [torch], or if it can't be loaded.
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
    for pickle in folder.rglob("pytorch_model*.bin"):
        if not any(pickle.parent.glob("*.safetensors")):
            raise ModelNotSupported(
                f"{pickle} is a pickle, which can run code and is never read: save the model as "
                "safetensors."
            )
    try:
        model = SentenceTransformer(
            str(folder),
            trust_remote_code=False,
            local_files_only=True,
            # Half-precision weights are computed in float32, as every backend does.
            model_kwargs={"dtype": torch.float32, "use_safetensors": True},
        )
    except Exception as error:
        raise ModelNotSupported(f"sentence-transformers can't load {folder}: {error}") from error
    # Scaling belongs to the request (`normalize`), so the model stops before it.
    while isinstance(model[-1], Normalize):
        del model[-1]
    return model.float().eval()
