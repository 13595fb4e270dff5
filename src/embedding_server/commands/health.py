# SPDX-License-Identifier: MIT OR Apache-2.0
"""``health``: ask a server on this machine whether it is ready, as a container's check does."""

from __future__ import annotations

import argparse
import socket
import ssl
import sys
from http.client import HTTPConnection, HTTPException

from embedding_server.commands.options import add_settings
from embedding_server.errors import ConfigurationError
from embedding_server.settings import Settings

__all__ = ["add_options", "run"]

_SECONDS = 5.0
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the settings that say where the server listens."""
    parser.description = (
        "Ask a server on this machine whether it is ready; exits with 0 if it is. Give the\n"
        "settings that the server was started with."
    )
    add_settings(parser, "health")


def run(settings: Settings, arguments: argparse.Namespace) -> int:
    """Ask the server with these settings, and print its answer; 0 if it is ready, else 1.

    Raises ConfigurationError for settings that leave no way to ask.
    """
    if settings.tls_client_ca is not None:
        raise ConfigurationError(
            "With --tls-client-ca the server admits only clients with a certificate, and the "
            "health check has none: switch it off (docker run --no-healthcheck)."
        )
    if settings.uds is None and settings.port == 0:
        raise ConfigurationError(
            "With --port 0 the operating system picks the port: give the port that it picked."
        )
    try:
        status, answer = _ask(settings)
    except (OSError, HTTPException) as error:
        place = settings.uds or f"{settings.host} port {settings.port}"
        status, answer = 0, f"no answer at {place}: {error}"
    sys.stdout.write(f"{answer}\n")
    return 0 if status == 200 else 1


def _ask(settings: Settings) -> tuple[int, str]:
    with _connect(settings) as stream:
        connection = HTTPConnection("localhost", timeout=_SECONDS)
        connection.sock = stream
        connection.request("GET", "/health/ready")
        answer = connection.getresponse()
        body = answer.read().decode(errors="replace")
        return answer.status, body or f"an empty answer of status {answer.status}"


def _connect(settings: Settings) -> socket.socket:
    if settings.uds is not None:
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        stream.settimeout(_SECONDS)
        stream.connect(str(settings.uds))
    else:
        host = _LOOPBACK.get(settings.host, settings.host)
        stream = socket.create_connection((host, settings.port), _SECONDS)
    if settings.tls_cert is None:
        return stream
    # The certificate is for the name that clients use; they check it.
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context.wrap_socket(stream)
