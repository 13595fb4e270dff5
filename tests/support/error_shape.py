# SPDX-License-Identifier: MIT OR Apache-2.0
"""The one shape that every error has over HTTP."""

from __future__ import annotations

from typing import Any

import httpx

TYPES = {
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable",
    504: "timeout_error",
}


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The ``error`` of an answer, which must have ``status`` and the one shape."""
    assert response.status_code == status, f"{response.status_code}: {response.text[:500]}"
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    assert list(body) == ["error"]
    error: dict[str, Any] = body["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert isinstance(error["message"], str)
    assert error["message"].endswith("."), "a message is a sentence"
    assert error["type"] == TYPES.get(status, "invalid_request_error")
    assert error["param"] is None or isinstance(error["param"], str)
    assert error["code"] is None or isinstance(error["code"], str)
    return error
