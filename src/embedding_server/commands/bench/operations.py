# SPDX-License-Identifier: MIT OR Apache-2.0
"""The floating-point operations that an answer needs, without padding and other waste.

They are those of the linear layers, two for each weight and token, and of attention, two products
of two operations for each pair of tokens that see each other. The rest is below 1 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from embedding_server.backends.architectures import Architecture, Attention, architecture_of
from embedding_server.errors import ModelError
from embedding_server.models.hub import locate
from embedding_server.models.layout import Layout, read_layout
from embedding_server.models.spec import parse_spec
from embedding_server.models.tokenizers import load_tokenizer

__all__ = ["ModelCost", "RequestCost", "linear_weights", "useful_operations"]


def useful_operations(architecture: Architecture, length: int) -> int:
    """The operations for one sequence of ``length`` tokens."""
    width = architecture.heads * architecture.head_dim
    pairs = sum(_pairs(attention, length) for attention in architecture.attention)
    return 2 * linear_weights(architecture) * length + 4 * width * pairs


def linear_weights(architecture: Architecture) -> int:
    """The weights of all layers that every token is multiplied by."""
    hidden, head_dim = architecture.hidden, architecture.head_dim
    heads = 2 * architecture.heads + 2 * architecture.kv_heads  # queries, outputs; keys, values
    mlp = (3 if architecture.gated else 2) * architecture.intermediate
    return len(architecture.attention) * hidden * (heads * head_dim + mlp)


def _pairs(attention: Attention, length: int) -> int:
    """The (query, key) pairs in a sequence."""
    if attention.causal:
        return length * (length + 1) // 2
    if attention.window is None or attention.window >= length:
        return length * length
    window = attention.window  # to each side; the first and the last see less
    return length * (2 * window + 1) - window * (window + 1)


@dataclass(frozen=True, slots=True)
class RequestCost:
    """The tokens and operations of a request."""

    tokens: int
    operations: int


class ModelCost:
    """Counts the costs of requests with a model's tokenizer and sizes."""

    def __init__(self, layout: Layout) -> None:
        """Raises ModelNotSupported for a family whose sizes aren't known here."""
        transformer, config = layout.pipeline.transformer, layout.pipeline.config
        self.architecture = architecture_of(config)
        assert layout.max_tokens is not None  # only static embeddings have no limit
        self.tokenizer = load_tokenizer(
            transformer,
            config,
            max_tokens=layout.max_tokens,
            lowercase=layout.lowercase,
            exclude_prompt=layout.exclude_prompt,
        )
        self._prompt = layout.prompts.get(layout.default_prompt or "", "")

    @classmethod
    def of_model(cls, name: str, models_dir: Path | None) -> ModelCost | None:
        """The counter for the model ``name``; None if it isn't here, or its sizes aren't known."""
        try:
            located = locate(parse_spec(name), models_dir=models_dir, download=False)
            return cls(read_layout(located.folder))
        except ModelError:
            return None

    def of_request(self, texts: Sequence[str]) -> RequestCost:
        """The cost of a request for ``texts``."""
        encodings = self.tokenizer.encode(texts, prompt=self._prompt)
        lengths = [len(encoding.ids) for encoding in encodings]
        operations = sum(useful_operations(self.architecture, length) for length in lengths)
        return RequestCost(sum(lengths), operations)
