"""Runs the application under an ASGI server, from a bound socket to the exit code."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import socket
from types import FrameType

from embedding_server.app import create_app
from embedding_server.errors import ConfigurationError
from embedding_server.models.registry import Registry
from embedding_server.servers.base import server_class
from embedding_server.settings import Settings

__all__ = ["serve"]

logger = logging.getLogger(__name__)

_DRAIN_SECONDS = 30

# Net allocations between collections of garbage, against Python's own 700: a request leaves none
# in circles, and looking for it took 4 % of a core (docs/performance.md).
_GC_ALLOCATIONS = 5_000


def serve(settings: Settings) -> int:
    """Serve until told to stop; the exit code is 1 if the models can't be served.

    Raises ConfigurationError if the address can't be listened on or the server isn't installed,
    and ModelUnavailable for a --model that can't be understood.
    """
    load_errors: list[Exception] = []

    def stop_on(error: Exception) -> None:
        load_errors.append(error)
        server.stop()

    # Until the server minds it itself.
    signal.signal(signal.SIGTERM, _end)
    make_server = server_class(settings.server)
    app = create_app(settings, on_loaded=_keep_what_is_loaded, on_load_error=stop_on)
    listener = _listen(settings.host, settings.port)
    server = make_server(app, drain_seconds=_DRAIN_SECONDS)
    gc.set_threshold(_GC_ALLOCATIONS)
    with listener:
        host, port = listener.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        logger.info("listening on http://%s:%d (API: /docs)", host, port)
        # Raised when requests are finished: a signal is no failure.
        with contextlib.suppress(KeyboardInterrupt, SystemExit):
            server.run(listener)
    registry: Registry = app.state.registry
    if registry.loading:
        # Its thread is in the middle of native code, which the interpreter's end would abort.
        logging.shutdown()
        os._exit(0)
    for error in load_errors:
        raise error
    return 0


def _keep_what_is_loaded() -> None:
    """What lives as long as the process needn't be looked at in every collection of garbage."""
    gc.collect()
    gc.freeze()


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket, taken before models are loaded so that a taken port fails at once."""
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
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise ConfigurationError(
            f"Can't listen on {host} port {port}: {error.strerror}. Another program may use it; "
            "choose another with --port."
        ) from None
    listener.set_inheritable(True)
    return listener
