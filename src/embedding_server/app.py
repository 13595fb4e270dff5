"""Wires settings, models and routes into one ASGI application."""

from __future__ import annotations

import asyncio
import logging
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from embedding_server import __version__
from embedding_server.api import docs_page, embeddings, health, models
from embedding_server.api.body import Bodies
from embedding_server.api.cors import Cors
from embedding_server.api.documentation import use_own_openapi
from embedding_server.api.errors import add_error_handlers
from embedding_server.api.keys import ApiKeys
from embedding_server.api.middleware import (
    ApiKeyMiddleware,
    DirectRoutes,
    RequestMiddleware,
    RootPath,
)
from embedding_server.engine.engine import Limits
from embedding_server.errors import ConfigurationError
from embedding_server.models.catalog import DEFAULT_MODELS
from embedding_server.models.loader import LoadOptions
from embedding_server.models.registry import Registry
from embedding_server.models.spec import ModelSpec, parse_spec
from embedding_server.settings import Settings, available_cores
from embedding_server.telemetry import Telemetry

if TYPE_CHECKING:
    from embedding_server.api.tracing import Tracing

__all__ = ["create_app"]

logger = logging.getLogger(__name__)

_ROUTERS = (embeddings.router, models.router, health.router, docs_page.router)


def create_app(
    settings: Settings,
    *,
    on_loaded: Callable[[], None] = lambda: None,
    on_load_error: Callable[[Exception], None] | None = None,
) -> FastAPI:
    """The application of ``settings``; its models are loaded while it answers health already.

    ``on_loaded`` is called when all are loaded; ``on_load_error`` if they can't be served, without
    which the application stays up and not ready. ``app.state.api_keys.reload()`` reads the file of
    keys again. Raises ModelUnavailable for a --model that can't be understood, and
    ConfigurationError for two of the same name, for keys, origins or a prefix that can't work, and
    for an --otlp-endpoint without its extra.
    """
    keys = ApiKeys((key.get_secret_value() for key in settings.api_key), settings.api_key_file)
    prefix = _prefix(settings.root_path)
    telemetry = Telemetry()
    tracing = _tracing(settings.otlp_endpoint)
    registry = Registry(
        _specs(settings),
        _load_options(settings),
        telemetry=telemetry,
        models_dir=settings.load_models_from,
        hf_token=settings.hub_token,
    )

    async def load() -> None:
        try:
            await registry.load()
            on_loaded()
        except Exception as error:
            logger.debug("loading failed", exc_info=error)
            if on_load_error is None:
                logger.critical("No model is served: %s", error)
            else:
                on_load_error(error)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(load(), name="loading models")
        try:
            yield
        finally:
            loading.cancel()
            await asyncio.gather(loading, return_exceptions=True)
            await registry.close()
            if tracing is not None:
                await asyncio.to_thread(tracing.close)

    app = _Application(
        title="embedding-server",
        version=__version__,
        description="Text in, sentence embeddings out.",
        lifespan=lifespan,
        openapi_url=None,  # and so no page that loads its scripts from elsewhere
        redirect_slashes=False,
        # Its own would come beside ours, and it sends them to wherever OTEL_ variables say.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    app.state.settings = settings
    app.state.telemetry = telemetry
    app.state.registry = registry
    app.state.draining = False
    app.state.siblings = ""  # what is wrong with other processes of this server
    app.state.bodies = Bodies(max_body_bytes=settings.max_body_bytes, timeout=settings.body_timeout)
    app.state.api_keys = keys
    for router in _ROUTERS:
        app.include_router(router)
    for router in (models.router, health.router, docs_page.router):
        app.include_router(_heads_of(router))
    add_error_handlers(app)
    use_own_openapi(app, prefix=prefix)
    front: ASGIApp = DirectRoutes(app.inner, endpoints=embeddings.DIRECT)
    if keys:
        front = ApiKeyMiddleware(
            front, keys=keys, metrics_public=settings.metrics_public, route_of=_route_of
        )
    if prefix:
        front = RootPath(front, prefix=prefix)
    if settings.cors_origin:  # outside of the keys, as a browser asks for leave without one
        front = Cors(front, origins=settings.cors_origin)
    # The outermost: a refused key has a log line and an id, too.
    app.front = RequestMiddleware(front, telemetry=telemetry, tracing=tracing)
    return app


class _Application(FastAPI):
    """FastAPI behind our own middleware: short requests pass through none of its many layers."""

    front: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = self
        await self.front(scope, receive, send)

    async def inner(self, scope: Scope, receive: Receive, send: Send) -> None:
        """FastAPI itself."""
        await super().__call__(scope, receive, send)


def _routes(routers: Iterable[APIRouter]) -> Iterator[APIRoute]:
    return (route for router in routers for route in router.routes if isinstance(route, APIRoute))


def _heads_of(router: APIRouter) -> APIRouter:
    """HEAD for what ``router`` has GET for: servers leave out the body, and probes ask so."""
    heads = APIRouter(include_in_schema=False)
    for route in _routes([router]):
        heads.add_api_route(
            route.path,
            route.endpoint,
            methods=["HEAD"],
            response_model_exclude_none=route.response_model_exclude_none,
        )
    return heads


def _route_of(path: str) -> str:
    """The template of the route that takes ``path``, by any method."""
    return next(
        (route.path_format for route in _routes(_ROUTERS) if route.path_regex.match(path)),
        "unmatched",
    )


def _prefix(root_path: str) -> str:
    """--root-path without a slash at its end; raises ConfigurationError."""
    prefix = root_path.rstrip("/")
    if prefix and not re.fullmatch(r"(/(?!\.\.?(/|$))[A-Za-z0-9._~-]+)+", prefix):
        raise ConfigurationError(
            f"--root-path {root_path!r} must be the beginning of a path, as /embeddings: a slash "
            "first, and between slashes letters, digits and -._~ only."
        )
    for route in _routes(_ROUTERS):
        if f"{route.path}/".startswith(f"{prefix}/") and prefix:
            raise ConfigurationError(
                f"--root-path {prefix} is the beginning of {route.path}, a path of the server's "
                "own: a proxy that passes such paths on as they are needs no --root-path."
            )
    return prefix


def _tracing(endpoint: str | None) -> Tracing | None:
    """Traces to ``endpoint``; without one, nothing of OpenTelemetry's SDK is loaded."""
    if endpoint is None:
        return None
    try:
        from embedding_server.api.tracing import Tracing
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"--otlp-endpoint can't be used ({error}): install the extra [otlp] with "
            "pip install 'embedding-server[otlp]', in a checkout with scripts/install '[otlp]'."
        ) from None
    return Tracing(endpoint)


def _specs(settings: Settings) -> list[ModelSpec]:
    names = settings.served_model_name
    if names and len(names) != len(settings.model):
        raise ConfigurationError(
            f"--served-model-name is given {len(names)} times for {len(settings.model)} --model; "
            "give one name for each model, in the same order."
        )
    if settings.revision and len(settings.model) != 1:
        raise ConfigurationError(
            "--revision needs exactly one --model; else write --model ID@REVISION."
        )
    requested = bool(settings.model)
    specs = [
        parse_spec(text, revision=settings.revision, requested=requested)
        for text in settings.model or DEFAULT_MODELS
    ]
    if names:
        specs = [replace(spec, alias=name) for spec, name in zip(specs, names, strict=True)]
    served = Counter(spec.served_name for spec in specs)
    twice = [name for name, count in served.items() if count > 1]
    if twice:
        raise ConfigurationError(
            f"More than one --model would be served as {', '.join(twice)}: give each a "
            "name of its own with --served-model-name."
        )
    if unknown := set(settings.matryoshka_sizes) - set(served):
        raise ConfigurationError(
            f"--matryoshka names {', '.join(unknown)}, which isn't served; there are: "
            f"{', '.join(served)}."
        )
    return specs


def _load_options(settings: Settings) -> LoadOptions:
    """How ``settings`` want models to be run."""
    return LoadOptions(
        backend=settings.backend,
        threads=settings.threads or max(1, available_cores() // settings.workers),
        onnx_file=settings.onnx_file,
        max_batch_tokens=settings.max_batch_tokens,
        matryoshka=settings.matryoshka_sizes,
        inference_timeout=settings.inference_timeout,
        limits=Limits(
            max_concurrent_requests=settings.max_concurrent_requests,
            max_queued_tokens=settings.max_queued_tokens,
            max_request_tokens=settings.max_request_tokens,
        ),
    )
