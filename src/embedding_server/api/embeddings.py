# SPDX-License-Identifier: MIT OR Apache-2.0
"""``/v1/embeddings`` and ``/openai/v1/embeddings``."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from embedding_server.api.body import Body
from embedding_server.api.documentation import errors, json_body
from embedding_server.api.encoding import encode_embeddings
from embedding_server.api.headers import FINGERPRINT_HEADER, single_header
from embedding_server.api.lifetime import Lifetime
from embedding_server.api.middleware import Endpoint
from embedding_server.api.record import record_of
from embedding_server.api.schemas import (
    EmbeddingsRequest,
    EmbeddingsResponse,
    EmbedRequest,
    OpenAIEmbeddingsRequest,
    OpenAIEmbeddingsResponse,
)
from embedding_server.api.state import state_of
from embedding_server.engine.info import ModelInfo
from embedding_server.errors import FingerprintMismatch, InvalidRequest
from embedding_server.settings import Settings

__all__ = ["DIRECT", "router"]

router = APIRouter(tags=["embeddings"])

_FINGERPRINT = FINGERPRINT_HEADER.encode("ascii")

# Up to here an answer is serialised in well under a millisecond, in the event loop.
_INLINE_VALUES = 32 * 1024

_ERRORS = errors(400, 401, 404, 408, 409, 413, 415, 429, 500, 503, 504)


def _responses(schema: type[Any]) -> dict[int | str, dict[str, Any]]:
    headers = {
        "x-truncated-inputs": {
            "description": "how many inputs were cut to the model's length; only there if any was",
            "schema": {"type": "integer"},
        },
        FINGERPRINT_HEADER: {
            "description": "the model's fingerprint: changes whenever stored vectors would no "
            "longer match",
            "schema": {"type": "string"},
        },
    }
    return {200: {"model": schema, "headers": headers}, **_ERRORS}


@router.post(
    "/v1/embeddings",
    summary="Embed texts",
    response_class=Response,
    responses=_responses(EmbeddingsResponse),
    openapi_extra=json_body(EmbeddingsRequest),
)
@router.get(
    "/v1/embeddings",
    summary="Embed texts (a GET with a JSON body, as some clients send)",
    response_class=Response,
    responses=_responses(EmbeddingsResponse),
    openapi_extra=json_body(EmbeddingsRequest),
    operation_id="get_embeddings",
)
async def embeddings(request: Request) -> Response:
    """Turns each input into one vector; the answer keeps their order."""
    return await _embed(request, EmbeddingsRequest, openai=False)


@router.post(
    "/openai/v1/embeddings",
    summary="Embed texts, in OpenAI's shape",
    response_class=Response,
    responses=_responses(OpenAIEmbeddingsResponse),
    openapi_extra=json_body(OpenAIEmbeddingsRequest),
)
async def openai_embeddings(request: Request) -> Response:
    """Takes and answers only what OpenAI documents."""
    return await _embed(request, OpenAIEmbeddingsRequest, openai=True)


DIRECT: Mapping[tuple[str, str], Endpoint] = {
    ("POST", "/v1/embeddings"): embeddings,
    ("POST", "/openai/v1/embeddings"): openai_embeddings,
}
"""Routes that skip FastAPI's router, as it takes longer than all else we do to a short request."""


async def _embed(request: Request, schema: type[EmbedRequest], *, openai: bool) -> Response:
    state = state_of(request)
    record = record_of(request.scope)
    async with Lifetime(request, state.body_clock) as lifetime:
        with Body(state.bodies) as body:
            content = await body.read(request)
            lifetime.body_read()
            query = await body.parse(content, schema)
            engine = state.registry[query.model]
            record.model = engine.info.name
            record.inputs = len(query.input)
            knows_model = _knows_model(request, engine.info)
            _check_input(query, state.settings, ids=knows_model or not openai)
            result = await engine.embed(query.input, query.params, record.stages)
            record.tokens, record.truncated = result.tokens, result.truncated
            encode = partial(
                encode_embeddings,
                result,
                model=query.model,
                encoding_format=query.encoding_format or "float",
                openai=openai,
            )
            small = result.vectors.size <= _INLINE_VALUES
            answer = encode() if small else await asyncio.to_thread(encode)
    headers = {FINGERPRINT_HEADER: engine.info.fingerprint}
    if result.truncated:
        headers["x-truncated-inputs"] = str(result.truncated)
    return Response(answer, media_type="application/json", headers=headers)


def _knows_model(request: Request, info: ModelInfo) -> bool:
    """Whether the request carries the fingerprint of the model that ``info`` describes.

    Raises FingerprintMismatch if it carries another one, and InvalidRequest if it carries several.
    """
    value = single_header(request.scope, _FINGERPRINT)
    if value is None:
        return False
    sent = value.decode("latin-1")
    if not sent or sent != info.fingerprint:
        raise FingerprintMismatch(
            f"Your stored vectors, with the fingerprint {sent[:100]!r}, and the model "
            f"{info.name!r}, with the fingerprint {info.fingerprint!r}, do not match. Embed your "
            "texts again, or serve the model that made the stored vectors.",
            param=FINGERPRINT_HEADER,
        )
    return True


def _check_input(query: EmbedRequest, settings: Settings, *, ids: bool) -> None:
    """Raise InvalidRequest for too many inputs, and for token ids unless ``ids`` allows them."""
    if not (ids or settings.openai_token_ids or isinstance(query.input[0], str)):
        raise InvalidRequest(
            "'input' holds token ids, which are not taken here: most clients send those of "
            "OpenAI's models, and their vectors would be wrong. Send text instead; in LangChain's "
            "OpenAIEmbeddings set check_embedding_ctx_length=False. If you have the ids of this "
            "model's own tokenizer, send its fingerprint, too, as the header "
            f"{FINGERPRINT_HEADER}, or start the server with --openai-token-ids.",
            param="input",
            code="token_ids_refused",
        )
    if len(query.input) > settings.max_client_batch_size:
        raise InvalidRequest(
            f"'input' has {len(query.input)} inputs; at most {settings.max_client_batch_size} are "
            "taken in one request. Send them in parts.",
            param="input",
        )
