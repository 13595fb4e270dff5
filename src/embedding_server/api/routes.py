# SPDX-License-Identifier: MIT OR Apache-2.0
"""All routes, and the prefix that they may have."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from fastapi import APIRouter
from fastapi.routing import APIRoute

from embedding_server.api import docs_page, embeddings, health, models
from embedding_server.errors import ConfigurationError

__all__ = ["ROUTERS", "heads", "prefix_of", "route_of"]

ROUTERS = (embeddings.router, models.router, health.router, docs_page.router)


def heads() -> Iterator[APIRouter]:
    """HEAD routes, as probes send, for all GET routes but embeddings; servers drop the body."""
    return (_heads_of(router) for router in ROUTERS if router is not embeddings.router)


def _routes(routers: Iterable[APIRouter]) -> Iterator[APIRoute]:
    return (route for router in routers for route in router.routes if isinstance(route, APIRoute))


def _heads_of(router: APIRouter) -> APIRouter:
    heads = APIRouter(include_in_schema=False)
    for route in _routes([router]):
        heads.add_api_route(
            route.path,
            route.endpoint,
            methods=["HEAD"],
            response_model_exclude_none=route.response_model_exclude_none,
        )
    return heads


def route_of(path: str) -> str:
    """The template of the route that takes ``path``, by any method."""
    return next(
        (route.path_format for route in _routes(ROUTERS) if route.path_regex.match(path)),
        "unmatched",
    )


def prefix_of(root_path: str) -> str:
    """--root-path without a slash at its end; raises ConfigurationError."""
    prefix = root_path.rstrip("/")
    if prefix and not re.fullmatch(r"(/(?!\.\.?(/|$))[A-Za-z0-9._~-]+)+", prefix):
        raise ConfigurationError(
            f"--root-path {root_path!r} must be the beginning of a path, as /embeddings: a slash "
            "first, and between slashes letters, digits and -._~ only."
        )
    for route in _routes(ROUTERS):
        if f"{route.path}/".startswith(f"{prefix}/") and prefix:
            raise ConfigurationError(
                f"--root-path {prefix} is the beginning of {route.path}, a path of this server: a "
                "proxy that passes such paths on unchanged needs no --root-path."
            )
    return prefix
