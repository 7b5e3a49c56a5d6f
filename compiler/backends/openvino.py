"""OpenVINO IR, traced by transformers' exporter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compiler.types import Artifact, Model, Precision, Runner, Target

if TYPE_CHECKING:
    import numpy as np
    import openvino

LIBRARIES = ("torch", "transformers", "openvino", "numpy")
# bf16 is the fp32 graph with its weights rounded: a second trace would cost seconds and round the norms as well.
PRECISIONS: Mapping[Precision, Precision | None] = {"fp32": None, "bf16": "fp32"}
FUSED = ("Gelu", "MVN", "RMS", "RoPE", "ScaledDotProductAttention")
SUFFIX: Mapping[str, str] = {"fp32": "", "bf16": "_bf16"}
# Small constants (scales, shapes, norms) stay as they are: they weigh nothing and rounding them costs accuracy.
SMALLEST_WEIGHT = 4096


def files(precision: Precision) -> tuple[str, ...]:
    stem = f"openvino/openvino_model{SUFFIX[precision]}"
    return (f"{stem}.xml", f"{stem}.bin")


def runtime(precision: Precision) -> dict[str, Any]:
    # The CPU plugin runs fp32 files in bf16 where the CPU can, unless it is told when the model is compiled; what the
    # file itself says of it is ignored.
    hint = {"fp32": "f32", "bf16": "bf16"}[precision]
    return {"device": "CPU", "INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}


def export(out: Path, model: Model, target: Target) -> dict[str, Any]:
    import torch
    from transformers.exporters.exporter_openvino import OpenVINOConfig, OpenVINOExporter

    dynamic = torch.export.Dim.DYNAMIC
    config = OpenVINOConfig(dynamic=True, dynamic_shapes={name: {0: dynamic, 1: dynamic} for name in model.inputs})
    program = OpenVINOExporter().export(model.module, dict(model.example), config).program
    return _save(program, out, target.precision)


def reduce(out: Path, exported: Path, precision: Precision) -> dict[str, Any]:
    """Round the weights of an fp32 IR to bf16, in the file. The graph computes in fp32 or, with the hint, in bf16."""
    import openvino

    core = openvino.Core()
    program = core.read_model(str(exported / files("fp32")[0]))
    weights = [node for node in program.get_ordered_ops() if node.get_type_name() == "Constant" and _is_weight(node)]
    # OpenVINO's constants point into these arrays, so they must live until the model is saved.
    arrays = [_round_to_bf16(weight) for weight in weights]
    program.set_rt_info("bf16", ["runtime_options", "INFERENCE_PRECISION_HINT"])
    known = _save(program, out, precision)
    del arrays
    return known


def _is_weight(constant: openvino.Node) -> bool:
    import openvino

    output = constant.output(0)
    if output.get_element_type() != openvino.Type.f32 or constant.get_byte_size() < 4 * SMALLEST_WEIGHT:
        return False
    users = [(port.get_node().get_type_name(), port.get_index()) for port in output.get_target_inputs()]
    return all(user == "MatMul" or (user == "Gather" and port == 0) for user, port in users)


def _round_to_bf16(constant: openvino.Node) -> np.ndarray[Any, Any]:
    """Put a bf16 constant and a conversion to fp32 in an fp32 constant's place; the array holds the bf16 bits."""
    import numpy as np
    import openvino
    import openvino.opset14 as ops

    bits = np.ascontiguousarray(constant.data, dtype=np.float32).view(np.uint32)
    # Round to nearest, ties to even: add half of what is cut, less one where the kept part is even (IEEE 754, 4.3.1).
    # Weights that are not finite do not get this far: the original's outputs would not be finite.
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    tensor = openvino.Tensor(rounded, openvino.Shape(list(rounded.shape)), openvino.Type.bf16)
    weight = openvino.op.Constant(tensor)
    weight.set_friendly_name(constant.get_friendly_name())
    convert = ops.convert(weight, "f32")
    for port in constant.output(0).get_target_inputs():
        port.replace_source_output(convert.output(0))
    return rounded


def _save(program: openvino.Model, out: Path, precision: Precision) -> dict[str, Any]:
    import openvino

    path = out / files(precision)[0]
    path.parent.mkdir(parents=True)
    openvino.save_model(program, str(path), compress_to_fp16=False)
    counts = Counter(node.get_type_name() for node in program.get_ordered_ops())
    return {"opset": None, "fusions": {name: counts[name] for name in FUSED if counts[name]}}


def open(root: Path, artifact: Artifact, threads: int | None) -> Runner:
    import openvino

    settings = dict(artifact.runtime)
    device = settings.pop("device")
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    path = next(file.path for file in artifact.files if file.path.endswith(".xml"))
    compiled = openvino.Core().compile_model(str(root / path), device, settings)
    request = compiled.create_infer_request()
    outputs = [output.get_any_name() for output in compiled.outputs]

    def run(inputs: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        result = request.infer(dict(inputs))
        return {name: result[index].copy() for index, name in enumerate(outputs)}

    return run
