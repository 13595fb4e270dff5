# SPDX-License-Identifier: MIT OR Apache-2.0
"""The parts of a running application that its routes use."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastapi import Request

from embedding_server.api.body import Bodies
from embedding_server.api.keys import ApiKeys
from embedding_server.api.lifetime import BodyClock
from embedding_server.models.registry import Registry
from embedding_server.settings import Settings
from embedding_server.telemetry import Telemetry

__all__ = ["Condition", "State", "state_of"]


@dataclass(slots=True)
class Condition:
    """The condition of the processes that serve the application, as they report it."""

    draining: bool = False
    siblings: str = ""
    """Why other processes of this server are not ready; empty if they are."""


@dataclass(frozen=True, slots=True)
class State:
    """The ``app.state`` of the application."""

    settings: Settings
    telemetry: Telemetry
    registry: Registry
    bodies: Bodies
    body_clock: BodyClock
    api_keys: ApiKeys
    condition: Condition = field(default_factory=Condition)

    @property
    def problem(self) -> str:
        """Why the server is not ready; empty if it is."""
        if self.condition.draining:
            return "the server is draining, and will end"
        if self.condition.siblings:
            return self.condition.siblings
        if not self.registry.ready:
            states = self.registry.status().items()
            return ", ".join(f"{name} is {state}" for name, state in states)
        return ""


def state_of(request: Request) -> State:
    """The state of the application that ``request`` belongs to."""
    state: State = request.app.state
    return state
