# SPDX-License-Identifier: MIT OR Apache-2.0
"""Static embedding models (model2vec, potion): a table of token vectors and their mean.

A table in half precision is computed in float32, as all weights are. sentence-transformers keeps
its precision unless float32 is requested; see "Precision" in docs/models.md.
"""

from __future__ import annotations

from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from embedding_server.backends.base import BackendOptions, Pipeline
from embedding_server.backends.head import Projection
from embedding_server.backends.weights import Weights
from embedding_server.engine.batch import Batch
from embedding_server.errors import ModelNotSupported

__all__ = ["TABLE_TENSORS", "StaticBackend"]

TABLE_TENSORS = frozenset({"embedding.weight", "embeddings", "mapping", "weights"})
"""Every tensor that sentence-transformers reads of a static model."""

_Values = TypeVar("_Values", bound=NDArray[Any])


class StaticBackend:
    """sentence-transformers' ``StaticEmbedding``: no token sees another, so there is no graph."""

    padded = False
    exclusive = False
    tokenizer = None
    # A token costs the copying of one row, so a batch may hold very many.
    default_batch_tokens = 65_536

    def __init__(self, table: NDArray[np.float32], projection: Projection) -> None:
        self._table = table
        self._projection = projection
        self.dims = projection.dims
        self.vocab_size = len(table)

    @classmethod
    def load(cls, pipeline: Pipeline, options: BackendOptions) -> Self:
        """Read the table; raises ModelNotSupported for any other kind of model."""
        if pipeline.body != "StaticEmbedding":
            raise ModelNotSupported(f"{pipeline.folder} is no static embedding model.")
        weights = Weights.open(pipeline.transformer)
        table = _read_table(weights)
        weights.check_all_read()
        _check_dense(pipeline, weights)
        return cls(table, Projection.from_modules(pipeline.modules, table.shape[1]))

    def embed(self, batch: Batch, *, wide: bool = False) -> NDArray[np.float32]:
        """float32 [len(batch), dims]; a text without tokens gives zeros. See ``Backend.embed``."""
        rows = self._table[batch.input_ids]
        bounds = batch.cu_seqlens.tolist()
        means = np.zeros((len(batch), rows.shape[1]), dtype=np.float32)
        for index in range(len(batch)):
            start, end = bounds[index], bounds[index + 1]
            if end > start:
                means[index] = np.add.reduce(rows[start:end], dtype=np.float64) / (end - start)
        return self._projection(means)


def _read_table(weights: Weights) -> NDArray[np.float32]:
    """One row for each token id, float32 [vocabulary, dims]."""
    if "embedding.weight" in weights:
        return _checked(weights, "embedding.weight", weights.array("embedding.weight"), 2)
    # model2vec's names: ids may share rows, and each id may have a weight.
    table = _checked(weights, "embeddings", weights.array("embeddings"), 2)
    if "mapping" in weights:
        mapping = _checked(weights, "mapping", weights.integers("mapping"), 1)
        if mapping.min() < 0 or mapping.max() >= len(table):
            raise ModelNotSupported(
                f"The tensor 'mapping' in {weights['mapping'].file} names rows that the "
                f"{len(table)} of 'embeddings' don't have."
            )
        table = table[mapping]
    if "weights" in weights:
        factors = _checked(weights, "weights", weights.array("weights"), 1)
        if len(factors) != len(table):
            raise ModelNotSupported(
                f"The tensor 'weights' in {weights['weights'].file} has {len(factors)} values for "
                f"{len(table)} tokens."
            )
        table = table * factors[:, None]
    return table


def _check_dense(pipeline: Pipeline, weights: Weights) -> None:
    """Refuse Dense layers that sentence-transformers rounds to the table's precision."""
    name = "embedding.weight" if "embedding.weight" in weights else "embeddings"
    kept = weights[name].dtype
    if kept == "F32" or "weights" in weights:  # with which it computes in float32
        return
    for module in pipeline.modules:
        if module.kind == "Dense":
            for tensor in Weights.open(module.folder).values():
                if tensor.dtype != kept:
                    raise ModelNotSupported(
                        f"{tensor.file} is {tensor.dtype}, which sentence-transformers rounds to "
                        f"the {kept} of {name!r} in {weights[name].file}. Save both in one "
                        "precision: SentenceTransformer(folder).float().save_pretrained(folder)."
                    )


def _checked(weights: Weights, name: str, values: _Values, axes: int) -> _Values:
    if values.ndim != axes or not values.size:
        raise ModelNotSupported(
            f"The tensor {name!r} in {weights[name].file} has the shape {list(values.shape)}."
        )
    return values
