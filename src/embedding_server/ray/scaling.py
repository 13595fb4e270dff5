# SPDX-License-Identifier: MIT OR Apache-2.0
"""How many replicas there should be, by the tokens that wait at them.

Ray sends this module's text to its controller: it imports nothing of ours.
"""

from __future__ import annotations

import math
from typing import Any

__all__ = ["QUEUED_TOKENS", "QueuedTokens"]

QUEUED_TOKENS = "queued_tokens"
"""The name under which replicas tell how many wait."""


class QueuedTokens:
    """An autoscaling policy of Ray Serve: ``target`` waiting tokens a replica.

    Ray keeps what it says between min_replicas and max_replicas, and waits its delays.
    """

    def __init__(self, target: int) -> None:
        self._target = target

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        waiting = (context.aggregated_metrics or {}).get(QUEUED_TOKENS, {})
        return max(1, math.ceil(sum(waiting.values()) / self._target)), {}
