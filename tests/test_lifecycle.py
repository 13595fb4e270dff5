"""What operators and supervisors do to a server: signals, drains, dead workers, sockets, files."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import fake_backends
import httpx
import pytest
import tiny_models
from error_shape import error_of
from fake_backends import Blocked
from in_process import serving, until
from live import LiveServer, run_cli, running_server
from raw_http import connect, exchange, parse

from embedding_server.backends.base import BACKENDS
from embedding_server.servers.base import SERVERS

MODEL = "all-MiniLM-L6-v2"
HEALTH = b"GET /health/ready HTTP/1.1\r\nHost: a\r\n\r\n"


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make_bert(tmp_path_factory.mktemp("models") / "tiny").folder


@pytest.fixture
def blocked(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Blocked]]:
    """A backend that loads, and computes once it is released."""
    monkeypatch.setitem(BACKENDS, "onnx", f"fake_backends:{fake_backends.Blocked.__name__}")
    Blocked.reset(load=True)
    yield Blocked
    Blocked.release()


def ask(connection: socket.socket, request: bytes = HEALTH) -> httpx.Response:
    """One request and its answer on a kept connection."""
    connection.sendall(request)
    received = b""
    while b"\r\n\r\n" not in received:
        chunk = connection.recv(65536)
        assert chunk, received
        received += chunk
    answer = parse(received)
    missing = int(answer.headers["content-length"]) - len(answer.content)
    while missing > 0:
        chunk = connection.recv(65536)
        assert chunk, received
        received += chunk
        missing -= len(chunk)
    return parse(received)


@contextmanager
def under_way(server: LiveServer, seconds: float = 60) -> Iterator[Future[httpx.Response]]:
    """A request that a server of the real model takes a while for, and has begun."""
    body = {"model": MODEL, "input": [f"{number} " + "a long text " * 60 for number in range(60)]}
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(httpx.post, f"{server.url}/v1/embeddings", json=body, timeout=seconds)
        taken = f'embedding_server_queue_requests{{model="{MODEL}"}} 1.0'
        while taken not in httpx.get(f"{server.url}/metrics").text:
            assert not answer.done(), "the request was over before it was seen"
            time.sleep(0.005)
        yield answer


# ------------------------------------------------------------------------------------------- drain


def test_a_drain_as_clients_see_it() -> None:
    """Readiness is red on connections there are, work is finished, and nobody new comes in."""
    with running_server("--model", MODEL) as server, connect(server.url) as kept:
        assert ask(kept).status_code == 200
        with under_way(server) as answer:
            server.process.send_signal(signal.SIGTERM)
            until(lambda: "draining" in server.log)
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"{server.url}/health/live")
            last = ask(kept)
            assert "draining" in error_of(last, 503)["message"]
            assert last.headers["connection"] == "close"
            assert kept.recv(1) == b""
            assert not answer.done()
            assert answer.result().status_code == 200
        assert server.process.wait(20) == 0
        assert "Traceback" not in server.log


@pytest.mark.parametrize("name", SERVERS)
def test_a_request_that_takes_longer_than_the_drain(
    blocked: type[Blocked], tiny_model: Path, name: str
) -> None:
    with (
        serving(model=(str(tiny_model),), backend="onnx", server=name, drain_timeout=0.3) as server,
        httpx.Client(base_url=server.url) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        body = {"model": "tiny", "input": "river"}
        answer = pool.submit(httpx.post, f"{server.url}/v1/embeddings", json=body, timeout=30)
        until(lambda: 'queue_requests{model="tiny"} 1.0' in client.get("/metrics").text)
        server.server.stop()
        assert "has to end" in error_of(answer.result(), 503)["message"]
        blocked.release()


@pytest.mark.parametrize("name", SERVERS)
@pytest.mark.parametrize(
    ("first", "second"),
    [(signal.SIGTERM, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT)],
    ids=["twice", "and-ctrl-c"],
)
def test_a_second_signal_ends_it_now(
    first: signal.Signals, second: signal.Signals, name: str
) -> None:
    with running_server("--model", MODEL, "--server", name) as server:
        with under_way(server) as answer:
            server.process.send_signal(first)
            until(lambda: "draining" in server.log)
            server.process.send_signal(second)
            assert server.process.wait(20) == 128 + second
            with pytest.raises(httpx.TransportError):
                answer.result()
        assert "told twice to end" in server.log


# ------------------------------------------------------------------------------------------ SIGHUP


@pytest.mark.parametrize("workers", ["1", "2"])
def test_keys_are_read_again(tmp_path: Path, workers: str) -> None:
    keys = tmp_path / "keys"
    keys.write_text("first\n")
    keys.chmod(0o600)
    with running_server(
        *("--model", MODEL, "--api-key-file", str(keys), "--workers", workers)
    ) as server:

        def lets_in(key: str) -> bool:
            """As often as it takes for each worker to be asked."""
            headers = {"authorization": f"Bearer {key}"}
            statuses = {
                httpx.get(f"{server.url}/v1/models", headers=headers).status_code for _ in range(10)
            }
            return statuses == {200}

        until(lambda: lets_in("first"))
        keys.write_text("second\n")
        server.process.send_signal(signal.SIGHUP)
        until(lambda: lets_in("second"))
        assert not lets_in("first")
        keys.write_text("\n")
        server.process.send_signal(signal.SIGHUP)
        until(lambda: "The API keys stay as they were" in server.log)
        assert lets_in("second")
        assert server.stop() == 0


# ------------------------------------------------------------------------------------ Unix sockets


def test_a_unix_socket(tmp_path: Path) -> None:
    file = tmp_path / "server.sock"
    for _ in range(2):  # the second finds what the first, killed, has left behind
        with running_server("--model", MODEL, "--uds", str(file), wait=False) as server:
            transport = httpx.HTTPTransport(uds=str(file))
            with httpx.Client(transport=transport, base_url="http://a", timeout=60) as client:
                until(lambda: client.get("/health/ready").status_code == 200)
                body = {"model": MODEL, "input": "iPhone"}
                assert client.post("/v1/embeddings", json=body).json()["data"][0]["dims"] == 384
            assert f"listening on unix:{file}" in server.log
            server.process.kill()
            server.process.wait()
        assert file.exists()
    with running_server("--model", MODEL, "--uds", str(file), wait=False) as server:
        done = run_cli("serve", "--model", MODEL, "--uds", str(file))
        assert done.returncode == 1
        assert b"another server listens" in done.stderr
        assert server.stop() == 0
    assert not file.exists()


def test_a_unix_socket_never_replaces_a_file(tmp_path: Path) -> None:
    file = tmp_path / "precious"
    file.write_text("kept")
    done = run_cli("serve", "--model", MODEL, "--uds", str(file))
    assert done.returncode == 1
    assert b"is no socket" in done.stderr
    assert file.read_text() == "kept"


# ----------------------------------------------------------------------------------------- workers


def workers_of(server: LiveServer) -> list[int]:
    """The processes of its workers, in the order of their start."""
    pid = server.process.pid
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def embedded(text: str) -> int:
    """How many requests for embeddings /metrics has counted."""
    return sum(
        int(float(line.rpartition(" ")[2]))
        for line in text.splitlines()
        if line.startswith("embedding_server_requests_total{")
        and 'route="/v1/embeddings"' in line
        and 'status="200"' in line
    )


def test_workers() -> None:
    """They share the port and add up their metrics; a killed one is replaced meanwhile."""
    body = {"model": MODEL, "input": "iPhone"}
    answered = 0
    with running_server("--model", MODEL, "--workers", "2") as server:
        until(lambda: server.log.count("is ready (process") == 2)
        first, second = workers_of(server)

        def embed() -> None:
            nonlocal answered
            assert httpx.post(f"{server.url}/v1/embeddings", json=body).status_code == 200
            answered += 1

        while not (used(server, 1) and used(server, 2)):
            embed()
        assert embedded(httpx.get(f"{server.url}/metrics").text) == answered
        os.kill(first, signal.SIGKILL)
        until(lambda: "worker 1 ended with SIGKILL" in server.log)
        for _ in range(5):
            embed()
        until(lambda: server.log.count("is ready (process") == 3)
        assert second in workers_of(server)
        text = httpx.get(f"{server.url}/metrics").text
        assert embedded(text) == answered
        assert 'queue_requests{model="all-MiniLM-L6-v2"} 0.0' in text
        assert "embedding_server_requests_in_flight 1.0" in text
        workers = workers_of(server)
        with under_way(server) as answer:
            server.process.send_signal(signal.SIGTERM)
            assert answer.result().status_code == 200
        assert server.process.wait(20) == 0
        assert "Traceback" not in server.log
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def used(server: LiveServer, worker: int) -> bool:
    """Whether ``worker`` has answered a request: it then has metrics of its own."""
    environ = Path(f"/proc/{workers_of(server)[0]}/environ").read_bytes().split(b"\0")
    (folder,) = (
        line.partition(b"=")[2].decode()
        for line in environ
        if line.startswith(b"PROMETHEUS_MULTIPROC_DIR=")
    )
    file = Path(folder) / f"counter_{worker}.db"
    return file.exists() and b"/v1/embeddings" in file.read_bytes()


def test_a_crash_loop_is_seen_in_readiness() -> None:
    with running_server("--model", MODEL, "--workers", "2") as server:
        until(lambda: server.log.count("is ready (process") == 2)
        _, kept = workers_of(server)
        for count in range(1, 4):
            until(lambda: len(workers_of(server)) == 2)
            (victim,) = set(workers_of(server)) - {kept}
            os.kill(victim, signal.SIGKILL)
            until(lambda count=count: server.log.count("ended with SIGKILL") == count)  # type: ignore[misc]
        waits = [
            line.rpartition("again in ")[2] for line in server.log.splitlines() if "SIGKILL" in line
        ]
        assert waits == ["0.5 s", "1 s", "2 s"]

        def told() -> bool:
            response = httpx.get(f"{server.url}/health/ready")
            return response.status_code == 503 and "3 times in a row" in response.text

        until(told)
        body = {"model": MODEL, "input": "iPhone"}
        assert httpx.post(f"{server.url}/v1/embeddings", json=body).status_code == 200
        assert server.stop() == 0


def test_workers_that_can_not_start(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    done = run_cli("serve", "--port", "0", "--workers", "2", "--model", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.count(b"embedding-server: ") == 1
    assert b"Traceback" not in done.stderr


def test_workers_do_not_outlive_their_supervisor() -> None:
    with running_server("--model", MODEL, "--workers", "2") as server:
        until(lambda: server.log.count("is ready (process") == 2)
        workers = workers_of(server)
        server.process.kill()
        server.process.wait()
        until(lambda: not any(_running(pid) for pid in workers))


def _running(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_a_second_signal_ends_workers_now() -> None:
    with running_server("--model", MODEL, "--workers", "2") as server:
        until(lambda: server.log.count("is ready (process") == 2)
        workers = workers_of(server)
        with under_way(server) as answer:
            server.process.send_signal(signal.SIGTERM)
            until(lambda: "draining" in server.log)
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(20) == 128 + signal.SIGTERM
            until(lambda: not any(_running(pid) for pid in workers))
            with pytest.raises(httpx.TransportError):
                answer.result()


# ------------------------------------------------------------------------------------ slow clients


def test_a_header_that_never_ends(tiny_model: Path) -> None:
    with (
        serving(model=(str(tiny_model),), header_timeout=0.5) as server,
        connect(server.url) as connection,
    ):
        connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: a\r\nx-slow: ")
        connection.setblocking(False)
        answer = b""
        while not answer:  # drop by drop, so that the connection is never idle
            connection.send(b"a")
            time.sleep(0.02)
            try:
                answer = connection.recv(65536)
            except BlockingIOError:
                answer = b""
        error_of(parse(answer), 408)


@pytest.mark.parametrize("name", SERVERS)
def test_a_header_that_is_too_large(tiny_model: Path, name: str) -> None:
    with serving(model=(str(tiny_model),), server=name) as server:
        for field in (b"x: " + b"a" * 2_000_000, b"x: a\r\n" * 300_000):
            with connect(server.url) as connection:
                connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: a\r\n")
                answer = b""
                try:
                    for start in range(0, len(field), 10_000):
                        connection.sendall(field[start : start + 10_000])
                    answer = connection.recv(65536)
                except ConnectionError:  # it doesn't take the rest
                    pass
            if answer:
                error_of(parse(answer), 431)
        assert httpx.get(f"{server.url}/health/live").status_code == 200


@pytest.mark.parametrize("name", SERVERS)
def test_a_body_that_is_drip_fed(tiny_model: Path, name: str) -> None:
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n"
    with (
        serving(model=(str(tiny_model),), server=name, body_timeout=0.5) as server,
        connect(server.url) as connection,
    ):
        connection.sendall(head)
        connection.setblocking(False)
        answer = b""
        while not answer:
            connection.send(b" ")
            time.sleep(0.02)
            try:
                answer = connection.recv(65536)
            except BlockingIOError:
                answer = b""
        assert error_of(parse(answer), 408)["code"] == "request_timeout"


@pytest.mark.parametrize("name", SERVERS)
@pytest.mark.parametrize("first", [b"", HEALTH], ids=["silent", "after-an-answer"])
def test_an_idle_connection_is_closed(tiny_model: Path, name: str, first: bytes) -> None:
    with (
        serving(model=(str(tiny_model),), server=name, idle_timeout=0.5) as server,
        connect(server.url) as connection,
    ):
        if first:
            assert ask(connection).status_code == 200
        assert connection.recv(1) == b""


def test_a_body_that_nobody_waits_for_keeps_no_connection(tiny_model: Path) -> None:
    """It was answered before it came, and goes on coming for ever."""
    head = b"POST /nowhere HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n"
    with (
        serving(model=(str(tiny_model),), idle_timeout=0.5) as server,
        connect(server.url) as connection,
    ):
        assert ask(connection, head).status_code == 404
        with pytest.raises(ConnectionError):
            while True:
                connection.sendall(b" ")
                time.sleep(0.02)


@pytest.mark.parametrize("name", SERVERS)
def test_an_answer_that_nobody_reads(tiny_model: Path, name: str) -> None:
    body = json.dumps({"model": "tiny", "input": ["river"] * 2048}).encode()
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body)
    with serving(model=(str(tiny_model),), server=name, idle_timeout=0.5) as server:
        with connect(server.url) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall((head + body) * 20)
            until(lambda: is_accepted(connection))
            until(lambda: not is_accepted(connection))
        assert httpx.get(f"{server.url}/health/live").status_code == 200


def is_accepted(connection: socket.socket) -> bool:
    """Whether the other end of ``connection``, on this machine, holds it open."""
    ports = f"{connection.getpeername()[1]:04X}", f"{connection.getsockname()[1]:04X}"
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, remote, state, *_ = line.split()
        if (local.rpartition(":")[2], remote.rpartition(":")[2]) == ports:
            return state == "01"
    return False


def test_five_thousand_idle_connections() -> None:
    with running_server("--model", MODEL) as server:
        idle = [connect(server.url) for _ in range(5000)]
        try:
            body = {"model": MODEL, "input": "iPhone"}
            response = httpx.post(f"{server.url}/v1/embeddings", json=body)
            assert response.status_code == 200
        finally:
            for connection in idle:
                connection.close()


# --------------------------------------------------------------------------------------------- TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, a certificate of localhost, one of a client, and another authority."""
    folder = tmp_path_factory.mktemp("certificates")
    for name in ("ca", "other"):
        run_openssl(
            folder, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
            *("-nodes", "-days", "2", "-subj", f"/CN={name}"),
            *("-keyout", f"{name}.key", "-out", f"{name}.pem"),
        )  # fmt: skip
    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    for name, authority in (("server", "ca"), ("client", "ca"), ("server2", "other")):
        run_openssl(
            folder, "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
            *("-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr"),
        )  # fmt: skip
        run_openssl(
            folder, "x509", "-req", "-in", f"{name}.csr", "-CA", f"{authority}.pem",
            *("-CAkey", f"{authority}.key", "-CAcreateserial", "-days", "2"),
            *("-extfile", "names", "-out", f"{name}.pem"),
        )  # fmt: skip
    return folder


def run_openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


@pytest.mark.parametrize("name", SERVERS)
def test_tls_and_its_files_read_again(certificates: Path, tmp_path: Path, name: str) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"

    def use(which: str) -> None:
        certificate.write_bytes((certificates / f"{which}.pem").read_bytes())
        key.write_bytes((certificates / f"{which}.key").read_bytes())

    use("server")
    arguments = ("--server", name, "--tls-cert", str(certificate), "--tls-key", str(key))
    with running_server("--model", MODEL, *arguments, wait=False) as server:
        assert server.url.startswith("https://")

        def trusts(authority: str) -> bool:
            try:
                context = ssl.create_default_context(cafile=certificates / f"{authority}.pem")
                httpx.get(f"{server.url}/health/live", verify=context)
            except httpx.ConnectError as error:
                assert "CERTIFICATE_VERIFY_FAILED" in str(error)
                return False
            return True

        assert trusts("ca")
        assert not trusts("other")
        use("server2")
        server.process.send_signal(signal.SIGHUP)
        until(lambda: trusts("other"))
        key.write_text("nonsense")
        server.process.send_signal(signal.SIGHUP)
        until(lambda: "The old TLS files stay in use" in server.log)
        assert trusts("other")
        assert server.stop() == 0


def test_tls_asks_for_a_client_certificate(certificates: Path) -> None:
    arguments = (
        *("--tls-cert", str(certificates / "server.pem")),
        *("--tls-key", str(certificates / "server.key")),
        *("--tls-client-ca", str(certificates / "ca.pem")),
    )
    with running_server("--model", MODEL, *arguments, wait=False) as server:
        context = ssl.create_default_context(cafile=certificates / "ca.pem")
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{server.url}/health/live", verify=context)
        context.load_cert_chain(certificates / "client.pem", certificates / "client.key")
        assert httpx.get(f"{server.url}/health/live", verify=context).status_code == 200


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--tls-cert", "{}/missing.pem"), "can't read"),
        (("--tls-cert", "{}/server.csr", "--tls-key", "{}/server.key"), "not a certificate"),
        (("--tls-cert", "{}/server.pem", "--tls-key", "{}/client.key"), "key values mismatch"),
        (("--tls-key", "{}/server.key"), "--tls-cert"),
        (("--tls-client-ca", "{}/ca.pem"), "--tls-cert"),
    ],
)
def test_tls_that_can_not_work(certificates: Path, arguments: tuple[str, ...], told: str) -> None:
    filled = [argument.format(certificates) for argument in arguments]
    done = run_cli("serve", "--port", "0", "--model", MODEL, *filled)
    assert done.returncode == 1
    assert told in done.stderr.decode()
    assert b"Traceback" not in done.stderr


def test_plain_http_to_a_tls_port(certificates: Path) -> None:
    arguments = (
        *("--tls-cert", str(certificates / "server.pem")),
        *("--tls-key", str(certificates / "server.key")),
    )
    with running_server("--model", MODEL, *arguments, wait=False) as server:
        plain = server.url.replace("https", "http")
        with pytest.raises((IndexError, ConnectionError)):
            exchange(plain, HEALTH)
        context = ssl.create_default_context(cafile=certificates / "ca.pem")
        assert httpx.get(f"{server.url}/health/live", verify=context).status_code == 200
        assert "Traceback" not in server.log
