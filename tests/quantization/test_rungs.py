"""The ladder of plans, and the search on it, against brute force."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compiler.quantization.rungs import COST, QUANTIZING, climb, error, ladder, lowest

GROUPS: list[dict[str, Any]] = [
    {"names": ["a.query", "a.key"], "cost": 0.5, "outputs": 4000, "error": 0.1},  # 0.2 an unit of work
    {"names": ["b"], "cost": 0.25, "outputs": 4000, "error": 0.4},  # 1.6
    {"names": ["c"], "cost": 0.125, "outputs": 4000, "error": 0.1},  # 0.8
    {"names": ["d"], "cost": 0.125, "outputs": 4000, "error": 0.1},  # 0.8, after c by its name
]


def test_layers_that_cost_most_for_their_work_leave_first() -> None:
    rungs = ladder(GROUPS, "fp32", "onnx")
    assert [rung.number for rung in rungs] == [0, 1, 2, 3]
    assert [rung.out for rung in rungs] == [(), ("b",), ("b", "c"), ("b", "c", "d")]
    assert [rung.int8 for rung in rungs] == [
        ("a.query", "a.key", "b", "c", "d"),
        ("a.query", "a.key", "c", "d"),
        ("a.query", "a.key", "d"),
        ("a.query", "a.key"),
    ]
    assert ladder(list(reversed(GROUPS)), "fp32", "onnx")[2].out == ("c", "b")  # the same layers, in the model's order


@pytest.mark.parametrize("rest", ["fp32", "bf16"])
@pytest.mark.parametrize("format", ["onnx", "openvino", "torchscript"])
def test_static_cost(rest: str, format: str) -> None:
    """A layer in int8 costs its multiply-adds and the quantization of its input, one outside what its precision does."""
    inside = 1 + QUANTIZING[format] / 4000
    assert [rung.cost for rung in ladder(GROUPS, rest, format)] == pytest.approx(
        [inside, 0.75 * inside + 0.25 * COST[rest], 0.625 * inside + 0.375 * COST[rest], 0.5 * inside + 0.5 * COST[rest]],
        abs=1e-4,
    )


def test_a_narrow_layer_is_worth_less() -> None:
    """Of two that cost as much accuracy for their work, the one whose input is quantized for fewer results leaves first; one
    that would be slower is not in int8 at all."""
    narrow, none = {**GROUPS[1], "names": ["e"], "outputs": 250}, {**GROUPS[1], "names": ["f"], "outputs": 100, "error": 0.0}
    rungs = ladder([*GROUPS, narrow, none], "bf16", "torchscript")
    assert [rung.out for rung in rungs[:3]] == [("f",), ("e", "f"), ("b", "e", "f")]
    assert ladder([none], "bf16", "torchscript")[0].int8 == ("f",)  # as long as there is another


@given(st.integers(1, 60), st.integers(0, 70), st.integers(0, 70))
def test_climb_finds_the_lowest_that_passes(count: int, start: int, first: int) -> None:
    """Rungs from `first` on pass; below `start` none is tried."""
    tried: list[int] = []

    def passes(number: int) -> bool:
        tried.append(number)
        return number >= first

    bottom = min(start, count - 1)
    passing = [number for number in range(bottom, count) if number >= first]
    assert climb(count, start, passes) == (passing[0] if passing else None)
    assert len(tried) == len(set(tried))
    assert all(bottom <= number < count for number in tried)
    assert len(tried) <= 2 * (count.bit_length() + 1)
    if first <= bottom:
        assert tried == [bottom]


def test_errors_are_those_of_the_groups_in_int8() -> None:
    rungs = ladder(GROUPS, "fp32", "onnx")
    assert error(GROUPS, rungs[0]) == pytest.approx(sum(group["error"] for group in GROUPS))
    last = [group["error"] for group in GROUPS if set(group["names"]) <= set(rungs[-1].int8)]
    assert [error(GROUPS, rungs[-1])] == last
    errors = [error(GROUPS, rung) for rung in rungs]
    assert errors == sorted(errors, reverse=True)


def test_climb_of_no_rung() -> None:
    assert climb(0, 0, lambda _: True) is None


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(0, 40))
def test_climb_ends_on_a_rung_that_passes_whatever_the_verdicts(verdicts: list[bool], start: int) -> None:
    """Even where a higher rung is worse, what is found has passed."""
    found = climb(len(verdicts), start, lambda number: verdicts[number])
    assert not verdicts[-1] or found is not None
    assert found is None or verdicts[found]


@given(st.integers(1, 60), st.integers(0, 70))
def test_lowest(count: int, first: int) -> None:
    tried: list[int] = []

    def passes(number: int) -> bool:
        tried.append(number)
        return number >= first

    found = lowest(count, passes)
    assert found == min(first, count - 1) or (found == count - 1 and first >= count - 1)
    assert len(tried) == len(set(tried)) <= first // 2 + 3


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_lowest_passes_whatever_the_verdicts(verdicts: list[bool]) -> None:
    found = lowest(len(verdicts), lambda number: verdicts[number])
    assert verdicts[found] or not any(verdicts[::2])
