# SPDX-License-Identifier: MIT OR Apache-2.0
"""The served models: ``/v1/models``, and the same in OpenAI's shape."""

from __future__ import annotations

from fastapi import APIRouter, Request

from embedding_server.api.documentation import errors
from embedding_server.api.schemas import ModelDetails, ModelNames, OpenAIModel, OpenAIModels
from embedding_server.api.state import state_of
from embedding_server.engine.info import ModelInfo

__all__ = ["router"]

router = APIRouter(tags=["models"])


@router.get("/v1/models", summary="List the served models", responses=errors(401, 503))
async def models(request: Request) -> ModelNames:
    """The names of the served models."""
    registry = state_of(request).registry
    return ModelNames(data=[engine.info.name for engine in registry], object="list")


@router.get("/v1/models/{name:path}", summary="Show one model", responses=errors(401, 404, 503))
async def model(request: Request, name: str) -> ModelDetails:
    """The details of one served model."""
    info = state_of(request).registry[name].info
    return ModelDetails(
        **_openai(info, name).model_dump(),
        dims=info.dims,
        max_tokens=info.max_tokens,
        pooling=info.pooling,
        dimensions=list(info.dimensions) if info.dimensions else None,
        prompts=dict(info.prompts),
        backend=info.backend,
        revision=info.revision,
        sha256=info.sha256,
        fingerprint=info.fingerprint,
    )


@router.get(
    "/openai/v1/models",
    summary="List the served models, in OpenAI's shape",
    responses=errors(401, 503),
)
async def openai_models(request: Request) -> OpenAIModels:
    """The served models, as OpenAI lists its own."""
    registry = state_of(request).registry
    return OpenAIModels(
        data=[_openai(engine.info, engine.info.name) for engine in registry], object="list"
    )


@router.get(
    "/openai/v1/models/{name:path}",
    summary="Show one model, in OpenAI's shape",
    responses=errors(401, 404, 503),
)
async def openai_model(request: Request, name: str) -> OpenAIModel:
    """One served model, as OpenAI shows its own."""
    return _openai(state_of(request).registry[name].info, name)


def _openai(info: ModelInfo, name: str) -> OpenAIModel:
    return OpenAIModel(id=name, object="model", created=info.created, owned_by=info.owned_by)
