# SPDX-License-Identifier: MIT OR Apache-2.0
"""What any bytes as a request's body, or as a text, must come to; see tests/api/test_fuzz.py.

``python tests/support/fuzz_requests.py -max_total_time=60`` looks for more with atheris, led by the
branches that are taken (the extra [fuzz]).
"""

from __future__ import annotations

import json
import sys

from embedding_server.api.parsing import check_extent, parse
from embedding_server.api.schemas import EmbeddingsRequest, OpenAIEmbeddingsRequest
from embedding_server.engine.tokenizer import Tokenizer
from embedding_server.errors import InvalidRequest

__all__ = ["check_body", "check_encoding"]

_INPUTS, _IDS = 4, 100


def check_body(body: bytes) -> None:
    """A body is a request, or refused with a reason; never anything else."""
    try:  # as the server does, before anything is known of the body
        check_extent(body, inputs=_INPUTS, ids=_IDS)
        fits = True
    except InvalidRequest:
        fits = False
    for schema in (EmbeddingsRequest, OpenAIEmbeddingsRequest):
        try:
            request = parse(schema, body)
        except InvalidRequest as error:
            assert 0 < len(str(error)) < 1000
            json.dumps(str(error)).encode()
            assert error.param is None or len(error.param) <= 100
            continue
        # What Python's own reader makes of it, which tells of fields that are there twice.
        pairs = json.loads(body, object_pairs_hook=lambda pairs: pairs)
        assert len(dict(pairs)) == len(pairs)
        inputs = dict(pairs)["input"]
        single = isinstance(inputs, str) or isinstance(inputs[0], int)
        assert request.input == ([inputs] if single else inputs)
        assert request.model == dict(pairs)["model"]
        ids = sum(len(value) for value in request.input if isinstance(value, list))
        lists = (
            0
            if single and isinstance(inputs, str)
            else 1 + sum(isinstance(value, list) for value in inputs)
        )
        if fits:  # it may let some more pass, for the fields and their values
            assert len(request.input) <= _INPUTS + 40
            assert ids <= _IDS + len(request.input) + 40
        else:
            assert max(len(request.input), lists) > _INPUTS or ids > _IDS


def check_encoding(tokenizer: Tokenizer, inputs: list[str] | list[list[int]]) -> None:
    """Inputs are encoded as each alone, within the limit; or refused with a reason."""
    limit = tokenizer.max_tokens
    try:
        together = tokenizer.encode(inputs)
    except InvalidRequest as error:
        assert error.param == "input"
        assert error.index is not None
        (alone,) = (inputs[error.index],)
        try:
            tokenizer.encode([alone])  # type: ignore[list-item]
        except InvalidRequest as same:
            assert same.reason == error.reason
            return
        raise AssertionError("refused in company alone") from error
    assert len(together) == len(inputs)
    for value, encoding in zip(inputs, together, strict=True):
        assert len(encoding.ids) == min(encoding.total_tokens, limit)
        assert encoding.truncated == (encoding.total_tokens > limit)
        assert all(0 <= token < tokenizer.vocab_size for token in encoding.ids)
        assert [encoding] == tokenizer.encode([value])  # type: ignore[list-item]
        try:
            tokenizer.encode([value], truncate=False)  # type: ignore[list-item]
            assert not encoding.truncated
        except InvalidRequest as error:
            assert error.code == "context_length_exceeded"
            assert encoding.truncated


def _main() -> None:
    import atheris

    atheris.instrument_all()  # type: ignore[no-untyped-call]

    def one(data: bytes) -> None:
        check_body(data)
        # Most bytes are no JSON: the rest of a request is given.
        check_body(b'{"model": "a", "input": %b}' % data)
        check_body(b'{"model": "a", "input": "a", %b}' % data)

    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    _main()
