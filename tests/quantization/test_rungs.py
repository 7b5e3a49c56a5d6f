"""The ladder of plans, and the search on it, against brute force."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compiler.quantization.rungs import (
    COST,
    GUESSES,
    PARTS,
    QUANTIZING,
    SAME,
    STEP,
    as_fast,
    bearable,
    climb,
    cost,
    first,
    ladder,
)
from compiler.types import Check

GROUPS: list[dict[str, Any]] = [
    {"names": ["a.query", "a.key"], "cost": 0.5, "columns": 1.0, "outputs": 4000, "error": 0.1},  # 0.2 an unit of work
    {"names": ["b"], "cost": 0.25, "columns": 1.0, "outputs": 4000, "error": 0.4},  # 1.6
    {"names": ["c"], "cost": 0.125, "columns": 1.0, "outputs": 4000, "error": 0.1},  # 0.8
    {"names": ["d"], "cost": 0.125, "columns": 1.0, "outputs": 4000, "error": 0.1},  # 0.8, after c by its name
]


def test_each_rung_is_the_closest_plan_of_its_work() -> None:
    rungs = ladder(GROUPS, "fp32", "onnx")
    assert [rung.number for rung in rungs] == list(range(5))
    # `b` is worth most for its work and leaves first; but where only an eighth may leave, `c` is all that can.
    assert [rung.out for rung in rungs] == [(), ("c",), ("b",), ("b", "c"), ("b", "c", "d")]
    assert [rung.int8 for rung in rungs[2:]] == [("a.query", "a.key", *left) for left in (("c", "d"), ("d",), ())]
    assert ladder(list(reversed(GROUPS)), "fp32", "onnx")[3].out == ("d", "b")  # in the model's order


WORK = st.floats(0.01, 1.0)
ERROR = st.integers(0, 1000).map(lambda error: error / 1000)


@given(
    st.lists(st.tuples(WORK, ERROR, st.floats(1.0, 1.4)), min_size=1, max_size=8),
    st.sampled_from([("onnx", "fp32"), ("openvino", "bf16"), ("torchscript", "bf16")]),
)
def test_no_plan_is_cheaper_and_closer(layers: list[tuple[float, float, float]], kind: tuple[str, str]) -> None:
    """Of all plans, tried one by one: each has a rung that is as close, with no more work than a step and what is rounded."""
    format, rest = kind
    groups: list[dict[str, Any]] = [
        {"names": [f"layer {number}"], "cost": work, "columns": columns, "outputs": 4000, "error": error}
        for number, (work, error, columns) in enumerate(layers)
    ]
    rungs = ladder(groups, rest, format)
    costs = [cost(groups, rest, format, rung.out) for rung in rungs]
    assert [rung.error for rung in rungs] == sorted({rung.error for rung in rungs}, reverse=True)
    assert costs == sorted(costs)
    # The first leaves nothing out, and of two in a row the second, or the one after, is a step further.
    assert rungs[0].out == rungs[0].slow
    rounding = len(groups) / PARTS * (max(costs) - min(costs)) + 2e-4
    assert all(second >= first * (1 + STEP) - rounding for first, second in zip(costs[1:], costs[3:], strict=False))
    rounded = len(groups) / PARTS * (max(costs) - min(costs)) * 4 + 2e-4
    names = [group["names"][0] for group in groups]
    for size in range(len(groups)):
        for out in itertools.combinations(names, size):
            error = math.fsum(group["error"] for group in groups if group["names"][0] not in out)
            bound = cost(groups, rest, format, out) * (1 + STEP) + rounded
            assert any(rung.error <= error + 1e-6 and work <= bound for rung, work in zip(rungs, costs, strict=True))


def test_one_error_that_is_huge_hides_no_others() -> None:
    groups = [
        {**GROUPS[1], "names": [name], "error": error} for name, error in zip("abcd", (1e7, 4e-3, 3e-3, 2e-3), strict=True)
    ]
    rungs = ladder(groups, "fp32", "onnx")
    assert [rung.out for rung in rungs] == [(), ("a",), ("a", "b"), ("a", "b", "c")]
    assert rungs[-1].error == pytest.approx(2e-3)


@pytest.mark.parametrize(("one", "other"), [(0.023003284, 0.091950953), (0.01138763, 0.045470418)])
def test_rounded_work_puts_no_plan_before_a_better_one(one: float, other: float) -> None:
    """Parts are whole numbers: by them four layers save a little less than one which in truth saves less than these, and as a
    step lies between the two both are rungs."""
    layers = [(one, 0.1)] * 4 + [(other, 0.5), (1.0, 0.001)]
    groups = [
        {"names": [str(number)], "cost": work, "columns": 1.0, "outputs": 4000, "error": error}
        for number, (work, error) in enumerate(layers)
    ]
    rungs = ladder(groups, "fp32", "onnx")
    costs = [cost(groups, "fp32", "onnx", rung.out) for rung in rungs]
    assert costs == sorted(costs)
    assert [rung.number for rung in rungs] == [*range(len(rungs))]


def test_plans_that_are_as_fast() -> None:
    costs = [1.0, 1.2, 1.2 * (1 + SAME) - 1e-9, 1.2 * (1 + SAME) + 1e-9, 2.0]
    assert [as_fast(1.2, cost) for cost in costs] == [True, True, True, False, False]


@pytest.mark.parametrize("rest", ["fp32", "bf16"])
@pytest.mark.parametrize("format", ["onnx", "openvino", "torchscript"])
def test_static_cost(rest: str, format: str) -> None:
    """A layer in int8 costs its multiply-adds and the quantization of its input, one outside what its precision does."""
    inside = 1 + QUANTIZING[format] / 4000
    assert [cost(GROUPS, rest, format, out) for out in ("", "b", "bc", "bcd")] == pytest.approx(
        [inside, 0.75 * inside + 0.25 * COST[rest], 0.625 * inside + 0.375 * COST[rest], 0.5 * inside + 0.5 * COST[rest]],
        abs=1e-4,
    )


def test_a_narrow_layer_is_worth_less() -> None:
    """Of two that cost as much accuracy for their work, the one whose input is quantized for fewer results leaves first; one
    that would be slower is not in int8 at all."""
    narrow, none = {**GROUPS[1], "names": ["e"], "outputs": 250}, {**GROUPS[1], "names": ["f"], "outputs": 100, "error": 0.0}
    rungs = ladder([*GROUPS, narrow, none], "bf16", "torchscript")
    assert [rung.out for rung in rungs[:2]] == [("f",), ("e", "f")]
    assert all("e" in rung.out for rung in rungs if "b" in rung.out) and any("b" in rung.out for rung in rungs)
    assert all("f" in rung.out and rung.slow == ("f",) for rung in rungs)
    assert ladder([none], "bf16", "torchscript")[0].int8 == ("f",)  # as long as there is another


def test_channels_that_are_given_more_than_once_are_work() -> None:
    """A product that is 1.6 times as wide saves the less: it leaves int8 before one that costs the same accuracy."""
    once, twice = {**GROUPS[1], "names": ["e"]}, {**GROUPS[1], "names": ["z"], "columns": 1.6}
    rungs = ladder([once, twice], "bf16", "openvino")
    assert [rung.out for rung in rungs] == [(), ("z",)]
    inside = 1 + QUANTIZING["openvino"] / 4000
    assert cost([once, twice], "bf16", "openvino", ()) == pytest.approx(1.3 * inside, abs=1e-4)
    assert cost([once, twice], "bf16", "openvino", ("z",)) == pytest.approx(0.5 * inside + 0.5 * COST["bf16"], abs=1e-4)
    useless = {**GROUPS[1], "names": ["u"], "columns": 2.0, "error": 0.0}
    assert all("u" in rung.slow for rung in ladder([once, useless], "bf16", "openvino")), "as slow as bf16"


def falling(count: int) -> list[float]:
    return [float(count - number) for number in range(count)]


def rising(count: int) -> list[float]:
    return [1.1**number for number in range(count)]


@given(st.integers(1, 60), st.integers(0, 70), st.integers(0, 70), st.floats(0, 80))
def test_climb_finds_the_lowest_that_passes(count: int, start: int, lowest: int, bears: float) -> None:
    """Rungs from `lowest` on pass, whatever the figures let expect; what they do say is tried next."""
    tried: list[int] = []

    def measure(number: int) -> tuple[bool, float]:
        tried.append(number)
        return number >= lowest, bears

    assert climb(falling(count), rising(count), start, measure) == (lowest if lowest < count else None)
    assert len(tried) == len(set(tried))
    assert tried[0] == min(start, count - 1)
    assert len(tried) <= GUESSES + count.bit_length() + 1


@given(st.integers(1, 60), st.integers(0, 70), st.integers(0, 59))
def test_climb_takes_few_trials_when_the_figures_are_right(count: int, start: int, lowest: int) -> None:
    lowest = min(lowest, count - 1)
    errors = falling(count)
    tried: list[int] = []

    def measure(number: int) -> tuple[bool, float]:
        tried.append(number)
        return number >= lowest, errors[lowest]

    assert climb(errors, rising(count), start, measure) == lowest
    assert len(tried) <= 3


def test_climb_goes_on_below_a_rung_that_had_bad_luck() -> None:
    """It fails with an error that its own figures say should be borne; of those that fail with more, none is tried below."""
    errors, costs = falling(20), rising(20)
    tried: list[int] = []

    def some(number: int) -> tuple[bool, float]:
        tried.append(number)
        return number >= 5 and number != 8, errors[5]

    def every(number: int) -> tuple[bool, float]:
        tried.append(number)
        return number >= 15, errors[0]

    assert climb(errors, costs, 8, some) == 5
    assert tried == [8, 5, 4]
    tried.clear()
    assert climb(errors, costs, 8, every) == 15, "what is left is halved at last"
    assert len(tried) <= GUESSES + 6
    tried.clear()

    def dense(number: int) -> tuple[bool, float]:
        tried.append(number)
        return number >= 6 and number != 30, falling(60)[3 if number == 30 else max(number - 1, 0)]

    assert climb(falling(60), [1.02**number for number in range(60)], 30, dense) == 6, "nor does bad luck end it later"
    assert tried[: GUESSES + 1] == [30, 3, 2, 1, 0, 4]
    assert len(tried) <= GUESSES + 7


@given(st.lists(st.floats(0.0, 0.03), min_size=1, max_size=60), st.integers(0, 60), st.integers(0, 60), st.floats(0, 80))
def test_climb_ends_where_no_plan_would_be_faster(more: list[float], start: int, lowest: int, bears: float) -> None:
    """What it finds passes, and is as good as as fast as the lowest that passes."""
    costs = list(itertools.accumulate(more, lambda cost, share: cost * (1 + share), initial=1.0))
    lowest = min(lowest, len(more))
    found = climb(falling(len(costs)), costs, start, lambda number: (number >= lowest, bears))
    assert found is not None and found >= lowest
    assert as_fast(costs[lowest], costs[found])


def test_climb_ends_where_what_is_left_is_as_fast() -> None:
    tried: list[int] = []

    def measure(number: int) -> tuple[bool, float]:
        tried.append(number)
        return number >= 3, 0.0

    costs = [1.0, 1.1, 1.2, 1.2 * (1 + SAME / 2), 1.2 * (1 + SAME), 1.3]
    assert climb(falling(6), costs, 1, lambda number: (measure(number)[0], falling(6)[4])) == 4
    assert tried == [1, 4]


def test_errors_are_those_of_the_groups_in_int8() -> None:
    rungs = ladder(GROUPS, "fp32", "onnx")
    for rung in rungs:
        inside = [group["error"] for group in GROUPS if set(group["names"]) <= set(rung.int8)]
        assert rung.error == pytest.approx(sum(inside))
    errors = [rung.error for rung in rungs]
    assert errors == sorted(errors, reverse=True)
    assert [first(errors, error) for error in (9.0, errors[0], errors[1], errors[2] + 1e-6, 0.0)] == [0, 0, 1, 2, 4]


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(0, 40), st.floats(0, 50))
def test_climb_ends_on_a_rung_that_passes_whatever_the_verdicts(verdicts: list[bool], start: int, bears: float) -> None:
    """Even where a higher rung is worse, what is found has passed."""
    count = len(verdicts)
    found = climb(falling(count), rising(count), start, lambda number: (verdicts[number], bears))
    assert not verdicts[-1] or found is not None
    assert found is None or verdicts[found]


def check(name: str, figure: float, limit: float) -> Check:
    return Check("answers", name, figure, limit, passed=True, worst="")


def test_error_that_a_budget_bears() -> None:
    """A distance grows with the error: half of what is allowed bears twice of it. A share of texts grows with its root: four
    times. The figure that allows the least decides, and one that lost nothing decides nothing."""
    assert bearable([check("cosine", 0.99, 0.98)], 3.0) == pytest.approx(6.0)
    assert bearable([check("kl", 0.01, 0.02)], 3.0) == pytest.approx(6.0)
    assert bearable([check("neighbours", 0.975, 0.95)], 3.0) == pytest.approx(12.0)
    assert bearable([check("drop", 0.04, 0.01)], 3.2) == pytest.approx(0.2)
    assert bearable([check("cosine", 0.96, 0.98), check("argmax", 0.99, 0.95)], 3.0) == pytest.approx(1.5)
    assert bearable([check("cosine", 0.99, 1.0)], 3.0) == 0.0
    assert bearable([check("drop", -0.01, 0.01), check("argmax", 1.0, 0.95)], 3.0) == math.inf
