# SPDX-License-Identifier: MIT OR Apache-2.0
"""The arguments of a Ray Serve application: Ray's own options, and the server's settings."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from embedding_server.errors import ConfigurationError
from embedding_server.models.spec import parse_spec
from embedding_server.settings import Settings, load_settings, rows

__all__ = ["ServeOptions", "options_of", "send_no_usage_stats", "with_absolute_paths"]

# Settings that Ray's HTTP proxy replaces, and what to set instead.
_REPLACED = {
    **dict.fromkeys(("host", "port", "uds"), "set http_options in Ray Serve's configuration"),
    **dict.fromkeys(("tls_cert", "tls_key", "tls_client_ca"), "set http_options.ssl_keyfile there"),
    "server": "Ray's own proxy speaks HTTP",
    "workers": "set min_replicas and max_replicas",
}


class ServeOptions(BaseModel):
    """Ray's own options; where Ray has a name for one, it is the same."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(default=4, ge=1)
    """Replicas for which the cluster has no room start when it has."""
    num_cpus: float = Field(default=1.0, gt=0)
    """Cores for each replica, also a part of one; without --threads it has as many threads."""
    num_gpus: float = Field(default=0.0, ge=0)
    """GPUs for each replica: with 0.25, four share one. They need the extra [torch]."""
    target_queued_tokens: int = Field(default=10_000, ge=1)
    """Tokens waiting at each replica above which replicas are added."""
    upscale_delay_s: float = Field(default=10.0, ge=0)
    downscale_delay_s: float = Field(default=300.0, ge=0)
    look_back_period_s: float = Field(default=30.0, gt=0)
    """Seconds over which the waiting tokens are averaged."""
    ingress_replicas: int = Field(default=2, ge=1)
    """Processes without a model that send requests to replicas, and again if a replica dies."""


def options_of(arguments: Mapping[str, Any]) -> tuple[ServeOptions, Settings]:
    """Ray's options and the server's settings; raises ConfigurationError naming the wrong ones."""
    names = {row.name for row in rows() if "serve" in row.commands}
    flags = {name: value for name, value in arguments.items() if name in names}
    rest = {name: value for name, value in arguments.items() if name not in flags}
    if unknown := sorted(set(rest) - set(ServeOptions.model_fields)):
        raise ConfigurationError(
            f"There is no argument {', '.join(unknown)}; there are "
            f"{', '.join(ServeOptions.model_fields)} and the settings of the server."
        )
    try:
        options = ServeOptions(**rest)
    except ValidationError as error:
        problems = [f"{e['loc'][0]}: {e['msg']}" for e in error.errors(include_url=False)]
        raise ConfigurationError("; ".join(problems)) from None
    if options.max_replicas < options.min_replicas:
        raise ConfigurationError(
            f"max_replicas={options.max_replicas} is below min_replicas={options.min_replicas}."
        )
    settings = load_settings(flags)
    for name, instead in _REPLACED.items():
        if getattr(settings, name) != Settings.model_fields[name].default:
            raise ConfigurationError(f"{name} can't be set under Ray Serve: {instead}.")
    if settings.threads is None:  # other processes use the machine, too
        settings = settings.model_copy(update={"threads": max(1, int(options.num_cpus))})
    return options, with_absolute_paths(settings)


def with_absolute_paths(settings: Settings) -> Settings:
    """``settings`` for a process in another working directory.

    Raises ModelUnavailable for an invalid --model.
    """
    folders = [parse_spec(text, revision=settings.revision).folder for text in settings.model]
    pairs = zip(folders, settings.model, strict=True)
    models = tuple(str(folder.absolute()) if folder else text for folder, text in pairs)
    files = {name: getattr(settings, name) for name in ("load_models_from", "api_key_file")}
    paths = {name: path.absolute() for name, path in files.items() if path is not None}
    return settings.model_copy(update={"model": models, **paths})


def send_no_usage_stats() -> None:
    """Stop a cluster that this process starts from reporting that it is used, unless it is set."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
