"""HTTP/1.1 as uvicorn and httptools read it, but for what they get wrong."""

from __future__ import annotations

import logging
import uuid

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from embedding_server.api.errors import ErrorAnswer

__all__ = ["HttpProtocol"]

logger = logging.getLogger(__name__)

_NOT_HTTP = bytes(
    ErrorAnswer(400, "This is not a valid HTTP/1.1 request.", "invalid_request_error").body
)


class HttpProtocol(HttpToolsProtocol):
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
        request_id = uuid.uuid4().hex
        self.transport.write(
            b"HTTP/1.1 400 Bad Request\r\nx-request-id: %b\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\nconnection: close\r\n\r\n%b"
            % (request_id.encode("ascii"), len(_NOT_HTTP), _NOT_HTTP)
        )
        logger.info("not HTTP", extra={"fields": {"id": request_id, "status": 400}})
        self.transport.close()

    def _should_upgrade(self) -> bool:
        """Asked about each offer, before ``data_received`` hears of it: begin no request yet."""
        return True

    def _head_without_offer(self) -> bytes:
        version = self.parser.get_http_version().encode("ascii")
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version)]
        lines += [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])
