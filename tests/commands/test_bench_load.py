# SPDX-License-Identifier: MIT OR Apache-2.0
"""The benchmarks' load: what is sent and when, and what counts as latency and as failure."""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import pytest
import uvloop
from stand_in import Reply, StandIn, running_stand_in

from embedding_server.commands.bench.connections import (
    Answer,
    Target,
    connected,
    fetch,
    parse_target,
)
from embedding_server.commands.bench.load import Answered, Load, closed_loop, fixed_rate
from embedding_server.commands.bench.usage import read_metric, read_usage
from embedding_server.errors import ConfigurationError

Result = TypeVar("Result")

BODIES = [b'{"input": "%d"}' % number for number in range(3)]


def run(
    work: Coroutine[Any, Any, Result],
    loop: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop,
) -> Result:
    with asyncio.Runner(loop_factory=loop) as runner:
        return runner.run(work)


def punctual() -> asyncio.AbstractEventLoop:
    return asyncio.SelectorEventLoop(selectors.SelectSelector())


async def closed(stand_in: StandIn, *, connections: int, seconds: float) -> Load:
    target = parse_target(stand_in.url)
    async with connected(target, connections) as pool:
        return await closed_loop(pool, [target.post(body) for body in BODIES], seconds=seconds)


async def open_(stand_in: StandIn, *, connections: int, rate: float, seconds: float) -> Load:
    target = parse_target(stand_in.url)
    requests = [target.post(body) for body in BODIES]
    async with connected(target, connections) as pool:
        return await fixed_rate(pool, requests, rate=rate, seconds=seconds)


# -------------------------------------------------------------------------------------- closed loop


def test_connections_are_kept_and_the_cycle_goes_round() -> None:
    with running_stand_in() as stand_in:
        load = run(closed(stand_in, connections=2, seconds=0.3))
    assert len(load.answered) == len(stand_in.arrivals) > 6
    assert len(stand_in.connections) == 2
    assert load.failures == {}
    assert load.tokens == 7 * len(load.answered)
    # Connections take turns from one cycle, so that each body is sent about as often.
    sent = [int(body["input"]) for body in stand_in.bodies]
    assert {sent.count(number) for number in range(3)} <= {len(sent) // 3, len(sent) // 3 + 1}
    assert sorted(answered.request for answered in load.answered) == sorted(sent)


def test_what_is_under_way_at_the_end_counts_with_its_time() -> None:
    with running_stand_in(seconds=0.2) as stand_in:
        load = run(closed(stand_in, connections=1, seconds=0.1))
    assert len(load.answered) == len(stand_in.arrivals) == 1
    assert load.seconds >= 0.2
    assert load.answered[0].seconds >= 0.2


@pytest.mark.parametrize("pieces", [2, 7, 40])
def test_answers_may_come_in_pieces(pieces: int) -> None:
    with running_stand_in(lambda _: Reply(pieces=pieces)) as stand_in:
        load = run(closed(stand_in, connections=1, seconds=0.2))
    assert load.answered
    assert load.failures == {}
    assert load.tokens == 7 * len(load.answered)


def test_failures_are_counted_by_status() -> None:
    statuses = {0: Reply(503), 1: Reply(hang_up=True), 2: Reply(429)}
    with running_stand_in(lambda number: statuses.get(number, Reply())) as stand_in:
        load = run(closed(stand_in, connections=1, seconds=0.3))
    assert load.failures == {"503": 1, "closed": 1, "429": 1}
    assert len(load.answered) == len(stand_in.arrivals) - 3 > 0


def test_an_announced_close_is_no_failure() -> None:
    """As servers close connections after some number of requests."""
    with running_stand_in(lambda _: Reply(last=True)) as stand_in:
        load = run(closed(stand_in, connections=2, seconds=0.3))
    assert load.failures == {}
    assert len(load.answered) == len(stand_in.arrivals) == len(stand_in.connections) > 2


def test_an_answer_without_a_length_is_a_failure() -> None:
    with running_stand_in(lambda _: Reply(length=False)) as stand_in:
        load = run(closed(stand_in, connections=1, seconds=0.2))
    assert set(load.failures) == {"unframed"}
    assert load.answered == []
    assert load.percentile(0.5) is None


def test_tokens_are_unknown_if_one_answer_does_not_tell() -> None:
    with running_stand_in(lambda number: Reply(tokens=None if number else 7)) as stand_in:
        load = run(closed(stand_in, connections=1, seconds=0.2))
    assert len(load.answered) > 1
    assert load.tokens is None


# --------------------------------------------------------------------------------------- fixed rate


def test_the_rate_is_what_was_asked_for() -> None:
    """As many requests as rate and time make, and none before it is due."""
    with running_stand_in() as stand_in:
        started = time.perf_counter()
        load = run(open_(stand_in, connections=8, rate=100, seconds=0.6), punctual)
    assert len(stand_in.arrivals) == len(load.answered) == 60
    arrivals = sorted(stand_in.arrivals)
    assert all(arrival >= started + n / 100 for n, arrival in enumerate(arrivals))
    assert load.seconds >= 0.6


def test_latency_counts_from_when_a_request_was_due() -> None:
    """A server of 20 requests a second, asked for 60: the queue is part of the latency.

    Each of its answers takes 0.05 s, so the 30th request, due at 0.48 s, is answered at 1.5 s
    at the soonest; counted from when a connection was free, none would take over 0.1 s.
    """
    with running_stand_in(seconds=0.05) as stand_in:
        load = run(open_(stand_in, connections=2, rate=60, seconds=0.5), punctual)
    assert len(load.answered) == 30
    slowest = load.percentile(1.0)
    assert slowest is not None
    assert slowest >= 30 * 0.05 - 29 / 60
    assert load.seconds >= 1.5


def test_a_slow_rate_still_sends_one() -> None:
    with running_stand_in() as stand_in:
        load = run(open_(stand_in, connections=1, rate=0.5, seconds=0.2), punctual)
    assert len(load.answered) == 1


def test_a_server_that_goes_away_leaves_requests_unanswered() -> None:
    """Each request of the rate is accounted for, and the load ends."""

    async def load_of_a_dying_server() -> Load:
        async def answer_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            server.close()
            await reader.readuntil(b"}")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(answer_once, "127.0.0.1", 0)
        target = parse_target(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        requests = [target.post(BODIES[0])]
        async with connected(target, 1) as pool:
            return await fixed_rate(pool, requests, rate=50, seconds=0.6)

    load = run(load_of_a_dying_server(), punctual)
    assert len(load.answered) == 1
    assert load.failures["unanswered"] + load.failures["closed"] == 29
    assert load.failures["unanswered"] > 0


# ------------------------------------------------------------------------------------------ figures


def test_percentiles_are_of_the_nearest_rank() -> None:
    load = Load(answered=[Answered(0, seconds / 10, None) for seconds in (3, 1, 4, 2)])
    assert [load.percentile(share) for share in (0, 0.25, 0.26, 0.5, 0.99, 1)] == [
        *(0.1, 0.1, 0.2, 0.2, 0.4, 0.4)
    ]
    hundred = Load(answered=[Answered(0, float(n), None) for n in range(1, 101)])
    assert [hundred.percentile(share) for share in (0.5, 0.95, 0.99, 1)] == [50, 95, 99, 100]


# ------------------------------------------------------------------------------------------- target


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("http://h:5000", "/v1/embeddings"),
        ("http://h:5000/", "/v1/embeddings"),
        ("http://h:5000/v1", "/v1/embeddings"),
        ("http://h:5000/openai/v1", "/openai/v1/embeddings"),
        ("http://h:5000/v1/embeddings", "/v1/embeddings"),
        ("http://h:5000/embeddings", "/embeddings"),
    ],
)
def test_targets(url: str, path: str) -> None:
    target = parse_target(url, "secret")
    assert target == Target("h", 5000, path, "secret")
    head = target.post(b"{}").split(b"\r\n\r\n")
    assert head[0].startswith(f"POST {path} HTTP/1.1\r\nHost: h:5000\r\n".encode())
    assert b"Authorization: Bearer secret" in head[0]
    assert head[1] == b"{}"


@pytest.mark.parametrize(
    "url", ["https://h:5000", "h:5000", "http://", "http://h:port", "http://h/?a=b", ""]
)
def test_what_is_no_target(url: str) -> None:
    with pytest.raises(ConfigurationError, match="--url"):
        parse_target(url)


def test_an_unreachable_server_is_named() -> None:
    target = parse_target("http://127.0.0.1:1")
    with pytest.raises(ConfigurationError, match=r"no server at http://127\.0\.0\.1:1: "):
        run(fetch(target, target.get("/metrics"), seconds=5))


def test_one_request_by_itself() -> None:
    with running_stand_in(lambda _: Reply(pieces=30)) as stand_in:
        target = parse_target(stand_in.url)
        answer = run(fetch(target, target.post(BODIES[0]), seconds=20))
    assert isinstance(answer, Answer)
    assert answer.status == 200
    assert answer.body.startswith(b'{"data": [{"embedding": [0.5')
    assert answer.body.endswith(b"}}")


# -------------------------------------------------------------------------------------------- usage

METRICS = """\
# HELP process_cpu_seconds_total Total user and system CPU time spent in seconds.
process_cpu_seconds_total 12.5
process_resident_memory_bytes 2.5e+08
tokens_sum{model="a b"} 40.0
tokens_sum{model="c"} 2.0
tokens_sum_created 1.7e9
"""


def test_usage_from_metrics() -> None:
    with running_stand_in() as stand_in:
        target = parse_target(stand_in.url)
        nothing = run(read_usage(target, None))
        stand_in.metrics = METRICS
        usage = run(read_usage(target, None))
        assert run(read_metric(target, "tokens_sum")) == 42
        assert run(read_metric(target, "tokens")) is None
    assert (nothing.cpu_seconds, nothing.resident_bytes, nothing.peak_bytes) == (None, None, None)
    assert (usage.cpu_seconds, usage.resident_bytes, usage.peak_bytes) == (12.5, 250_000_000, None)
