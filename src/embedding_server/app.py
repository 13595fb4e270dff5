# SPDX-License-Identifier: MIT OR Apache-2.0
"""Wires settings, models and routes into one ASGI application."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from embedding_server import __version__
from embedding_server.api import embeddings
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
    """The application of ``settings``; its models are loaded while it answers health already.

    With ``load_first`` its start is over, and so connections are accepted, when they are loaded.
    ``on_loaded`` is called when all are loaded; ``on_load_error`` if they can't be served, without
    which the application stays up and not ready. ``app.state.api_keys.reload()`` reads the file of
    keys again. Raises ModelUnavailable for a --model that can't be understood, and
    ConfigurationError for two of the same name, for keys, origins or a prefix that can't work, and
    for an --otlp-endpoint without its extra.
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
        openapi_url=None,  # and so no page that loads its scripts from elsewhere
        redirect_slashes=False,
        # Its own would come beside ours, and it sends them to wherever OTEL_ variables say.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    app.state = State(
        settings=settings,
        telemetry=telemetry,
        registry=registry,
        bodies=Bodies(settings),
        api_keys=keys,
    )
    for router in (*ROUTERS, *heads()):
        app.include_router(router)
    add_error_handlers(app)
    use_own_openapi(app, settings, prefix=prefix)
    front: ASGIApp = DirectRoutes(app.inner, endpoints=embeddings.DIRECT)
    if keys:
        front = ApiKeyMiddleware(
            front, keys=keys, metrics_public=settings.metrics_public, route_of=route_of
        )
    if prefix:
        front = RootPath(front, prefix=prefix)
    if settings.cors_origin:  # outside of the keys, as a browser asks for leave without one
        front = Cors(front, origins=settings.cors_origin)
    # The outermost: a refused key has a log line and an id, too.
    app.front = RequestMiddleware(front, telemetry=telemetry, tracing=tracing)
    return app


class Application(FastAPI):
    """FastAPI behind our own middleware: short requests pass through none of its many layers."""

    front: ASGIApp
    state: State  # type: ignore[assignment]  # typed, in place of Starlette's open namespace

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = self
        await self.front(scope, receive, send)

    async def inner(self, scope: Scope, receive: Receive, send: Send) -> None:
        """FastAPI itself."""
        await super().__call__(scope, receive, send)


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
