# SPDX-License-Identifier: MIT OR Apache-2.0
"""Token ids that a client sends: checked, and put between a model's special tokens."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

from embedding_server.errors import InvalidRequest

__all__ = ["Input", "Template", "not_an_input"]

Input = str | Sequence[int]
"""A text, or the model's own token ids, with the special tokens of its template or without."""


@dataclass(frozen=True, slots=True)
class Template:
    """The special tokens before and after every text, and the range of the ids between them."""

    prefix: list[int]
    suffix: list[int]
    vocab_size: int
    pad_id: int | None

    def __len__(self) -> int:
        """How many special tokens it adds."""
        return len(self.prefix) + len(self.suffix)

    def content_of(self, index: int, value: Input) -> list[int]:
        """The ids in ``value``, the request's input ``index``, without special tokens.

        Raises InvalidRequest for ids that are out of range or padded, or that have only a part of
        the special tokens.
        """
        ids = _integers(index, value)
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise _invalid(
                    f"is a list of token ids and holds {token}, but this model's go from 0 to "
                    f"{self.vocab_size - 1}: another model's tokenizer made them. Send text "
                    "instead; in LangChain's OpenAIEmbeddings set "
                    "check_embedding_ctx_length=False.",
                    index,
                )
        if self.pad_id not in (*self.prefix, *self.suffix):
            self._refuse_padding(index, ids)
        content = self._between_special_tokens(index, ids)
        self._refuse_padding(index, content)
        return content

    def _between_special_tokens(self, index: int, ids: list[int]) -> list[int]:
        first, last = len(self.prefix), len(ids) - len(self.suffix)
        begins = first > 0 and ids[:first] == self.prefix
        ends = last < len(ids) and ids[max(last, 0) :] == self.suffix
        if not begins and not ends:
            return ids
        if (first > 0 and not begins) or (last < len(ids) and not ends) or first > last:
            raise _invalid(
                "is a list of token ids that has only a part of the model's special tokens: send "
                f"all of them ({_listed(self.prefix)} first, {_listed(self.suffix)} last) or "
                "none, and the server adds them.",
                index,
            )
        return ids[first:last]

    def _refuse_padding(self, index: int, ids: list[int]) -> None:
        # A client has padded them to the longest of several: padding would count as text.
        if self.pad_id is not None and self.pad_id in (ids[:1] + ids[-1:]):
            raise _invalid(
                f"is a list of token ids with padding ({self.pad_id}): send them without.", index
            )


def not_an_input(index: int, value: object) -> InvalidRequest:
    """The error for an input that is neither a text nor token ids, or not what the others are."""
    kind = type(value).__name__
    return _invalid(
        f"is of the type {kind}; inputs are all texts or all lists of token ids.", index
    )


def _invalid(message: str, index: int) -> InvalidRequest:
    return InvalidRequest(message, param="input", index=index)


def _integers(index: int, value: Input) -> list[int]:
    if isinstance(value, bytes):  # a sequence of integers, but never meant as token ids
        raise not_an_input(index, value)
    try:
        return [operator.index(token) for token in value]  # type: ignore[arg-type]
    except TypeError:
        raise not_an_input(index, value) from None


def _listed(ids: list[int]) -> str:
    return ", ".join(map(str, ids))
