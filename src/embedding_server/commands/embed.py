# SPDX-License-Identifier: MIT OR Apache-2.0
"""The ``embed`` command: texts from files to vectors in files, in order and in bounded memory."""

from __future__ import annotations

import codecs
import contextlib
import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import orjson
from tqdm import tqdm

from embedding_server.commands.writers import Writer, writer_for
from embedding_server.embedder import Embedder
from embedding_server.engine.engine import Embeddings
from embedding_server.engine.parameters import EmbedParams
from embedding_server.errors import ConfigurationError, EmbeddingServerError, InvalidRequest
from embedding_server.settings import Settings

__all__ = ["BadLine", "CorpusOptions", "Line", "embed_corpus", "embedded", "the_one_model"]

logger = logging.getLogger(__name__)

_CHUNK_TEXTS = 256
_CHUNK_CHARACTERS = 256 * 1024
_JSON_LINES = (".jsonl", ".ndjson")
_CHUNKS_AHEAD = 3


@dataclass(frozen=True, slots=True)
class CorpusOptions:
    """What the command line asks, beside the settings."""

    files: Sequence[str]
    output: str = "-"
    field: str | None = None
    dimensions: int | None = None
    input_type: str | None = None
    prompt: str | None = None
    truncate: bool = True
    normalize: bool = True

    @property
    def params(self) -> EmbedParams:
        return EmbedParams(
            dimensions=self.dimensions,
            input_type=self.input_type,
            prompt=self.prompt,
            truncate=self.truncate,
            normalize=self.normalize,
        )


class BadLine(EmbeddingServerError):
    """A line that can't be read or embedded."""


@dataclass(frozen=True, slots=True)
class Line:
    """One text and where it stands: in a line from 1 on, or in a table's row from 0 on."""

    file: str
    number: int
    text: str
    unit: str = "line"

    @property
    def place(self) -> str:
        return f"{self.file}, {self.unit} {self.number}"

    def error(self, reason: str) -> BadLine:
        return BadLine(f"{self.place}: {reason}")


def embed_corpus(settings: Settings, options: CorpusOptions) -> int:
    """Embed every line of ``options.files``; returns the exit code.

    Raises BadLine, naming file and line, for one that can't be embedded; a file of output is
    then left as it was before.
    """
    model = the_one_model(settings)
    _check_readable(options.files)
    if options.field is None and any(Path(file).suffix in _JSON_LINES for file in options.files):
        logger.warning("every line is embedded as it stands; --field NAME takes it as JSON")
    open_writer = writer_for(options.output)
    with Embedder.from_settings(model, settings) as embedder:
        try:
            with open_writer(options.dimensions or embedder.info.dims) as writer:
                _embed_all(embedder, options, writer)
        except BrokenPipeError:  # the reader, as `head`, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def the_one_model(settings: Settings) -> str:
    """The --model; raises ConfigurationError if there isn't exactly one."""
    if len(settings.model) != 1:
        raise ConfigurationError("embed needs exactly one --model, as --model all-MiniLM-L6-v2.")
    return settings.model[0]


def _embed_all(embedder: Embedder, options: CorpusOptions, writer: Writer) -> None:
    total = cut = 0
    first_cut: Line | None = None
    with tqdm(unit=" texts", disable=not sys.stderr.isatty()) as progress:
        every_line = _lines(options.files, options.field)
        for lines, embeddings in embedded(embedder, every_line, options.params):
            writer.write(embeddings)
            for line, encoding in zip(lines, embeddings.encodings, strict=True):
                if encoding.truncated:
                    cut += 1
                    first_cut = first_cut or line
            total += len(lines)
            progress.update(len(lines))
    logger.info("embedded %d texts", total)
    if first_cut is not None:
        logger.warning(
            "%d of %d texts were cut to the %d tokens that %s takes, the first in %s",
            *(cut, total, embedder.info.max_tokens, embedder.info.name, first_cut.place),
        )


def embedded(
    embedder: Embedder, every_line: Iterable[Line], params: EmbedParams
) -> Iterator[tuple[list[Line], Embeddings]]:
    """Chunk by chunk, in order, reading a few chunks ahead and never further.

    What stands before a bad line is still yielded; then its BadLine is raised.
    """

    def embed(lines: list[Line]) -> Embeddings:
        return embedder.embed_detailed([line.text for line in lines], params)

    waiting: deque[tuple[list[Line], Future[Embeddings]]] = deque()
    bad_line: BadLine | None = None
    pool = ThreadPoolExecutor(_CHUNKS_AHEAD)
    try:
        for chunk in _chunks(every_line):
            if isinstance(chunk, BadLine):
                bad_line = chunk
                break
            waiting.append((chunk, pool.submit(embed, chunk)))
            if len(waiting) > _CHUNKS_AHEAD:
                yield from _finished(*waiting.popleft(), embed)
        while waiting:
            yield from _finished(*waiting.popleft(), embed)
    finally:  # after Ctrl-C nobody waits for the rest
        pool.shutdown(wait=False, cancel_futures=True)
    if bad_line is not None:
        raise bad_line


def _finished(
    lines: list[Line], future: Future[Embeddings], embed: Callable[[list[Line]], Embeddings]
) -> Iterator[tuple[list[Line], Embeddings]]:
    try:
        embeddings = future.result()
    except InvalidRequest as error:
        if error.index is None:
            raise
        if before := lines[: error.index]:
            yield before, embed(before)
        raise lines[error.index].error(error.reason) from None
    yield lines, embeddings


def _chunks(every_line: Iterable[Line]) -> Iterator[list[Line] | BadLine]:
    """Lines by the chunk; a line that can't be read is the last to come, as its error."""
    chunk: list[Line] = []
    characters = 0
    bad_line: BadLine | None = None
    try:
        for line in every_line:
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


def _lines(files: Sequence[str], field: str | None) -> Iterator[Line]:
    for file in files:
        name = "standard input" if file == "-" else file
        with contextlib.ExitStack() as stack:
            stream = sys.stdin.buffer if file == "-" else stack.enter_context(Path(file).open("rb"))
            for number, raw in enumerate(stream, start=1):
                yield _read_line(Line(name, number, ""), raw, field)


def _read_line(line: Line, raw: bytes, field: str | None) -> Line:
    if line.number == 1:
        raw = raw.removeprefix(codecs.BOM_UTF8)  # which editors on Windows write
    try:
        text = raw.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise line.error(f"not UTF-8 at byte {error.start}; convert the file first") from None
    if field is None:
        return replace(line, text=text)
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise line.error(f"not JSON ({error})") from None
    if not isinstance(value, dict) or not isinstance(value.get(field), str):
        raise line.error(f"not an object with a string under {field!r}")
    return replace(line, text=value[field])


def _check_readable(files: Sequence[str]) -> None:
    """Fail before a model is loaded, rather than at the last of many files."""
    for file in files:
        if Path(file).suffix == ".parquet":
            raise ConfigurationError(f"{file}: Parquet is read with --ray only (extra [ray]).")
        if file != "-" and (Path(file).is_dir() or not os.access(file, os.R_OK)):
            raise ConfigurationError(f"{file} is no file that exists and can be read.")
