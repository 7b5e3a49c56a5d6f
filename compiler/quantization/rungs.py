"""Which layers are int8: plans in the order of their cost, from all layers down, until one meets the budget. Pure.

A plan is a rung of a ladder: on rung k the k groups of layers that lose the most accuracy for the work that they save stay out
of int8. So a higher rung is slower and closer, its cost is known without timing anything, and two machines climb alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: The work of a multiply-add, in units of one in int8.
COST: Mapping[str, int] = {"int8": 1, "bf16": 2, "fp32": 4}
#: That of making an input's number uint8, in the same unit: nearly free where the operator before does it, in OpenVINO.
#: Measured with 1,024 rows of 384 and 1,536 channels on a CPU with VNNI; it orders plans, so it need not be exact.
QUANTIZING: Mapping[str, int] = {"onnx": 80, "openvino": 40, "torchscript": 190}


@dataclass(frozen=True)
class Rung:
    """`out` are the layers that stay out of int8, `cost` is the plan's static cost: 1 would be all multiply-adds in int8 and
    inputs that are so already."""

    number: int
    out: tuple[str, ...]
    int8: tuple[str, ...]
    cost: float


def ladder(groups: Sequence[Mapping[str, Any]], rest: str, format: str) -> list[Rung]:
    """The rungs, the cheapest first; the last has one group in int8. `groups` are what `calibrate` described.

    Groups whose input takes longer to quantize than int8 saves are never in int8, as long as there is another.
    """
    names = [name for group in groups for name in group["names"]]

    def inside(group: Mapping[str, Any]) -> float:
        return float(group["cost"] * (1 + QUANTIZING[format] / group["outputs"]))

    def outside(group: Mapping[str, Any]) -> float:
        return float(group["cost"] * COST[rest])

    def worth(group: Mapping[str, Any]) -> float:
        """Accuracy that it costs for the work that it saves; what saves none is worth nothing."""
        saved = outside(group) - inside(group)
        return group["error"] / saved if saved > 0 else math.inf

    order = sorted(groups, key=lambda group: (-worth(group), group["names"]))
    # As long as there is another, what saves no work is on no rung.
    slow = min(sum(math.isinf(worth(group)) for group in order), len(order) - 1)
    rungs = []
    for number, left in enumerate(range(slow, len(order))):
        out = {name for group in order[:left] for name in group["names"]}
        cost = sum(map(outside, order[:left])) + sum(map(inside, order[left:]))
        rungs.append(
            Rung(
                number,
                tuple(name for name in names if name in out),
                tuple(name for name in names if name not in out),
                round(cost / sum(group["cost"] for group in groups), 4),
            )
        )
    return rungs


def error(groups: Sequence[Mapping[str, Any]], rung: Rung) -> float:
    """The errors together of the groups that are int8 on a rung. They add up, nearly: rounding noise is independent."""
    inside = set(rung.int8)
    return math.fsum(group["error"] for group in groups if inside.issuperset(group["names"]))


def climb(count: int, start: int, passes: Callable[[int], bool]) -> int | None:
    """The lowest rung that passes, by as few trials as that takes when a higher rung is no worse: from `start`, upwards by
    growing steps while none passes, then between the last that failed and the first that passed. `start` passing, rungs
    below are not tried: they were predicted to fail. None when not even the last passes."""
    if not count:
        return None
    failed = min(start, count - 1) - 1
    step = 1
    while True:
        rung = min(failed + step, count - 1)
        if passes(rung):
            break
        if rung == count - 1:
            return None
        failed, step = rung, step * 2
    while rung - failed > 1:
        middle = (failed + rung) // 2
        if passes(middle):
            rung = middle
        else:
            failed = middle
    return rung


def lowest(count: int, passes: Callable[[int], bool]) -> int:
    """The first rung that passes, tried from below, every other one, then the one before; the last when none does. Not by
    halves: shares of texts are no smooth measure, and one rung that fails by a text would send it far up."""
    found = next((rung for rung in range(0, count, 2) if passes(rung)), None)
    if found is None:
        return max(count - 1, 0)
    return found - 1 if found and passes(found - 1) else found
