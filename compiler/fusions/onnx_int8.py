"""Linear layers in int8 in an ONNX graph, by the operators that ONNX Runtime is fastest with on CPUs.

A product with constant weights becomes `QuantizeLinear` and `MatMulIntegerToFloat`, which scales and adds the bias as well.
What was measured (ONNX Runtime 1.31, AVX512-VNNI), of what else says the same:

- `QGemm` and `DynamicQuantizeMatMul` run the same kernel, and `MatMulInteger` with `Mul` and `Add` behind takes up to twice as
  long. int8 × int8 takes ten times as long and uint8 × uint8 twice, `MatMulNBits` with 8 bits two to three times.
- `QuantizeLinear` with a scale for each channel takes a hundred times as long as with one, so `smooth` is a `Mul` before it.
- `QAttention` is ahead for a few tokens only.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir
import onnx_ir.passes.common
from onnx_ir import Graph, Model, Node, Value

from compiler.fusions.onnx_graph import MICROSOFT
from compiler.quantization.layers import NO_TABLE, Layers, QuantizedLinear, digest

Array = np.ndarray[Any, np.dtype[Any]]
ALL = slice(None)
PRODUCT = "MatMulIntegerToFloat"
# Of one row or of all alike: they leave `[1, tokens, width]` as it is.
ROWWISE = ("LayerNormalization", "Gelu", "BiasGelu", "QuickGelu", "Relu", "Tanh", "QuantizeLinear", "Concat", PRODUCT)


def quantize(model: Model, layers: Layers) -> tuple[dict[str, str], dict[str, str]]:
    """Replace the products with the weights of `layers`, and its tables, wherever they are in the graph.

    Returns the operator by layer's name, for those that are in int8 now, and for the others the reason why they are not.
    """
    plan = _Plan(model, layers)
    for node in [node for node in model.graph if node.op_type == "If"]:
        _attention(plan, node)
    for node in list(model.graph.all_nodes()):
        _linear(plan, node)
    left = {name: _reason(model, layer) for name, layer in layers.by_name.items() if name not in plan.done}
    remove_unused = onnx_ir.passes.common.RemoveUnusedNodesPass()
    remove_unused(model)  # reshapes of what the next looks for the only use of
    for attended, values in plan.attended.items():
        _smooth_values(plan, attended, values)
    for value in list(model.graph.initializers.values()):
        _table(plan, value)
    left |= {table.name: NO_TABLE for table in layers.tables.values() if table.name not in plan.done}
    model.graph.sort()  # a quantized input that several take may have been made for one behind another
    remove_unused(model)
    if plan.done:
        model.opset_imports[MICROSOFT] = 1
    return dict(sorted(plan.done.items())), left


class _Plan:
    """What is to be found, and what was made: constants once for the same values, quantized inputs once for all layers that
    take them."""

    def __init__(self, model: Model, layers: Layers) -> None:
        self.graph = model.graph
        self.layers = layers
        self.done: dict[str, str] = {}
        self.attended: dict[Value, Value] = {}  # what an attention gives, and the values of which it gives means
        self._names = set(model.graph.initializers) | {node.name for node in model.graph.all_nodes()}
        self._names |= {value.name for node in model.graph.all_nodes() for value in node.outputs}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], Value] = {}
        self._quantized: dict[tuple[Any, ...], Value] = {}
        self._found: dict[tuple[Value, bool, int | None, int | None], QuantizedLinear | None] = {}

    def name(self, kind: str) -> str:
        name = next(name for number in itertools.count() if (name := f"int8.{kind}.{number}") not in self._names)
        self._names.add(name)
        return name

    def constant(self, values: Any) -> Value:
        array = np.ascontiguousarray(values).reshape(np.shape(values))
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = self.name("constant")
            value = Value(name=name, const_value=onnx_ir.tensor(array, name=name))
            value.shape, value.dtype = onnx_ir.Shape(array.shape), onnx_ir.DataType.from_numpy(array.dtype)
            self.graph.initializers[name] = value
            self._constants[key] = value
        return self._constants[key]

    def make(self, before: Node, operator: str, *inputs: Value | None, domain: str = "", **attributes: Any) -> Value:
        while inputs and inputs[-1] is None:  # left out, as ONNX has it
            inputs = inputs[:-1]
        node = onnx_ir.node(operator, list(inputs), attributes=attributes, domain=domain, name=self.name(operator))
        (output,) = node.outputs
        output.name = f"{node.name}.output"
        if operator not in ("Reshape", "Gather", "Concat"):  # of which shape inference finds the type
            output.dtype = onnx_ir.DataType.UINT8 if operator == "QuantizeLinear" else onnx_ir.DataType.FLOAT
        _graph(before).insert_before(before, node)
        return output

    def find(self, weights: Value | None, transposed: bool, part: slice = ALL) -> QuantizedLinear | None:
        """The layer, or layers one below the other, whose weights these are: `[in, out]`, or `[out, in]` where they are
        `transposed`; of all outputs or some."""
        if weights is None or weights.const_value is None or weights.dtype != onnx_ir.DataType.FLOAT:
            return None
        if weights.shape is None or weights.shape.rank() != 2:
            return None
        key = (weights, transposed, part.start, part.stop)
        if key not in self._found:
            self._found[key] = self.layers.joined(_by_output(weights, transposed)[part])
        return self._found[key]

    def quantized(self, before: Node, source: Value, layer: QuantizedLinear) -> Value:
        """The input of a layer in uint8, made before a node."""
        given = [layer.smooth, layer.repeated, layer.offset]
        shape = tuple(None if values is None else values.tobytes() for values in given)
        key = (before.graph, source, shape, layer.scale, layer.zero_point)
        if key not in self._quantized:
            if layer.smooth is not None:
                source = self.make(before, "Mul", source, self.constant(layer.smooth.astype(np.float32)))
            made = self._rounded(before, source, layer)
            if layer.repeated is not None and layer.offset is not None:
                again = self.make(before, "Gather", source, self.constant(layer.repeated), axis=-1)
                again = self.make(before, "Add", again, self.constant(layer.offset * np.float32(layer.scale)))
                made = self.make(before, "Concat", made, self._rounded(before, again, layer), axis=-1)
            self._quantized[key] = made
        return self._quantized[key]

    def _rounded(self, before: Node, values: Value, layer: QuantizedLinear) -> Value:
        scale, zero = self.constant(np.float32(layer.scale)), self.constant(np.uint8(layer.zero_point))
        return self.make(before, "QuantizeLinear", values, scale, zero)

    def product(self, before: Node, source: Value, layer: QuantizedLinear, bias: Array | None) -> Value:
        """A layer's output, before a node; `source` is fp32 and ends in the layer's inputs."""
        total = np.asarray(layer.shift, dtype=np.float32) + (0 if bias is None else bias)
        self.done.update(dict.fromkeys(layer.name.split("+"), PRODUCT))
        return self.make(
            before,
            PRODUCT,
            self.quantized(before, source, layer),
            self.constant(layer.weight.T),
            self.constant(np.float32(layer.scale)),
            self.constant(np.asarray(layer.weight_scale, dtype=np.float32)),
            self.constant(np.uint8(layer.zero_point)),
            None,
            self.constant(total) if total.any() else None,
            domain=MICROSOFT,
        )


def _by_output(weights: Value, transposed: bool) -> Array:
    if (array := _array(weights)) is None:
        raise ValueError(f"{weights.name} is not constant")
    return array if transposed else array.T


def _graph(node: Node) -> Graph:
    if not isinstance(graph := node.graph, Graph):
        raise ValueError(f"{node.name} is in no graph")
    return graph


def _array(value: Value | None) -> Array | None:
    return None if value is None or value.const_value is None else value.const_value.numpy()


def _only_use(value: Value) -> Node | None:
    uses = value.uses()
    return uses[0][0] if len(uses) == 1 and not value.is_graph_output() else None


def _stand_in(value: Value, was: Value) -> None:
    """Use a value wherever another is, by that one's name, which an output of the graph must keep."""
    value.shape, value.name, was.name = was.shape, was.name, None
    was.replace_all_uses_with(value, replace_graph_outputs=True)


def _remove(*nodes: Node) -> None:
    for node in nodes:
        _graph(node).remove(node, safe=True)


def _is(node: Node | None, operator: str, domain: str = "") -> bool:
    return node is not None and (node.op_type, node.domain) == (operator, domain)


def _target(node: Node | None) -> list[int] | None:
    """The sizes that a `Reshape` gives, where they are constant and none of them is copied from the input."""
    if not _is(node, "Reshape") or node is None or (sizes := _array(node.inputs[1])) is None:
        return None
    return None if 0 in sizes else [int(size) for size in sizes]


def _root(value: Value) -> Value:
    """What a value is a reshaped view of, in its own graph."""
    while (node := value.producer()) is not None and _is(node, "Reshape") and node.inputs[0] is not None:
        value = node.inputs[0]
    return value


def _packed(value: Value) -> bool:
    """Whether a value is known to be `[1, tokens, width]`."""
    while (node := value.producer()) is not None:
        if (target := _target(node)) is not None:
            return len(target) == 3 and target[0] == 1
        if node.op_type in ("Add", "Mul") and node.inputs[0] is not None and node.inputs[1] is not None:
            return _packed(node.inputs[0]) and (_packed(node.inputs[1]) or _vector(node.inputs[1]))
        if node.op_type not in ROWWISE or node.inputs[0] is None:
            return False
        value = node.inputs[0]
    return False


def _vector(value: Value) -> bool:
    array = _array(value)
    return array is not None and array.ndim <= 1


def _linear(plan: _Plan, node: Node) -> None:
    """A `Gemm` or `MatMul` with weights of the plan, and a bias added behind, in int8."""
    weights = node.inputs[1] if len(node.inputs) > 1 else None
    if node.domain or node.op_type not in ("Gemm", "MatMul") or weights is None or _other_uses(weights):
        return
    if node.op_type == "Gemm":
        _gemm(plan, node)
        return
    source, split = node.inputs[0], _only_use(node.outputs[0])
    sizes = _sizes(split, node.outputs[0])
    if source is None or (weights.shape is None or sum(sizes) != weights.shape[-1]):
        return
    found = _parts(plan, weights, sizes)
    if not any(found):
        return
    old = list(split.outputs) if len(sizes) > 1 and split is not None else [node.outputs[0]]
    for value, layer, part in zip(old, found, _slices(sizes), strict=True):
        if layer is None:
            kept = plan.make(node, "MatMul", source, plan.constant(_by_output(weights, False)[part].T))
            _stand_in(kept, value)
        else:
            _with_bias(plan, node, source, layer, value)
    _remove(*([split] if len(sizes) > 1 and split is not None else []), node)


def _with_bias(plan: _Plan, before: Node, source: Value, layer: QuantizedLinear, was: Value) -> None:
    """A layer instead of what was its product, with the bias that is added to it alone."""
    behind = _only_use(was)
    values = None
    if behind is not None and behind.graph is before.graph and behind.op_type in ("Add", "BiasGelu"):
        other = behind.inputs[1] if behind.inputs[0] is was else behind.inputs[0]
        values = _array(other)
    if behind is None or values is None or values.shape != (layer.outputs,):
        _stand_in(plan.product(before, source, layer, None), was)
        return
    result = plan.product(before, source, layer, values)
    if behind.op_type == "BiasGelu":
        result = plan.make(before, "Gelu", result, domain=MICROSOFT)
    _stand_in(result, behind.outputs[0])
    _remove(behind)


def _gemm(plan: _Plan, node: Node) -> None:
    source, weights, bias = (*node.inputs, None)[:3]
    layer = plan.find(weights, bool(node.attributes.get_int("transB", 0)))
    values = _array(bias)
    if source is None or layer is None or not _plain(node):
        return
    if bias is not None and (values is None or values.shape != (layer.outputs,)):
        return
    # On `[1, tokens, in]` the reshapes around the product are none.
    back = _only_use(node.outputs[0])
    if _target(source.producer()) == [-1, layer.inputs] and back is not None and _target(back) == [1, -1, layer.outputs]:
        result = plan.product(node, _view(plan, node, source, layer.inputs), layer, values)
        _stand_in(result, back.outputs[0])
        _remove(back, node)
    else:
        _stand_in(plan.product(node, source, layer, values), node.outputs[0])
        _remove(node)


def _plain(node: Node) -> bool:
    factors = [node.attributes.get_float(name, 1.0) for name in ("alpha", "beta")]
    return factors == [1.0, 1.0] and not node.attributes.get_int("transA", 0)


def _view(plan: _Plan, before: Node, source: Value, width: int) -> Value:
    """`source` as `[1, tokens, width]`, by one `Reshape` or none."""
    root = _root(source)
    if _packed(root):
        return root
    return plan.make(before, "Reshape", root, plan.constant(np.array([1, -1, width], dtype=np.int64)))


def _sizes(split: Node | None, product: Value) -> list[int]:
    """The widths that a product is split into; its own, where it is not."""
    if split is not None and _is(split, "Split") and split.attributes.get_int("axis", 0) == -1 and len(split.inputs) > 1:
        sizes = _array(split.inputs[1])
        if sizes is not None:
            return [int(size) for size in sizes]
    node = product.producer()
    weights = None if node is None else _array(node.inputs[1])
    return [] if weights is None else [int(weights.shape[-1])]


def _slices(sizes: Sequence[int]) -> list[slice]:
    ends = list(itertools.accumulate(sizes))
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _parts(plan: _Plan, weights: Value, sizes: Sequence[int]) -> list[QuantizedLinear | None]:
    return [plan.find(weights, False, part) for part in _slices(sizes)]


def _other_uses(weights: Value) -> list[str]:
    """The operators that take weights otherwise than as those of a linear layer, which need them as they are."""
    uses = weights.uses()
    linear = ("Gemm", "MatMul")
    return sorted({node.op_type for node, place in uses if node.domain or node.op_type not in linear or place != 1})


def _attention(plan: _Plan, choice: Node) -> None:
    """The products that make queries, keys and values, which both branches of an attention have inside, before them."""
    then, otherwise = (choice.attributes[name].as_graph() for name in ("then_branch", "else_branch"))
    dense = next((node for node in otherwise if _is(node, "Attention", MICROSOFT)), None)
    if dense is None:
        return
    shaped, weights, bias, _, _, hides = (*dense.inputs, *[None] * 5)[:6]
    product = next((node for node in then if _is(node, "MatMul") and node.inputs[1] is weights), None)
    split = None if product is None else _only_use(product.outputs[0])
    if product is None or split is None or shaped is None or weights is None or len(weights.uses()) != 2:
        return
    source, reshape = product.inputs[0], shaped.producer()
    sizes = _sizes(split, product.outputs[0])
    if source is None or reshape is None or not _is(reshape, "Reshape") or _root(shaped) is not _root(source):
        return
    if len(sizes) != 3 or len({*sizes, weights.const_value.shape[0] if weights.const_value else 0}) != 1:
        return  # `[batch, sequence, in]` is their shape as well
    found = _parts(plan, weights, sizes)
    if not any(found):
        return
    values = _array(bias)
    biases = np.zeros(sum(sizes), dtype=np.float32) if values is None else values
    made: list[Value] = []
    for layer, part in zip(found, _slices(sizes), strict=True):
        if layer is not None:
            made.append(plan.product(choice, source, layer, biases[part]))
        else:
            kept = plan.make(choice, "MatMul", source, plan.constant(_by_output(weights, False)[part].T))
            made.append(plan.make(choice, "Add", kept, plan.constant(biases[part])))
    plan.attended[choice.outputs[0]] = made[2]
    for old, new in zip(split.outputs, made, strict=True):
        old.replace_all_uses_with(new)
    for node in then:
        if _is(node, "MultiHeadAttention", MICROSOFT):
            node.replace_input_with(3, None)  # the bias is in the products
    _remove(split, product)
    shape = reshape.inputs[1]
    parts = [plan.make(dense, "Reshape", value, shape, allowzero=1) for value in made]
    settings = {name: dense.attributes[name].value for name in ("num_heads", "scale")}
    result = plan.make(dense, "MultiHeadAttention", *parts, None, None, hides, domain=MICROSOFT, **settings)
    _stand_in(result, dense.outputs[0])
    _remove(dense)


def _smooth_values(plan: _Plan, attended: Value, values: Value) -> None:
    """Attention gives weighted means of its values, so a factor for each channel, by which the only layer behind multiplies
    its input, may as well be in the int8 layer that makes these."""
    node = _only_use(attended)
    while node is not None and _is(node, "Reshape"):
        attended = node.outputs[0]
        node = _only_use(attended)
    made = values.producer()
    if node is None or made is None or node.op_type != "Mul" or made.op_type != PRODUCT or node.inputs[0] is not attended:
        return
    scales, bias, smooth = (_array(value) for value in (made.inputs[3], (*made.inputs, None)[6], node.inputs[1]))
    if scales is None or smooth is None or smooth.shape != scales.shape:
        return
    made.replace_input_with(3, plan.constant(scales * smooth))
    if bias is not None:
        made.replace_input_with(6, plan.constant(bias * smooth))
    node.outputs[0].replace_all_uses_with(attended)
    _remove(node)


def _table(plan: _Plan, value: Value) -> None:
    """Rows that `Gather` alone looks up, in int8 with a scale each."""
    uses = [node for node, place in value.uses() if _is(node, "Gather") and place == 0]
    if len(uses) != len(value.uses()) or not uses or any(node.attributes.get_int("axis", 0) for node in uses):
        return
    if value.dtype != onnx_ir.DataType.FLOAT or (rows := _array(value)) is None or (table := plan.layers.table(rows)) is None:
        return
    small, scale = plan.constant(table.weight), plan.constant(table.weight_scale[:, None])
    for node in uses:
        found = plan.make(node, "Cast", plan.make(node, "Gather", small, node.inputs[1]), to=onnx_ir.DataType.FLOAT)
        _stand_in(plan.make(node, "Mul", found, plan.make(node, "Gather", scale, node.inputs[1])), node.outputs[0])
        _remove(node)
    plan.done[table.name] = "Gather"


def _reason(model: Model, layer: QuantizedLinear) -> str:
    """Why a layer is not in int8."""
    for weights in model.graph.initializers.values():
        values = _array(weights)
        if values is None or values.ndim != 2 or weights.dtype != onnx_ir.DataType.FLOAT:
            continue
        for array in (values.T, values):
            if array.shape[1] != layer.inputs or len(array) % layer.outputs:
                continue
            if not any(digest(part) == layer.digest for part in np.split(array, len(array) // layer.outputs)):
                continue
            if used := _other_uses(weights):
                return f"its weights are used by {', '.join(used)} as well"
            return "its product is joined with others, or computed in a way that has no int8 operator"
    return "its weights are not in the graph"


def count(graph: Graph) -> dict[str, int]:
    """How often ONNX Runtime's own operators are in a graph. Attention that has a branch for padded batches, in which it is
    by groups, counts once, and as `padding_free`."""
    inner = Counter[str]()
    free = 0
    for node in graph.all_nodes():
        if _is(node, "If"):
            then = Counter(one.op_type for one in node.attributes["then_branch"].as_graph() if one.domain == MICROSOFT)
            free += "MultiHeadAttention" in then
            inner += then
    counts = Counter(node.op_type for node in graph.all_nodes() if node.domain == MICROSOFT) - inner
    counts["padding_free"] = free
    counts["QuantizeLinear"] = sum(_is(node, "QuantizeLinear") for node in graph.all_nodes())
    counts["Gemm"] = sum(_is(node, "Gemm") for node in graph.all_nodes())
    return {name: number for name, number in sorted(counts.items()) if number}
