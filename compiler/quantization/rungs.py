"""Which layers are int8: plans in the order of their cost, from all layers down, until one meets the budget. Pure.

A plan is a rung of a ladder: of all plans that do no more work than it, to a step, none has a smaller error. So a higher rung
is slower and closer, its cost is known without timing anything, and two machines climb alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from compiler.numerics import room
from compiler.types import Check

#: The work of a multiply-add, in units of one in int8.
COST: Mapping[str, int] = {"int8": 1, "bf16": 2, "fp32": 4}
#: That of making an input's number uint8, in the same unit: nearly free where the operator before does it, in OpenVINO.
#: Measured with 1,024 rows of 384 and 1,536 channels on a CPU with VNNI; it orders plans, so it need not be exact.
QUANTIZING: Mapping[str, int] = {"onnx": 80, "openvino": 40, "torchscript": 190}

#: What a layer saves is counted in so many parts of what all save together, where plans are sought.
PARTS = 10_000
#: Of plans whose costs are within such a share of each other the closest is a rung.
STEP = 0.005
#: Up to such a share more, a plan is no slower that anybody could tell.
SAME = 0.01
#: What embeddings in int8, which save no work but much of the file, may cost of it, by the precision that they have otherwise.
TABLE_WORTH: Mapping[str, float] = {"bf16": 0.01, "fp32": 0.03}

#: Figures that grow with the error itself; shares of texts, and the largest departure, do with its root.
DISTANCES = ("cosine", "rank", "kl", "noise")
#: Trials whose figures say where the next is.
GUESSES = 5


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
    """The rungs, the cheapest first. `groups` are what `calibrate` described; one of them at least is in int8 on every rung.

    Groups whose input takes longer to quantize, and to multiply channels more than once, than int8 saves are never in int8, as
    long as there is another.
    """
    saved = [_outside(group, rest) - _inside(group, format) for group in groups]
    useful = [number for number, work in enumerate(saved) if work > 0] or [int(np.argmax(saved))]
    every = {*range(len(groups))}
    slow = every - {*useful}
    least = math.fsum(_outside(group, rest) for group in groups) - math.fsum(saved[number] for number in useful)
    plans: list[tuple[float, set[int]]] = []
    for left in _closest(least, [saved[number] for number in useful], [groups[number]["error"] for number in useful]):
        out = slow | {useful[number] for number in left}
        work = math.fsum(saved[number] for number in out - slow)
        while plans and plans[-1][0] >= work:  # as parts are whole numbers, one may do more than they say
            plans.pop()
        plans.append((work, out))
    return [
        Rung(
            number,
            _names(groups, out),
            _names(groups, every - out),
            math.fsum(groups[other]["error"] for other in every - out),
            _names(groups, slow),
        )
        for number, (_, out) in enumerate(plans)
    ]


def as_fast(least: float, other: float, share: float = SAME) -> bool:
    """Whether a plan that costs `other` costs at most such a share more than one that costs `least`."""
    return other <= least * (1 + share)


def _names(groups: Sequence[Mapping[str, Any]], numbers: Collection[int]) -> tuple[str, ...]:
    return tuple(name for number, group in enumerate(groups) if number in numbers for name in group["names"])


def _closest(least: float, saved: Sequence[float], errors: Sequence[float]) -> list[tuple[int, ...]]:
    """Which groups are left out, from none to all but one: for each amount of work that is then not saved the choice that
    takes the most error away, where it takes away more than any with less work does (a knapsack, by dynamic programming);
    of those within a step the last, but the first, whose work is `least`, by itself."""
    unit = math.fsum(saved) / PARTS
    # What saves nothing is here only when it is all there is.
    parts = [max(1, round(work / unit)) if unit > 0 else 1 for work in saved]
    best = np.full(sum(parts) + 1, -np.inf)
    best[0] = 0.0
    taken = np.zeros((len(parts), len(best)), dtype=bool)
    for number, (size, error) in enumerate(zip(parts, errors, strict=True)):
        more = best[:-size] + error
        taken[number, size:] = more > best[size:]
        best[size:] = np.maximum(best[size:], more)
    steps: dict[int, int] = {}
    most, rounding = -math.inf, 1e-13 * math.fsum(errors)
    for amount in range(len(best) - 1):  # the last is all of them
        if best[amount] > most + rounding:
            most = float(best[amount])
            steps[math.ceil(math.log1p(amount * unit / least) / math.log1p(STEP))] = amount
    return [_choice(taken, parts, amount) for amount in steps.values()]


def _choice(taken: np.ndarray[Any, Any], parts: Sequence[int], amount: int) -> tuple[int, ...]:
    left = []
    for number in reversed(range(len(parts))):
        if taken[number, amount]:
            left.append(number)
            amount -= parts[number]
    return tuple(reversed(left))


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


def climb(
    errors: Sequence[float], costs: Sequence[float], start: int, measure: Callable[[int], tuple[bool, float]]
) -> int | None:
    """The lowest rung that passes, or one that is as fast, where a higher one is no worse; None when not even the last does.

    Args:
        errors: of each rung, falling.
        costs: of each rung, rising.
        start: the rung to be tried first.
        measure: whether a rung passes, and the error that its figures let expect the budget to bear: there the next trial is,
            `GUESSES` times. From then on what is left is halved, whatever the figures say.

    A rung that fails with an error that the budget should bear had bad luck, and ends nothing: cheaper ones are tried all the
    same. Once what is left is halved, any that fails does.
    """
    failed, passed = -1, len(errors)
    unlucky: set[int] = set()
    number = min(start, passed - 1)
    trials = 0
    while True:
        passes, bears = measure(number)
        trials += 1
        if passes:
            passed = number
        elif trials > GUESSES or bears < errors[number]:
            failed = number
        else:
            unlucky.add(number)
        left = [other for other in range(failed + 1, passed) if other not in unlucky]
        if not left or (passed < len(errors) and as_fast(costs[left[0]], costs[passed])):
            return passed if passed < len(errors) else None
        guess = first(errors, bears) if trials <= GUESSES else left[len(left) // 2]
        number = min((abs(other - guess), other) for other in left)[1]
