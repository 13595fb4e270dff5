# SPDX-License-Identifier: MIT OR Apache-2.0
"""The server on Ray Serve: replicas with the models, and an ingress that none of them can fail.

Ray's HTTP proxy answers 500 for what a dying replica had in hand. So between them stands an
ingress without a model: it reads the request, hands it to a replica, whole, and on to another one
if that dies. All that this server does may be repeated.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ray import exceptions, get_runtime_context, serve
from ray.serve import exceptions as serve_exceptions
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from embedding_server.api.body import Bodies, Body, body_too_slow
from embedding_server.api.cors import Cors
from embedding_server.api.embeddings import DIRECT
from embedding_server.api.errors import error_answer
from embedding_server.api.keys import ApiKeys
from embedding_server.api.lifetime import DEADLINE_HEADER, deadline_exceeded, seconds_given
from embedding_server.api.middleware import RequestMiddleware
from embedding_server.api.record import record_of
from embedding_server.api.routes import prefix_of, route_of
from embedding_server.app import create_app
from embedding_server.errors import EmbeddingServerError, NotReady, Overloaded
from embedding_server.logs import set_up_logging
from embedding_server.models.choice import specs_of
from embedding_server.ray.metrics import Metrics, reporting
from embedding_server.ray.options import options_of
from embedding_server.ray.scaling import QUEUED_TOKENS, QueuedTokens
from embedding_server.settings import Settings
from embedding_server.telemetry import Telemetry

__all__ = ["Answer", "Forwarded", "Ingress", "Models", "application", "ask_replicas"]

logger = logging.getLogger(__name__)

# A replica, its process or its machine has gone with the request, or with its answer.
_GONE = (
    exceptions.RayActorError,
    exceptions.WorkerCrashedError,
    exceptions.NodeDiedError,
    exceptions.ObjectLostError,
    exceptions.TaskCancelledError,  # by Ray: what we cancel ourselves we wait for no longer
    serve_exceptions.ReplicaUnavailableError,
)

# Seconds before each further try. Bounded, as the request itself may be what kills them.
_PAUSES = (0.05, 0.2, 1.0)

# An orchestrator's probe, a scrape, and a person should know soon that no replica is there.
_HEALTH_SECONDS = 3.0

# Past a client's deadline, in which a replica says that it is over.
_GRACE_SECONDS = 0.5

# Ray ends a replica by force this long after --drain-timeout.
_END_SECONDS = 5.0

# Past what the engines admit, by which they can say so themselves; metadata comes on top.
_ROOM = 256


@dataclass(frozen=True, slots=True)
class Forwarded:
    """One request on its way from the ingress to a replica."""

    method: str
    path: str
    query: bytes
    scheme: str
    client: tuple[str, int] | None
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


@dataclass(frozen=True, slots=True)
class Answer:
    """What a replica answers."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


class Models:
    """A replica: the application of the plain server, which gets its requests from the ingress.

    Ray sends it none before its models are loaded.
    """

    async def __init__(self, settings: Settings, metrics: Any) -> None:  # type: ignore[misc]
        set_up_logging(settings.log_format, settings.log_level)
        # As the command line does: a replica has its process to itself.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._end = contextlib.AsyncExitStack()
        loaded: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._app = create_app(
            settings,
            on_loaded=lambda: loaded.set_result(None),
            on_load_error=loaded.set_exception,
        )
        self._telemetry = self._app.state.telemetry
        await self._end.enter_async_context(self._app.router.lifespan_context(self._app))
        try:
            await loaded
        except BaseException:
            await self._end.aclose()
            raise
        self._telemetry.ready.set(1)
        await self._end.enter_async_context(reporting(self._telemetry, _name_of_this(), metrics))

    async def __del__(self) -> None:  # Ray awaits it when the replica has drained
        await self._end.aclose()

    async def check_health(self) -> None:
        """Ray replaces the replica when this raises."""
        registry = self._app.state.registry
        self._telemetry.ready.set(registry.ready)
        if not registry.ready:
            raise NotReady(f"The models are {registry.status()}.")

    async def record_autoscaling_stats(self) -> Mapping[str, float]:
        """What ``QueuedTokens`` decides by."""
        return {QUEUED_TOKENS: self._telemetry.queued_tokens}

    async def answer(self, request: Forwarded) -> Answer:
        """What the application answers; a cancelled call is to it a client that has hung up."""
        hung_up = asyncio.Event()
        work = asyncio.ensure_future(_ask(self._app, request, hung_up))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            hung_up.set()
            await asyncio.gather(work, return_exceptions=True)
            raise


class Ingress:
    """Takes requests from Ray's proxy and gives them to replicas, again if need be."""

    async def __init__(self, settings: Settings, models: Any, metrics: Any) -> None:  # type: ignore[misc]
        set_up_logging(settings.log_format, settings.log_level)
        self._models = models
        self._metrics = metrics
        self._prefix = prefix_of(settings.root_path)
        self._keys = ApiKeys(
            (k.get_secret_value() for k in settings.api_key), settings.api_key_file
        )
        self._bodies = Bodies(settings)
        self._body_seconds = settings.body_timeout
        self._origins = settings.cors_origin
        self._telemetry = Telemetry()  # of what no replica has seen
        self._end = contextlib.AsyncExitStack()
        await self._end.enter_async_context(reporting(self._telemetry, _name_of_this(), metrics))

    async def __del__(self) -> None:
        await self._end.aclose()

    async def __call__(self, request: Request) -> Response:
        """The answer of a replica, or our own if there is none to be had."""
        path = request.scope["path"].removeprefix(self._prefix)
        try:
            if (request.method, path) in _WITH_A_BODY:
                self._keys.check(request.scope)  # before anyone waits for its body
                return _response(await self._within_deadline(request))
            soon = path.startswith("/health") or path == "/metrics"
            async with asyncio.timeout(_HEALTH_SECONDS if soon else None):
                answer = await ask_replicas(self._models, _forwarded(request))
                if path == "/metrics" and answer.status == 200:
                    answer = replace(answer, body=await self._metrics.exposition.remote())
            return _response(answer)
        except TimeoutError:
            return self._told(NotReady("Not ready: no replica answers."), path)
        except Exception as error:  # which is told in the shape of all errors
            return self._told(error, path)

    async def _within_deadline(self, request: Request) -> Answer:
        """A replica minds the client's deadline; this is for when none is there."""
        seconds = seconds_given(request)
        if seconds is None:
            return await self._with_body(request, None)
        until = asyncio.get_running_loop().time() + seconds
        try:
            async with asyncio.timeout_at(until + _GRACE_SECONDS):
                return await self._with_body(request, until)
        except TimeoutError:
            raise deadline_exceeded(seconds) from None

    async def _with_body(self, request: Request, until: float | None) -> Answer:
        with Body(self._bodies) as body:
            try:
                async with asyncio.timeout(self._body_seconds):
                    content = await body.read(request)
            except TimeoutError:
                raise body_too_slow(self._body_seconds) from None
            forwarded = _forwarded(request, content)
            return await ask_replicas(self._models, forwarded, until)

    def _told(self, error: Exception, path: str) -> Response:
        return _Told(error, route_of(path), self._telemetry, self._origins)


async def ask_replicas(models: Any, request: Forwarded, until: float | None = None) -> Answer:
    """The answer of one of ``models``, by their handle; of another if that dies meanwhile.

    ``until`` is the client's deadline, in the event loop's time. Raises NotReady if too many die,
    and Overloaded if none has room.
    """
    for pause in (*_PAUSES, None):
        response = models.answer.remote(request)
        try:
            answer: Answer = await response
            return answer
        except asyncio.CancelledError:
            response.cancel()
            raise
        except _GONE as error:
            logger.warning("a replica has gone with a request: %s", error)
        except serve_exceptions.BackPressureError:
            raise Overloaded(
                "No replica has room for this request. Try again later.", retry_after=1.0
            ) from None
        except serve_exceptions.DeploymentUnavailableError:
            raise NotReady(
                "No replica could be started with these models; their logs say why."
            ) from None
        if pause is not None:
            await asyncio.sleep(pause)
        if until is not None:
            request = _with_time_left(request, until - asyncio.get_running_loop().time())
    raise NotReady(f"{len(_PAUSES) + 1} replicas in a row have ended with this request in hand.")


class _Told(Response):
    """An answer that no replica gave, with all that every answer has: id, log line, metrics."""

    def __init__(
        self, error: Exception, route: str, telemetry: Telemetry, origins: Sequence[str]
    ) -> None:
        super().__init__()
        self._origins = origins
        self._error = error
        self._route = route
        self._telemetry = telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def tell(scope: Scope, receive: Receive, send: Send) -> None:
            record_of(scope).route = self._route
            if not isinstance(self._error, EmbeddingServerError):
                raise self._error
            await error_answer(self._error)(scope, receive, send)

        async def send_without_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [pair for pair in message["headers"] if pair[0] != _ID]
            await send(message)

        front = Cors(tell, origins=self._origins) if self._origins else tell
        await RequestMiddleware(front, telemetry=self._telemetry)(scope, receive, send_without_id)


# Ray's proxy gives every request an id that has none, and puts it on every answer.
_ID = b"x-request-id"

_WITH_A_BODY = {*DIRECT, *(("GET", path) for _, path in DIRECT)}


def application(arguments: Mapping[str, Any]) -> Any:
    """See ``embedding_server.ray.app``."""
    options, settings = options_of(arguments)
    prefix_of(settings.root_path)  # what is wrong here is wrong on every replica
    at_a_time = len(specs_of(settings)) * settings.max_concurrent_requests + _ROOM
    scaling = AutoscalingConfig(
        min_replicas=options.min_replicas,
        max_replicas=options.max_replicas,
        upscale_delay_s=options.upscale_delay_s,
        downscale_delay_s=options.downscale_delay_s,
        look_back_period_s=options.look_back_period_s,
        # Ray's own is 10 s, which a shorter look back would miss.
        metrics_interval_s=min(10.0, options.look_back_period_s / 2),
        policy=AutoscalingPolicy(
            policy_function=QueuedTokens,
            policy_kwargs={"target": options.target_queued_tokens},
        ),
    )
    quiet = {"enable_access_log": False}  # there is a line of ours for each request
    metrics = serve.deployment(
        Metrics, name="metrics", ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=10_000, logging_config=quiet,
    ).bind()  # fmt: skip
    models = serve.deployment(
        Models,
        name="models",
        autoscaling_config=scaling,
        ray_actor_options={"num_cpus": options.num_cpus, "num_gpus": options.num_gpus},
        max_ongoing_requests=at_a_time,
        max_queued_requests=at_a_time,
        graceful_shutdown_timeout_s=settings.drain_timeout + _END_SECONDS,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=5.0,
        logging_config=quiet,
    ).bind(settings, metrics)
    return serve.deployment(
        Ingress,
        name="ingress",
        num_replicas=options.ingress_replicas,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=at_a_time * options.max_replicas,
        graceful_shutdown_timeout_s=settings.drain_timeout + _END_SECONDS,
        graceful_shutdown_wait_loop_s=0.5,
        logging_config=quiet,
    ).bind(settings, models, metrics)


async def _ask(
    app: Callable[[Scope, Receive, Send], Awaitable[None]],
    request: Forwarded,
    hung_up: asyncio.Event,
) -> Answer:
    """Call ``app`` as an ASGI server would."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": request.scheme,
        "path": request.path,
        "raw_path": request.path.encode(),
        "query_string": request.query,
        "root_path": "",
        "headers": list(request.headers),
        "client": request.client,
        "server": None,
    }
    status = 499  # of a client that has gone before
    headers: tuple[tuple[bytes, bytes], ...] = ()
    body = bytearray()
    given = False

    async def receive() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": request.body, "more_body": False}
        await hung_up.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        nonlocal status, headers
        if message["type"] == "http.response.start":
            status = message["status"]
            headers = tuple((bytes(name), bytes(value)) for name, value in message["headers"])
        else:
            body.extend(message.get("body", b""))

    await app(scope, receive, send)
    return Answer(status, headers, bytes(body))


def _forwarded(request: Request, body: bytes = b"") -> Forwarded:
    scope = request.scope
    return Forwarded(
        method=scope["method"],
        path=scope["path"],
        query=scope["query_string"],
        scheme=scope["scheme"],
        client=tuple(scope["client"]) if scope.get("client") else None,
        headers=tuple((bytes(name), bytes(value)) for name, value in scope["headers"]),
        body=body,
    )


def _with_time_left(request: Forwarded, seconds: float) -> Forwarded:
    others = [pair for pair in request.headers if pair[0] != DEADLINE_HEADER]
    left = (DEADLINE_HEADER, b"%.3f" % max(seconds, 0.001))
    return replace(request, headers=(*others, left))


def _response(answer: Answer) -> Response:
    response = Response(answer.body, answer.status)
    own = (_ID, b"content-length")
    kept = [pair for pair in answer.headers if pair[0] not in own]
    response.raw_headers = [*kept, (b"content-length", b"%d" % len(answer.body))]
    return response


def _name_of_this() -> str:
    """Of this process, as no other of the cluster has it."""
    return str(get_runtime_context().get_actor_id())
