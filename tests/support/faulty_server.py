# SPDX-License-Identifier: MIT OR Apache-2.0
"""``embedding-server`` with the backend ``Faulty`` in the place of onnx: a program to be run."""

from __future__ import annotations

import sys
from pathlib import Path

from embedding_server import cli
from embedding_server.backends.base import BACKENDS

__all__ = ["PROGRAM"]

PROGRAM = (str(Path(__file__)),)
"""For ``running_server``."""

if __name__ == "__main__":
    BACKENDS["onnx"] = "fake_backends:Faulty"  # type: ignore[index]
    sys.exit(cli.main())
