# SPDX-License-Identifier: MIT OR Apache-2.0
"""Health and metrics, for operators."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from embedding_server.api.documentation import errors
from embedding_server.api.schemas import ServerStatus
from embedding_server.api.state import state_of
from embedding_server.errors import InferenceTimedOut, NotReady

__all__ = ["router"]

router = APIRouter(tags=["operations"])


@router.get(
    "/health/live",
    summary="Is it alive?",
    response_model_exclude_none=True,
    responses=errors(503),
)
async def live(request: Request) -> ServerStatus:
    """Whether the process answers, no batch hangs and no engine died; never waits on inference."""
    registry = state_of(request).registry
    if registry.hung:
        raise InferenceTimedOut(
            f"A batch of {' and '.join(registry.hung)} has taken longer than --inference-timeout "
            "and may never end: restart the process."
        )
    if registry.dead:
        raise NotReady(
            f"The engine of {' and '.join(registry.dead)} has died; the log says why: restart the "
            "process."
        )
    return ServerStatus(status="live")


@router.get("/health/ready", summary="Is it ready?", responses=errors(503))
@router.get("/health", summary="Is it ready?", responses=errors(503), operation_id="health")
async def ready(request: Request) -> ServerStatus:
    """Whether every model can be used now."""
    state = state_of(request)
    if state.problem:
        raise NotReady(f"Not ready: {state.problem}.")
    return ServerStatus(status="ready", models=state.registry.status())


@router.get(
    "/metrics",
    summary="Metrics for Prometheus",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **errors(401)},
)
async def metrics(request: Request) -> Response:
    """All metrics in Prometheus' text format."""
    state = state_of(request)
    state.telemetry.ready.set(not state.problem)
    content, media_type = state.telemetry.exposition()
    return Response(content, headers={"content-type": media_type})
