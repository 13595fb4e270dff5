# SPDX-License-Identifier: MIT OR Apache-2.0
"""ONNX Runtime on the CPU: a packed graph of ours, or the .onnx file that a model brings."""

from __future__ import annotations

from pathlib import Path, PurePath
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from embedding_server.backends.architectures import architecture_of
from embedding_server.backends.base import ONNX_FILES, BackendOptions, Pipeline
from embedding_server.backends.graph import Graph, build_graph
from embedding_server.backends.head import Head
from embedding_server.backends.inputs import GraphInputs
from embedding_server.backends.runtime import onnxruntime
from embedding_server.backends.weights import Weights
from embedding_server.engine.batch import Batch
from embedding_server.errors import ModelNotSupported

__all__ = ["OnnxFileBackend", "PackedBackend", "onnx_model_file"]

# On one core the linear layers reach their ceiling here; more only adds latency.
_BATCH_TOKENS = 96

# A file's own graph has all cores for each batch.
_FILE_BATCH_TOKENS = 512

# Families whose position_ids begin after the padding index, and are not computed here.
_COUNTED_FROM_PADDING = ("roberta", "xlm-roberta", "mpnet", "camembert", "xlm-roberta-xl")
_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
_STATES = ("last_hidden_state", "token_embeddings")

# ONNX Runtime's messages where memory runs out, for which it has no exception.
_NO_MEMORY = ("bad_alloc", "bad allocation", "Failed to allocate memory")


class PackedBackend:
    """The graph that ``build_graph`` makes of config and weights.

    ``session`` runs on the thread that calls it: as many batches at a time as there are cores
    measured faster than one batch on all of them, whose threads wait for each other in every
    layer. ``wide``, on all cores, is for one long input alone.
    """

    padded = False
    exclusive = False
    vocab_size = None
    tokenizer = None
    default_batch_tokens = _BATCH_TOKENS

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        wide: onnxruntime.InferenceSession,
        inputs: GraphInputs,
        head: Head,
    ) -> None:
        self._session = session
        self._wide = wide
        self._inputs = inputs
        self._head = head
        self.dims = head.dims

    @classmethod
    def load(cls, pipeline: Pipeline, options: BackendOptions) -> Self:
        """Build and load the graph; raises ModelNotSupported for what it can't compute exactly."""
        architecture = architecture_of(pipeline.config)
        head = Head.from_pipeline(pipeline, architecture.hidden)
        graph = build_graph(architecture, Weights.open(pipeline.transformer))
        session = wide = _packed_session(graph, 1)
        if options.threads > 1:
            wide = _packed_session(graph, options.threads)
        return cls(session, wide, GraphInputs(architecture), head)

    def embed(self, batch: Batch, *, wide: bool = False) -> NDArray[np.float32]:
        """float32 [len(batch), dims]; see ``Backend.embed``."""
        session = self._wide if wide else self._session
        return self._head(_run(session, "states", self._inputs.of(batch)), batch)


class OnnxFileBackend:
    """A model's own .onnx file, as optimum or sentence-transformers export it; pads its batches."""

    padded = True
    exclusive = True
    vocab_size = None
    tokenizer = None
    default_batch_tokens = _FILE_BATCH_TOKENS

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        head: Head,
        *,
        states: str,
        pad_token_id: int,
    ) -> None:
        self._session = session
        self._head = head
        self._states = states
        self._pad_token_id = pad_token_id
        self._inputs = {value.name for value in session.get_inputs()}
        self.dims = head.dims

    @classmethod
    def load(cls, pipeline: Pipeline, options: BackendOptions) -> Self:
        """Load the file; raises ModelNotSupported if there is none or its form isn't known."""
        file = onnx_model_file(pipeline, options.onnx_file)
        if options.onnx_file is None:
            _check_no_weights(pipeline, file)
        session = _session(str(file), _session_options(options.threads))
        for value in (*session.get_inputs(), *session.get_outputs()):
            wanted = "tensor(float)" if value.name in _STATES else "tensor(int64)"
            if value.name in (*_INPUTS, *_STATES) and value.type != wanted:
                raise ModelNotSupported(f"{file}: {value.name} is a {value.type}, not a {wanted}.")
        known = set(_INPUTS)
        if pipeline.config.get("model_type") in _COUNTED_FROM_PADDING:
            known.remove("position_ids")
        if unknown := {value.name for value in session.get_inputs()} - known:
            raise ModelNotSupported(f"{file} wants inputs not known here: {', '.join(unknown)}.")
        outputs = {value.name: value.shape for value in session.get_outputs()}
        states = next((name for name in _STATES if name in outputs), None)
        if states is None or len(outputs[states]) != 3 or not isinstance(outputs[states][-1], int):
            raise ModelNotSupported(
                f"{file} has the outputs {', '.join(outputs)}; one of {', '.join(_STATES)}, the "
                "states of every token, is needed."
            )
        head = Head.from_pipeline(pipeline, outputs[states][-1])
        return cls(session, head, states=states, pad_token_id=pipeline.pad_token_id)

    def embed(self, batch: Batch, *, wide: bool = False) -> NDArray[np.float32]:
        """float32 [len(batch), dims]; see ``Backend.embed``."""
        ids, mask = batch.padded(self._pad_token_id)
        feeds: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": mask,
            "token_type_ids": np.zeros_like(ids),
            "position_ids": np.broadcast_to(np.arange(ids.shape[1]), ids.shape),
        }
        feeds = {name: value for name, value in feeds.items() if name in self._inputs}
        states = _run(self._session, self._states, feeds)
        return self._head(states[mask.astype(bool)], batch)


def onnx_model_file(pipeline: Pipeline, name: str | None) -> Path:
    """The model's own .onnx file, or the one called ``name``; raises ModelNotSupported."""
    folder = pipeline.transformer
    for candidate in (name,) if name else ONNX_FILES:
        relative = PurePath(candidate)
        # By its name alone: in the hub's cache every file is a link to somewhere else.
        inside = not relative.is_absolute() and ".." not in relative.parts
        if inside and (folder / relative).is_file():
            return folder / relative
    raise ModelNotSupported(f"{folder} has no {name or ONNX_FILES[0]}.")


def _check_no_weights(pipeline: Pipeline, file: Path) -> None:
    """Raise ModelNotSupported if there are weights beside ``file``, which may differ from it."""
    weights = ("model.safetensors", "model.safetensors.index.json")
    if any((pipeline.transformer / name).is_file() for name in weights):
        raise ModelNotSupported(
            f"{file} may be of another config.json or other weights than those beside it: "
            f"--onnx-file {file.relative_to(pipeline.transformer)} takes it all the same."
        )


def _run(session: onnxruntime.InferenceSession, output: str, feeds: dict[str, Any]) -> Any:
    """The ``output`` of the graph; raises MemoryError where memory ran out."""
    try:
        return session.run([output], feeds)[0]
    except Exception as error:  # its exceptions share no base class of their own
        message = str(error)
        if not any(text in message for text in _NO_MEMORY):
            raise
    raise MemoryError(message)


def _packed_session(graph: Graph, threads: int) -> onnxruntime.InferenceSession:
    options = _session_options(threads)
    # The runtime's fusions would undo parts of the graph.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(graph.folder)
    )
    options.add_external_initializers(
        list(graph.arrays),
        [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in graph.arrays.values()],
    )
    if threads > 1:
        # Packed weights are a second copy, and make no difference to a long input.
        options.add_session_config_entry("session.disable_prepacking", "1")
    return _session(graph.model, options)


def _session_options(threads: int) -> onnxruntime.SessionOptions:
    session_options = onnxruntime.SessionOptions()
    session_options.intra_op_num_threads = threads
    session_options.inter_op_num_threads = 1
    # Its warnings mean nothing to users, and its errors are raised as well.
    session_options.log_severity_level = 4
    # Shapes differ from batch to batch, and memory must come back after a long input.
    session_options.enable_mem_pattern = False
    session_options.enable_cpu_mem_arena = False
    # A thread that spins takes its core from the event loop, and from other processes.
    session_options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return session_options


def _session(
    model: bytes | str, options: onnxruntime.SessionOptions
) -> onnxruntime.InferenceSession:
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no base class of their own
        raise ModelNotSupported(f"ONNX Runtime can't load the model: {error}") from error
