# SPDX-License-Identifier: MIT OR Apache-2.0
"""The listening socket, opened before models are loaded: a port in use is reported at once."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from embedding_server.errors import ConfigurationError
from embedding_server.settings import Settings

__all__ = ["listening"]

_BACKLOG = 2048

# The first file descriptor that sd_listen_fds(3) hands over.
_FIRST_HANDED = 3


@contextmanager
def listening(settings: Settings) -> Iterator[tuple[socket.socket, str]]:
    """Yield a listening socket for ``settings``, and its address as a URL.

    A socket that systemd hands over to this process is used instead of a new one. Raises
    ConfigurationError if the address can't be listened on, or the socket can't be used.
    """
    made: os.stat_result | None = None
    listener = _handed_over(settings)
    if listener is None and settings.uds is not None:
        listener = _listen_on_file(settings.uds)
        made = settings.uds.stat()
    elif listener is None:
        listener = _listen_on_port(settings.host, settings.port)
    try:
        with listener:
            yield listener, _address(listener, settings)
    finally:
        if made is not None and settings.uds is not None:
            # Another server may have replaced the file since this one stopped accepting.
            with contextlib.suppress(OSError):
                if os.path.samestat(made, settings.uds.stat()):
                    settings.uds.unlink()


def _address(listener: socket.socket, settings: Settings) -> str:
    name = listener.getsockname()
    if not isinstance(name, tuple):
        # A name in the kernel's own namespace, which is no file, begins with a zero.
        mark, name = ("@", name[1:]) if isinstance(name, bytes) else ("", os.fsencode(name))
        return f"unix:{mark}{name.decode(errors='backslashreplace')}"
    host, port = name[:2]
    host = f"[{host}]" if ":" in host else host
    return f"{'https' if settings.tls_cert else 'http'}://{host}:{port}"


def _handed_over(settings: Settings) -> socket.socket | None:
    """Return the socket that a service manager hands over, as sd_listen_fds(3) describes.

    Its variables are taken out of the environment: they are not for children.
    """
    pid, count, names = (os.environ.pop(f"LISTEN_{name}", "") for name in ("PID", "FDS", "FDNAMES"))
    if pid != str(os.getpid()) or count == "0":
        return None
    if count != "1":
        raise ConfigurationError(
            f"{count} sockets are handed over ({names}), and one is served: have one ListenStream= "
            "in the socket unit, and no other unit with Service= of this one."
        )
    try:
        os.set_inheritable(_FIRST_HANDED, False)
        listener = socket.socket(fileno=_FIRST_HANDED)
    except OSError as error:
        raise ConfigurationError(
            f"LISTEN_FDS is set, but descriptor {_FIRST_HANDED} is no socket ({error.strerror})."
        ) from None
    if problem := _unfit(listener):
        raise ConfigurationError(f"The socket that is handed over ({names}) {problem}.")
    own = [name for name in ("host", "port", "uds") if name in settings.model_fields_set]
    if own:
        raise ConfigurationError(
            f"--{own[0]} is set, but the socket to listen on is handed over, with the address "
            f"{_address(listener, settings)}: leave --{own[0]} out, or disable the socket unit."
        )
    return listener


def _unfit(listener: socket.socket) -> str | None:
    """Return why ``listener`` can't be used, or None."""
    if listener.family not in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX):
        return f"is neither a TCP nor a Unix socket, but of family {listener.family}"
    if listener.type != socket.SOCK_STREAM:
        return "is no stream: the socket unit needs ListenStream="
    if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return "doesn't listen: the socket unit needs Accept=no"
    return None


def _listen_on_port(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise ConfigurationError(f"--host {host!r} is no address here: {error.strerror}.") from None
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        taken = error.errno == errno.EADDRINUSE
        hint = "Another program uses it; choose another with --port" if taken else "See --host"
        raise ConfigurationError(
            f"Can't listen on {host} port {port}: {error.strerror}. {hint}."
        ) from None
    return listener


def _listen_on_file(file: Path) -> socket.socket:
    """Listen on a Unix socket with the permissions of the umask; replace one of a dead server."""
    try:
        if not stat.S_ISSOCK(file.stat().st_mode):
            raise ConfigurationError(f"--uds: {file} is there already, and is no socket.")
    except OSError:
        pass  # there is no such file, or binding says why it can't be used
    else:
        _remove_if_dead(file)
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


def _remove_if_dead(file: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        try:
            client.connect(str(file))
        except ConnectionRefusedError:
            file.unlink(missing_ok=True)
        except OSError:
            pass  # binding says why
        else:
            raise ConfigurationError(f"--uds: another server listens on {file}.")
