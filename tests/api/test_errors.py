# SPDX-License-Identifier: MIT OR Apache-2.0
"""One shape for every error of every route, and each row of the table of statuses."""

from __future__ import annotations

import gzip
import inspect
import json
import logging
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fake_backends
import httpx
import pytest
import tiny_models
from error_shape import error_of
from fake_backends import Blocked
from in_process import serving, until
from live import LiveServer, running_server

from embedding_server import errors
from embedding_server.api.errors import ERROR_STATUS
from embedding_server.app import create_app
from embedding_server.backends.base import BACKENDS
from embedding_server.serving.servers.base import SERVERS
from embedding_server.settings import Settings

MODEL = "all-MiniLM-L6-v2"
KEY = "sesame-4711"
KEYED = {"authorization": f"Bearer {KEY}"}
BODY_LIMIT = 1_000_000
TOKEN_LIMIT = 1000
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD")


def _operations() -> list[tuple[str, str]]:
    """Every (method, path) of the OpenAPI document, with a model's name filled in."""
    document = create_app(Settings(model=(MODEL,))).openapi()
    return [
        (method.upper(), path.replace("{name}", MODEL))
        for path, operations in document["paths"].items()
        for method in operations
    ]


OPERATIONS = _operations()
PAGES = [("GET", "/docs"), ("GET", "/openapi.json")]
HEALTH = [operation for operation in OPERATIONS if operation[1].startswith("/health")]
PATHS = sorted({path for _, path in [*OPERATIONS, *PAGES]})
EMBEDDINGS = [operation for operation in OPERATIONS if operation[1].endswith("/embeddings")]
# These answer nothing without a model.
WITH_MODELS = [operation for operation in OPERATIONS if "/v1/" in operation[1]]


def by_name(operations: list[tuple[str, str]]) -> Any:
    ids = [" ".join(operation) for operation in operations]
    return pytest.mark.parametrize(("method", "path"), operations, ids=ids)


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def guarded() -> Iterator[LiveServer]:
    """A server with keys and small limits; its log is JSON."""
    flags = {
        "--api-key": KEY,
        "--max-body-bytes": str(BODY_LIMIT),
        "--max-queued-tokens": str(TOKEN_LIMIT),
        "--log-format": "json",
        "--log-level": "debug",
    }
    arguments = [part for flag in flags.items() for part in flag]
    with running_server("--model", MODEL, *arguments, "--api-key", "another-key") as live:
        yield live


@pytest.fixture(scope="module")
def guarded_client(guarded: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=guarded.url, timeout=60) as client:
        yield client


@pytest.fixture
def use_backend(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts one of ``fake_backends`` in the place of onnx."""

    def use(backend: type[fake_backends.Working]) -> None:
        monkeypatch.setitem(BACKENDS, "onnx", f"fake_backends:{backend.__name__}")

    return use


@pytest.fixture
def blocked(use_backend: Any) -> Iterator[type[Blocked]]:
    """The blocked backend in use; released at the end, whatever happens."""
    use_backend(Blocked)
    yield Blocked
    Blocked.release()


def body_for(path: str, input: Any = "a", model: str = MODEL) -> dict[str, Any]:
    """What ``httpx.Client.request`` needs to send what ``path`` wants."""
    return {"json": {"model": model, "input": input}} if path.endswith("/embeddings") else {}


def embed(client: httpx.Client, input: Any, model: str = MODEL) -> httpx.Response:
    return client.post("/v1/embeddings", json={"model": model, "input": input}, headers=KEYED)


# The table


def test_every_exception_has_a_status() -> None:
    classes = {
        value
        for _, value in inspect.getmembers(errors, inspect.isclass)
        if issubclass(value, Exception) and value.__module__ == errors.__name__
    }
    assert set(ERROR_STATUS) == classes
    assert classes == {getattr(errors, name) for name in errors.__all__}


@pytest.mark.parametrize(
    ("status", "names"),
    {
        400: ["InvalidRequest", "ContextLengthExceeded"],
        401: ["Unauthenticated"],
        404: ["ModelNotFound"],
        409: ["FingerprintMismatch"],
        413: ["BodyTooLarge"],
        415: ["UnsupportedContent"],
        429: ["Overloaded"],
        500: ["InferenceFailed"],
        503: ["NotReady", "ModelUnavailable", "ModelNotSupported"],
    }.items(),
)
def test_the_status_of_each_exception(status: int, names: list[str]) -> None:
    assert [ERROR_STATUS[getattr(errors, name)][0] for name in names] == [status] * len(names)


# 404 and 405


@pytest.mark.parametrize(
    "path",
    [
        "/", "/v1", "/v1/", "/v2/embeddings", "/v1/embeddings/", "/v1/embeddings/x", "//v1/models",
        "/V1/models", "/openai/v1", "/openai/v1/embeddings/", "/health/", "/health/live/",
        "/health/nope", "/metrics/", "/docs/", "/docs/oauth2-redirect", "/redoc", "/favicon.ico",
        "/.env", "/%2e%2e/etc/passwd", "/%00", "/%ff", "/" + "x" * 5000,
    ],
    ids=lambda path: path[:24],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_an_unknown_path(client: httpx.Client, method: str, path: str) -> None:
    error = error_of(client.request(method, path), 404)
    assert error["code"] == "not_found"
    assert "/docs" in error["message"]


@pytest.mark.parametrize("path", PATHS)
def test_a_wrong_method_is_told_the_right_ones(client: httpx.Client, path: str) -> None:
    taken = {method for method, known in [*OPERATIONS, *PAGES] if known == path}
    if not path.endswith("/embeddings"):
        taken.add("HEAD")
    for method in METHODS:
        if method in taken:
            continue
        response = client.request(method, path)
        assert set(response.headers["allow"].split(", ")) == taken
        if method == "HEAD":
            assert response.status_code == 405
            assert not response.content
        else:
            error = error_of(response, 405)
            assert error["code"] == "method_not_allowed"
            assert method in error["message"]


@pytest.mark.parametrize("name", ["nope", "all-minilm-l6-v2", "", "a/b", "../..", "x" * 3000])
@pytest.mark.parametrize("prefix", ["/v1", "/openai/v1"])
def test_an_unknown_model(client: httpx.Client, prefix: str, name: str) -> None:
    responses = [client.post(f"{prefix}/embeddings", json={"model": name, "input": "a"})]
    if name != "../..":  # httpx resolves it
        responses.append(client.get(f"{prefix}/models/{name}"))
    for response in responses:
        error = error_of(response, 404)
        assert (error["param"], error["code"]) == ("model", "model_not_found")
        assert MODEL in error["message"]
        assert len(error["message"]) < 1000


# 401


@by_name([operation for operation in OPERATIONS if operation not in HEALTH] + PAGES)
def test_a_key_is_needed(guarded_client: httpx.Client, method: str, path: str) -> None:
    response = guarded_client.request(method, path, **body_for(path))
    error = error_of(response, 401)
    assert response.headers["www-authenticate"] == "Bearer"
    assert error["code"] == "invalid_api_key"
    assert "Authorization: Bearer" in error["message"]
    response = guarded_client.request(method, path, headers=KEYED, **body_for(path))
    assert response.status_code == 200


@by_name(HEALTH)
def test_health_needs_no_key(guarded_client: httpx.Client, method: str, path: str) -> None:
    assert guarded_client.request(method, path).status_code == 200


@pytest.mark.parametrize("path", ["/nowhere", "/healthy", "/health/../metrics", "/"])
def test_a_path_that_is_none_needs_a_key(guarded_client: httpx.Client, path: str) -> None:
    error_of(guarded_client.get(path), 401)


@pytest.mark.parametrize(
    "value",
    [f"Bearer {KEY}", f"bearer {KEY}", f"BEARER {KEY}", f"Bearer   {KEY}", "Bearer another-key"],
)
def test_a_right_key(guarded_client: httpx.Client, value: str) -> None:
    response = guarded_client.get("/v1/models", headers={"authorization": value})
    assert response.status_code == 200


@pytest.mark.parametrize(
    "value",
    [
        "", "Bearer", KEY, f"Basic {KEY}", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}",
        f"Bearer {KEY.upper()}", f"Bearer {KEY} another-key", f"Bearer {KEY},another-key",
        "Bearer \xe9\xff", "Bearer " + "x" * 10_000,
    ],
    ids=lambda value: ascii(value)[:24],
)  # fmt: skip
def test_a_wrong_key(guarded_client: httpx.Client, value: str) -> None:
    headers = {"authorization": value.encode("latin-1")}
    response = guarded_client.get("/v1/models", headers=headers)
    error_of(response, 401)
    assert response.headers["www-authenticate"] == "Bearer"


def test_keys_are_never_logged(guarded: LiveServer, guarded_client: httpx.Client) -> None:
    guarded_client.get("/v1/models", headers={"authorization": "Bearer wrong-4712"})
    embed(guarded_client, "a")
    statuses = ('"status":401', '"status":200')
    until(lambda: all(status in guarded.log for status in statuses))
    log = guarded.log
    for key in (KEY, "another-key", "wrong-4712"):
        assert key not in log


# 413 and 415


@by_name(EMBEDDINGS)
def test_a_body_over_the_limit(guarded_client: httpx.Client, method: str, path: str) -> None:
    at_limit = json.dumps({"model": MODEL, "input": ["a"]}).encode().ljust(BODY_LIMIT)
    headers = {**KEYED, "content-type": "application/json"}
    response = guarded_client.request(method, path, content=at_limit, headers=headers)
    assert response.status_code == 200

    def chunks() -> Iterator[bytes]:
        yield at_limit
        yield b" "

    for content in (at_limit + b" ", chunks()):
        response = guarded_client.request(method, path, content=content, headers=headers)
        error = error_of(response, 413)
        assert error["code"] == "request_too_large"
        assert str(BODY_LIMIT) in error["message"]
    assert guarded_client.get("/health/live").status_code == 200


@by_name(EMBEDDINGS)
@pytest.mark.parametrize(
    "content_type",
    [
        "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x",
        "application/octet-stream", "application/jsonx", "json", "", "x" * 5000,
    ],
    ids=lambda content_type: content_type[:24] or "empty",
)  # fmt: skip
def test_a_content_type_that_is_not_json(
    client: httpx.Client, method: str, path: str, content_type: str
) -> None:
    content = json.dumps({"model": MODEL, "input": "a"})
    headers = {"content-type": content_type}
    error = error_of(client.request(method, path, content=content, headers=headers), 415)
    assert "'Content-Type: application/json'" in error["message"]
    assert len(error["message"]) < 1000


@pytest.mark.parametrize(
    "content_type",
    [None, "application/json", "Application/JSON; charset=UTF-8", "application/vnd.api+json"],
)
def test_content_types_of_json(client: httpx.Client, content_type: str | None) -> None:
    content = json.dumps({"model": MODEL, "input": "a"})
    headers = {"content-type": content_type} if content_type else {}
    response = client.post("/v1/embeddings", content=content, headers=headers)
    assert response.status_code == 200


@pytest.mark.parametrize("encoding", ["gzip", "br"])
def test_a_compressed_body(client: httpx.Client, encoding: str) -> None:
    content = gzip.compress(json.dumps({"model": MODEL, "input": "a"}).encode())
    headers = {"content-type": "application/json", "content-encoding": encoding}
    error = error_of(client.post("/v1/embeddings", content=content, headers=headers), 415)
    assert "Content-Encoding" in error["message"]


# 429


def test_a_full_queue_refuses_by_tokens(guarded_client: httpx.Client) -> None:
    """One large job fills the queue; what comes meanwhile is refused, and the job is answered."""

    def queued() -> float:
        page = guarded_client.get("/metrics", headers=KEYED).text
        (value,) = re.findall(r"(?m)^embedding_server_queue_tokens\{.*\} (.*)$", page)
        return float(value)

    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(embed, guarded_client, [[1000 + number] * 250 for number in range(60)])
        until(lambda: queued() > TOKEN_LIMIT or job.done())
        response = embed(guarded_client, "a")
        assert not job.done()
        error = error_of(response, 429)
        assert error["code"] == "overloaded"
        assert MODEL in error["message"]
        assert re.fullmatch(r"[1-9]\d*", response.headers["retry-after"])
        assert job.result().status_code == 200
    assert len(job.result().json()["data"]) == 60
    assert embed(guarded_client, "a").status_code == 200


def test_under_load_every_request_is_answered_or_refused_whole() -> None:
    with (
        running_server("--model", MODEL, "--max-concurrent-requests", "2") as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        expected = embed(client, ["iPhone"] * 16).json()["data"][0]["embedding"]
        responses = list(pool.map(lambda _: embed(client, ["iPhone"] * 16), range(64)))
        statuses = [response.status_code for response in responses]
        assert set(statuses) == {200, 429}
        for response in responses:
            if response.status_code == 429:
                error_of(response, 429)
                assert int(response.headers["retry-after"]) >= 1
            else:
                data = response.json()["data"]
                assert len(data) == 16
                assert data[-1]["embedding"][:3] == pytest.approx(expected[:3], abs=1e-6)
        assert embed(client, "a").status_code == 200


def test_too_many_requests_at_a_time(blocked: type[Blocked], tiny_model: Path) -> None:
    blocked.reset(load=True)
    with (
        serving(model=(str(tiny_model),), backend="onnx", max_concurrent_requests=2) as server,
        httpx.Client(base_url=server.url, timeout=30) as client,
        ThreadPoolExecutor(2) as pool,
    ):
        accepted = [pool.submit(embed, client, "river", "tiny") for _ in range(2)]
        until(lambda: 'queue_requests{model="tiny"} 2.0' in client.get("/metrics").text)
        response = embed(client, "river", "tiny")
        assert error_of(response, 429)["code"] == "overloaded"
        assert response.headers["retry-after"] == "1"
        assert client.get("/health/ready").status_code == 200, "busy is not broken"
        blocked.release()
        assert [job.result().status_code for job in accepted] == [200, 200]
        assert embed(client, "river", "tiny").status_code == 200


# 503


@pytest.mark.parametrize("name", SERVERS)
def test_starting(blocked: type[Blocked], tiny_model: Path, name: str) -> None:
    """Every route that needs a model says that it is on its way; the others answer."""
    blocked.reset(load=False)
    with (
        serving(wait=False, model=(str(tiny_model),), backend="onnx", server=name) as server,
        httpx.Client(base_url=server.url) as client,
    ):
        for method, path in WITH_MODELS:
            response = client.request(method, path, **body_for(path))
            error = error_of(response, 503)
            assert error["code"] == "not_ready"
            assert "starting" in error["message"]
            assert int(response.headers["retry-after"]) >= 1
        for path in ("/health", "/health/ready"):
            assert "tiny is loading" in error_of(client.get(path), 503)["message"]
        for path in ("/health/live", "/metrics", "/docs", "/openapi.json"):
            assert client.get(path).status_code == 200
        error_of(client.post("/v1/embeddings", json={"model": "tiny"}), 400)
        blocked.release()
        until(lambda: client.get("/health/ready").status_code == 200)
        assert embed(client, "river", "tiny").status_code == 200


@pytest.mark.parametrize("name", SERVERS)
def test_a_stop_answers_what_was_accepted(
    blocked: type[Blocked], tiny_model: Path, name: str
) -> None:
    blocked.reset(load=True)
    with (
        serving(model=(str(tiny_model),), backend="onnx", server=name) as server,
        httpx.Client(base_url=server.url, timeout=30) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        job = pool.submit(embed, client, ["river"] * 20, "tiny")
        until(lambda: 'queue_requests{model="tiny"} 1.0' in client.get("/metrics").text)
        server.server.stop()
        blocked.release()
        assert job.result().status_code == 200


def test_what_is_no_exception_while_loading(
    use_backend: Any, tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As a panic of Rust's: the log has it, and the server is not left loading for ever."""
    use_backend(fake_backends.Leaving)
    with serving(wait=False, model=(str(tiny_model),), backend="onnx"):
        until(lambda: "No model is served: SystemExit while loading a model" in caplog.text)


def test_a_dead_batch_loop(use_backend: Any, tiny_model: Path) -> None:
    """Requests fail at once, and both health routes say so until the process is replaced."""
    use_backend(fake_backends.Broken)
    with (
        serving(model=(str(tiny_model),), backend="onnx") as server,
        httpx.Client(base_url=server.url) as client,
    ):
        for _ in range(2):
            assert "tiny" in error_of(embed(client, "river", "tiny"), 503)["message"]
        assert "tiny is failed" in error_of(client.get("/health/ready"), 503)["message"]
        assert "tiny has died" in error_of(client.get("/health/live"), 503)["message"]


# 500

SECRETS = re.compile(r"onnx|Error|Traceback|File|/srv|/site-packages|0x|\.py|torch|numpy")


def test_a_failing_backend(
    use_backend: Any, tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    use_backend(fake_backends.Failing)
    with (
        caplog.at_level(logging.ERROR),
        serving(model=(str(tiny_model),), backend="onnx") as server,
        httpx.Client(base_url=server.url, headers={"x-request-id": "id-4711"}) as client,
    ):
        for path in ("/v1/embeddings", "/openai/v1/embeddings"):
            response = client.post(path, json={"model": "tiny", "input": "river"})
            error = error_of(response, 500)
            assert error["code"] == "internal_error"
            assert not SECRETS.search(error["message"])
        assert client.get("/health/ready").status_code == 200, "a batch failed, not the server"
        page = client.get("/metrics").text
    assert 'failed_batches_total{model="tiny"} 2.0' in page
    assert 'errors_total{code="internal_error"} 2.0' in page
    requests = [record for record in caplog.records if record.getMessage() == "request"]
    assert [record.fields["id"] for record in requests] == ["id-4711"] * 2  # type: ignore[attr-defined]
    assert "secret.onnx" in caplog.text, "the log says why"


def test_vectors_that_are_not_finite(use_backend: Any, tiny_model: Path) -> None:
    use_backend(fake_backends.NotFinite)
    with (
        serving(model=(str(tiny_model),), backend="onnx") as server,
        httpx.Client(base_url=server.url) as client,
    ):
        error_of(embed(client, ["river", "river " * 9], "tiny"), 500)
        response = embed(client, "river", "tiny")
        assert response.status_code == 200
        assert "NaN" not in response.text


@by_name(OPERATIONS)
def test_a_fault_of_ours(
    method: str, path: str, faulty: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    """What no one foresaw, on every route that does anything."""
    with caplog.at_level(logging.ERROR):
        response = faulty.request(
            method, path, headers={"x-request-id": "id-4712"}, **body_for(path)
        )
    error = error_of(response, 500)
    assert response.headers["x-request-id"] == "id-4712"
    assert error["code"] == "internal_error"
    assert not SECRETS.search(error["message"])
    assert "request id-4712 failed" in caplog.text
    assert "Traceback" in caplog.text, "the log says why"


@pytest.fixture(scope="module")
def faulty(tiny_model: Path) -> Iterator[httpx.Client]:
    """A client of a server whose every part is missing."""
    with (
        serving(model=(str(tiny_model),)) as server,
        httpx.Client(base_url=server.url) as client,
    ):
        server.app.state = None
        yield client


def test_a_loaded_model_answers_while_another_is_on_its_way(
    blocked: type[Blocked], tiny_model: Path, tmp_path: Path
) -> None:
    blocked.reset(load=False)
    static = tiny_models.make_static(tmp_path / "static").folder
    with (
        serving(wait=False, model=(str(static), str(tiny_model)), backend="onnx") as server,
        httpx.Client(base_url=server.url) as client,
    ):
        until(lambda: embed(client, "river", "static").status_code == 200)
        assert "'tiny' is being loaded" in error_of(embed(client, "river", "tiny"), 503)["message"]
        assert "static is ready, tiny is loading" in error_of(client.get("/health"), 503)["message"]
        blocked.release()
        until(lambda: embed(client, "river", "tiny").status_code == 200)


@pytest.mark.parametrize("name", SERVERS)
def test_a_client_that_hangs_up_frees_its_work(
    blocked: type[Blocked], tiny_model: Path, name: str
) -> None:
    blocked.reset(load=True)
    body = {"model": "tiny", "input": ["river " * count for count in range(1, 40)]}
    with (
        serving(model=(str(tiny_model),), backend="onnx", server=name) as server,
        httpx.Client(base_url=server.url) as client,
    ):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/embeddings", json=body, timeout=0.5)
        until(lambda: 'queue_tokens{model="tiny"} 0.0' in client.get("/metrics").text)
        assert 'queue_requests{model="tiny"} 0.0' in client.get("/metrics").text
        blocked.release()
        assert embed(client, "river", "tiny").status_code == 200
        until(lambda: 'status="499"' in client.get("/metrics").text)
