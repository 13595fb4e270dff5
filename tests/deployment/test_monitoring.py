# SPDX-License-Identifier: MIT OR Apache-2.0
"""A real Prometheus that scrapes real servers: every query of the dashboard, and every alert."""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from dashboard import PROMETHEUS, RULES, alerts, labels_in_legend, load_dashboard, panels_of
from fake_backends import RELEASE
from faulty_server import PROGRAM
from in_process import until
from live import LiveServer, free_port, running_server
from readme import commands, section

ROOT = Path(__file__).resolve().parents[2]
TESTS = Path(__file__).parent / "data_monitoring" / "alerts.yml"
MODEL = "all-MiniLM-L6-v2"

pytestmark = [
    pytest.mark.packaging,
    pytest.mark.skipif(
        not (shutil.which("prometheus") and shutil.which("promtool")),
        reason="needs prometheus and promtool (Debian: apt-get install prometheus)",
    ),
]

# What a counter's rate is taken over: Grafana's $__rate_interval is four scrapes at least.
RATE_INTERVAL = "8s"

# Queries whose value is 0 here, and why.
ZERO = {
    ("Padding", "{{model}}"): "the packed graphs of this model need none",
}

Json = dict[str, Any]
Values = dict[str, Sequence[str] | str]


@dataclass(frozen=True)
class Prometheus:
    """A client of a running Prometheus, since when that runs, and what it scrapes."""

    client: httpx.Client
    since: float
    faulty: LiveServer
    workers: LiveServer

    def get(self, path: str, **parameters: Any) -> Any:
        """What its HTTP API answers."""
        response = self.client.get(f"/api/v1/{path}", params=parameters)
        assert response.status_code == 200, f"{parameters}: {response.text}"
        return response.json()["data"]

    def range(self, query: str) -> list[Json]:
        """Every series of ``query`` from the beginning until now, as a graph would ask."""
        # A step further, as the last one may be before what was scraped last.
        times = {"start": self.since, "end": time.time() + 1, "step": 1}
        found: list[Json] = self.get("query_range", query=query, **times)["result"]
        return found

    def value(self, query: str) -> float:
        """Of a query for one number now; NaN if there is none."""
        found = self.get("query", query=query)["result"]
        return float(found[0]["value"][1]) if found else math.nan

    def wait_for_scrapes(self) -> None:
        """Until both servers were scraped after now."""
        now = time.time()
        until(lambda: self.value("min(timestamp(up))") > now)


def instance(server: LiveServer) -> str:
    return server.url.removeprefix("http://")


# -------------------------------------------------------------------------------------- the set-up


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Has scraped two servers to which everything has happened that there is a metric for."""
    folder = tmp_path_factory.mktemp("prometheus")
    release = folder / "release"
    flags = ("--model", MODEL, "--threads", "2", "--inference-timeout", "4")
    env = {RELEASE: str(release)}
    with (
        running_server(*flags, env=env, program=PROGRAM) as faulty,
        running_server("--model", MODEL, "--workers", "2", "--max-concurrent-requests", "1")
        as workers,
        running_prometheus(folder, faulty, workers) as running,
    ):  # fmt: skip
        until(lambda: workers.log.count("is ready (process") == 2)
        # Twice, as a rate is seen only of what was there before.
        for _ in range(2):
            running.wait_for_scrapes()
            use(faulty)
            overload(workers)
            let_requests_wait(running, release)
        pid = workers.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
        os.kill(int(children.split()[0]), signal.SIGKILL)
        until(lambda: workers.log.count("is ready (process") == 3)
        running.wait_for_scrapes()
        yield running


@contextmanager
def running_prometheus(folder: Path, *servers: LiveServer) -> Iterator[Prometheus]:
    """As the README starts it, on the shipped files but for addresses and a second's interval."""
    config = yaml.safe_load(PROMETHEUS.read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(RULES)]
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [*map(instance, servers)]
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    address = f"127.0.0.1:{free_port()}"
    command = readme_command("prometheus")
    command = command.replace(str(PROMETHEUS.relative_to(ROOT)), str(file))
    command = re.sub(r"(--storage\.tsdb\.path=)\S+", rf"\g<1>{folder / 'data'}", command)
    log_file = folder / "prometheus.log"
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            [*shlex.split(command), f"--web.listen-address={address}"], stdout=log, stderr=log
        )
    try:
        with httpx.Client(base_url=f"http://{address}", timeout=30) as client:
            until(lambda: process.poll() is not None or is_ready(client))
            assert process.poll() is None, log_file.read_text(encoding="utf-8")
            yield Prometheus(client, time.time(), *servers)
    finally:
        process.terminate()
        process.wait(20)


def is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/-/ready").status_code == 200
    except httpx.TransportError:
        return False


def readme_command(program: str) -> str:
    (found,) = (
        command
        for command in commands(section("### Prometheus and Grafana"))
        if command.startswith(f"{program} ")
    )
    return found


def embed(server: LiveServer, texts: object, **more: Any) -> httpx.Response:
    body = {"model": MODEL, "input": texts}
    return httpx.post(f"{server.url}/v1/embeddings", json=body, **{"timeout": 60, **more})


def use(server: LiveServer) -> None:
    """Requests that are in order, that are not, and that the backend fails on."""
    statuses = [
        embed(server, ["iPhone", "Samsung"]).status_code,
        embed(server, ["much too long " * 200, "short"]).status_code,
        embed(server, []).status_code,
        embed(server, "please raise").status_code,
        embed(server, [f"please need much memory {number}" for number in range(9)]).status_code,
        httpx.post(f"{server.url}/openai/v1/embeddings", json={"model": "other"}).status_code,
        httpx.get(f"{server.url}/nothing").status_code,
        httpx.get(f"{server.url}/health/ready").status_code,
    ]
    assert statuses == [200, 200, 400, 500, 200, 400, 404, 200]


def let_requests_wait(prometheus: Prometheus, release: Path) -> None:
    """Both cores hang: a deadline passes, a client hangs up, and others wait until it is over."""
    server = prometheus.faulty
    release.unlink(missing_ok=True)
    assert embed(server, "please wait", headers={"x-request-timeout": "0.2"}).status_code == 504
    with pytest.raises(httpx.ReadTimeout):
        embed(server, "please wait", timeout=httpx.Timeout(60, read=1))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(embed, server, ["what waits", "for a core"])
        until(lambda: prometheus.value("max(embedding_server_queue_tokens)") > 0)
        assert waiting.result().status_code == 503
    until(lambda: prometheus.value("min(embedding_server_ready)") == 0)
    release.touch()
    until(lambda: httpx.get(f"{server.url}/health/ready").status_code == 200)


def overload(server: LiveServer) -> None:
    """More requests than may be admitted."""
    texts = [f"{number} of many words" for number in range(50)]
    with ThreadPoolExecutor(8) as pool:

        def refused() -> bool:
            asked = [pool.submit(embed, server, texts) for _ in range(8)]
            statuses = {job.result().status_code for job in asked}
            assert statuses <= {200, 429}
            return statuses == {200, 429}

        until(refused)


# -------------------------------------------------------------------------- the dashboard's queries


def as_grafana(query: str, values: Values) -> str:
    """``query`` with Grafana's variables replaced: a list of chosen values, or what stands for All.

    As its Prometheus data source does it: values are escaped for a regular expression in a string,
    and several become a group.
    """
    query = query.replace("$__rate_interval", RATE_INTERVAL)
    for name, chosen in values.items():
        if not isinstance(chosen, str):
            escaped = [re.sub(r"[\\^$*+?.()|\[\]{}]", r"\\\\\g<0>", value) for value in chosen]
            chosen = escaped[0] if len(escaped) == 1 else f"({'|'.join(escaped)})"
        query = query.replace(f"${name}", chosen)
    assert "$" not in query, query
    return query


def variables(prometheus: Prometheus, **chosen: Sequence[str]) -> Values:
    """What each variable is when All is chosen, but for those that are ``chosen``."""
    values: Values = {}
    for variable in load_dashboard()["templating"]["list"]:
        if variable["type"] != "query":
            continue
        name = variable["name"]
        asked = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
        assert asked is not None
        series = as_grafana(asked[1], values)
        times = {"start": prometheus.since, "end": time.time()}
        options = prometheus.get(f"label/{asked[2]}/values", **{"match[]": series}, **times)
        assert options, f"${name} offers nothing"
        assert set(chosen.get(name, ())) <= set(options)
        values[name] = chosen.get(name) or variable.get("allValue") or options
    return values


@pytest.fixture(scope="module")
def of_all(prometheus: Prometheus) -> Values:
    """The variables as they are when the dashboard is opened."""
    return variables(prometheus)


@pytest.fixture(scope="module")
def of_one(prometheus: Prometheus) -> Values:
    """The variables when one server and one model are chosen."""
    return variables(prometheus, instance=[instance(prometheus.faulty)], model=[MODEL])


def numbers(series: Json) -> list[float]:
    return [float(value) for _, value in series["values"]]


def test_the_variables_offer_what_is_there(prometheus: Prometheus, of_all: Values) -> None:
    addresses = sorted(map(instance, (prometheus.faulty, prometheus.workers)))
    assert of_all == {"job": ["embedding-server"], "instance": addresses, "model": ".*"}


@pytest.mark.parametrize("panel", panels_of(load_dashboard()), ids=lambda panel: panel["title"])
def test_a_panel_shows_something(
    prometheus: Prometheus,
    of_all: Values,
    of_one: Values,
    panel: Json,
) -> None:
    for target in panel["targets"]:
        title, legend = panel["title"], target["legendFormat"]
        found = prometheus.range(as_grafana(target["expr"], of_all))
        assert found, f"{legend}: no series"
        finite = [number for series in found for number in numbers(series) if math.isfinite(number)]
        assert finite, f"{legend}: no number"
        assert (max(finite) == 0) == ((title, legend) in ZERO), f"{legend}: {max(finite)}"
        for series in found:
            missing = labels_in_legend(legend) - set(series["metric"])
            assert not missing, f"{legend}: {series['metric']} has no {missing}"
        alone = prometheus.range(as_grafana(target["expr"], of_one))
        assert any(math.isfinite(n) for series in alone for n in numbers(series)), (
            f"{legend}, alone"
        )
        of_others = {series["metric"].get("instance") for series in alone}
        assert instance(prometheus.workers) not in of_others


def test_a_misspelt_query_shows_nothing(prometheus: Prometheus) -> None:
    """So that the test above can fail."""
    assert not prometheus.range("rate(embedding_server_request_total[8s])")
    assert not prometheus.range('embedding_server_queue_tokens{model="another"}')


# --------------------------------------------------------------------------------------- the alerts


def test_the_files_are_valid() -> None:
    done = subprocess.run(
        shlex.split(readme_command("promtool")), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(alerts())} rules found" in done.stdout
    assert subprocess.run(["promtool", "check", "rules", RULES]).returncode == 0


def test_alerts_fire_when_they_should_and_not_before(tmp_path: Path) -> None:
    """As shipped; and that the tests notice a wrong bound, and a wrong name."""

    def run(old: str, new: str) -> subprocess.CompletedProcess[str]:
        folder = tmp_path / new
        folder.mkdir()
        rules = RULES.read_text(encoding="utf-8")
        assert old in rules
        (folder / "rules.yml").write_text(rules.replace(old, new), encoding="utf-8")
        told = TESTS.read_text(encoding="utf-8")
        told, replaced = re.subn(r"  - \S+/rules\.yml", "  - rules.yml", told)
        assert replaced == 1
        (folder / "alerts.yml").write_text(told, encoding="utf-8")
        command = ["promtool", "test", "rules", folder / "alerts.yml"]
        return subprocess.run(command, capture_output=True, text=True)

    with ThreadPoolExecutor(2) as pool:
        shipped, *broken = pool.map(
            run,
            ("alert", "queue_tokens_limit > 0.8", "worker_restarts_total"),
            ("alert", "queue_tokens_limit > 0.5", "worker_restart_total"),
        )
    assert shipped.returncode == 0, shipped.stdout + shipped.stderr
    for done in broken:
        assert done.returncode == 1
        assert "FAILED" in done.stdout + done.stderr


def test_prometheus_evaluates_every_alert(prometheus: Prometheus) -> None:
    """Those that wait for nothing have fired; those that wait for longer have begun to."""
    (group,) = prometheus.get("rules", type="alert")["groups"]
    assert {rule["name"] for rule in group["rules"]} == {rule["alert"] for rule in alerts()}
    for rule in group["rules"]:
        assert (rule["health"], rule.get("lastError", "")) == ("ok", ""), rule["name"]

    def seen(state: str) -> set[str]:
        found = prometheus.range(f'ALERTS{{alertstate="{state}"}}')
        return {series["metric"]["alertname"].removeprefix("EmbeddingServer") for series in found}

    assert seen("firing") == {"FailedBatches", "OutOfMemory", "Hangs"}
    assert seen("pending") >= {"NotReady", "Errors", "Refuses", "Deadlines"}
    for alert in prometheus.get("alerts")["alerts"]:
        notes = " ".join(alert["annotations"].values())
        assert "<no value>" not in notes
        assert "error" not in notes.partition("template")[2]


def test_a_server_that_is_gone_is_noticed(prometheus: Prometheus) -> None:
    """The last test here, as it ends a server."""
    assert prometheus.workers.stop() == 0
    down = f'ALERTS{{alertname="EmbeddingServerDown", instance="{instance(prometheus.workers)}"}}'
    until(lambda: prometheus.value(down) == 1)
