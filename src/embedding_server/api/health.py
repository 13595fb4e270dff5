# SPDX-License-Identifier: MIT OR Apache-2.0
"""For those who operate the server: health and metrics."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from embedding_server.api.documentation import errors
from embedding_server.api.schemas import ServerStatus
from embedding_server.errors import InferenceTimedOut, NotReady
from embedding_server.models.registry import Registry
from embedding_server.telemetry import Telemetry

__all__ = ["router"]

router = APIRouter(tags=["operations"])


@router.get(
    "/health/live",
    summary="Is it alive?",
    response_model_exclude_none=True,
    responses=errors(503),
)
async def live(request: Request) -> ServerStatus:
    """Whether the process answers at all and no batch hangs; never waits on inference."""
    registry: Registry = request.app.state.registry
    if registry.hung:
        raise InferenceTimedOut(
            f"A batch of {' and '.join(registry.hung)} has taken longer than --inference-timeout "
            "and may never end: restart the process."
        )
    return ServerStatus(status="live")


@router.get("/health/ready", summary="Is it ready?", responses=errors(503))
@router.get("/health", summary="Is it ready?", responses=errors(503), operation_id="health")
async def ready(request: Request) -> ServerStatus:
    """Whether every model can be used now."""
    registry: Registry = request.app.state.registry
    if request.app.state.draining:
        raise NotReady("Not ready: the server is draining, and will end.")
    if request.app.state.siblings:
        raise NotReady(f"Not ready: {request.app.state.siblings}.")
    status = registry.status()
    if not registry.ready:
        states = ", ".join(f"{name} is {state}" for name, state in status.items())
        raise NotReady(f"Not ready: {states}.")
    return ServerStatus(status="ready", models=status)


@router.get(
    "/metrics",
    summary="Metrics for Prometheus",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **errors(401)},
)
async def metrics(request: Request) -> Response:
    """Everything that is measured, in Prometheus' text format."""
    telemetry: Telemetry = request.app.state.telemetry
    content, media_type = telemetry.exposition()
    return Response(content, headers={"content-type": media_type})
