# SPDX-License-Identifier: MIT OR Apache-2.0
"""Builds an ONNX graph for ONNX Runtime from a model's config and safetensors.

The graph is *packed*: every linear layer runs over the tokens of all sequences laid end to
end, ``[T, hidden]``, so nothing is computed for padding. Attention loops over runs of
sequences of equal length, each without a mask, which is exact, lets ONNX Runtime take its
flash kernel (no ``[heads, L, L]`` in memory) and measured as fast as one padded call. Only
sliding windows work on blocks that are padded and masked.

Weights stay in their files: the graph names file and offset, and the runtime maps them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from embedding_server.backends.architectures import Architecture, Attention, Rotary
from embedding_server.backends.inputs import (
    distance_buckets,
    rotaries,
    rotary_name,
    window_name,
)
from embedding_server.backends.weights import Weights
from embedding_server.errors import ModelNotSupported

__all__ = ["Graph", "build_graph"]

_MICROSOFT = "com.microsoft"
_OPSETS = (helper.make_opsetid("", 20), helper.make_opsetid(_MICROSOFT, 1))
_IR_VERSION = 10


@dataclass(frozen=True, slots=True)
class Graph:
    """A graph, and the weights that no file holds in the form that the graph needs.

    Its inputs are those of ``GraphInputs``; its output is ``states`` float32 [T, hidden].
    """

    model: bytes
    arrays: dict[str, NDArray[np.float32]]
    folder: Path
    """Where the files lie that the graph names."""


def build_graph(architecture: Architecture, weights: Weights) -> Graph:
    """The packed graph of ``architecture``; raises ModelNotSupported if the weights don't fit."""
    tensors = architecture.tensors
    named = weights.without_prefix(*tensors.prefixes, known=f"{tensors.words}.weight")
    return _Builder(architecture, named).build()


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

    def add(self, op: str, inputs: Iterable[str], *, domain: str = "", **attributes: Any) -> str:
        """Add one node; its output's name."""
        return self.add_with_outputs(1, op, inputs, domain=domain, **attributes)[0]

    def add_with_outputs(
        self, count: int, op: str, inputs: Iterable[str], *, domain: str = "", **attributes: Any
    ) -> list[str]:
        names = [self.unique(op) for _ in range(count)]
        self.nodes.append(helper.make_node(op, list(inputs), names, domain=domain, **attributes))
        return names


class _Builder:
    def __init__(self, architecture: Architecture, weights: Weights) -> None:
        self._arch = architecture
        self._tensors = architecture.tensors
        self._weights = weights
        self._graph = _Nodes()
        self._inputs: dict[str, onnx.ValueInfoProto] = {}
        self._initializers: dict[str, TensorProto] = {}
        self._arrays: dict[str, NDArray[np.float32]] = {}
        self._rotaries = rotaries(architecture)
        self._folder = weights[f"{self._tensors.words}.weight"].file.parent

    def build(self) -> Graph:
        arch, tensors = self._arch, self._tensors
        # The stream of residuals, and the same normed: what sublayers read.
        stream = normed = self._embeddings()
        if arch.pre_norm and arch.first_attention_norm:
            normed = self._norm(stream, self._in_layer(0, tensors.attention_norm))
        for number, attention in enumerate(arch.attention):
            attended = self._attention_layer(number, attention, normed)
            norm = tensors.mlp_norm if arch.pre_norm else tensors.attention_norm
            stream, normed = self._add(attended, stream, self._in_layer(number, norm))
            stream, normed = self._add(self._mlp(number, normed), stream, self._norm_after(number))
        self._weights.check_all_read(*tensors.unused)
        self._graph.nodes.append(helper.make_node("Identity", [normed], ["states"]))
        output = helper.make_tensor_value_info("states", TensorProto.FLOAT, ["T", arch.hidden])
        graph = helper.make_graph(
            self._graph.nodes,
            "packed",
            list(self._inputs.values()),
            [output],
            list(self._initializers.values()),
        )
        model = helper.make_model(graph, opset_imports=_OPSETS, ir_version=_IR_VERSION)
        return Graph(model.SerializeToString(), self._arrays, self._folder)

    def _in_layer(self, number: int, name: str) -> str:
        return self._tensors.layer.format(number) + name

    def _norm_after(self, number: int) -> str:
        """The norm that follows the sum after the layer's MLP."""
        arch = self._arch
        if not arch.pre_norm:
            return self._in_layer(number, self._tensors.mlp_norm)
        if number + 1 < len(arch.attention):
            return self._in_layer(number + 1, self._tensors.attention_norm)
        assert self._tensors.final_norm is not None
        return self._tensors.final_norm

    def _embeddings(self) -> str:
        arch, tensors, add = self._arch, self._tensors, self._graph.add
        words = self._weight(f"{tensors.words}.weight", (arch.vocab_size, arch.hidden))
        states = add("Gather", [words, self._input("input_ids", TensorProto.INT64, ["T"])])
        if tensors.types is not None:
            # A text has one type only, so its row is added to every token.
            name = f"{tensors.types}.weight"
            self._check_shape(name, (arch.type_rows, arch.hidden))
            states = add("Add", [states, self._array(f"{name}[0]", self._weights.array(name)[0])])
        if arch.positions is not None:
            shape = (arch.positions.rows, arch.hidden)
            table = self._weight(f"{tensors.positions}.weight", shape)
            ids = self._input("position_ids", TensorProto.INT64, ["T"])
            states = add("Add", [states, add("Gather", [table, ids])])
        if tensors.embedding_norm is not None:
            states = self._norm(states, tensors.embedding_norm)
        return states

    def _attention_layer(self, number: int, attention: Attention, states: str) -> str:
        """Attention and its output projection, [T, hidden]."""
        arch = self._arch
        width, kv_width = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
        qkv = self._qkv(number, states, width + 2 * kv_width)
        if self._tensors.head_norms is not None or attention.rotary is not None:
            qk, v = self._split(qkv, [width + kv_width, kv_width])
            if self._tensors.head_norms is not None:
                qk = self._norm_heads(number, qk, [width, kv_width])
            if attention.rotary is not None:
                qk = self._rotate(qk, attention.rotary)
            qkv = self._graph.add("Concat", [qk, v], axis=1)
        if attention.window is not None:
            attended = self._windowed(qkv)
        else:
            attended = self._looped(qkv, causal=attention.causal)
        name = self._in_layer(number, self._tensors.attention_output)
        return self._linear(attended, name, (arch.hidden, width), bias=arch.attention_bias)

    def _qkv(self, number: int, states: str, width: int) -> str:
        """Queries, keys and values side by side, [T, width], from one product."""
        arch = self._arch
        names = [self._in_layer(number, name) for name in self._tensors.qkv]
        if len(names) == 1:
            return self._linear(states, names[0], (width, arch.hidden), bias=arch.attention_bias)
        rows = [arch.heads * arch.head_dim, *[arch.kv_heads * arch.head_dim] * 2]
        inputs = [states, self._merged(names, "weight", [(size, arch.hidden) for size in rows])]
        if arch.attention_bias:
            inputs.append(self._merged(names, "bias", [(size,) for size in rows]))
        return self._graph.add("Gemm", inputs, transB=1)

    def _merged(self, names: list[str], kind: str, shapes: list[tuple[int, ...]]) -> str:
        for name, shape in zip(names, shapes, strict=True):
            self._check_shape(f"{name}.{kind}", shape)
        arrays = [self._weights.array(f"{name}.{kind}") for name in names]
        return self._array(f"{'+'.join(names)}.{kind}", np.concatenate(arrays))

    def _norm_heads(self, number: int, qk: str, widths: list[int]) -> str:
        """RMS norm over each head by itself."""
        arch, add = self._arch, self._graph.add
        assert self._tensors.head_norms is not None
        normed = []
        for part, name in zip(self._split(qk, widths), self._tensors.head_norms, strict=True):
            weight = self._weight(f"{self._in_layer(number, name)}.weight", (arch.head_dim,))
            heads = add("Reshape", [part, self._ints([0, -1, arch.head_dim])])
            heads = self._rms_norm(heads, weight)
            normed.append(add("Flatten", [heads], axis=1))
        return add("Concat", normed, axis=1)

    def _rotate(self, qk: str, rotary: Rotary) -> str:
        """Queries and keys turned by their positions, all heads in one call."""
        add, half = self._graph.add, self._arch.head_dim // 2
        cos, sin = (
            self._input(name, TensorProto.FLOAT, ["T", half])
            for name in rotary_name(self._rotaries.index(rotary))
        )
        ids = self._input("rotary_ids", TensorProto.INT64, [1, "T"])
        one_batch = add("Unsqueeze", [qk, self._ints([0])])
        rotated = add(
            "RotaryEmbedding",
            [one_batch, ids, cos, sin],
            domain=_MICROSOFT,
            num_heads=self._arch.heads + self._arch.kv_heads,
        )
        return add("Squeeze", [rotated, self._ints([0])])

    def _looped(self, qkv: str, *, causal: bool) -> str:
        """Attention within each sequence, [T, heads * head_dim]: a loop over runs of one length.

        A mask, or sequences of unequal lengths in one call, would cost the flash kernel.
        """
        arch, graph = self._arch, self._graph
        width, kv_width = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
        runs = self._input("runs", TensorProto.INT64, ["R", 3])
        body = graph.body()
        step, condition, done = (body.unique(name) for name in ("step", "condition", "done"))
        going_on, still_done = body.unique("condition"), body.unique("done")
        run = body.add("Gather", [runs, step])
        start, end, length = self._split(run, [1, 1, 1], axis=0, nodes=body)
        shape = body.add(
            "Concat", [self._ints([-1]), length, self._ints([width + 2 * kv_width])], axis=0
        )
        rows = body.add("Slice", [qkv, start, end, self._ints([0])])
        sequences = body.add("Reshape", [rows, shape])
        parts = self._split(sequences, [width, kv_width, kv_width], axis=2, nodes=body)
        if causal:
            attended = self._causal(body, parts, length)
        else:
            parts = [parts[0], *(self._repeat_heads(body, part) for part in parts[1:])]
            bias = self._distance_bias(body, length)
            inputs = [*parts, "", "", bias] if bias else parts
            attended = body.add(
                "MultiHeadAttention", inputs, domain=_MICROSOFT, num_heads=arch.heads
            )
        packed = body.add("Reshape", [attended, self._ints([-1, width])])
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
        number_of_runs = graph.add("Squeeze", [graph.add("Shape", [runs], start=0, end=1)])
        empty = graph.add("SequenceEmpty", [])
        results = graph.add("Loop", [number_of_runs, "", empty], body=loop)
        return graph.add("ConcatFromSequence", [results], axis=0)

    def _causal(self, body: _Nodes, parts: list[str], length: str) -> str:
        """Causal attention of one run; grouped heads share keys and values."""
        arch, add = self._arch, body.add
        total = add("Cast", [add("Squeeze", [length])], to=TensorProto.INT32)
        # The attention kernels count in int32.
        last = add("Cast", [add("Sub", [length, self._ints([1])])], to=TensorProto.INT32)
        sequences = add("Shape", [parts[0]], start=0, end=1)
        attended, _, _ = body.add_with_outputs(
            3,
            "GroupQueryAttention",
            [*parts, "", "", add("Expand", [last, sequences]), total],
            domain=_MICROSOFT,
            num_heads=arch.heads,
            kv_num_heads=arch.kv_heads,
        )
        return attended

    def _repeat_heads(self, body: _Nodes, part: str) -> str:
        """Keys or values [n, L, kv_heads * head_dim] once for each query head of their group.

        Only the causal kernel shares them among heads by itself.
        """
        arch, add = self._arch, body.add
        group = arch.heads // arch.kv_heads
        if group == 1:
            return part
        grouped = add("Reshape", [part, self._ints([0, 0, arch.kv_heads, 1, arch.head_dim])])
        repeated = add("Expand", [grouped, self._ints([1, 1, 1, group, 1])])
        return add("Reshape", [repeated, self._ints([0, 0, arch.heads * arch.head_dim])])

    def _distance_bias(self, body: _Nodes, length: str) -> str | None:
        """The bias by distance for sequences of ``length``, [1, heads, length, length]."""
        arch = self._arch
        if self._tensors.relative_bias is None:
            return None
        assert arch.positions is not None
        name = f"{self._tensors.relative_bias}.weight"
        table = self._weights.array(name)
        buckets = distance_buckets(arch.positions.rows)
        if table.shape[1:] != (arch.heads,) or len(table) <= buckets.max():
            raise ModelNotSupported(f"The tensor {name!r} has the shape {list(table.shape)}.")
        bias = self._array(f"{name}[distance]", table[buckets].transpose(2, 0, 1)[None])
        ends = body.add("Concat", [length, length], axis=0)
        return body.add("Slice", [bias, self._ints([0, 0]), ends, self._ints([2, 3])])

    def _windowed(self, qkv: str) -> str:
        """Attention to near tokens only: blocks of queries, each with the keys around it."""
        arch, add = self._arch, self._graph.add
        width = arch.heads * arch.head_dim
        parts = self._split(qkv, [width, width, width])
        shapes: dict[str, tuple[int, list[int | str]]] = {
            "queries": (TensorProto.INT64, ["N", "B"]),
            "keys": (TensorProto.INT64, ["N", "S"]),
            "mask": (TensorProto.INT32, ["N", "S"]),
            "band": (TensorProto.FLOAT, [1, 1, "B", "S"]),
            "rows": (TensorProto.INT64, ["T"]),
        }
        inputs = {
            part: self._input(window_name(part), dtype, shape)
            for part, (dtype, shape) in shapes.items()
        }
        places = [inputs["queries"], inputs["keys"], inputs["keys"]]
        q, k, v = (add("Gather", pair) for pair in zip(parts, places, strict=True))
        attended = add(
            "MultiHeadAttention",
            [q, k, v, "", inputs["mask"], inputs["band"]],
            domain=_MICROSOFT,
            num_heads=arch.heads,
            mask_filter_value=float(np.finfo(np.float32).min),
        )
        blocks = add("Reshape", [attended, self._ints([-1, width])])
        return add("Gather", [blocks, inputs["rows"]])

    def _mlp(self, number: int, states: str) -> str:
        """The MLP, [T, hidden]."""
        arch, add = self._arch, self._graph.add
        names = [self._in_layer(number, name) for name in self._tensors.mlp_in]
        rows = arch.intermediate * (2 if arch.gated and len(names) == 1 else 1)
        parts = [
            self._linear(states, name, (rows, arch.hidden), bias=arch.mlp_bias) for name in names
        ]
        if arch.gated and len(names) == 1:
            parts = self._split(parts[0], [arch.intermediate] * 2)
        expanded = self._activate(parts[0])
        if arch.gated:
            expanded = add("Mul", [expanded, parts[1]])
        name = self._in_layer(number, self._tensors.mlp_out)
        return self._linear(expanded, name, (arch.hidden, arch.intermediate), bias=arch.mlp_bias)

    def _add(self, states: str, stream: str, norm: str) -> tuple[str, str]:
        """``(new stream, its norm)`` of the stream plus a sublayer's states.

        Two plain operators: the fused one (SkipLayerNormalization) is not vectorised and took
        six times as long.
        """
        total = self._graph.add("Add", [states, stream])
        normed = self._norm(total, norm)
        return (total if self._arch.pre_norm else normed), normed

    def _norm(self, states: str, name: str) -> str:
        arch, shape = self._arch, (self._arch.hidden,)
        weight = self._weight(f"{name}.weight", shape)
        if arch.norm == "rms":
            return self._rms_norm(states, weight)
        inputs = [states, weight]
        if arch.norm_bias:
            inputs.append(self._weight(f"{name}.bias", shape))
        return self._graph.add("LayerNormalization", inputs, axis=-1, epsilon=arch.norm_eps)

    def _rms_norm(self, states: str, weight: str) -> str:
        # ONNX Runtime alone has it, in the default domain for historical reasons.
        inputs, epsilon = [states, weight], self._arch.norm_eps
        return self._graph.add("SimplifiedLayerNormalization", inputs, axis=-1, epsilon=epsilon)

    def _linear(self, states: str, name: str, shape: tuple[int, int], *, bias: bool = False) -> str:
        inputs = [states, self._weight(f"{name}.weight", shape)]
        if bias:
            inputs.append(self._weight(f"{name}.bias", shape[:1]))
        return self._graph.add("Gemm", inputs, transB=1)

    def _activate(self, states: str) -> str:
        add = self._graph.add
        match self._arch.activation:
            case "gelu":
                return add("Gelu", [states])
            case "gelu_tanh":
                return add("Gelu", [states], approximate="tanh")
            case "relu":
                return add("Relu", [states])
            case "silu":
                return add("QuickGelu", [states], domain=_MICROSOFT, alpha=1.0)
            case "quick_gelu":
                return add("QuickGelu", [states], domain=_MICROSOFT, alpha=1.702)

    def _split(
        self, states: str, widths: list[int], *, axis: int = 1, nodes: _Nodes | None = None
    ) -> list[str]:
        inputs = [states, self._ints(widths)]
        return (nodes or self._graph).add_with_outputs(len(widths), "Split", inputs, axis=axis)

    def _input(self, name: str, dtype: int, shape: list[int | str]) -> str:
        self._inputs.setdefault(name, helper.make_tensor_value_info(name, dtype, shape))
        return name

    def _weight(self, name: str, shape: tuple[int, ...]) -> str:
        """An initializer whose values the runtime maps from the model's own file."""
        self._check_shape(name, shape)
        tensor = self._weights[name]
        if not tensor.is_float32 or tensor.file.parent != self._folder:
            return self._array(name, self._weights.array(name))
        return self._external(name, shape, tensor.file.name, tensor.offset, tensor.length)

    def _array(self, name: str, values: NDArray[np.float32]) -> str:
        """An initializer whose values are passed to the runtime with the graph."""
        if name not in self._arrays:
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

    def _ints(self, values: list[int]) -> str:
        """A constant of int64."""
        name = f"ints_{'_'.join(map(str, values))}"
        constant = helper.make_tensor(name, TensorProto.INT64, [len(values)], values)
        self._initializers.setdefault(name, constant)
        return name

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        found = self._weights[name].shape
        if found != shape:
            raise ModelNotSupported(
                f"The tensor {name!r} has the shape {list(found)}, but config.json gives "
                f"{list(shape)}."
            )
