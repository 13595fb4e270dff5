# SPDX-License-Identifier: MIT OR Apache-2.0
"""From vectors to the JSON of an answer."""

from __future__ import annotations

import binascii
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import orjson
from numpy.typing import NDArray

from embedding_server.engine.engine import Embeddings

__all__ = ["encode_embeddings"]


def encode_embeddings(
    embeddings: Embeddings,
    *,
    model: str,
    encoding_format: Literal["float", "base64"],
    openai: bool,
) -> bytes:
    """The JSON answer to ``/embeddings``; with ``openai`` only OpenAI's own fields.

    Each vector is serialized separately, so that other threads run in between on a large answer.
    """
    values = np.ascontiguousarray(embeddings.vectors)
    if values.dtype == np.float32:
        values = values.astype("<f4", copy=False)
    rows = _base64_rows(values) if encoding_format == "base64" else iter(values)
    data = b",".join(
        orjson.dumps(
            _item(index, vector, embeddings, openai=openai), option=orjson.OPT_SERIALIZE_NUMPY
        )
        for index, vector in enumerate(rows)
    )
    tokens = embeddings.tokens
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return b'{"object":"list","model":%b,"data":[%b],"usage":%b}' % (
        orjson.dumps(model),
        data,
        orjson.dumps(usage),
    )


def _base64_rows(values: NDArray[Any]) -> Iterator[str]:
    return (binascii.b2a_base64(row, newline=False).decode("ascii") for row in values)


def _item(
    index: int, vector: NDArray[Any] | str, embeddings: Embeddings, *, openai: bool
) -> dict[str, object]:
    if openai:
        return {"object": "embedding", "index": index, "embedding": vector}
    item: dict[str, object] = {
        "object": "embedding",
        "index": index,
        "dims": embeddings.dimensions,
        "embedding": vector,
    }
    encoding = embeddings.encodings[index]
    if encoding.truncated:
        item |= {"truncated": True, "tokens": encoding.total_tokens}
    return item
