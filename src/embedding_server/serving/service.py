# SPDX-License-Identifier: MIT OR Apache-2.0
"""One process that serves: its start, its signals, the files that it reads again, and its end."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import socket
import sys

from embedding_server.app import create_app
from embedding_server.errors import ConfigurationError
from embedding_server.serving.notify import Notifier
from embedding_server.serving.servers.base import ServerOptions, server_class
from embedding_server.serving.servers.tls import ReloadableContext
from embedding_server.serving.signals import handle_signals
from embedding_server.settings import Settings

__all__ = ["Service"]

logger = logging.getLogger(__name__)

# Net allocations between garbage collections, 700 by default: a request leaves no reference cycles,
# and looking for them took 4 % of a core (docs/performance.md).
_GC_ALLOCATIONS = 5_000


class Service:
    """The application under an ASGI server.

    With ``load_first`` connections are accepted when the models are loaded, as other processes
    accept them meanwhile. Raises ConfigurationError for settings that can't work, and
    ModelUnavailable for a --model that is malformed.
    """

    def __init__(self, settings: Settings, notifier: Notifier, *, load_first: bool = False) -> None:
        self._notifier = notifier
        self._load_error: Exception | None = None
        make_server = server_class(settings.server)
        self._tls: ReloadableContext | None = None
        if settings.tls_cert is not None:
            self._tls = ReloadableContext(
                settings.tls_cert,
                settings.tls_key,
                settings.tls_client_ca,
                protocols=make_server.protocols,
            )
        self.app = create_app(
            settings,
            load_first=load_first,
            on_loaded=self.loaded,
            on_load_error=self._not_loaded,
        )
        self._registry = self.app.state.registry
        self._server = make_server(self.app, ServerOptions.from_settings(settings, self._tls))

    def run(self, listener: socket.socket) -> int:
        """Serve on ``listener`` until drained; the exit code.

        Raises ModelError if the models can't be served.
        """
        gc.set_threshold(_GC_ALLOCATIONS)
        _allow_many_connections()
        self._server.run(listener, self.started)
        code = 0
        if not self.app.state.condition.draining:
            logger.critical("the server has ended by itself; the lines above say why")
            code = 1
        if self._registry.loading or self._registry.stuck:
            # A thread runs native code, which a regular end of the interpreter would abort.
            if self._load_error is not None:
                logger.critical("No model is served: %s", self._load_error)
                code = 1
            logging.shutdown()
            os._exit(code)
        if self._load_error is not None:
            raise self._load_error
        return code

    def drain(self) -> None:
        """Turn readiness red, accept no more connections, finish what is under way and end."""
        self._notifier.stopping()
        self.app.state.condition.draining = True
        self._server.stop()

    def reload(self) -> None:
        """Read API keys and certificates again; files that can't be used are logged, not taken."""
        with self._notifier.reloading():
            self.app.state.api_keys.reload()
            if self._tls is not None:
                try:
                    self._tls.reload()
                    logger.info("the TLS files are read again")
                except ConfigurationError as error:
                    logger.error("The old TLS files stay in use. %s", error)

    def started(self) -> None:
        """Run in the event loop before the first request."""
        handle_signals(drain=self.drain, reload=self.reload)
        self._notifier.watch(lambda: not (self._registry.hung or self._registry.dead))

    def loaded(self) -> None:
        """Run when all models are loaded."""
        self._notifier.ready()
        # Objects that live as long as the process needn't be traversed by each garbage collection.
        gc.collect()
        gc.freeze()

    def _not_loaded(self, error: Exception) -> None:
        self._load_error = error
        self.drain()


def _allow_many_connections() -> None:
    """Raise the soft limit of file descriptors, often a thousand: each connection takes one."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = hard if hard != resource.RLIM_INFINITY else max(soft, 65536)
    with contextlib.suppress(ValueError, OSError):  # the system may allow less
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
