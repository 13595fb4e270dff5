# SPDX-License-Identifier: MIT OR Apache-2.0
"""Which model made a client's stored vectors, in the header ``x-embedding-fingerprint``."""

from __future__ import annotations

from fastapi import Request

from embedding_server.api.headers import single_header
from embedding_server.engine.info import ModelInfo
from embedding_server.errors import FingerprintMismatch

__all__ = ["FINGERPRINT_HEADER", "knows_model"]

FINGERPRINT_HEADER = "x-embedding-fingerprint"

_NAME = FINGERPRINT_HEADER.encode("ascii")


def knows_model(request: Request, info: ModelInfo) -> bool:
    """Whether the request carries the fingerprint of the model that ``info`` describes.

    Raises FingerprintMismatch if it carries another one, and InvalidRequest if it carries several.
    """
    value = single_header(request.scope, _NAME)
    if value is None:
        return False
    sent = value.decode("latin-1")
    if not sent or sent != info.fingerprint:
        raise FingerprintMismatch(
            f"Your stored vectors, with the fingerprint {sent[:100]!r}, and the model "
            f"{info.name!r}, with the fingerprint {info.fingerprint!r}, do not match. Embed your "
            "texts again, or serve the model that made the stored vectors.",
            param=FINGERPRINT_HEADER,
        )
    return True
