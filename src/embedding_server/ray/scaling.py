# SPDX-License-Identifier: MIT OR Apache-2.0
"""The number of replicas, by the tokens that wait at them.

Ray sends this module's source to its controller, so it imports nothing of this package.
"""

from __future__ import annotations

import math
from typing import Any

__all__ = ["QUEUED_TOKENS", "QueuedTokens"]

QUEUED_TOKENS = "queued_tokens"
"""The name under which a replica reports its waiting tokens."""


class QueuedTokens:
    """An autoscaling policy of Ray Serve: ``target`` waiting tokens for each replica.

    Ray applies min_replicas, max_replicas and its delays to the number.
    """

    def __init__(self, target: int) -> None:
        self._target = target

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        waiting = (context.aggregated_metrics or {}).get(QUEUED_TOKENS, {})
        return max(1, math.ceil(sum(waiting.values()) / self._target)), {}
