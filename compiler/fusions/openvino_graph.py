"""Padding-free execution in an OpenVINO graph: two conversions of one trace, and one `If` over both.

OpenVINO's own fusions (of attention, gelu, norms, sums and linear layers) happen when it compiles the graph; the graphs here
are written so that they do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import openvino.opset14 as ops
from openvino import Model, Node, Output

from compiler.fusions.padding_free import GROUPS, NAMESPACE

if TYPE_CHECKING:
    from openvino.frontend.pytorch import ConversionExtension

# What a query adds to the score of a key that it must not see.
HIDDEN = np.float32(-1e30)
# Tokens by head, and heads by token.
SWAPPED = (0, 2, 1, 3)


class Lowering:
    """What the frontend makes of the markers, in one conversion: on `packed` tokens, or where nothing is padded.

    The layout's tensors are those of `padding_free.Packed`, but that `back` is one for all groups together.
    """

    def __init__(self, *, packed: bool) -> None:
        self.packed = packed
        self._layout: _Layout | None = None
        self._everywhere: dict[int, Node] = {}

    def extensions(self) -> list[ConversionExtension]:
        from openvino.frontend.pytorch import ConversionExtension  # brings torch, which int8 files are made without

        return [
            ConversionExtension(f"{NAMESPACE}.{name}.default", convert)
            for name, convert in (
                ("pack", self._pack),
                ("unpack", self._unpack),
                ("columns", self._columns),
                ("attention", self._attention),
            )
        ]

    def _of(self, mask: Output) -> _Layout:
        if self._layout is None:
            self._layout = _Layout(mask)
        return self._layout

    def _near(self, shape: Node, window: int) -> Node:
        """What hides all but the neighbours where nothing is padded, `[1, 1, sequence, sequence]`; without a window, none."""
        if window not in self._everywhere:
            self._everywhere[window] = _everywhere(shape, window)
        return self._everywhere[window]

    def _pack(self, context: Any) -> list[Output]:
        values = context.get_input(0)
        if not self.packed:
            return _outputs(ops.reshape(values, _ints(1, -1), False))
        return self._of(context.get_input(1)).pack(values)

    def _columns(self, context: Any) -> list[Output]:
        mask = context.get_input(0)
        if self.packed:
            return _outputs(ops.unsqueeze(self._of(mask).columns, _ints(0)))
        shape = ops.shape_of(mask)
        columns = ops.range(_int(0), ops.gather(shape, _int(1), _int(0)), _int(1), "i64")
        return _outputs(ops.reshape(ops.broadcast(columns, shape), _ints(1, -1), False))

    def _unpack(self, context: Any) -> list[Output]:
        hidden, mask = context.get_input(0), context.get_input(1)
        width = _ints(hidden.get_partial_shape()[2].get_length())
        shape = ops.shape_of(mask)
        tokens = ops.squeeze(hidden, _ints(0))
        if self.packed:
            layout = self._of(mask)
            zeros = ops.broadcast(np.float32(0), ops.concat([ops.reduce_prod(shape, _ints(0), True), width], 0))
            alive = ops.multiply(tokens, ops.convert(layout.alive, "f32"))
            tokens = ops.scatter_nd_update(zeros, ops.unsqueeze(layout.places, _ints(1)), alive)
        return _outputs(ops.reshape(tokens, ops.concat([shape, width], 0), False))

    def _attention(self, context: Any) -> list[Output]:
        parts = [_by_token(context.get_input(number)) for number in range(3)]
        mask, scale = context.get_input(3), context.get_values_from_const_input(4)
        window = int(context.get_values_from_const_input(5))
        heads, size = (parts[0].get_partial_shape()[axis].get_length() for axis in (2, 3))
        factor = [] if np.isclose(scale, size**-0.5) else [ops.constant(np.float32(scale))]
        if not self.packed:
            shape = ops.shape_of(mask)
            by_sequence = ops.concat([shape, _ints(heads, size)], 0)
            query, key, value = (ops.transpose(ops.reshape(part, by_sequence, False), _ints(*SWAPPED)) for part in parts)
            near = [self._near(shape, window)] if window or factor else []
            attended = ops.scaled_dot_product_attention(query, key, value, *near, *factor)
            return _outputs(ops.reshape(ops.transpose(attended, _ints(*SWAPPED)), _ints(1, -1, heads, size), False))
        layout = self._of(mask)
        flat = [ops.reshape(part, _ints(-1, heads * size), False) for part in parts]
        outputs = []
        for number, (rows, scores) in enumerate(layout.groups):
            by_sequence = ops.concat([ops.shape_of(rows), _ints(heads, size)], 0)
            query, key, value = (
                ops.transpose(ops.reshape(ops.gather(part, rows, _int(0)), by_sequence, False), _ints(*SWAPPED))
                for part in flat
            )
            hides = layout.near(number, window) if window else scores
            attended = ops.scaled_dot_product_attention(query, key, value, hides, *factor)
            outputs.append(ops.reshape(ops.transpose(attended, _ints(*SWAPPED)), _ints(-1, heads * size), False))
        back = ops.gather(ops.concat(outputs, 0), layout.back, _int(0))
        return _outputs(ops.reshape(back, _ints(1, -1, heads, size), False))


class _Layout:
    def __init__(self, mask: Output) -> None:
        given = ops.not_equal(mask, _int(0))
        self.alive = ops.reduce_logical_or(given, _ints(0, 1), False)
        # A batch of nothing but padding is packed as if all of it were real, and then answered with zeros.
        real = ops.logical_or(given, ops.logical_not(self.alive))
        shape = ops.shape_of(mask)
        batch, sequence = (ops.gather(shape, _int(axis), _int(0)) for axis in (0, 1))
        counts = ops.reduce_sum(ops.convert(real, "i64"), _ints(1), False)
        ordered = ops.topk(counts, batch, 0, "min", "value", index_element_type="i64")
        lengths, order = ordered.output(0), ordered.output(1)
        packed = _where(ops.gather(real, order, _int(0)))
        row = ops.divide(packed, sequence)
        self.columns = ops.subtract(packed, ops.multiply(row, sequence))
        self.places = ops.add(ops.multiply(ops.gather(order, row, _int(0)), sequence), self.columns)
        starts = ops.cum_sum(lengths, _int(0), exclusive=True)
        size = ops.divide(ops.add(batch, _int(GROUPS - 1)), _int(GROUPS))
        self.groups: list[tuple[Node, Node]] = []
        self._valid: list[Node] = []
        self._near: dict[tuple[int, int], Node] = {}
        backs: list[Node] = []
        before: Node = _int(0)
        for number in range(GROUPS):
            ends = [ops.reshape(ops.multiply(size, _int(number + end)), _ints(1), False) for end in (0, 1)]
            own, first = (ops.slice(values, *ends, _ints(1), _ints(0)) for values in (lengths, starts))
            # A batch smaller than the number of groups leaves some empty.
            longest = ops.reduce_max(ops.concat([own, _ints(1)], 0), _ints(0), False)
            column = ops.unsqueeze(ops.range(_int(0), longest, _int(1), "i64"), _ints(0))
            valid = ops.less(column, ops.unsqueeze(own, _ints(1)))
            rows = ops.select(valid, ops.add(ops.unsqueeze(first, _ints(1)), column), _int(0))
            self.groups.append((rows, _scores(ops.unsqueeze(valid, _ints(1, 2)))))
            self._valid.append(valid)
            backs.append(ops.add(_where(valid), before))
            before = ops.add(before, ops.reduce_prod(ops.shape_of(rows), _ints(0), False))
        self.back = ops.concat(backs, 0)

    def pack(self, values: Output) -> list[Output]:
        tokens = ops.gather(ops.reshape(values, _ints(-1), False), self.places, _int(0))
        return _outputs(ops.unsqueeze(tokens, _ints(0)))

    def near(self, group: int, window: int) -> Node:
        """What hides, from each token of a group, all but its neighbours: `[sequences, 1, longest, longest]`."""
        if (group, window) not in self._near:
            columns = ops.gather(self.columns, self.groups[group][0], _int(0))
            close = ops.less(_distance(columns, (1, 2)), _int(window))
            seen = ops.unsqueeze(self._valid[group], _ints(1))
            self._near[group, window] = _scores(ops.unsqueeze(ops.logical_and(close, seen), _ints(1)))
        return self._near[group, window]


def join(dense: Model, packed: Model) -> Model:
    """One model that runs `packed` where the mask has padding, and where texts have one token each, and `dense` elsewhere.
    Both have the same inputs, and the same outputs in the same order, which keep the names that they have in `dense`.

    The constants of both stand in the file once: OpenVINO's writer looks for equal ones.
    """
    parameters = {}
    for port in dense.inputs:
        name = port.get_any_name()
        parameters[name] = ops.parameter([-1, -1], np.int64, name)
        parameters[name].output(0).get_tensor().set_names({name})
    mask = parameters["attention_mask"]
    real = ops.convert(ops.not_equal(mask, _int(0)), "i32")
    padded = ops.equal(ops.reduce_min(real, _ints(0, 1), False), ops.constant(np.int32(0)))
    # Attention without a mask that the CPU plugin of OpenVINO 2026.4 has compiled for one token a text is wrong from then on
    # for longer ones. That with a mask is not.
    single = ops.equal(ops.gather(ops.shape_of(mask), _int(1), _int(0)), _int(1))
    choice = ops.if_op(ops.logical_or(padded, single).output(0))
    choice.set_then_body(packed)
    choice.set_else_body(dense)
    for name, parameter in parameters.items():
        choice.set_input(parameter.output(0), _parameter(packed, name), _parameter(dense, name))
    results = []
    for ours, theirs, port in zip(packed.get_results(), dense.get_results(), dense.outputs, strict=True):
        result = ops.result(choice.set_output(ours, theirs))
        result.output(0).get_tensor().set_names(port.get_names())
        results.append(result)
    return Model(results, list(parameters.values()))


def every_node(program: Model) -> Iterator[Node]:
    """The nodes of a model, and of the branches in it."""
    for node in program.get_ordered_ops():
        yield node
        if node.get_type_name() == "If":
            for branch in (0, 1):
                yield from every_node(node.get_function(branch))


def _parameter(program: Model, name: str) -> Any:
    return next(found for found in program.get_parameters() if name in found.output(0).get_names())


def _ints(*numbers: int) -> Node:
    return ops.constant(np.array(numbers, dtype=np.int64))


def _int(number: int) -> Node:
    return ops.constant(np.array(number, dtype=np.int64))


def _outputs(node: Node) -> list[Output]:
    return list(node.outputs())


def _where(flags: Node) -> Node:
    """The places, int64, at which flattened flags are true."""
    flat = ops.convert(ops.reshape(flags, _ints(-1), False), "i32")
    return ops.squeeze(ops.non_zero(flat, output_type="i64"), _ints(0))


def _by_token(value: Output) -> Output:
    """`[1, heads, tokens, size]` as `[1, tokens, heads, size]`: from before the model's own transpose, or transposed back."""
    node = value.get_node()
    if node.get_type_name() == "Transpose":
        order = node.input_value(1).get_node()
        if order.get_type_name() == "Constant" and tuple(order.data) == SWAPPED:
            return node.input_value(0)
    return ops.transpose(value, _ints(*SWAPPED)).output(0)


def _distance(columns: Node, axes: tuple[int, int]) -> Node:
    """|column - column| of each pair, along two new axes for the last."""
    later, earlier = (ops.unsqueeze(columns, _ints(axis)) for axis in reversed(axes))
    return ops.abs(ops.subtract(later, earlier))


def _scores(allowed: Node) -> Node:
    return ops.select(allowed, ops.constant(np.float32(0)), ops.constant(HIDDEN))


def _everywhere(shape: Node, window: int) -> Node:
    if not window:
        return ops.constant(np.zeros((1, 1, 1, 1), dtype=np.float32))
    columns = ops.range(_int(0), ops.gather(shape, _int(1), _int(0)), _int(1), "i64")
    return _scores(ops.unsqueeze(ops.less(_distance(columns, (0, 1)), _int(window)), _ints(0, 1)))
