# SPDX-License-Identifier: MIT OR Apache-2.0
"""Embeds lines of text in order and in bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from embedding_server.corpus.lines import BadLine, Line
from embedding_server.embedder import Embedder
from embedding_server.engine.engine import Embeddings
from embedding_server.engine.parameters import EmbedParams
from embedding_server.errors import InvalidRequest

__all__ = ["EmbeddedLines", "embed_lines"]

_CHUNK_TEXTS = 256
_CHUNK_CHARACTERS = 256 * 1024
_CHUNKS_AHEAD = 3


@dataclass(frozen=True, slots=True)
class EmbeddedLines:
    """Some consecutive lines with their embeddings."""

    lines: list[Line]
    embeddings: Embeddings

    @property
    def truncated(self) -> list[Line]:
        """The lines that the model didn't take whole."""
        pairs = zip(self.lines, self.embeddings.encodings, strict=True)
        return [line for line, encoding in pairs if encoding.truncated]


def embed_lines(
    embedder: Embedder, lines: Iterable[Line], params: EmbedParams
) -> Iterator[EmbeddedLines]:
    """Embed ``lines`` chunk by chunk, in order, and read only a few chunks ahead.

    The lines before a bad one are still yielded; then its BadLine is raised.
    """

    def embed(chunk: list[Line]) -> Embeddings:
        return embedder.embed_detailed([line.text for line in chunk], params)

    def finish(chunk: list[Line], future: Future[Embeddings]) -> Iterator[EmbeddedLines]:
        try:
            embeddings = future.result()
        except InvalidRequest as error:
            if error.index is None:
                raise
            if before := chunk[: error.index]:
                yield EmbeddedLines(before, embed(before))
            raise chunk[error.index].error(error.reason) from None
        yield EmbeddedLines(chunk, embeddings)

    waiting: deque[tuple[list[Line], Future[Embeddings]]] = deque()
    bad_line: BadLine | None = None
    pool = ThreadPoolExecutor(_CHUNKS_AHEAD)
    try:
        for chunk in _chunks(lines):
            if isinstance(chunk, BadLine):
                bad_line = chunk
                break
            waiting.append((chunk, pool.submit(embed, chunk)))
            if len(waiting) > _CHUNKS_AHEAD:
                yield from finish(*waiting.popleft())
        while waiting:
            yield from finish(*waiting.popleft())
    finally:  # Ctrl-C must not wait for the chunks that were read ahead
        pool.shutdown(wait=False, cancel_futures=True)
    if bad_line is not None:
        raise bad_line


def _chunks(lines: Iterable[Line]) -> Iterator[list[Line] | BadLine]:
    """Lines in chunks; the error of a line that can't be read is the last element."""
    chunk: list[Line] = []
    characters = 0
    bad_line: BadLine | None = None
    try:
        for line in lines:
            chunk.append(line)
            characters += len(line.text)
            if len(chunk) >= _CHUNK_TEXTS or characters >= _CHUNK_CHARACTERS:
                yield chunk
                chunk, characters = [], 0
    except BadLine as error:
        bad_line = error
    if chunk:
        yield chunk
    if bad_line is not None:
        yield bad_line
