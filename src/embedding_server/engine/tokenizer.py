# SPDX-License-Identifier: MIT OR Apache-2.0
"""Text or token ids to Encodings; the one place that knows how long an input may be."""

from __future__ import annotations

import operator
import os
import threading
from collections.abc import Collection, Generator, Iterator, Sequence

import tokenizers
from tokenizers import models

from embedding_server.engine.batch import Encoding
from embedding_server.engine.cuts import cut_pattern, pieces
from embedding_server.errors import (
    ContextLengthExceeded,
    InferenceFailed,
    InvalidRequest,
    ModelNotSupported,
)

__all__ = ["Input", "Tokenizer", "is_panic"]

_PART_CHARACTERS = 64 * 1024
"""Tokenised at a time: an Encoding takes some 500 bytes a character while it lives."""

_MOST_CHARACTERS = 8 * _PART_CHARACTERS
"""As many without a place to cut at are no text, and a model's limit is far below."""

# Tables are rounded up to a multiple of 64 or 128, and some have a few hundred rows in reserve.
_SPARE_ROWS = 1024
_SPARE_SHARE = 0.04

_one_large = threading.Lock()

_TURN_SECONDS = 0.01

Input = str | Sequence[int]
"""A text, or the model's own token ids, with the special tokens of its template or without."""

_NO_VECTOR = "holds a token that was added to the tokenizer and that the model has no vector for."
_LONE_SURROGATE = "holds a lone surrogate, which is not valid Unicode text."


class _NoVectorError(Exception):
    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.index = index


class Tokenizer:
    """A model's tokenizer with its length policy.

    An input over ``max_tokens`` keeps its first tokens and its special tokens, as
    sentence-transformers keeps them, and its Encoding says how long it was; with ``keep_end`` it
    keeps its last tokens. With ``exclude_prompt`` the Encoding also says which tokens are the
    prompt's, to be left out of pooling. ``special_ids`` are the ids of all special tokens; by
    default those that end a text. ``pad_id`` is the padding's, by default that of the tokenizer.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        max_tokens: int,
        vocab_size: int | None = None,
        add_special_tokens: bool = True,
        special_ids: Collection[int] | None = None,
        pad_id: int | None = None,
        exclude_prompt: bool = False,
        keep_end: bool = False,
    ) -> None:
        if pad_id is None and tokenizer.padding is not None:
            pad_id = tokenizer.padding["pad_id"]
        # Its own threads would take cores from inference, for a hundredth of the whole work.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        # A tokenizer.json may pad and cut by itself (all-MiniLM-L6-v2's pads to 128):
        # packed batches need no padding, and a silent cut would hide the true length.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self._add_special_tokens = add_special_tokens
        self._exclude_prompt = exclude_prompt
        self._keep_end = keep_end
        self.max_tokens = max_tokens
        tokens = tokenizer.get_vocab_size(with_added_tokens=True)
        self.vocab_size = vocab_size or tokens
        unknown = self.vocab_size - tokens
        if unknown > _SPARE_ROWS and unknown > _SPARE_SHARE * self.vocab_size:
            raise _apart(tokens, self.vocab_size)
        # Tokens added to the tokenizer alone do no harm unless a text holds them.
        self._knows_more = tokens > self.vocab_size
        ids = tokenizer.get_vocab(with_added_tokens=False).values()
        if max(ids, default=0) >= self.vocab_size:
            raise _apart(tokens, self.vocab_size)
        _refuse_chance(tokenizer)
        self._cut_pattern = cut_pattern(tokenizer)
        try:
            ends = _special_tokens(tokenizer) if add_special_tokens else ([], [])
            # What no vocabulary holds, so that one without an unknown token is found now.
            tokenizer.encode_batch_fast(["a \U0010ffff"], add_special_tokens=add_special_tokens)
        except ModelNotSupported:
            raise
        except BaseException as error:  # tokenizers raises bare Exception, or panics
            if not isinstance(error, Exception) and not is_panic(error):
                raise
            raise ModelNotSupported(f"The tokenizer fails on a text: {error}.") from None
        self._prefix, self._suffix = ends
        for token in (*self._prefix, *self._suffix):
            if token >= self.vocab_size:
                raise ModelNotSupported(
                    f"The tokenizer puts the token {token} around every text, and the model knows "
                    f"{self.vocab_size}: they don't belong together."
                )
        self._pad_id = pad_id
        self._special_ids = frozenset(self._suffix if special_ids is None else special_ids)
        if len(self._prefix) + len(self._suffix) >= max_tokens:
            raise ModelNotSupported(
                f"A limit of {max_tokens} tokens leaves no room beside the model's special tokens."
            )

    def encode(
        self, inputs: Sequence[Input], *, prompt: str = "", truncate: bool = True
    ) -> list[Encoding]:
        """One Encoding for each input, in order, with ``prompt`` prepended.

        Raises ContextLengthExceeded if an input is too long and ``truncate`` is false,
        and InvalidRequest for text that is not Unicode, ids outside the vocabulary or with a part
        of their special tokens, and inputs that are neither.
        """
        *_, encodings = self.encode_in_steps(inputs, prompt=prompt, truncate=truncate)
        assert encodings is not None
        return encodings

    def encode_in_steps(
        self, inputs: Sequence[Input], *, prompt: str = "", truncate: bool = True
    ) -> Iterator[list[Encoding] | None]:
        """As ``encode``: yields None after each stretch of the work, and the encodings at last.

        A stretch takes some 0.1 s and 40 MB; up to eight times that where a text has no place to
        cut it at.
        """
        if not _is_unicode(prompt):
            raise InvalidRequest(f"'prompt' {_LONE_SURROGATE}", param="prompt")
        if len(prompt) > _PART_CHARACTERS:
            raise InvalidRequest(
                f"'prompt' has {len(prompt)} characters; at most {_PART_CHARACTERS} are taken.",
                param="prompt",
                code="request_too_large",
            )
        excluded = self._prompt_tokens(prompt) if prompt and self._exclude_prompt else 0
        encodings: list[Encoding] = []

        def fit(ids: list[int], total: int) -> None:
            encodings.append(self._fit(len(encodings), ids, total, truncate, excluded))

        if len(inputs) and not isinstance(inputs[0], str):
            for ids in self._encode_ids(inputs, prompt):
                fit(ids, len(ids))
            yield encodings
            return
        for part in _parts([prompt + _text(index, text) for index, text in enumerate(inputs)]):
            if encodings:
                yield None
            try:
                if len(part) == 1 and len(part[0]) > _PART_CHARACTERS:
                    fit(*(yield from self._encode_long(part[0], len(encodings))))
                else:
                    for ids in self._encode_texts(part, len(encodings)):
                        fit(ids, len(ids))
            except (TypeError, UnicodeEncodeError):
                bad = next((i for i, text in enumerate(part) if not _is_unicode(text)), None)
                if bad is None:
                    raise
                bad += len(encodings)
                raise InvalidRequest(_LONE_SURROGATE, param="input", index=bad) from None
        yield encodings

    def _encode_texts(
        self, texts: list[str], first: int = 0, *, special_tokens: bool = True
    ) -> list[list[int]]:
        """The ids of each; the first text is the request's input number ``first``."""
        try:
            encoded = self._tokenizer.encode_batch_fast(
                texts, add_special_tokens=self._add_special_tokens and special_tokens
            )
        except BaseException as error:
            if is_panic(error):
                raise InferenceFailed(
                    "The model's tokenizer failed on this request; the server's log says why."
                ) from None
            raise
        sequences = [encoding.ids for encoding in encoded]
        if self._knows_more:
            for index, ids in enumerate(sequences):
                if max(ids, default=0) >= self.vocab_size:
                    raise InvalidRequest(_NO_VECTOR, param="input", index=first + index)
        return sequences

    def _encode_long(self, text: str, index: int) -> Generator[None, None, tuple[list[int], int]]:
        """The ids of one text, and how many it has; of those that are cut anyway none is kept."""
        kept: list[int] = []
        total = len(self._prefix) + len(self._suffix)
        for number, piece in enumerate(pieces(text, self._cut_pattern, _PART_CHARACTERS)):
            if number:
                yield
            if len(piece) > _MOST_CHARACTERS:
                raise InvalidRequest(
                    f"has a stretch of {len(piece)} characters without a space or another place "
                    f"to cut it at; at most {_MOST_CHARACTERS} are taken. Shorten it.",
                    param="input",
                    code="request_too_large",
                    index=index,
                )
            # One that can't be cut takes hundreds of MB: never several at a time. Who waits for it
            # lets others have the thread.
            large = len(piece) > 2 * _PART_CHARACTERS
            while large and not _one_large.acquire(timeout=_TURN_SECONDS):
                yield
            try:
                (ids,) = self._encode_texts([piece], index, special_tokens=False)
            finally:
                if large:
                    _one_large.release()
            total += len(ids)
            if self._keep_end:
                kept = (kept + ids)[-self.max_tokens :]
            elif len(kept) < self.max_tokens:
                kept += ids[: self.max_tokens - len(kept)]
        return [*self._prefix, *kept, *self._suffix], total

    def _encode_ids(self, inputs: Sequence[Input], prompt: str) -> list[list[int]]:
        start = list(self._prefix)
        if prompt:
            try:
                start += self._encode_texts([prompt], special_tokens=False)[0]
            except InvalidRequest:
                raise InvalidRequest(f"'prompt' {_NO_VECTOR}", param="prompt") from None
        sequences = []
        for index, value in enumerate(inputs):
            ids = _token_ids(index, value)
            for token in ids:
                if not 0 <= token < self.vocab_size:
                    raise InvalidRequest(
                        f"is a list of token ids and holds {token}, but this model's go from 0 to "
                        f"{self.vocab_size - 1}: another model's tokenizer made them. Send text "
                        "instead; in LangChain's OpenAIEmbeddings set "
                        "check_embedding_ctx_length=False.",
                        param="input",
                        index=index,
                    )
            sequences.append([*start, *self._without_special_tokens(index, ids), *self._suffix])
        return sequences

    def _without_special_tokens(self, index: int, ids: list[int]) -> list[int]:
        """``ids`` without the special tokens of the model's template, be they all there or none."""
        if self._pad_id not in (*self._prefix, *self._suffix):
            self._check_padding(index, ids)
        first, last = len(self._prefix), len(ids) - len(self._suffix)
        begins = first > 0 and ids[:first] == self._prefix
        ends = last < len(ids) and ids[max(last, 0) :] == self._suffix
        if not begins and not ends:
            first, last = 0, len(ids)
        elif (first > 0 and not begins) or (last < len(ids) and not ends) or first > last:
            raise InvalidRequest(
                f"is a list of token ids that has only a part of the model's special tokens: send "
                f"all of them ({_listed(self._prefix)} first, {_listed(self._suffix)} last) or "
                "none, and the server adds them.",
                param="input",
                index=index,
            )
        self._check_padding(index, ids[first:last])
        return ids[first:last]

    def _check_padding(self, index: int, ids: list[int]) -> None:
        """Refuse what a client has padded to the longest of several: it would count as text."""
        if self._pad_id is not None and self._pad_id in (ids[:1] + ids[-1:]):
            raise InvalidRequest(
                f"is a list of token ids with padding ({self._pad_id}): send them without.",
                param="input",
                index=index,
            )

    def _prompt_tokens(self, prompt: str) -> int:
        """As sentence-transformers counts them: those of the prompt alone, but for a special
        token at its end."""
        alone = self._cut(self._encode_texts([prompt])[0])
        return len(alone) - (bool(alone) and alone[-1] in self._special_ids)

    def _fit(
        self, index: int, ids: list[int], total: int, truncate: bool, excluded: int
    ) -> Encoding:
        if not total and self._add_special_tokens:
            # A static model gives zeros; a transformer has nothing to begin with.
            raise InvalidRequest("has no token; leave it out.", param="input", index=index)
        if total > self.max_tokens:
            if not truncate:
                raise ContextLengthExceeded(
                    f"has {total} tokens, but this model takes at most {self.max_tokens}. "
                    "Shorten it, or leave truncate on to have it cut.",
                    param="input",
                    index=index,
                )
            ids = self._cut(ids)
        return Encoding(tuple(ids), total, prompt_tokens=min(excluded, len(ids)))

    def _cut(self, ids: list[int]) -> list[int]:
        if len(ids) <= self.max_tokens:
            return ids
        content = ids[len(self._prefix) : len(ids) - len(self._suffix)]
        room = self.max_tokens - len(self._prefix) - len(self._suffix)
        kept = content[-room:] if self._keep_end else content[:room]
        return [*self._prefix, *kept, *self._suffix]


def _parts(texts: list[str]) -> Iterator[list[str]]:
    """Some texts at a time, and a long one alone."""
    part: list[str] = []
    characters = 0
    for text in texts:
        if part and characters + len(text) > _PART_CHARACTERS:
            yield part
            part, characters = [], 0
        part.append(text)
        characters += len(text)
    yield part


def _refuse_chance(tokenizer: tokenizers.Tokenizer) -> None:
    """Raise ModelNotSupported for what makes the ids of a text differ from one load to the next."""
    if getattr(tokenizer.model, "dropout", None):
        raise ModelNotSupported(
            "The tokenizer's dropout splits texts at random: set it to null in tokenizer.json."
        )
    normalize = tokenizer.normalizer.normalize_str if tokenizer.normalizer else str
    seen: dict[str, str] = {}
    for token in tokenizer.get_added_tokens_decoder().values():
        if token.normalized:
            other = seen.setdefault(normalize(token.content), token.content)
            if other != token.content:
                raise ModelNotSupported(
                    f"The added tokens {other!r} and {token.content!r} are one after "
                    "normalisation, and which one a text gets is left to chance: remove one."
                )


def _special_tokens(tokenizer: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and after every text."""
    if tokenizer.post_processor is None:
        return [], []
    # A word of its own making, as there is no text that every vocabulary has a token for.
    word = tokenizers.Tokenizer(models.WordLevel({"a": 0})).encode("a")
    probe = tokenizer.post_processor.process(word)
    content = [i for i, special in enumerate(probe.special_tokens_mask) if not special]
    if len(content) != 1:
        raise ModelNotSupported(
            "The tokenizer's post-processor drops or repeats texts, which is not supported."
        )
    if any(probe.type_ids):  # nowhere passed on to a model
        raise ModelNotSupported(
            "The tokenizer's post-processor gives a text other token types than 0, which is not "
            "supported."
        )
    return probe.ids[: content[0]], probe.ids[content[0] + 1 :]


def _apart(tokens: int, rows: int) -> ModelNotSupported:
    return ModelNotSupported(
        f"The tokenizer knows {tokens} tokens and the model {rows}: they don't belong together."
    )


def _text(index: int, value: Input) -> str:
    if not isinstance(value, str):
        raise _mixed(index, value)
    return value


def _token_ids(index: int, value: Input) -> list[int]:
    if isinstance(value, bytes):  # a sequence of ints, and never meant as one
        raise _mixed(index, value)
    try:
        return [operator.index(token) for token in value]  # type: ignore[arg-type]
    except TypeError:
        raise _mixed(index, value) from None


def _listed(ids: list[int]) -> str:
    return ", ".join(map(str, ids))


def _mixed(index: int, value: object) -> InvalidRequest:
    return InvalidRequest(
        f"is of the type {type(value).__name__}; inputs are all texts or all lists of token ids.",
        param="input",
        index=index,
    )


def is_panic(error: BaseException) -> bool:
    """Whether ``error`` tells of a failed assertion in Rust, which is no Exception to Python."""
    return type(error).__name__ == "PanicException"


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
