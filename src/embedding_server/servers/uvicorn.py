"""uvicorn with httptools: HTTP/1.1, and none of those measured is faster (docs/performance.md)."""

from __future__ import annotations

import socket

import httptools
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from embedding_server.servers.base import KEEP_ALIVE_SECONDS, answer_to_nonsense

__all__ = ["UvicornServer"]


class UvicornServer:
    """See ``AsgiServer``."""

    def __init__(self, app: ASGIApp, *, drain_seconds: int) -> None:
        config = uvicorn.Config(
            app,
            http=_Http1,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # nothing here asks who the client is
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=drain_seconds,
        )
        self._server = uvicorn.Server(config)

    def run(self, listener: socket.socket) -> None:
        # uvicorn ends well on a signal, and then raises it again.
        self._server.run(sockets=[listener])

    def stop(self) -> None:
        self._server.should_exit = True


class _Http1(HttpToolsProtocol):
    """Answers a client that offers another protocol in HTTP/1.1, and nonsense in our error shape.

    Java's HttpClient offers HTTP/2 with every request; httptools then takes the end of the
    headers for the end of the request and loses the body (uvicorn issue 2722).
    """

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        while data:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as offer:
                if self.parser.get_method() == b"CONNECT":  # always an offer, and never for us
                    self.send_400_response("")
                    return
                data = self._head_without_offer() + data[offer.args[0] :]
                self.parser = httptools.HttpRequestParser(self)
            except httptools.HttpParserError:
                self.send_400_response("")
                return

    def send_400_response(self, msg: str) -> None:
        headers, body = answer_to_nonsense()
        head = b"".join(b"%b: %b\r\n" % header for header in headers)
        self.transport.write(b"HTTP/1.1 400 Bad Request\r\n%b\r\n%b" % (head, body))
        self.transport.close()

    def _should_upgrade(self) -> bool:
        """Asked about each offer, before ``data_received`` hears of it: begin no request yet."""
        return True

    def _head_without_offer(self) -> bytes:
        version = self.parser.get_http_version().encode("ascii")
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version)]
        lines += [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])
