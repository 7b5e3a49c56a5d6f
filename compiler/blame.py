"""Blame: the first layer of an artifact whose output departs from the original's.

One text without padding goes through both. The artifact gives what it computes on the way (`Backend.inner`), the eager model
what each module returns. A module's counterpart is found by content, among the values of its size that come after the
counterpart of the layer before: names do not survive in every format.

From each layer on, the original goes on with what the artifact gave, so that a layer's *own* error holds nothing of what the
layers before it lost. A layer departs when its own error is more than `ALLOWED`; that one is then looked into, module by
module.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compiler.eager import Key, Record, Stop, Trace, input_of, layers, trace
from compiler.errors import StageError
from compiler.numerics import Array, Case
from compiler.samples import NONE, read_cases
from compiler.types import Artifact, Snapshot

if TYPE_CHECKING:
    import torch

# The largest own error of a layer that rounding explains, ‖artifact - original‖ / ‖original‖, by precision. Measured on layers
# of correct artifacts, encoders of nine architectures: at most 2e-6 in fp32 and 0.012 in bf16.
ALLOWED: Mapping[str, float] = {"fp32": 5e-5, "bf16": 0.05}
# Any other precision: 8 bits keep two digits, and a layer adds up what its matrix products lose.
ALLOWED_ELSE = 0.15
# The text is as long as any sample without padding is, up to so many tokens: all inner values of a model are held at once.
MOST_TOKENS = 128
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


@dataclass(frozen=True)
class Row:
    """A line of the table: a layer, or a module inside of one.

    `value` is its counterpart's name in the file, None where it has none: what a fusion computes inside. `error` and `cosine`
    are held against the untouched original, `lost` is the cosine that is lost since the row before, and `own` is the error
    where the original was given what the artifact computed until there.
    """

    layer: str
    value: str | None
    error: float | None
    cosine: float | None
    lost: float | None
    own: float | None


@dataclass(frozen=True)
class Departure:
    """Where an artifact first departs: the innermost module that is known, the layer that it is in, and its own error."""

    layer: str
    within: str
    error: float


@dataclass(frozen=True)
class Blame:
    """What was found of one artifact. `inside` are the modules of the layer that departs. `disturbed` is how far its outputs
    move, ‖after - before‖ / ‖before‖, when inner values are asked for: a runtime cannot fuse across them then."""

    format: str
    precision: str
    sample: str
    allowed: float
    layers: tuple[Row, ...]
    inside: tuple[Row, ...]
    departs: Departure | None
    disturbed: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def verdict(self) -> str:
        """Half a sentence."""
        if self.departs is not None:
            return f"first departs at {self.departs.layer} (error {self.departs.error:.2g})"
        seen = [row for row in self.layers if row.own is not None]
        most = max(seen, key=lambda row: row.own or 0.0, default=None)
        much = f", most is lost in {most.layer} (error {most.own:.2g}, allowed {self.allowed:g})" if most else ""
        return f"no layer departs on {self.sample}{much}"


def blame(
    aside: Path,
    root: Path,
    artifact: Artifact,
    snapshot: Snapshot,
    task: str,
    samples: Path,
    known: Mapping[str, Any],
    options: Mapping[str, bool],
) -> Blame:
    """Name the first layer of an artifact that departs. For a worker: it loads the original.

    Args:
        aside: an empty folder for what loading a checkpoint writes.
        root: where the artifact's files are.
        samples, known: as for `compiler.stages.validate.validate`.

    Raises:
        StageError: no sample is without padding, or the artifact has no inner values.
    """
    from compiler.backends import BACKENDS
    from compiler.stages.load import load
    from compiler.workers import THREADS

    backend = BACKENDS[artifact.format]
    case = choose(read_cases(samples, known))
    module = load(snapshot, task, aside=aside, **options).module
    plain = trace(module, case.inputs)
    shipped = backend.open(root, artifact, THREADS)(case.inputs)
    sizes = {record.content.size for record in plain.records}
    values, outputs = read_values(backend.inner(root, artifact, case.inputs), set(shipped), sizes)
    if not values:
        raise StageError(f"blame {artifact.format} {artifact.precision}: the file has no inner value of any layer's size")
    walk = Walk(module, case, values, outputs, ALLOWED.get(artifact.precision, ALLOWED_ELSE))
    calls = layers(module, plain.records, case.mask.size)
    before = input_of(plain.records, calls[0]) if calls else None
    ends = align(walk, [*([before] if before else []), *calls])
    last = trace(module, case.inputs, lambda record: ends[record.key].instead if record.key in ends else None)
    rows, departs = table(plain, last, ends, outputs, walk.allowed)
    inside: tuple[Row, ...] = ()
    if departs is not None:
        inside, departs = look_inside(walk, plain, last, ends, departs)
    return Blame(
        artifact.format,
        artifact.precision,
        f"sample {case.name!r} ({'x'.join(map(str, case.mask.shape))})",
        walk.allowed,
        rows,
        inside,
        departs,
        max(relative(outputs[name], value) for name, value in shipped.items()),
    )


def choose(cases: Sequence[Case]) -> Case:
    """The longest text without padding that is alone and has at most `MOST_TOKENS` tokens; the shortest where all have more.

    Raises:
        StageError: there is none.
    """
    alone = [case for case in cases if case.name == NONE and len(case.mask) == 1 and case.mask.all()]
    short = [case for case in alone if case.mask.size <= MOST_TOKENS]
    if short:
        return max(short, key=lambda case: case.mask.size)
    if alone:
        return min(alone, key=lambda case: case.mask.size)
    raise StageError("blame: the release has no sample of one text without padding")


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


def alike(actual: Array, original: Array) -> float:
    """The cosine of two arrays as flat vectors; 0 where one is not finite."""
    actual, original = (array.astype(np.float64).reshape(-1) for array in (actual, original))
    norms = float(np.linalg.norm(actual) * np.linalg.norm(original))
    return float(actual @ original) / norms if norms and np.isfinite(norms) else 0.0


@dataclass(frozen=True)
class Walk:
    """What is held against what: the original, the sample, the artifact's values by size, its outputs, and the largest own
    error that a layer may have."""

    module: torch.nn.Module
    case: Case
    values: Mapping[int, Sequence[Value]]
    outputs: Mapping[str, Array]
    allowed: float

    def matches(self, content: Array, after: int, until: float = float("inf")) -> list[Match]:
        """The values of a tensor's size between two places of the file, beside it, in that order."""
        found = [value for value in self.values.get(content.size, ()) if after < value.place <= until]
        return [Match(value, relative(value.content, content), alike(value.content, content)) for value in found]


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
        return min(walk.matches(record.content, after(ends)), key=lambda match: match.error, default=None)

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


def returns(records: Iterable[Record]) -> dict[Key, Array]:
    return {record.key: record.content for record in records if not record.taken}


def label(key: Key, calls: Iterable[Key]) -> str:
    """A module's name, with the number of the call where it has several."""
    return f"{key.module} (call {key.call})" if Key(key.module, 2) in calls else key.module


def table(
    plain: Trace, last: Trace, ends: Mapping[Key, End], outputs: Mapping[str, Array], allowed: float
) -> tuple[tuple[Row, ...], Departure | None]:
    """A row for each layer, and for each output that is not the last layer's; and the first that departs.

    Args:
        plain: the original, left alone.
        last: the original that went on with what the artifact gave.
    """
    originals, owns = returns(plain.records), returns(last.records)
    rows: list[Row] = []
    cosine = 1.0

    def add(name: str, value: str | None, actual: Array | None, original: Array, own: Array, floor: float = 0.0) -> None:
        nonlocal cosine
        if actual is None:
            rows.append(Row(name, None, None, None, None, None))
            return
        found = alike(actual, original)
        errors = relative(actual, original, floor), relative(actual, own, floor)
        rows.append(Row(name, value, errors[0], found, cosine - found, errors[1]))
        cosine = found

    for key, end in ends.items():
        value = None if end.match is None else end.match.value.name
        add(label(key, originals), value, end.instead, originals[key], owns[key])
    final = originals[list(ends)[-1]] if ends else np.zeros(0)
    for name, original in plain.outputs.items():
        # Where the last layer's output is the model's, the row would be there twice.
        if name in outputs and not (original.size == final.size and np.array_equal(original.reshape(-1), final)):
            add(f"output {name}", name, outputs[name], original, last.outputs[name], 1.0)
    first = next((row for row in rows if row.own is not None and row.own > allowed), None)
    return tuple(rows), None if first is None else Departure(first.layer, first.layer, first.own or 0.0)


@dataclass
class Seen:
    """A tensor inside of a layer beside its counterpart, if one is good enough."""

    record: Record
    match: Match | None
    kind: str
    layer: int
    good: bool = field(init=False, default=False)


def look_inside(
    walk: Walk, plain: Trace, last: Trace, ends: Mapping[Key, End], departs: Departure
) -> tuple[tuple[Row, ...], Departure]:
    """The modules inside of the layer that departs, in the order in which they run, and the first of those that does.

    Not every tensor of the original is in the file: what is fused is not. One whose like is found in no other layer says
    nothing. Where there is no other layer that is right, the first behind the last one that is right departs.
    """
    keys = list(ends)
    calls = returns(plain.records)
    number = next((place for place, key in enumerate(keys) if label(key, calls) == departs.layer), len(keys))
    seen = list(_seen(walk, last.records, ends))
    visible = {one.kind for one in seen if one.good and one.layer != number}
    own = [one for one in seen if one.layer == number]
    right = [place for place, one in enumerate(own) if one.good]
    siblings = bool(visible.intersection(one.kind for one in own))
    first_wrong = None
    for place, one in enumerate(own):
        behind = not right or place > right[-1]
        if not one.good and (one.kind in visible or one.record.table or (behind and not siblings)):
            first_wrong = place
            break
    rows = _inside_rows(plain, own, visible, first_wrong, calls)
    if first_wrong is None:
        return rows, departs
    wrong = own[first_wrong]
    start = max((place for place in right if place < first_wrong), default=-1)
    # What has weights and ran since the last that was right.
    suspects = [one.record for one in own[start + 1 : first_wrong + 1] if one.record.weighs and not one.record.taken]
    named = suspects[0] if len(suspects) == 1 else wrong.record
    name = label(named.key, calls) + (" (its input)" if named.taken else "")
    error = departs.error if wrong.match is None else wrong.match.error
    return rows, Departure(name, departs.within, error)


def _seen(walk: Walk, records: Sequence[Record], ends: Mapping[Key, End]) -> Iterable[Seen]:
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
            match = min(walk.matches(record.content, before, until), key=lambda match: match.error, default=None)
            inner = record.key.module.removeprefix(prefix)
            kind = f"{inner} {record.taken}" if prefix and record.key.module.startswith(prefix) else f"{layer} {inner}"
            found = Seen(record, match, kind, layer)
            found.good = match is not None and match.error <= walk.allowed
            yield found
        if end is not None and not record.taken and record.key == keys[layer]:
            layer, contents = layer + 1, [record.content if end.instead is None else end.instead]
            before = before if end.match is None else end.match.value.place


def _inside_rows(
    plain: Trace, own: Sequence[Seen], visible: set[str], first_wrong: int | None, calls: Iterable[Key]
) -> tuple[Row, ...]:
    originals = {(record.key, record.taken): record.content for record in plain.records}
    rows = []
    cosine: float | None = None
    for place, one in enumerate(own):
        name = label(one.record.key, calls) + (" (its input)" if one.record.taken else "")
        if one.match is None or not (one.good or one.kind in visible or place == first_wrong):
            if not one.record.taken:
                rows.append(Row(name, None, None, None, None, None))
            continue
        actual, original = one.match.value.content, originals[one.record.key, one.record.taken]
        found = alike(actual, original)
        lost = None if cosine is None else cosine - found
        rows.append(Row(name, one.match.value.name, relative(actual, original), found, lost, one.match.error))
        cosine = found
    return tuple(rows)
