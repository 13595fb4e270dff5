# SPDX-License-Identifier: MIT OR Apache-2.0
"""What is measured: one model of a server that was started here, or that runs at a URL."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from embedding_server.commands.bench.connections import Answer, Target, fetch, parse_target
from embedding_server.commands.bench.process import own_server
from embedding_server.commands.bench.usage import Usage, read_usage
from embedding_server.errors import ConfigurationError, ModelUnavailable
from embedding_server.models.catalog import DEFAULT_MODELS
from embedding_server.models.spec import parse_spec
from embedding_server.settings import Settings, rows

__all__ = ["Subject", "subject_of"]

_SECONDS = 120.0
"""How long a single small request may take before anything is measured."""

# Settings that mean something to whoever measures a server that runs already.
_FOR_ANY_SERVER = {"model", "api_key", "load_models_from", "log_format", "log_level"}


@dataclass(frozen=True, slots=True)
class Subject:
    """A server, and the model to ask it for."""

    target: Target
    pid: int | None
    """Of a server started here."""
    asked_model: str | None
    """None: the server's first."""
    local_model: str | None
    """What finds the model's files on this machine; None: the name that is sent."""

    async def model(self) -> str:
        """The name to send; raises ConfigurationError if the server doesn't tell any."""
        if self.asked_model is not None:
            return self.asked_model
        answer = await self._answer(self.target.get(self.target.models_path))
        try:
            first = json.loads(answer.body)["data"][0]
            return str(first["id"] if isinstance(first, dict) else first)
        except (ValueError, LookupError, TypeError):
            raise ConfigurationError(
                f"{self.target.url}{self.target.models_path} lists no models: give one as --model."
            ) from None

    async def try_out(self, request: bytes) -> None:
        """Send one request; raises ConfigurationError with the server's reason if it fails."""
        await self._answer(request)

    async def usage(self) -> Usage:
        """What the server has used until now."""
        return await read_usage(self.target, self.pid)

    async def _answer(self, request: bytes) -> Answer:
        try:
            answer = await fetch(self.target, request, seconds=_SECONDS)
        except TimeoutError:
            raise ConfigurationError(
                f"{self.target.url} has not answered within {_SECONDS:.0f} s."
            ) from None
        if answer.status == 200:
            return answer
        if answer.status <= 0:
            raise ConfigurationError(
                f"{self.target.url} does not answer in HTTP/1.1 with a length."
            )
        raise ConfigurationError(f"{self.target.url} answered {answer.status}: {answer.reason}")


@contextmanager
def subject_of(
    settings: Settings, url: str | None, flags: Mapping[str, object], config: Path | None
) -> Iterator[Subject]:
    """The server at ``url``, or without one a server started with ``flags``, for as long.

    Raises ConfigurationError if there is none, and for flags that it can't be given.
    """
    asked = settings.model[0] if settings.model else None
    key = settings.api_key[0].get_secret_value() if settings.api_key else None
    if url is not None:
        too_late = [row.flag for row in rows() if row.name in set(flags) - _FOR_ANY_SERVER]
        if too_late:
            raise ConfigurationError(
                f"{', '.join(too_late)} can't be set on the server at --url, which runs already."
            )
        yield Subject(parse_target(url, key), None, _served_name(asked), asked)
        return
    if asked is None:
        asked = DEFAULT_MODELS[0]
        flags = {**flags, "model": [asked]}
    with own_server(flags, config) as server:
        yield Subject(parse_target(server.url, key), server.pid, None, asked)


def _served_name(asked: str | None) -> str | None:
    """A folder's model is served under the folder's name; any other name is the server's affair."""
    try:
        spec = parse_spec(asked) if asked else None
    except ModelUnavailable:
        return asked
    return spec.name if spec is not None and spec.folder is not None else asked
