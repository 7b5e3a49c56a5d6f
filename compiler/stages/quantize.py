"""Quantize: what runs in workers to make an int8 artifact. Which plan it is, `compiler.quantization.search` decides."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compiler.backends import BACKENDS
from compiler.errors import StageError
from compiler.numerics import Case
from compiler.samples import ACCURACY, EXTRA, NONE, read_cases, shortened, with_masks
from compiler.sources import pooling
from compiler.stages.load import load
from compiler.stages.validate import Part, validate
from compiler.store import remove
from compiler.types import HELD, Artifact, File, Precision, Runner, Snapshot
from compiler.workers import LOAD_THREADS, THREADS

# An int8 artifact that is not faster by this much than the next precision is a defect.
FASTER = 1.1
# It is timed in turn with that one, so often in each of so many sweeps over all shapes: what else a machine does comes in
# spells, which would cover all batches of one short text. What comes out within these shares of that is looked at again, up
# to so often, and the quickest of all looks counts, for both: another look must not be another chance.
ROUNDS, SWEEPS, LOOKS, CLOSE = 3, 3, 3, (0.77, 1.05)


def calibrate(
    out: Path,
    snapshot: Snapshot,
    task: str,
    options: Mapping[str, bool],
    samples: Sequence[tuple[str, ...]],
    held: Sequence[tuple[str, ...]],
    bits: int,
) -> dict[str, Any]:
    """See `compiler.quantization.calibrate.calibrate`. Raises SourceError as `load` does, and StageError for a model without
    a linear layer that is worth it."""
    import torch

    from compiler.quantization import calibrate as calibration

    # It takes most of a job's time to run so much through the original.
    torch.set_num_threads(LOAD_THREADS)
    model = load(snapshot, task, aside=out, **options)
    calibration.speed_up(model.module)
    samples, held = with_masks(model, samples), with_masks(model, held)
    known = calibration.calibrate(out, model, samples, held, pooling(snapshot, task, options), bits)
    if not known["groups"]:
        reasons = set(known["left"].values())
        if calibration.NO_INPUT in reasons:
            raise StageError(calibration.DAMAGED)
        name = next((name for name, reason in known["left"].items() if reason == calibration.NO_ANSWERS), "")
        why = f"can be int8: {name}: {calibration.NO_ANSWERS}" if name else "would be faster in int8"
        raise StageError(f"no linear layer of the model {why}; leave int8 out of targets:")
    shaped = set(samples)
    others = [text for text in held if text not in shaped]
    notes = [shortened(model, [*samples, *others], "calibration")]
    if not others:
        notes.append(f"layers are judged on texts that shaped them: fewer than {HELD} are there beyond samples:")
    return {**known, "note": "; ".join(note for note in notes if note)}


def rung(
    out: Path,
    format: str,
    exported: Path,
    calibrated: Path,
    names: Sequence[str],
    rest: Precision,
    samples: Path,
    reference: Path,
    known: Mapping[str, Any],
    part: Part,
) -> dict[str, Any]:
    """Measure a plan on a part of the samples: `outputs` as `validate` has them, and the names of what is `int8` in its files.
    These are made below `out` and not kept: most plans that are tried are none that anybody needs, and `settle` makes the
    same again.
    """
    made = settle(out, format, exported, calibrated, names, rest)
    backend = BACKENDS[format]
    # Nobody hashes them; to open them, paths are enough.
    artifact = Artifact(format, "int8", tuple(File(path, "", 0) for path in backend.files("int8")), backend.runtime(rest), "")
    began = time.monotonic()
    outputs = validate(out, artifact, samples, reference, known, part)
    spent = round(1e3 * (time.monotonic() - began), 1)
    for path in out.iterdir():
        remove(path)
    return {"outputs": outputs, "int8": sorted(made["int8"]), "milliseconds": spent}


def settle(out: Path, format: str, exported: Path, calibrated: Path, names: Sequence[str], rest: Precision) -> dict[str, Any]:
    """Make a plan's files below `out`, and return what the backend says of them."""
    from compiler.quantization.layers import LAYERS
    from compiler.quantization.layers import load as load_layers

    return BACKENDS[format].quantize(out, exported, load_layers(calibrated / LAYERS, names), rest)


def faster(
    root: Path, artifact: Artifact, other_root: Path, other: Artifact, samples: Path, known: Mapping[str, Any]
) -> dict[str, tuple[float, float]]:
    """How long an artifact takes, and another of its format, of each shape that `timed` chooses: the quickest batch, seconds.

    Both are open in one process, as two models of one runtime, and take turns, with one thread each: two wait for each other
    on a busy machine.
    """
    chosen = timed(read_cases(samples, known))
    runners = [BACKENDS[made.format].open(folder, made, THREADS) for folder, made in ((root, artifact), (other_root, other))]
    for case in chosen.values():
        for runner in runners:
            runner(case.inputs)
            runner(case.inputs)
    # What a busy machine takes away is never the same for both, and never negative.
    quickest = dict.fromkeys(chosen, (math.inf, math.inf))
    for _ in range(SWEEPS):
        for name, case in chosen.items():
            for _ in range(ROUNDS):
                ours, theirs = (_seconds(runner, case) for runner in runners)
                quickest[name] = min(ours, quickest[name][0]), min(theirs, quickest[name][1])
    return quickest


def _seconds(runner: Runner, case: Case) -> float:
    began = time.perf_counter()
    runner(case.inputs)
    return time.perf_counter() - began


def times_as_fast(quickest: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """How many times as fast the first is as the second: `all`, a batch of each shape that `timed` chose one after the
    other, and of each by itself."""
    own, other = (sum(times) for times in zip(*quickest.values(), strict=True))
    return {"all": other / own, **{name: theirs / ours for name, (ours, theirs) in quickest.items()}}


def timed(cases: Sequence[Case]) -> dict[str, Case]:
    """What is timed: of the shapes in pipeline.yaml, without padding, the shortest and the longest texts in the smallest and
    the largest batch; and the largest batch of validation text."""
    full: dict[tuple[int, ...], Case] = {}
    for case in [case for case in cases if case.name == NONE][:-EXTRA]:
        full.setdefault(case.shape, case)
    ends = [sorted({shape[axis] for shape in full})[:: max(1, len({shape[axis] for shape in full}) - 1)] for axis in (0, -1)]
    chosen = {"x".join(map(str, shape)): case for shape, case in full.items() if shape[0] in ends[0] and shape[-1] in ends[1]}
    padded = max((case for case in cases if case.name == ACCURACY), key=lambda case: case.mask.size)
    return {**chosen, f"text, {'x'.join(map(str, padded.shape))}": padded}
