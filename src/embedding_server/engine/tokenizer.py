# SPDX-License-Identifier: MIT OR Apache-2.0
"""Texts or token ids to Encodings, cut to the length that the model takes."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Sequence

import tokenizers
from tokenizers import models

from embedding_server.engine.batch import Encoding
from embedding_server.engine.cuts import cut_pattern, pieces
from embedding_server.engine.token_ids import Input, Template, not_an_input
from embedding_server.errors import (
    ContextLengthExceeded,
    InferenceFailed,
    InvalidRequest,
    ModelNotSupported,
)

__all__ = ["Tokenizer", "is_panic"]

_PART_CHARACTERS = 64 * 1024
"""Tokenised at a time: an Encoding of tokenizers takes some 500 bytes a character."""

_MOST_CHARACTERS = 8 * _PART_CHARACTERS
"""The longest stretch without a place to cut: it is no prose, and far over any model's limit."""

# Tables of vectors are rounded up to a multiple of 64 or 128, and some have a few hundred rows in
# reserve.
_SPARE_ROWS = 1024
_SPARE_SHARE = 0.04

_NO_VECTOR = "holds a token that was added to the tokenizer and that the model has no vector for."
_LONE_SURROGATE = "holds a lone surrogate, which is not valid Unicode text."


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
        # A tokenizer.json may pad and cut by itself (all-MiniLM-L6-v2's pads to 128): packed
        # batches need no padding, and a silent cut would hide the true length.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self._add_special_tokens = add_special_tokens
        self._exclude_prompt = exclude_prompt
        self._keep_end = keep_end
        self.max_tokens = max_tokens
        tokens = tokenizer.get_vocab_size(with_added_tokens=True)
        self.vocab_size = vocab_size or tokens
        # Tokens that only the tokenizer knows do no harm unless a text holds one.
        self._knows_more = tokens > self.vocab_size
        _check_vocabulary(tokenizer, self.vocab_size)
        _check_repeatable(tokenizer)
        self._cut_pattern = cut_pattern(tokenizer)
        try:
            prefix, suffix = _special_tokens(tokenizer) if add_special_tokens else ([], [])
            # No vocabulary holds the last character of Unicode, so that one without an unknown
            # token fails now.
            tokenizer.encode_batch_fast(["a \U0010ffff"], add_special_tokens=add_special_tokens)
        except ModelNotSupported:
            raise
        except BaseException as error:  # tokenizers raises bare Exception, or panics
            if not isinstance(error, Exception) and not is_panic(error):
                raise
            raise ModelNotSupported(f"The tokenizer fails on a text: {error}.") from None
        self._template = Template(prefix, suffix, self.vocab_size, pad_id)
        self._special_ids = frozenset(suffix if special_ids is None else special_ids)
        for token in (*prefix, *suffix):
            if token >= self.vocab_size:
                raise ModelNotSupported(
                    f"The tokenizer puts the token {token} around every text, and the model knows "
                    f"{self.vocab_size}: they don't belong together."
                )
        if len(self._template) >= max_tokens:
            raise ModelNotSupported(
                f"A limit of {max_tokens} tokens leaves no room beside the model's special tokens."
            )

    def encode(
        self, inputs: Sequence[Input], *, prompt: str = "", truncate: bool = True
    ) -> list[Encoding]:
        """One Encoding for each input, in order, with ``prompt`` prepended.

        Raises ContextLengthExceeded if an input is too long and ``truncate`` is false, and
        InvalidRequest for text that is not Unicode, token ids that are out of range or have only a
        part of their special tokens, and inputs that are neither.
        """
        *_, encodings = self.encode_in_steps(inputs, prompt=prompt, truncate=truncate)
        assert not isinstance(encodings, bool)
        return encodings

    def encode_in_steps(
        self, inputs: Sequence[Input], *, prompt: str = "", truncate: bool = True
    ) -> Iterator[bool | list[Encoding]]:
        """Like ``encode``, in steps of some 0.1 s and 40 MB; yields the encodings at the end.

        Between two steps it yields whether the next is a large one, on text that has no place to
        cut: such a step takes up to eight times as much, so run only one of these at a time.
        """
        _check_prompt(prompt)
        excluded = self._prompt_tokens(prompt) if prompt and self._exclude_prompt else 0
        encodings: list[Encoding] = []

        def append(ids: list[int], total: int) -> None:
            encodings.append(self._encoding(len(encodings), ids, total, truncate, excluded))

        if len(inputs) and not isinstance(inputs[0], str):
            for ids in self._encode_ids(inputs, prompt):
                append(ids, len(ids))
            yield encodings
            return
        for part in _parts([prompt + _text(index, text) for index, text in enumerate(inputs)]):
            if encodings:
                yield False
            try:
                if len(part[0]) > _PART_CHARACTERS:  # it is alone in its part
                    append(*(yield from self._encode_long(part[0], len(encodings))))
                else:
                    for ids in self._encode_texts(part, len(encodings)):
                        append(ids, len(ids))
            except (TypeError, UnicodeEncodeError):
                for index, text in enumerate(part, start=len(encodings)):
                    if not _is_unicode(text):
                        raise InvalidRequest(_LONE_SURROGATE, param="input", index=index) from None
                raise
        yield encodings

    def _encode_texts(
        self, texts: list[str], first: int = 0, *, special_tokens: bool = True
    ) -> list[list[int]]:
        """The ids of each text; the first text is the request's input number ``first``."""
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
            for index, ids in enumerate(sequences, start=first):
                if max(ids, default=0) >= self.vocab_size:
                    raise InvalidRequest(_NO_VECTOR, param="input", index=index)
        return sequences

    def _encode_long(self, text: str, index: int) -> Generator[bool, None, tuple[list[int], int]]:
        """The ids of one text up to the limit, and how many it has in all."""
        kept: list[int] = []
        total = len(self._template)
        for number, piece in enumerate(pieces(text, self._cut_pattern, _PART_CHARACTERS)):
            if len(piece) > _MOST_CHARACTERS:
                raise InvalidRequest(
                    f"has a stretch of {len(piece)} characters without a space or another place "
                    f"to cut it at; at most {_MOST_CHARACTERS} are taken. Shorten it.",
                    param="input",
                    code="request_too_large",
                    index=index,
                )
            large = len(piece) > 2 * _PART_CHARACTERS
            if large or number > 0:
                yield large
            (ids,) = self._encode_texts([piece], index, special_tokens=False)
            total += len(ids)
            if self._keep_end:
                kept = (kept + ids)[-self.max_tokens :]
            elif len(kept) < self.max_tokens:
                kept += ids[: self.max_tokens - len(kept)]
        return [*self._template.prefix, *kept, *self._template.suffix], total

    def _encode_ids(self, inputs: Sequence[Input], prompt: str) -> list[list[int]]:
        start = list(self._template.prefix)
        if prompt:
            try:
                start += self._encode_texts([prompt], special_tokens=False)[0]
            except InvalidRequest:
                raise InvalidRequest(f"'prompt' {_NO_VECTOR}", param="prompt") from None
        return [
            [*start, *self._template.content_of(index, value), *self._template.suffix]
            for index, value in enumerate(inputs)
        ]

    def _prompt_tokens(self, prompt: str) -> int:
        """How many tokens sentence-transformers counts as the prompt's: all that it has alone,
        but for a special token at its end."""
        alone = self._cut(self._encode_texts([prompt])[0])
        return len(alone) - (bool(alone) and alone[-1] in self._special_ids)

    def _encoding(
        self, index: int, ids: list[int], total: int, truncate: bool, excluded: int
    ) -> Encoding:
        if not total and self._add_special_tokens:
            # A static model answers with zeros; a transformer needs at least one token.
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
        prefix, suffix = self._template.prefix, self._template.suffix
        content = ids[len(prefix) : len(ids) - len(suffix)]
        room = self.max_tokens - len(self._template)
        return [*prefix, *(content[-room:] if self._keep_end else content[:room]), *suffix]


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
    if part:
        yield part


def _check_prompt(prompt: str) -> None:
    if not _is_unicode(prompt):
        raise InvalidRequest(f"'prompt' {_LONE_SURROGATE}", param="prompt")
    if len(prompt) > _PART_CHARACTERS:
        raise InvalidRequest(
            f"'prompt' has {len(prompt)} characters; at most {_PART_CHARACTERS} are taken.",
            param="prompt",
            code="request_too_large",
        )


def _text(index: int, value: Input) -> str:
    if not isinstance(value, str):
        raise not_an_input(index, value)
    return value


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_panic(error: BaseException) -> bool:
    """Whether ``error`` is a panic of Rust code, which is no Exception in Python."""
    # PyO3 makes the class at run time; no module exports it.
    return type(error).__name__ == "PanicException"


# --------------------------------------------------------------------- what makes a model unfit


def _check_vocabulary(tokenizer: tokenizers.Tokenizer, rows: int) -> None:
    """Raise ModelNotSupported if the model, of ``rows`` vectors, has another tokenizer."""
    tokens = tokenizer.get_vocab_size(with_added_tokens=True)
    ids = tokenizer.get_vocab(with_added_tokens=False).values()
    spare = rows - tokens
    if max(ids, default=0) >= rows or (spare > _SPARE_ROWS and spare > _SPARE_SHARE * rows):
        raise ModelNotSupported(
            f"The tokenizer knows {tokens} tokens and the model {rows}: they don't belong together."
        )


def _check_repeatable(tokenizer: tokenizers.Tokenizer) -> None:
    """Raise ModelNotSupported if the ids of a text can differ from one load to the next."""
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
    """The ids before and after every text; raises ModelNotSupported if they are not fixed."""
    if tokenizer.post_processor is None:
        return [], []
    # A word of another vocabulary, as no text has one token in all of them.
    word = tokenizers.Tokenizer(models.WordLevel({"a": 0})).encode("a")
    probe = tokenizer.post_processor.process(word)
    content = [i for i, special in enumerate(probe.special_tokens_mask) if not special]
    if len(content) != 1:
        raise ModelNotSupported(
            "The tokenizer's post-processor drops or repeats texts, which is not supported."
        )
    if any(probe.type_ids):  # no backend passes them to a model
        raise ModelNotSupported(
            "The tokenizer's post-processor gives a text other token types than 0, which is not "
            "supported."
        )
    return probe.ids[: content[0]], probe.ids[content[0] + 1 :]
