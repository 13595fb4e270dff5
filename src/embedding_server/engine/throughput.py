# SPDX-License-Identifier: MIT OR Apache-2.0
"""The speed of a model's recent batches, from which follows when a refused client may return."""

from __future__ import annotations

__all__ = ["Throughput"]

_KEPT = 0.9


class Throughput:
    """Tokens over core-seconds of recent batches; idle time does not count."""

    def __init__(self) -> None:
        self._tokens = self._core_seconds = 0.0

    def add(self, tokens: int, core_seconds: float) -> None:
        """Count a batch; what was counted before fades."""
        # Sums that fade, and not a mean of rates: many small batches would outvote a large one.
        self._tokens = _KEPT * self._tokens + tokens
        self._core_seconds = _KEPT * self._core_seconds + core_seconds

    def seconds(self, tokens: int, *, cores: float) -> float:
        """How long ``tokens`` take on ``cores``; 0 before the first batch."""
        return tokens * self._core_seconds / max(self._tokens, 1.0) / cores
