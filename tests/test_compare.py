# SPDX-License-Identifier: MIT OR Apache-2.0
"""`benchmarks/compare`: its arithmetic, its pages, its load, and a short run of it."""

from __future__ import annotations

import http.server
import json
import random
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

import pytest
from live import environment

from embedding_server.engine.batch import Encoding

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from ceiling import full_batches  # noqa: E402
from load import LoadFailed, put_load, write_bodies, wrk_program  # noqa: E402
from report import (  # noqa: E402
    BEGIN,
    END,
    Comparison,
    Sample,
    WorkloadResult,
    replace_section,
    section,
    summary,
    svg,
    table,
)

needs_wrk = pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed")


def samples(*rates: float) -> list[Sample]:
    return [Sample(requests=round(rate * 10), seconds=10.0, cpu_seconds=5.0) for rate in rates]


def comparison(name: str = "pair", machine: str = "2 cores of something") -> Comparison:
    """Three rounds in which the machine was slower from round to round."""
    tested = WorkloadResult(
        name=name,
        help="two words <each> an input",
        connections=64,
        seconds=10,
        samples={
            "embedding-server": samples(600, 500, 400),
            "infinity-onnx": samples(300, 200, 250),
            "engine": samples(800, 650, 500),
        },
        memory_mib={"embedding-server": 200.4, "infinity-onnx": 1100.0},
    )
    return Comparison("2026-01-31", machine, {"thing": "1.2"}, ["benchmarks/compare"], [tested])


# ---------------------------------------------------------------------------------------- numbers


def test_ratios_are_of_the_same_round() -> None:
    (row,) = comparison().tested
    ratio = row.ratio("infinity-onnx")
    assert (ratio.low, ratio.median, ratio.high) == (1.6, 2.0, 2.5)
    assert row.rate("infinity-onnx") == 250
    assert row.cpu_ms("embedding-server") == 1.0
    assert row.compared == ["infinity-onnx", "engine"]


def test_the_summary_can_be_read_by_a_program() -> None:
    found = json.loads(json.dumps(summary(comparison())))["pair"]
    assert found["requests_per_second"]["embedding-server"] == 500
    assert found["ratio_to"]["engine"] == {"median": 500 / 650, "low": 0.75, "high": 0.8}
    assert found["peak_memory_mib"]["infinity-onnx"] == 1100


def test_json_holds_everything() -> None:
    one = comparison()
    assert Comparison.from_json(json.loads(json.dumps(one.to_json()))) == one


def test_runs_of_one_machine_can_be_joined() -> None:
    parts = [comparison("pair"), comparison("query"), comparison("pair")]
    joined = Comparison.merged(parts)
    assert [row.name for row in joined.tested] == ["pair", "query"]
    assert joined.commands == ["benchmarks/compare"]
    with pytest.raises(ValueError, match="different machines"):
        Comparison.merged([comparison(), comparison(machine="another")])


# ------------------------------------------------------------------------------------------ pages


def test_the_table_has_a_row_for_each_server() -> None:
    lines = table(comparison()).splitlines()
    assert [line.split()[1] for line in lines[1:]] == [
        "embedding-server",
        "infinity-onnx",
        "engine",
    ]
    assert "2.00 (1.60-2.50)" in lines[2]


def test_the_section_tells_rates_ratios_machine_and_command() -> None:
    text = section(comparison())
    assert "| `pair`: two words <each> an input | 64 | 500 | 250 | 650 |" in text
    assert "| `pair` | 2.00 (1.60-2.50) | 77% (75%-80%) |" in text
    for part in ("3 rounds", "10 s", "2026-01-31", "2 cores of something", "thing 1.2"):
        assert part in text
    assert "```console\n$ benchmarks/compare\n```" in text


def test_only_what_is_between_the_markers_is_replaced() -> None:
    page = f"above\n\n{BEGIN}\nold\n{END}\n\nbelow\n"
    once = replace_section(page, "new")
    assert once == f"above\n\n{BEGIN}\nnew\n{END}\n\nbelow\n"
    assert replace_section(once, "new") == once
    with pytest.raises(ValueError, match="lacks the lines"):
        replace_section("no markers", "new")


def test_the_page_has_its_markers() -> None:
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert page.count(BEGIN) == page.count(END) == 1
    assert "new" in replace_section(page, "new")


def test_the_plot_is_true_to_scale() -> None:
    space = "{http://www.w3.org/2000/svg}"
    plot = ElementTree.fromstring(svg(comparison()))
    own, peer = (float(bar.attrib["width"]) for bar in plot.iter(f"{space}rect"))
    (line,) = plot.iter(f"{space}line")
    start = float(next(plot.iter(f"{space}rect")).attrib["x"])
    assert peer / own == pytest.approx(250 / 500, abs=1e-3)
    assert own / (float(line.attrib["x1"]) - start) == pytest.approx(500 / 650, abs=1e-3)
    texts = ["".join(text.itertext()) for text in plot.iter(f"{space}text")]
    assert {"embedding-server", "500", "infinity, ONNX", "250", "engine alone 650"} <= set(texts)


# ----------------------------------------------------------------------------------------- ceiling


@pytest.mark.parametrize("seed", range(20))
def test_full_batches_hold_every_input_once_within_the_budget(seed: int) -> None:
    chance = random.Random(seed)
    budget = 512
    lengths = [chance.randint(3, 256) for _ in range(chance.randint(1, 200))]
    encodings = [Encoding(tuple(range(length)), length) for length in lengths]
    batches = full_batches(encodings, budget)
    packed = [int(length) for batch in batches for length in batch.lengths]
    assert Counter(packed) == Counter(lengths)
    assert packed == sorted(lengths)
    assert all(batch.tokens <= budget for batch in batches)
    # Twice the fewest there could be would mean half-empty ones.
    assert len(batches) < 2 * -(-sum(lengths) // budget) + 1


def test_an_input_over_the_budget_is_a_batch() -> None:
    batches = full_batches([Encoding(tuple(range(n)), n) for n in (600, 5, 700)], 512)
    assert [batch.tokens for batch in batches] == [5, 600, 700]


# -------------------------------------------------------------------------------------------- load


class Answers(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    status = 200

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.bodies.append(body)  # type: ignore[attr-defined]
        answer = b'{"said": "\xff"}'
        # One write: two would wait for each other's acknowledgement.
        self.wfile.write(
            b"HTTP/1.1 %d Said\r\nContent-Length: %d\r\n\r\n%b" % (self.status, len(answer), answer)
        )

    def log_message(self, format: str, *args: object) -> None:
        pass


class Refusals(Answers):
    status = 503


@contextmanager
def answering(kind: type[Answers]) -> Iterator[tuple[str, list[bytes]]]:
    """A server's address, and the bodies that it gets."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        server.bodies = []  # type: ignore[attr-defined]
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1", server.bodies  # type: ignore[attr-defined]
        finally:
            server.shutdown()
            thread.join()


@needs_wrk
def test_the_load_sends_every_body_and_counts_every_answer(tmp_path: Path) -> None:
    bodies = [b'{"a": "\xc3\xa4"}', b'{"lines":\n "two"}', b"{}"]
    write_bodies(tmp_path / "bodies", bodies)
    with answering(Answers) as (url, received):
        load = put_load(url, tmp_path / "bodies", connections=2, seconds=0.2)
        received = list(received)
    assert load.answers == len(received)
    assert load.bytes == load.answers * len(b'{"said": "\xff"}')
    assert load.seconds >= 0.2
    counts = Counter(received)
    assert set(counts) == set(bodies)
    assert max(counts.values()) - min(counts.values()) <= 1


@needs_wrk
def test_an_error_under_load_is_no_result(tmp_path: Path) -> None:
    write_bodies(tmp_path / "bodies", [b"{}"])
    with answering(Refusals) as (url, _), pytest.raises(LoadFailed, match=r"503: \{"):
        put_load(url, tmp_path / "bodies", connections=1, seconds=0.1)


def test_without_wrk_it_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(LoadFailed, match="apt-get install wrk"):
        wrk_program()


# --------------------------------------------------------------------------------------- the whole


def run_compare(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "compare", *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )


@needs_wrk
def test_a_short_run_without_peers() -> None:
    done = run_compare(
        *("--only", "embedding-server", "--workload", "pair", "--rounds", "1", "--seconds", "1")
    )
    assert done.returncode == 0, done.stderr
    assert "off sentence-transformers" in done.stderr
    lines = done.stdout.splitlines()
    assert re.match(r"workload +server +req/s", lines[0])
    found = json.loads(lines[-1])
    (row,) = Comparison.from_json(found["comparison"]).tested
    assert set(row.samples) == {"embedding-server", "engine"}
    assert row.samples["embedding-server"][0].cpu_seconds > 0
    assert row.memory_mib["embedding-server"] > 0
    assert found["summary"]["pair"]["ratio_to"]["engine"]["median"] > 0


@needs_wrk
def test_without_peers_it_is_told_how_to_get_them(tmp_path: Path) -> None:
    done = run_compare("--peers", str(tmp_path))
    assert done.returncode == 1
    assert "benchmarks/setup-peers" in done.stderr
    assert "Traceback" not in done.stderr
