# SPDX-License-Identifier: MIT OR Apache-2.0
"""``embedding-server`` with ``Broken`` in the place of onnx, in workers, too: a program to be run.

While the file is there that the variable ``NONSENSE`` names, a worker that is started only sends
its supervisor a line that is no JSON, and stays.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from embedding_server import cli
from embedding_server.backends.base import BACKENDS
from embedding_server.serving import worker

__all__ = ["NONSENSE", "PROGRAM"]

PROGRAM = (str(Path(__file__)),)
"""For ``running_server``."""

NONSENSE = "FAULTY_WORKERS_NONSENSE"


def supervise() -> int:
    """Serve as usual, but for the Python that workers are started with."""
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder) / "python"
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" "$@"\n')
        python.chmod(0o700)
        sys.executable = str(python)
        return cli.main()


def work(arguments: Sequence[str]) -> int:
    """What ``python -m embedding_server.serving.worker`` does with ``arguments``."""
    if Path(os.environ.get(NONSENSE, "/nowhere")).exists():
        with socket.socket(fileno=int(arguments[1])) as control:
            control.sendall(b"failed {nonsense\n")
            time.sleep(60)
    return worker.main(*map(int, arguments))


if __name__ == "__main__":
    BACKENDS["onnx"] = "fake_backends:Broken"  # type: ignore[index]
    sys.exit(work(sys.argv[3:]) if sys.argv[1] == "-m" else supervise())
