# SPDX-License-Identifier: MIT OR Apache-2.0
"""A stand-in for the model hub on loopback: what huggingface_hub's client asks, from local folders.

As on the real hub, large files have a sha256 for an etag and lie on another host (here: port), to
which the hub redirects.
"""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

__all__ = ["MAIN_COMMIT", "HubStandIn", "Request", "answers_nothing", "takes_no_connection"]

MAIN_COMMIT = "1234567890abcdef1234567890abcdef12345678"
LARGE_FILES = (".safetensors", ".onnx", ".onnx_data", ".bin")


@dataclass(frozen=True)
class Request:
    """One request as it came; ``host`` is "hub" or "storage"."""

    host: str
    method: str
    path: str
    authorization: str | None
    range: str | None


@dataclass
class HubStandIn:
    """Repositories by name, each a folder of files that stay as they are.

    The public fields may change while it runs.
    """

    repos: dict[str, Path]
    commits: dict[str, str] = field(default_factory=lambda: {"main": MAIN_COMMIT})
    """Branch or tag -> commit; a commit is also known by itself."""
    folders: dict[str, Path] = field(default_factory=dict)
    """Commit -> the folder that a repository has there, if not its usual one."""
    token: str | None = None
    """Wanted for everything, if set."""
    gated: bool = False
    """Files are refused with 403, whatever the token; the listing is open, as on the real hub."""
    cuts: dict[str, list[int]] = field(default_factory=dict)
    """File name -> after how many bytes each next answer for it breaks off."""
    damaged: set[str] = field(default_factory=set)
    """Files of which the right number of wrong bytes is sent."""
    listed_too: list[str] = field(default_factory=list)
    """Names in the listings that are no files."""
    statuses: dict[str, int] = field(default_factory=dict)
    """Part of a path -> the status to answer it with."""
    hangs: set[str] = field(default_factory=set)
    """Parts of paths that never get an answer."""
    requests: list[Request] = field(default_factory=list)

    def __enter__(self) -> HubStandIn:
        self._closing = threading.Event()
        self._servers = [
            ThreadingHTTPServer(("127.0.0.1", 0), partial(_Answer, self, host))
            for host in ("hub", "storage")
        ]
        # By another name, as some versions of the client tell hosts apart by that alone.
        self.url, self.storage_url = (
            f"http://{name}:{server.server_address[1]}"
            for name, server in zip(("127.0.0.1", "localhost"), self._servers, strict=True)
        )
        self._threads = [
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
            for server in self._servers
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        for server, thread in zip(self._servers, self._threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()

    def asked(self, *, method: str = "GET", part: str = "") -> list[Request]:
        """The requests so far of that method whose path holds ``part``."""
        return [r for r in self.requests if r.method == method and part in r.path]


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Headers and body are two packets: by default the second waits 0.04 s for the first's receipt.
    disable_nagle_algorithm = True

    def __init__(self, hub: HubStandIn, host: str, *args: Any) -> None:
        self.hub = hub
        self.host = host
        super().__init__(*args)

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.hub.requests.append(
            Request(
                self.host,
                self.command,
                self.path,
                self.headers.get("Authorization"),
                self.headers.get("Range"),
            )
        )
        if any(part in self.path for part in self.hub.hangs):
            self.hub._closing.wait()
            self.close_connection = True
            return None
        for part, status in self.hub.statuses.items():
            if part in self.path:
                return self._error(status, "as the test wants", **{"Retry-After": "300"})
        if self.host == "storage":
            return self._stored()
        if self.hub.token is not None and (
            self.headers.get("Authorization") != f"Bearer {self.hub.token}"
        ):
            return self._error(401, "Invalid username or password.")
        path = urlsplit(self.path).path
        if path.startswith("/api/models/"):
            return self._listing(path.removeprefix("/api/models/"))
        return self._resolve(path.lstrip("/"))

    def _listing(self, path: str) -> None:
        repo = "/".join(path.split("/")[:2])
        kind, _, revision = path.removeprefix(repo).lstrip("/").partition("/")
        if (folder := self.hub.repos.get(repo)) is None:
            return self._error(404, "Repository not found", **{"X-Error-Code": "RepoNotFound"})
        if (commit := self._commit(unquote(revision) or "main")) is None:
            return self._no_revision()
        folder = self.hub.folders.get(commit, folder)
        names = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file()]
        blobs = "blobs" in parse_qs(urlsplit(self.path).query)
        if kind == "tree":
            files = [{"type": "file", **_tree_entry(folder, name)} for name in names]
            files += [
                {"type": "file", "path": n, "size": 1, "oid": "0"} for n in self.hub.listed_too
            ]
            return self._json(files)
        siblings = [
            {"rfilename": name, **(_blob_entry(folder, name) if blobs else {})} for name in names
        ]
        siblings += [{"rfilename": name} for name in self.hub.listed_too]
        return self._json({"id": repo, "modelId": repo, "sha": commit, "siblings": siblings})

    def _resolve(self, path: str) -> None:
        repo, _, rest = path.partition("/resolve/")
        revision, _, name = rest.partition("/")
        folder, commit, name = (
            self.hub.repos.get(repo),
            self._commit(unquote(revision)),
            unquote(name),
        )
        if folder is None:
            return self._error(404, "Repository not found", **{"X-Error-Code": "RepoNotFound"})
        if commit is None:
            return self._no_revision()
        if self.hub.gated:
            return self._error(403, "Accept the licence.", **{"X-Error-Code": "GatedRepo"})
        folder = self.hub.folders.get(commit, folder)
        file = folder / name
        if not file.is_file():
            return self._error(404, "Entry not found", **{"X-Error-Code": "EntryNotFound"})
        entry = _blob_entry(folder, name)
        etag = entry["lfs"]["sha256"] if "lfs" in entry else entry["blobId"]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if "lfs" in entry:
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(entry["size"])}
            headers["Location"] = f"{self.hub.storage_url}/{commit}/{repo}/{name}"
            return self._send(302, b"", headers)
        return self._send_file(file, name, headers)

    def _stored(self) -> None:
        commit, org, repo, name = unquote(self.path).lstrip("/").split("/", 3)
        folder = self.hub.folders.get(commit, self.hub.repos[f"{org}/{repo}"])
        return self._send_file(folder / name, name, {})

    def _send_file(self, file: Path, name: str, headers: dict[str, str]) -> None:
        content = file.read_bytes()
        if name in self.hub.damaged:
            content = bytes(len(content))
        status, asked = 200, self.headers.get("Range")
        if asked:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            status = 206
            headers = {
                **headers,
                "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}",
            }
            content = content[start:]
        cut = None
        if self.command == "GET" and self.hub.cuts.get(name):
            cut = self.hub.cuts[name].pop(0)
        self._send(status, content, headers, cut=cut)

    def _commit(self, revision: str) -> str | None:
        commits = self.hub.commits
        return revision if revision in commits.values() else commits.get(revision)

    def _no_revision(self) -> None:
        self._error(404, "Invalid rev id", **{"X-Error-Code": "RevisionNotFound"})

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, message: str, **headers: str) -> None:
        self._send(status, b"", {"X-Error-Message": message, **headers})

    def _send(
        self, status: int, body: bytes, headers: dict[str, str], *, cut: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.close_connection = True


@cache
def _digests(file: Path) -> tuple[int, str, str]:
    content = file.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return len(content), blob, hashlib.sha256(content).hexdigest()


def _blob_entry(folder: Path, name: str) -> dict[str, Any]:
    size, blob, sha256 = _digests(folder / name)
    entry: dict[str, Any] = {"size": size, "blobId": blob}
    if name.endswith(LARGE_FILES):
        entry["lfs"] = {"sha256": sha256, "size": size, "pointerSize": 130}
    return entry


def _tree_entry(folder: Path, name: str) -> dict[str, Any]:
    size, blob, sha256 = _digests(folder / name)
    entry: dict[str, Any] = {"path": name, "size": size, "oid": blob}
    if name.endswith(LARGE_FILES):
        entry["lfs"] = {"oid": sha256, "size": size, "pointerSize": 130}
    return entry


@contextmanager
def answers_nothing() -> Iterator[str]:
    """The address of a listener that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@contextmanager
def takes_no_connection() -> Iterator[str]:
    """The address of a listener whose queue is full, so that packets to it are dropped."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        waiting = []
        try:
            for _ in range(8):
                client = socket.socket()
                client.setblocking(False)
                client.connect_ex(listener.getsockname())
                waiting.append(client)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            for client in waiting:
                client.close()
