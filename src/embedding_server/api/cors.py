# SPDX-License-Identifier: MIT OR Apache-2.0
"""For pages in browsers: which origins may send requests and read the answers (CORS)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from embedding_server.api.errors import ErrorAnswer, error_answer
from embedding_server.api.headers import FINGERPRINT_HEADER, single_header
from embedding_server.errors import ConfigurationError, InvalidRequest

__all__ = ["Cors"]

# As a browser serialises it: https://html.spec.whatwg.org/multipage/browsers.html#origin
_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://([a-z0-9._-]+|\[[0-9a-f:.]+\])(?::([1-9][0-9]{0,4}))?")
_SINGLE = (b"origin", b"access-control-request-method")
_DEFAULT_PORTS = {"http": "80", "https": "443"}


class Cors(CORSMiddleware):
    """Starlette's, of ``origins`` as browsers send them, or * for all.

    Raises ConfigurationError for what is no origin.
    """

    def __init__(self, app: ASGIApp, *, origins: Sequence[str]) -> None:
        for origin in origins:
            _check(origin)
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=("GET", "HEAD", "POST"),
            # Any: Authorization, Content-Type and ours, but OpenAI's client sends a dozen of its
            # own, too. What a page may do depends on its key, never on a cookie.
            allow_headers=("*",),
            expose_headers=(
                "x-request-id",
                "x-truncated-inputs",
                "Retry-After",
                FINGERPRINT_HEADER,
            ),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                for name in _SINGLE:
                    single_header(scope, name)
            except InvalidRequest as error:
                await error_answer(error)(scope, receive, send)
                return
        await super().__call__(scope, receive, send)

    def preflight_response(self, request_headers: Headers) -> Response:
        answer = super().preflight_response(request_headers)
        if answer.status_code == 200:
            return answer
        kept = {
            name: value
            for name, value in answer.headers.items()
            if name not in ("content-length", "content-type")
        }
        return ErrorAnswer(
            400,
            "This request is not possible from a page of this origin: --cors-origin tells the "
            "server which are, and GET, HEAD and POST are what they may send.",
            "invalid_request_error",
            headers=kept,
        )


def _check(origin: str) -> None:
    if origin == "*":
        return
    match = _ORIGIN.fullmatch(origin)
    if match is None or (match[3] is not None and match[3] == _DEFAULT_PORTS.get(match[1])):
        raise ConfigurationError(
            f"--cors-origin {origin!r} is no origin as browsers send it: write scheme and host in "
            "small letters, a port only if it isn't the scheme's own, and no slash at the end, as "
            "in https://app.example.com; or * for all."
        )
