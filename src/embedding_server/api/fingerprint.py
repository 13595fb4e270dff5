# SPDX-License-Identifier: MIT OR Apache-2.0
"""Which model made a client's stored vectors, in the header ``x-embedding-fingerprint``."""

from __future__ import annotations

from fastapi import Request

from embedding_server.engine.info import ModelInfo
from embedding_server.errors import FingerprintMismatch, InvalidRequest

__all__ = ["FINGERPRINT_HEADER", "knows_model"]

FINGERPRINT_HEADER = "x-embedding-fingerprint"

_NAME = FINGERPRINT_HEADER.encode("ascii")


def knows_model(request: Request, info: ModelInfo) -> bool:
    """Whether the request carries the fingerprint of the model that ``info`` describes.

    Raises FingerprintMismatch if it carries another one, and InvalidRequest if it carries several.
    """
    values = [value for name, value in request.scope["headers"] if name == _NAME]
    if not values:
        return False
    if len(values) > 1:
        raise InvalidRequest(
            f"The header {FINGERPRINT_HEADER} is there {len(values)} times; send it once.",
            param=FINGERPRINT_HEADER,
        )
    sent = values[0].decode("latin-1")
    if sent != info.fingerprint:
        raise FingerprintMismatch(
            f"Your stored vectors, with the fingerprint {sent[:100]!r}, and the model "
            f"{info.name!r}, with the fingerprint {info.fingerprint!r}, do not match. Embed your "
            "texts again, or serve the model that made the stored vectors.",
            param=FINGERPRINT_HEADER,
        )
    return True
