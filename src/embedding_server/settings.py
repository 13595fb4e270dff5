# SPDX-License-Identifier: MIT OR Apache-2.0
"""Every setting, one row each: flag, environment variable, TOML key and docs come from here."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from embedding_server.errors import ConfigurationError

__all__ = [
    "BACKEND_CHOICES",
    "ENV_PREFIX",
    "Row",
    "Settings",
    "load_settings",
    "rows",
    "unknown_variables",
]

ENV_PREFIX = "EMBEDDING_SERVER_"

BackendChoice = Literal["auto", "onnx", "torch"]
BACKEND_CHOICES: tuple[str, ...] = get_args(BackendChoice)

# Which commands take a setting; the last four are those of ``models``.
_ALL = ("serve", "embed", "list", "info", "pull", "verify")
_MODELS = ("serve", "embed", "list")
_INFERENCE = ("serve", "embed", "info", "verify")
_SERVE = ("serve",)
_LISTEN = ("serve", "health")


def _split(value: object) -> object:
    """Let one string hold several values, separated by commas, as an environment variable must."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _setting(default: Any, help: str, commands: tuple[str, ...], **limits: Any) -> Any:
    return Field(
        default, description=help, json_schema_extra={"commands": list(commands)}, **limits
    )


def _split_secrets(value: object) -> object:
    """As ``_split``, but what would open the server to everyone is refused."""
    if not (secrets := _split(value)) and isinstance(value, str):
        raise ValueError("is empty; leave it out to let everyone in")
    return secrets


Strings = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
Secrets = Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_split_secrets)]


def _split_sizes(value: object) -> object:
    """As ``_split``, for values that hold commas themselves."""
    return tuple(part.strip() for part in value.split(";")) if isinstance(value, str) else value


def _check_sizes(value: tuple[str, ...]) -> tuple[str, ...]:
    for row in value:
        name, _, sizes = row.partition("=")
        numbers = [int(size) if size.strip().isdecimal() else 0 for size in sizes.split(",")]
        if not name or 0 in numbers or numbers != sorted(set(numbers)):
            raise ValueError(f"{row!r} must be a name and ascending sizes, as NAME=64,128,256")
    return value


Matryoshka = Annotated[
    tuple[str, ...], NoDecode, BeforeValidator(_split_sizes), AfterValidator(_check_sizes)
]


def _check_endpoint(value: str) -> str:
    try:
        url = urlsplit(value)
        whole = url.scheme in ("http", "https") and url.hostname and url.port != 0
        secret = url.username is not None or url.password is not None
    except ValueError:  # a port that is none
        whole, secret = False, False
    if secret:
        raise ValueError("may hold no password; set OTEL_EXPORTER_OTLP_HEADERS for one")
    if not whole or url.query or url.fragment or any(map(str.isspace, value)):
        raise ValueError("must be a collector's URL for OTLP over HTTP, as http://localhost:4318")
    return value


Endpoint = Annotated[str, AfterValidator(_check_endpoint)]


class Settings(BaseSettings):
    """What can be set; see ``docs/settings.md`` for the same as a table."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
    )

    host: str = _setting("127.0.0.1", "address to listen on; 0.0.0.0 for every interface", _LISTEN)
    port: int = _setting(5000, "port to listen on; 0 picks a free one", _LISTEN, ge=0, le=65535)
    uds: Path | None = _setting(
        None, "Unix socket to listen on, instead of --host and --port", _LISTEN
    )
    workers: int = _setting(
        1,
        "processes that share the port, each with the models and its share of the cores; one that "
        "ends is replaced",
        _SERVE,
        ge=1,
        le=256,
    )
    server: Literal["uvicorn", "hypercorn"] = _setting(
        "uvicorn",
        "what speaks HTTP: uvicorn, or hypercorn: slower, but HTTP/2 too (needs the extra "
        "[hypercorn])",
        _SERVE,
    )
    model: Strings = _setting(
        (),
        "a catalog name, a hub id with optional @revision, or a folder; may be repeated; "
        "without it every catalog model that can be had is served",
        _MODELS,
    )
    served_model_name: Strings = _setting(
        (), "the name to serve a --model under; repeat it in the order of --model", _SERVE
    )
    revision: str | None = _setting(
        None, "commit, tag or branch of the hub repository of the model", _ALL
    )
    load_models_from: Path | None = _setting(
        None, "folder whose DIR/<name> is looked in before the cache and the hub", _ALL
    )
    hf_token: SecretStr | None = _setting(
        None, "Hugging Face token for gated or private models (HF_TOKEN works too)", _ALL
    )
    backend: BackendChoice = _setting(
        "auto",
        "what computes: onnx (ONNX Runtime), torch (sentence-transformers; needs the extra "
        "[torch]), or auto: torch on a GPU, onnx for what it runs exactly, else torch",
        _INFERENCE,
    )
    onnx_file: str | None = _setting(
        None,
        "run (or pull) this .onnx file of the model's folder instead of the built graph",
        (*_INFERENCE, "pull"),
    )
    matryoshka: Matryoshka = _setting(
        (),
        "NAME=64,128,256: sizes that 'dimensions' may cut the model's vectors to, for a model "
        "that was trained for it and doesn't say so; may be repeated (separated by ; in the "
        "environment)",
        _INFERENCE,
    )
    threads: int | None = _setting(
        None, "threads for inference; the cores this process may use by default", _INFERENCE, ge=1
    )
    max_batch_tokens: int | None = _setting(
        None, "tokens computed together in a batch; chosen from the device by default", _INFERENCE,
        ge=1,
    )  # fmt: skip
    max_concurrent_requests: int = _setting(
        512, "requests for one model at a time; one more is refused with 429", _SERVE, ge=1
    )
    max_queued_tokens: int = _setting(
        1_000_000, "tokens waiting for one model; past them requests get 429", _SERVE, ge=1
    )
    max_client_batch_size: int = _setting(2048, "inputs in one request", _SERVE, ge=1)
    max_request_tokens: int = _setting(
        300_000, "tokens in one request, all its inputs together", _SERVE, ge=1
    )
    max_body_bytes: int = _setting(32 * 2**20, "bytes in a request's body", _SERVE, ge=1)
    inference_timeout: float = _setting(
        120.0,
        "seconds that one batch may take; past them its requests get 503 and liveness turns red, "
        "so that a supervisor restarts the process",
        _SERVE,
        gt=0,
    )
    drain_timeout: float = _setting(
        30.0, "seconds that accepted requests have to finish in after SIGTERM", _SERVE, ge=0
    )
    header_timeout: float = _setting(
        10.0,
        "seconds that a request's header may take to come (under hypercorn --idle-timeout counts)",
        _SERVE,
        gt=0,
    )
    body_timeout: float = _setting(
        60.0, "seconds that a request's body may take to come", _SERVE, gt=0
    )
    idle_timeout: float = _setting(
        75.0,
        "seconds that a connection may be idle, or an answer go unread; longer than a load "
        "balancer in front keeps it",
        _SERVE,
        gt=0,
    )
    api_key: Secrets = _setting(
        (),
        "key that requests must send as 'Authorization: Bearer KEY'; may be repeated. It doesn't "
        "stay in the list of processes, but in the shell's history: better --api-key-file",
        _SERVE,
    )
    api_key_file: Path | None = _setting(
        None, "file of such keys, one a line, # for remarks; read again at SIGHUP", _SERVE
    )
    openai_token_ids: bool = _setting(
        False,
        "take token ids under /openai/v1, too: they must be the model's, and many clients send "
        "those of OpenAI's models",
        _SERVE,
    )
    metrics_public: bool = _setting(False, "answer /metrics without a key, too", _SERVE)
    tls_cert: Path | None = _setting(
        None, "PEM file of a certificate to serve HTTPS with, and its chain; read again at SIGHUP",
        _LISTEN,
    )  # fmt: skip
    tls_key: Path | None = _setting(None, "PEM file of the key of --tls-cert", _SERVE)
    tls_client_ca: Path | None = _setting(
        None, "PEM file of the authorities that a client's certificate must be signed by", _SERVE
    )
    cors_origin: Strings = _setting(
        (),
        "origin whose pages may send requests from a browser, as https://app.example.com; may be "
        "repeated; * for all",
        _SERVE,
    )
    root_path: str = _setting(
        "",
        "prefix of the path at a proxy in front, as /embeddings, be it taken off there or not",
        _SERVE,
    )
    otlp_endpoint: Endpoint | None = _setting(
        None,
        "send traces there with OpenTelemetry over HTTP, as http://localhost:4318 (needs the extra "
        "[otlp])",
        _SERVE,
    )
    log_format: Literal["text", "json"] = _setting(
        "text", "text for people, json for log collectors; one line a request", _ALL
    )
    log_level: Literal["debug", "info", "warning", "error"] = _setting(
        "info", "least severe level that is logged", _ALL
    )

    @property
    def hub_token(self) -> str | None:
        """``hf_token`` in the clear, for the hub alone."""
        return self.hf_token.get_secret_value() if self.hf_token else None

    @property
    def matryoshka_sizes(self) -> dict[str, tuple[int, ...]]:
        """``matryoshka`` by the model's name."""
        rows = (row.partition("=") for row in self.matryoshka)
        return {name: tuple(int(size) for size in sizes.split(",")) for name, _, sizes in rows}

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError(f"{str(value).lower()} is neither a number nor a text")
        return value

    @model_validator(mode="after")
    def _settings_fit_together(self) -> Settings:
        if not all(key.get_secret_value() for key in self.api_key):
            raise ValueError("--api-key is empty; leave it out to let everyone in")
        for flag, file in (("--tls-key", self.tls_key), ("--tls-client-ca", self.tls_client_ca)):
            if file is not None and self.tls_cert is None:
                raise ValueError(f"{flag} needs --tls-cert, the certificate to serve HTTPS with")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        toml = TomlConfigSettingsSource(settings_cls) if cls.model_config.get("toml_file") else None
        return (init_settings, _Environment(settings_cls), *((toml,) if toml else ()))


class _Environment(EnvSettingsSource):
    def __call__(self) -> dict[str, Any]:
        values = super().__call__()
        # Kubernetes gives every pod beside a Service named embedding-server the variable
        # EMBEDDING_SERVER_PORT=tcp://10.0.0.1:5000, which is no setting of ours.
        if str(values.get("port")).startswith("tcp://"):
            del values["port"]
        return values


def load_settings(flags: Mapping[str, object], config: Path | None = None) -> Settings:
    """Settings from ``flags`` over the environment over the TOML file ``config``.

    Raises ConfigurationError naming each setting at fault and what was wrong with it.
    """
    config = config or _config_from_environment()
    if config is not None and not config.is_file():
        raise ConfigurationError(f"The configuration file {config} does not exist.")

    for name in unknown_variables():
        if name.startswith(f"{ENV_PREFIX}API_KEY"):
            # Others are told; a misspelt one of these would open the server to everyone.
            raise ConfigurationError(
                f"{name} is set, but there is no such setting; there is {ENV_PREFIX}API_KEY."
            )
    for name in (f"{ENV_PREFIX}API_KEY", f"{ENV_PREFIX}API_KEY_FILE"):
        # Other empty variables count as unset; these would open the server to everyone.
        if os.environ.get(name) == "":
            raise ConfigurationError(f"{name} is empty; unset it to let everyone in.")

    class Source(Settings):
        model_config = SettingsConfigDict(toml_file=config)

    try:
        settings = Source(**dict(flags))  # type: ignore[arg-type]
    except ValidationError as error:
        raise ConfigurationError(_explain(error, flags, config)) from None
    except ValueError as error:  # a TOML file that doesn't parse
        raise ConfigurationError(f"{config}: {error}") from None
    folder = settings.load_models_from
    if folder is not None and not folder.is_dir():
        raise ConfigurationError(f"--load-models-from: there is no folder {folder}.")
    return settings


def unknown_variables() -> list[str]:
    """Variables of our prefix that name no setting, but for those that Kubernetes makes.

    For a Service named embedding-server it sets EMBEDDING_SERVER_PORT_5000_TCP, _SERVICE_HOST
    and more, so that an unknown one can be told but not refused.
    """
    known = {row.env for row in rows()} | {f"{ENV_PREFIX}CONFIG"}
    ours = [name for name in os.environ if name.startswith(ENV_PREFIX) and name not in known]
    kubernetes = (f"{ENV_PREFIX}SERVICE_", f"{ENV_PREFIX}PORT_")
    return sorted(name for name in ours if not name.startswith(kubernetes))


def _config_from_environment() -> Path | None:
    value = os.environ.get(ENV_PREFIX + "CONFIG")
    return Path(value) if value else None


def _explain(error: ValidationError, flags: Mapping[str, object], config: Path | None) -> str:
    parts = []
    for problem in error.errors(include_url=False, include_input=False):
        name = str(problem["loc"][0]) if problem["loc"] else None
        message = str(problem["msg"]).removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":  # flags and variables can't be unknown here
            near = get_close_matches(str(name).replace("-", "_"), Settings.model_fields, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            parts.append(f"{config}: there is no setting {name!r}{hint}")
            continue
        if name is None:
            parts.append(message)
        else:
            flag, variable = "--" + name.replace("_", "-"), f"{ENV_PREFIX}{name.upper()}"
            in_file = config is not None and name not in flags and not os.environ.get(variable)
            where = f"{config}: " if in_file else ""
            parts.append(f"{where}{flag} (or {variable}): {message}")
    return "; ".join(parts)


@dataclass(frozen=True, slots=True)
class Row:
    """One setting as the command line and the docs show it."""

    name: str
    default: object
    help: str
    commands: tuple[str, ...]
    kind: Literal["value", "list", "switch"]
    choices: tuple[str, ...] | None

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def env(self) -> str:
        return ENV_PREFIX + self.name.upper()


def rows() -> Iterator[Row]:
    """Every setting in its order of definition."""
    for name, field in Settings.model_fields.items():
        extra = field.json_schema_extra
        assert isinstance(extra, dict)
        commands = extra["commands"]
        assert isinstance(commands, list)
        yield Row(
            name=name,
            default=field.default,
            help=field.description or "",
            commands=tuple(str(command) for command in commands),
            kind=_kind(field),
            choices=get_args(field.annotation) if get_origin(field.annotation) is Literal else None,
        )


def _kind(field: FieldInfo) -> Literal["value", "list", "switch"]:
    if field.annotation is bool:
        return "switch"
    return "list" if get_origin(field.annotation) is tuple else "value"
