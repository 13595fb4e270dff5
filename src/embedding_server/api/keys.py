# SPDX-License-Identifier: MIT OR Apache-2.0
"""The API keys: from the settings, and from a file that can be reloaded while serving."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from starlette.types import Scope

from embedding_server.errors import ConfigurationError, Unauthenticated

__all__ = ["ApiKeys"]

logger = logging.getLogger(__name__)

# Clients encode other characters differently, and for some of them a blank ends the key.
_KEY = re.compile(r"[\x21-\x7e]+")

_MAX_FILE_BYTES = 2**20

_HOW = "send it as 'Authorization: Bearer KEY'."


class ApiKeys:
    """Digests of the accepted keys: those in ``given``, and those in ``file``.

    The file has one key a line; blank lines and lines that begin with # are skipped. Raises
    ConfigurationError, which never contains a key, for a file that can't be read or has no key, and
    for a key that no header can carry.
    """

    def __init__(self, given: Iterable[str] = (), file: Path | None = None) -> None:
        self._given = tuple(_digest_of(key, "--api-key") for key in given)
        self._file = file
        self._digests = self._given if file is None else (*self._given, *_read(file))
        if self._digests:
            logger.info("requests need an API key (%d known)", len(self._digests))

    def __bool__(self) -> bool:
        """Whether requests need a key; a reload never changes it."""
        return bool(self._digests)

    def reload(self) -> None:
        """Read the file again; if that fails, log an error and keep the former keys."""
        if self._file is None:
            return
        try:
            self._digests = (*self._given, *_read(self._file))
        except ConfigurationError as error:
            logger.error("The API keys stay as they were: %s", error)
        else:
            logger.info("API keys are read again (%d known)", len(self._digests))

    def check(self, scope: Scope) -> None:
        """Raise Unauthenticated for a request without a valid key, if keys are needed."""
        if not self._digests:
            return
        headers = [bytes(value) for name, value in scope["headers"] if name == b"authorization"]
        if len(headers) > 1:
            raise Unauthenticated(
                f"There are {len(headers)} Authorization headers, and must be one: {_HOW}"
            )
        scheme, _, key = (headers[0] if headers else b"").partition(b" ")
        key = key.strip(b" ")
        if not key:
            raise Unauthenticated(f"The API key is missing: {_HOW}")
        digest = hashlib.sha256(key).digest()
        # Every key is compared, in constant time, so that the time reveals nothing about them.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() != b"bearer" or not any(matches):
            raise Unauthenticated(f"The API key is not valid: {_HOW}")


def _digest_of(key: str, where: str) -> bytes:
    if not _KEY.fullmatch(key):
        raise ConfigurationError(
            f"{where}: a key must be of printable ASCII characters without blanks, as clients send "
            "other characters in different ways."
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
            f"{where} holds no key: write one a line, or leave the setting out to accept everyone."
        )
    if mode & stat.S_IROTH:
        logger.warning(
            "%s can be read by everyone on this machine (mode %o): chmod o-r it", where, mode
        )
    return keys
