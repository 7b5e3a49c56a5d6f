"""Which value of an artifact's file is which tensor of the original: found by content, layer after layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from compiler.eager import Key, Record, Stop, trace
from compiler.numerics import Array, Case

if TYPE_CHECKING:
    import torch

# So many values are tried for the output of a layer that departs, those that are most like it.
TRIED = 12
# What a value that is not finite has for an error: larger than any, and a number that JSON can hold.
NOT_FINITE = 1e308


@dataclass(frozen=True)
class Value:
    """An inner value of the artifact: its name, its place in the order of the file, and its content, flat float32."""

    name: str
    place: int
    content: Array


@dataclass(frozen=True)
class Match:
    """A value beside what a module returned. `error` is ‖artifact - original‖ / ‖original‖, `cosine` that of the two as flat
    vectors."""

    value: Value
    error: float
    cosine: float


def read_values(
    inner: Iterable[tuple[str, Array]], outputs: set[str], sizes: set[int]
) -> tuple[dict[int, list[Value]], dict[str, Array]]:
    """What an artifact computes, by size, of the sizes that are wanted, and its outputs. A value of `[1, heads, tokens, size]`
    stands there by token as well."""
    values: dict[int, list[Value]] = {}
    answers = {}
    for place, (name, array) in enumerate(inner):
        if name in outputs:
            answers[name] = array
        if array.size in sizes:
            found = values.setdefault(array.size, [])
            found.append(Value(name, place, array.reshape(-1)))
            if array.ndim == 4:
                found.append(Value(name, place, array.transpose(0, 2, 1, 3).reshape(-1)))
    return values, answers


def relative(actual: Array, original: Array, floor: float = 0.0) -> float:
    """‖actual - original‖ / ‖original‖; `floor` is the least that an element of the original counts for, on average."""
    actual, original = (array.astype(np.float64).reshape(-1) for array in (actual, original))
    if not np.isfinite(actual).all():
        return NOT_FINITE
    difference = float(np.linalg.norm(actual - original))
    norm = max(float(np.linalg.norm(original)), floor * float(np.sqrt(original.size)))
    return difference / norm if norm else min(difference, 1.0)


def relative_by_channel(actual: Array, original: Array, tokens: int) -> float:
    """As `relative`, of so many tokens' vectors whose channels may each be a positive factor apart: int8 evens out the input
    of a layer in the layer before, where it can."""
    rows, wanted = (array.astype(np.float64).reshape(tokens, -1) for array in (actual, original))
    if not np.isfinite(rows).all():
        return NOT_FINITE
    factors = (rows * wanted).sum(axis=0) / np.maximum((wanted * wanted).sum(axis=0), np.finfo(np.float64).tiny)
    return relative(rows, wanted * np.maximum(factors, 0.0))


def alike(actual: Array, original: Array) -> float:
    """The cosine of two arrays as flat vectors; 0 where one is not finite."""
    actual, original = (array.astype(np.float64).reshape(-1) for array in (actual, original))
    if not np.isfinite(actual).all():
        return 0.0
    norms = float(np.linalg.norm(actual) * np.linalg.norm(original))
    return float(actual @ original) / norms if norms else 0.0


@dataclass(frozen=True)
class Walk:
    """What is held against what: the original, the sample, the artifact's values by size, its outputs, and the largest own
    error that a layer may have. `scaled`: what is inside of a layer may have factors for its channels."""

    module: torch.nn.Module
    case: Case
    values: Mapping[int, Sequence[Value]]
    outputs: Mapping[str, Array]
    allowed: float
    scaled: bool = False

    def matches(
        self,
        content: Array,
        after: int,
        until: float = float("inf"),
        error: Callable[[Array, Array], float] = relative,
    ) -> list[Match]:
        """The values of a tensor's size between two places of the file, beside it, in that order."""
        found = [value for value in self.values.get(content.size, ()) if after < value.place <= until]
        return [Match(value, error(value.content, content), alike(value.content, content)) for value in found]

    def nearest(self, content: Array, after: int, until: float = float("inf")) -> Match | None:
        """The nearest of those; None where there is none."""
        return min(self.matches(content, after, until), key=lambda match: match.error, default=None)

    def nearest_inside(self, content: Array, after: int, until: float) -> Match | None:
        """The nearest for a tensor inside of a layer."""
        least = self.nearest(content, after, until)
        if least is None or least.error <= self.allowed or not self.scaled or content.size % self.case.mask.size:
            return least
        by_channel = partial(relative_by_channel, tokens=self.case.mask.size)
        closest = min(self.matches(content, after, until, by_channel), key=lambda match: match.error)
        return closest if closest.error <= self.allowed else least


@dataclass(frozen=True)
class End:
    """The end of a layer. `match` is None where the file holds no such value; `own` is then None, too. `sure`: what follows in
    the file goes on from that value."""

    match: Match | None
    sure: bool

    @property
    def instead(self) -> Array | None:
        """What the original goes on with."""
        return None if self.match is None else self.match.value.content


def align(walk: Walk, keys: Sequence[Key]) -> dict[Key, End]:
    """Find the value of the file that each layer's output is, from the first layer on, each given what the file has for the
    one before."""
    ends: dict[Key, End] = {}
    wanted = set(keys)

    def after(ends: Mapping[Key, End]) -> int:
        return max((end.match.value.place for end in ends.values() if end.match is not None), default=-1)

    def nearest(record: Record, ends: Mapping[Key, End]) -> Match | None:
        return walk.nearest(record.content, after(ends))

    def error_behind(ends: Mapping[Key, End]) -> float:
        """The own error of what follows, the next layer or the outputs."""
        errors = []

        def replace(record: Record) -> Array | None:
            if record.key in ends:
                return ends[record.key].instead
            if record.key in wanted:
                match = nearest(record, ends)
                errors.append(NOT_FINITE if match is None else match.error)
                raise Stop
            return None

        try:
            answers = trace(walk.module, walk.case.inputs, replace).outputs
        except Stop:
            return errors[0]
        return max(relative(walk.outputs[name], value, floor=1.0) for name, value in answers.items() if name in walk.outputs)

    def departed(record: Record) -> End:
        matches = sorted(walk.matches(record.content, after(ends)), key=lambda match: -match.cosine)[:TRIED]
        tried = [(error_behind({**ends, record.key: End(match, True)}), match) for match in matches]
        error, match = min(tried, key=lambda pair: pair[0], default=(NOT_FINITE, None))
        unseen = error_behind({**ends, record.key: End(None, False)})
        if unseen <= walk.allowed and unseen < error:
            return End(None, False)  # what follows is right without it: it was computed, and fused into something else
        if error <= walk.allowed:
            return End(match, True)
        return End(matches[0] if matches else None, False)

    while True:
        open_end: list[Record] = []

        def replace(record: Record, open_end: list[Record] = open_end) -> Array | None:
            if record.key not in wanted:
                return None
            if record.key not in ends:
                match = nearest(record, ends)
                if match is None or match.error > walk.allowed:
                    open_end.append(record)
                    raise Stop
                ends[record.key] = End(match, True)
            return ends[record.key].instead

        try:
            trace(walk.module, walk.case.inputs, replace)
        except Stop:
            ends[open_end[0].key] = departed(open_end[0])
            continue
        return ends


@dataclass
class Seen:
    """A tensor inside of a layer beside its counterpart, if one is good enough."""

    record: Record
    match: Match | None
    kind: str
    layer: int
    good: bool = field(init=False, default=False)


def inside(walk: Walk, records: Sequence[Record], ends: Mapping[Key, End]) -> Iterable[Seen]:
    """What ran inside of each layer, without what another had returned before, beside the nearest value of that part of the
    file."""
    keys = list(ends)
    layer, before, contents = 0, -1, list[Array]()
    for record in records:
        end = ends[keys[layer]] if layer < len(keys) else None
        until = float("inf") if end is None or end.match is None or not end.sure else end.match.value.place
        prefix = f"{keys[layer].module}." if layer < len(keys) else ""
        if not any(np.array_equal(record.content, content) for content in contents):
            contents.append(record.content)
            match = walk.nearest_inside(record.content, before, until)
            inner = record.key.module.removeprefix(prefix)
            kind = f"{inner} {record.taken}" if prefix and record.key.module.startswith(prefix) else f"{layer} {inner}"
            found = Seen(record, match, kind, layer)
            found.good = match is not None and match.error <= walk.allowed
            yield found
        if end is not None and not record.taken and record.key == keys[layer]:
            layer, contents = layer + 1, [record.content if end.instead is None else end.instead]
            before = before if end.match is None else end.match.value.place
