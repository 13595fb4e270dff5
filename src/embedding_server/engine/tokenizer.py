"""Text or token ids to Encodings; the one place that knows how long an input may be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import tokenizers
from tokenizers import normalizers

from embedding_server.engine.batch import Encoding
from embedding_server.errors import ContextLengthExceeded, InvalidRequest, ModelNotSupported

__all__ = ["Input", "Tokenizer"]

Input = str | Sequence[int]
"""A text, or the model's own token ids without special tokens."""


class Tokenizer:
    """A model's tokenizer with its length policy.

    An input over ``max_tokens`` keeps its first tokens and its special tokens, as
    sentence-transformers keeps them, and its Encoding says how long it was.
    """

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, *, max_tokens: int, vocab_size: int | None = None
    ) -> None:
        # A tokenizer.json may pad and cut by itself (all-MiniLM-L6-v2's pads to 128):
        # packed batches need no padding, and a silent cut would hide the true length.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.vocab_size = vocab_size or tokenizer.get_vocab_size(with_added_tokens=True)
        self._prefix, self._suffix = _special_tokens(tokenizer)
        if len(self._prefix) + len(self._suffix) >= max_tokens:
            raise ModelNotSupported(
                f"A limit of {max_tokens} tokens leaves no room beside the model's special tokens."
            )

    @classmethod
    def from_file(
        cls,
        path: Path,
        *,
        max_tokens: int,
        vocab_size: int | None = None,
        lowercase: bool = False,
    ) -> Self:
        """Read a ``tokenizer.json``; raises ModelNotSupported if it can't be read."""
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise ModelNotSupported(f"{path} can't be read as a tokenizer: {error}") from None
        if lowercase:
            own = [tokenizer.normalizer] if tokenizer.normalizer else []
            tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])
        return cls(tokenizer, max_tokens=max_tokens, vocab_size=vocab_size)

    def encode(
        self, inputs: Sequence[Input], *, prompt: str = "", truncate: bool = True
    ) -> list[Encoding]:
        """One Encoding for each input, in order, with ``prompt`` prepended.

        Raises ContextLengthExceeded if an input is too long and ``truncate`` is false,
        and InvalidRequest for text that is not Unicode or ids outside the vocabulary.
        """
        if isinstance(inputs[0], str):
            sequences = self._encode_texts([prompt + str(text) for text in inputs])
        else:
            sequences = self._encode_ids(inputs, prompt)
        return [self._fit(index, ids, truncate) for index, ids in enumerate(sequences)]

    def _encode_texts(self, texts: list[str]) -> list[list[int]]:
        try:
            encoded = self._tokenizer.encode_batch_fast(texts)
        except (TypeError, UnicodeEncodeError):
            bad = next((i for i, text in enumerate(texts) if not _is_unicode(text)), None)
            if bad is None:
                raise
            raise InvalidRequest(
                "holds a lone surrogate, which is not valid Unicode text.",
                param="input",
                index=bad,
            ) from None
        return [encoding.ids for encoding in encoded]

    def _encode_ids(self, inputs: Sequence[Input], prompt: str) -> list[list[int]]:
        start = list(self._prefix)
        if prompt:
            start += self._tokenizer.encode(prompt, add_special_tokens=False).ids
        for index, ids in enumerate(inputs):
            for token in ids:
                if not 0 <= int(token) < self.vocab_size:
                    raise InvalidRequest(
                        f"is a list of token ids and holds {token}, but this model's go from 0 to "
                        f"{self.vocab_size - 1}: another model's tokenizer made them. Send text "
                        "instead; in LangChain's OpenAIEmbeddings set "
                        "check_embedding_ctx_length=False.",
                        param="input",
                        index=index,
                    )
        return [[*start, *(int(token) for token in ids), *self._suffix] for ids in inputs]

    def _fit(self, index: int, ids: list[int], truncate: bool) -> Encoding:
        total = len(ids)
        if total <= self.max_tokens:
            return Encoding(ids, total)
        if not truncate:
            raise ContextLengthExceeded(
                f"has {total} tokens, but this model takes at most "
                f'{self.max_tokens}. Shorten it, or leave out "truncate": false to have it cut.',
                param="input",
                index=index,
            )
        kept = ids[: self.max_tokens - len(self._suffix)]
        return Encoding([*kept, *self._suffix], total)


def _special_tokens(tokenizer: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and after every text."""
    probe = tokenizer.encode("a", add_special_tokens=True)
    content = [i for i, special in enumerate(probe.special_tokens_mask) if not special]
    if not content:
        raise ModelNotSupported("The tokenizer makes no token of the letter 'a'.")
    return probe.ids[: content[0]], probe.ids[content[-1] + 1 :]


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
