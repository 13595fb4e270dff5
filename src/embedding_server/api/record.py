# SPDX-License-Identifier: MIT OR Apache-2.0
"""The record of one request, for its log line, its metrics and its trace."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.types import Scope

from embedding_server.engine.stages import Stages

__all__ = ["RequestRecord", "record_of"]

_KEY = "embedding_server.record"


@dataclass(slots=True)
class RequestRecord:
    """Numbers and names only: never a text, and only names of served models."""

    id: str
    route: str = "unmatched"
    """The path's template; a path that no route takes is not recorded."""
    model: str = ""
    inputs: int = 0
    tokens: int = 0
    truncated: int = 0
    error_code: str | None = None
    fault: Exception | None = None
    """The unexpected exception that ended it, once it is logged."""
    stages: Stages | None = None
    """When it reached each stage; only of a request that is traced."""

    def attach(self, scope: Scope) -> None:
        """Make ``record_of(scope)`` give this record."""
        scope[_KEY] = self


def record_of(scope: Scope) -> RequestRecord:
    """The record of the request that ``scope`` belongs to."""
    record = scope[_KEY]
    assert isinstance(record, RequestRecord)
    return record
