# SPDX-License-Identifier: MIT OR Apache-2.0
"""The modules after the transformer: pooling and dense layers, in numpy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from embedding_server.backends.base import Module, Pipeline
from embedding_server.backends.pooling import POOLINGS, pool
from embedding_server.backends.weights import Weights
from embedding_server.engine.batch import Batch
from embedding_server.errors import ModelNotSupported

__all__ = ["DENSE_ACTIVATIONS", "Head", "Projection", "pooling_modes"]

_POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""The older config's booleans, in the order in which sentence-transformers concatenates."""

_POOLING_KEYS = {"word_embedding_dimension", "embedding_dimension", "include_prompt"}

DENSE_ACTIVATIONS: Mapping[str, Callable[[NDArray[np.float32]], NDArray[np.float32]]] = {
    "torch.nn.modules.activation.Tanh": np.tanh,
    "torch.nn.modules.linear.Identity": lambda x: x,
}

_DENSE_KEYS = {"in_features", "out_features", "bias", "activation_function"}
_DENSE_DEFAULTS: Mapping[str, tuple[object, ...]] = {
    "module_input_name": (None, "sentence_embedding"),
    "module_output_name": (None, "sentence_embedding"),
    "use_residual": (None, False),
}
"""Options of ``Dense`` that are computed with these values only."""


@dataclass(frozen=True, slots=True)
class _Dense:
    weight: NDArray[np.float32]
    bias: NDArray[np.float32] | None
    activation: Callable[[NDArray[np.float32]], NDArray[np.float32]]

    def __call__(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        vectors = vectors @ self.weight.T
        return self.activation(vectors if self.bias is None else vectors + self.bias)


@dataclass(frozen=True, slots=True)
class Projection:
    """The ``Dense`` layers over pooled vectors; often there are none."""

    layers: tuple[_Dense, ...]
    dims: int
    """Length of what comes out."""

    @classmethod
    def from_modules(cls, modules: Sequence[Module], dims: int) -> Self:
        """The layers of ``modules`` over vectors of ``dims``, up to a final ``Normalize``.

        Raises ModelNotSupported for a module or an option that isn't computed here.
        """
        rest = list(modules)
        while rest and rest[-1].kind == "Normalize":
            rest.pop()
        layers = []
        for module in rest:
            if module.kind != "Dense":
                raise ModelNotSupported(f"The module {module.kind} is not computed here.")
            layer = _load_dense(module)
            if layer.weight.shape[1] != dims:
                raise ModelNotSupported(
                    f"{module.folder} takes {layer.weight.shape[1]} values, not the {dims} it gets."
                )
            dims = layer.weight.shape[0]
            layers.append(layer)
        return cls(tuple(layers), dims)

    def __call__(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """float32 [n, in] to float32 [n, dims]."""
        for layer in self.layers:
            vectors = layer(vectors)
        return vectors


@dataclass(frozen=True, slots=True)
class Head:
    """Packed states in, vectors out: ``Pooling``, any ``Dense``, and no final ``Normalize``."""

    modes: tuple[str, ...]
    projection: Projection

    @classmethod
    def from_pipeline(cls, pipeline: Pipeline, hidden: int) -> Self:
        """The head over states of width ``hidden``.

        Raises ModelNotSupported for a module or an option that isn't computed here.
        """
        kinds = [module.kind for module in pipeline.modules]
        if kinds[:1] != ["Pooling"]:
            raise ModelNotSupported(
                f"Pooling must follow the transformer, not {kinds[0] if kinds else 'nothing'}."
            )
        modes = pooling_modes(pipeline.modules[0].config)
        projection = Projection.from_modules(pipeline.modules[1:], hidden * len(modes))
        return cls(modes, projection)

    @property
    def dims(self) -> int:
        return self.projection.dims

    def __call__(self, states: NDArray[np.float32], batch: Batch) -> NDArray[np.float32]:
        """Packed ``states`` [T, hidden] to float32 [n, dims]."""
        return self.projection(pool(states, batch, self.modes))


def pooling_modes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The modes of a ``Pooling`` config, of either generation.

    Raises ModelNotSupported for a mode or a key that isn't known.
    """
    unknown = set(config) - _POOLING_KEYS - set(_POOLING_FLAGS) - {"pooling_mode"}
    if unknown:
        raise ModelNotSupported(
            f"Pooling has options not known here: {', '.join(sorted(unknown))}."
        )
    if "pooling_mode" in config:
        mode = config["pooling_mode"]
        modes = tuple(mode) if isinstance(mode, list) else (mode,)
    else:
        modes = tuple(mode for flag, mode in _POOLING_FLAGS.items() if config.get(flag))
        modes = modes or ("mean",)
    unsupported = [m for m in modes if not isinstance(m, str) or m not in POOLINGS]
    if unsupported or not modes:
        raise ModelNotSupported(
            f"Pooling {', '.join(map(repr, unsupported)) or 'by no mode'} is not computed here; "
            f"there are {', '.join(POOLINGS)}."
        )
    return modes


def _load_dense(module: Module) -> _Dense:
    unknown = sorted(
        key
        for key, value in module.config.items()
        if key not in _DENSE_KEYS and value not in _DENSE_DEFAULTS.get(key, ())
    )
    if unknown:
        raise ModelNotSupported(
            f"{module.folder} has options not computed here: {', '.join(unknown)}."
        )
    name = module.config.get("activation_function", "torch.nn.modules.activation.Tanh")
    if not isinstance(name, str) or name not in DENSE_ACTIVATIONS:
        raise ModelNotSupported(f"{module.folder} has the activation {name!r}, not computed here.")
    weights = Weights.open(module.folder)
    weight = weights.array("linear.weight")
    bias = weights.array("linear.bias") if module.config.get("bias", True) else None
    weights.check_all_read()
    if weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        raise ModelNotSupported(f"The weights in {module.folder} have the wrong shape.")
    return _Dense(weight, bias, DENSE_ACTIVATIONS[name])
