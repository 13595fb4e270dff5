#!/usr/bin/env python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""The command line, run from a checkout, with what scripts/install has put into its .venv."""

import os
import sys
from pathlib import Path


def main() -> int:
    """Run one command in the checkout's own environment, if there is one."""
    root = Path(__file__).resolve().parent
    python = root / ".venv" / "bin" / "python"
    if python.exists() and Path(sys.prefix) != root / ".venv":
        os.execv(python, [str(python), *sys.argv])  # noqa: S606
    sys.path.insert(0, str(root / "src"))
    try:
        from embedding_server.cli import main as run
    except ModuleNotFoundError as error:
        sys.exit(f"{error}: run scripts/install first.")
    return run()


if __name__ == "__main__":
    sys.exit(main())
