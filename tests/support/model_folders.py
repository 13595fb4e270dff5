# SPDX-License-Identifier: MIT OR Apache-2.0
"""What lies in the folders of real models: a cache of the hub, an exported graph."""

from __future__ import annotations

import hashlib
import shutil
import warnings
from pathlib import Path
from typing import Any

from tiny_models import TinyModel, load_reference

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def put_in_cache(folder: Path, cache: Path, repo: str, commit: str = COMMIT) -> None:
    """Lay ``folder`` into the hub's cache as its client does: links to blobs by their digest."""
    storage = cache / f"models--{repo.replace('/', '--')}"
    snapshot = storage / "snapshots" / commit
    (storage / "blobs").mkdir(parents=True, exist_ok=True)
    (storage / "refs").mkdir(exist_ok=True)
    (storage / "refs" / "main").write_text(commit)
    for file in folder.rglob("*"):
        if file.is_file():
            blob = storage / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
            shutil.copyfile(file, blob)
            link = snapshot / file.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(
                Path(*[".."] * (len(link.relative_to(storage).parts) - 1)) / "blobs" / blob.name
            )


def export_onnx(model: TinyModel, name: str = "model.onnx") -> None:
    """Write the transformer of ``model`` as an .onnx file, as a repository may bring one."""
    import torch

    transformer = load_reference(model)[0].model
    transformer.config._attn_implementation = "eager"

    class States(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transformer = transformer

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
            return self.transformer(
                input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
            ).last_hidden_state

    names = ["input_ids", "attention_mask", "token_type_ids"]
    ids = torch.ones(2, 5, dtype=torch.long)
    target = model.folder / name
    target.parent.mkdir(exist_ok=True)
    with warnings.catch_warnings():  # the exporter that needs no further package is an old one
        warnings.simplefilter("ignore")
        torch.onnx.export(
            States(),
            (ids, ids, ids * 0),
            str(target),
            input_names=names,
            output_names=["last_hidden_state"],
            dynamic_axes={
                name: {0: "batch", 1: "length"} for name in [*names, "last_hidden_state"]
            },
            opset_version=17,
            dynamo=False,
        )
