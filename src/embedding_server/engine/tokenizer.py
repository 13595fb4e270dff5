"""Text or token ids to Encodings; the one place that knows how long an input may be."""

from __future__ import annotations

import operator
import os
from collections.abc import Collection, Iterator, Sequence

import tokenizers
from tokenizers import models

from embedding_server.engine.batch import Encoding
from embedding_server.errors import ContextLengthExceeded, InvalidRequest, ModelNotSupported

__all__ = ["Input", "Tokenizer"]

_PART_CHARACTERS = 256 * 1024

Input = str | Sequence[int]
"""A text, or the model's own token ids without special tokens."""

_NO_VECTOR = "holds a token that was added to the tokenizer and that the model has no vector for."
_LONE_SURROGATE = "holds a lone surrogate, which is not valid Unicode text."


class Tokenizer:
    """A model's tokenizer with its length policy.

    An input over ``max_tokens`` keeps its first tokens and its special tokens, as
    sentence-transformers keeps them, and its Encoding says how long it was; with ``keep_end`` it
    keeps its last tokens. With ``exclude_prompt`` the Encoding also says which tokens are the
    prompt's, to be left out of pooling. ``special_ids`` are the ids of all special tokens; by
    default those that end a text.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        max_tokens: int,
        vocab_size: int | None = None,
        add_special_tokens: bool = True,
        special_ids: Collection[int] | None = None,
        exclude_prompt: bool = False,
        keep_end: bool = False,
    ) -> None:
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
        # Tokens added to the tokenizer alone do no harm unless a text holds them.
        self._knows_more = tokens > self.vocab_size
        if tokenizer.get_vocab_size(with_added_tokens=False) > self.vocab_size:
            raise ModelNotSupported(
                f"The tokenizer knows {tokens} tokens and the model {self.vocab_size}: they don't "
                "belong together."
            )
        self._prefix, self._suffix = _special_tokens(tokenizer) if add_special_tokens else ([], [])
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
        and InvalidRequest for text that is not Unicode, ids outside the vocabulary, and inputs
        that are neither.
        """
        if not _is_unicode(prompt):
            raise InvalidRequest(f"'prompt' {_LONE_SURROGATE}", param="prompt")
        if isinstance(inputs[0], str):
            sequences = self._encode_texts(inputs, prompt)
        else:
            sequences = self._encode_ids(inputs, prompt)
        excluded = self._prompt_tokens(prompt) if prompt and self._exclude_prompt else 0
        return [self._fit(index, ids, truncate, excluded) for index, ids in enumerate(sequences)]

    def _encode_texts(self, inputs: Sequence[Input], prompt: str) -> list[list[int]]:
        texts = [prompt + _text(index, text) for index, text in enumerate(inputs)]
        sequences: list[list[int]] = []
        try:
            for part in _parts(texts):
                encoded = self._tokenizer.encode_batch_fast(
                    part, add_special_tokens=self._add_special_tokens
                )
                sequences += [encoding.ids for encoding in encoded]
        except (TypeError, UnicodeEncodeError):
            bad = next((i for i, text in enumerate(texts) if not _is_unicode(text)), None)
            if bad is None:
                raise
            raise InvalidRequest(_LONE_SURROGATE, param="input", index=bad) from None
        if self._knows_more:
            for index, ids in enumerate(sequences):
                if max(ids, default=0) >= self.vocab_size:
                    raise InvalidRequest(_NO_VECTOR, param="input", index=index)
        return sequences

    def _encode_ids(self, inputs: Sequence[Input], prompt: str) -> list[list[int]]:
        start = list(self._prefix)
        if prompt:
            start += self._tokenizer.encode(prompt, add_special_tokens=False).ids
            if max(start, default=0) >= self.vocab_size:
                raise InvalidRequest(f"'prompt' {_NO_VECTOR}", param="prompt")
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
            sequences.append([*start, *ids, *self._suffix])
        return sequences

    def _prompt_tokens(self, prompt: str) -> int:
        """As sentence-transformers counts them: those of the prompt alone, but for a special
        token at its end."""
        alone = self._cut(self._encode_texts([prompt], "")[0])
        return len(alone) - (bool(alone) and alone[-1] in self._special_ids)

    def _fit(self, index: int, ids: list[int], truncate: bool, excluded: int) -> Encoding:
        total = len(ids)
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
    """Some texts at a time: an Encoding takes some hundred bytes a character while it lives."""
    part: list[str] = []
    characters = 0
    for text in texts:
        part.append(text)
        characters += len(text)
        if characters >= _PART_CHARACTERS:
            yield part
            part, characters = [], 0
    if part:
        yield part


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
    return probe.ids[: content[0]], probe.ids[content[0] + 1 :]


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


def _mixed(index: int, value: object) -> InvalidRequest:
    return InvalidRequest(
        f"is of the type {type(value).__name__}; inputs are all texts or all lists of token ids.",
        param="input",
        index=index,
    )


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
