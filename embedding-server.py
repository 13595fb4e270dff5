#!/usr/bin/env python3
"""The command line, run from a checkout."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "src"))

from embedding_server.cli import main

if __name__ == "__main__":
    sys.exit(main())
