"""Linear layers of an OpenVINO graph in int8: quantized inputs as `FakeQuantize`, weights as int8 with their scales.

OpenVINO's own low-precision passes make int8 kernels of that when the graph is compiled. `smooth` costs nothing there: a
`FakeQuantize` may have limits of its own for each channel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino
import openvino.opset14 as ops
from openvino import Model, Node, Output

from compiler.fusions.openvino_graph import every_node
from compiler.quantization.layers import Layers, QuantizedLinear

LEVELS = 256


def quantize(program: Model, layers: Layers) -> tuple[dict[str, str], list[Any]]:
    """Put the layers into the graph in int8. Returns the operator by layer's name, and arrays that must live until the model
    is saved: OpenVINO's constants point into them."""
    done: dict[str, str] = {}
    arrays: list[Any] = []
    inputs: dict[tuple[Any, ...], Output] = {}
    for node in list(every_node(program)):
        if node.get_type_name() == "Constant" and (name := _table(node, layers, arrays)) is not None:
            done[name] = "Gather i8"
        if node.get_type_name() != "MatMul":
            continue
        weight = node.input_value(1).get_node()
        attributes = node.get_attributes()
        if weight.get_type_name() != "Constant" or weight.get_element_type() != openvino.Type.f32:
            continue
        if attributes["transpose_a"] or len(weight.get_output_partial_shape(0)) != 2:
            continue
        values = weight.data if attributes["transpose_b"] else weight.data.T
        if (layer := layers.joined(values)) is None:
            continue
        source = node.input_value(0)
        # Layers that share an input share its quantization; the branches are models of their own.
        parts = (layer.smooth, layer.repeated, layer.offset)
        how = (layer.scale, layer.zero_point, *(None if part is None else part.tobytes() for part in parts))
        key = source.get_node().get_name(), source.get_index(), *how
        if key not in inputs:
            inputs[key] = _quantized(source, layer)
        node.input(0).replace_source_output(inputs[key])
        stored = layer.weight if attributes["transpose_b"] else np.ascontiguousarray(layer.weight.T)
        arrays.append(stored)
        node.input(1).replace_source_output(_weight(stored, layer, weight, rows=attributes["transpose_b"]))
        _shift(node, layer)
        done |= dict.fromkeys(layer.name.split("+"), "MatMul u8 × i8")
    return done, arrays


def _table(constant: Node, layers: Layers, arrays: list[Any]) -> str | None:
    """Put a table in int8, whose rows are looked up alone, in its constant's place; its name, or None where it is none."""
    users = list(constant.output(0).get_target_inputs())
    if constant.get_element_type() != openvino.Type.f32 or len(constant.get_output_shape(0)) != 2:
        return None
    if any((user.get_node().get_type_name(), user.get_index()) != ("Gather", 0) for user in users):
        return None
    if not users or (table := layers.table(constant.data)) is None:
        return None
    arrays.append(table.weight)
    rows = _scaled(table.weight, table.weight_scale[:, None], table.name, constant)
    for user in users:
        user.replace_source_output(rows)
    return table.name


def _quantized(source: Output, layer: QuantizedLinear) -> Output:
    low, high = (np.float32((number - layer.zero_point) * layer.scale) for number in (0, LEVELS - 1))
    ends = [_named(ops.constant(end), layer, name) for end, name in ((low, "low"), (high, "high"))]

    def rounded(values: Output, role: str) -> Output:
        return _named(ops.fake_quantize(values, *ends, *ends, LEVELS), layer, role).output(0)

    def scaled(values: Output, factors: Any, role: str) -> Output:
        constant = _named(ops.constant(np.ascontiguousarray(factors)), layer, role)
        return _named(ops.multiply(values, constant), layer, f"{role}ed").output(0)

    smooth = source
    if layer.smooth is not None:
        smooth = scaled(source, layer.smooth, "smooth")
        if _product(source):
            smooth = _named(ops.maximum(smooth, ends[0]), layer, "bounded").output(0)
    main = rounded(smooth, "quantized")
    if layer.repeated is None or layer.offset is None:
        return main
    where = _named(ops.constant(layer.repeated), layer, "repeated")
    again = _named(ops.gather(source, where, _named(ops.constant(np.int64(-1)), layer, "axis")), layer, "again").output(0)
    if layer.smooth is not None:  # once more: a product with two uses would not become limits of a channel
        again = scaled(again, layer.smooth[layer.repeated], "even")
    offset = _named(ops.constant(layer.offset * np.float32(layer.scale)), layer, "offset")
    again = rounded(_named(ops.add(again, offset), layer, "offset by").output(0), "quantized again")
    return _named(ops.concat([main, again], -1), layer, "wide").output(0)


def _product(value: Output) -> bool:
    """Whether a value is what a `MatMul` makes, with its bias or without.

    Where that has another use, OpenVINO (2026.4) makes the `Multiply` behind it limits of the `FakeQuantize`, one for each
    channel, and then takes tokens for channels: the answers are wrong without a word. It leaves a `Maximum` between the two
    alone, which changes no number.
    """
    node = value.get_node()
    if node.get_type_name() == "Add":
        kinds = {one.get_source_output().get_node().get_type_name() for one in node.inputs()}
        return kinds == {"MatMul", "Constant"}
    return bool(node.get_type_name() == "MatMul")


def _named(node: Node, layer: QuantizedLinear, role: str) -> Node:
    """A node with a name: OpenVINO's own counts all nodes that the process has made, and no two files would be the same."""
    return _called(node, f"{layer.name}/{role}")


def _called(node: Node, name: str) -> Node:
    node.set_friendly_name(name)
    return node


def _weight(stored: Any, layer: QuantizedLinear, was: Node, *, rows: bool) -> Output:
    return _scaled(stored, layer.weight_scale[:, None] if rows else layer.weight_scale[None], layer.name, was)


def _scaled(stored: Any, scale: Any, name: str, was: Node) -> Output:
    """int8 numbers times their scales, instead of the constant that there was."""
    tensor = openvino.Tensor(stored, openvino.Shape(list(stored.shape)), openvino.Type.i8)
    constant = _called(openvino.op.Constant(tensor), was.get_friendly_name())
    factor = _called(ops.constant(np.ascontiguousarray(scale)), f"{name}/scale")
    return _called(ops.multiply(_called(ops.convert(constant, "f32"), f"{name}/weight"), factor), f"{name}/scaled").output(0)


def _shift(node: Node, layer: QuantizedLinear) -> None:
    if not layer.shift.any():
        return
    users = list(node.output(0).get_target_inputs())
    if len(users) == 1 and (total := users[0].get_node()).get_type_name() == "Add":
        bias = total.input(1 - users[0].get_index())
        constant = bias.get_source_output().get_node()
        if constant.get_type_name() == "Constant" and constant.data.size == layer.outputs:
            shifted = ops.constant(constant.data + layer.shift.reshape(constant.data.shape))
            bias.replace_source_output(_named(shifted, layer, "bias").output(0))
            return
    shifted = _named(ops.add(node.output(0), _named(ops.constant(layer.shift), layer, "shift")), layer, "shifted")
    for port in users:
        port.replace_source_output(shifted.output(0))
