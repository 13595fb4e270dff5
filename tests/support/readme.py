# SPDX-License-Identifier: MIT OR Apache-2.0
"""The README's commands and examples, by section."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = "## Install and deploy"


def section(heading: str) -> str:
    """What stands under ``heading`` (as ``### Nix``), up to the next heading of its level."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    level = heading.split()[0]
    _, found, after = text.partition(f"\n{heading}\n")
    assert found, f"the README has no {heading!r}"
    return re.split(rf"^#{{2,{len(level)}}} ", after, maxsplit=1, flags=re.MULTILINE)[0]


def before_deployment() -> str:
    """The whole README but the section on deployment, whose commands tests/deployment runs."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return text.replace(section(DEPLOY), "")


def blocks(text: str, language: str) -> list[str]:
    """The bodies of the fenced blocks of ``language``."""
    return [
        body
        for kind, body in re.findall(r"^```(\w+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        if kind == language
    ]


def commands(text: str) -> list[str]:
    """Each ``$`` line of the console blocks, with the lines that continue it."""
    joined = "\n".join(blocks(text, "console")).replace("\\\n", " ")
    return [line[2:].strip() for line in joined.splitlines() if line.startswith("$ ")]
