# SPDX-License-Identifier: MIT OR Apache-2.0
"""What a request may ask of its vectors, and what a model makes of it."""

from __future__ import annotations

from dataclasses import dataclass

from embedding_server.engine.info import ModelInfo
from embedding_server.engine.postprocess import OutputDtype
from embedding_server.errors import InvalidRequest

__all__ = ["EmbedParams", "check_dimensions", "prompt_of"]

_PROMPT_SYNONYMS = {
    "query": ("query", "search_query"),
    "document": ("document", "passage", "corpus", "search_document"),
}
"""What ``input_type`` may mean: the first of these prompts that the model has, else none."""


@dataclass(frozen=True, slots=True)
class EmbedParams:
    """What one request wants of its vectors."""

    dimensions: int | None = None
    input_type: str | None = None
    prompt: str | None = None
    truncate: bool = True
    normalize: bool = True
    output_dtype: OutputDtype = "float"


def check_dimensions(info: ModelInfo, dimensions: int | None) -> None:
    """Raise InvalidRequest if the model can't give vectors of ``dimensions`` values.

    Its full size is given by every model: many clients always send it.
    """
    if dimensions is None or dimensions == info.dims:
        return
    if info.dimensions is None:
        raise InvalidRequest(
            f"The model {info.name!r} was not trained for shorter vectors: leave out "
            f"'dimensions', or send its full size, {info.dims}.",
            param="dimensions",
        )
    if not 1 <= dimensions <= info.dims:
        raise InvalidRequest(
            f"'dimensions' must be from 1 to {info.dims} for the model {info.name!r}; it was "
            f"trained for {', '.join(map(str, info.dimensions))}.",
            param="dimensions",
        )


def prompt_of(info: ModelInfo, params: EmbedParams) -> str:
    """What to prepend; raises InvalidRequest for a prompt that the model doesn't have."""
    if params.prompt is not None:
        if params.input_type is not None:
            raise InvalidRequest(
                "Send 'input_type' or 'prompt', not both: each says what to prepend.",
                param="prompt",
            )
        return params.prompt
    name = info.default_prompt if params.input_type is None else params.input_type
    if name is None:
        return ""
    for candidate in _PROMPT_SYNONYMS.get(name, (name,)):
        if candidate in info.prompts:
            return info.prompts[candidate]
    if name in _PROMPT_SYNONYMS:
        return ""  # as sentence-transformers' encode_query and encode_document
    known = ", ".join(repr(prompt) for prompt in info.prompts) or "none"
    raise InvalidRequest(
        f"The model {info.name!r} has no prompt {name[:100]!r}; it has: {known}.",
        param="input_type",
    )
