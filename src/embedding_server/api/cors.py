# SPDX-License-Identifier: MIT OR Apache-2.0
"""Which pages in browsers may send requests and read the answers (CORS)."""

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
    """Starlette's middleware for ``origins``; * means all. Raises ConfigurationError for others."""

    def __init__(self, app: ASGIApp, *, origins: Sequence[str]) -> None:
        for origin in origins:
            _check(origin)
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=("GET", "HEAD", "POST"),
            # OpenAI's client adds a dozen headers. A page has the rights of its key, never those of
            # a cookie, so that any header is safe.
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
            "A page of this origin may not send this request: --cors-origin lists the allowed "
            "origins, and the allowed methods are GET, HEAD and POST.",
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
