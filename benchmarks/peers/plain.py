# SPDX-License-Identifier: MIT OR Apache-2.0
"""What one writes in ten minutes: sentence-transformers behind FastAPI and hypercorn.

``plain.py MODEL_FOLDER PORT`` serves ``POST /v1/embeddings`` in OpenAI's shape.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from typing import Any

from fastapi import FastAPI
from hypercorn.asyncio import serve
from hypercorn.config import Config
from pydantic import BaseModel
from sentence_transformers import SentenceTransformer

model = SentenceTransformer(sys.argv[1], device="cpu")
# PyTorch uses all cores for one call; calls side by side would only take them from each other.
one_at_a_time = threading.Lock()
app = FastAPI()


class EmbeddingRequest(BaseModel):
    model: str
    input: str | list[str]


@app.post("/v1/embeddings")
def embeddings(request: EmbeddingRequest) -> dict[str, Any]:
    texts = [request.input] if isinstance(request.input, str) else request.input
    with one_at_a_time:
        vectors = model.encode(texts, normalize_embeddings=True, show_progress_bar=False)
    data = [
        {"object": "embedding", "index": index, "embedding": vector.tolist()}
        for index, vector in enumerate(vectors)
    ]
    return {"object": "list", "model": request.model, "data": data}


config = Config()
config.bind = [f"127.0.0.1:{sys.argv[2]}"]
asyncio.run(serve(app, config))  # type: ignore[arg-type]
