"""Builds an ONNX graph for ONNX Runtime from a model's config and safetensors.

The graph is *packed*: every linear layer runs over the tokens of all sequences laid end to
end, ``[T, hidden]``, so nothing is computed for padding. Attention loops over runs of
sequences of equal length, each without a mask, which is exact, lets ONNX Runtime take its
flash kernel (no ``[heads, L, L]`` in memory) and measured as fast as one padded call.

Weights stay in their files: the graph names file and offset, and the runtime maps them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from embedding_server.backends.architectures import Activation, Architecture
from embedding_server.backends.weights import Weights
from embedding_server.errors import ModelNotSupported

__all__ = ["Graph", "build_graph"]

_MICROSOFT = "com.microsoft"
_OPSETS = (helper.make_opsetid("", 20), helper.make_opsetid(_MICROSOFT, 1))
_IR_VERSION = 10


@dataclass(frozen=True, slots=True)
class Graph:
    """A graph, and the weights that lie in no file as the graph needs them.

    Inputs: ``input_ids`` and ``position_ids`` int64 [T], ``runs`` int64 [R, 3] with the first
    row, the row after the last and the length of each run. Output: ``states`` float32
    [T, hidden].
    """

    model: bytes
    arrays: dict[str, NDArray[np.float32]]


def build_graph(architecture: Architecture, weights: Weights) -> Graph:
    """The packed graph of ``architecture``; raises ModelNotSupported if the weights don't fit."""
    return _Builder(architecture, architecture.open_weights(weights)).build()


@dataclass(slots=True)
class _Nodes:
    """A graph under construction, or a loop's body; names are unique over all of them."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    names: set[str] = field(default_factory=set)

    def body(self) -> _Nodes:
        return _Nodes(names=self.names)

    def unique(self, stem: str) -> str:
        name = f"{stem}_{len(self.names)}"
        self.names.add(name)
        return name

    def add(
        self,
        op: str,
        inputs: Iterable[str],
        *,
        outputs: int = 1,
        domain: str = "",
        **attributes: Any,
    ) -> Any:
        """Add one node; its output's name, or the list of them."""
        names = [self.unique(op) for _ in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, domain=domain, **attributes))
        return names[0] if outputs == 1 else names


class _Builder:
    def __init__(self, architecture: Architecture, weights: Weights) -> None:
        self._arch = architecture
        self._weights = weights
        self._graph = _Nodes()
        self._initializers: dict[str, TensorProto] = {}
        self._arrays: dict[str, NDArray[np.float32]] = {}

    def build(self) -> Graph:
        states = self._embeddings()
        for number in range(self._arch.layers):
            states = self._layer(self._arch.layer.format(number), states)
        self._graph.nodes.append(helper.make_node("Identity", [states], ["states"]))
        inputs = [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["T"]),
            helper.make_tensor_value_info("position_ids", TensorProto.INT64, ["T"]),
            helper.make_tensor_value_info("runs", TensorProto.INT64, ["R", 3]),
        ]
        output = helper.make_tensor_value_info(
            "states", TensorProto.FLOAT, ["T", self._arch.hidden]
        )
        graph = helper.make_graph(
            self._graph.nodes, "packed", inputs, [output], list(self._initializers.values())
        )
        model = helper.make_model(graph, opset_imports=_OPSETS, ir_version=_IR_VERSION)
        return Graph(model.SerializeToString(), self._arrays)

    def _embeddings(self) -> str:
        arch, add = self._arch, self._graph.add
        words = self._weight(
            f"{arch.embeddings}word_embeddings.weight", (arch.vocab_size, arch.hidden)
        )
        positions = self._weight(
            f"{arch.embeddings}position_embeddings.weight", (arch.positions, arch.hidden)
        )
        inputs = [
            add("Gather", [words, "input_ids"]),
            add("Gather", [positions, "position_ids"]),
            *self._norm(f"{arch.embeddings}LayerNorm"),
        ]
        if arch.types:
            # A text has one type only, so its row is a bias.
            name = f"{arch.embeddings}token_type_embeddings.weight"
            self._check_shape(name, (arch.types, arch.hidden))
            inputs.append(self._array(name + "[0]", self._weights.array(name)[0]))
        return self._skip_layer_norm(inputs)

    def _layer(self, prefix: str, states: str) -> str:
        arch, names = self._arch, self._arch.names
        qkv = self._qkv(prefix, states)
        attended = self._linear(
            prefix + names.attention_output, self._attention(qkv), (arch.hidden, arch.hidden)
        )
        states = self._add_and_norm(
            attended, states, prefix + names.attention_output, prefix + names.attention_norm
        )
        up = self._linear(
            prefix + names.mlp_up, states, (arch.intermediate, arch.hidden), bias=True
        )
        down = self._linear(
            prefix + names.mlp_down,
            self._activate(arch.activation, up),
            (arch.hidden, arch.intermediate),
        )
        return self._add_and_norm(down, states, prefix + names.mlp_down, prefix + names.mlp_norm)

    def _qkv(self, prefix: str, states: str) -> str:
        """Queries, keys and values side by side, [T, 3 * hidden], from one product."""
        arch, names = self._arch, self._arch.names
        parts = [prefix + name for name in (names.query, names.key, names.value)]
        for part in parts:
            self._check_shape(part + ".weight", (arch.hidden, arch.hidden))
            self._check_shape(part + ".bias", (arch.hidden,))
        merged = [
            self._array(
                f"{prefix}qkv.{kind}",
                np.concatenate([self._weights.array(f"{part}.{kind}") for part in parts]),
            )
            for kind in ("weight", "bias")
        ]
        return str(self._graph.add("Gemm", [states, *merged], transB=1))

    def _attention(self, qkv: str) -> str:
        """Self-attention within each sequence, [T, hidden]: a loop over runs of one length.

        A mask, or sequences of unequal lengths in one call, would cost the flash kernel.
        """
        graph, hidden = self._graph, self._arch.hidden
        body = graph.body()
        step, condition, done = (body.unique(name) for name in ("step", "condition", "done"))
        going_on, still_done = body.unique("condition"), body.unique("done")
        run = body.add("Gather", ["runs", step])
        start, end, length = body.add(
            "Split", [run, self._ints("three_ones", [1, 1, 1])], outputs=3, axis=0
        )
        shape = body.add(
            "Concat",
            [self._ints("minus_one", [-1]), length, self._ints("three_hidden", [3 * hidden])],
            axis=0,
        )
        rows = body.add("Slice", [qkv, start, end, self._ints("zero", [0])])
        padded = body.add("Reshape", [rows, shape])
        parts = body.add("Split", [padded], outputs=3, axis=2, num_outputs=3)
        attended = body.add(
            "MultiHeadAttention", parts, domain=_MICROSOFT, num_heads=self._arch.heads
        )
        packed = body.add("Reshape", [attended, self._ints("rows", [-1, hidden])])
        body.nodes += [
            helper.make_node("SequenceInsert", [done, packed], [still_done]),
            helper.make_node("Identity", [condition], [going_on]),
        ]
        loop = helper.make_graph(
            body.nodes,
            body.unique("attention"),
            [
                helper.make_tensor_value_info(step, TensorProto.INT64, []),
                helper.make_tensor_value_info(condition, TensorProto.BOOL, []),
                helper.make_tensor_sequence_value_info(done, TensorProto.FLOAT, None),
            ],
            [
                helper.make_tensor_value_info(going_on, TensorProto.BOOL, []),
                helper.make_tensor_sequence_value_info(still_done, TensorProto.FLOAT, None),
            ],
        )
        empty = graph.add("SequenceEmpty", [])
        sequences = graph.add("Loop", [self._number_of_runs(), "", empty], body=loop)
        return str(graph.add("ConcatFromSequence", [sequences], axis=0))

    def _number_of_runs(self) -> str:
        shape = self._graph.add("Shape", ["runs"], start=0, end=1)
        return str(self._graph.add("Squeeze", [shape]))

    def _add_and_norm(self, states: str, skip: str, dense: str, norm: str) -> str:
        bias = self._weight(f"{dense}.bias", (self._arch.hidden,))
        return self._skip_layer_norm([states, skip, *self._norm(norm), bias])

    def _skip_layer_norm(self, inputs: list[str]) -> str:
        return str(
            self._graph.add(
                "SkipLayerNormalization", inputs, domain=_MICROSOFT, epsilon=self._arch.norm_eps
            )
        )

    def _linear(self, name: str, states: str, shape: tuple[int, int], *, bias: bool = False) -> str:
        inputs = [states, self._weight(f"{name}.weight", shape)]
        if bias:
            inputs.append(self._weight(f"{name}.bias", shape[:1]))
        return str(self._graph.add("Gemm", inputs, transB=1))

    def _activate(self, activation: Activation, states: str) -> str:
        add = self._graph.add
        match activation:
            case "gelu":
                return str(add("Gelu", [states]))
            case "gelu_tanh":
                return str(add("Gelu", [states], approximate="tanh"))
            case "relu":
                return str(add("Relu", [states]))
            case "silu":
                return str(add("QuickGelu", [states], domain=_MICROSOFT, alpha=1.0))
            case "quick_gelu":
                return str(add("QuickGelu", [states], domain=_MICROSOFT, alpha=1.702))

    def _norm(self, name: str) -> list[str]:
        return [self._weight(f"{name}.{kind}", (self._arch.hidden,)) for kind in ("weight", "bias")]

    def _weight(self, name: str, shape: tuple[int, ...]) -> str:
        """An initializer whose values are read from the model's own file."""
        self._check_shape(name, shape)
        tensor = self._weights[name]
        if not tensor.is_float32:
            return self._array(name, self._weights.array(name))
        return self._external(name, shape, tensor.file.name, tensor.offset, tensor.length)

    def _array(self, name: str, values: NDArray[np.float32]) -> str:
        """An initializer whose values are handed over with the graph."""
        self._arrays[name] = np.ascontiguousarray(values, dtype=np.float32)
        return self._external(name, values.shape, "given-by-name", 0, values.nbytes)

    def _external(
        self, name: str, shape: tuple[int, ...], location: str, offset: int, length: int
    ) -> str:
        if name not in self._initializers:
            tensor = TensorProto(
                name=name,
                data_type=TensorProto.FLOAT,
                dims=shape,
                data_location=TensorProto.EXTERNAL,
            )
            entries = {"location": location, "offset": str(offset), "length": str(length)}
            for key, value in entries.items():
                tensor.external_data.append(onnx.StringStringEntryProto(key=key, value=value))
            self._initializers[name] = tensor
        return name

    def _ints(self, name: str, values: list[int]) -> str:
        if name not in self._initializers:
            self._initializers[name] = helper.make_tensor(
                name, TensorProto.INT64, [len(values)], values
            )
        return name

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        found = self._weights[name].shape
        if found != shape:
            raise ModelNotSupported(
                f"The tensor {name!r} has the shape {list(found)}, but config.json asks for "
                f"{list(shape)}."
            )
