# SPDX-License-Identifier: MIT OR Apache-2.0
"""The single-precision operations a second that the machine's cores can do at most."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from embedding_server.backends.runtime import onnxruntime

__all__ = ["Peak", "machine_peak"]

_SOURCE = Path(__file__).with_name("fma_peak.c")
_FLAGS = ("-O3", "-ffp-contract=fast", "-pthread")
_NATIVE = ("-march=native", "-mcpu=native")
"""Code for this processor; not every compiler knows both flags."""

_PRODUCT = (512, 384, 1536)
"""The product that reached the most: 97 % of the fma peak on an AVX-512 machine."""
_PRODUCT_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Peak:
    """``measure()`` returns GFLOP/s: call it several times, and take the best."""

    source: str
    measure: Callable[[], float]


@contextmanager
def machine_peak(threads: int) -> Iterator[Peak]:
    """Chains of fused multiply-adds in C if there is a compiler, else a product of ONNX Runtime.

    The runtime's best matrix product comes near, but a machine for which it has slow kernels
    would look slow itself.
    """
    with tempfile.TemporaryDirectory() as folder:
        program = _compile(Path(folder))
        if program is None:
            product = " x ".join(map(str, _PRODUCT))
            yield Peak(f"matrix product {product} of ONNX Runtime", _matrix_product(threads))
            return

        def run() -> float:
            done = subprocess.run(  # noqa: S603
                [program, str(threads)], check=True, capture_output=True, text=True
            )
            return float(done.stdout)

        yield Peak("fused multiply-adds in C", run)


def _compile(folder: Path) -> Path | None:
    """The program, or None if no compiler makes one that runs."""
    chosen = shlex.split(os.environ.get("CC", ""))
    compilers = [chosen] if chosen else [["cc"], ["gcc"], ["clang"]]
    program = folder / "fma_peak"
    for compiler in compilers:
        if shutil.which(compiler[0]) is None:
            continue
        for native in _NATIVE:
            command = [*compiler, *_FLAGS, native, str(_SOURCE), "-o", str(program)]
            try:
                subprocess.run(command, check=True, capture_output=True)  # noqa: S603
                subprocess.run([program, "1"], check=True, capture_output=True)  # noqa: S603
            except (OSError, subprocess.CalledProcessError):
                continue
            return program
    return None


def _matrix_product(threads: int) -> Callable[[], float]:
    rows, inner, columns = _PRODUCT
    chance = np.random.default_rng(0)
    weights = chance.standard_normal((inner, columns), dtype=np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weights"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, inner])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, columns])],
        [numpy_helper.from_array(weights, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feeds = {"x": chance.standard_normal((rows, inner), dtype=np.float32)}

    def run() -> float:
        best = float("inf")
        end = time.perf_counter() + _PRODUCT_SECONDS
        while time.perf_counter() < end:
            started = time.perf_counter()
            session.run(None, feeds)
            best = min(best, time.perf_counter() - started)
        return 2 * rows * inner * columns / best / 1e9

    return run
