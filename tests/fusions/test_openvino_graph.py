"""What an OpenVINO graph gets for the markers: held, in OpenVINO, against the same in torch or numpy."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import openvino
import openvino.opset14 as ops
import pytest
import torch
from openvino import Node

from compiler.fusions import openvino_graph
from compiler.fusions.padding_free import GROUPS
from tests.fusions.test_padding_free import LENGTH, masks

Array = np.ndarray[Any, Any]


def answers(outputs: Sequence[Any], parameters: Sequence[Node], *given: Array) -> list[Array]:
    """What OpenVINO computes for the outputs."""
    model = openvino.Model([ops.result(output) for output in outputs], list(parameters))
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    result = compiled(list(given))
    return [np.array(result[port]) for port in compiled.outputs]


def branch(factor: int, names: tuple[str, str] = ("first", "second")) -> openvino.Model:
    """`input_ids × factor`, and the mask, as a model of its own."""
    ids, mask = (ops.parameter([-1, -1], np.int64, name) for name in ("input_ids", "attention_mask"))
    for parameter, name in ((ids, "input_ids"), (mask, "attention_mask")):
        parameter.output(0).get_tensor().set_names({name})
    results = [ops.result(ops.multiply(ids, np.array(factor, dtype=np.int64))), ops.result(ops.abs(mask))]
    for result, name in zip(results, names, strict=True):
        result.output(0).get_tensor().set_names({name})
    return openvino.Model(results, [ids, mask])


@pytest.mark.parametrize("kind", [*sorted(masks()), "nothing but padding", "no texts", "no tokens"])
def test_the_mask_chooses_the_branch(kind: str) -> None:
    others = {name: torch.zeros(shape, dtype=torch.int64) for name, shape in (("no texts", (0, 5)), ("no tokens", (2, 0)))}
    mask = {**masks(), "nothing but padding": torch.zeros(2, 5, dtype=torch.int64), **others}[kind].numpy()
    joined = openvino_graph.join(branch(2), branch(3, ("other", "names")))
    assert [port.get_any_name() for port in joined.inputs] == ["input_ids", "attention_mask"]
    assert [port.get_any_name() for port in joined.outputs] == ["first", "second"]
    compiled = openvino.Core().compile_model(joined, "CPU")
    ids = np.arange(mask.size, dtype=np.int64).reshape(mask.shape)
    result = compiled({"input_ids": ids, "attention_mask": mask})
    assert np.array_equal(result["first"], ids * (2 if mask.all() else 3))
    assert np.array_equal(result["second"], mask)


def test_every_node_is_found_in_the_branches_too() -> None:
    joined = openvino_graph.join(branch(2), branch(3))
    names = [node.get_type_name() for node in openvino_graph.every_node(joined)]
    assert names.count("Multiply") == 2
    assert names.count("If") == 1


@pytest.mark.parametrize("kind", sorted(masks()))
def test_layout(kind: str) -> None:
    """Texts one after another, the shortest first, in groups in which every token has its row and finds back."""
    mask = masks()[kind].numpy()
    given = ops.parameter([-1, -1], np.int64)
    layout = openvino_graph._Layout(given.output(0))
    (packed,) = layout.pack(ops.constant(np.arange(mask.size).reshape(mask.shape)).output(0))
    rows, scores = zip(*layout.groups, strict=True)
    (places,), columns, back, *groups = answers([packed, layout.columns, layout.back, *rows, *scores], [given], mask)
    assert sorted(places.tolist()) == np.flatnonzero(mask).tolist()
    texts = [list(tokens) for _, tokens in itertools.groupby(places.tolist(), lambda place: place // LENGTH)]
    assert all(tokens == sorted(tokens) for tokens in texts)
    lengths = sorted(mask.sum(1).tolist())
    assert [len(tokens) for tokens in texts] == [length for length in lengths if length]
    assert np.array_equal(columns, places % LENGTH)
    inside, hidden = groups[:GROUPS], groups[GROUPS:]
    assert np.array_equal(np.concatenate([part.ravel() for part in inside])[back], np.arange(len(places)))
    seen = []
    for part, score in zip(inside, hidden, strict=True):
        assert score.shape == (part.shape[0], 1, 1, part.shape[1])
        seen += (score[:, 0, 0] == 0).sum(1).tolist()
    assert seen == lengths


@pytest.mark.parametrize("window", [1, 4, 40])
def test_neighbours(window: int) -> None:
    """A token sees those closer than the window and, where nothing is padded, no other; without a window, all."""
    shape = ops.parameter([2], np.int64)
    (found,) = answers([openvino_graph._everywhere(shape, window)], [shape], np.array([3, LENGTH]))
    column = np.arange(LENGTH)
    assert np.array_equal(found[0, 0] == 0, np.abs(column[:, None] - column) < window)
    assert found[found != 0].max(initial=openvino_graph.HIDDEN) == openvino_graph.HIDDEN
    assert not openvino_graph._everywhere(shape, 0).data.any()

    mask = masks()["left"]
    given = ops.parameter([-1, -1], np.int64)
    layout = openvino_graph._Layout(given.output(0))
    near = [layout.near(number, window) for number in range(GROUPS)]
    assert near[0] is layout.near(0, window)
    texts = [text for group in answers(near, [given], mask.numpy()) for text in group[:, 0]]
    for length, text in zip(sorted(mask.sum(1).tolist()), texts, strict=True):
        # The rows behind a text's last token stand for nothing: what they see is never read.
        seen = np.abs(column[:length, None] - column[None, : text.shape[1]]) < window
        assert np.array_equal(text[:length] == 0, seen & (column[: text.shape[1]] < length))


@pytest.mark.parametrize(("order", "undone"), [((0, 2, 1, 3), True), ((0, 3, 1, 2), False), (None, False)])
def test_only_the_transpose_that_swaps_heads_is_left_out(order: tuple[int, ...] | None, undone: bool) -> None:
    given = np.random.default_rng(0).standard_normal((1, 5, 3, 4)).astype(np.float32)
    parameter = ops.parameter([1, 5, 3, 4], np.float32)
    heads = parameter if order is None else ops.transpose(parameter, np.array(order))
    by_token = openvino_graph._by_token(heads.output(0))
    assert (by_token.get_node() == parameter) == undone
    (found,) = answers([by_token], [parameter], given)
    expected = given if order is None else given.transpose(order)
    assert np.array_equal(found, expected.transpose(0, 2, 1, 3))


def test_a_transpose_by_what_is_computed_is_kept() -> None:
    given = np.random.default_rng(0).standard_normal((1, 5, 3, 4)).astype(np.float32)
    parameter, order = ops.parameter([1, 5, 3, 4], np.float32), ops.parameter([4], np.int64)
    by_token = openvino_graph._by_token(ops.transpose(parameter, order).output(0))
    (found,) = answers([by_token], [parameter, order], given, np.array([0, 2, 1, 3]))
    assert np.array_equal(found, given)
