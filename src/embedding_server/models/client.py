# SPDX-License-Identifier: MIT OR Apache-2.0
"""huggingface_hub's client held to limits, and its errors as a reason and a remedy.

huggingface_hub is imported on use: it takes 0.4 s.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from embedding_server.models.spec import ModelSpec

__all__ = ["DownloadFailed", "bounded_client", "explained", "first_answer"]

_T = TypeVar("_T")

_CONNECT_SECONDS = 3.0
_FIRST_ANSWER_SECONDS = 8.0
"""For the whole first exchange: neither name resolution nor a list of addresses has a limit."""
_STALL_SECONDS = 10.0
_TRIES = 3


class DownloadFailed(Exception):
    """Why the hub gave nothing, and what else than the usual advice would help."""

    def __init__(self, reason: str, fix: str | None = None, *, unreachable: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.fix = fix
        self.unreachable = unreachable


def first_answer(call: Callable[[], _T]) -> _T:
    """``call()`` in a thread, as the client's own limits leave out the resolving of names.

    Raises DownloadFailed if nothing answers, and what ``call`` raises.
    """
    future: Future[_T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="first-answer", daemon=True).start()
    try:
        return future.result(_FIRST_ANSWER_SECONDS)
    except TimeoutError:
        raise DownloadFailed(
            f"the hub gave no answer within {_FIRST_ANSWER_SECONDS:.0f} s", unreachable=True
        ) from None
    except Exception as error:
        # huggingface_hub's errors are httpx's too, but carry the hub's answer.
        if type(error).__module__.startswith("httpx"):
            told = f"the hub can't be reached ({_first_line(error)})"
            raise DownloadFailed(told, unreachable=True) from error
        raise


@contextmanager
def bounded_client() -> Iterator[None]:
    """Limit what huggingface_hub's client may do, and log, for the time being.

    By itself it waits without end for the listing of a repository and tries five times more.
    """
    from huggingface_hub import constants, set_client_factory
    from huggingface_hub.utils import _http

    patience = max(_STALL_SECONDS, constants.HF_HUB_DOWNLOAD_TIMEOUT)
    tries: Counter[tuple[str, str, str | None]] = Counter()

    def key(request: Any) -> tuple[str, str, str | None]:
        # A resumed download asks for another range, so only vain tries are counted.
        return request.method, str(request.url), request.headers.get("range")

    def before(request: Any) -> None:
        tries[key(request)] += 1
        if tries[key(request)] > _TRIES:
            raise DownloadFailed(f"the hub failed {_TRIES} times in a row")
        limits = request.extensions.setdefault("timeout", {})
        read = min(limits.get("read") or patience, patience)
        limits.update(connect=_CONNECT_SECONDS, read=read, write=patience, pool=patience)

    def after(response: Any) -> None:
        status = response.status_code
        if status == 429:
            raise DownloadFailed(
                "the hub takes no more requests from here for now (429)",
                "try again in some minutes, or set HF_TOKEN or --hf-token for a higher limit",
            )
        if status >= 500:
            response.headers.pop("retry-after", None)  # it would be slept for: minutes, it may be
            if tries[key(response.request)] >= _TRIES:
                raise DownloadFailed(f"the hub failed {_TRIES} times in a row ({status})")

    made = _http._GLOBAL_CLIENT_FACTORY  # the user's own, it may be: there is no getter

    def factory() -> Any:
        client = made()
        client.event_hooks["request"].append(before)
        client.event_hooks["response"].append(after)
        return client

    changes = {
        # Xet has a client of its own with other hosts and patience: plain HTTP is what we bound.
        "HF_HUB_DISABLE_XET": True,
        # The hub would be asked for one list more, to be told more of this process.
        "HF_HUB_DISABLE_TELEMETRY": True,
        # What is in a chunk that a cut leaves unfinished has to be fetched again.
        "DOWNLOAD_CHUNK_SIZE": 2**20,
    }
    with ExitStack() as restore:
        for name, value in changes.items():
            restore.callback(setattr, constants, name, getattr(constants, name))
            setattr(constants, name, value)
        for logger in map(logging.getLogger, ("huggingface_hub", "httpx", "httpx2")):
            restore.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        restore.callback(set_client_factory, made)
        set_client_factory(factory)
        yield


def explained(error: Exception, spec: ModelSpec, cache: Path) -> DownloadFailed:
    """Any failure of a download as a reason and a remedy."""
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RevisionNotFoundError,
    )

    cause: BaseException = error
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        cause = error.__cause__  # "not in the cache either", and so it says nothing of its own
    if isinstance(cause, DownloadFailed):
        return cause
    status = getattr(getattr(cause, "response", None), "status_code", None)
    grant = "set HF_TOKEN or --hf-token to a token that may read it"
    if isinstance(cause, GatedRepoError) or status == 403:
        return DownloadFailed(
            f"the hub keeps {spec.repo} behind a licence or other permission ({status})",
            f"accept the licence on the hub's page of {spec.repo} and {grant}",
        )
    if isinstance(cause, RevisionNotFoundError):
        return DownloadFailed(
            f"the hub's repository {spec.repo} has no revision {spec.revision or 'main'}",
            "give a branch, a tag or a commit that it has",
        )
    if status in (401, 404):
        return DownloadFailed(
            f"the hub shows no repository {spec.repo} to this user ({status})",
            f"check the name, or, if it is private, {grant}",
        )
    if status is not None:
        return DownloadFailed(f"the hub answered with an error ({status})")
    if isinstance(cause, OSError) and cause.errno is not None:
        return DownloadFailed(
            f"the download could not be written to {cause.filename or cache} ({cause.strerror})",
            "make room or give access there, or set HF_HOME to another folder",
        )
    return DownloadFailed(f"the download from the hub failed ({_first_line(cause)})")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
