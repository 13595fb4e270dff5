# SPDX-License-Identifier: MIT OR Apache-2.0
"""``embedding-server bench``: servers under load, as its users run it."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_models as tiny
from live import LiveServer, environment, interruptible, run_cli, running_server
from stand_in import Reply, running_stand_in

from embedding_server.cli import build_parser
from embedding_server.commands.bench.connections import parse_target
from embedding_server.commands.bench.operations import ModelCost
from embedding_server.commands.bench.process import own_server
from embedding_server.commands.bench.subject import Subject
from embedding_server.commands.bench.workloads import build_workload
from embedding_server.errors import ConfigurationError

KEY = "a-key-of-mine"
INPUTS = {"pair": 2, "query": 1, "uniform": 32, "chunks": 32, "bulk": 2048}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model so small that even 2,048 texts take no time; its folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return str(tiny.make_bert(folder, max_seq_length=64).folder)


@pytest.fixture(scope="module")
def live(model: str) -> Iterator[LiveServer]:
    with running_server("--model", model, "--api-key", KEY) as server:
        yield server


def bench(*arguments: str, code: int = 0) -> tuple[list[str], dict]:
    """The table's lines, and the last line's JSON."""
    done = run_cli("bench", *arguments)
    assert done.returncode == code, done.stderr.decode()
    *table, line = done.stdout.decode().splitlines()
    return table, json.loads(line)


def refused(*arguments: str) -> str:
    """What it says, having measured nothing."""
    done = run_cli("bench", *arguments)
    assert done.returncode == 1
    assert done.stdout == b""
    return done.stderr.decode()


# ---------------------------------------------------------------------------------------- workloads


@pytest.mark.parametrize("workload", INPUTS)
def test_workloads(live: LiveServer, model: str, workload: str) -> None:
    table, result = bench(
        *("--url", live.url, "--api-key", KEY, "--model", model),
        *("--workload", workload, "--duration", "0.3"),
    )
    assert result["benchmark"] == "server"
    assert (result["workload"], result["model"], result["url"]) == (workload, "tiny", live.url)
    assert result["connections"] == {"uniform": 8, "chunks": 4, "bulk": 1}.get(workload, 64)
    assert (result["duration"], result["rate"]) == (0.3, None)
    assert result["requests"] > 0
    assert result["failures"] == {}
    assert result["seconds"] >= 0.3
    assert result["requests_per_second"] == pytest.approx(
        result["requests"] / result["seconds"], rel=0.01
    )
    assert result["inputs_per_second"] == pytest.approx(
        INPUTS[workload] * result["requests_per_second"], rel=0.01
    )
    latency = result["latency_ms"]
    assert 0 < latency["p50"] <= latency["p95"] <= latency["p99"] <= latency["max"]
    assert result["generator_cpu_seconds"] > 0
    # What the server says it computed is what the model's own tokenizer makes of the texts.
    assert result["tokens_per_second"] == result["counted_tokens_per_second"] > 0
    assert result["gflops_useful"] > 0
    assert result["machine"]["cores"] >= 1
    labels = [line.split("  ")[0] for line in table]
    assert {"workload", "requests/s", "GFLOP/s useful", "p99 ms", "generator CPU"} <= set(labels)
    assert table[-1].split() == ["failures", "none"]


def test_fixed_rate(live: LiveServer, model: str) -> None:
    """As many requests as asked for: exactly the first of the cycle, and what these cost."""
    table, result = bench(
        *("--url", live.url, "--api-key", KEY, "--model", model),
        *("--rate", "8", "--duration", "0.5", "--connections", "3"),
    )
    assert (result["requests"], result["rate"], result["connections"]) == (4, 8, 3)
    assert any("3 connections, 8 requests/s, 0.5 s" in line for line in table)
    model_cost = ModelCost.of_model(model, None)
    assert model_cost is not None
    each = [model_cost.of_request(texts) for texts in build_workload("query").requests[:4]]
    seconds = result["seconds"]
    assert result["tokens_per_second"] * seconds == pytest.approx(
        sum(cost.tokens for cost in each), rel=0.01
    )
    assert result["gflops_useful"] * seconds == pytest.approx(
        sum(cost.operations for cost in each) / 1e9, rel=0.01
    )


def test_mixed(live: LiveServer) -> None:
    table, result = bench(
        *("--url", live.url, "--api-key", KEY),
        *("--workload", "mixed", "--duration", "0.25", "--rate", "20", "--connections", "4"),
    )
    assert (result["workload"], result["rounds"], result["failures"]) == ("mixed", 3, {})
    for phase in ("queries_alone", "queries_beside"):
        assert result[phase]["requests"] == 3 * 5
        assert len(result[phase]["p99_ms_by_round"]) == 3
        assert 0 < result[phase]["latency_ms"]["p50"] <= result[phase]["latency_ms"]["p99"]
    assert result["p99_ratio"] == pytest.approx(
        result["queries_beside"]["latency_ms"]["p99"]
        / result["queries_alone"]["latency_ms"]["p99"],
        rel=0.01,
    )
    alone = result["job_alone_tokens_per_second"]
    beside = result["job_beside_tokens_per_second"]
    assert len(alone) == len(beside) == 3
    assert min(sum(alone), sum(beside)) > 0
    assert result["job_share"] == pytest.approx(sum(beside) / sum(alone), rel=0.01)
    assert any(line.startswith("p99 beside / alone") for line in table)


def test_mixed_says_why_its_job_fails(model: str) -> None:
    told = refused(
        *("--model", model, "--max-client-batch-size", "100"),
        *("--workload", "mixed", "--duration", "0.1", "--rate", "20"),
    )
    assert "The job failed: " in told
    assert "the 100 inputs" in told


def test_mixed_needs_a_server_that_tells_progress() -> None:
    with running_stand_in() as stand_in:
        told = refused("--url", stand_in.url, "--workload", "mixed", "--duration", "0.2")
    assert "embedding_server_batch_tokens_sum" in told


# ------------------------------------------------------------------------------ a server of its own


def test_a_server_of_its_own(model: str) -> None:
    done = run_cli(
        *("bench", "--model", model, "--served-model-name", "mine", "--threads", "1"),
        *("--api-key", KEY, "--duration", "0.2", "--connections", "2", "--json"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == b""
    (line,) = done.stdout.splitlines()
    result = json.loads(line)
    assert (result["url"], result["model"], result["failures"]) == (None, "mine", {})
    assert result["gflops_useful"] > 0
    if sys.platform == "linux":
        assert result["server_cpu_seconds"] > 0
        assert result["server_peak_bytes"] >= result["server_resident_bytes"] > 10e6


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_its_server_takes_flags_and_keeps_secrets(model: str) -> None:
    with own_server({"model": [model], "threads": "1", "api_key": [KEY]}, None) as server:
        command = Path(f"/proc/{server.pid}/cmdline").read_bytes().split(b"\0")
        variables = Path(f"/proc/{server.pid}/environ").read_bytes().split(b"\0")
    assert f"--model={model}".encode() in command
    assert b"--threads=1" in command
    assert KEY.encode() not in b" ".join(command)
    assert f"EMBEDDING_SERVER_API_KEY={KEY}".encode() in variables
    assert not Path(f"/proc/{server.pid}").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_its_server_ends_with_it(model: str, number: int) -> None:
    command = [sys.executable, "-m", "embedding_server.cli", "bench", "--model", model]
    process = interruptible(
        [*command, "--duration", "60"], env=environment(), stderr=subprocess.DEVNULL
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    server = ""
    while process.poll() is None and not server:
        time.sleep(0.02)
        # The child's first program is this one's copy, before it becomes the server.
        found = children.read_text().split()
        server = next((pid for pid in found if b"serve" in command_line(pid)), "")
    time.sleep(0.5)  # in the middle of a load, or still starting: it must end in either
    process.send_signal(number)
    assert process.wait(40) in (130, 143)
    assert not Path(f"/proc/{server}").exists()


def command_line(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_a_server_that_does_not_start(tmp_path: Path) -> None:
    told = refused("--model", str(tmp_path))
    assert "ended before it was ready" in told
    assert "holds neither config.json nor modules.json" in told


# ----------------------------------------------------------------------------------------- failures


def test_failures_are_told_and_make_the_exit_code_1() -> None:
    replies = {3: Reply(503), 4: Reply(hang_up=True), 5: Reply(503)}
    with running_stand_in(lambda number: replies.get(number, Reply())) as stand_in:
        table, result = bench(
            *("--url", stand_in.url, "--rate", "20", "--duration", "0.5", "--api-key", KEY), code=1
        )
    assert stand_in.keys == {f"Bearer {KEY}"}
    # One request is tried out, and two warm up.
    assert result["failures"] == {"503": 2, "closed": 1}
    assert result["requests"] == 7
    told = "503: 2, closed: 1 (the first: not today)"
    assert table[-1].split(maxsplit=1) == ["failures", told]


def test_a_server_that_tells_less() -> None:
    """Another's: no metrics, no tokens, a model that nobody here knows."""
    with running_stand_in(lambda _: Reply(tokens=None)) as stand_in:
        table, result = bench("--url", stand_in.url, "--duration", "0.2", "--connections", "2")
    assert {body["model"] for body in stand_in.bodies} == {"stand-in"} == {result["model"]}
    assert len(stand_in.arrivals) >= result["requests"] > 0
    for key in ("tokens_per_second", "gflops_useful", "server_cpu_seconds", "server_peak_bytes"):
        assert result[key] is None
    unknown = [line.split("  ")[0] for line in table if line.endswith(" -")]
    assert {"tokens/s", "GFLOP/s useful", "server memory, peak"} <= set(unknown)


def test_a_server_that_counts_otherwise() -> None:
    """Its tokens are shown, and those of the model's own tokenizer below them."""
    with running_stand_in(lambda _: Reply(tokens=1000)) as stand_in:
        table, result = bench(
            *("--url", stand_in.url, "--model", "all-MiniLM-L6-v2"),
            *("--rate", "10", "--duration", "0.2"),
        )
    assert result["tokens_per_second"] == 10_000
    assert 0 < result["counted_tokens_per_second"] < 1000
    assert result["gflops_useful"] == pytest.approx(
        result["counted_tokens_per_second"] * 0.0214, rel=0.02
    )
    assert any(line.startswith("  by its tokenizer") for line in table)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--api-key", "wrong"), "answered 401: The API key is not valid"),
        ((), "answered 401: The API key is missing"),
        (("--api-key", KEY, "--model", "other"), "answered 404: The model 'other' is not served"),
        (("--api-key", KEY, "--threads", "1"), "--threads can't be set on the server at --url"),
        (("--model", "a/b", "--model", "c/d"), "One model is measured at a time"),
    ],
)
def test_what_can_not_be_measured(live: LiveServer, arguments: tuple[str, ...], told: str) -> None:
    assert told in refused("--url", live.url, "--duration", "0.2", *arguments)


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        (Reply(503), "answered 503: not today"),
        (Reply(hang_up=True), "does not answer in HTTP/1.1 with a length"),
        (Reply(length=False), "does not answer in HTTP/1.1 with a length"),
    ],
)
def test_a_server_that_fails_at_once(reply: Reply, told: str) -> None:
    with running_stand_in(lambda _: reply) as stand_in:
        target = parse_target(stand_in.url)
        subject = Subject(target, pid=None, asked_model=None, local_model=None)
        with pytest.raises(ConfigurationError, match=re.escape(f"{target.url} {told}")):
            asyncio.run(subject.try_out(target.post(b"{}")))


def test_no_server_there() -> None:
    assert "There is no server at http://127.0.0.1:1: " in refused("--url", "http://127.0.0.1:1")
    assert "--url 'https://h'" in refused("--url", "https://h")


@pytest.mark.parametrize(
    "arguments",
    [
        *(("--duration", wrong) for wrong in ("0", "-1", "nan", "inf", "soon")),
        *(("--connections", wrong) for wrong in ("0", "1.5", "100000")),
        *(("--rate", wrong) for wrong in ("0", "-5")),
        ("--workload", "everything"),
        ("engine", "--rounds", "0"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as ended:
        build_parser().parse_args(["bench", *arguments])
    assert ended.value.code == 2


@pytest.mark.parametrize("arguments", [("--json", "engine"), ("engine", "--json")])
def test_json_may_stand_on_either_side(arguments: tuple[str, ...]) -> None:
    options = build_parser().parse_args(["bench", *arguments])
    assert (options.kind, options.json) == ("engine", True)


def test_help_teaches_by_examples() -> None:
    for arguments in (("bench",), ("bench", "engine")):
        done = run_cli(*arguments, "--help")
        assert done.returncode == 0
        assert done.stdout.decode().count("\n  embedding-server bench") >= 2
