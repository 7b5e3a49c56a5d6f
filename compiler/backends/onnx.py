"""ONNX for ONNX Runtime, traced by transformers' exporter."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compiler.exported import describe
from compiler.types import Artifact, Model, Precision, Runner, Target
from compiler.workers import THREADS

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir

    from compiler.quantization.layers import Layers

LIBRARIES = ("torch", "transformers", "sympy", "onnx", "onnx-ir", "ml-dtypes", "onnxscript", "onnxruntime", "numpy")
PRECISIONS: Mapping[Precision, Precision | None] = {"fp32": None, "int8": "fp32"}
FUSIONS = ("padding_free",)
# ONNX's own operators that stand for what would else be several. Its `Attention` is left out: from opset 23 on it has the name
# of the one that `onnx_graph` counts, and is another.
FUSED = ("Gelu", "LayerNormalization", "RMSNormalization", "RotaryEmbedding")
# A protobuf message cannot be larger; the rest of the graph needs some of it.
INLINE_BYTES = 2**31 - 2**24


def files(precision: Precision) -> tuple[str, ...]:
    return ("onnx/model_quantized.onnx" if precision == "int8" else "onnx/model.onnx",)


def runtime(precision: Precision) -> dict[str, Any]:
    return {"provider": "CPUExecutionProvider", "graph_optimization_level": "ORT_ENABLE_ALL"}


def export(out: Path, model: Model, target: Target) -> dict[str, Any]:
    import torch
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    from compiler.fusions import onnx_graph

    shapes = model.dynamic_axes(torch.export.Dim.DYNAMIC)
    config = OnnxConfig(dynamic=True, dynamic_shapes=shapes, opset_version=target.opset)
    with _marked(model):
        exported = OnnxExporter().export(model.module, dict(model.example), config)
    program = exported.program
    _drop_paths(program)
    fused = onnx_graph.fuse(program)
    _name_axes(program.graph, model.axes)
    path = out / files(target.precision)[0]
    _save(program, path)
    describe(path, exported)
    return {"opset": program.graph.opset_imports[""], "fusions": fusions(program.graph, fused)}


def _save(program: onnx_ir.Model, path: Path) -> None:
    import onnx_ir

    path.parent.mkdir(parents=True)
    weights = sum(value.const_value.nbytes for value in program.graph.initializers.values() if value.const_value)
    # Loaders look for weights inside the file, or, past what a protobuf holds, in `<file>_data`.
    onnx_ir.save(program, str(path), external_data=None if weights < INLINE_BYTES else f"{path.name}_data")


def fusions(graph: onnx_ir.Graph, fused: Mapping[str, int]) -> dict[str, int]:
    """How often what stands for several operators does: ONNX's own, and what `onnx_graph` fused."""
    counts = Counter(node.op_type for node in graph.all_nodes() if node.domain == "")
    return {**{name: counts[name] for name in FUSED if counts[name]}, **fused}


@contextlib.contextmanager
def _marked(model: Model) -> Iterator[None]:
    """The model on packed tokens where it can be, as markers in the graph; transformers' exporter is told what they are."""
    from transformers.exporters import exporter_onnx

    from compiler.fusions import onnx_graph
    from compiler.fusions.padding_free import Marked

    if (rewrite := model.rewrites.get("padding_free")) is None:
        yield
        return
    translations = onnx_graph.translations()
    exporter_onnx._ONNX_TRANSLATION_TABLE.update(translations)
    try:
        with rewrite.applied(model.module, Marked):
            yield
    finally:
        for marker in translations:
            del exporter_onnx._ONNX_TRANSLATION_TABLE[marker]


def _drop_paths(program: onnx_ir.Model) -> None:
    """The exporter notes the Python stack of each node, with this machine's paths; a release must not hold them."""
    program.metadata_props.clear()
    program.doc_string = None
    for graph in (program.graph, *program.functions.values()):
        graph.metadata_props.clear()
        graph.doc_string = None
        for value in (*graph.inputs, *graph.outputs):
            value.metadata_props.clear()
        for node in graph.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
    for value in program.graph.initializers.values():
        value.metadata_props.clear()
        if value.const_value is not None:
            value.const_value.metadata_props.clear()


def _name_axes(graph: onnx_ir.Graph, axes: Mapping[str, tuple[int | str, ...]]) -> None:
    """Call the dynamic axes of inputs and outputs what they are, instead of `s31`, also in what is computed of them."""
    import onnx_ir

    names: dict[str, str] = {}
    for value in graph.inputs:
        if value.shape is not None:
            named = zip(value.shape, axes[str(value.name)], strict=True)
            names.update((str(dim), axis) for dim, axis in named if isinstance(axis, str))

    def name(dim: object) -> str:
        return re.sub(r"\w+", lambda found: names.get(found[0], found[0]), str(dim))

    for value in (*graph.inputs, *graph.outputs):
        if value.shape is not None:
            value.shape = onnx_ir.Shape([dim if isinstance(dim, int) else name(dim) for dim in value.shape])


def reduce(out: Path, exported: Path, precision: Precision) -> dict[str, Any]:
    raise NotImplementedError("no precision of ONNX is made from another")


def quantize(out: Path, exported: Path, layers: Layers, rest: Precision) -> dict[str, Any]:
    """The fp32 file below `exported` with some layers in int8, as `onnx/model_quantized.onnx`; all else stays in `rest`.

    Returns what `export` does, and by layers' names the operators of those that are `int8`, and why others are `left`.
    """
    import onnx_ir

    from compiler.fusions import onnx_int8

    if rest != "fp32":
        raise NotImplementedError(f"what is not in int8 stays in fp32, not in {rest}")
    program = onnx_ir.load(exported / files("fp32")[0])
    done, left = onnx_int8.quantize(program, layers)
    _save(program, out / files("int8")[0])
    opset = program.graph.opset_imports[""]
    return {"opset": opset, "fusions": fusions(program.graph, onnx_int8.count(program.graph)), "int8": done, "left": left}


def open(root: Path, artifact: Artifact, threads: int | None) -> Runner:
    import onnxruntime

    path = root / artifact.files[0].path
    options = _options(artifact, threads)
    session = onnxruntime.InferenceSession(str(path), options, providers=[artifact.runtime["provider"]])
    outputs = [output.name for output in session.get_outputs()]

    def run(inputs: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        return dict(zip(outputs, session.run(None, dict(inputs)), strict=True))

    return run


def _options(artifact: Artifact, threads: int | None) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    level = getattr(onnxruntime.GraphOptimizationLevel, artifact.runtime["graph_optimization_level"])
    options.graph_optimization_level = level
    return options


def inner(
    root: Path, artifact: Artifact, inputs: Mapping[str, np.ndarray[Any, Any]]
) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    import numpy as np
    import onnx
    import onnxruntime

    path = root / artifact.files[0].path
    model = onnx.load(str(path), load_external_data=False)
    outputs = [output.name for output in model.graph.output]
    computed = {value.name for value in model.graph.input}
    names = []
    for node in model.graph.node:
        # What a branch reads from outside is not among the inputs of its `If`.
        if node.op_type == "If" or computed.intersection(node.input):
            computed.update(node.output)
            names += [name for name in node.output if name and name not in outputs]
    # ONNX Runtime infers their types and shapes.
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = _options(artifact, THREADS)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[artifact.runtime["provider"]])
    del model
    floats = {output.name for output in session.get_outputs() if output.type in ("tensor(float)", "tensor(float16)")}
    wanted = [name for name in (*names, *outputs) if name in floats]
    for name, value in zip(wanted, session.run(wanted, dict(inputs)), strict=True):
        yield name, np.asarray(value, dtype=np.float32)
