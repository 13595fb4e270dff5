# SPDX-License-Identifier: MIT OR Apache-2.0
"""Reads the header fields of a request that may be there once: the one place with that rule.

Of two such fields a proxy in front may heed the other one. Headers that may be repeated are lists,
or are read where they are parsed: Host and the length of a body (the servers), Authorization (the
keys), and traceparent, of which W3C's Trace Context ignores two.
"""

from __future__ import annotations

from starlette.types import Scope

from embedding_server.errors import InvalidRequest

__all__ = ["single_header"]

_KEY = "embedding_server.headers"


def single_header(scope: Scope, name: bytes) -> bytes | None:
    """The value of the header ``name``, in small letters; None if it is not there.

    Raises InvalidRequest, which names it, if it is there more than once.
    """
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
