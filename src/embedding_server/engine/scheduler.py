"""Which inputs are computed next: fair between requests, near in length, within a budget.

Pure and synchronous: no clock, no asyncio. Start-time fair queueing (Goyal, Vin and Cheng,
1996) over requests, with tokens as the cost.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence

from embedding_server.engine.batch import Entry, Request

__all__ = ["Scheduler"]


class Scheduler:
    """Entries in, batches out.

    With ``padded`` a batch costs its size times its longest entry, as for a backend that
    pads; else it costs the sum of its lengths.
    """

    def __init__(self, *, max_batch_tokens: int, padded: bool = False) -> None:
        self._max_batch_tokens = max_batch_tokens
        self._padded = padded
        # A heap of (start tag, place in its request, arrival, entry) for each length. Lengths
        # are few, so the oldest entry and the nearest lengths are found by looking at all.
        self._by_length: dict[int, list[tuple[float, int, int, Entry]]] = {}
        self._arrivals = itertools.count()
        self._virtual_time = 0.0
        self._tokens = 0
        self._entries = 0

    def __len__(self) -> int:
        """Entries waiting."""
        return self._entries

    @property
    def tokens(self) -> int:
        """Tokens waiting."""
        return self._tokens

    def add(self, entries: Sequence[Entry]) -> None:
        """Queue all entries of one request.

        Each one's start tag is the previous one's finish tag, so a large request spreads
        over virtual time and leaves room for those that come after it.
        """
        tag = self._virtual_time
        for place, entry in enumerate(entries):
            entry.start = tag
            tag += entry.length
            bucket = self._by_length.setdefault(entry.length, [])
            heapq.heappush(bucket, (entry.start, place, next(self._arrivals), entry))
            self._tokens += entry.length
        self._entries += len(entries)

    def next_batch(self) -> list[Entry]:
        """The entry with the oldest start tag and others of about its length, shortest first.

        Empty when nothing waits; over the budget only if a single entry is.
        """
        if not self._entries:
            return []
        head = min(self._by_length, key=lambda length: self._by_length[length][0])
        start, place, _, _ = self._by_length[head][0]
        # Time is the start tag in service. A request's first entry starts at the present, so
        # it moves time by its own length: a stream of new requests would else hold time still
        # and always go before what waits for a later tag.
        self._virtual_time = max(self._virtual_time, start if place else start + head)
        batch = [self._pop(head)]
        tokens = longest = head
        for length in sorted(self._by_length, key=lambda length: abs(length - head)):
            if not _near(length, head):
                continue
            while length in self._by_length:
                if not self._fits(len(batch) + 1, tokens + length, max(longest, length)):
                    break
                batch.append(self._pop(length))
                tokens += length
                longest = max(longest, length)
        batch.sort(key=lambda entry: entry.length)
        return batch

    def discard(self, request: Request) -> None:
        """Forget what still waits of ``request``."""
        for length, bucket in list(self._by_length.items()):
            kept = [item for item in bucket if item[-1].request is not request]
            removed = len(bucket) - len(kept)
            if not removed:
                continue
            self._entries -= removed
            self._tokens -= removed * length
            if kept:
                heapq.heapify(kept)
                self._by_length[length] = kept
            else:
                del self._by_length[length]

    def _fits(self, size: int, tokens: int, longest: int) -> bool:
        cost = size * longest if self._padded else tokens
        return cost <= self._max_batch_tokens

    def _pop(self, length: int) -> Entry:
        bucket = self._by_length[length]
        entry = heapq.heappop(bucket)[-1]
        if not bucket:
            del self._by_length[length]
        self._entries -= 1
        self._tokens -= length
        return entry


def _near(length: int, head: int) -> bool:
    """Whether entries of ``length`` may join one of ``head`` tokens.

    Attention is padded to the longest, and a short entry would wait for the long ones; a
    factor of two bounds both, and a few tokens' difference never matters.
    """
    return head / 2 - 16 <= length <= head * 2 + 16
