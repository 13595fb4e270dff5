# SPDX-License-Identifier: MIT OR Apache-2.0
"""TLS with files that can be read again while connections go on."""

from __future__ import annotations

import re
import ssl
from pathlib import Path
from typing import Any

from embedding_server.errors import ConfigurationError

__all__ = ["ReloadableContext"]


class ReloadableContext(ssl.SSLContext):
    """Uses the files that were loaded last for each new connection.

    ``certificate``, ``key`` and ``client_authorities`` are PEM files; the key may be in the
    certificate's file. With ``client_authorities`` a client must show a certificate signed by one
    of them. ``protocols`` are the ALPN names to offer (RFC 7301), best first. Raises
    ConfigurationError for files that can't be used.
    """

    def __new__(cls, *args: object, **kwargs: object) -> ReloadableContext:
        return super().__new__(cls, ssl.PROTOCOL_TLS_SERVER)

    def __init__(
        self,
        certificate: Path,
        key: Path | None,
        client_authorities: Path | None,
        *,
        protocols: list[str],
    ) -> None:
        self._certificate = certificate
        self._key = key
        self._client_authorities = client_authorities
        self._protocols = protocols
        self.reload()

    def reload(self) -> None:
        """Read the files again; raises ConfigurationError, and then the old ones stay in use."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(self._protocols)
        _check_readable("--tls-cert", self._certificate)
        if self._key is not None:
            _check_readable("--tls-key", self._key)
        try:
            context.load_cert_chain(self._certificate, self._key, password=_no_password)
        except ssl.SSLError as error:
            files = " and ".join(str(file) for file in (self._certificate, self._key) if file)
            raise ConfigurationError(
                f"--tls-cert and --tls-key: {files} can't be used as a certificate and its key in "
                f"PEM format ({_reason(error)})."
            ) from None
        if self._client_authorities is not None:
            _check_readable("--tls-client-ca", self._client_authorities)
            try:
                context.load_verify_locations(self._client_authorities)
            except ssl.SSLError as error:
                raise ConfigurationError(
                    f"--tls-client-ca: {self._client_authorities} holds no certificates in PEM "
                    f"format ({_reason(error)})."
                ) from None
            context.verify_mode = ssl.CERT_REQUIRED
        self._current = context

    def wrap_bio(self, *args: Any, **kwargs: Any) -> ssl.SSLObject:
        return self._current.wrap_bio(*args, **kwargs)


def _check_readable(flag: str, file: Path) -> None:
    try:
        file.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{flag}: can't read {file}: {error.strerror}.") from None


def _no_password() -> str:
    raise ConfigurationError(
        "--tls-key is encrypted, and there is no way to enter its password: decrypt it, "
        "and let only this server read it."
    )


def _reason(error: ssl.SSLError) -> str:
    reason = error.reason or re.sub(r"^\[.*?\] | \(.*\)$", "", str(error))
    return reason.lower().replace("_", " ")
