# SPDX-License-Identifier: MIT OR Apache-2.0
"""The server and the model to measure: started here, or running at a URL."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from embedding_server.commands.bench.connections import Answer, Target, fetch, parse_target
from embedding_server.commands.bench.process import own_server
from embedding_server.commands.options import given_settings
from embedding_server.errors import ConfigurationError, ModelUnavailable
from embedding_server.models.catalog import DEFAULT_MODELS
from embedding_server.models.spec import parse_spec
from embedding_server.settings import Settings, rows

__all__ = ["Subject", "subject_of"]

_SECONDS = 120.0
"""The time limit of a single request before the measurement."""

# Settings that also apply to the measurement of a running server.
_FOR_ANY_SERVER = {"model", "api_key", "load_models_from", "log_format", "log_level"}


@dataclass(frozen=True, slots=True)
class Subject:
    """A server, and the model that requests name."""

    target: Target
    pid: int | None
    """The process of a server that was started here."""
    asked_model: str | None
    """The name to send; None: that of the server's first model."""
    local_model: str | None
    """The name that finds the model's files on this machine; None: the name to send."""

    async def model(self) -> str:
        """The name to send; raises ConfigurationError if the server lists no models."""
        if self.asked_model is not None:
            return self.asked_model
        answer = await self._answer(self.target.get(self.target.models_path))
        try:
            first = json.loads(answer.body)["data"][0]
            return str(first["id"] if isinstance(first, dict) else first)
        except (ValueError, LookupError, TypeError):
            route = f"{self.target.url}{self.target.models_path}"
            raise ConfigurationError(f"{route} lists no models: give one with --model.") from None

    async def try_out(self, request: bytes) -> None:
        """Send one request; raises ConfigurationError with the server's reason if it fails."""
        await self._answer(request)

    async def _answer(self, request: bytes) -> Answer:
        try:
            answer = await fetch(self.target, request, seconds=_SECONDS)
        except TimeoutError:
            raise ConfigurationError(
                f"{self.target.url} did not answer within {_SECONDS:.0f} s."
            ) from None
        if answer.status == 200:
            return answer
        if answer.status <= 0:
            raise ConfigurationError(
                f"{self.target.url} does not answer in HTTP/1.1 with a length."
            )
        raise ConfigurationError(f"{self.target.url} answered {answer.status}: {answer.reason}")


@contextmanager
def subject_of(settings: Settings, arguments: argparse.Namespace) -> Iterator[Subject]:
    """The server at ``--url``, or without it a new server that runs as long as the body.

    Raises ConfigurationError if no server can be reached, and for flags that it can't get.
    """
    asked = settings.model[0] if settings.model else None
    key = settings.api_key[0].get_secret_value() if settings.api_key else None
    flags = given_settings(arguments)
    if arguments.url is not None:
        too_late = [row.flag for row in rows() if row.name in set(flags) - _FOR_ANY_SERVER]
        if too_late:
            raise ConfigurationError(
                f"{', '.join(too_late)} can't be set on the server at --url, which is running."
            )
        yield Subject(parse_target(arguments.url, key), None, _served_name(asked), asked)
        return
    if asked is None:
        asked = DEFAULT_MODELS[0]
        flags["model"] = [asked]
    with own_server(flags, arguments.config) as server:
        yield Subject(parse_target(server.url, key), server.pid, None, asked)


def _served_name(asked: str | None) -> str | None:
    """A folder is served under its name; any other name is sent as it is."""
    try:
        spec = parse_spec(asked) if asked else None
    except ModelUnavailable:
        return asked
    return spec.name if spec is not None and spec.folder is not None else asked
