# SPDX-License-Identifier: MIT OR Apache-2.0
"""What can be set of a Ray Serve application: Ray's own part, and the server's settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from embedding_server.errors import ConfigurationError
from embedding_server.models.spec import parse_spec
from embedding_server.settings import Settings, load_settings, rows

__all__ = ["ServeOptions", "options_of", "with_whole_paths"]

# What Ray's HTTP proxy does in the server's place, and what says how.
_OF_THE_PROXY = {
    **dict.fromkeys(("host", "port", "uds"), "set http_options in Ray Serve's configuration"),
    **dict.fromkeys(("tls_cert", "tls_key", "tls_client_ca"), "set http_options.ssl_keyfile there"),
    "server": "Ray's own proxy speaks HTTP",
    "workers": "set min_replicas and max_replicas",
}


class ServeOptions(BaseModel):
    """Ray's part; the names are Ray's own where it has one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(default=4, ge=1)
    """More are waited for if the cluster has no room for them."""
    num_cpus: float = Field(default=1.0, gt=0)
    """Cores a replica, also a part of one; without --threads it computes with as many threads."""
    num_gpus: float = Field(default=0.0, ge=0)
    """GPUs a replica: with 0.25, four share one. They need the extra [torch]."""
    target_queued_tokens: int = Field(default=10_000, ge=1)
    """Tokens waiting at each replica, above which there should be more of them."""
    upscale_delay_s: float = Field(default=10.0, ge=0)
    downscale_delay_s: float = Field(default=300.0, ge=0)
    look_back_period_s: float = Field(default=30.0, gt=0)
    """Seconds over which the waiting tokens are averaged."""
    ingress_replicas: int = Field(default=2, ge=1)
    """Processes without a model that hand requests to replicas, and on to others if one dies."""


def options_of(arguments: Mapping[str, Any]) -> tuple[ServeOptions, Settings]:
    """Ray's part and the server's settings; raises ConfigurationError naming what is wrong."""
    settings_known = {row.name for row in rows() if "serve" in row.commands}
    flags = {name: value for name, value in arguments.items() if name in settings_known}
    rest = {name: value for name, value in arguments.items() if name not in flags}
    if unknown := sorted(set(rest) - set(ServeOptions.model_fields)):
        raise ConfigurationError(
            f"There is no argument {', '.join(unknown)}; there are "
            f"{', '.join(ServeOptions.model_fields)} and the settings of the server."
        )
    try:
        options = ServeOptions(**rest)
    except ValidationError as error:
        told = "; ".join(f"{e['loc'][0]}: {e['msg']}" for e in error.errors(include_url=False))
        raise ConfigurationError(told) from None
    if options.max_replicas < options.min_replicas:
        raise ConfigurationError(
            f"max_replicas={options.max_replicas} is below min_replicas={options.min_replicas}."
        )
    settings = load_settings(flags)
    for name, instead in _OF_THE_PROXY.items():
        if getattr(settings, name) != Settings.model_fields[name].default:
            raise ConfigurationError(f"{name} can't be set under Ray Serve: {instead}.")
    if settings.threads is None:  # not all that the machine has: others live there
        settings = settings.model_copy(update={"threads": max(1, int(options.num_cpus))})
    return options, with_whole_paths(settings)


def with_whole_paths(settings: Settings) -> Settings:
    """What means the same in another process, which stands in another folder.

    Raises ModelUnavailable for a --model that can't be understood.
    """
    folders = [parse_spec(text, revision=settings.revision).folder for text in settings.model]
    pairs = zip(folders, settings.model, strict=True)
    whole = tuple(str(folder.absolute()) if folder else text for folder, text in pairs)
    files = {name: getattr(settings, name) for name in ("load_models_from", "api_key_file")}
    paths = {name: path.absolute() for name, path in files.items() if path is not None}
    return settings.model_copy(update={"model": whole, **paths})
