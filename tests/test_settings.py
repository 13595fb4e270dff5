# SPDX-License-Identifier: MIT OR Apache-2.0
"""Settings and the command line: who wins, what is refused and in which words, what help loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from live import environment, run_cli

import embedding_server
from embedding_server.app import create_app
from embedding_server.cli import build_parser
from embedding_server.errors import ConfigurationError
from embedding_server.settings import (
    ENV_PREFIX,
    Settings,
    load_settings,
    rows,
    unknown_variables,
)

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.upper().startswith(ENV_PREFIX):
            monkeypatch.delenv(name)


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    return tmp_path / "settings.toml"


def set_environment(monkeypatch: pytest.MonkeyPatch, values: Mapping[str, str]) -> None:
    for name, value in values.items():
        monkeypatch.setenv(ENV_PREFIX + name.upper(), value)


# -------------------------------------------------------------------------------------- precedence


@pytest.mark.parametrize(
    ("flag", "env", "file", "expected"),
    [
        pytest.param("1", "2", 3, 1, id="flag"),
        pytest.param(None, "2", 3, 2, id="environment"),
        pytest.param(None, "", 3, 3, id="an-empty-variable-is-unset"),
        pytest.param(None, None, 3, 3, id="file"),
        pytest.param(None, None, None, 5000, id="default"),
    ],
)
def test_precedence(
    flag: str | None,
    env: str | None,
    file: int | None,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
    toml: Path,
) -> None:
    if env is not None:
        set_environment(monkeypatch, {"port": env})
    toml.write_text("" if file is None else f"port = {file}\n")
    settings = load_settings({} if flag is None else {"port": flag}, toml)
    assert settings.port == expected


def test_a_flag_replaces_a_list_and_does_not_add_to_it(
    monkeypatch: pytest.MonkeyPatch, toml: Path
) -> None:
    toml.write_text('model = ["from-the-file"]\napi_key = ["file"]\n')
    set_environment(monkeypatch, {"model": "from-the-environment"})
    settings = load_settings({"model": ["one", "two"]}, toml)
    assert settings.model == ("one", "two")
    assert [key.get_secret_value() for key in settings.api_key] == ["file"]


def test_the_file_can_be_named_in_the_environment(
    monkeypatch: pytest.MonkeyPatch, toml: Path, tmp_path: Path
) -> None:
    toml.write_text("port = 7\n")
    set_environment(monkeypatch, {"config": str(toml)})
    assert load_settings({}).port == 7
    other = tmp_path / "other.toml"
    other.write_text("port = 8\n")
    assert load_settings({}, other).port == 8


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", ("a",)),
        ("a,b", ("a", "b")),
        (" a , org/b@main ,, ", ("a", "org/b@main")),
    ],
)
def test_lists_in_the_environment_are_separated_by_commas(
    monkeypatch: pytest.MonkeyPatch, text: str, expected: tuple[str, ...]
) -> None:
    set_environment(monkeypatch, {"model": text, "api_key": text})
    settings = load_settings({})
    assert settings.model == expected
    assert tuple(key.get_secret_value() for key in settings.api_key) == expected


def test_a_comma_in_a_flag_is_part_of_the_value() -> None:
    assert load_settings({"model": ["./a,b"]}).model == ("./a,b",)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        pytest.param(["a=64,128"], {"a": (64, 128)}, id="one"),
        pytest.param("a=64,128; b=32", {"a": (64, 128), "b": (32,)}, id="two-in-the-environment"),
    ],
)
def test_matryoshka_sizes(rows: Any, expected: dict[str, tuple[int, ...]]) -> None:
    assert load_settings({"matryoshka": rows}).matryoshka == expected


@pytest.mark.parametrize("row", ["a", "a=", "=64", "a=128,64", "a=64,64", "a=0,64", "a=x", "a=-1"])
def test_matryoshka_sizes_that_are_none(row: str) -> None:
    with pytest.raises(ConfigurationError, match=r"--matryoshka.* ascending sizes"):
        load_settings({"matryoshka": [row]})


@pytest.mark.parametrize("sizes", [[], [128, 64], [0, 64], [-5]])
def test_matryoshka_sizes_in_a_table_that_are_none(sizes: list[int]) -> None:
    with pytest.raises(ConfigurationError, match=r"matryoshka.* ascending sizes"):
        load_settings({"matryoshka": {"a": sizes}})


def test_kubernetes_service_variables_are_no_settings(
    monkeypatch: pytest.MonkeyPatch, toml: Path
) -> None:
    """A Service named embedding-server puts these into the environment of every pod."""
    address = "tcp://10.0.0.7:5000"
    set_environment(
        monkeypatch, {"port": address, "port_5000_tcp": address, "service_host": "10.0.0.7"}
    )
    assert load_settings({}).port == 5000
    toml.write_text("port = 7\n")
    assert load_settings({}, toml).port == 7


# -------------------------------------------------------------------------------------- refusals

BAD_VALUES = [
    ("port", "99999", "less than or equal to 65535"),
    ("port", "http", "valid integer"),
    ("threads", "0", "greater than or equal to 1"),
    ("max_batch_tokens", "-5", "greater than or equal to 1"),
    ("max_concurrent_requests", "many", "valid integer"),
    ("backend", "jax", "'auto', 'onnx' or 'torch'"),
    ("log_format", "xml", "'text' or 'json'"),
]


@pytest.mark.parametrize("source", ["flag", "environment", "file"])
@pytest.mark.parametrize(("name", "value", "message"), BAD_VALUES)
def test_a_bad_value_is_named_by_flag_and_variable(
    source: str, name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch, toml: Path
) -> None:
    toml.write_text(f'{name} = "{value}"\n' if source == "file" else "")
    set_environment(monkeypatch, {name: value} if source == "environment" else {})
    with pytest.raises(ConfigurationError) as caught:
        load_settings({name: value} if source == "flag" else {}, toml)
    flag = "--" + name.replace("_", "-")
    for part in (f"{flag} (or EMBEDDING_SERVER_{name.upper()})", message):
        assert part in str(caught.value)


def test_all_bad_values_are_reported_at_once() -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_settings({"port": "x", "threads": "0"})
    assert "--port" in str(caught.value)
    assert "--threads" in str(caught.value)


def test_an_unknown_key_of_the_file(toml: Path) -> None:
    toml.write_text("prot = 5000\n[serving]\nport = 1\n")
    with pytest.raises(ConfigurationError) as caught:
        load_settings({}, toml)
    for name in ("prot", "serving"):
        assert f"{toml}: there is no setting {name!r}" in str(caught.value)
    assert "did you mean port?" in str(caught.value)


def test_a_bad_value_of_the_file_names_the_file(toml: Path) -> None:
    toml.write_text("port = true\n")
    with pytest.raises(ConfigurationError, match=f"{toml}: --port .* true is neither a number"):
        load_settings({}, toml)


def test_a_file_that_is_not_toml(toml: Path) -> None:
    toml.write_text("port: 5000\n")
    with pytest.raises(ConfigurationError, match=str(toml)):
        load_settings({}, toml)


def test_a_file_that_does_not_exist(toml: Path) -> None:
    with pytest.raises(ConfigurationError, match="does not exist"):
        load_settings({}, toml)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        pytest.param(
            {"model": ["a", "b"], "served_model_name": ["x"]},
            "--served-model-name is given 1 times for 2 --model",
            id="fewer-names",
        ),
        pytest.param(
            {"model": ["a"], "served_model_name": ["x", "y"]},
            "--served-model-name is given 2 times for 1 --model",
            id="more-names",
        ),
        pytest.param({"served_model_name": ["x"]}, "1 times for 0", id="names-only"),
        pytest.param(
            {"model": ["a", "b"], "revision": "main"}, "exactly one --model", id="revision-of-two"
        ),
        pytest.param({"revision": "main"}, "exactly one --model", id="revision-of-none"),
    ],
)
def test_settings_that_do_not_go_together(flags: dict[str, Any], message: str) -> None:
    """What only serving asks of them, so that a server's file can be used for other commands."""
    settings = load_settings(flags)
    with pytest.raises(ConfigurationError, match=message):
        create_app(settings)


def test_one_name_for_each_model() -> None:
    settings = load_settings({"model": ["a", "b"], "served_model_name": ["x", "y"]})
    assert settings.served_model_name == ("x", "y")


def test_misspelt_variables_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDDING_SERVER_MODLE", "all-MiniLM-L6-v2")
    # Kubernetes' own, for a Service named embedding-server.
    monkeypatch.setenv("EMBEDDING_SERVER_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("EMBEDDING_SERVER_PORT_5000_TCP", "tcp://10.0.0.1:5000")
    assert unknown_variables() == ["EMBEDDING_SERVER_MODLE"]
    done = run_cli("models", "list", env={"EMBEDDING_SERVER_MODLE": "x"})
    assert done.returncode == 0
    assert b"EMBEDDING_SERVER_MODLE is set, but there is no such setting" in done.stderr


def test_settings_do_not_change() -> None:
    settings = load_settings({})
    with pytest.raises(ValueError, match="frozen"):
        settings.port = 7


# --------------------------------------------------------------------------------------- secrets


@pytest.mark.parametrize("source", ["flag", "environment", "file"])
def test_secrets_are_in_no_representation(
    source: str, monkeypatch: pytest.MonkeyPatch, toml: Path
) -> None:
    secret = "sk-do-not-show"
    toml.write_text("")
    flags: dict[str, Any] = {}
    if source == "flag":
        flags = {"api_key": [secret], "hf_token": secret}
    elif source == "environment":
        set_environment(monkeypatch, {"api_key": secret, "hf_token": secret})
    else:
        toml.write_text(f'api_key = ["{secret}"]\nhf_token = "{secret}"\n')
    settings = load_settings(flags, toml)
    assert settings.api_key[0].get_secret_value() == secret
    for shown in (repr(settings), str(settings), str(settings.model_dump()), f"{vars(settings)}"):
        assert secret not in shown


@pytest.mark.parametrize("name", ["api_key", "hf_token"])
def test_secrets_are_in_no_error(name: str, toml: Path) -> None:
    toml.write_text(f'{name} = [["sk-do-not-show"]]\nport = "x"\n')
    with pytest.raises(ConfigurationError) as caught:
        load_settings({}, toml)
    assert "sk-do-not-show" not in str(caught.value)


# ---------------------------------------------------------------------------------------- the table


COMMANDS = {
    "serve": ["serve"],
    "embed": ["embed"],
    "list": ["models", "list"],
    "info": ["models", "info", "name"],
    "verify": ["models", "verify", "name"],
    "pull": ["models", "pull", "name", "--to", "folder"],
    "health": ["health"],
}
SAMPLES = {"matryoshka": "name=64,128"}


def test_every_setting_is_a_full_row() -> None:
    all_rows = list(rows())
    assert [row.name for row in all_rows] == list(Settings.model_fields)
    for row in all_rows:
        assert row.help, row.name
        assert row.commands, row.name
        assert set(row.commands) <= set(COMMANDS)
        assert not row.help.endswith("."), f"{row.name}: help is a phrase, as argparse's own"


@pytest.mark.parametrize("row", list(rows()), ids=lambda row: row.name)
def test_every_setting_is_a_flag_of_its_commands(row: Any) -> None:
    value = SAMPLES.get(row.name) or (row.choices[0] if row.choices else "1")
    for command, arguments in COMMANDS.items():
        line = [*arguments, row.flag, *([] if row.kind == "switch" else [value])]
        if command in row.commands:
            options = vars(build_parser().parse_args(line))
            expected = {"list": [value], "switch": True, "value": value}
            assert options[row.name] == expected[row.kind]
        else:
            with pytest.raises(SystemExit):
                build_parser().parse_args(line)


def test_an_absent_flag_leaves_room_for_environment_and_file() -> None:
    options = vars(build_parser().parse_args(["serve"]))
    assert set(options) == {"command", "config"}


def test_flags_of_text_embeddings_inference_keep_their_names() -> None:
    flags = {row.flag for row in rows()}
    assert flags >= {
        *("--max-batch-tokens", "--max-concurrent-requests", "--max-client-batch-size"),
        *("--api-key", "--served-model-name", "--revision", "--hf-token"),
    }


# ----------------------------------------------------------------------------------- command line

HELP_PAGES = [
    pytest.param([], id="embedding-server"),
    pytest.param(["serve"], id="serve"),
    pytest.param(["models"], id="models"),
    pytest.param(["models", "list"], id="list"),
    pytest.param(["models", "info"], id="info"),
    pytest.param(["models", "verify"], id="verify"),
    pytest.param(["models", "pull"], id="pull"),
    pytest.param(["embed"], id="embed"),
    pytest.param(["bench"], id="bench"),
    pytest.param(["bench", "engine"], id="bench-engine"),
    pytest.param(["health"], id="health"),
]

HEAVY = {
    *("uvicorn", "uvloop", "httptools", "hypercorn"),
    *("fastapi", "starlette", "prometheus_client", "numpy"),
    *("onnxruntime", "onnx", "torch", "transformers", "sentence_transformers", "tokenizers"),
    *("huggingface_hub", "safetensors", "pyarrow", "tqdm", "orjson"),
}


@pytest.mark.parametrize("arguments", HELP_PAGES)
def test_help_answers_at_once(arguments: list[str]) -> None:
    """It loads nothing that serves or computes."""
    program = (
        "import json, sys\n"
        "from embedding_server.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: code = end.code\n"
        "print(json.dumps([code, sorted(sys.modules)]), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments, "--help"],
        env=environment(),
        capture_output=True,
        check=True,
    )
    code, modules = json.loads(done.stderr)
    assert code == 0
    assert done.stdout.startswith(b"usage: embedding-server")
    assert HEAVY & set(modules) == set()


@pytest.mark.parametrize("variable", ["PORT", "BACKEND", "CONFIG"])
def test_help_needs_no_right_settings(variable: str) -> None:
    done = run_cli("serve", "--help", env={ENV_PREFIX + variable: "nonsense"})
    assert (done.returncode, done.stderr) == (0, b"")


def test_no_command_shows_help_and_is_a_wrong_usage() -> None:
    done = run_cli()
    assert done.returncode == 2
    assert b"usage: embedding-server" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["bake"], id="unknown-command"),
        pytest.param(["serve", "--prot", "5000"], id="unknown-flag"),
        pytest.param(["serve", "--max-batch", "5"], id="abbreviated-flag"),
        pytest.param(["embed", "--norm"], id="abbreviated-switch"),
        pytest.param(["serve", "extra"], id="extra-argument"),
        pytest.param(["serve", "--backend", "jax"], id="no-choice"),
        pytest.param(["models"], id="no-action"),
        pytest.param(["models", "pull", "--to", "x"], id="no-name"),
        pytest.param(["models", "pull", "name"], id="no-destination"),
    ],
)
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        build_parser().parse_args(arguments)
    assert caught.value.code == 2
    assert "usage: embedding-server" in capsys.readouterr().err


def test_a_bad_setting_is_one_sentence_and_exit_code_1() -> None:
    done = run_cli("serve", "--port", "99999")
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.startswith(b"embedding-server: --port (or EMBEDDING_SERVER_PORT)")
    assert done.stderr.count(b"\n") == 1


def test_version() -> None:
    done = run_cli("--version")
    version = f"embedding-server {embedding_server.__version__}\n"
    assert (done.returncode, done.stdout.decode()) == (0, version)


@pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"]], ids=" ".join)
def test_the_script_in_the_checkout_is_the_same_command_line(
    arguments: list[str], tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "embedding-server.py", *arguments],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == run_cli(*arguments).stdout
    assert os.access(ROOT / "embedding-server.py", os.X_OK)
