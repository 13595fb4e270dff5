# SPDX-License-Identifier: MIT OR Apache-2.0
"""Embeds files of text into a file of vectors, in this process."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from tqdm import tqdm

from embedding_server.corpus.embedding import embed_lines
from embedding_server.corpus.lines import Line, check_readable, read_lines
from embedding_server.corpus.options import CorpusOptions
from embedding_server.corpus.writers import Writer, check_output, open_writer
from embedding_server.embedder import Embedder
from embedding_server.settings import Settings

__all__ = ["embed_files"]

logger = logging.getLogger(__name__)

_JSON_LINES = (".jsonl", ".ndjson")


def embed_files(settings: Settings, options: CorpusOptions) -> int:
    """Embed every text of ``options.files`` with the one model of ``settings``; returns 0.

    Raises BadLine, naming file and line, for a text that can't be embedded; the output file is
    then unchanged.
    """
    check_readable(options.files)
    if options.field is None and any(Path(file).suffix in _JSON_LINES for file in options.files):
        logger.warning("each line is embedded as it is; --field NAME reads the lines as JSON")
    check_output(options.output)
    with Embedder.from_settings(settings.model[0], settings) as embedder:
        dims = options.params.dimensions or embedder.info.dims
        try:
            with open_writer(options.output, dims) as writer:
                _embed_all(embedder, options, writer)
        except BrokenPipeError:  # the reader, as `head`, needs no more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _embed_all(embedder: Embedder, options: CorpusOptions, writer: Writer) -> None:
    total = 0
    truncated = 0
    first: Line | None = None
    with tqdm(unit=" texts", disable=not sys.stderr.isatty()) as progress:
        lines = read_lines(options.files, options.field)
        for chunk in embed_lines(embedder, lines, options.params):
            writer.write(chunk.embeddings)
            truncated += len(chunk.truncated)
            first = first or next(iter(chunk.truncated), None)
            total += len(chunk.lines)
            progress.update(len(chunk.lines))
    logger.info("embedded %d texts", total)
    if first is not None:
        logger.warning(
            "%d of %d texts were cut to the %d tokens that %s takes, the first in %s",
            *(truncated, total, embedder.info.max_tokens, embedder.info.name, first.place),
        )
