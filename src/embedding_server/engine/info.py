# SPDX-License-Identifier: MIT OR Apache-2.0
"""The facts about a served model that its users need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["ModelInfo"]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """One served model; ``/v1/models/{name}`` shows these fields."""

    name: str
    architecture: str
    """``model_type`` of its config, as ``bert``."""
    dims: int
    """Length of a full embedding."""
    max_tokens: int
    """Longest input that isn't cut, special tokens and prompt included."""
    pooling: str
    dimensions: tuple[int, ...] | None = None
    """The trained Matryoshka sizes, ascending; None if the model was not trained so."""
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    """Name of the prompt that is prepended when the request names none."""
    layer_norm: bool = False
    """Layer-normalise before cutting to a Matryoshka size, as nomic-embed-text-v1.5 asks."""
    backend: str = ""
    backend_reason: str = ""
    """Why that backend was chosen, in words."""
    revision: str | None = None
    sha256: str | None = None
    fingerprint: str = ""
    """Changes whenever stored vectors would no longer match; see docs/models.md."""
    created: int = 0
    """Unix time of the weights file, in seconds."""
    owned_by: str = "local"
