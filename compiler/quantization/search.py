"""The search for the plan of an int8 artifact: makes rungs of the ladder, measures them, and stops where no faster one passes.

Each rung is an entry of the cache, so a search that was killed goes on where it was.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compiler.errors import ConfigError, NumericsError, SlowError, meant
from compiler.hashing import hash_folder
from compiler.numerics import ELEMENTS, EXPECTATIONS, judge, miss
from compiler.quantization.rungs import TABLE_WORTH, Rung, as_fast, bearable, climb, cost, first, ladder
from compiler.stages.load import REFERENCE, SAMPLES
from compiler.stages.quantize import CLOSE, FASTER, LOOKS, faster, rung, settle, times_as_fast
from compiler.stages.validate import Part, validate
from compiler.store import Entry, Step, remove
from compiler.types import Check, Target

if TYPE_CHECKING:
    from compiler.build import Build, Candidate

# The first plan that is tried has this share of the error of all layers; its figures say where the next is.
START = 0.5
# Why layers are left out of a plan that was searched for, with their error, and embeddings.
LAYER_LEFT = (
    "the budget: no plan with as little work is closer than one without it (error {:.2g}, with the layers of its input)"
)
LAYER_FOR_TABLE = "embeddings: in int8 they make the file much smaller, and without it it is hardly slower (error {:.2g})"
TABLE_LEFT = "the budget: with it in int8 as well, the plan that was found does not pass"


def search(build: Build, target: Target, out: Path) -> dict[str, Any]:
    """Put the files of the plan that was found into `out`, and return what is known of them: what the backend said, the layers
    that are `int8` and how, those that are `kept` out and why, and the `ladder`.

    Raises:
        ConfigError: the plan in pipeline.yaml names a layer that is none.
        NumericsError: no plan meets the budget; with the closest, what it missed and the first layer that departs.
        SlowError: int8 is not faster than the next precision.
    """
    spec, plan = build.plan.spec, build.plan
    reference = build.load()
    named = spec.quantize.plan.get(target.format)
    if named is not None:
        _check_named(named, reference.info["layers"], f"{spec}: quantize.plan.{target.format}")
    calibrated = build.calibrate()
    groups, rest = calibrated.info["groups"], plan.rest_of(target)
    tables = tuple(calibrated.info["tables"])
    rungs = ladder(groups, rest, target.format)
    if named is None:
        tried = [replace(rung, out=rung.out + tables) for rung in rungs]
    else:
        tried = [_given(named, rungs[0], calibrated.info, f"{spec}: quantize.plan.{target.format}")]
    # Of many plans some pass by chance: what is searched for is held to what is to be expected as well.
    trials = _Trials(build, target, reference, calibrated, tried, searching=named is None)
    if named is not None:
        passing = (0, 0) if trials.measure(0)[0] else None
    else:
        passing = _find(trials, rungs, first([rung.error for rung in rungs], START * rungs[0].error), tables)
    if passing is None:
        what = "no plan that was tried meets the budget" if named is None else "the plan in quantize.plan misses the budget"
        missed, closest = trials.closest()
        verdict = build.reject(reference, trials.candidate(closest, out))
        raise NumericsError(
            f"{spec}: {target}: {what}; the closest has {missed}; {trials.without() or verdict}; nothing is released, that "
            f"one is in {build.folder / 'failed'}; widen budget.int8 if you accept it, give more calibration text such as the "
            "model will see, or leave int8 out of targets:"
        )
    found, fastest = passing
    entry = trials.settled(found, out)
    slow = _slower(build, target, reference, entry)
    if slow and trials.rungs[found].error < trials.rungs[fastest].error and trials.holds(fastest):
        found = fastest  # layers that left int8 for embeddings are not what makes it slow
        entry = trials.settled(found, out)
        slow = _slower(build, target, reference, entry)
    if slow:
        advice = "leave int8 out of targets:, or set quantize.fallback: true to go on without"
        raise SlowError(f"{spec}: {target}: {slow}" + ("" if spec.quantize.fallback else f"; {advice}"))
    chosen = trials.rungs[found]
    kept = dict.fromkeys(chosen.out, TABLE_LEFT)
    for group in groups:
        for name in {*group["names"]} & kept.keys():
            kept[name] = (LAYER_LEFT if name in trials.rungs[fastest].out else LAYER_FOR_TABLE).format(group["error"])
    kept |= dict.fromkeys(
        chosen.slow, "to quantize its input, and to give channels more than once, takes longer than int8 saves"
    )
    if named is not None:
        kept = dict.fromkeys(kept, "quantize.plan says so")
    known = {name: value for name, value in entry.info.items() if name != "left"}
    return {**known, "kept": {**calibrated.info["left"], **kept, **entry.info["left"]}, "ladder": trials.told}


def _find(trials: _Trials, rungs: Sequence[Rung], start: int, tables: tuple[str, ...]) -> tuple[int, int] | None:
    """The number of a plan that meets the budget in every sample than which none that passes is faster that anybody could
    tell, and of the fastest that met it in its answers, which may have its embeddings as they are; None where no rung does."""
    costs = [trials.cost(rung.out) for rung in rungs]
    found = climb([rung.error for rung in rungs], costs, start, trials.measure)
    if found is None:
        return None
    last = max(number for number, cost in enumerate(costs) if as_fast(costs[found], cost, TABLE_WORTH[trials.rest]))
    for number in dict.fromkeys((found, last)) if tables else ():
        inside = replace(rungs[number], number=len(trials.rungs), int8=rungs[number].int8 + tables)
        trials.rungs.append(inside)
        if trials.measure(inside.number)[0] and trials.holds(inside.number):
            return inside.number, found
    if trials.holds(found):
        return found, found
    # Seldom: its answers meet the budget, and the elements of some output do not.
    trials.look_at_all()
    return _find(trials, rungs, found, tables)


def _check_named(named: tuple[str, ...], layers: Sequence[str], where: str) -> None:
    """Before anything takes long: a plan may name what is never in int8, as a manifest does, and nothing that is no layer."""
    if unknown := [name for name in named if name not in layers]:
        hint = meant(unknown[0], layers, f"there are {', '.join(layers[:4])} …", cutoff=0.9)
        raise ConfigError(f"{where}: {unknown[0]} is no layer that can be int8; {hint}")


def _given(named: tuple[str, ...], first: Rung, known: Mapping[str, Any], where: str) -> Rung:
    """The plan that a user gives, of what is `known` of the calibration."""
    layers = (*first.out, *first.int8)
    every = (*layers, *known["tables"])
    if set(layers) <= set(named):
        raise ConfigError(f"{where}: leaves no layer in int8; leave int8 out of targets: instead")
    out = tuple(name for name in every if name in named)
    inside = [group["error"] for group in known["groups"] if not set(group["names"]) <= set(named)]
    return Rung(0, out, tuple(name for name in every if name not in named), math.fsum(inside))


class _Trials:
    """Rungs as they are tried: `entries` by number, and `told`, what the manifest says of each, in the order of the trials.

    Those that are `searching` are held to what is to be expected of other texts, too.
    """

    def __init__(
        self, build: Build, target: Target, reference: Entry, calibrated: Entry, rungs: list[Rung], *, searching: bool
    ) -> None:
        self.build, self.target, self.reference, self.calibrated, self.rungs = build, target, reference, calibrated, rungs
        self.searching, self.rest = searching, build.plan.rest_of(target)
        self.entries: dict[tuple[int, Part], Entry] = {}
        # A limit of what is not an answer needs all samples. A default does not, whether it is given or not: what is found is
        # held to those, and the cache's keys are of limits.
        self.whole = bool({*ELEMENTS} & set(build.plan.spec.budget.departing().asked("int8")))
        self._tables = set(calibrated.info["tables"])
        self.told: list[dict[str, Any]] = []
        self._rows: dict[int, dict[str, Any]] = {}
        self._failed: list[tuple[float, str, int]] = []

    def measure(self, number: int) -> tuple[bool, float]:
        """Make a rung and measure its answers on validation text: the budget's verdict, and the error that it would bear."""
        began = time.monotonic()
        entry, tried = self._measured(number, self._part), self.rungs[number]
        checks = self._checks(entry.info["outputs"])
        failed = sorted((check for check in checks if not check.passed), key=miss, reverse=True)
        figures = entry.info["outputs"].get("answers", {"figures": {}})["figures"]
        verdict = _missed(failed[0]) if failed else "passes"
        # What a file holds: a layer that a format joins with one that is out is out as well.
        inside, every = set(entry.info["int8"]), {*tried.int8, *tried.out}
        self._rows[number] = {
            "int8": len(inside - self._tables),
            "tables": len(inside & self._tables),
            "out": list(tried.out),
            "cost": self.cost(every - inside),
            "figures": {name: round(figure, 6) for name, figure in figures.items()},
            "passed": not failed,
            **({"missed": verdict} if failed else {}),
        }
        self.told.append(self._rows[number])
        shown = ", ".join(f"{name} {_short(figure)}" for name, figure in figures.items())
        milliseconds = f", {entry.info['milliseconds'] / 1e3:.1f} s for all texts"
        embeddings = " and embeddings" if inside & self._tables else ""
        amount = f"{len(inside - self._tables)} of {len(every - self._tables)} layers{embeddings}"
        # What a user gave is not quite what is made where a format computes layers as one, and some of them are out.
        left = [] if self.searching else [name for name in tried.int8 if name not in inside]
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        beside = f" (not in int8 in this format, as quantize.plan has it: {left[0]}{more})" if left else ""
        spent = f", cost {self._rows[number]['cost']:.3f}" if self.searching else ""
        said = f"{amount} int8{beside}{spent}: {shown}{milliseconds}: {verdict}"
        self.build.tell_rung(self.target, "tried", said, began)
        if failed:
            self._failed.append(max((miss(check), f"{amount}: {_text(check)}", number) for check in failed))
        # Of a figure and what is to be expected of it the second says where to go: it is less of a matter of chance.
        steady = {EXPECTATIONS[check.name]: check.limit for check in checks if check.name in EXPECTATIONS}
        return not failed, bearable([check for check in checks if steady.get(check.name) != check.limit], tried.error)

    def cost(self, out: Collection[str]) -> float:
        """The static cost of a plan that leaves layers `out`."""
        return cost(self.calibrated.info["groups"], self.rest, self.target.format, out)

    def look_at_all(self) -> None:
        """From here on run every sample for each plan. By how much others missed is not to be compared with that."""
        self.whole = True
        self._failed.clear()

    def holds(self, number: int) -> bool:
        """Whether a plan whose answers meet the budget does so in all samples as well; where not, that is told."""
        # Its answers were measured.
        outputs = self._measured(number, "all" if self.whole else "elements").info["outputs"]
        failed = [check for check in self._checks(outputs) if not check.passed]
        if failed:
            row, verdict = self._rows[number], _missed(max(failed, key=miss))
            row |= {"passed": False, "missed": verdict}
            self.build.tell_rung(self.target, "tried", f"{row['int8']} layers int8, in every sample: {verdict}")
        return not failed

    def without(self) -> str:
        """Half a sentence on what is lost without any int8 layer; empty where the budget bears it."""
        rest = self.rest
        other = Target(self.target.format, rest, self.target.opset)
        exported = self.build.export(other)
        samples = (self.reference.root / SAMPLES, self.reference.root / REFERENCE, self.reference.info)
        # Held to what int8 is held to.
        artifact = replace(self.build.artifact(other, exported), precision="int8")
        outputs = self.build.run(validate, exported.root, artifact, *samples, self._part)
        failed = [check for check in self._checks(outputs) if not check.passed]
        if not failed:
            return ""
        hint = "; quantize: {cpu: avx512_vnni} keeps what is not int8 in fp32" if rest == "bf16" else ""
        return f"{rest} alone, without an int8 layer, has {_text(max(failed, key=miss))}{hint}"

    def _checks(self, outputs: Mapping[str, Mapping[str, Any]]) -> tuple[Check, ...]:
        return judge(outputs, self.build.plan.spec.budget.limits("int8"), expected=self.searching)

    def closest(self) -> tuple[str, int]:
        """The plan that missed the least and by how much, and its number."""
        _, text, number = min(self._failed)
        return text, number

    def candidate(self, number: int, out: Path) -> Candidate:
        """A plan, whose files are put into `out`, as the gate sees one."""
        entry = self.settled(number, out)
        artifact = replace(self.build.artifact(self.target, entry), ladder=tuple(self.told))
        return self.build.judged(artifact, entry, self._measured(number, self._part).info["outputs"])

    def settled(self, number: int, out: Path) -> Entry:
        """A plan, its files in `out`."""
        for path in out.iterdir():
            remove(path)
        step, arguments = self._step(self.rungs[number])
        info = self.build.run(settle, out, *arguments)
        return Entry(out, step.key, hash_folder(out), info)

    @property
    def _part(self) -> Part:
        return "all" if self.whole else "answers"

    def _measured(self, number: int, part: Part) -> Entry:
        if (number, part) not in self.entries:
            step, arguments = self._step(self.rungs[number], samples=part)
            measured = (self.reference.root / SAMPLES, self.reference.root / REFERENCE, self.reference.info, part)
            made = self.build.cached(step, lambda out: self.build.run(rung, out, *arguments, *measured))
            self.entries[number, part] = made
        return self.entries[number, part]

    def _step(self, tried: Rung, **more: str) -> tuple[Step, tuple[Any, ...]]:
        """What a plan's figures are an entry of, and the arguments of `settle` for its files."""
        build, target, plan = self.build, self.target, self.build.plan
        # What shapes a rung is what shapes the search, and its layers; how the search judges it is not.
        inputs = {
            name: value
            for name, value in plan.exports[target].inputs.items()
            if name not in ("limits int8", "plan", "fallback")
        }
        inputs |= {"layers": ", ".join(tried.int8), **more}
        step = Step(str(plan.spec), "rung", str(target), dict(sorted(inputs.items())))
        exported = build.export(plan.base_of(target))
        return step, (target.format, exported.root, self.calibrated.root, tried.int8, self.rest)


def _short(figure: float) -> str:
    """A figure for a line of progress: shares with four places, what is far from 1 with two digits."""
    return f"{figure:.4f}" if figure == 0 or 1e-3 <= abs(figure) < 1e4 else f"{figure:.2g}"


def _missed(check: Check) -> str:
    return f"{check.name} misses {check.limit:.9g} by {abs(check.figure - check.limit):.2g}"


def _text(check: Check) -> str:
    found = f"{check.name} {check.figure:.9g}, its limit is {check.limit:.9g}, missed by {abs(check.figure - check.limit):.2g}"
    if check.name in EXPECTATIONS:
        return f"{found} (in a search; a plan in quantize.plan is held to {EXPECTATIONS[check.name]})"
    return found


def _slower(build: Build, target: Target, reference: Entry, made: Entry) -> str:
    """Why int8 is not worth it: how it compares with the same model in the next precision; empty when it is faster."""
    rest = build.plan.rest_of(target)
    other = Target(target.format, rest, target.opset)
    exported = build.export(other)
    artifact, against = build.artifact(target, made), build.artifact(other, exported)
    quickest: dict[str, tuple[float, float]] = {}
    for number in range(LOOKS):
        began = time.monotonic()
        seconds = build.run(faster, made.root, artifact, exported.root, against, reference.root / SAMPLES, reference.info)
        for name, (ours, theirs) in seconds.items():
            before = quickest.get(name, (ours, theirs))
            quickest[name] = min(ours, before[0]), min(theirs, before[1])
        ratios = times_as_fast(quickest)
        shown = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
        build.tell_rung(target, "timed", f"times as fast as {rest}: {shown}", began)
        if number == 0 and not CLOSE[0] * FASTER < ratios["all"] < CLOSE[1] * FASTER:
            break
    if ratios["all"] >= FASTER:
        return ""
    return f"int8 is {ratios['all']:.2f} times as fast as {rest} here ({shown}), and should be at least {FASTER:g}"
