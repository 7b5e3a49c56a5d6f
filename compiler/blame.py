"""Blame: the first layer of an artifact whose output departs from the original's.

One text without padding, one image or one sound goes through both. The artifact gives what it computes on the way
(`Backend.inner`), the eager model what each module returns. A module's counterpart is found by content, among the values of
its size that come after the counterpart of the layer before: names do not survive in every format.

From each layer on, the original goes on with what the artifact gave, so that a layer's *own* error holds nothing of what the
layers before it lost. A layer departs when its own error is more than `ALLOWED`; that one is then looked into, module by
module.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compiler import workers
from compiler.backends import BACKENDS
from compiler.counterparts import NOT_FINITE, End, Seen, Walk, align, alike, inside, read_values, relative
from compiler.eager import Key, Record, Trace, input_of, layers, trace
from compiler.errors import NumericsError, StageError
from compiler.manifest import SAMPLES, Manifest
from compiler.numerics import Array, Case
from compiler.samples import NONE, read_cases
from compiler.store import Store, scratch, writing
from compiler.tasks import TASKS
from compiler.types import Artifact, Event, Snapshot
from compiler.verify import Validation, find_original, known_samples
from compiler.workers import LOAD_THREADS, THREADS

# The largest own error of a layer that rounding explains, ‖artifact - original‖ / ‖original‖, by precision. Measured on layers
# of correct artifacts, small encoders of nine architectures and a real one: at most 6e-7 in fp32 and 0.006 in bf16.
ALLOWED: Mapping[str, float] = {"fp32": 2e-5, "bf16": 0.03}
# Any other precision. Layers of a real encoder with weights and activations in 8 bits that is sound have 0.02 to 0.08.
ALLOWED_ELSE = 0.15
# The text is as long as any sample without padding is, up to so many tokens: all inner values of a model are held at once.
MOST_TOKENS = 128


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
            error = "not finite" if self.departs.error == NOT_FINITE else f"error {self.departs.error:.2g}"
            return f"first departs at {self.departs.layer} ({error})"
        seen = [row for row in self.layers if row.own is not None]
        most = max(seen, key=lambda row: row.own or 0.0, default=None)
        much = f", most is lost in {most.layer} (error {most.own:.2g}, allowed {self.allowed:g})" if most else ""
        moved = f", but asking for inner values moves its outputs by {self.disturbed:.2g}" * (self.disturbed > self.allowed)
        return f"no layer departs on {self.sample}{much}{moved}"


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
    import torch

    from compiler.stages.load import load

    backend = BACKENDS[artifact.format]
    textual = TASKS[task].modality == "text"
    case = (choose if textual else smallest)(read_cases(samples, known))
    module = load(snapshot, task, aside=aside, **options).module
    plain = trace(module, case.inputs)
    shipped = backend.open(root, artifact, THREADS)(case.inputs)
    sizes = {record.content.size for record in plain.records}
    values, outputs = read_values(backend.inner(root, artifact, case.inputs), set(shipped), sizes)
    torch.set_num_threads(LOAD_THREADS)  # a backend may have set its own
    if not values:
        raise StageError(f"blame {artifact.format} {artifact.precision}: the file has no inner value of any layer's size")
    allowed = ALLOWED.get(artifact.precision, ALLOWED_ELSE)
    walk = Walk(module, case, values, outputs, allowed, scaled=artifact.precision == "int8")
    calls = layers(module, plain.records, case.mask.size if textual else None)
    before = input_of(plain.records, calls[0]) if calls else None
    ends = align(walk, [*([before] if before else []), *calls])
    last = trace(module, case.inputs, lambda record: ends[record.key].instead if record.key in ends else None)
    rows, departs = table(plain, last, ends, outputs, walk.allowed)
    modules: tuple[Row, ...] = ()
    if departs is not None:
        modules, departs = look_inside(walk, plain, last, ends, departs)
    return Blame(
        artifact.format,
        artifact.precision,
        f"sample {case.name!r} ({'x'.join(map(str, case.shape))})",
        walk.allowed,
        rows,
        modules,
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


def smallest(cases: Sequence[Case]) -> Case:
    """The smallest sample of one image or sound, without padding. Raises StageError when there is none."""
    alone = [case for case in cases if all(len(value) == 1 for value in case.inputs.values()) and case.mask.all()]
    if not alone:
        raise StageError("blame: the release has no sample of one input alone; put 1 into shapes: {batch: …}, build again")
    return min(alone, key=lambda case: sum(value.size for value in case.inputs.values()))


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


def look_inside(
    walk: Walk, plain: Trace, last: Trace, ends: Mapping[Key, End], departs: Departure
) -> tuple[tuple[Row, ...], Departure]:
    """The modules inside of the layer that departs, in the order in which they run, and the first of those that does.

    Not every tensor of the original is in the file: what is fused is not. One whose like is found in no other layer says
    nothing, nor does one in a module that is right. Where there is no other layer that is right, the first behind the last
    one that is right departs.
    """
    keys = list(ends)
    calls = returns(plain.records)
    number = next((place for place, key in enumerate(keys) if label(key, calls) == departs.layer), len(keys))
    seen = list(inside(walk, last.records, ends))
    visible = {one.kind for one in seen if one.good and one.layer != number}
    own = [one for one in seen if one.layer == number]
    right = [place for place, one in enumerate(own) if one.good]
    sound = tuple(f"{one.record.key.module}." for one in own if one.good and not one.record.taken)
    siblings = bool(visible.intersection(one.kind for one in own))
    first_wrong = None
    for place, one in enumerate(own):
        behind = not right or place > right[-1]
        if one.good or one.record.key.module.startswith(sound):
            continue
        if one.kind in visible or one.record.table or (behind and not siblings):
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


def blame_release(
    path: Path,
    manifest: Manifest,
    validation: Validation,
    store: Store,
    tell: Callable[[Event], None],
    source: str | None,
    options: Mapping[str, bool],
    folder: Path | None = None,
) -> tuple[Blame, ...]:
    """What there is to say of the layers of each artifact of a release. The arguments are those of `verify_numerics`; the
    checkpoint is needed.

    Raises:
        SourceError: the checkpoint is not there, or is another.
        StageError: an artifact cannot be looked into.
    """
    model = f"{manifest.name} {manifest.release}"
    snapshot = find_original(path, manifest, source, options, folder)
    known = known_samples(path, manifest, validation)
    found = []
    with writing(store.root, "the cache"), scratch(store.root) as aside:
        log = store.root / "verify.log"
        log.write_bytes(b"")
        for artifact in manifest.artifacts:
            step = f"blame {artifact.format} {artifact.precision}"
            started = time.monotonic()
            tell(Event(model, step, "start"))
            arguments = (path, artifact, snapshot, manifest.task, path / SAMPLES, known, manifest.loading(options))
            found.append(workers.run(blame, aside, *arguments, log=log))
            tell(Event(model, step, "run", time.monotonic() - started))
    return tuple(found)


def departed(path: Path, found: Sequence[Blame]) -> NumericsError | None:
    """The error that a release's artifacts are, of which one departs from the original in a layer; None where none does."""
    for one in found:
        if one.departs is not None:
            text = f"{path}: {one.format} {one.precision}: {one.verdict}; do not use this artifact on this machine"
            return NumericsError(text, blame=[other.to_json() for other in found])
    return None
