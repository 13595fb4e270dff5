# SPDX-License-Identifier: MIT OR Apache-2.0
"""Builds one ASGI application from settings, models and routes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from embedding_server import __version__
from embedding_server.api import embeddings
from embedding_server.api.body import Bodies
from embedding_server.api.cors import Cors
from embedding_server.api.documentation import errors, openapi_document
from embedding_server.api.errors import add_error_handlers
from embedding_server.api.keys import ApiKeys
from embedding_server.api.lifetime import BodyClock
from embedding_server.api.middleware import (
    ApiKeyMiddleware,
    DirectRoutes,
    RequestMiddleware,
    RootPath,
)
from embedding_server.api.routes import ROUTERS, heads, prefix_of, route_of
from embedding_server.api.state import State
from embedding_server.errors import ConfigurationError
from embedding_server.models.choice import load_options_of, specs_of
from embedding_server.models.registry import Registry
from embedding_server.settings import Settings
from embedding_server.telemetry import Telemetry

if TYPE_CHECKING:
    from embedding_server.api.tracing import Tracing

__all__ = ["Application", "create_app"]

logger = logging.getLogger(__name__)


def create_app(
    settings: Settings,
    *,
    load_first: bool = False,
    on_loaded: Callable[[], None] = lambda: None,
    on_load_error: Callable[[Exception], None] | None = None,
) -> Application:
    """The application of ``settings``, which loads its models once it is started.

    It answers health meanwhile, or with ``load_first`` accepts connections only afterwards.
    ``on_loaded`` is called when all models are loaded, ``on_load_error`` if they can't be; without
    it the application keeps running, not ready. Raises ModelUnavailable for an invalid --model, and
    ConfigurationError for two of the same name, for invalid keys, origins or prefix, and for an
    --otlp-endpoint without its extra.
    """
    keys = ApiKeys((key.get_secret_value() for key in settings.api_key), settings.api_key_file)
    prefix = prefix_of(settings.root_path)
    telemetry = Telemetry()
    tracing = _tracing(settings.otlp_endpoint)
    registry = Registry(
        specs_of(settings),
        load_options_of(settings),
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
            if load_first:
                await asyncio.wait([loading])
            yield
        finally:
            loading.cancel()
            await asyncio.gather(loading, return_exceptions=True)
            await registry.close()
            if tracing is not None:
                await asyncio.to_thread(tracing.close)

    app = Application(
        title="embedding-server",
        version=__version__,
        description="Text in, sentence embeddings out.",
        lifespan=lifespan,
        servers=[{"url": prefix}] if prefix else None,
        responses=errors(400),  # every route refuses two x-request-id
        openapi_url=None,  # and no page of FastAPI's, which loads scripts from the network
        redirect_slashes=False,
        # FastAPI's telemetry would duplicate ours, and send it to wherever OTEL_ variables say.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    app.state = State(
        settings=settings,
        telemetry=telemetry,
        registry=registry,
        bodies=Bodies(settings),
        body_clock=BodyClock(settings.body_timeout),
        api_keys=keys,
    )
    for router in (*ROUTERS, *heads()):
        app.include_router(router)
    add_error_handlers(app)
    front: ASGIApp = DirectRoutes(app.inner, endpoints=embeddings.DIRECT)
    if keys:
        front = ApiKeyMiddleware(
            front, keys=keys, metrics_public=settings.metrics_public, route_of=route_of
        )
    if prefix:
        front = RootPath(front, prefix=prefix)
    if settings.cors_origin:  # outside of the keys, as a browser's preflight has none
        front = Cors(front, origins=settings.cors_origin)
    # The outermost, so that a request with a refused key has an id and a log line, too.
    app.front = RequestMiddleware(front, telemetry=telemetry, tracing=tracing)
    return app


class Application(FastAPI):
    """FastAPI behind our middleware, which answers embeddings without FastAPI's router."""

    front: ASGIApp
    state: State  # type: ignore[assignment]  # typed, in place of Starlette's open namespace

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = self
        await self.front(scope, receive, send)

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            self.openapi_schema = openapi_document(self, self.state.settings)
        return self.openapi_schema

    async def inner(self, scope: Scope, receive: Receive, send: Send) -> None:
        """FastAPI itself."""
        await super().__call__(scope, receive, send)


def _tracing(endpoint: str | None) -> Tracing | None:
    """Traces to ``endpoint``; without one OpenTelemetry's SDK is not imported."""
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
