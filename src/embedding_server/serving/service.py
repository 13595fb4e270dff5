# SPDX-License-Identifier: MIT OR Apache-2.0
"""One process that serves: its signals, its files that are read again, its end."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import socket
import sys
from collections.abc import Callable

from embedding_server.app import create_app
from embedding_server.errors import ConfigurationError
from embedding_server.serving.notify import Notifier
from embedding_server.serving.servers.base import ServerOptions, server_class
from embedding_server.serving.servers.tls import ReloadableContext
from embedding_server.serving.signals import mind_signals
from embedding_server.settings import Settings

__all__ = ["Service"]

logger = logging.getLogger(__name__)

# Net allocations between collections of garbage, against Python's own 700: a request leaves none
# in circles, and looking for it took 4 % of a core (docs/performance.md).
_GC_ALLOCATIONS = 5_000


class Service:
    """The application under an ASGI server.

    ``load_first``: accept connections when the models are loaded, as there are others who do;
    ``on_start`` is called in the event loop before the first request, ``on_loaded`` when all
    models are loaded; ``notifier`` tells the service manager. Raises ConfigurationError for what
    ``settings`` can't mean, and ModelUnavailable for a --model that can't be understood.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        load_first: bool = False,
        on_start: Callable[[], None] = lambda: None,
        on_loaded: Callable[[], None] = lambda: None,
        notifier: Notifier | None = None,
    ) -> None:
        self._on_start = on_start
        self._on_loaded = on_loaded
        self._notifier = notifier or Notifier()
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
            on_loaded=self._loaded,
            on_load_error=self._not_loaded,
        )
        self._server = make_server(self.app, ServerOptions.from_settings(settings, self._tls))

    def run(self, listener: socket.socket) -> int:
        """Serve on ``listener`` until drained; the exit code.

        Raises ModelError if the models can't be served.
        """
        gc.set_threshold(_GC_ALLOCATIONS)
        _allow_many_connections()
        self._server.run(listener, self._start)
        code = 0
        if not self.app.state.condition.draining:
            logger.critical("the server has ended by itself; the lines above say why")
            code = 1
        registry = self.app.state.registry
        if registry.loading or registry.stuck:
            # Its thread is in the middle of native code, which the interpreter's end would abort.
            if self._load_error is not None:
                logger.critical("No model is served: %s", self._load_error)
                code = 1
            logging.shutdown()
            os._exit(code)
        if self._load_error is not None:
            raise self._load_error
        return code

    def drain(self) -> None:
        """Turn readiness red, accept no connection any more, finish what is under way and end."""
        self._notifier.stopping()
        self.app.state.condition.draining = True
        self._server.stop()

    def reload(self) -> None:
        """Read API keys and certificates again; what can't be used is told, and the old goes on."""
        with self._notifier.reloading():
            self.app.state.api_keys.reload()
            if self._tls is not None:
                try:
                    self._tls.reload()
                    logger.info("the TLS files are read again")
                except ConfigurationError as error:
                    logger.error("The old TLS files stay in use. %s", error)

    def _start(self) -> None:
        mind_signals(drain=self.drain, cut=lambda: None, reload=self.reload)
        registry = self.app.state.registry
        self._notifier.watch(lambda: not (registry.hung or registry.dead))  # as /health/live
        self._on_start()

    def _loaded(self) -> None:
        self._notifier.ready()
        self._on_loaded()
        # What lives as long as the process needn't be looked at in every collection of garbage.
        gc.collect()
        gc.freeze()

    def _not_loaded(self, error: Exception) -> None:
        self._load_error = error
        self.drain()


def _allow_many_connections() -> None:
    """Each takes a file descriptor; the soft limit is often a thousand and may be raised."""
    if sys.platform == "win32":
        return
    import resource

    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most if most != resource.RLIM_INFINITY else max(soft, 65536)
    with contextlib.suppress(ValueError, OSError):  # the system may have a limit of its own
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
