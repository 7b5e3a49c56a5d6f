"""Fusions of an ONNX graph, into the operators that ONNX Runtime has for CPUs; each says how often it fired.

What is fused, and what not, was measured on CPUs: `SkipLayerNormalization` is kept out, since its kernel takes three times as
long as the additions and the norm that it stands for. Which is also why the fusions of transformers' exporter
(`OnnxConfig(ort_fusions="cpu")`) are not used: on a BERT they make that and `BiasGelu`, and leave attention as it is.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir
import onnx_ir.passes.common
from onnx_ir import Graph, Model, Node, Value

from compiler.fusions.padding_free import GROUPS, NAMESPACE

MICROSOFT = "com.microsoft"
# What a query adds to the score of a key that it must not see; its softmax is 0, and a sum with another one is finite.
HIDDEN = np.float32(np.finfo(np.float32).min / 2)


def translations() -> dict[Any, Callable[..., Any]]:
    """What torch's exporter makes of each marker: a node of its own, by the same name, which `padding_free` replaces."""
    import onnxscript
    from onnx.defs import OpSchema

    from compiler.fusions.markers import MARKERS

    opset = onnxscript.values.Opset(NAMESPACE, 1)

    def operator(name: str, inputs: int, attributes: dict[str, Any]) -> Any:
        kinds = [(f"T{number}", ["tensor(float)", "tensor(int64)"], "") for number in range(inputs)]
        schema = OpSchema(
            name,
            NAMESPACE,
            1,
            inputs=[OpSchema.FormalParameter(f"input_{number}", f"T{number}") for number in range(inputs)],
            outputs=[OpSchema.FormalParameter("output", "T0")],
            type_constraints=kinds,
            attributes=[OpSchema.Attribute(key, kind) for key, kind in attributes.items()],
        )
        return onnxscript.values.Op(opset, name, schema)

    pack, unpack, columns = operator("pack", 2, {}), operator("unpack", 2, {}), operator("columns", 1, {})
    attention = operator("attention", 4, {"scale": OpSchema.AttrType.FLOAT, "window": OpSchema.AttrType.INT})

    # torch.onnx reads how to call these from their signatures.
    def translate_attention(query, key, value, mask, scale: float, window: int):  # type: ignore[no-untyped-def]
        return attention(query, key, value, mask, scale=scale, window=window)

    return {
        MARKERS.pack.default: lambda values, mask: pack(values, mask),
        MARKERS.unpack.default: lambda hidden, mask: unpack(hidden, mask),
        MARKERS.columns.default: lambda mask: columns(mask),
        MARKERS.attention.default: translate_attention,
    }


class _Nodes:
    """Nodes in the order in which they are made. Calling makes one and gives its output, or its outputs.

    Names are unique in the whole file: a name inside of a branch must not be one of outside.
    """

    def __init__(self, graph: Graph, parent: _Nodes | None = None) -> None:
        self.graph = graph
        self.made: list[Node] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], Value] = {} if parent is None else parent._constants
        self._number: itertools.count[int] = itertools.count() if parent is None else parent._number

    def inner(self) -> _Nodes:
        """An empty list for the nodes of a branch."""
        return _Nodes(self.graph, self)

    def __call__(
        self, operator: str, *inputs: Value | None, outputs: int = 1, domain: str = "", name: str = "", **attributes: Any
    ) -> Any:
        while inputs and inputs[-1] is None:  # left out, as ONNX has it
            inputs = inputs[:-1]
        node = onnx_ir.node(operator, list(inputs), attributes=attributes, domain=domain, num_outputs=outputs)
        node.name = name or f"fused.{next(self._number)}"
        for number, output in enumerate(node.outputs):
            output.name = f"{node.name}.{number}"
            if domain == MICROSOFT:  # ONNX's own inference of types stops at operators that it does not know
                output.dtype = onnx_ir.DataType.FLOAT
        self.made.append(node)
        return node.outputs[0] if outputs == 1 else node.outputs

    def constant(self, values: Any) -> Value:
        """An initializer; the same one for the same values."""
        array = np.asarray(values)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            names = (f"fused.constant.{number}" for number in itertools.count(len(self.graph.initializers)))
            name = next(name for name in names if name not in self.graph.initializers)
            value = Value(name=name, const_value=onnx_ir.tensor(array, name=name))
            value.shape, value.dtype = onnx_ir.Shape(array.shape), onnx_ir.DataType.from_numpy(array.dtype)
            self.graph.initializers[name] = value
            self._constants[key] = value
        return self._constants[key]

    def ints(self, *numbers: int) -> Value:
        return self.constant(np.array(numbers, dtype=np.int64))

    def scalar(self, number: int) -> Value:
        return self.constant(np.array(number, dtype=np.int64))

    def before(self, node: Node) -> None:
        """Put the nodes into the graph, before another."""
        self.graph.insert_before(node, self.made)


def _size(value: Value | None, axis: int) -> int:
    if value is None or value.shape is None or not isinstance(size := value.shape[axis], int):
        raise ValueError(f"axis {axis} of {value} has no known size")
    return size


def _array(value: Value | None) -> np.ndarray[Any, Any] | None:
    return None if value is None or value.const_value is None else value.const_value.numpy()


def _made_by(value: Value | None, operator: str) -> Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == operator and node.domain == "" else None


def _plus_bias(value: Value | None) -> tuple[Value, Value, np.ndarray[Any, Any]] | None:
    """What is added to, and the one-dimensional constant, as long as its last axis, that is added, with its values."""
    node = _made_by(value, "Add")
    if node is None:
        return None
    for one, other in (node.inputs, node.inputs[::-1]):
        array = _array(other)
        if one is None or other is None or array is None or _array(one) is not None or not one.shape:
            continue
        if array.shape == (one.shape[-1],):  # else one of the two is broadcast
            return one, other, array
    return None


def concat_linear(model: Model) -> int:
    """Matrix products of one input with constant `[in, out]` weights as one, which is split."""
    graph = model.graph
    fired = 0
    for value in [*graph.inputs, *(output for node in graph for output in node.outputs)]:
        products = [node for node, place in value.uses() if node.op_type == "MatMul" and place == 0 and node.graph is graph]
        weights = [_array(node.inputs[1]) for node in products]
        if len(products) < 2 or any(weight is None or weight.ndim != 2 for weight in weights):
            continue
        nodes = _Nodes(graph)
        joined = np.concatenate([weight for weight in weights if weight is not None], axis=1)
        product = nodes("MatMul", value, nodes.constant(joined), name=f"{products[0].name}.concat")
        sizes = nodes.ints(*(weight.shape[1] for weight in weights if weight is not None))
        parts = nodes("Split", product, sizes, outputs=len(products), name=f"{products[0].name}.split", axis=-1)
        position = {node: number for number, node in enumerate(graph)}
        nodes.before(min(products, key=lambda node: position[node]))
        product.dtype = products[0].outputs[0].dtype
        if (shape := products[0].outputs[0].shape) is not None:
            product.shape = onnx_ir.Shape([*shape[:-1], joined.shape[1]])
        for node, part in zip(products, parts, strict=True):
            _stand_in(part, node.outputs[0])
            graph.remove(node, safe=True)
        fired += 1
    return fired


def bias_gelu(model: Model) -> int:
    """An added bias and an exact gelu as `BiasGelu`."""
    fired = 0
    for node in list(model.graph):
        if node.op_type != "Gelu" or node.domain or node.attributes.get_string("approximate", "none") != "none":
            continue
        if (found := _plus_bias(node.inputs[0])) is None:
            continue
        fused = onnx_ir.node("BiasGelu", found[:2], domain=MICROSOFT, name=f"{node.name}.bias")
        _replace(model.graph, node, fused)
        fired += 1
    return fired


def gemm(model: Model) -> int:
    """A product with constant weights and the bias that is added to it, of `[1, tokens, in]`, as `Gemm`, which is faster."""
    graph = model.graph
    fired = 0
    for node in list(graph):
        found = _plus_bias(node.outputs[0]) if node.op_type == "Add" else None
        product = None if found is None else _made_by(found[0], "MatMul")
        if found is None or product is None or len(found[0].uses()) != 1 or found[0].is_graph_output():
            continue
        source, weights = product.inputs
        values = _array(weights)
        if source is None or source.shape is None or len(source.shape) != 3 or source.shape[0] != 1:
            continue
        if values is None or values.ndim != 2:
            continue
        nodes = _Nodes(graph)
        flat = nodes("Reshape", source, nodes.ints(-1, values.shape[0]), name=f"{product.name}.flat")
        summed = nodes("Gemm", flat, weights, found[1], name=f"{product.name}.gemm")
        nodes.before(node)
        _replace(graph, node, onnx_ir.node("Reshape", [summed, nodes.ints(1, -1, values.shape[1])], name=f"{node.name}.back"))
        fired += 1
    return fired


def _replace(graph: Graph, old: Node, new: Node) -> None:
    graph.insert_before(old, new)
    _stand_in(new.outputs[0], old.outputs[0])
    graph.remove(old, safe=True)


def _stand_in(value: Value, was: Value) -> None:
    """Use a value wherever another is, by that one's name, which an output of the graph must keep."""
    value.dtype, value.shape, value.name, was.name = was.dtype, was.shape, was.name, None
    was.replace_all_uses_with(value, replace_graph_outputs=True)


def fuse(model: Model) -> dict[str, int]:
    """Apply what this module has; the counts by name, without those that did not fire."""
    remove_unused = onnx_ir.passes.common.RemoveUnusedNodesPass()
    counts = {"BiasGelu": bias_gelu(model), **padding_free(model)}
    remove_unused(model)
    counts["concat_linear"] = concat_linear(model)
    counts["Gemm"] = gemm(model)
    remove_unused(model)
    onnx_ir.passes.common.NameFixPass()(model)  # nodes that are named after others without a name share one
    _forget_shapes(model.graph)
    model.opset_imports.pop(NAMESPACE, None)
    if any(node.domain == MICROSOFT for node in model.graph.all_nodes()):
        model.opset_imports[MICROSOFT] = 1
    return {name: count for name, count in sorted(counts.items()) if count}


def _forget_shapes(graph: Graph) -> None:
    """Leave out the shapes of what is between inputs and outputs: ONNX Runtime, when it opens the file, would see that they
    fit its SkipLayerNormalization."""
    outputs = set(graph.outputs)
    for node in graph.all_nodes():
        for value in node.outputs:
            if value not in outputs:
                value.shape = None


def padding_free(model: Model) -> dict[str, int]:
    """Replace the markers: with packed tokens where the mask has padding, without where it has none. Little more than what
    moves tokens stands in the branches, and what weights they use is outside, so weights are in the file once.

    Returns how many attentions there are, and by which operators they run where nothing is padded: `Attention`, which takes
    the products that make queries, keys and values in, or `MultiHeadAttention`, where more happens to those.
    """
    graph = model.graph
    markers = [node for node in graph if node.domain == NAMESPACE]
    if not markers:
        return {}
    nodes = _Nodes(graph)
    lowering = _Lowering(nodes, next(value for value in graph.inputs if value.name == "attention_mask"), markers)
    nodes.before(graph[0])
    for node in markers:
        here = nodes.inner()
        if node.op_type == "attention":
            output = lowering.attention(here, node)
        elif node.op_type == "unpack":
            output = lowering.unpack(here, node)
        else:
            output = lowering.moved[node]
        here.before(node)
        _stand_in(output, node.outputs[0])
    for node in markers:
        graph.remove(node, safe=True)
    graph.sort()  # what is packed may be computed behind the start
    return {"padding_free": lowering.counts.total(), **lowering.counts}


class _Lowering:
    """The layout of a batch, made once at the start of the graph, and what uses it.

    The tensors are those of `padding_free.Packed`, but that `back` is one for all groups together. All of them are empty
    where nothing is padded.
    """

    def __init__(self, nodes: _Nodes, mask: Value, markers: Sequence[Node]) -> None:
        self.mask = mask
        self.counts: Counter[str] = Counter()
        self._shapes: dict[int, Value] = {}
        self.shape = nodes("Shape", mask)
        real = nodes("Not", nodes("Equal", mask, nodes.scalar(0)))
        flags = nodes("Cast", real, to=onnx_ir.DataType.INT32)
        none = nodes.constant(np.array(0, dtype=np.int32))
        self.padded = nodes("Equal", nodes("ReduceMin", flags, keepdims=0), none)
        windows = sorted({node.attributes.get_int("window") for node in markers if node.op_type == "attention"} - {0})
        moving = [node for node in markers if node.op_type in ("pack", "columns")]
        then, otherwise = nodes.inner(), nodes.inner()
        self.alive = nodes("Greater", nodes("ReduceMax", flags, keepdims=0), none)
        packed = self._packed(then, real, windows, moving)
        outputs = self._branch(nodes, then, packed, otherwise, self._dense(otherwise, windows, moving))
        given: Iterator[Value] = iter(outputs)
        self.places = next(given)
        self.back = next(given)
        self.groups = [(next(given), next(given)) for _ in range(GROUPS)]
        self.near = {window: ([next(given) for _ in range(GROUPS)], next(given)) for window in windows}
        self.moved = dict(zip(moving, given, strict=True))

    def _branch(
        self, nodes: _Nodes, then: _Nodes, packed: Sequence[Value], otherwise: _Nodes, dense: Sequence[Value]
    ) -> Sequence[Value]:
        """`packed` where the batch is padded, else `dense`."""
        branches = {
            "then_branch": Graph([], packed, nodes=then.made, name="padded"),
            "else_branch": Graph([], dense, nodes=otherwise.made, name="dense"),
        }
        outputs = nodes("If", self.padded, outputs=len(packed), **branches)
        return [outputs] if len(packed) == 1 else outputs

    def _packed(self, op: _Nodes, real: Value, windows: Sequence[int], moving: Sequence[Node]) -> list[Value]:
        # A batch of nothing but padding is packed as if all of it were real, and then answered with zeros.
        real = op("Or", real, op("Not", self.alive))
        batch, sequence = (op("Gather", self.shape, op.scalar(axis), axis=0) for axis in (0, 1))
        lengths = op("ReduceSum", op("Cast", real, to=onnx_ir.DataType.INT64), op.ints(1), keepdims=0)
        lengths, order = op("TopK", lengths, op("Reshape", batch, op.ints(1)), outputs=2, axis=0, largest=0)
        flat = op("Reshape", op("Gather", real, order, axis=0), op.ints(-1))
        packed = op("Reshape", op("NonZero", flat), op.ints(-1))
        row = op("Div", packed, sequence)
        columns = op("Sub", packed, op("Mul", row, sequence))
        places = op("Add", op("Mul", op("Gather", order, row, axis=0), sequence), columns)
        starts = op("CumSum", lengths, op.scalar(0), exclusive=1)
        size = op("Div", op("Add", batch, op.scalar(GROUPS - 1)), op.scalar(GROUPS))
        groups: list[Value] = []
        backs: list[Value] = []
        near: dict[int, list[Value]] = {window: [] for window in windows}
        before = op.scalar(0)
        for number in range(GROUPS):
            ends = [op("Reshape", op("Mul", size, op.scalar(number + end)), op.ints(1)) for end in (0, 1)]
            own, first = (op("Slice", values, *ends, op.ints(0)) for values in (lengths, starts))
            # A batch smaller than the number of groups leaves some empty.
            longest = op("ReduceMax", op("Concat", own, op.ints(1), axis=0), keepdims=0)
            column = op("Unsqueeze", op("Range", op.scalar(0), longest, op.scalar(1)), op.ints(0))
            valid = op("Less", column, op("Unsqueeze", own, op.ints(1)))
            rows = op("Where", valid, op("Add", op("Unsqueeze", first, op.ints(1)), column), op.scalar(0))
            groups += [rows, op("Cast", own, to=onnx_ir.DataType.INT32)]
            tokens = op("Reshape", op("NonZero", op("Reshape", valid, op.ints(-1))), op.ints(-1))
            backs.append(op("Add", tokens, before))
            before = op("Add", before, op("Size", rows))
            if windows:
                seen = op("Unsqueeze", valid, op.ints(1))
                distance = _distance(op, op("Gather", columns, rows, axis=0), (1, 2))
            for window in windows:
                allowed = op("And", op("Less", distance, op.scalar(window)), seen)
                near[window].append(_scores(op, allowed, (1,)))
        outputs = [places, op("Concat", *backs, axis=0), *groups]
        for window in windows:
            outputs += [*near[window], _empty(op, np.float32, 4)]
        for node in moving:
            if node.op_type == "pack":
                values = op("Gather", op("Reshape", node.inputs[0], op.ints(-1)), places, axis=0)
            else:
                values = columns
            outputs.append(op("Unsqueeze", values, op.ints(0)))
        return outputs

    def _dense(self, op: _Nodes, windows: Sequence[int], moving: Sequence[Node]) -> list[Value]:
        outputs = [_empty(op, np.int64, 1), _empty(op, np.int64, 1)]
        for _ in range(GROUPS):
            outputs += [_empty(op, np.int64, 2), _empty(op, np.int32, 1)]
        sequence = op("Gather", self.shape, op.scalar(1), axis=0)
        columns = op("Range", op.scalar(0), sequence, op.scalar(1))
        for window in windows:
            outputs += [_empty(op, np.float32, 4) for _ in range(GROUPS)]
            outputs.append(_scores(op, op("Less", _distance(op, columns, (0, 1)), op.scalar(window)), (0, 1)))
        for node in moving:
            values = node.inputs[0] if node.op_type == "pack" else op("Expand", columns, self.shape)
            outputs.append(op("Reshape", values, op.ints(1, -1)))
        return outputs

    def _shape(self, op: _Nodes, width: int) -> Value:
        """The sizes `[batch, sequence, width]`, made once."""
        if width not in self._shapes:
            self._shapes[width] = op("Concat", self.shape, op.ints(width), axis=0)
        return self._shapes[width]

    def unpack(self, op: _Nodes, marker: Node) -> Value:
        hidden = marker.inputs[0]
        width = _size(hidden, 2)
        then, otherwise = op.inner(), op.inner()
        places = then("Concat", then("ReduceProd", self.shape, keepdims=1), then.ints(width), axis=0)
        zeros = then("ConstantOfShape", places, value=onnx_ir.tensor(np.zeros(1, dtype=np.float32)))
        tokens = then("Mul", then("Squeeze", hidden, then.ints(0)), then("Cast", self.alive, to=onnx_ir.DataType.FLOAT))
        packed = then("ScatterND", zeros, then("Unsqueeze", self.places, then.ints(1)), tokens)
        dense = otherwise("Squeeze", hidden, otherwise.ints(0))
        (flat,) = self._branch(op, then, [packed], otherwise, [dense])
        return op("Reshape", flat, self._shape(op, width), allowzero=1)

    def attention(self, op: _Nodes, marker: Node) -> Value:
        heads, size = _size(marker.inputs[0], 1), _size(marker.inputs[0], 3)
        width = heads * size
        found = [_flat(op, value, width) for value in marker.inputs[:3]]
        biased = [pair for value in found if (pair := _plus_bias(value)) is not None and pair[2].shape == (width,)]
        bias = None
        if len(biased) == len(found):
            found = [value for value, _, _ in biased]
            bias = op.constant(np.concatenate([values for _, _, values in biased]))
        window = marker.attributes.get_int("window")
        near, everywhere = self.near.get(window, ([None] * GROUPS, None))
        settings = {"num_heads": heads, "scale": marker.attributes.get_float("scale"), "domain": MICROSOFT}
        then, otherwise = op.inner(), op.inner()
        if (products := _products(found, width)) is not None:
            # Inside of the branches, since the operator of one of them does the product as well.
            source, weights = products[0], op.constant(products[1])
            whole = self._shape(op, len(products[1]))
            inputs = [otherwise("Reshape", source, whole, allowzero=1), weights, bias]
            found = then("Split", then("MatMul", source, weights), then.ints(width, width, width), outputs=3, axis=-1)
        else:
            shape = self._shape(op, width)
            inputs = [*(otherwise("Reshape", part, shape, allowzero=1) for part in found), bias, None]
        tokens = [then("Squeeze", part, then.ints(0)) for part in found]
        outputs = []
        for (rows, lengths), bias_near in zip(self.groups, near, strict=True):
            parts = [then("Gather", part, rows, axis=0) for part in tokens]
            masks = (lengths, None) if bias_near is None else (None, bias_near)
            outputs.append(then("Reshape", then("MultiHeadAttention", *parts, bias, *masks, **settings), then.ints(-1, width)))
        packed = then("Gather", then("Concat", *outputs, axis=0), self.back, axis=0)
        kind = "MultiHeadAttention" if products is None else "Attention"
        self.counts[kind] += 1
        # Before the scores that hide, `Attention` has a mask and a past as well.
        hides = [everywhere] if products is None else [None, None, everywhere]
        dense = otherwise(kind, *inputs, *hides, **settings)
        (attended,) = self._branch(op, then, [then("Unsqueeze", packed, then.ints(0))], otherwise, [dense])
        return op("Reshape", attended, op.ints(1, -1, heads, size))


def _products(found: Sequence[Value], width: int) -> tuple[Value, np.ndarray[Any, Any]] | None:
    """What queries, keys and values are products of, and the constant weights, `[in, 3 × width]`; None where they are not."""
    nodes = [_made_by(value, "MatMul") for value in found]
    sources = {None if node is None else node.inputs[0] for node in nodes}
    weights = [None if node is None else _array(node.inputs[1]) for node in nodes]
    joined = [weight for weight in weights if weight is not None and weight.ndim == 2 and weight.shape[1] == width]
    source = sources.pop()
    if sources or source is None or len(joined) < len(found):
        return None
    return source, np.concatenate(joined, axis=1)


def _flat(op: _Nodes, value: Value | None, width: int) -> Value:
    """`[1, heads, tokens, size]` as `[1, tokens, heads × size]`, from before the model's own transpose and reshape."""
    transpose = _made_by(value, "Transpose")
    if transpose is None or list(transpose.attributes.get_ints("perm")) != [0, 2, 1, 3]:
        by_token = op("Transpose", value, perm=[0, 2, 1, 3])
    else:
        by_token = transpose.inputs[0]
    reshape = _made_by(by_token, "Reshape")
    source = None if reshape is None else reshape.inputs[0]
    if source is not None and source.shape is not None and list(source.shape)[::2] == [1, width]:
        return source  # `[1, tokens, width]`
    flat: Value = op("Reshape", by_token, op.ints(1, -1, width))
    return flat


def _distance(op: _Nodes, columns: Value, axes: tuple[int, int]) -> Value:
    """|column - column| of each pair, along two new axes for the last."""
    later, earlier = (op("Unsqueeze", columns, op.ints(axis)) for axis in reversed(axes))
    distance: Value = op("Abs", op("Sub", later, earlier))
    return distance


def _scores(op: _Nodes, allowed: Value, axes: tuple[int, ...]) -> Value:
    """0 where a query may see a key, else what hides it; with new axes."""
    scores = op("Where", allowed, op.constant(np.float32(0)), op.constant(HIDDEN))
    unsqueezed: Value = op("Unsqueeze", scores, op.ints(*axes))
    return unsqueezed


def _empty(op: _Nodes, kind: Any, rank: int) -> Value:
    value: Value = op("Identity", op.constant(np.zeros((0,) * rank, dtype=kind)))
    return value
