# SPDX-License-Identifier: MIT OR Apache-2.0
"""The server on Ray Serve: replicas with the models, and an ingress that sends requests to them.

Ray's HTTP proxy answers 500 to the requests of a replica that dies. The ingress stands between
them, without a model: it reads a request whole, and sends it to another replica if one dies.
Every request may be repeated.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ray import exceptions, get_runtime_context, serve
from ray.serve import exceptions as serve_exceptions
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from embedding_server.api.body import Bodies, Body
from embedding_server.api.cors import Cors
from embedding_server.api.embeddings import DIRECT
from embedding_server.api.errors import error_answer
from embedding_server.api.keys import ApiKeys
from embedding_server.api.lifetime import DEADLINE_HEADER, BodyClock, Lifetime
from embedding_server.api.middleware import RequestMiddleware
from embedding_server.api.record import record_of
from embedding_server.api.routes import prefix_of, route_of
from embedding_server.app import create_app
from embedding_server.errors import EmbeddingServerError, NotReady, Overloaded
from embedding_server.logs import set_up_logging
from embedding_server.models.choice import specs_of
from embedding_server.ray.metrics import Metrics, reporting
from embedding_server.ray.options import options_of, send_no_usage_stats
from embedding_server.ray.scaling import QUEUED_TOKENS, QueuedTokens
from embedding_server.settings import Settings
from embedding_server.telemetry import Telemetry

__all__ = ["Answer", "Forwarded", "Ingress", "Models", "application", "ask_replicas"]

logger = logging.getLogger(__name__)

# The replica, its process or its machine has ended with the request, or with its answer.
_LOST = (
    exceptions.RayActorError,
    exceptions.WorkerCrashedError,
    exceptions.NodeDiedError,
    exceptions.ObjectLostError,
    exceptions.TaskCancelledError,  # by Ray: nothing awaits a call that we cancel
    serve_exceptions.ReplicaUnavailableError,
)

# Seconds before each further try. They are few, as the request itself may end the replicas.
_PAUSES = (0.05, 0.2, 1.0)

# Probes, scrapes and people need to know soon that no replica answers.
_HEALTH_SECONDS = 3.0

# After a client's deadline, for the replica to answer that it is over.
_GRACE_SECONDS = 0.5

# Ray kills a replica this long after --drain-timeout.
_KILL_SECONDS = 5.0

# Requests at a replica above the limits of its engines, so that these can refuse them, and for
# metadata.
_MORE_REQUESTS = 256

# Ray's proxy sets the id of every request that has none, and of every answer.
_ID = b"x-request-id"

_SCOPE = ("type", "asgi", "http_version", "method", "scheme", "path", "query_string", "headers",
          "client")  # fmt: skip

_WITH_A_BODY = {*DIRECT, *(("GET", path) for _, path in DIRECT)}


@dataclass(frozen=True, slots=True)
class Forwarded:
    """One request on its way from the ingress to a replica: the ASGI scope and the whole body."""

    scope: Mapping[str, Any]
    body: bytes


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer of a replica."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


class Models:
    """A replica: the server's application, ready for Ray once its models are loaded."""

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
        await self._end.enter_async_context(reporting(self._telemetry, _actor_id(), metrics))

    async def __del__(self) -> None:  # Ray awaits it when the replica has drained
        await self._end.aclose()

    async def check_health(self) -> None:
        """Ray replaces the replica when this raises."""
        registry = self._app.state.registry
        self._telemetry.ready.set(registry.ready)
        if not registry.ready:
            raise NotReady(f"The models are {registry.status()}.")

    async def record_autoscaling_stats(self) -> Mapping[str, float]:
        """The number that ``QueuedTokens`` uses."""
        return {QUEUED_TOKENS: self._telemetry.queued_tokens}

    async def answer(self, request: Forwarded) -> Answer:
        """The application's answer; to it, a cancelled call is a client that hangs up."""
        hung_up = asyncio.Event()
        work = asyncio.ensure_future(_call(self._app, request, hung_up))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            hung_up.set()
            await asyncio.gather(work, return_exceptions=True)
            raise


class Ingress:
    """Sends the requests of Ray's proxy to replicas, and again if one dies."""

    async def __init__(self, settings: Settings, models: Any, metrics: Any) -> None:  # type: ignore[misc]
        set_up_logging(settings.log_format, settings.log_level)
        self._models = models
        self._metrics = metrics
        self._prefix = prefix_of(settings.root_path)
        self._keys = ApiKeys(
            (k.get_secret_value() for k in settings.api_key), settings.api_key_file
        )
        self._bodies = Bodies(settings)
        self._body_clock = BodyClock(settings.body_timeout)
        self._origins = settings.cors_origin
        self._telemetry = Telemetry()  # of the requests that reach no replica
        self._end = contextlib.AsyncExitStack()
        await self._end.enter_async_context(reporting(self._telemetry, _actor_id(), metrics))

    async def __del__(self) -> None:
        await self._end.aclose()

    async def __call__(self, request: Request) -> Response:
        """The answer of a replica, or an error if none answers."""
        path = request.scope["path"].removeprefix(self._prefix)
        try:
            if (request.method, path) in _WITH_A_BODY:
                answer = await self._embed(request)
            elif path.startswith("/health") or path == "/metrics":
                async with asyncio.timeout(_HEALTH_SECONDS):
                    answer = await self._observe(request, path)
            else:
                answer = await ask_replicas(self._models, _forwarded(request))
            return _response(answer)
        except TimeoutError:
            error: Exception = NotReady("Not ready: no replica answers.")
        except Exception as caught:
            error = caught
        return _ErrorResponse(error, route_of(path), self._telemetry, self._origins)

    async def _embed(self, request: Request) -> Answer:
        self._keys.check(request.scope)  # before its body is read
        # A replica answers at the deadline itself; the grace is for when no replica is there.
        async with Lifetime(request, self._body_clock, grace=_GRACE_SECONDS) as lifetime:
            with Body(self._bodies) as body:
                content = await body.read(request)
                lifetime.body_read(watch_client=False)  # Ray cancels the call when it hangs up
                forwarded = _forwarded(request, content)
                return await ask_replicas(self._models, forwarded, lifetime.deadline)

    async def _observe(self, request: Request, path: str) -> Answer:
        answer = await ask_replicas(self._models, _forwarded(request))
        if path == "/metrics" and answer.status == 200:
            return replace(answer, body=await self._metrics.exposition.remote())
        return answer


async def ask_replicas(models: Any, request: Forwarded, until: float | None = None) -> Answer:
    """The answer of a replica of ``models``, or of another one if that dies.

    ``until`` is the client's deadline, a time of the event loop. Raises NotReady if too many die,
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
        except _LOST as error:
            logger.warning("a replica has ended with a request: %s", error)
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
    raise NotReady(
        f"{len(_PAUSES) + 1} replicas in a row have ended while they served this request."
    )


class _ErrorResponse(Response):
    """The answer to a request that reached no replica, with the id, log line and metrics of all."""

    def __init__(
        self, error: Exception, route: str, telemetry: Telemetry, origins: Sequence[str]
    ) -> None:
        super().__init__()
        app: ASGIApp = self._answer
        if origins:
            app = Cors(app, origins=origins)
        self._app = RequestMiddleware(app, telemetry=telemetry)
        self._error = error
        self._route = route

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_without_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [pair for pair in message["headers"] if pair[0] != _ID]
            await send(message)

        await self._app(scope, receive, send_without_id)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        record_of(scope).route = self._route
        if not isinstance(self._error, EmbeddingServerError):
            raise self._error
        await error_answer(self._error)(scope, receive, send)


def application(arguments: Mapping[str, Any]) -> Any:
    """See ``embedding_server.ray.app``."""
    send_no_usage_stats()
    options, settings = options_of(arguments)
    prefix_of(settings.root_path)  # refused here, before every replica refuses it
    requests = len(specs_of(settings)) * settings.max_concurrent_requests + _MORE_REQUESTS
    scaling = AutoscalingConfig(
        min_replicas=options.min_replicas,
        max_replicas=options.max_replicas,
        upscale_delay_s=options.upscale_delay_s,
        downscale_delay_s=options.downscale_delay_s,
        look_back_period_s=options.look_back_period_s,
        # Ray's default of 10 s would miss a shorter look back.
        metrics_interval_s=min(10.0, options.look_back_period_s / 2),
        policy=AutoscalingPolicy(
            policy_function=QueuedTokens,
            policy_kwargs={"target": options.target_queued_tokens},
        ),
    )
    quiet = {"logging_config": {"enable_access_log": False}}  # we log every request
    ending = {
        "graceful_shutdown_timeout_s": settings.drain_timeout + _KILL_SECONDS,
        "graceful_shutdown_wait_loop_s": 0.5,
    }
    no_cores = {"num_cpus": 0}
    metrics = serve.deployment(
        name="metrics", ray_actor_options=no_cores, max_ongoing_requests=10_000, **quiet
    )(Metrics).bind()
    models = serve.deployment(
        name="models",
        autoscaling_config=scaling,
        ray_actor_options={"num_cpus": options.num_cpus, "num_gpus": options.num_gpus},
        max_ongoing_requests=requests,
        max_queued_requests=requests,
        health_check_period_s=5.0,
        **ending,
        **quiet,
    )(Models).bind(settings, metrics)
    return serve.deployment(
        name="ingress",
        num_replicas=options.ingress_replicas,
        ray_actor_options=no_cores,
        max_ongoing_requests=requests * options.max_replicas,
        **ending,
        **quiet,
    )(Ingress).bind(settings, models, metrics)


async def _call(app: ASGIApp, request: Forwarded, hung_up: asyncio.Event) -> Answer:
    """Call ``app`` as an ASGI server would."""
    status = 499  # if the client hangs up before
    headers: tuple[tuple[bytes, bytes], ...] = ()
    body = bytearray()
    messages: list[Message] = [{"type": "http.request", "body": request.body, "more_body": False}]

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await hung_up.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        nonlocal status, headers
        if message["type"] == "http.response.start":
            status = message["status"]
            headers = tuple((bytes(name), bytes(value)) for name, value in message["headers"])
        else:
            body.extend(message.get("body", b""))

    await app(dict(request.scope), receive, send)
    return Answer(status, headers, bytes(body))


def _forwarded(request: Request, body: bytes = b"") -> Forwarded:
    return Forwarded({key: request.scope.get(key) for key in _SCOPE}, body)


def _with_time_left(request: Forwarded, seconds: float) -> Forwarded:
    others = [pair for pair in request.scope["headers"] if pair[0] != DEADLINE_HEADER]
    left = (DEADLINE_HEADER, b"%.3f" % max(seconds, 0.001))
    return replace(request, scope={**request.scope, "headers": [*others, left]})


def _response(answer: Answer) -> Response:
    response = Response(answer.body, answer.status)  # which has the length of the body
    own = (_ID, b"content-length")
    response.raw_headers += [pair for pair in answer.headers if pair[0] not in own]
    return response


def _actor_id() -> str:
    """This process's id, unique in the cluster."""
    return str(get_runtime_context().get_actor_id())
