# SPDX-License-Identifier: MIT OR Apache-2.0
"""The options of a request, and what a model makes of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from embedding_server.engine.info import ModelInfo
from embedding_server.errors import InvalidRequest

__all__ = [
    "EmbedParams",
    "OutputDtype",
    "ParameterRow",
    "check_dimensions",
    "parameter_rows",
    "prompt_of",
]

OutputDtype = Literal["float", "int8", "uint8", "binary", "ubinary"]

_PROMPT_SYNONYMS = {
    "query": ("query", "search_query"),
    "document": ("document", "passage", "corpus", "search_document"),
}
"""The prompts that an ``input_type`` stands for: the first one that the model has, or none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedParams:
    """The options of a request: its JSON fields and the flags of ``embed`` are made from these."""

    dimensions: int | None = field(
        default=None,
        metadata={
            "help": "cut each vector to that many values, then normalize it; fewer than the "
            "model's full size only if it is a Matryoshka model"
        },
    )
    input_type: str | None = field(
        default=None,
        metadata={"help": "'query', 'document' or a prompt's name: prepend that prompt"},
    )
    prompt: str | None = field(default=None, metadata={"help": "prepend this text to every input"})
    truncate: bool = field(
        default=True,
        metadata={"help": "cut an input that is too long for the model, or else refuse it"},
    )
    normalize: bool = field(
        default=True,
        metadata={"help": "scale each vector to length 1, or else leave the model's own output"},
    )
    output_dtype: OutputDtype = field(
        default="float", metadata={"help": "quantize the vectors to this type"}
    )


@dataclass(frozen=True, slots=True)
class ParameterRow:
    """One field of ``EmbedParams``."""

    name: str
    type: type[int] | type[str] | type[bool]
    choices: tuple[str, ...]
    """All allowed values; empty if there is no such list."""
    default: Any
    help: str
    annotation: Any
    """The type with its choices or None, as a type checker reads it."""


def parameter_rows() -> Iterator[ParameterRow]:
    """Every field of ``EmbedParams``, in order."""
    annotations = get_type_hints(EmbedParams)
    for one in fields(EmbedParams):
        annotation = annotations[one.name]
        choices = get_args(annotation) if get_origin(annotation) is Literal else ()
        plain = str if choices else next(iter(get_args(annotation)), annotation)
        yield ParameterRow(one.name, plain, choices, one.default, one.metadata["help"], annotation)


def check_dimensions(info: ModelInfo, dimensions: int | None) -> None:
    """Raise InvalidRequest if the model can't make vectors of ``dimensions`` values.

    Every model accepts its full size, which many clients always send.
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
    """The text to prepend; raises InvalidRequest for a prompt that the model doesn't have."""
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
