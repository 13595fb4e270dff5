# SPDX-License-Identifier: MIT OR Apache-2.0
"""The product's promise: sentence-transformers' vectors of the real model, through HTTP."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
from live import LiveServer
from numpy.typing import NDArray

MODEL = "all-MiniLM-L6-v2"
Golden = tuple[list[str], NDArray[np.float32]]


def embed(client: httpx.Client, texts: list[str], **fields: Any) -> NDArray[np.float32]:
    response = client.post("/v1/embeddings", json={"model": MODEL, "input": texts, **fields})
    assert response.status_code == 200, response.text
    return np.array([item["embedding"] for item in response.json()["data"]], dtype=np.float32)


def test_first_values(server: LiveServer) -> None:
    with httpx.Client(base_url=server.url) as client:
        iphone, samsung = embed(client, ["iPhone", "Samsung"])
    np.testing.assert_allclose(iphone[:3], [-0.02878604, 0.02476060, 0.06652576], atol=1e-6)
    np.testing.assert_allclose(samsung[:3], [-0.13341816, 0.04968679, 0.04382507], atol=1e-6)


def test_meaning(server: LiveServer) -> None:
    with httpx.Client(base_url=server.url) as client:
        iphone, phone, roku = embed(client, ["iPhone", "popular smartphone", "Roku"])
    assert iphone @ phone > iphone @ roku + 0.1


def test_one_at_a_time(server: LiveServer, golden: Golden) -> None:
    texts, expected = golden
    with httpx.Client(base_url=server.url) as client:
        vectors = np.concatenate([embed(client, [text]) for text in texts])
    assert np.abs(vectors - expected).max() < 1e-5


def test_all_in_one_request(server: LiveServer, golden: Golden) -> None:
    texts, expected = golden
    with httpx.Client(base_url=server.url, timeout=60) as client:
        vectors = embed(client, texts)
    assert np.abs(vectors - expected).max() < 1e-5


def test_shuffled_among_concurrent_requests(server: LiveServer, golden: Golden) -> None:
    texts, expected = golden
    order = list(range(len(texts))) * 3
    random.Random(7).shuffle(order)
    shares = [order[start::16] for start in range(16)]

    with httpx.Client(base_url=server.url, timeout=60) as client:

        def worst(share: list[int]) -> float:
            vectors = embed(client, [texts[index] for index in share])
            return float(np.abs(vectors - expected[share]).max())

        with ThreadPoolExecutor(16) as pool:
            assert max(pool.map(worst, shares)) < 1e-5


def test_company_does_not_matter(server: LiveServer, golden: Golden) -> None:
    texts, _ = golden
    with httpx.Client(base_url=server.url, timeout=60) as client:
        alone = np.concatenate([embed(client, [text]) for text in texts[:40]])
        together = embed(client, texts)[:40]
        reversed_order = embed(client, texts[::-1])[::-1][:40]
    assert np.abs(alone - together).max() < 1e-6
    assert np.abs(alone - reversed_order).max() < 1e-6
