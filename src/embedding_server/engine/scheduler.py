# SPDX-License-Identifier: MIT OR Apache-2.0
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

# Every batch reads all weights, which takes a core as long as some ten tokens: less than this is
# not worth dividing.
_LEAST_SHARE = 16


_Kind = tuple[bool, int]
"""Whether an entry's request is larger than a batch, and the entry's length."""


class Scheduler:
    """Entries in, batches out.

    With ``padded`` a batch costs its size times its longest entry, as for a backend that
    pads; else it costs the sum of its lengths.
    """

    def __init__(self, *, max_batch_tokens: int, padded: bool = False) -> None:
        self._max_batch_tokens = max_batch_tokens
        self._padded = padded
        # A heap of (start tag, place in its request, arrival, entry) for each length, of requests
        # that are larger than a batch and of others. Lengths are few, so the oldest entry and the
        # nearest lengths are found by looking at all.
        self._waiting: dict[_Kind, list[tuple[float, int, int, Entry]]] = {}
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
        lengths = [entry.length for entry in entries]
        cost = len(lengths) * max(lengths) if self._padded else sum(lengths)
        large = cost > self._max_batch_tokens
        for place, entry in enumerate(entries):
            entry.start = tag
            tag += entry.length
            bucket = self._waiting.setdefault((large, entry.length), [])
            heapq.heappush(bucket, (entry.start, place, next(self._arrivals), entry))
            self._tokens += entry.length
        self._entries += len(entries)

    def next_batch(self, *, cores: int = 1) -> list[Entry]:
        """The entry with the oldest start tag and others of about its length, shortest first.

        A request that one batch can hold is not joined by entries of larger ones: it would wait
        for them, and they end no sooner. With idle ``cores``, what waits is shared among them.
        Empty when nothing waits; over the budget only if a single entry is.
        """
        if not self._entries:
            return []
        budget = min(self._max_batch_tokens, max(_LEAST_SHARE, -(-self._tokens // cores)))
        kind = min(self._waiting, key=lambda kind: self._waiting[kind][0])
        large, head = kind
        start, place, _, _ = self._waiting[kind][0]
        # Time is the start tag in service. A request's first entry starts at the present, so
        # it moves time by its own length: a stream of new requests would else hold time still
        # and always go before what waits for a later tag.
        self._virtual_time = max(self._virtual_time, start if place else start + head)
        batch = [self._pop(kind)]
        tokens = longest = head
        near = (kind for kind in self._waiting if kind[0] == large and _near(kind[1], head))
        for kind in sorted(near, key=lambda kind: abs(kind[1] - head)):
            _, length = kind
            while kind in self._waiting:
                cost = (len(batch) + 1) * max(longest, length) if self._padded else tokens + length
                if cost > budget:
                    break
                batch.append(self._pop(kind))
                tokens += length
                longest = max(longest, length)
        batch.sort(key=lambda entry: entry.length)
        return batch

    def discard(self, request: Request) -> None:
        """Forget what still waits of ``request``."""
        for kind, bucket in list(self._waiting.items()):
            kept = [item for item in bucket if item[-1].request is not request]
            removed = len(bucket) - len(kept)
            if not removed:
                continue
            self._entries -= removed
            self._tokens -= removed * kind[1]
            if kept:
                heapq.heapify(kept)
                self._waiting[kind] = kept
            else:
                del self._waiting[kind]

    def clear(self) -> None:
        """Forget all that waits."""
        self._waiting.clear()
        self._entries = self._tokens = 0

    def _pop(self, kind: _Kind) -> Entry:
        bucket = self._waiting[kind]
        entry = heapq.heappop(bucket)[-1]
        if not bucket:
            del self._waiting[kind]
        self._entries -= 1
        self._tokens -= entry.length
        return entry


def _near(length: int, head: int) -> bool:
    """Whether entries of ``length`` may join one of ``head`` tokens.

    Attention is padded to the longest, and a short entry would wait for the long ones; a
    factor of two bounds both, and a few tokens' difference never matters.
    """
    return head / 2 - 16 <= length <= head * 2 + 16
