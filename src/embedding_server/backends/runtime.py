# SPDX-License-Identifier: MIT OR Apache-2.0
"""ONNX Runtime without its telemetry; nothing else here imports it.

Since 1.29 its official builds for Linux, too, report to Microsoft which models are loaded, unless
this variable is set when the library is loaded.
"""

from __future__ import annotations

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnxruntime

# Where it was loaded before this module, the variable came too late.
onnxruntime.disable_telemetry_events()

__all__ = ["onnxruntime"]
