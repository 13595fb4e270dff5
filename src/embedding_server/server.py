"""Runs the application under an ASGI server, from a bound socket to the exit code."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
from types import FrameType

import uvicorn

from embedding_server.app import create_app
from embedding_server.errors import ConfigurationError
from embedding_server.models.registry import Registry
from embedding_server.protocol import HttpProtocol
from embedding_server.settings import Settings

__all__ = ["serve"]

logger = logging.getLogger(__name__)

_DRAIN_SECONDS = 30


def serve(settings: Settings) -> int:
    """Serve until told to stop; the exit code is 1 if the models can't be served.

    Raises ConfigurationError if the address can't be listened on, and ModelUnavailable for a
    --model that can't be understood.
    """
    load_errors: list[Exception] = []

    def stop_on(error: Exception) -> None:
        load_errors.append(error)
        server.should_exit = True

    # uvicorn ends well on SIGTERM, and then raises it again: that is no failure.
    signal.signal(signal.SIGTERM, _end)
    app = create_app(settings, on_load_error=stop_on)
    listener = _listen(settings.host, settings.port)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            http=HttpProtocol,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=True,
            timeout_keep_alive=75,
            # A client that never ends its request must not keep the server from ending.
            timeout_graceful_shutdown=_DRAIN_SECONDS,
        )
    )
    with listener:
        host, port = listener.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        logger.info("listening on http://%s:%d (API: /docs)", host, port)
        # uvicorn has finished its requests when it raises the signal again.
        with contextlib.suppress(KeyboardInterrupt, SystemExit):
            server.run(sockets=[listener])
    registry: Registry = app.state.registry
    if registry.loading:
        # Its thread is in the middle of native code, which the interpreter's end would abort.
        logging.shutdown()
        os._exit(0)
    for error in load_errors:
        raise error
    return 0


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
