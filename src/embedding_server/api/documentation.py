# SPDX-License-Identifier: MIT OR Apache-2.0
"""The parts of the OpenAPI document that FastAPI can't derive: bodies, headers and errors."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from embedding_server.api.headers import FINGERPRINT_HEADER
from embedding_server.api.schemas import (
    EmbeddingsRequest,
    EmbedRequest,
    ErrorResponse,
    OpenAIEmbeddingsRequest,
)
from embedding_server.settings import Settings

__all__ = ["ERROR_REASONS", "errors", "json_body", "openapi_document"]

ERROR_REASONS = {
    400: "The request can't be served as it is: the message says which field or header and why.",
    401: "An API key is set, and the request has none or a wrong one.",
    404: "No such model is served; the message lists the served ones.",
    408: "The body did not come in time.",
    409: "The stored vectors that `x-embedding-fingerprint` names are of another model.",
    413: "The body is over the limit.",
    415: "The body is not plain JSON.",
    429: "The queue is full; `Retry-After` says when to come back, in seconds.",
    500: "A fault of the server's, logged with the request id.",
    503: "Starting, draining, or the model can't be used now.",
    504: "The time that `x-request-timeout` gave the request is over.",
}

_RETRY_AFTER = {
    "Retry-After": {
        "description": "seconds until it's worth another try",
        "schema": {"type": "integer", "minimum": 1},
    }
}

_HEADERS: dict[int, dict[str, Any]] = {
    401: {
        "WWW-Authenticate": {
            "description": "the scheme to authenticate with",
            "schema": {"type": "string", "const": "Bearer"},
        }
    },
    429: _RETRY_AFTER,
    503: _RETRY_AFTER,
}

_REQUEST_ID = {
    "x-request-id": {
        "description": "the request's id: the client's own, if it sent a valid one",
        "schema": {"type": "string"},
    }
}


def _header(name: str, description: str, schema: dict[str, Any]) -> dict[str, Any]:
    """An optional header of a request, as a parameter."""
    return {
        "name": name,
        "in": "header",
        "required": False,
        "description": description,
        "schema": schema,
    }


_CLIENT_REQUEST_ID = _header(
    "x-request-id",
    "an id for the request, up to 128 printable ASCII characters; it is in the answer and the log",
    {"type": "string"},
)

_EMBEDDINGS_HEADERS = [
    _header(
        "x-request-timeout",
        "seconds that the client will wait, as 2.5; past them the answer is a 504, and the rest of "
        "the request is not computed",
        {"type": "number", "exclusiveMinimum": 0},
    ),
    _header(
        FINGERPRINT_HEADER,
        "the fingerprint of the model that made the stored vectors; the answer is a 409 if the "
        "served model has another one. Token ids are then taken on every route.",
        {"type": "string"},
    ),
]


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The ``responses`` of a route that can answer these errors."""
    return {
        status: {
            "model": ErrorResponse,
            "description": ERROR_REASONS[status],
            "headers": dict(_HEADERS.get(status, {})),
        }
        for status in statuses
    }


def json_body(schema: type[EmbedRequest]) -> dict[str, Any]:
    """``openapi_extra`` of an embeddings route, which parses ``schema`` without FastAPI."""
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema.__name__}"}}}
    body = {"required": True, "content": content}
    return {"requestBody": body, "parameters": _EMBEDDINGS_HEADERS}


def openapi_document(app: FastAPI, settings: Settings) -> dict[str, Any]:
    """FastAPI's document of ``app``, corrected to all that the routes accept and answer."""
    document = get_openapi(
        title=app.title,
        version=app.version,
        description=app.description,
        routes=app.routes,
        servers=app.servers,
    )
    schemas = document["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for schema in (EmbeddingsRequest, OpenAIEmbeddingsRequest):
        schemas[schema.__name__] = schema.model_json_schema()
    keyed = bool(settings.api_key or settings.api_key_file)
    public = ("/health", "/metrics") if settings.metrics_public else ("/health",)
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["parameters"] = [*operation.get("parameters", ()), _CLIENT_REQUEST_ID]
            responses = operation["responses"]
            # Path parameters are any string, so FastAPI's own 422 can't happen.
            responses.pop("422", None)
            if path.startswith(public):
                responses.pop("401", None)
            operation["responses"] = dict(sorted(responses.items()))
            for response in responses.values():
                response.setdefault("headers", {}).update(_REQUEST_ID)
            if not path.startswith(public):
                operation["security"] = [{"key": []}] if keyed else [{}, {"key": []}]
    return document
