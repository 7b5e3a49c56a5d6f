"""How far an artifact's outputs are from the original's. Pure numpy.

Figures are taken over *rows*: the last axis of an output (a token's, a text's or an image's vector, a row of logits), all of
an image's feature map, or, where an output is one number a token (the start and end logits of question answering), the
sequence. Only real tokens and frames count: what a model computes for padding is nobody's result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from compiler.types import AT_MOST, Check, Tensor

if TYPE_CHECKING:
    from compiler.config import Limits

Array = np.ndarray[Any, np.dtype[Any]]
# See `noise`.
LEAST_VARIANCE = 0.001
# Of an int8 artifact, what its elements are held to in every sample, besides its answers.
ELEMENTS = ("max_abs", "noise")
# What is to be expected of a figure, which has its limit in a search, at most so high: some departure is beyond some margin.
EXPECTATIONS = {"neighbours_expected": "neighbours"}
MOST_EXPECTED = 0.99


@dataclass(frozen=True)
class Case:
    """One sample: its name (what kind of padding), and its inputs; the first of them gives it its shape.

    `real` says of outputs along an axis that no input has (the frames of a sound) which count, bool `[batch, axis]`; all of
    them where it says nothing. `shapes` are those of outputs with such an axis.
    `counts` says for some outputs which rows of the batch count, bool `[batch]`. Where the original itself answers
    otherwise once a text is padded (a classifier that reads the first token, which padding on the left makes a padded
    one), its answer is nobody's result.
    """

    name: str
    inputs: Mapping[str, Array]
    counts: Mapping[str, Array] = field(default_factory=dict)
    real: Mapping[str, Array] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def mask(self) -> Array:
        """True at what is real of the first input, such as the tokens of `[batch, sequence]`; everywhere without a mask."""
        first = next(iter(self.inputs.values()))
        mask: Array = self.inputs.get("attention_mask", np.ones(first.shape)).astype(bool)
        return mask

    @property
    def shape(self) -> tuple[int, ...]:
        shape: tuple[int, ...] = next(iter(self.inputs.values())).shape
        return shape

    def along(self, tensor: Tensor) -> Array | None:
        """Which places along the second axis of an output count, bool `[batch, axis]`; None where all do."""
        if tensor.shape[:2] == ("batch", "sequence"):
            return self.mask
        return self.real.get(str(tensor.shape[1])) if len(tensor.shape) > 1 and tensor.shape[0] == "batch" else None


@dataclass(frozen=True)
class Rows:
    """The real rows of an output, `[rows, width]` float64, where each came from, and which elements are real."""

    values: Array
    index: list[tuple[int, ...]]
    real: Array


def rows(output: Array, tensor: Tensor, case: Case, keep: int | None = None) -> Rows:
    """Cut an output into its real rows.

    Args:
        output: as the model gave it; its axes are those of `tensor.shape`.
        case: the sample that it answers.
        keep: at most so many rows, spread evenly over the real ones (for the logits of a large vocabulary).
    """
    values = np.asarray(output, dtype=np.float64)
    mask = case.along(tensor)
    if mask is not None and len(tensor.shape) == 2:
        return Rows(values, [(row,) for row in range(len(values))], mask)
    counts = case.counts.get(tensor.name, np.ones(values.shape[:1], dtype=bool))
    if mask is not None:
        where = np.argwhere(mask)
    elif len(tensor.shape) == 3 and isinstance(tensor.shape[0], str):  # the vectors of an image's patches, a sound's frames
        where = np.argwhere(np.broadcast_to(counts[:, None], values.shape[:2]))
    elif tensor.shape and isinstance(tensor.shape[0], str):
        where = np.argwhere(counts)
    else:
        where = np.zeros((1, 0), dtype=int)
    if keep is not None and len(where) > keep:
        where = where[np.linspace(0, len(where) - 1, keep).round().astype(int)]
    picked = values[tuple(where.T)] if where.shape[1] else values[None]
    flat = picked.reshape(len(where), math.prod(picked.shape[1:]))
    return Rows(flat, [tuple(int(i) for i in position) for position in where], np.ones(flat.shape, dtype=bool))


@dataclass(frozen=True)
class Pair:
    """One output of one case, twice."""

    case: Case
    reference: Rows
    actual: Rows


def compare(pairs: Sequence[Pair], tensor: Tensor, *, logits: bool) -> dict[str, Any]:
    """The figures of one output over all cases, as JSON. Cases without a row that counts are passed over.

    `max_abs`: the largest |actual - reference|, in units of the output's scale, max(1, the largest |reference|).
    `max_rel`: the largest |actual - reference| / max(|reference|, scale / 1000); the floor keeps zeros from deciding it.
    `cosine`: the smallest cosine of a row. Where rows are single numbers, of all of them as one vector.
    `argmax`: for logits, the share of rows whose largest element is at the same place.
    Each comes with `worst`: the case, its shape and the index where it was found. A value that is not finite makes every
    figure the worst possible.
    """
    pairs = [pair for pair in pairs if len(pair.reference.values)]
    if not pairs:  # no evidence is no pass
        figures = _worst_possible(logits)
        return {"scale": 1.0, "figures": figures, "worst": dict.fromkeys(figures, f"{tensor.name}: no row of it counts")}
    scale = max([1.0, *(float(np.abs(pair.reference.values[pair.reference.real]).max(initial=0)) for pair in pairs)])
    found: dict[str, tuple[float, str]] = {"max_abs": (0.0, ""), "max_rel": (0.0, ""), "cosine": (1.0, "")}
    same = total = 0
    first_difference = ""
    single = all(pair.reference.values.shape[1] == 1 for pair in pairs)
    for pair in pairs:
        reference, actual, real = pair.reference.values, pair.actual.values, pair.reference.real
        if not np.isfinite(actual[real]).all():
            row, column = np.argwhere(~np.isfinite(actual) & real)[0]
            where = _where(pair, tensor, int(row), int(column))
            bad = _worst_possible(logits)
            return {"scale": scale, "figures": bad, "worst": dict.fromkeys(bad, f"{where}: {actual[row, column]}")}
        error = np.where(real, np.abs(actual - reference), 0.0)
        relative = error / np.maximum(np.abs(reference), scale / 1000)
        for name, values in (("max_abs", error / scale), ("max_rel", relative)):
            row, column = np.unravel_index(int(np.argmax(values)), values.shape)
            if values[row, column] > found[name][0] or not found[name][1]:
                found[name] = (float(values[row, column]), _where(pair, tensor, int(row), int(column)))
        if not single:
            cosines = cosine(np.where(real, reference, 0.0), np.where(real, actual, 0.0))
            row = int(np.argmin(cosines))
            if cosines[row] < found["cosine"][0] or not found["cosine"][1]:
                found["cosine"] = (float(cosines[row]), _where(pair, tensor, row))
        if logits:
            low = np.where(real, reference, -np.inf).argmax(axis=1), np.where(real, actual, -np.inf).argmax(axis=1)
            different = np.flatnonzero(low[0] != low[1])
            same, total = same + len(low[0]) - len(different), total + len(low[0])
            if len(different) and not first_difference:
                first_difference = _where(pair, tensor, int(different[0]))
    if single:
        stacked = [np.concatenate([getattr(pair, side).values[:, 0] for pair in pairs]) for side in ("reference", "actual")]
        found["cosine"] = (float(cosine(stacked[0][None], stacked[1][None])[0]), f"{tensor.name}: all samples together")
    if logits and not single:
        found["argmax"] = (same / total if total else 1.0, first_difference or f"{tensor.name}: everywhere the same")
    return {
        "scale": scale,
        "figures": {name: figure for name, (figure, _) in found.items()},
        "worst": {name: worst for name, (_, worst) in found.items()},
    }


def noise(pairs: Sequence[Pair], tensor: Tensor) -> tuple[float, str]:
    """The largest noise of an output in one kind and shape of samples, and which these are: the mean squared departure of its
    elements there, in units of the variance of each column over all samples. What takes a text for another, or padding for
    text, makes it 1 or more; it is 1e308 where a value is not finite.

    The variance is taken as at least `LEAST_VARIANCE` of the mean square: what hardly varies has no noise by being rounded.
    """
    pairs = [pair for pair in pairs if pair.reference.real.any()]
    if not pairs:
        return 1e308, f"{tensor.name}: no row of it counts"
    if isinstance(tensor.shape[-1], str):  # a number a token, or a choice: places in a row are no columns
        before = np.concatenate([pair.reference.values[pair.reference.real] for pair in pairs])[:, None]
    else:
        before = np.concatenate([pair.reference.values for pair in pairs])
    unit = max(float(before.var(axis=0).mean()), LEAST_VARIANCE * float((before**2).mean()), 1e-30)
    squares: dict[tuple[str, tuple[int, ...]], list[Array]] = {}
    for pair in pairs:
        with np.errstate(invalid="ignore", over="ignore"):
            square = (pair.actual.values - pair.reference.values)[pair.reference.real] ** 2
        squares.setdefault((pair.case.name, pair.case.shape), []).append(square)
    found = []
    for (kind, shape), own in squares.items():
        share = float(np.concatenate(own).mean()) / unit
        where = f"{tensor.name}: samples with {kind}, {'x'.join(map(str, shape))}"
        found.append((share if np.isfinite(share) else 1e308, where))
    return max(found)


def _worst_possible(logits: bool) -> dict[str, float]:
    # Larger than any limit, and a number that JSON can hold.
    figures = {"max_abs": 1e308, "max_rel": 1e308, "cosine": -1.0}
    return {**figures, "argmax": 0.0} if logits else figures


def cosine(a: Array, b: Array) -> Array:
    """The cosine of each row of `a` and `b`, both `[rows, width]`; 1 where both are zero, 0 where one is."""
    norms = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    product = norms[0] * norms[1]
    both_zero = (norms[0] == 0) & (norms[1] == 0)
    inner = np.einsum("ij,ij->i", a, b)
    result: Array = np.where(both_zero, 1.0, np.divide(inner, product, out=np.zeros_like(inner), where=product > 0))
    return np.clip(result, -1.0, 1.0)


def _where(pair: Pair, tensor: Tensor, row: int, column: int | None = None) -> str:
    shape = "x".join(map(str, pair.case.shape))
    index = list(pair.reference.index[row])
    if column is not None and len(index) != len(tensor.shape):
        index.append(column)
    return f"sample {pair.case.name!r} ({shape}), output {tensor.name}{index}"


def judge(outputs: Mapping[str, Mapping[str, Any]], limits: Limits, *, expected: bool = False) -> tuple[Check, ...]:
    """Hold figures, as `compare` gave them for each output, against limits. With `expected`, also what is to be expected of a
    figure, against its limit or `MOST_EXPECTED`.

    `max_abs`, `kl` and `drop` may be at most their limits; the others at least theirs. A figure without a limit is no check.
    """
    checks = []
    for output, result in outputs.items():
        for name, figure in result["figures"].items():
            limit = getattr(limits, name, None)
            if expected and name in EXPECTATIONS and (limit := getattr(limits, EXPECTATIONS[name])) is not None:
                limit = min(limit, MOST_EXPECTED)
            if limit is not None:
                passed = figure <= limit if name in AT_MOST else figure >= limit
                checks.append(Check(output, name, figure, limit, passed, result["worst"][name]))
    return tuple(checks)


def room(check: Check) -> tuple[float, float]:
    """What a figure has lost, and what its limit allows it to lose."""
    if check.name in AT_MOST:
        return check.figure, check.limit
    return 1 - check.figure, 1 - check.limit


def miss(check: Check) -> float:
    """By how much a figure misses its limit, in units of what the limit leaves to lose."""
    lost, allowed = room(check)
    return (lost - allowed) / max(allowed, 1e-6)
