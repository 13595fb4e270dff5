# SPDX-License-Identifier: MIT OR Apache-2.0
"""Which inputs are computed next: fair between requests, near in length, within a budget.

Pure and synchronous: no clock, no asyncio. Start-time fair queueing (Goyal, Vin and Cheng,
1996) over requests, with tokens as the cost.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Hashable, Sequence

from embedding_server.engine.batch import Entry

__all__ = ["Scheduler"]

# Every batch reads all weights, which takes a core as long as some ten tokens: fewer tokens than
# this are not worth dividing.
_LEAST_SHARE = 16


_Kind = tuple[bool, int]
"""Whether an entry's request is larger than a batch, and the entry's length."""


class Scheduler:
    """Entries in, batches out.

    A batch costs the sum of its lengths; with ``padded``, its size times its longest entry.
    """

    def __init__(self, *, max_batch_tokens: int, padded: bool = False) -> None:
        self._max_batch_tokens = max_batch_tokens
        self._padded = padded
        # One heap of (start tag, place in its request, arrival, entry) for each kind. Kinds are
        # few, so the oldest entry and the nearest lengths are found by looking at all.
        self._waiting: dict[_Kind, list[tuple[float, int, int, Entry]]] = {}
        self._arrivals = itertools.count()
        # The kind of each waiting entry by request and arrival: a discard looks at these alone.
        self._kinds: dict[Hashable, dict[int, _Kind]] = {}
        # Arrivals that were discarded and are still in a heap, but never at its top.
        self._discarded: set[int] = set()
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
        for place, (entry, length) in enumerate(zip(entries, lengths, strict=True)):
            entry.start = tag
            tag += length
            kind, arrival = (large, length), next(self._arrivals)
            heapq.heappush(self._waiting.setdefault(kind, []), (entry.start, place, arrival, entry))
            self._kinds.setdefault(entry.request, {})[arrival] = kind
            self._tokens += length
        self._entries += len(entries)

    def next_batch(self, *, cores: int = 1) -> list[Entry]:
        """The entry with the oldest start tag and others of about its length, shortest first.

        A request that one batch can hold is not joined by entries of larger ones: it would wait
        for them, and they end no sooner. The waiting tokens are shared among idle
        ``cores``. Empty when nothing waits; over the budget only if a single entry is.
        """
        if not self._entries:
            return []
        budget = min(self._max_batch_tokens, max(_LEAST_SHARE, -(-self._tokens // cores)))
        kind = min(self._waiting, key=lambda kind: self._waiting[kind][0])
        large, head = kind
        start, place, _, _ = self._waiting[kind][0]
        # Virtual time is the start tag in service. A request's first entry starts at the present,
        # so it moves time by its own length: otherwise a stream of new requests would hold time
        # still and always go before entries with a later tag.
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

    def discard(self, request: Hashable) -> None:
        """Remove the waiting entries of ``request``."""
        arrivals = self._kinds.pop(request, {})
        self._discarded.update(arrivals)
        self._entries -= len(arrivals)
        self._tokens -= sum(length for _, length in arrivals.values())
        for kind in set(arrivals.values()):
            self._drop_discarded(kind)
        # Those in the middle of a heap go when they come to its top, or when they are too many.
        if len(self._discarded) > self._entries:
            for bucket in self._waiting.values():
                bucket[:] = [item for item in bucket if item[2] not in self._discarded]
                heapq.heapify(bucket)
            self._discarded.clear()

    def _pop(self, kind: _Kind) -> Entry:
        _, _, arrival, entry = heapq.heappop(self._waiting[kind])
        self._drop_discarded(kind)
        arrivals = self._kinds[entry.request]
        del arrivals[arrival]
        if not arrivals:
            del self._kinds[entry.request]
        self._entries -= 1
        self._tokens -= kind[1]
        return entry

    def _drop_discarded(self, kind: _Kind) -> None:
        """Remove discarded entries from the top of the heap of ``kind``, and an empty heap."""
        bucket = self._waiting[kind]
        while bucket and bucket[0][2] in self._discarded:
            self._discarded.remove(heapq.heappop(bucket)[2])
        if not bucket:
            del self._waiting[kind]


def _near(length: int, head: int) -> bool:
    """Whether entries of ``length`` may join one of ``head`` tokens.

    Attention is padded to the longest, and a short entry would wait for the long ones; a
    factor of two bounds both, and a few tokens' difference never matters.
    """
    return head / 2 - 16 <= length <= head * 2 + 16
