# SPDX-License-Identifier: MIT OR Apache-2.0
"""HTTPS, and its files read again."""

from __future__ import annotations

import json
import signal
import socket
import ssl
import subprocess
from pathlib import Path

import httpx
import pytest
from in_process import until
from live import run_cli, running_server
from raw_http import HEALTH, connect, exchange

from embedding_server.serving.servers.base import SERVERS

MODEL = "all-MiniLM-L6-v2"


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


@pytest.mark.parametrize("name", SERVERS)
def test_tls_can_not_be_half_closed(certificates: Path, name: str) -> None:
    """A client that tries has hung up: its work is freed."""
    arguments = (
        *("--tls-cert", str(certificates / "server.pem")),
        *("--tls-key", str(certificates / "server.key"), "--server", name),
    )
    texts = [f"{number} " + "a long text " * 60 for number in range(500)]
    body = json.dumps({"model": MODEL, "input": texts}).encode()
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body)
    with running_server("--model", MODEL, *arguments, wait=False) as server:
        context = ssl.create_default_context(cafile=certificates / "ca.pem")
        with httpx.Client(base_url=server.url, verify=context) as client:
            until(lambda: client.get("/health/ready").status_code == 200)
            with context.wrap_socket(
                connect(server.url), server_hostname="localhost", suppress_ragged_eofs=True
            ) as connection:
                connection.sendall(head + body)
                taken = f'queue_requests{{model="{MODEL}"}} 1.0'
                until(lambda: taken in client.get("/metrics").text)
                connection.shutdown(socket.SHUT_WR)
                until(lambda: "status=499" in server.log)
        assert "eof_received" not in server.log
        assert "Traceback" not in server.log


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tls-cert", "{}/missing.pem"), "can't read"),
        (
            ("--tls-cert", "{}/server.csr", "--tls-key", "{}/server.key"),
            "can't be used as a certificate",
        ),
        (("--tls-cert", "{}/server.pem", "--tls-key", "{}/client.key"), "key values mismatch"),
        (("--tls-key", "{}/server.key"), "--tls-cert"),
        (("--tls-client-ca", "{}/ca.pem"), "--tls-cert"),
    ],
)
def test_tls_that_can_not_work(
    certificates: Path, arguments: tuple[str, ...], message: str
) -> None:
    filled = [argument.format(certificates) for argument in arguments]
    done = run_cli("serve", "--port", "0", "--model", MODEL, *filled)
    assert done.returncode == 1
    assert message in done.stderr.decode()
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
