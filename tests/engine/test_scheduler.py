# SPDX-License-Identifier: MIT OR Apache-2.0
"""The scheduler: fair between requests, near in length, within the budget, and nothing lost."""

from __future__ import annotations

import gc
import heapq
import itertools
import random
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedding_server.engine.batch import Encoding, Entry
from embedding_server.engine.scheduler import Scheduler

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=40)


class Job:
    """A request, as far as the scheduler knows one."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.entries = [
            Entry(self, (index,), Encoding((1,) * length, length))
            for index, length in enumerate(lengths)
        ]


def start(scheduler: Scheduler, *lengths: int) -> Job:
    job = Job(lengths)
    scheduler.add(job.entries)
    return job


def drain(scheduler: Scheduler) -> Iterator[list[Entry]]:
    while batch := scheduler.next_batch():
        yield batch


def lengths_of(batch: Sequence[Entry]) -> list[int]:
    return [entry.length for entry in batch]


def tokens_of(batch: Sequence[Entry], job: Job) -> int:
    return sum(entry.length for entry in batch if entry.request is job)


def test_nothing_waits() -> None:
    scheduler = Scheduler(max_batch_tokens=100)
    assert scheduler.next_batch() == []
    assert len(scheduler) == scheduler.tokens == 0


# ------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
@given(jobs=st.lists(LENGTHS, min_size=1, max_size=6), budget=st.integers(1, 1000))
def test_every_entry_comes_out_once_and_within_the_budget(
    padded: bool, jobs: list[list[int]], budget: int
) -> None:
    scheduler = Scheduler(max_batch_tokens=budget, padded=padded)
    waiting = [entry for lengths in jobs for entry in start(scheduler, *lengths).entries]
    seen: list[Entry] = []
    for batch in drain(scheduler):
        lengths = lengths_of(batch)
        cost = len(batch) * max(lengths) if padded else sum(lengths)
        assert cost <= budget or len(batch) == 1
        assert lengths == sorted(lengths)
        seen += batch
        assert len(scheduler) == len(waiting) - len(seen)
        assert scheduler.tokens == sum(lengths_of(waiting)) - sum(lengths_of(seen))
    assert sorted(map(id, seen)) == sorted(map(id, waiting))


@given(jobs=st.lists(LENGTHS, min_size=1, max_size=4))
def test_a_batch_holds_near_lengths_only(jobs: list[list[int]]) -> None:
    scheduler = Scheduler(max_batch_tokens=1000)
    for lengths in jobs:
        start(scheduler, *lengths)
    for batch in drain(scheduler):
        shortest, longest = batch[0].length, batch[-1].length
        assert longest <= 4 * shortest + 80, "each is within a factor of two of the oldest"


def test_the_nearest_lengths_join_first() -> None:
    scheduler = Scheduler(max_batch_tokens=300)
    start(scheduler, 100, 60, 140, 98, 101)
    assert lengths_of(scheduler.next_batch()) == [98, 100, 101]


def test_a_batch_is_filled_from_all_requests() -> None:
    scheduler = Scheduler(max_batch_tokens=100)
    jobs = [start(scheduler, 10) for _ in range(10)]
    batch = scheduler.next_batch()
    assert {entry.request for entry in batch} == set(jobs)


def test_an_entry_over_the_budget_goes_alone() -> None:
    scheduler = Scheduler(max_batch_tokens=64)
    start(scheduler, 100, 100, 60)
    assert [lengths_of(batch) for batch in drain(scheduler)] == [[100], [100], [60]]


@given(jobs=st.lists(LENGTHS, min_size=1, max_size=6), budget=st.integers(1, 1000))
def test_a_request_that_fits_in_a_batch_is_not_joined_by_larger_ones(
    jobs: list[list[int]], budget: int
) -> None:
    scheduler = Scheduler(max_batch_tokens=budget)
    for lengths in jobs:
        start(scheduler, *lengths)
    for batch in drain(scheduler):
        totals = [sum(entry.length for entry in entry.request.entries) for entry in batch]
        assert len({total > budget for total in totals}) == 1


@pytest.mark.parametrize(
    ("lengths", "cores", "batches"),
    [
        pytest.param([10] * 8, 1, [8], id="one"),
        pytest.param([10] * 8, 2, [4, 4], id="two"),
        pytest.param([10] * 8, 4, [2, 2, 2, 2], id="four"),
        pytest.param([3] * 4, 4, [4], id="little"),
        pytest.param([100] * 4, 2, [1, 1, 1, 1], id="much"),
    ],
)
def test_what_waits_is_shared_among_idle_cores(
    lengths: list[int], cores: int, batches: list[int]
) -> None:
    scheduler = Scheduler(max_batch_tokens=120)
    start(scheduler, *lengths)
    seen = []
    while batch := scheduler.next_batch(cores=max(1, cores - len(seen))):
        seen.append(len(batch))
    assert seen == batches


# ------------------------------------------------------------------------------------ fairness

_random = random.Random(3)


@pytest.mark.parametrize("batches_before", [1, 2, 7])
@pytest.mark.parametrize("query", [3, 12, 250])
@pytest.mark.parametrize(
    "job",
    [
        pytest.param([250] * 2048, id="long"),
        pytest.param([3] * 2048, id="short"),
        pytest.param([5, 250] * 1024, id="alternating"),
        pytest.param([_random.randint(3, 256) for _ in range(2048)], id="mixed"),
        pytest.param(sorted(_random.randint(3, 256) for _ in range(2048)), id="sorted"),
    ],
)
def test_a_query_during_a_large_job_is_in_the_next_batch(
    job: list[int], query: int, batches_before: int
) -> None:
    scheduler = Scheduler(max_batch_tokens=1024)
    start(scheduler, *job)
    for _ in range(batches_before):
        scheduler.next_batch()
    one_line = start(scheduler, query)
    assert one_line.entries[0] in scheduler.next_batch()


@pytest.mark.parametrize("batches_before", [2, 3, 8])
def test_a_query_during_two_large_jobs_is_in_the_next_batch(batches_before: int) -> None:
    """Once both jobs have begun; one that has had nothing goes before it."""
    scheduler = Scheduler(max_batch_tokens=1024)
    start(scheduler, *[250] * 500)
    start(scheduler, *[60] * 2000)
    for _ in range(batches_before):
        scheduler.next_batch()
    one_line = start(scheduler, 3)
    assert one_line.entries[0] in scheduler.next_batch()


@given(jobs=st.lists(LENGTHS, min_size=1, max_size=4), newcomer=st.integers(1, 20))
def test_requests_that_never_end_starve_no_other(jobs: list[list[int]], newcomer: int) -> None:
    """With a new one-line query before every batch, all that waits is served in bounded time."""
    scheduler = Scheduler(max_batch_tokens=300)
    waiting = {id(e) for lengths in jobs for e in start(scheduler, *lengths).entries}
    # Each batch serves one that waits, or moves virtual time by the newcomer's tokens.
    bound = len(waiting) + max(map(sum, jobs)) // newcomer + 2
    for _ in range(bound):
        start(scheduler, newcomer)
        waiting -= {id(entry) for entry in scheduler.next_batch()}
    assert not waiting


@pytest.mark.parametrize(
    ("lengths", "other_lengths"),
    [
        pytest.param([100] * 400, [100] * 400, id="equal"),
        pytest.param([20] * 2000, [200] * 200, id="many-short-few-long"),
        pytest.param([250, 5] * 150, [30] * 1300, id="mixed"),
    ],
)
@pytest.mark.parametrize("head_start", [0, 5], ids=["together", "one-later"])
def test_two_jobs_share_by_tokens(
    lengths: list[int], other_lengths: list[int], head_start: int
) -> None:
    """However many inputs each has, both get the same tokens from when the second arrives."""
    budget = 1000
    scheduler = Scheduler(max_batch_tokens=budget)
    job = start(scheduler, *lengths)
    for _ in range(head_start):
        scheduler.next_batch()
    other = start(scheduler, *other_lengths)
    given_to_job = given_to_other = 0
    for batch in itertools.islice(drain(scheduler), 30):
        given_to_job += tokens_of(batch, job)
        given_to_other += tokens_of(batch, other)
        assert abs(given_to_job - given_to_other) <= 2 * budget
    assert min(given_to_job, given_to_other) >= 13 * budget


def test_a_late_job_cannot_claim_the_past() -> None:
    scheduler = Scheduler(max_batch_tokens=100)
    first = start(scheduler, *[50] * 100)
    for _ in range(20):
        scheduler.next_batch()
    start(scheduler, *[50] * 100)
    served = [tokens_of(scheduler.next_batch(), first) for _ in range(10)]
    assert sum(served) >= 400, "half of ten batches, less one"


def test_requests_of_one_moment_are_served_in_order() -> None:
    scheduler = Scheduler(max_batch_tokens=100)
    jobs = [start(scheduler, 100) for _ in range(5)]
    assert [batch[0].request for batch in drain(scheduler)] == jobs


# ------------------------------------------------------------------------------------- discard


@given(
    jobs=st.lists(LENGTHS, min_size=2, max_size=5),
    batches_before=st.integers(0, 4),
    which=st.integers(0, 4),
)
def test_discard_forgets_one_request_and_no_other(
    jobs: list[list[int]], batches_before: int, which: int
) -> None:
    scheduler = Scheduler(max_batch_tokens=300)
    started = [start(scheduler, *lengths) for lengths in jobs]
    seen = [e for _ in range(batches_before) for e in scheduler.next_batch()]
    unwanted = started[which % len(started)]
    scheduler.discard(unwanted)
    scheduler.discard(unwanted)
    expected = {
        id(entry)
        for job in started
        if job is not unwanted
        for entry in job.entries
        if entry not in seen
    }
    assert len(scheduler) == len(expected)
    rest = [entry for batch in drain(scheduler) for entry in batch]
    assert {id(entry) for entry in rest} == expected
    assert len(rest) == len(expected)
    assert scheduler.tokens == 0


def test_discard_keeps_the_others_fair() -> None:
    scheduler = Scheduler(max_batch_tokens=100)
    jobs = [start(scheduler, *[50] * 60) for _ in range(4)]
    scheduler.discard(jobs[1])
    shares = [0, 0, 0, 0]
    for batch in drain(scheduler):
        shares = [share + tokens_of(batch, job) for share, job in zip(shares, jobs, strict=True)]
        assert max(shares) - min(shares[0], *shares[2:]) <= 100
    assert shares == [3000, 0, 3000, 3000]


def test_discard_of_a_stranger_changes_nothing() -> None:
    scheduler = Scheduler(max_batch_tokens=100)
    start(scheduler, 10, 20)
    scheduler.discard(Job([10]))
    assert (len(scheduler), scheduler.tokens) == (2, 30)


class Scanning:
    """The scheduler without an index: a discard looks at all that waits."""

    def __init__(self, *, max_batch_tokens: int, padded: bool) -> None:
        self.budget, self.padded = max_batch_tokens, padded
        self.waiting: dict[tuple[bool, int], list[tuple[float, int, int, Entry]]] = {}
        self.arrivals = itertools.count()
        self.time = 0.0

    def __len__(self) -> int:
        return sum(map(len, self.waiting.values()))

    @property
    def tokens(self) -> int:
        return sum(length * len(bucket) for (_, length), bucket in self.waiting.items())

    def add(self, entries: Sequence[Entry]) -> None:
        lengths = lengths_of(entries)
        cost = len(lengths) * max(lengths) if self.padded else sum(lengths)
        tag = self.time
        for place, entry in enumerate(entries):
            bucket = self.waiting.setdefault((cost > self.budget, entry.length), [])
            heapq.heappush(bucket, (tag, place, next(self.arrivals), entry))
            tag += entry.length

    def next_batch(self, *, cores: int = 1) -> list[Entry]:
        if not self.waiting:
            return []
        budget = min(self.budget, max(16, -(-self.tokens // cores)))
        kind = min(self.waiting, key=lambda kind: self.waiting[kind][0])
        large, head = kind
        start, place, _, _ = self.waiting[kind][0]
        self.time = max(self.time, start if place else start + head)
        batch = [self.pop(kind)]
        near = [k for k in self.waiting if k[0] == large and head / 2 - 16 <= k[1] <= head * 2 + 16]
        for kind in sorted(near, key=lambda kind: abs(kind[1] - head)):
            while kind in self.waiting:
                lengths = [*lengths_of(batch), kind[1]]
                if (len(lengths) * max(lengths) if self.padded else sum(lengths)) > budget:
                    break
                batch.append(self.pop(kind))
        return sorted(batch, key=lambda entry: entry.length)

    def pop(self, kind: tuple[bool, int]) -> Entry:
        entry = heapq.heappop(self.waiting[kind])[-1]
        if not self.waiting[kind]:
            del self.waiting[kind]
        return entry

    def discard(self, request: object) -> None:
        for kind, bucket in list(self.waiting.items()):
            bucket[:] = [item for item in bucket if item[-1].request is not request]
            heapq.heapify(bucket)
            if not bucket:
                del self.waiting[kind]

    def clear(self) -> None:
        self.waiting.clear()


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), LENGTHS),
        st.tuples(st.just("batch"), st.integers(1, 4)),
        st.tuples(st.just("discard"), st.integers(0, 30)),
        st.tuples(st.just("discard all"), st.none()),
    ),
    max_size=40,
)


@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
@given(steps=STEPS, budget=st.integers(1, 1000))
def test_batches_are_those_of_a_scheduler_that_looks_at_everything(
    padded: bool, steps: list[tuple[str, Any]], budget: int
) -> None:
    ours = Scheduler(max_batch_tokens=budget, padded=padded)
    simple = Scanning(max_batch_tokens=budget, padded=padded)
    jobs: list[tuple[Job, Job]] = []
    names: dict[int, tuple[int, int]] = {}

    def next_batches(cores: int) -> list[Entry]:
        batch = ours.next_batch(cores=cores)
        expected = [names[id(entry)] for entry in simple.next_batch(cores=cores)]
        assert [names[id(entry)] for entry in batch] == expected
        return batch

    for step, value in [*steps, *[("batch", 1)] * 3]:
        if step == "add":
            jobs.append((Job(value), Job(value)))
            for job, scheduler in zip(jobs[-1], (ours, simple), strict=True):
                scheduler.add(job.entries)
                names |= {id(e): (len(jobs), place) for place, e in enumerate(job.entries)}
        elif step == "discard" and jobs:
            ours.discard(jobs[value % len(jobs)][0])
            simple.discard(jobs[value % len(jobs)][1])
        elif step == "discard all":
            for job, _ in jobs:
                ours.discard(job)
            simple.clear()
        elif step == "batch":
            next_batches(value)
        assert (len(ours), ours.tokens) == (len(simple), simple.tokens)
    while next_batches(1):
        pass
    assert len(ours) == ours.tokens == 0


@pytest.mark.parametrize("order", ["oldest first", "newest first", "shuffled"])
def test_discarding_all_requests_takes_work_in_proportion_to_them(order: str) -> None:
    """Of a queue four times as long, four times the work, and not sixteen times."""

    def work(requests: int) -> int:
        scheduler = Scheduler(max_batch_tokens=1000)
        rng = random.Random(requests)
        jobs = [start(scheduler, *rng.choices(range(3, 200), k=10)) for _ in range(requests)]
        if order != "oldest first":
            jobs.reverse()
        if order == "shuffled":
            rng.shuffle(jobs)
        operations = count_operations(lambda: [scheduler.discard(job) for job in jobs])
        assert len(scheduler) == scheduler.tokens == 0
        return operations

    assert work(800) < 5 * work(200)


def count_operations(do: Callable[[], object]) -> int:
    """How many operations of Python's machine ``do`` takes."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        do()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("kept", [0, 1, 50])
def test_discarded_entries_are_let_go(kept: int) -> None:
    """However long nothing is computed, what is kept of them is no more than what waits."""
    scheduler = Scheduler(max_batch_tokens=1000)
    for _ in range(kept):
        start(scheduler, 20)
    discarded = weakref.WeakSet[Job]()
    for _ in range(300):
        job = start(scheduler, 20, 30, 20)
        discarded.add(job)
        scheduler.discard(job)
    del job
    gc.collect()  # a Job and its entries refer to each other
    assert len(scheduler) == kept
    assert len(discarded) <= kept
