# SPDX-License-Identifier: MIT OR Apache-2.0
"""The API keys: from the settings, and from a file that can be read again while serving."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

from embedding_server.errors import ConfigurationError

__all__ = ["ApiKeys"]

logger = logging.getLogger(__name__)

# Clients encode other characters each in its own way, and a blank ends the key for some of them.
_KEY = re.compile(r"[\x21-\x7e]+")

_MAX_FILE_BYTES = 2**20

_HOW = "send it as 'Authorization: Bearer KEY'."


class ApiKeys:
    """Digests of the keys that let a request in: those of ``given``, and those in ``file``.

    The file has one key a line; blank lines and those that begin with # are none. Raises
    ConfigurationError, which tells no key, for a file that can't be read or holds none, and for a
    key that no header can carry.
    """

    def __init__(self, given: Iterable[str] = (), file: Path | None = None) -> None:
        self._given = tuple(_digest_of(key, "--api-key") for key in given)
        self._file = file
        self._digests = self._given if file is None else (*self._given, *_read(file))
        if self._digests:
            logger.info("requests need an API key (%d known)", len(self._digests))

    def __bool__(self) -> bool:
        """Whether a key is needed at all; it stays so."""
        return bool(self._digests)

    def reload(self) -> None:
        """Read the file again, and go on with the former keys, and an error in the log, if it
        can't be used."""
        if self._file is None:
            return
        try:
            self._digests = (*self._given, *_read(self._file))
        except ConfigurationError as error:
            logger.error("The API keys stay as they were: %s", error)
        else:
            logger.info("API keys are read again (%d known)", len(self._digests))

    def problem(self, headers: Sequence[bytes]) -> str | None:
        """What is wrong with a request of these Authorization ``headers``; None lets it in."""
        if len(headers) > 1:
            return f"There are {len(headers)} Authorization headers, and must be one: {_HOW}"
        scheme, _, key = (headers[0] if headers else b"").partition(b" ")
        key = key.strip(b" ")
        if not key:
            return f"The API key is missing: {_HOW}"
        digest = hashlib.sha256(key).digest()
        # All are compared, and each in the same time for every guess.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() == b"bearer" and any(matches):
            return None
        return f"The API key is not valid: {_HOW}"


def _digest_of(key: str, where: str) -> bytes:
    if not _KEY.fullmatch(key):
        raise ConfigurationError(
            f"{where}: a key must be of printable ASCII characters without blanks, as others don't "
            "reach the server the same from every client."
        )
    return hashlib.sha256(key.encode("ascii")).digest()


def _read(file: Path) -> list[bytes]:
    where = f"--api-key-file {file}"
    try:
        with file.open("rb") as stream:
            mode = stat.S_IMODE(os.fstat(stream.fileno()).st_mode)
            content = stream.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigurationError(f"{where} can't be read: {error.strerror}.") from None
    if len(content) > _MAX_FILE_BYTES:
        raise ConfigurationError(
            f"{where} is over {_MAX_FILE_BYTES} bytes: it must hold keys only."
        )
    try:
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise ConfigurationError(f"{where} is not UTF-8 text.") from None
    keys = [
        _digest_of(key, f"{where}, line {number}")
        for number, line in enumerate(lines, 1)
        if (key := line.strip()) and not key.startswith("#")
    ]
    if not keys:
        raise ConfigurationError(
            f"{where} holds no key: write one a line, or leave the setting out to let everyone in."
        )
    if mode & stat.S_IROTH:
        logger.warning(
            "%s can be read by everyone on this machine (mode %o): chmod o-r it", where, mode
        )
    return keys
