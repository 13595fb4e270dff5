# SPDX-License-Identifier: MIT OR Apache-2.0
"""Requests as bytes on a socket, for what no HTTP client would send."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

import httpx

__all__ = ["connect", "exchange", "parse"]


def connect(url: str) -> socket.socket:
    """A connection to the server at ``url`` that sends what it is given at once."""
    address = urlsplit(url)
    connection = socket.create_connection((address.hostname or "", address.port or 80), timeout=30)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def exchange(url: str, request: bytes) -> httpx.Response:
    """The answer to ``request``, after which the server must close the connection."""
    with connect(url) as connection:
        connection.sendall(request)
        return parse(b"".join(iter(lambda: connection.recv(65536), b"")))


def parse(answer: bytes) -> httpx.Response:
    """One whole answer's bytes."""
    head, _, content = answer.partition(b"\r\n\r\n")
    status_line, *lines = head.split(b"\r\n")
    headers = [line.split(b": ", 1) for line in lines]
    return httpx.Response(
        int(status_line.split()[1]),
        headers=[(name, value) for name, value in headers],
        content=content,
    )


HEALTH = b"GET /health/ready HTTP/1.1\r\nHost: a\r\n\r\n"


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
