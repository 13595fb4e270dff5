# SPDX-License-Identifier: MIT OR Apache-2.0
"""Which models the settings name, and how they are to be loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from embedding_server.engine.engine import Limits
from embedding_server.errors import ConfigurationError
from embedding_server.machine import available_cores
from embedding_server.models.catalog import DEFAULT_MODELS
from embedding_server.models.loader import LoadOptions
from embedding_server.models.spec import ModelSpec, parse_spec
from embedding_server.settings import Settings

__all__ = ["load_options_of", "specs_named", "specs_of"]


def specs_named(names: Sequence[str], revision: str | None) -> list[ModelSpec]:
    """`parse_spec` of each of ``names``; with ``revision`` there must be exactly one."""
    if revision and len(names) != 1:
        raise ConfigurationError(
            "--revision (or EMBEDDING_SERVER_REVISION) needs exactly one --model, or one NAME; "
            "else write ID@REVISION for each."
        )
    return [parse_spec(name, revision=revision) for name in names]


def specs_of(settings: Settings) -> list[ModelSpec]:
    """The models to serve, in their order.

    Raises ModelUnavailable for a --model that names no model, and ConfigurationError for settings
    that contradict each other, as two models of the same name.
    """
    names = settings.served_model_name
    if names and len(names) != len(settings.model):
        raise ConfigurationError(
            f"--served-model-name is given {len(names)} times for {len(settings.model)} --model; "
            "give one name for each model, in the same order."
        )
    specs = specs_named(settings.model or DEFAULT_MODELS, settings.revision)
    if not settings.model:
        specs = [replace(spec, requested=False) for spec in specs]
    if names:
        specs = [replace(spec, alias=name) for spec, name in zip(specs, names, strict=True)]
    served = Counter(spec.served_name for spec in specs)
    twice = [name for name, count in served.items() if count > 1]
    if twice:
        raise ConfigurationError(
            f"More than one --model would be served as {', '.join(twice)}: give each "
            "another name with --served-model-name."
        )
    if unknown := set(settings.matryoshka) - set(served):
        raise ConfigurationError(
            f"--matryoshka names {', '.join(unknown)}, which isn't served; served are: "
            f"{', '.join(served)}."
        )
    return specs


def load_options_of(settings: Settings) -> LoadOptions:
    """The options of ``settings`` for loading and running models."""
    return LoadOptions(
        backend=settings.backend,
        threads=settings.threads or max(1, available_cores() // settings.workers),
        onnx_file=settings.onnx_file,
        max_batch_tokens=settings.max_batch_tokens,
        matryoshka=settings.matryoshka,
        inference_timeout=settings.inference_timeout,
        limits=Limits(
            max_concurrent_requests=settings.max_concurrent_requests,
            max_queued_tokens=settings.max_queued_tokens,
            max_request_tokens=settings.max_request_tokens,
        ),
    )
