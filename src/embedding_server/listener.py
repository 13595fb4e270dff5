# SPDX-License-Identifier: MIT OR Apache-2.0
"""The socket that requests come in by, had before models are loaded: a taken port fails at once."""

from __future__ import annotations

import contextlib
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from embedding_server.errors import ConfigurationError
from embedding_server.settings import Settings

__all__ = ["listening"]

_BACKLOG = 2048


@contextmanager
def listening(settings: Settings) -> Iterator[tuple[socket.socket, str]]:
    """A listening socket as ``settings`` want it, and its address for people.

    Raises ConfigurationError if the address can't be listened on.
    """
    made = None
    if settings.uds is not None:
        listener = _listen_on_file(settings.uds)
        made = _identity(settings.uds)
        address = f"unix:{settings.uds}"
    else:
        listener = _listen_on_port(settings.host, settings.port)
        host, port = listener.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        address = f"{'https' if settings.tls_cert else 'http'}://{host}:{port}"
    try:
        with listener:
            yield listener, address
    finally:
        # Another server may have replaced it, once this one took no connection any more.
        if settings.uds is not None and made == _identity(settings.uds):
            settings.uds.unlink()


def _listen_on_port(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise ConfigurationError(f"--host {host!r} is no address here: {error.strerror}.") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigurationError(
            f"Can't listen on {host} port {port}: {error.strerror}. Another program may use it; "
            "choose another with --port."
        ) from None
    return listener


def _listen_on_file(file: Path) -> socket.socket:
    """A Unix socket, whose permissions follow the umask; what a dead server left is replaced."""
    _clear(file)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(file))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigurationError(
            f"--uds: can't listen on {file}: {error.strerror or error}."
        ) from None
    return listener


def _identity(file: Path) -> tuple[int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _clear(file: Path) -> None:
    try:
        if not stat.S_ISSOCK(file.stat().st_mode):
            raise ConfigurationError(f"--uds: {file} is there already, and is no socket.")
    except OSError:
        return  # it isn't there; if it can't be, binding says so
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        try:
            client.connect(str(file))
        except ConnectionRefusedError:
            with contextlib.suppress(FileNotFoundError):
                file.unlink()
            return
        except OSError:
            return
    raise ConfigurationError(f"--uds: another server listens on {file}.")
