# SPDX-License-Identifier: MIT OR Apache-2.0
"""Ray without a cluster: arguments, sums, and options that are refused before one starts."""

from __future__ import annotations

import asyncio
import importlib.metadata
import resource
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.exceptions
import yaml
from live import environment, run_cli
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from readme import ROOT, blocks, commands, section

from embedding_server.corpus.options import CorpusOptions
from embedding_server.engine.parameters import EmbedParams
from embedding_server.errors import ConfigurationError, ModelUnavailable, NotReady, Overloaded
from embedding_server.ray.corpus import ClusterOptions, open_folder, shares_of
from embedding_server.ray.metrics import Metrics, reporting
from embedding_server.ray.options import options_of
from embedding_server.ray.parts import PartEmbedder, parts_of
from embedding_server.ray.scaling import QUEUED_TOKENS, QueuedTokens
from embedding_server.ray.serving import Answer, Forwarded, ask_replicas
from embedding_server.settings import load_settings
from embedding_server.telemetry import Telemetry

MODEL = "all-MiniLM-L6-v2"

# --------------------------------------------------------------------------------------- arguments


def test_arguments_are_rays_options_and_settings() -> None:
    """As ``serve run`` gives them, all of them strings."""
    options, settings = options_of({"model": MODEL, "num_cpus": "2.5", "max_replicas": "8"})
    assert (options.num_cpus, options.max_replicas) == (2.5, 8)
    assert settings.model == (MODEL,)
    assert settings.threads == 2
    assert options_of({"num_cpus": 0.25})[1].threads == 1
    assert options_of({"num_cpus": 0.25, "threads": 3})[1].threads == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"modle": MODEL}, "no argument modle; there are min_replicas"),
        ({"num_cpus": "many"}, "num_cpus: "),
        ({"min_replicas": 3, "max_replicas": 2}, "max_replicas=2 is below min_replicas=3"),
        ({"port": 80}, "port can't be set under Ray Serve: set http_options"),
        ({"workers": 2}, "workers can't be set under Ray Serve: set min_replicas"),
        ({"max_body_bytes": 0}, "--max-body-bytes"),
    ],
    ids=["unknown", "kind", "bounds", "port", "workers", "setting"],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        options_of(arguments)


def test_an_invalid_model_is_refused_before_a_cluster_starts() -> None:
    from embedding_server.ray import app

    with pytest.raises(ModelUnavailable):
        app({"model": "no/such/model/anywhere"})


def test_paths_are_absolute(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ray's processes have another working directory; a name is no path."""
    monkeypatch.chdir(tiny_model.parent)
    given = {"model": f"./tiny,{MODEL}", "load_models_from": "tiny"}
    _, settings = options_of(given)
    assert settings.model == (str(tiny_model), MODEL)
    assert settings.load_models_from == tiny_model


def test_the_configuration_of_the_docs() -> None:
    from ray.serve.schema import ServeDeploySchema

    (block,) = blocks((ROOT / "docs/deployment.md").read_text().partition("\n## Ray\n")[2], "yaml")
    configuration = ServeDeploySchema.model_validate(yaml.safe_load(block))
    (application,) = configuration.applications
    assert application.import_path == "embedding_server.ray:app"
    options, settings = options_of(application.args)
    assert (options.max_replicas, settings.model, settings.threads) == (8, (MODEL,), 2)


@pytest.mark.parametrize(
    "start",
    [
        f"from embedding_server.ray import app; begin = lambda: app({{'model': {MODEL!r}}})",
        "from embedding_server.ray.corpus import connect; begin = lambda: connect('nowhere')",
    ],
    ids=["serve", "embed"],
)
def test_no_usage_is_reported(start: str) -> None:
    """By a cluster that we start; an import changes nothing in the environment."""
    program = (
        f"import contextlib, os\nfrom embedding_server.errors import ConfigurationError\n{start}\n"
        "variable = 'RAY_USAGE_STATS_ENABLED'\n"
        "before = os.environ.get(variable)\n"
        "with contextlib.suppress(ConfigurationError):\n    begin()\n"
        "print(before, os.environ[variable])"
    )
    env = environment()
    env.pop("RAY_USAGE_STATS_ENABLED", None)
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, check=True)
    assert done.stdout.split() == [b"None", b"0"]


def test_the_constraints_pin_all_that_the_extra_installs() -> None:
    """At the versions that are installed, for this Python."""
    install, *_ = commands(section("### Many machines: Ray"))
    assert shlex.split(install) == ["scripts/install", "[ray]"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {canonicalize_name(n): v for n, _, v in (line.partition("==") for line in lines) if v}
    todo = [Requirement("embedding-server[ray]")]
    seen: set[str] = set()
    while todo:
        wanted = todo.pop()
        if str(wanted) in seen:
            continue
        seen.add(str(wanted))
        found = importlib.metadata.distribution(wanted.name)
        if wanted.name != "embedding-server":
            assert pinned[canonicalize_name(wanted.name)] == found.version
        for text in found.requires or ():
            further = Requirement(text)
            extras = [*wanted.extras, ""]
            if further.marker is None or any(further.marker.evaluate({"extra": e}) for e in extras):
                todo.append(further)
    assert len(seen) > 40


# ------------------------------------------------------------------------------------------ ingress


def answer_of(*outcomes: object, until: float | None = None) -> tuple[Answer, list[Forwarded]]:
    """The answer of an ingress whose replicas do ``outcomes``, one a call; and their requests."""
    calls: list[Forwarded] = []

    async def answer(request: Forwarded) -> Any:
        outcome = outcomes[len(calls)]
        calls.append(request)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def run() -> Answer:
        remote = SimpleNamespace(remote=lambda request: asyncio.ensure_future(answer(request)))
        models = SimpleNamespace(answer=remote)
        now = asyncio.get_running_loop().time()
        headers = [(b"x-request-timeout", b"9"), (b"x-request-id", b"mine")]
        request = Forwarded({"method": "POST", "path": "/v1/embeddings", "headers": headers}, b"{}")
        return await ask_replicas(models, request, until and now + until)

    return asyncio.run(run()), calls


def test_another_replica_is_asked_when_one_dies() -> None:
    fine = Answer(200, (), b"vectors")
    lost = ray.exceptions.ObjectLostError("00", None, "")
    answer, calls = answer_of(ray.exceptions.ActorDiedError(), lost, fine, until=9)
    assert answer is fine
    assert len(calls) == 3
    assert dict(calls[0].scope["headers"])[b"x-request-timeout"] == b"9"
    # The others have what time is left, and all else alike.
    assert 8 < float(dict(calls[2].scope["headers"])[b"x-request-timeout"]) < 9
    assert dict(calls[2].scope["headers"])[b"x-request-id"] == b"mine"
    assert calls[2].body == b"{}"


def test_a_request_that_kills_replicas_is_given_up() -> None:
    with pytest.raises(NotReady, match="4 replicas in a row"):
        answer_of(*(ray.exceptions.ActorDiedError() for _ in range(9)))


def test_no_room_at_any_replica_is_overload() -> None:
    with pytest.raises(Overloaded):
        answer_of(BackPressureError(8, 8))


def test_models_that_no_replica_can_load_are_not_ready() -> None:
    """Not in Ray's words."""
    with pytest.raises(NotReady, match="No replica could be started"):
        answer_of(DeploymentUnavailableError(None))


# ----------------------------------------------------------------------------------------- scaling


@pytest.mark.parametrize(
    ("waiting", "wanted"),
    [([], 1), ([0.0], 1), ([1000.0], 1), ([1001.0], 2), ([2500.0, 2500.0], 5)],
    ids=["unknown", "idle", "at", "above", "two"],
)
def test_replicas_follow_waiting_tokens(waiting: list[float], wanted: int) -> None:
    metrics = {QUEUED_TOKENS: dict(enumerate(waiting))} if waiting else None
    assert QueuedTokens(target=1000)(SimpleNamespace(aggregated_metrics=metrics)) == (wanted, {})


# ----------------------------------------------------------------------------------------- metrics


class _Handle:
    """Calls as a Ray Serve handle does; while it is ``broken``, every call fails."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self.broken = False
        self.report = SimpleNamespace(remote=self._report)

    async def _report(self, *arguments: Any) -> None:
        if self.broken:
            raise ConnectionError
        await self.metrics.report(*arguments)


def value(exposition: bytes, line: str) -> float | None:
    rows = [row.rpartition(" ") for row in exposition.decode().splitlines()]
    found = [float(number) for name, _, number in rows if name == f"embedding_server_{line}"]
    return found[0] if found else None


def test_counters_stay_and_gauges_go() -> None:
    async def run() -> None:
        metrics = Metrics()
        handle = _Handle(metrics)
        first, second = Telemetry(), Telemetry()
        async with reporting(first, "first", handle):
            async with reporting(second, "second", handle):
                for telemetry, count in ((first, 3.0), (second, 4.0)):
                    telemetry.for_model("m").tokens.inc(count)
                    telemetry.for_model("m").queue_tokens.set(count)
                    telemetry.ready.set(count == 3)
                    telemetry.for_model("m").batch_size.observe(count)
                    telemetry.model_loaded("m", backend="onnx", revision=None, dims=2, max_tokens=8)
                for _ in range(200):
                    if value(await metrics.exposition(), 'tokens_total{model="m"}') == 7:
                        break
                    await asyncio.sleep(0.05)  # each reports once a second
                text = await metrics.exposition()
                assert value(text, 'queue_tokens{model="m"}') == 7
                assert value(text, 'batch_size_count{model="m"}') == 2
                assert value(text, 'truncated_inputs_total{model="m"}') == 0
                assert value(text, 'batch_size_bucket{le="4.0",model="m"}') == 2
                info = 'model_info{backend="onnx",dims="2",max_tokens="8",model="m",revision=""}'
                assert value(text, info) == 1
                assert value(text, "ready") == 1
                started = float(text.partition(b"\nprocess_start_time_seconds ")[2].split()[0])
                assert 0 < started < 4e9
                limit = float(text.partition(b"\nprocess_max_fds ")[2].split()[0])
                assert limit == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
                handle.metrics = metrics = Metrics()  # its process has died
                for _ in range(200):
                    text = await metrics.exposition()
                    if value(text, 'queue_tokens{model="m"}') == 7:
                        break
                    await asyncio.sleep(0.05)
                # Counters begin at zero, which Prometheus takes for a restart.
                assert value(text, 'tokens_total{model="m"}') == 0
                handle.broken = True
                first.for_model("m").tokens.inc(10)
            handle.broken = False  # the next report includes the failed ones
        text = await metrics.exposition()
        assert value(text, 'tokens_total{model="m"}') == 10
        assert value(text, 'queue_tokens{model="m"}') in (
            None,
            4,
        )  # the second died without its last report
        plain, _ = first.exposition()
        kinds = {row for row in plain.decode().splitlines() if row.startswith("#")}
        assert kinds == {row for row in text.decode().splitlines() if row.startswith("#")}

    asyncio.run(run())


# ----------------------------------------------------------------------------------------- corpora


def write(file: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), file)
    return file


def embedded(file: Path, output: Path) -> dict[str, Any]:
    """The result of an actor for the only part of ``file``."""
    settings = load_settings({"model": MODEL, "threads": "1"})
    (part,) = parts_of([file], "text")
    output.mkdir()
    options = CorpusOptions([str(file)], EmbedParams(), field="text")
    return PartEmbedder(settings, options, output)(asdict(part))


def test_all_that_is_text_is_embedded(tmp_path: Path) -> None:
    """And other columns stay as they were."""
    texts = pa.array(["one", "", "one"])
    for kind in (
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.dictionary("int32", "string"),
    ):
        beside = {"n": [{"a": [1]}, None, {"a": []}], "c": texts.dictionary_encode()}
        file = write(tmp_path / "in.parquet", text=texts.cast(kind), **beside)
        output = tmp_path / f"{kind}"
        assert embedded(file, output)["error"] == ""
        assert pq.read_table(output).drop_columns("embedding") == pq.read_table(file)


def test_rows_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    no_text = pa.array([b"one", b"t\xffo"]).buffers()
    file = write(tmp_path / "in.parquet", text=pa.Array.from_buffers(pa.string(), 2, no_text))
    error = embedded(file, tmp_path / "bytes")["error"]
    assert error == f"{file}, row 1: not UTF-8 at byte 1; the first row is 0"
    write(file, text=[f"text {number}" for number in range(1000)])
    content = file.read_bytes()
    file.write_bytes(content[:100] + bytes(300) + content[400:])
    assert embedded(file, tmp_path / "torn")["error"].startswith(f"{file}, from row 0 on: ")
    assert not list((tmp_path / "torn").iterdir())


@pytest.mark.parametrize(
    ("nodes", "threads", "gpus", "shares"),
    [
        ([{"CPU": 8.0}, {"CPU": 8.0}], None, 0.0, (8, 2)),
        ([{"CPU": 8.0}, {"CPU": 4.0}, {}], None, 0.0, (4, 3)),
        ([{"CPU": 8.0}, {"CPU": 8.0}], 3, 0.0, (3, 4)),
        ([{"CPU": 16.0, "GPU": 4.0}, {"CPU": 64.0}], None, 1.0, (4, 4)),
        ([{"CPU": 16.0, "GPU": 1.0}], None, 0.25, (4, 4)),
        ([{"CPU": 16.0, "GPU": 4.0}], 8, 1.0, (8, 2)),
    ],
    ids=["nodes", "unequal nodes", "threads", "gpus", "part of a gpu", "both"],
)
def test_a_cluster_is_shared_out(
    nodes: list[dict[str, float]], threads: int | None, gpus: float, shares: tuple[int, int]
) -> None:
    cluster = [{"Alive": True, "Resources": resources} for resources in nodes]
    cluster.append({"Alive": False, "Resources": {"CPU": 99.0, "GPU": 99.0}})
    assert shares_of(cluster, threads, ClusterOptions(gpus=gpus)) == shares


def test_a_cluster_without_room_is_refused() -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": 8.0}}]
    with pytest.raises(ConfigurationError, match="room for an actor of 16 cores; see --threads"):
        shares_of(nodes, 16, ClusterOptions())
    with pytest.raises(ConfigurationError, match="cores and 1 GPUs"):
        shares_of(nodes, None, ClusterOptions(gpus=1.0))


def refused(*arguments: object) -> str:
    """The error of ``embed --ray``, which needs no cluster to refuse its options."""
    done = run_cli("embed", "--ray", "--model", MODEL, *map(str, arguments))
    assert done.returncode == 1
    return done.stderr.decode()


def test_inputs_that_cannot_be_embedded_are_refused_by_name(tmp_path: Path) -> None:
    good = write(tmp_path / "good.parquet", id=[1], text=["one"])
    output = tmp_path / "output"
    numbers = write(tmp_path / "numbers.parquet", text=[1, 2])
    assert f"{numbers}: the column 'text' is int64" in refused(
        numbers, "--field", "text", "-o", output
    )
    assert "no column 'body': name one of id, text" in refused(
        good, "--field", "body", "-o", output
    )
    other = write(tmp_path / "other.parquet", text=["two"])
    assert f"{other} has other columns than {good}" in refused(
        good, other, "--field", "text", "-o", output
    )
    torn = tmp_path / "torn.parquet"
    torn.write_bytes(good.read_bytes()[:-9])
    assert f"{torn} is no Parquet file" in refused(torn, "--field", "text", "-o", output)
    done = write(tmp_path / "done.parquet", text=["one"], embedding=["x"])
    twice = tmp_path / "twice.parquet"
    pq.write_table(pa.Table.from_arrays([["one"], ["two"]], names=["text", "text"]), twice)
    assert "has several columns 'text'" in refused(twice, "--field", "text", "-o", output)
    assert "has a column 'embedding' already" in refused(done, "--field", "text", "-o", output)
    assert not output.exists()
    nowhere = refused(good, "--field", "text", "-o", output, "--ray-address", "nowhere")
    assert "RAY_ADDRESS, nowhere: no cluster is available there: " in nowhere
    assert "Traceback" not in nowhere


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    good = write(tmp_path / "good.parquet", text=["one"])
    output = tmp_path / "output"
    output.mkdir()
    (output / "mine.parquet").touch()
    assert "holds other files" in refused(good, "--field", "text", "-o", output)
    (output / "mine.parquet").unlink()
    (output / "._manifest.json.7.part").touch()  # of a run that was killed as it began
    assert open_folder(str(output), {"model": "another"}) == output
    assert "was begun with other values of" in refused(good, "--field", "text", "-o", output)
    assert "-o must name a folder" in refused(good, "--field", "text", "-o", good)
    plain = run_cli("embed", "--ray-actors", "2", "--model", MODEL, str(good))
    assert b"--ray-actors needs --ray" in plain.stderr


def test_without_the_extra_the_error_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['ray'] = None\n")
    env = environment({"PYTHONPATH": f"{tmp_path}:{environment().get('PYTHONPATH', '')}"})
    done = run_cli("embed", "--ray", "--model", MODEL, "x.parquet", env=env)
    assert done.returncode == 1
    assert b"pip install 'embedding-server[ray]'" in done.stderr
    for words in (["--help"], ["embed", "--help"]):
        assert run_cli(*words, env=env).returncode == 0


def test_help_does_not_load_ray() -> None:
    program = (
        "import sys\nfrom embedding_server.cli import build_parser\nbuild_parser().format_help()\n"
        "sys.exit('ray' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
