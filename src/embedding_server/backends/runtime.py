# SPDX-License-Identifier: MIT OR Apache-2.0
"""ONNX Runtime without its telemetry; nothing else here imports it.

Since 1.29 its official builds for Linux, too, send to their maker what is loaded and where, unless
this variable is there when the library is loaded.
"""

from __future__ import annotations

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnxruntime

# For who has loaded it before us.
onnxruntime.disable_telemetry_events()

__all__ = ["onnxruntime"]
