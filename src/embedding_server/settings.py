# SPDX-License-Identifier: MIT OR Apache-2.0
"""Every setting, one row each: flag, environment variable, TOML key and docs come from here."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
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
    """A list from an environment variable: one string, separated by commas."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _split_keys(value: object) -> object:
    """As ``_split``; a string without a key becomes an empty key, which is refused."""
    return _split(value) or (("",) if isinstance(value, str) else value)


def _check_keys(keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
    if not all(key.get_secret_value() for key in keys):
        raise ValueError("is empty; leave it out to let everyone in")
    return keys


def _parse_sizes(value: object) -> object:
    """``["NAME=64,128"]``, or one string separated by semicolons, as sizes by name."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split(";")]
    if not isinstance(value, list | tuple):
        return value
    sizes_by_name = {}
    for text in value:
        name, _, numbers = str(text).partition("=")
        sizes = [int(size) if size.strip().isdecimal() else 0 for size in numbers.split(",")]
        sizes_by_name[name] = _check_sizes(sizes, text, name)
    return sizes_by_name


def _check_tables(value: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The same for a table of the TOML file."""
    for name, sizes in value.items():
        _check_sizes(sizes, {name: list(sizes)}, name)
    return value


def _check_sizes(sizes: Sequence[int], given: object, name: str) -> Sequence[int]:
    if not name or not sizes or sizes[0] < 1 or list(sizes) != sorted(set(sizes)):
        raise ValueError(f"{given!r} must be a name and ascending sizes, as NAME=64,128,256")
    return sizes


def _check_endpoint(value: str) -> str:
    try:
        url = urlsplit(value)
        complete = url.scheme in ("http", "https") and url.hostname and url.port != 0
        has_password = url.username is not None or url.password is not None
    except ValueError:  # the port is no number
        complete, has_password = False, False
    if has_password:
        raise ValueError("may hold no password; set OTEL_EXPORTER_OTLP_HEADERS for one")
    if not complete or url.query or url.fragment or any(map(str.isspace, value)):
        raise ValueError("must be a collector's URL for OTLP over HTTP, as http://localhost:4318")
    return value


Strings = Annotated[tuple[str, ...], BeforeValidator(_split)]
Secrets = Annotated[
    tuple[SecretStr, ...], BeforeValidator(_split_keys), AfterValidator(_check_keys)
]
Sizes = Annotated[
    dict[str, tuple[int, ...]], BeforeValidator(_parse_sizes), AfterValidator(_check_tables)
]
Endpoint = Annotated[str, AfterValidator(_check_endpoint)]
Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]


def _row(default: Any, commands: tuple[str, ...], help: str) -> Any:
    return Field(default, description=help, json_schema_extra={"commands": list(commands)})


class Settings(BaseModel):
    """Every setting; ``docs/settings.md`` shows them as a table."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = _row("127.0.0.1", _LISTEN, "address to listen on; 0.0.0.0 for every interface")
    port: Annotated[int, Field(ge=0, le=65535)] = _row(
        5000, _LISTEN, "port to listen on; 0 picks a free one"
    )
    uds: Path | None = _row(None, _LISTEN, "Unix socket to listen on, instead of --host and --port")
    workers: Annotated[int, Field(ge=1, le=256)] = _row(
        1, _SERVE, "processes that share the port and the cores; one that ends is replaced"
    )
    server: Literal["uvicorn", "hypercorn"] = _row(
        "uvicorn", _SERVE, "HTTP server; hypercorn (extra [hypercorn]) adds HTTP/2"
    )
    model: Strings = _row(
        (),
        _MODELS,
        "catalog name, hub id with optional @revision, or folder; may be repeated; by default "
        "every catalog model that is available is served",
    )
    served_model_name: Strings = _row(
        (), _SERVE, "name to serve a --model under; repeat it in the order of --model"
    )
    revision: str | None = _row(None, _ALL, "commit, tag or branch of the model's hub repository")
    load_models_from: Path | None = _row(
        None, _ALL, "folder whose DIR/<name> is looked in before the cache and the hub"
    )
    hf_token: SecretStr | None = _row(
        None, _ALL, "Hugging Face token for gated or private models (HF_TOKEN works too)"
    )
    backend: BackendChoice = _row(
        "auto",
        _INFERENCE,
        "onnx (ONNX Runtime), torch (sentence-transformers; needs the extra [torch]), or auto: "
        "torch on a GPU, onnx for models that it runs exactly, else torch",
    )
    onnx_file: str | None = _row(
        None, (*_INFERENCE, "pull"), "run (or pull) this .onnx file of the model's folder"
    )
    matryoshka: Sizes = _row(
        {},
        _INFERENCE,
        "NAME=64,128,256: sizes that 'dimensions' may cut the model's vectors to, if it was "
        "trained for them and doesn't say so; may be repeated (separated by ; in the environment)",
    )
    threads: Count | None = _row(
        None, _INFERENCE, "threads for inference; by default the cores this process may use"
    )
    max_batch_tokens: Count | None = _row(
        None, _INFERENCE, "tokens computed together in a batch; by default chosen for the device"
    )
    max_concurrent_requests: Count = _row(
        512, _SERVE, "requests for one model at a time; one more is refused with 429"
    )
    max_queued_tokens: Count = _row(
        1_000_000, _SERVE, "tokens waiting for one model; past them requests get 429"
    )
    max_client_batch_size: Count = _row(2048, _SERVE, "inputs in one request")
    max_request_tokens: Count = _row(
        300_000, _SERVE, "tokens in one request, all its inputs together"
    )
    max_body_bytes: Count = _row(32 * 2**20, _SERVE, "bytes in a request's body")
    inference_timeout: Seconds = _row(
        120.0, _SERVE, "seconds for a batch; past them requests get 503 and liveness fails"
    )
    drain_timeout: Annotated[float, Field(ge=0)] = _row(
        30.0, _SERVE, "seconds for accepted requests to finish after SIGTERM"
    )
    header_timeout: Seconds = _row(
        10.0, _SERVE, "seconds for a request's header to arrive (HTTP/2: --idle-timeout counts)"
    )
    body_timeout: Seconds = _row(60.0, _SERVE, "seconds for a request's body to arrive")
    idle_timeout: Seconds = _row(
        75.0,
        _SERVE,
        "seconds that a connection may be idle, or an answer go unread; longer than a load "
        "balancer in front keeps it",
    )
    api_key: Secrets = _row(
        (),
        _SERVE,
        "key that requests must send as 'Authorization: Bearer KEY'; may be repeated. It stays in "
        "the shell's history, though not in the list of processes: better --api-key-file",
    )
    api_key_file: Path | None = _row(
        None, _SERVE, "file of such keys, one a line, # for comments; read again at SIGHUP"
    )
    openai_token_ids: bool = _row(
        False,
        _SERVE,
        "accept token ids under /openai/v1 too: they must be the model's, and many clients send "
        "those of OpenAI's models",
    )
    metrics_public: bool = _row(False, _SERVE, "serve /metrics without a key, too")
    tls_cert: Path | None = _row(
        None, _LISTEN, "PEM file of the certificate for HTTPS, and its chain; read again at SIGHUP"
    )
    tls_key: Path | None = _row(None, _SERVE, "PEM file of the key of --tls-cert")
    tls_client_ca: Path | None = _row(
        None, _SERVE, "PEM file of the authorities that must have signed a client's certificate"
    )
    cors_origin: Strings = _row(
        (),
        _SERVE,
        "origin whose pages may send requests from a browser, as https://app.example.com; may be "
        "repeated; * for all",
    )
    root_path: str = _row(
        "", _SERVE, "path prefix of a proxy in front, as /embeddings, whether it removes it or not"
    )
    otlp_endpoint: Endpoint | None = _row(
        None, _SERVE, "URL for traces by OTLP over HTTP, as http://localhost:4318 (extra [otlp])"
    )
    log_format: Literal["text", "json"] = _row(
        "text", _ALL, "text for people, json for log collectors; one line a request"
    )
    log_level: Literal["debug", "info", "warning", "error"] = _row(
        "info", _ALL, "least severe level that is logged"
    )

    @property
    def hub_token(self) -> str | None:
        """``hf_token`` in the clear, for the hub alone."""
        return self.hf_token.get_secret_value() if self.hf_token else None

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_booleans(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic would take the ``true`` of a TOML file for the number 1."""
        assert info.field_name is not None
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError(f"{str(value).lower()} is neither a number nor a text")
        return value

    @model_validator(mode="after")
    def _check_tls(self) -> Settings:
        for flag, file in (("--tls-key", self.tls_key), ("--tls-client-ca", self.tls_client_ca)):
            if file is not None and self.tls_cert is None:
                raise ValueError(f"{flag} needs --tls-cert, the certificate to serve HTTPS with")
        return self


def load_settings(flags: Mapping[str, object], config: Path | None = None) -> Settings:
    """Settings from ``flags`` over the environment over the TOML file ``config``.

    Raises ConfigurationError naming each wrong setting and what is wrong with it.
    """
    variables = _variables()
    if config is None and variables.get(f"{ENV_PREFIX}CONFIG"):
        config = Path(variables[f"{ENV_PREFIX}CONFIG"])
    if config is not None and not config.is_file():
        raise ConfigurationError(f"The configuration file {config} does not exist.")

    # Other unknown variables are only logged, and other empty ones ignored; these would open the
    # server to everyone.
    for name in unknown_variables():
        if name.startswith(f"{ENV_PREFIX}API_KEY"):
            raise ConfigurationError(
                f"{name} is set, but there is no such setting; there is {ENV_PREFIX}API_KEY."
            )
    for name in (f"{ENV_PREFIX}API_KEY", f"{ENV_PREFIX}API_KEY_FILE"):
        if variables.get(name) == "":
            raise ConfigurationError(f"{name} is empty; unset it to let everyone in.")

    values = {row.name: variables[row.env] for row in rows() if variables.get(row.env)}
    # Kubernetes gives every pod beside a Service named embedding-server the variable
    # EMBEDDING_SERVER_PORT=tcp://10.0.0.1:5000.
    if values.get("port", "").startswith("tcp://"):
        del values["port"]
    given = {**values, **flags}
    try:
        in_file = tomllib.loads(config.read_text(encoding="utf-8")) if config else {}
        settings = Settings.model_validate({**in_file, **given})
    except ValidationError as error:
        raise ConfigurationError(_explain(error, given, config)) from None
    except ValueError as error:  # the file is no TOML, or no UTF-8
        raise ConfigurationError(f"{config}: {error}") from None
    folder = settings.load_models_from
    if folder is not None and not folder.is_dir():
        raise ConfigurationError(f"--load-models-from: there is no folder {folder}.")
    return settings


def unknown_variables() -> list[str]:
    """Variables of our prefix that name no setting, without those that Kubernetes sets.

    For a Service named embedding-server it sets EMBEDDING_SERVER_PORT_5000_TCP, _SERVICE_HOST
    and more, so that unknown variables can be logged but not refused.
    """
    known = {row.env for row in rows()} | {f"{ENV_PREFIX}CONFIG"}
    ours = [name for name in os.environ if name.startswith(ENV_PREFIX) and name not in known]
    kubernetes = (f"{ENV_PREFIX}SERVICE_", f"{ENV_PREFIX}PORT_")
    return sorted(name for name in ours if not name.startswith(kubernetes))


def _variables() -> dict[str, str]:
    """The environment, in which a setting may be written in any case."""
    return {name.upper(): value for name, value in os.environ.items()}


def _explain(error: ValidationError, given: Mapping[str, object], config: Path | None) -> str:
    """All problems, each with its flag, variable and, unless ``given`` has the setting, file."""
    parts = []
    for problem in error.errors(include_url=False, include_input=False):
        message = str(problem["msg"]).removeprefix("Value error, ")
        if not problem["loc"]:
            parts.append(message)
            continue
        name = str(problem["loc"][0])
        if problem["type"] == "extra_forbidden":  # only the file can name unknown settings
            near = get_close_matches(name.replace("-", "_"), Settings.model_fields, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            parts.append(f"{config}: there is no setting {name!r}{hint}")
            continue
        flag, variable = "--" + name.replace("_", "-"), f"{ENV_PREFIX}{name.upper()}"
        where = "" if name in given else f"{config}: "
        parts.append(f"{where}{flag} (or {variable}): {message}")
    return "; ".join(parts)


@dataclass(frozen=True, slots=True)
class Row:
    """One setting as the command line and the docs show it; an empty default is None."""

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
        extra: Any = field.json_schema_extra
        origin = get_origin(field.annotation)
        kind: Literal["value", "list", "switch"] = "value"
        if field.annotation is bool:
            kind = "switch"
        elif origin in (tuple, dict):
            kind = "list"
        yield Row(
            name=name,
            default=None if field.default in ((), {}, "") else field.default,
            help=field.description or "",
            commands=tuple(extra["commands"]),
            kind=kind,
            choices=get_args(field.annotation) if origin is Literal else None,
        )
