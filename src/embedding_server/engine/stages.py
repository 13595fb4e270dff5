# SPDX-License-Identifier: MIT OR Apache-2.0
"""When one traced request passed each stage; the engine fills in the numbers."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Stages"]


@dataclass(slots=True, eq=False)
class Stages:
    """Seconds of ``time.perf_counter`` at the bounds of each stage, 0 for one not reached.

    A stage that began and has no end was cut off by the end of the request.
    """

    request_start: float
    tokenize_start: float = 0.0
    tokenize_end: float = 0.0
    queue_start: float = 0.0
    inference_start: float = 0.0
    """When its first batch started, which ends the stage of queueing."""
    inference_end: float = 0.0
    """When the last batch to end so far did."""
    tokens: int = 0
    """Tokens to compute; of equal inputs, those of one."""
    batches: int = 0
    """How many batches held an input of the request; one tried again in halves counts anew."""
    running: int = 0
    """How many of them have not ended."""

    def batch_started(self, now: float) -> None:
        """Count a batch with inputs of this request."""
        if not self.batches:
            self.inference_start = now
        self.batches += 1
        self.running += 1

    def batch_ended(self, now: float) -> None:
        """Count the end of one, whether its vectors came or not."""
        self.running -= 1
        self.inference_end = now
