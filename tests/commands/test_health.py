# SPDX-License-Identifier: MIT OR Apache-2.0
"""``embedding-server health``, which a container's health check runs."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

from in_process import until
from live import LiveServer, run_cli, running_server, under_way

MODEL = "all-MiniLM-L6-v2"


def health(*arguments: str) -> tuple[int, str]:
    """Its exit code and what it prints."""
    done = run_cli("health", *arguments, env={"PYTHONWARNINGS": "error"})
    return done.returncode, (done.stdout + done.stderr).decode()


def _is_ready(*arguments: str) -> Callable[[], bool]:
    return lambda: (
        health(*arguments)
        == (
            0,
            f'{{"status":"ready","models":{{"{MODEL}":"ready"}}}}\n',
        )
    )


def _port(server: LiveServer) -> str:
    return server.url.rpartition(":")[2]


def test_ready_draining_and_gone() -> None:
    with running_server("--model", MODEL, "--host", "0.0.0.0") as server:
        at = ("--host", "0.0.0.0", "--port", _port(server))
        assert _is_ready(*at)()
        with under_way(server) as answer:
            server.process.terminate()
            until(lambda: health(*at)[0] == 1)  # nothing new is let in any more
            assert answer.result().status_code == 200
        assert server.process.wait(20) == 0
        code, answer = health(*at)
    assert code == 1
    assert answer.startswith(f"no answer at 0.0.0.0 port {_port(server)}: ")


def test_over_a_unix_socket(tmp_path: Path) -> None:
    listener = tmp_path / "socket"
    with running_server("--model", MODEL, "--uds", str(listener), wait=False):
        until(_is_ready("--uds", str(listener)))
    assert health("--uds", str(listener))[0] == 1


def test_over_tls_whatever_name_the_certificate_is_for(tmp_path: Path) -> None:
    certificate = tmp_path / "both.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "2", "-subj", "/CN=embeddings.example.com"),
            *("-keyout", str(certificate), "-out", str(tmp_path / "certificate.pem")),
        ],
        check=True,
        capture_output=True,
    )
    with certificate.open("ab") as both:
        both.write((tmp_path / "certificate.pem").read_bytes())
    with running_server("--model", MODEL, "--tls-cert", str(certificate), wait=False) as server:
        until(_is_ready("--port", _port(server), "--tls-cert", str(certificate)))
        assert health("--port", _port(server))[0] == 1  # plain HTTP, which gets no answer


def test_what_it_cannot_ask() -> None:
    code, answer = health("--port", "0")
    assert code == 1
    assert "give the port" in answer
    files = {"EMBEDDING_SERVER_TLS_CERT": "cert.pem", "EMBEDDING_SERVER_TLS_CLIENT_CA": "ca.pem"}
    done = run_cli("health", env=files)
    assert done.returncode == 1
    assert b"switch it off (docker run --no-healthcheck)" in done.stderr
