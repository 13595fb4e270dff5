# SPDX-License-Identifier: MIT OR Apache-2.0
"""The JSON objects of the API: requests are validated by these, answers documented."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model
from pydantic.json_schema import WithJsonSchema

from embedding_server.engine.parameters import EmbedParams, ParameterRow, parameter_rows
from embedding_server.errors import InvalidRequest

__all__ = [
    "EmbedRequest",
    "Embedding",
    "EmbeddingsRequest",
    "EmbeddingsResponse",
    "ErrorDetails",
    "ErrorResponse",
    "ModelDetails",
    "ModelNames",
    "OpenAIEmbedding",
    "OpenAIEmbeddingsRequest",
    "OpenAIEmbeddingsResponse",
    "OpenAIModel",
    "OpenAIModels",
    "ServerStatus",
    "Usage",
    "json_type",
]

Inputs = list[str] | list[list[int]]

_JSON_TYPES = {
    str: "a string", int: "a whole number", float: "a number", bool: "a boolean",
    list: "a list", dict: "an object", type(None): "null",
}  # fmt: skip


def json_type(value: object) -> str:
    """The name of the JSON type of ``value``, with its article."""
    return _JSON_TYPES[type(value)]


def _inputs(value: object) -> Inputs:
    """``input``, in one of its four forms, as a list of inputs; raises InvalidRequest."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise InvalidRequest(
            "'input' must be a string, a list of strings, a list of token ids or a list of lists "
            "of token ids.",
            param="input",
        )
    if not value:
        raise InvalidRequest("'input' is an empty list; send at least one text.", param="input")
    kind = type(value[0])
    allowed = {kind} & {str, int, list}
    if set(map(type, value)) != allowed:
        index = next(place for place, item in enumerate(value) if type(item) not in allowed)
        raise InvalidRequest(
            f"is {json_type(value[index])}; 'input' may hold strings, or token ids, or lists of "
            "token ids, and nothing else beside them.",
            param="input",
            index=index,
        )
    if kind is str:
        return value
    if kind is int:
        return [value]
    for index, ids in enumerate(value):
        if not ids:
            raise InvalidRequest("is an empty list.", param="input", index=index)
        if set(map(type, ids)) != {int}:
            raise InvalidRequest(
                "must hold token ids (whole numbers) only.", param="input", index=index
            )
    return value


_INPUT_SCHEMA = {
    "title": "Input",
    "description": "What to embed: one text, several, or the model's own token ids, with "
    "all special tokens of its template or without any. Ids of another tokenizer give a wrong "
    "vector, and LangChain's OpenAIEmbeddings sends such ids unless "
    "check_embedding_ctx_length=False: under /openai/v1 ids are taken only with "
    "--openai-token-ids, or if x-embedding-fingerprint shows that the client knows the model.",
    "oneOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
        {
            "type": "array",
            "items": {
                "type": "array",
                "items": {"type": "integer", "minimum": 0},
                "minItems": 1,
            },
            "minItems": 1,
        },
    ],
    "examples": [["iPhone", "Samsung"]],
}


class EmbedRequest(BaseModel):
    """The fields that every dialect has; ``EmbedParams`` declares the others."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    model: str = Field(
        description="a served model: its name, its hub id, or that id with @revision",
        examples=["all-MiniLM-L6-v2"],
    )
    input: Annotated[Any, BeforeValidator(_inputs), WithJsonSchema(_INPUT_SCHEMA)]
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="float: a list of numbers (default); base64: of the little-endian values"
    )
    user: str | None = Field(None, description="accepted, unused")

    @property
    def params(self) -> EmbedParams:
        """The options that the request sets; null leaves the default."""
        given = self.__dict__
        names = self.model_fields_set & _OPTIONS
        return EmbedParams(**{name: given[name] for name in names if given[name] is not None})


def _request_schema(name: str, doc: str, rows: Iterable[ParameterRow]) -> type[EmbedRequest]:
    fields: dict[str, Any] = {
        row.name: (row.annotation | None, Field(None, description=_description(row)))
        for row in rows
    }
    return create_model(name, __base__=EmbedRequest, __doc__=doc, **fields)


def _description(row: ParameterRow) -> str:
    if row.default is None:
        return row.help
    return f"{row.help} (default {str(row.default).lower()})"


_OPTIONS = frozenset(row.name for row in parameter_rows())

EmbeddingsRequest = _request_schema(
    "EmbeddingsRequest",
    "A request for embeddings; null means a field's default.",
    parameter_rows(),
)

OpenAIEmbeddingsRequest = _request_schema(
    "OpenAIEmbeddingsRequest",
    "What OpenAI documents for ``POST /embeddings``.",
    [row for row in parameter_rows() if row.name == "dimensions"],
)


class _Answer(BaseModel):
    model_config = ConfigDict(protected_namespaces=())


class Usage(_Answer):
    """Tokens that were computed, special tokens included."""

    prompt_tokens: int
    total_tokens: int


class OpenAIEmbedding(_Answer):
    """One input's vector."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str = Field(description="numbers, or base64 if that was asked for")


class Embedding(OpenAIEmbedding):
    """One input's vector; ``truncated`` and ``tokens`` are there only if the input was cut."""

    dims: int = Field(description="values in the vector, before bits are packed into bytes")
    truncated: Literal[True] | None = Field(None, description="the input was cut")
    tokens: int | None = Field(None, description="the input's full length")


class OpenAIEmbeddingsResponse(_Answer):
    """The vectors in the order of the inputs."""

    object: Literal["list"]
    model: str
    data: list[OpenAIEmbedding]
    usage: Usage


class EmbeddingsResponse(_Answer):
    """The vectors in the order of the inputs."""

    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: Usage


class ModelNames(_Answer):
    """The names of the served models."""

    data: list[str] = Field(examples=[["all-MiniLM-L6-v2"]])
    object: Literal["list"]


class OpenAIModel(_Answer):
    """A model as OpenAI describes one."""

    id: str
    object: Literal["model"]
    created: int = Field(description="Unix time of the weights, in seconds")
    owned_by: str


class OpenAIModels(_Answer):
    """The served models."""

    data: list[OpenAIModel]
    object: Literal["list"]


class ModelDetails(OpenAIModel):
    """Everything about a served model."""

    dims: int = Field(description="length of a full vector")
    max_tokens: int = Field(description="longest input that isn't cut")
    pooling: str
    dimensions: list[int] | None = Field(description="the trained Matryoshka sizes")
    prompts: dict[str, str]
    backend: str
    revision: str | None
    sha256: str | None = Field(description="of model.safetensors")
    fingerprint: str = Field(description="changes whenever stored vectors would no longer match")


class ServerStatus(_Answer):
    """Alive, or ready with every model."""

    status: Literal["live", "ready"]
    models: dict[str, str] | None = None


class ErrorDetails(_Answer):
    """An error, for people and for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(_Answer):
    """The one shape of every error."""

    error: ErrorDetails
