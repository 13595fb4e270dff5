# SPDX-License-Identifier: MIT OR Apache-2.0
"""Reads the headers of a request that it may have only once: the one place with that rule.

A proxy in front may use the other one of two such headers. Headers that may be repeated are lists,
or are read where they are parsed: Host and the length of a body (the servers), Authorization (the
keys), and traceparent, which W3C's Trace Context ignores if it is repeated.
"""

from __future__ import annotations

from starlette.types import Scope

from embedding_server.errors import InvalidRequest

__all__ = ["FINGERPRINT_HEADER", "single_header"]

FINGERPRINT_HEADER = "x-embedding-fingerprint"
"""In a request: of the model that made the client's stored vectors; in an answer: of this one."""

_KEY = "embedding_server.headers"


def single_header(scope: Scope, name: bytes) -> bytes | None:
    """The value of ``name``, in small letters, or None; raises InvalidRequest for two of it."""
    headers: dict[bytes, bytes] | None = scope.get(_KEY)
    if headers is None:
        scope[_KEY] = headers = dict(scope["headers"])
    value = headers.get(name)
    if value is not None and len(headers) < len(scope["headers"]):  # one of them is repeated
        times = sum(field == name for field, _ in scope["headers"])
        if times > 1:
            shown = name.decode("ascii")
            raise InvalidRequest(
                f"The header {shown} is there {times} times; send it once.", param=shown
            )
    return value
