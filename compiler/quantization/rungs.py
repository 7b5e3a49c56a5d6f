"""Which layers are int8: plans in the order of their cost, from all layers down, until one meets the budget. Pure.

A plan is a rung of a ladder: on rung k the k groups of layers that lose the most accuracy for the work that they save stay out
of int8. So a higher rung is slower and closer, its cost is known without timing anything, and two machines climb alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compiler.numerics import room
from compiler.types import Check

#: The work of a multiply-add, in units of one in int8.
COST: Mapping[str, int] = {"int8": 1, "bf16": 2, "fp32": 4}
#: That of making an input's number uint8, in the same unit: nearly free where the operator before does it, in OpenVINO.
#: Measured with 1,024 rows of 384 and 1,536 channels on a CPU with VNNI; it orders plans, so it need not be exact.
QUANTIZING: Mapping[str, int] = {"onnx": 80, "openvino": 40, "torchscript": 190}

#: Figures that grow with the error itself; shares of texts, and the largest departure, do with its root.
DISTANCES = ("cosine", "rank", "kl", "noise")
#: Trials whose figures say where the next is.
GUESSES = 3


@dataclass(frozen=True)
class Rung:
    """`out` are the layers that stay out of int8, of which those that `slow` names would save no time there. `error` is the
    sum of the others' errors: rounding noise adds up, nearly."""

    number: int
    out: tuple[str, ...]
    int8: tuple[str, ...]
    error: float
    slow: tuple[str, ...] = ()


def ladder(groups: Sequence[Mapping[str, Any]], rest: str, format: str) -> list[Rung]:
    """The rungs, the cheapest first; the last has one group in int8. `groups` are what `calibrate` described.

    Groups whose input takes longer to quantize, and to multiply channels more than once, than int8 saves are never in int8, as
    long as there is another.
    """
    names = [name for group in groups for name in group["names"]]

    def worth(group: Mapping[str, Any]) -> float:
        """Accuracy that it costs for the work that it saves; what saves none is worth nothing."""
        saved = _outside(group, rest) - _inside(group, format)
        return group["error"] / saved if saved > 0 else math.inf

    order = sorted(groups, key=lambda group: (-worth(group), group["names"]))
    # As long as there is another, what saves no work is on no rung.
    slow = min(sum(math.isinf(worth(group)) for group in order), len(order) - 1)
    rungs = []
    for number, left in enumerate(range(slow, len(order))):
        out = {name for group in order[:left] for name in group["names"]}
        rungs.append(
            Rung(
                number,
                tuple(name for name in names if name in out),
                tuple(name for name in names if name not in out),
                math.fsum(group["error"] for group in order[left:]),
                tuple(name for group in order[:slow] for name in group["names"]),
            )
        )
    return rungs


def cost(groups: Sequence[Mapping[str, Any]], rest: str, format: str, out: Collection[str]) -> float:
    """The static cost of a plan that leaves layers `out`: 1 would be all multiply-adds in int8, no channel given more than
    once, and inputs that are so already. Of a group of which some stay in, each has its share."""
    found = 0.0
    for group in groups:
        left = sum(name in out for name in group["names"]) / len(group["names"])
        found += left * _outside(group, rest) + (1 - left) * _inside(group, format)
    return round(found / math.fsum(group["cost"] for group in groups), 4)


def _inside(group: Mapping[str, Any], format: str) -> float:
    return float(group["cost"] * group["columns"] * (1 + QUANTIZING[format] / group["outputs"]))


def _outside(group: Mapping[str, Any], rest: str) -> float:
    return float(group["cost"] * COST[rest])


def bearable(checks: Iterable[Check], error: float) -> float:
    """The error that a budget bears, as the figures at an error let expect: distances between answers grow with it, and the
    share of texts whose answer changes, as the largest departure, with its root."""
    found = math.inf
    for check in checks:
        lost, allowed = room(check)
        if lost > 0:
            share = max(allowed, 0.0) / lost
            found = min(found, error * (share if check.name in DISTANCES else share**2))
    return found


def first(errors: Sequence[float], most: float) -> int:
    """The lowest rung with an error of at most `most`; the last when there is none."""
    return next((number for number, error in enumerate(errors) if error <= most), len(errors) - 1)


def climb(errors: Sequence[float], start: int, measure: Callable[[int], tuple[bool, float]]) -> int | None:
    """The lowest rung that passes, when a higher one is no worse; None when not even the last does.

    Args:
        errors: of each rung, falling.
        start: the rung to be tried first.
        measure: whether a rung passes, and the error that its figures let expect the budget to bear: there the next trial is,
            `GUESSES` times. From then on what is left is halved, whatever the figures say.
    """
    failed, passed = -1, len(errors)
    number = min(start, passed - 1)
    trials = 0
    while passed - failed > 1:
        passes, bears = measure(number)
        trials += 1
        if passes:
            passed = number
        else:
            failed = number
        guess = first(errors, bears) if trials <= GUESSES else (failed + passed) // 2
        number = min(max(guess, failed + 1), passed - 1)
    return passed if passed < len(errors) else None
