# SPDX-License-Identifier: MIT OR Apache-2.0
"""The engine's parameters, threads, answers and metrics."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest
from engine_bench import Bench, expected, model_info, run_on, settle

from embedding_server.engine.parameters import EmbedParams
from embedding_server.engine.postprocess import normalize
from embedding_server.errors import InvalidRequest


def test_what_still_waits_to_be_tokenised_is_dropped_when_it_is_cancelled() -> None:
    bench = Bench()

    async def scenario() -> None:
        bench.tokenizer.hold.clear()
        tasks = [bench.send(f"{number} " * 3000) for number in range(5)]
        await asyncio.to_thread(bench.tokenizer.busy.wait, 20)
        for task in tasks:
            task.cancel()
        await settle()
        assert bench.metric("queue_requests") == 0
        bench.tokenizer.hold.set()
        assert (await bench.send("1")).vectors.tolist() == expected("1")
        assert len(bench.tokenizer.threads) <= 2 + 1, "those that had begun, and the last"
        assert bench.backend.batches == [[[1]]]

    run_on(bench, scenario)


def test_long_texts_are_tokenised_off_the_loop() -> None:
    bench = Bench()

    async def scenario() -> None:
        bench.tokenizer.hold.clear()
        long = bench.send("7 " * 3000)
        await asyncio.to_thread(bench.tokenizer.busy.wait, 20)
        # The long text's tokeniser stands still, and the loop goes on.
        assert (await bench.send("1 2")).vectors.tolist() == expected("1 2")
        assert not long.done()
        bench.tokenizer.hold.set()
        assert (await long).encodings[0].total_tokens == 3000
        off_loop, on_loop = bench.tokenizer.threads
        assert off_loop is not threading.main_thread()
        assert on_loop is threading.main_thread()

    run_on(bench, scenario)


@pytest.mark.parametrize("inputs", [1, 8000, 9000], ids=str)
def test_small_and_large_answers_are_finished_alike(inputs: int) -> None:
    """Beside the loop or in a thread."""
    bench = Bench(max_batch_tokens=100_000)

    async def scenario() -> None:
        texts = [f"{number % 900} 2" for number in range(inputs)]
        answer = await bench.send(*texts, params=EmbedParams())
        assert answer.vectors.shape == (inputs, 4)
        whole = np.array(expected(*texts), dtype=np.float32)
        np.testing.assert_allclose(answer.vectors, normalize(whole), atol=1e-6)

    run_on(bench, scenario)


PROMPTS = {"search_query": "Q: ", "document": "D: ", "odd": "O: "}


@pytest.mark.parametrize(
    ("params", "default", "prompt"),
    [
        pytest.param(EmbedParams(), None, "", id="none"),
        pytest.param(EmbedParams(), "odd", "O: ", id="default"),
        pytest.param(EmbedParams(input_type="query"), None, "Q: ", id="query-is-search_query"),
        pytest.param(EmbedParams(input_type="document"), "odd", "D: ", id="document"),
        pytest.param(EmbedParams(input_type="search_query"), None, "Q: ", id="exact-name"),
        pytest.param(EmbedParams(prompt="P: "), "odd", "P: ", id="own-prompt"),
        pytest.param(EmbedParams(prompt=""), "odd", "", id="empty-prompt-overrides-default"),
    ],
)
def test_which_prompt_is_prepended(params: EmbedParams, default: str | None, prompt: str) -> None:
    bench = Bench(info=model_info(prompts=PROMPTS, default_prompt=default))

    async def scenario() -> None:
        await bench.send("1", params=params)
        assert bench.tokenizer.prompts == [prompt]

    run_on(bench, scenario)


@pytest.mark.parametrize("name", ["query", "document"])
def test_a_model_without_prompts_takes_query_and_document(name: str) -> None:
    bench = Bench()

    async def scenario() -> None:
        await bench.send("1", params=EmbedParams(input_type=name))
        assert bench.tokenizer.prompts == [""]

    run_on(bench, scenario)


@pytest.mark.parametrize(
    ("params", "param", "message"),
    [
        pytest.param(
            EmbedParams(input_type="poem"), "input_type", "has no prompt 'poem'", id="prompt"
        ),
        pytest.param(
            EmbedParams(input_type="query", prompt="x"), "prompt", "not both", id="both-prompts"
        ),
        pytest.param(
            EmbedParams(dimensions=2), "dimensions", "not trained for shorter", id="no-matryoshka"
        ),
    ],
)
def test_what_a_model_cannot_do_is_refused(params: EmbedParams, param: str, message: str) -> None:
    bench = Bench()

    async def scenario() -> None:
        with pytest.raises(InvalidRequest, match=message) as caught:
            await bench.send("1", params=params)
        assert caught.value.param == param
        assert not bench.backend.batches

    run_on(bench, scenario)


@pytest.mark.parametrize("dimensions", [0, -1, 5])
def test_dimensions_outside_are_refused_with_what_is_possible(dimensions: int) -> None:
    bench = Bench(info=model_info(dimensions=(2, 4)))

    async def scenario() -> None:
        with pytest.raises(InvalidRequest, match="from 1 to 4 .* trained for 2, 4"):
            await bench.send("1", params=EmbedParams(dimensions=dimensions))
        answer = await bench.send("1 2", params=EmbedParams(dimensions=2, normalize=False))
        assert answer.vectors.tolist() == [[2, 3]]
        assert answer.dimensions == 2

    run_on(bench, scenario)


def test_a_cut_input_is_counted() -> None:
    bench = Bench()

    async def scenario() -> None:
        answer = await bench.send("5 " * 60, "6")
        assert (answer.truncated, answer.tokens) == (1, 51)
        assert [encoding.total_tokens for encoding in answer.encodings] == [60, 1]

    run_on(bench, scenario)


def test_metrics_move() -> None:
    bench = Bench(max_batch_tokens=9, padded=True, exclusive=True)

    async def scenario() -> None:
        await bench.send("5 " * 60)
        await bench.send("1", "2 2", "3 3 3")

    run_on(bench, scenario)
    assert bench.metric("inputs_total") == 4
    assert bench.metric("tokens_total") == 56
    assert bench.metric("truncated_inputs_total") == 1
    assert bench.metric("padding_tokens_total") == 3
    assert bench.metric("failed_batches_total") == 0
    assert bench.metric("queue_tokens") == bench.metric("queue_requests") == 0
    assert bench.metric("tokenize_duration_seconds_count") == 2
    assert bench.metric("queue_duration_seconds_count") == 2
    assert bench.metric("inference_duration_seconds_count") == 2
    assert bench.metric("batch_size_sum") == 4
    assert bench.metric("batch_tokens_sum") == 56
    assert bench.metric("batch_tokens_bucket", le="64.0") == 2


def test_metrics_of_a_packed_backend_count_no_padding() -> None:
    bench = Bench()

    async def scenario() -> None:
        await bench.send("1", "2 2", "3 3 3")

    run_on(bench, scenario)
    assert bench.metric("padding_tokens_total") == 0
