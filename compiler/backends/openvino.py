"""OpenVINO IR, traced by transformers' exporter."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compiler.exported import describe
from compiler.types import Artifact, Model, Precision, Runner, Target
from compiler.workers import THREADS

if TYPE_CHECKING:
    import numpy as np
    import openvino
    from transformers.exporters import ExportedModel

    from compiler.quantization.layers import Layers

LIBRARIES = ("torch", "transformers", "sympy", "openvino", "numpy")
# bf16 is the fp32 graph with its weights rounded: a second trace would cost seconds and round the norms as well.
PRECISIONS: Mapping[Precision, Precision | None] = {"fp32": None, "bf16": "fp32", "int8": "fp32"}
FUSIONS = ("padding_free",)
FUSED = ("Gelu", "MVN", "RMS", "RoPE", "ScaledDotProductAttention", "padding_free")
SUFFIX: Mapping[str, str] = {"fp32": "", "bf16": "_bf16", "int8": "_qint8_quantized"}
# Operators whose output at a place depends on their inputs at that place alone.
# fmt: off
ELEMENTWISE = frozenset({
    "Abs", "Add", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "Ceiling", "Clamp", "Convert",
    "ConvertLike", "Divide", "Equal", "Exp", "Floor", "FloorMod", "Greater", "GreaterEqual",
    "Less", "LessEqual", "Log", "LogicalAnd", "LogicalNot", "LogicalOr", "Maximum", "Minimum",
    "Mod", "Multiply", "Negative", "NotEqual", "Power", "Round", "Select", "Sign",
    "Sqrt", "Subtract",
})
# fmt: on
# Small constants (scales, shapes, norms) stay as they are: they weigh nothing and rounding them costs accuracy.
SMALLEST_WEIGHT = 4096
# The branch of a padding-free model for batches without padding, as `openvino_graph.join` has it: the second, `else`.
DENSE = 1
# What the names of the conversions of rounded weights end in.
ROUNDED = "/rounded"


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

    from compiler.fusions import openvino_graph
    from compiler.fusions.padding_free import Marked

    config = OpenVINOConfig(dynamic=True, dynamic_shapes=model.dynamic_axes(torch.export.Dim.DYNAMIC))
    if (rewrite := model.rewrites.get("padding_free")) is None:
        exported = OpenVINOExporter().export(model.module, dict(model.example), config)
        _divide_in_integers(exported.program)
        if model.positions is not None:
            _tabulate_positions(exported.program, model.positions)
        return _save(exported.program, out, target.precision, exported)
    with rewrite.applied(model.module, Marked), _converted_twice() as packed:
        exported = OpenVINOExporter().export(model.module, dict(model.example), config)
    program = openvino_graph.join(exported.program, packed[0])
    # A model may have an `If` of its own; this says that the one on top is ours, also to who reads the file again.
    program.set_rt_info(str(rewrite.count), ["padding_free"])
    return _save(program, out, target.precision, exported)


@contextlib.contextmanager
def _converted_twice() -> Iterator[list[openvino.Model]]:
    """While transformers' exporter converts a trace with markers in it for batches without padding, convert it for packed
    tokens too; that one is put in the list."""
    from transformers.exporters import exporter_openvino

    from compiler.fusions.openvino_graph import Lowering

    packed: list[openvino.Model] = []
    convert, extensions = exporter_openvino._convert_to_openvino, exporter_openvino._OV_CONVERSION_EXTENSIONS

    def with_markers(graph: Any, lowering: Lowering) -> openvino.Model:
        exporter_openvino._OV_CONVERSION_EXTENSIONS = [*extensions, *lowering.extensions()]
        try:
            return convert(graph)
        finally:
            exporter_openvino._OV_CONVERSION_EXTENSIONS = extensions

    def twice(graph: Any) -> openvino.Model:
        packed.append(with_markers(graph, Lowering(packed=True)))
        return with_markers(graph, Lowering(packed=False))

    exporter_openvino._convert_to_openvino = twice
    try:
        yield packed
    finally:
        exporter_openvino._convert_to_openvino = convert


def _divide_in_integers(program: openvino.Model) -> int:
    """Replace whole numbers that are divided and rounded down in floating point by a division of integers; returns how many
    there were.

    How many frames a convolution makes of a sound is such a number. Under `INFERENCE_PRECISION_HINT=bf16` the CPU plugin
    computes it in bf16, with 8 bits, and shapes no longer fit.
    """
    import numpy as np
    import openvino.opset14 as ops

    replaced = 0
    for sink in program.get_ordered_ops():
        if sink.get_type_name() != "Convert" or not sink.get_output_element_type(0).is_integral_number():
            continue
        floor = sink.input_value(0).get_node()
        if floor.get_type_name() != "Floor":
            continue
        divide = floor.input_value(0).get_node()
        if divide.get_type_name() not in ("Divide", "Multiply"):  # by a number, or times what 1 over it is
            continue
        convert, by = (value.get_node() for value in divide.input_values())
        if convert.get_type_name() != "Convert" or not convert.input_value(0).get_element_type().is_integral_number():
            continue
        if by.get_type_name() != "Constant" or by.data.size != 1 or float(by.data.flat[0]) <= 0:
            continue
        number = float(by.data.flat[0]) if divide.get_type_name() == "Divide" else 1 / float(by.data.flat[0])
        if abs(number - round(number)) > 1e-6 * number:
            continue
        whole = convert.input_value(0)
        kind = whole.get_element_type().to_dtype()
        divisor = np.array(round(number), dtype=kind)
        quotient = ops.divide(ops.subtract(whole, ops.floor_mod(whole, divisor)), divisor)
        sink.output(0).replace(ops.convert(quotient, sink.get_output_element_type(0).get_type_name()).output(0))
        replaced += 1
    return replaced


def _tabulate_positions(program: openvino.Model, positions: int) -> int:
    """Replace integers that are computed from a distance in floating point by a table; returns how many there were.

    Models with relative positions (MPNet, DeBERTa, T5) put distances into buckets by a logarithm. Under
    `INFERENCE_PRECISION_HINT=bf16` the CPU plugin computes that in bf16 too, and tokens land in the wrong bucket. A
    distance is a whole number of at most `positions`, so its bucket can be looked up. The values are OpenVINO's own, in
    fp32.
    """
    import numpy as np
    import openvino
    import openvino.opset14 as ops

    core = openvino.Core()
    ordered = program.get_ordered_ops()
    rank = {node.get_friendly_name(): number for number, node in enumerate(ordered)}
    replaced = 0
    for sink in ordered:
        root = _distance(sink, rank)
        if root is None:
            continue
        # The part between the distance and the bucket, cut out of a copy as a model of its own.
        copy = {node.get_friendly_name(): node for node in program.clone().get_ordered_ops()}
        old = copy[root.get_node().get_friendly_name()].output(root.get_index())
        parameter = ops.parameter([-1], root.get_element_type())
        for port in old.get_target_inputs():
            port.replace_source_output(parameter.output(0))
        bucket = copy[sink.get_friendly_name()]
        part = openvino.Model([ops.result(bucket.output(0))], [parameter])
        compiled = core.compile_model(part, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        kind = root.get_element_type().to_dtype()
        table = compiled(np.arange(-positions, positions + 1, dtype=kind))[0]
        constant = [np.array(number, dtype=kind) for number in (positions, 0, 2 * positions)]
        index = ops.minimum(ops.maximum(ops.add(root, constant[0]), constant[1]), constant[2])
        looked_up = ops.gather(ops.constant(np.array(table).reshape(-1)), index, np.array(0, dtype=np.int64))
        sink.output(0).replace(looked_up.output(0))
        replaced += 1
    return replaced


def _distance(sink: openvino.Node, rank: Mapping[str, int]) -> openvino.Output | None:
    """The one integer tensor that a conversion from floating point to integer is an elementwise function of, if any."""
    if sink.get_type_name() not in ("Convert", "ConvertLike") or not sink.get_output_element_type(0).is_integral():
        return None
    source = sink.input_value(0)
    if not source.get_element_type().is_real():
        return None
    frontier = {source}
    while True:
        if len(frontier) == 1 and next(iter(frontier)).get_element_type().is_integral_number():
            return frontier.pop()
        latest = max(frontier, key=lambda output: rank[output.get_node().get_friendly_name()])
        node = latest.get_node()
        if node.get_type_name() not in ELEMENTWISE:
            return None
        frontier.remove(latest)
        inputs = node.input_values()[:1] if node.get_type_name() == "ConvertLike" else node.input_values()
        for value in inputs:
            if value.get_node().get_type_name() != "Constant":
                frontier.add(value)
            elif value.get_node().get_byte_size() > value.get_element_type().size:
                return None  # not one number: it would broadcast
        if not frontier:
            return None


def reduce(out: Path, exported: Path, precision: Precision) -> dict[str, Any]:
    """Round the weights of an fp32 IR to bf16, in the file. The graph computes in fp32 or, with the hint, in bf16."""
    program = _read(exported)
    return _reduced(program, out, precision)


def quantize(out: Path, exported: Path, layers: Layers, rest: Precision) -> dict[str, Any]:
    """The fp32 IR below `exported` with some layers in int8; the other weights are rounded to bf16 when the `rest` is that."""
    from compiler.fusions import openvino_int8

    program = _read(exported)
    done, arrays = openvino_int8.quantize(program, layers)
    wanted = [*layers.by_name, *(table.name for table in layers.tables.values())]
    left = {name: "the graph computes it in another way" for name in wanted if name not in done}
    known = _reduced(program, out, "int8") if rest == "bf16" else _save(program, out, "int8")
    del arrays
    return {**known, "int8": done, "left": left}


def _read(exported: Path) -> openvino.Model:
    import openvino

    return openvino.Core().read_model(str(exported / files("fp32")[0]))


def _reduced(program: openvino.Model, out: Path, precision: Precision) -> dict[str, Any]:
    """Save a program with its weights rounded to bf16."""
    from compiler.fusions.openvino_graph import every_node

    weights = [node for node in every_node(program) if node.get_type_name() == "Constant" and _is_weight(node)]
    # OpenVINO's constants point into these arrays, so they must live until the model is saved.
    arrays = [_round_to_bf16(weight) for weight in weights]
    program.set_rt_info("bf16", ["runtime_options", "INFERENCE_PRECISION_HINT"])
    known = _save(program, out, precision)
    del arrays
    _mark_rounded(out / files(precision)[0])
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
    convert.set_friendly_name(constant.get_friendly_name() + ROUNDED)
    for port in constant.output(0).get_target_inputs():
        port.replace_source_output(convert.output(0))
    return rounded


def _mark_rounded(path: Path) -> None:
    """Say of the conversions of rounded weights, in the file, that they decompress. The CPU plugin then takes the weights as
    they are, mapped from the file and shared by both branches; else it makes a copy of each for each branch.

    From Python, OpenVINO can read that mark and not set it.
    """
    from xml.etree import ElementTree

    tree = ElementTree.parse(path)  # noqa: S314 (our own file, just written)
    for layer in tree.iter("layer"):
        if layer.get("type") == "Convert" and layer.get("name", "").endswith(ROUNDED):
            mark = ElementTree.Element("rt_info")
            ElementTree.SubElement(mark, "attribute", name="decompression", version="0")
            layer.insert(1, mark)  # behind the layer's data
    tree.write(path, encoding="utf-8", xml_declaration=True)


def _save(program: openvino.Model, out: Path, precision: Precision, exported: ExportedModel | None = None) -> dict[str, Any]:
    import openvino

    path = out / files(precision)[0]
    path.parent.mkdir(parents=True)
    openvino.save_model(program, str(path), compress_to_fp16=False)
    if exported is not None:
        describe(path, exported)
    return {"opset": None, "fusions": _fusions(program)}


def _fusions(program: openvino.Model) -> dict[str, int]:
    """What stands for several operators; where there are two branches, in that for batches without padding."""
    packed = program.has_rt_info(["padding_free"])
    layers = program
    if packed:
        layers = _choice(program).get_function(DENSE)
    counts = Counter(node.get_type_name() for node in layers.get_ordered_ops())
    if packed:
        counts["padding_free"] = int(program.get_rt_info(["padding_free"]).astype(str))
    return {name: counts[name] for name in FUSED if counts[name]}


def _choice(program: openvino.Model) -> openvino.Node:
    """The `If` on top of a model that has `padding_free` among its runtime info."""
    return next(node for node in program.get_ordered_ops() if node.get_type_name() == "If")


def open(root: Path, artifact: Artifact, threads: int | None) -> Runner:
    import openvino

    device, settings = _settings(artifact, threads)
    compiled = openvino.Core().compile_model(str(root / _xml(artifact)), device, settings)
    request = compiled.create_infer_request()
    wanted = [port.get_any_name() for port in compiled.inputs]
    outputs = [output.get_any_name() for output in compiled.outputs]

    def run(inputs: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        if missing := [name for name in wanted if name not in inputs]:
            # A request would take what it was given the last time, or nothing, and answer that.
            raise ValueError(f"no {', '.join(missing)} is given; the model wants {', '.join(wanted)}")
        result = request.infer(dict(inputs))
        return {name: result[index].copy() for index, name in enumerate(outputs)}

    return run


def _settings(artifact: Artifact, threads: int | None) -> tuple[str, dict[str, Any]]:
    settings = dict(artifact.runtime)
    device = settings.pop("device")
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    return device, settings


def _xml(artifact: Artifact) -> str:
    return next(file.path for file in artifact.files if file.path.endswith(".xml"))


def inner(
    root: Path, artifact: Artifact, inputs: Mapping[str, np.ndarray[Any, Any]]
) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    import numpy as np
    import openvino

    core = openvino.Core()
    program = core.read_model(str(root / _xml(artifact)))
    layers = program
    feeds = [port.get_any_name() for port in program.inputs]
    outputs = [port.get_any_name() for port in program.outputs]
    if program.has_rt_info(["padding_free"]):
        # Nothing inside of a branch can be an output, so the branch is run as a model of its own.
        choice = _choice(program)
        layers = choice.get_function(DENSE)
        outer = [value.get_node().output(0).get_any_name() for value in choice.input_values()[1:]]
        described = {link.body_parameter_index: link.input_index for link in choice.get_input_descriptions(DENSE)}
        feeds = [outer[described[place] - 1] for place in range(len(layers.get_parameters()))]
        results = {link.output_index: link.body_value_index for link in choice.get_output_descriptions(DENSE)}
        sources = [result.input_value(0).get_index() for result in program.get_results()]
        own = dict(zip((results[index] for index in sources), outputs, strict=True))
        outputs = [own.get(place, f"result {place}") for place in range(len(layers.get_results()))]
    names, values = [], []
    computed: set[str] = set()
    ends = {result.input_value(0).get_node().get_friendly_name() for result in layers.get_results()}
    for node in layers.get_ordered_ops():
        kind, name = node.get_type_name(), node.get_friendly_name()
        if kind == "Parameter" or any(value.get_node().get_friendly_name() in computed for value in node.input_values()):
            computed.add(name)
            if kind not in ("Parameter", "Result") and name not in ends:
                found = [output for output in node.outputs() if output.get_element_type().is_real()]
                values += found
                names += [name if len(node.outputs()) == 1 else f"{name}:{output.get_index()}" for output in found]
    layers.add_outputs(values)
    device, settings = _settings(artifact, THREADS)
    request = core.compile_model(layers, device, settings).create_infer_request()
    given = request.infer({place: inputs[name] for place, name in enumerate(feeds)})
    for name, place in zip((*names, *outputs), (*range(len(outputs), len(given)), *range(len(outputs))), strict=True):
        yield name, np.array(given[place], dtype=np.float32)
