# SPDX-License-Identifier: MIT OR Apache-2.0
"""Schemathesis, as its users run it, over the whole document of a live server."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from live import LiveServer, environment, running_server

MODEL = "all-MiniLM-L6-v2"
KEY = "sesame-4711"

# All checks are on. One needs to know what no document can say: which token ids, prompts and
# dimensions a model has, and that 'prompt' and 'input_type' exclude each other, are for the model
# to refuse, with a 400. (What is wrong by the document must still be refused.)
CONFIG = """
[[operations]]
include-path-regex = "/embeddings$"
checks.positive_data_acceptance.expected-statuses = ["2xx", "400", "401", "404", "409", "429"]
"""


def narrowed(document: dict[str, Any]) -> dict[str, Any]:
    """The document for this one model, so that most requests are for one that there is."""
    narrow = copy.deepcopy(document)
    names = {"type": "string", "enum": [MODEL, "nope"]}
    for schema in narrow["components"]["schemas"].values():
        if "input" in schema.get("properties", {}):
            schema["properties"]["model"] = names
    for operations in narrow["paths"].values():
        for operation in operations.values():
            for parameter in operation["parameters"]:
                if parameter["name"] == "name":
                    parameter["schema"] = names
    return narrow


def run(live: LiveServer, source: str, folder: Path, *options: str) -> int:
    """Let it test ``source``; the number of test cases, all of which must have passed."""
    config = folder / "schemathesis.toml"
    config.write_text(CONFIG)
    # With its plain command line: what it prints says how to send a failing case again.
    done = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(config)),
            *("run", source, "--url", live.url, "--no-color", "--seed", "1"),
            *("--generation-deterministic", "--request-timeout", "60", *options),
        ],
        cwd=folder,  # it keeps what it has found there
        env=environment(),
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2000:]
    assert "Operations:       11 selected / 11 total" in done.stdout
    assert "Tested: 11" in done.stdout
    cases = re.search(r"Test cases:\n\s+(\d+) generated, \1 passed", done.stdout)
    assert cases is not None, done.stdout[-3000:]
    assert live.process.poll() is None
    assert "Traceback" not in live.log
    assert " status=500" not in live.log
    return int(cases[1])


def check(folder: Path, examples: int, least: int) -> None:
    """Without a key; then with one, over the other server, for a model that there is."""
    flags = ("--model", MODEL)
    count = ("--max-examples", str(examples))
    with running_server(*flags) as live:
        cases = run(live, f"{live.url}/openapi.json", folder, *count)
    with running_server(*flags, "--server", "hypercorn", "--api-key", KEY) as live:
        keyed = {"authorization": f"Bearer {KEY}"}
        document = httpx.get(f"{live.url}/openapi.json", headers=keyed).json()
        (folder / "openapi.json").write_text(json.dumps(narrowed(document)))
        header = f"Authorization: Bearer {KEY}"
        cases += run(live, str(folder / "openapi.json"), folder, *count, "--header", header)
    assert cases >= least


def test_the_whole_document(tmp_path: Path) -> None:
    check(tmp_path, 120, 2000)


@pytest.mark.slow
def test_the_whole_document_for_longer(tmp_path: Path) -> None:
    check(tmp_path, 1500, 15_000)


def test_it_finds_what_is_untrue(server: LiveServer, tmp_path: Path) -> None:
    """A document that promises other answers fails."""
    document = httpx.get(f"{server.url}/openapi.json").json()
    schema = document["components"]["schemas"]["ServerStatus"]
    schema["properties"]["status"] = {"const": "dead"}
    (tmp_path / "openapi.json").write_text(json.dumps(document))
    with pytest.raises(AssertionError, match="Response violates schema"):
        run(server, str(tmp_path / "openapi.json"), tmp_path, "--max-examples", "3")


def test_a_key_that_is_not_asked_for_is_found(server: LiveServer, tmp_path: Path) -> None:
    document = httpx.get(f"{server.url}/openapi.json").json()
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["security"] = [{"key": []}]
    (tmp_path / "openapi.json").write_text(json.dumps(document))
    with pytest.raises(AssertionError, match="without authentication"):
        options = ("--max-examples", "3", "--header", f"Authorization: Bearer {KEY}")
        run(server, str(tmp_path / "openapi.json"), tmp_path, *options)
