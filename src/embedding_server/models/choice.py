# SPDX-License-Identifier: MIT OR Apache-2.0
"""Which models the settings want served, and how."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from embedding_server.engine.engine import Limits
from embedding_server.errors import ConfigurationError
from embedding_server.models.catalog import DEFAULT_MODELS
from embedding_server.models.loader import LoadOptions
from embedding_server.models.spec import ModelSpec, parse_spec
from embedding_server.settings import Settings, available_cores

__all__ = ["load_options_of", "specs_of"]


def specs_of(settings: Settings) -> list[ModelSpec]:
    """The models to be served, in their order.

    Raises ModelUnavailable for a --model that can't be understood, and ConfigurationError for two
    of the same name.
    """
    names = settings.served_model_name
    if names and len(names) != len(settings.model):
        raise ConfigurationError(
            f"--served-model-name is given {len(names)} times for {len(settings.model)} --model; "
            "give one name for each model, in the same order."
        )
    if settings.revision and len(settings.model) != 1:
        raise ConfigurationError(
            "--revision needs exactly one --model; else write --model ID@REVISION."
        )
    requested = bool(settings.model)
    specs = [
        parse_spec(text, revision=settings.revision, requested=requested)
        for text in settings.model or DEFAULT_MODELS
    ]
    if names:
        specs = [replace(spec, alias=name) for spec, name in zip(specs, names, strict=True)]
    served = Counter(spec.served_name for spec in specs)
    twice = [name for name, count in served.items() if count > 1]
    if twice:
        raise ConfigurationError(
            f"More than one --model would be served as {', '.join(twice)}: give each a "
            "name of its own with --served-model-name."
        )
    if unknown := set(settings.matryoshka_sizes) - set(served):
        raise ConfigurationError(
            f"--matryoshka names {', '.join(unknown)}, which isn't served; there are: "
            f"{', '.join(served)}."
        )
    return specs


def load_options_of(settings: Settings) -> LoadOptions:
    """How ``settings`` want models to be run."""
    return LoadOptions(
        backend=settings.backend,
        threads=settings.threads or max(1, available_cores() // settings.workers),
        onnx_file=settings.onnx_file,
        max_batch_tokens=settings.max_batch_tokens,
        matryoshka=settings.matryoshka_sizes,
        inference_timeout=settings.inference_timeout,
        limits=Limits(
            max_concurrent_requests=settings.max_concurrent_requests,
            max_queued_tokens=settings.max_queued_tokens,
            max_request_tokens=settings.max_request_tokens,
        ),
    )
