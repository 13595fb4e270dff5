# SPDX-License-Identifier: MIT OR Apache-2.0
"""How much a large body holds, before it is read: each of its lists would take 70 bytes, and time.

32 MB of ``[7],[7]`` are 8 million lists, for which nothing else in the process runs for seconds.
"""

from __future__ import annotations

import re

from embedding_server.errors import InvalidRequest

__all__ = ["check_extent"]

# Without a way back, which would take memory for every character. One without an end goes to the
# body's: else it would be looked for again from each quote in it, for minutes.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)

_FIELDS = 20
"""More than there are, for their names and values."""


def check_extent(body: bytes, *, inputs: int, ids: int) -> None:
    """Refuse a body that must hold more than ``inputs`` texts or lists, or ``ids`` token ids.

    Raises InvalidRequest. What passes may still be no JSON.
    """
    strings = lists = commas = objects = end = 0
    for string in _STRING.finditer(body):
        lists += body.count(b"[", end, string.start())
        commas += body.count(b",", end, string.start())
        objects += body.count(b"{", end, string.start())
        end = string.end()
        strings += 1
        if strings > inputs + 2 * _FIELDS:
            break
    else:
        lists += body.count(b"[", end)
        commas += body.count(b",", end)
        objects += body.count(b"{", end)
    if objects > _FIELDS:
        raise InvalidRequest("The body holds objects within its object; no field takes one.")
    if max(strings - 2 * _FIELDS, lists - 1) > inputs:
        raise InvalidRequest(
            f"The body holds more texts or lists than the {inputs} inputs that are taken in one "
            "request. Send them in parts.",
            param="input",
        )
    if commas - inputs - _FIELDS > ids:
        raise InvalidRequest(
            f"'input' has more than the {ids} token ids that are taken in one request. Send them "
            "in parts.",
            param="input",
            code="request_too_large",
        )
