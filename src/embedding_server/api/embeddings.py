# SPDX-License-Identifier: MIT OR Apache-2.0
"""``/v1/embeddings`` and ``/openai/v1/embeddings``."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from starlette.requests import ClientDisconnect

from embedding_server.api.body import Body
from embedding_server.api.deadline import within_deadline
from embedding_server.api.documentation import errors, json_body
from embedding_server.api.encoding import encode_embeddings
from embedding_server.api.extent import check_extent
from embedding_server.api.fingerprint import FINGERPRINT_HEADER, knows_model
from embedding_server.api.middleware import Endpoint
from embedding_server.api.record import record_of
from embedding_server.api.schemas import (
    EmbeddingsRequest,
    EmbeddingsResponse,
    EmbedRequest,
    OpenAIEmbeddingsRequest,
    OpenAIEmbeddingsResponse,
    parse,
)
from embedding_server.engine.engine import CHARACTERS_PER_TOKEN
from embedding_server.errors import InvalidRequest
from embedding_server.models.registry import Registry
from embedding_server.settings import Settings

__all__ = ["DIRECT", "router"]

Result = TypeVar("Result")

router = APIRouter(tags=["embeddings"])

_INLINE_BYTES = 256 * 1024

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
    return await within_deadline(_embeddings, request)


@router.post(
    "/openai/v1/embeddings",
    summary="Embed texts, in OpenAI's shape",
    response_class=Response,
    responses=_responses(OpenAIEmbeddingsResponse),
    openapi_extra=json_body(OpenAIEmbeddingsRequest),
)
async def openai_embeddings(request: Request) -> Response:
    """Takes and answers only what OpenAI documents."""
    return await within_deadline(_openai_embeddings, request)


DIRECT: Mapping[tuple[str, str], Endpoint] = {
    ("POST", "/v1/embeddings"): embeddings,
    ("POST", "/openai/v1/embeddings"): openai_embeddings,
}
"""The routes that are called by the thousand."""


async def _embeddings(request: Request) -> Response:
    body = Body(request.app.state.bodies)
    try:
        query = await _parse(EmbeddingsRequest, body, request)
        return await _answer(request, query, openai=False)
    finally:
        body.close()


async def _openai_embeddings(request: Request) -> Response:
    body = Body(request.app.state.bodies)
    try:
        query = await _parse(OpenAIEmbeddingsRequest, body, request)
        return await _answer(request, query, openai=True)
    finally:
        body.close()


async def _parse(schema: type[EmbedRequest], body: Body, request: Request) -> EmbedRequest:
    """Out of the event loop where it takes long; health must be answered meanwhile."""
    content = await body.read(request)
    if len(content) <= _INLINE_BYTES:
        return parse(schema, content)
    settings: Settings = request.app.state.settings

    def parse_large() -> EmbedRequest:
        ids = settings.max_request_tokens * CHARACTERS_PER_TOKEN
        check_extent(content, inputs=settings.max_client_batch_size, ids=ids)
        return parse(schema, content)

    return await body.in_thread(parse_large)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of ``work``, which is cancelled when the client hangs up.

    Raises ClientDisconnect then. ASGI servers tell a hang-up only to those who wait for it.
    """
    task = asyncio.current_task()
    assert task is not None
    working, stopped = True, False

    def stop(hung_up: asyncio.Task[None]) -> None:
        nonlocal stopped
        if not hung_up.cancelled():
            hung_up.exception()  # a server that can't tell any more has lost its client, too
        if working:
            stopped = task.cancel()

    hung_up = asyncio.ensure_future(_hung_up(request))
    hung_up.add_done_callback(stop)
    try:
        return await work
    except asyncio.CancelledError:
        if not stopped or task.uncancel() > 0:  # by another, too
            raise
        raise ClientDisconnect from None
    finally:
        working = False
        hung_up.cancel()


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _answer(request: Request, query: EmbedRequest, *, openai: bool) -> Response:
    registry: Registry = request.app.state.registry
    settings: Settings = request.app.state.settings
    record = record_of(request.scope)
    engine = registry[query.model]
    record.model = engine.info.name
    record.inputs = len(query.input)
    takes_ids = knows_model(request, engine.info) or not openai or settings.openai_token_ids
    if not takes_ids and not isinstance(query.input[0], str):
        raise InvalidRequest(
            "'input' holds token ids, which are not taken here: most clients send those of "
            "OpenAI's models, and their vectors would be wrong. Send text instead; in LangChain's "
            "OpenAIEmbeddings set check_embedding_ctx_length=False. Whoever has the ids of this "
            "model's own tokenizer sends its fingerprint, too, as the header "
            f"{FINGERPRINT_HEADER}, or starts the server with --openai-token-ids.",
            param="input",
            code="token_ids_refused",
        )
    if len(query.input) > settings.max_client_batch_size:
        raise InvalidRequest(
            f"'input' has {len(query.input)} inputs; at most {settings.max_client_batch_size} are "
            "taken in one request. Send them in parts.",
            param="input",
        )
    result = await _unless_gone(request, engine.embed(query.input, query.params, record.stages))
    record.tokens, record.truncated = result.tokens, result.truncated

    def encode() -> bytes:
        return encode_embeddings(
            result,
            model=query.model,
            encoding_format=query.encoding_format or "float",
            openai=openai,
        )

    small = result.vectors.size <= _INLINE_VALUES
    content = encode() if small else await asyncio.to_thread(encode)
    headers = {FINGERPRINT_HEADER: engine.info.fingerprint}
    if result.truncated:
        headers["x-truncated-inputs"] = str(result.truncated)
    return Response(content, media_type="application/json", headers=headers)
