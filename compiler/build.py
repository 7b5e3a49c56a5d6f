"""One build of one model: runs the steps of its plan in workers, through the cache, and keeps what failed."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

import compiler
from compiler import cpu, workers
from compiler.backends import BACKENDS
from compiler.blame import blame
from compiler.config import Limits
from compiler.errors import CompileError, ConfigError, NumericsError, ReleaseError, SlowError, StageError
from compiler.hashing import canonical
from compiler.manifest import MANIFEST, Made, Manifest, Source, differences, from_bytes
from compiler.numerics import judge, miss
from compiler.plan import Plan, why
from compiler.quantization.search import search
from compiler.samples import MAX_ACCURACY_LINES
from compiler.stages.export import export
from compiler.stages.load import REFERENCE, SAMPLES, reference
from compiler.stages.optimize import check_fusions
from compiler.stages.package import package
from compiler.stages.quantize import FASTER, calibrate
from compiler.stages.validate import validate
from compiler.store import Entry, Step, Store, remove, scratch, sweep, write_file, writing
from compiler.types import Artifact, Event, File, Report, Signature, Target
from compiler.verify import read_release, verify_files
from compiler.workers import THREADS

# What validation.json keeps of the samples' description.
KNOWN = ("cases", "keep", "answering", "labels")
# A build folder beside the releases: logs, what failed, and what is not finished.
FOLDER = ".build"


@dataclass(frozen=True)
class Context:
    """Where builds read and write, and whom they tell. `folder` is what a pipeline's relative paths start from."""

    folder: Path
    output: Path
    store: Store
    tell: Callable[[Event], None]
    use_cache: bool = True
    jobs: int = 3


@dataclass(frozen=True)
class Release:
    """A release on disk, the verdicts on its artifacts, and whether this build made it."""

    path: Path
    manifest: Manifest
    reports: tuple[Report, ...]
    made: bool


@dataclass(frozen=True)
class Candidate:
    """A target's artifact, the cache entry that holds its files, its figures by output, and the verdict on them."""

    artifact: Artifact
    entry: Entry
    figures: Mapping[str, Any]
    report: Report


class Build:
    """Use `with Build.alone(plan, context) as build`; no other process builds the same release meanwhile."""

    def __init__(self, plan: Plan, context: Context) -> None:
        self.plan = plan
        self.context = context
        spec = plan.spec
        self.target = context.output / spec.name / spec.release
        self.folder = context.output / FOLDER / spec.name / spec.release
        self.log = self.folder / "build.log"
        self._entries: dict[str, Entry] = {}
        self._guard, self._locks = threading.Lock(), dict[str, threading.Lock]()
        self._refused: dict[str, str] = {}
        self._recalled: dict[str, Entry] = {}
        self._load_options = {
            "trust_remote_code": spec.trust_remote_code,
            "allow_pickle": spec.allow_pickle,
            "sentence_embedding": spec.sentence_embedding,
        }

    @classmethod
    @contextlib.contextmanager
    def alone(cls, plan: Plan, context: Context) -> Iterator[Self]:
        """A build that has its release to itself: a second one waits, and then finds the work done."""
        build = cls(plan, context)
        with writing(context.output, "the output folder"):
            build.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(build.folder / "lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                build._tell("", "waiting", detail="another build of this release is running")
                lock.acquire()
        try:
            sweep(build.folder)
            for left in ("failed", workers.MODULES):
                remove(build.folder / left)
            with writing(context.output, "the output folder"):
                build.log.write_bytes(b"")
            yield build
        finally:
            remove(build.folder / workers.MODULES)
            lock.release()

    def current(self) -> Release | None:
        """The release, when it is there and is what this plan would make; every byte of it is hashed again.

        Raises:
            ReleaseError: a release of that version is there but is damaged, or was made from something else.
        """
        started = time.monotonic()
        found = existing(self.target)
        if found is None:
            return None
        manifest, reports = found
        if not self.context.use_cache and manifest.key == self.plan.package.key:
            return None  # build it again and see that the bytes are the same
        if manifest.key != self.plan.package.key:
            raise self._refusal(self._changes(manifest))
        made = {(artifact.format, artifact.precision): artifact.fusions for artifact in manifest.artifacts}
        for target in self.plan.validates:
            if str(target) not in manifest.refused:
                self._check_fusions(target, made[target.format, target.precision])
        self._tell("", "current", started)
        return Release(self.target, manifest, reports, made=False)

    def recall(self) -> bool:
        """Take every step from the cache, where it has them all, without hashing their files: no job reads them then, and
        `package`, which hashes what it copies, raises DamagedError."""
        store = self.context.store
        found = {step.key: store.look(step, hashed=False) for step in self.plan.steps if step is not self.plan.package}
        self._recalled = {key: entry for key, entry in found.items() if entry is not None}
        if not self.context.use_cache or len(self._recalled) < len(found):
            self._recalled = {}
        return bool(self._recalled)

    def forget(self) -> None:
        """After `recall`: hash what the cache has before it is used, and make again what is damaged."""
        self._tell(self.plan.package.id, "stopped", detail="the cache is damaged")
        self._recalled, self._entries = {}, {}

    def load(self) -> Entry:
        """The reference: samples, and what the untouched fp32 model answers. Raises ConfigError as `check_limits` does, for
        int8, which takes most of the time."""
        plan, shapes = self.plan, self.plan.spec.shapes
        entry = self._make(
            plan.load,
            lambda out: self.run(
                reference,
                out,
                plan.snapshot,
                plan.task,
                plan.texts.lines,
                shapes.batch,
                shapes.sequence,
                self._load_options,
                plan.texts.labels,
                plan.calibrate is not None,
            ),
        )
        if plan.calibrate is not None:
            self.check_limits("int8", "int8", entry.info["judged"])
        return entry

    def calibrate(self) -> Entry:
        """Every layer in int8, and what each costs in accuracy: one for all formats."""
        plan = self.plan
        if (step := plan.calibrate) is None or (text := plan.calibration) is None:
            raise ValueError(f"{plan.spec}: no target is int8")
        arguments = (plan.snapshot, plan.task, self._load_options, text.samples, text.held, plan.bits)
        return self._make(step, lambda out: self.run(calibrate, out, *arguments))

    def export(self, target: Target) -> Entry:
        """A target's files; those that it is made from come first."""
        if target.precision == "int8":
            try:
                return self._make(self.plan.exports[target], lambda out: search(self, target, out))
            except SlowError:
                if not self.plan.spec.quantize.fallback:
                    raise
                # How fast it was here belongs to no release, and no cache: another time it may be faster.
                refused = f"int8 is not {FASTER:g} times as fast as {self.plan.rest_of(target)} where this was built"
                return Entry(Path(), "", (), {"refused": refused})
        source = self.plan.source_of(target)
        origin = None if source is None else self.export(source).root
        arguments = (target, self.plan.snapshot, self.plan.task, self._load_options, origin)
        entry = self._make(self.plan.exports[target], lambda out: self.run(export, out, *arguments))
        low = [one for one in self.plan.validates if one.precision == "int8"]
        if target in self.plan.validates or any(self.plan.base_of(one) == target for one in low):
            self._check_fusions(target, entry.info["fusions"])
        return entry

    def _check_fusions(self, target: Target, fired: Mapping[str, int]) -> None:
        check_fusions(f"{self.plan.spec}: {target}", fired, self.plan.expects(target))

    def validate(self, target: Target, exported: Entry, loaded: Entry) -> Candidate | None:
        """A target's figures against the reference, and the verdict; None for one that is left out. One that does not pass is
        kept to be looked into."""
        if "refused" in exported.info:
            self._refused[str(target)] = exported.info["refused"]
            return None
        artifact = self.artifact(target, exported)
        arguments = (exported.root, artifact, loaded.root / SAMPLES, loaded.root / REFERENCE, loaded.info)
        try:
            measured = self._make(self.plan.validates[target], lambda out: {"outputs": self.run(validate, *arguments)})
        except NumericsError as error:
            self._keep(artifact, exported, {"error": str(error)})
            raise
        figures = measured.info["outputs"]
        self.check_limits(str(target), target.precision, [name for result in figures.values() for name in result["figures"]])
        return self.judged(artifact, exported, figures)

    def judged(self, artifact: Artifact, entry: Entry, figures: Mapping[str, Any]) -> Candidate:
        """An artifact with its figures and the verdict on them."""
        checks = judge(figures, self.plan.spec.budget.limits(artifact.precision))
        return Candidate(artifact, entry, figures, Report(artifact.format, artifact.precision, checks))

    def check_limits(self, target: str, precision: str, figures: Iterable[str]) -> None:
        """Raise ConfigError for a limit in pipeline.yaml of what there is no figure of: nobody would hold it."""
        there = {name: None for name in figures if name in Limits.model_fields}
        if missing := [name for name in self.plan.spec.budget.asked(precision) if name not in there]:
            raise ConfigError(
                f"{self.plan.spec}: budget.{precision}.{missing[0]}: {target} has no such figure with this task and this "
                f"validation text; it has {', '.join(there)}"
            )

    def artifact(self, target: Target, entry: Entry) -> Artifact:
        """What the manifest says of a target's files, which are an entry's."""
        backend, info = BACKENDS[target.format], entry.info
        source = self.plan.source_of(target)
        narrow = target.precision == "int8" and self.plan.bits == 7
        return Artifact(
            format=target.format,
            precision=target.precision,
            files=_in_order(entry.files, backend.files(target.precision)),
            runtime=backend.runtime(self.plan.rest_of(target)),
            key=entry.key,
            opset=info["opset"],
            fusions=info["fusions"],
            declined=info["declined"] if source is None else self.export(source).info["declined"],
            fast_on=cpu.FAST_ON[target.precision] + (cpu.NARROW_SUMS if narrow else ()),
            needs=cpu.WIDE_SUMS if target.precision == "int8" and not narrow else (),
            int8=info.get("int8", {}),
            kept=info.get("kept", {}),
            ladder=tuple(info.get("ladder", ())),
        )

    def side_by_side(self, targets: Sequence[Target], work: Callable[[Target], Candidate | None]) -> list[Candidate]:
        """Do the work for targets, formats side by side. The first error stops the others."""
        columns: dict[str, list[Target]] = {}
        for target in targets:
            columns.setdefault(target.format, []).append(target)
        with ThreadPoolExecutor(max(1, self.context.jobs)) as pool:
            futures = [pool.submit(lambda column: [work(target) for target in column], column) for column in columns.values()]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                workers.stop()
                pool.shutdown(wait=True, cancel_futures=True)
                workers.reset()
                raise
        return [candidate for future in futures for candidate in future.result() if candidate is not None]

    def gate(self, loaded: Entry, made: Sequence[Candidate]) -> None:
        """Refuse the whole release when an artifact is not as close to the original as its limits ask.

        Raises:
            StageError: all targets were left out.
            NumericsError: with the worst sample of the worst check, and the first layer that departs; the failing files are
                kept beside their figures and the table of their layers.
        """
        if not made:
            reasons = "; ".join(f"{target}: {reason}" for target, reason in sorted(self._refused.items()))
            raise StageError(f"{self.plan.spec}: no target is left to release ({reasons}); add another one to targets:")
        failed = [candidate for candidate in made if not candidate.report.passed]
        verdicts = [self.reject(loaded, candidate) for candidate in failed]
        if failed:
            first = failed[0]
            check = max((check for check in first.report.checks if not check.passed), key=miss)
            others = [f"{other.report.format} {other.report.precision}" for other in failed[1:]]
            also = f"; {', '.join(others)} failed too" if others else ""
            raise NumericsError(
                f"{self.plan.spec}: {first.report.format} {first.report.precision}: {check.name} is {check.figure:.6g}, "
                f"its limit is {check.limit:g}, at {check.worst}; {verdicts[0]}{also}; nothing is released, what failed is in "
                f"{self.folder / 'failed'}; leave that target out, or widen budget: if you accept it",
                tuple(candidate.report for candidate in made),
            )

    def reject(self, loaded: Entry, candidate: Candidate) -> str:
        """Keep what failed beside its figures and the table of its layers; half a sentence on the first that departs."""
        verdict, layers = self._blame(loaded, candidate)
        self._keep(candidate.artifact, candidate.entry, {"outputs": candidate.figures, "blame": layers})
        return verdict

    def _blame(self, loaded: Entry, candidate: Candidate) -> tuple[str, Mapping[str, Any]]:
        """Half a sentence on the first layer of a failing artifact that departs, and what was seen of its layers. What keeps
        it from being found is no error of its own: that of the gate comes all the same."""
        artifact, plan = candidate.artifact, self.plan
        step = f"blame {artifact.format} {artifact.precision}"
        started = time.monotonic()
        self._tell(step, "start")
        try:
            with scratch(self.folder) as aside:
                arguments = (artifact, plan.snapshot, plan.task, loaded.root / SAMPLES, loaded.info, self._load_options)
                found = workers.run(blame, aside, candidate.entry.root, *arguments, log=self.log)
        except (CompileError, OSError) as error:
            self._tell(step, "stopped" if workers.stopped() else "failed", started)
            reason = " ".join(str(error).split())
            return f"no layer is named ({reason})", {"error": reason}
        self._tell(step, "run", started)
        return found.verdict, found.to_json()

    def package(self, loaded: Entry, made: Sequence[Candidate]) -> Release:
        """The release, on disk under its name.

        Raises:
            ReleaseError: a release of that version is there, and this build gives other bytes.
        """
        spec, plan, snapshot = self.plan.spec, self.plan, self.plan.snapshot
        manifest = Manifest(
            name=spec.name,
            release=spec.release,
            task=plan.task,
            architecture=loaded.info["architecture"],
            source=Source(snapshot.uri, snapshot.revision, snapshot.licence, snapshot.files),
            entry=plan.entry,
            signature=Signature.from_json(loaded.info["signature"]),
            positions=loaded.info["positions"],
            left_out=tuple(loaded.info["left_out"]),
            artifacts=tuple(candidate.artifact for candidate in made),
            files=(),
            refused=dict(sorted(self._refused.items())),
            libraries=plan.libraries,
            python=platform.python_version(),
            compiler=compiler.__version__,
            steps={step.id: Made(step.key, step.inputs) for step in plan.steps},
            key=plan.package.key,
        )
        validation = {
            "schema": 1,
            "data": {
                "name": plan.texts.name,
                "sha256": plan.texts.sha256,
                "lines": plan.texts.rows,
                **({"answered": plan.texts.answered(MAX_ACCURACY_LINES)} if plan.calibrate is not None else {}),
                **({"files": dict(plan.texts.files)} if plan.texts.files else {}),
                **({"note": loaded.info["note"]} if loaded.info["note"] else {}),
            },
            **_calibrated(plan),
            "cpu": cpu.features(),
            "threads": THREADS,
            # With the samples beside this file, the signature in the manifest and the limits below: what repeats the checks.
            "known": {name: loaded.info[name] for name in KNOWN if loaded.info[name] is not None},
            "artifacts": [
                {
                    "format": candidate.artifact.format,
                    "precision": candidate.artifact.precision,
                    "outputs": candidate.figures,
                    "checks": [asdict(check) for check in candidate.report.checks],
                }
                for candidate in made
            ],
        }
        inside = {file.path: file for file in loaded.files}
        own = loaded.info["support"]
        support = [(snapshot.root, file) for file in snapshot.support if f"support/{file.path}" not in own]
        support += [(loaded.root, inside[path]) for path in own]
        artifacts = [(candidate.artifact, candidate.entry) for candidate in made]
        content = (manifest, artifacts, support, (loaded.root, inside[SAMPLES]), validation)
        reports = tuple(candidate.report for candidate in made)
        started = self._started(plan.package)
        with writing(self.context.output, "the output folder"), scratch(self.folder) as aside:
            if os.path.lexists(self.target):
                again = aside / "again"
                again.mkdir()
                whole = package(again, aside / "release", *content)
                self._same_again(whole)
                self._tell(plan.package.id, "current", started)
                return Release(self.target, whole, reports, made=False)
            whole = package(aside, self.target, *content)
        self._tell(plan.package.id, "released", started)
        return Release(self.target, whole, reports, made=True)

    def _same_again(self, whole: Manifest) -> None:
        """Compare what was assembled again with the release that is there."""
        old = from_bytes((self.target / MANIFEST).read_bytes(), str(self.target / MANIFEST))
        before = {file.path: file.sha256 for file in old.every_file}
        after = {file.path: file.sha256 for file in whole.every_file}
        changed = [path for path in sorted({*before, *after}) if before.get(path) != after.get(path)]
        if changed:
            raise self._refusal([f"other bytes in {path}" for path in changed])

    def _changes(self, manifest: Manifest) -> list[str]:
        found: list[str] = []
        for step in self.plan.steps:
            old = manifest.steps.get(step.id)
            changed = differences(old.inputs if old else {}, step.inputs)
            found += [f"{step.id}: {text}".strip() for text in changed if not text.startswith("step ")]
        return found or ["its targets"]

    def _refusal(self, changes: Sequence[str]) -> ReleaseError:
        spec = self.plan.spec
        more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
        return ReleaseError(
            f"{spec}: is released already, with other content ({'; '.join(changes[:3])}{more}); a release never changes: "
            f"set release: {free_release(self.target)}"
        )

    def run(self, job: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
        """A job in a worker, with what it prints in the build's log."""
        return workers.run(job, *arguments, log=self.log)

    def cached(self, step: Step, make: Callable[[Path], dict[str, Any]]) -> Entry:
        """The entry of a step that the plan does not name: a rung of a search."""
        return self.context.store.get_or_make(step, make, use_cache=self.context.use_cache)[0]

    def tell_rung(self, target: Target, state: str, detail: str, started: float | None = None) -> None:
        """Tell of what a search finds."""
        self._tell(self.plan.exports[target].id, state, started, detail)

    def _make(self, step: Step, make: Callable[[Path], dict[str, Any]]) -> Entry:
        with self._guard:
            lock = self._locks.setdefault(step.key, threading.Lock())
        with lock:  # formats, side by side, share steps
            return self._entries.get(step.key) or self._made(step, make)

    def _made(self, step: Step, make: Callable[[Path], dict[str, Any]]) -> Entry:
        started = self._started(step)
        try:
            if (recalled := self._recalled.get(step.key)) is not None:
                entry, cached = recalled, True
            else:
                entry, cached = self.context.store.get_or_make(step, make, use_cache=self.context.use_cache)
        except CompileError as error:
            left_out = isinstance(error, SlowError) and self.plan.spec.quantize.fallback
            state = "stopped" if workers.stopped() else "left out" if left_out else "failed"
            self._tell(step.id, state, started, str(error) if left_out else "")
            if str(error).startswith((step.stage, f"{self.plan.spec}: ")) or isinstance(error, NumericsError):
                raise
            raise type(error)(f"{self.plan.spec}: {step.id}: {error}") from error
        self._entries[step.key] = entry
        self._remember(step)
        self._tell(step.id, "cached" if cached else "run", started, entry.info.get("note", ""))
        return entry

    def _started(self, step: Step) -> float:
        self._tell(step.id, "start")
        return time.monotonic()

    def _tell(self, step: str, state: str, started: float | None = None, detail: str = "") -> None:
        seconds = 0.0 if started is None else time.monotonic() - started
        self.context.tell(Event(str(self.plan.spec), step, state, seconds, detail))

    def _remember(self, step: Step) -> None:
        """Note a step's inputs, so that a later plan can say what changed."""
        path = history_path(self.context.output, self.plan.spec.name)
        with contextlib.suppress(OSError), FileLock(f"{path}.lock"):  # it only explains: a full disk is told elsewhere
            history = read_history(path)
            if history.get(step.id) != dict(step.inputs):
                history[step.id] = dict(step.inputs)
                aside = path.with_suffix(".new")
                write_file(aside, canonical(history))
                os.replace(aside, path)

    def _keep(self, artifact: Artifact, entry: Entry, report: Mapping[str, Any]) -> None:
        """Keep a failing artifact's files beside a report, for whoever looks into it."""
        folder = self.folder / "failed"
        with writing(self.context.output, "what failed the gate"):
            for file in artifact.files:
                (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(entry.root / file.path, folder / file.path)
            name = f"{artifact.format}_{artifact.precision}.json"
            write_file(folder / name, canonical({"artifact": asdict(artifact), **report}))


def _calibrated(plan: Plan) -> dict[str, Any]:
    """What text int8 was calibrated on."""
    text = plan.calibration
    if text is None:
        return {}
    held = len(text.held) if text.apart else 0
    return {"calibration": {"name": text.name, "sha256": text.sha256, "samples": len(text.samples), "held": held}}


def existing(target: Path) -> tuple[Manifest, tuple[Report, ...]] | None:
    """The release in a folder, every byte of it hashed again, and its verdicts; None where there is nothing.

    Raises:
        ReleaseError: what is there is damaged, or no release.
    """
    if not os.path.lexists(target):
        return None
    if not (target / MANIFEST).is_file():
        raise ReleaseError(f"{target}: is in the way and is no release (it has no {MANIFEST}); remove it")
    manifest, reports = read_release(target)
    verify_files(target, manifest)
    return manifest, reports


def planned(plan: Plan, output: Path, store: Store) -> list[dict[str, str]]:
    """A model's steps as rows of `model`, `step`, `state` (`run`, `cached`, `current`, `blocked`, `refused`) and `why`.

    Raises:
        ReleaseError: a release of that version is there and is damaged.
    """
    spec = plan.spec
    target = output / spec.name / spec.release
    history = read_history(history_path(output, spec.name))
    rows = []
    current = None
    released: dict[tuple[str, str], Mapping[str, int]] = {}
    if (found := existing(target)) is not None:
        current = found[0].key == plan.package.key
        if current:
            released = {(made.format, made.precision): made.fusions for made in found[0].artifacts}
    failing = ""
    for step in plan.steps:
        reason = why(step, history.get(step.id), store)
        state = "cached" if reason is None else "run"
        if current:
            state, reason = "current", "the release is there and nothing changed"
        if state != "run" and (verdict := _verdict(plan, step, store, released)):
            reason = failing = verdict
        elif step is plan.package:
            if current is False:
                state = "refused"
                reason = f"release {spec.release} is there with other content; set release: {free_release(target)}"
            elif failing:
                state, reason = "blocked", failing
            elif current is None:
                state, reason = "run", "the release is not there yet"
        rows.append({"model": str(spec), "step": step.id, "state": state, "why": reason or "nothing changed"})
    ready = rows[-1]["state"] in ("run", "current")
    for destination in spec.publish:
        state, reason = ("run", "what is there already is not sent") if ready else ("blocked", rows[-1]["why"])
        rows.append({"model": str(spec), "step": f"publish {destination.url}", "state": state, "why": reason})
    return rows


def _verdict(plan: Plan, step: Step, store: Store, released: Mapping[tuple[str, str], Mapping[str, int]]) -> str:
    """Why a target of which it is known fails the build; empty when it does not. `released` are the fusions of a release
    that is there and current, by format and precision: those count, not the cache."""
    target = next((target for target in plan.validates if step in (plan.exports[target], plan.validates[target])), None)
    if target is None:
        return ""
    if released and (target.format, target.precision) not in released:  # it was left out of that release
        return ""
    if released:  # its figures passed, by the same limits: those are in its key
        info: Mapping[str, Any] = {"fusions": released[target.format, target.precision], "outputs": {}}
    elif (entry := store.look(step, hashed=False)) is not None:
        info = entry.info
    else:
        return ""
    if step is plan.exports[target]:
        try:
            check_fusions(str(target), info["fusions"], plan.expects(target))
        except StageError as error:
            return str(error)
        return ""
    checks = judge(info["outputs"], plan.spec.budget.limits(target.precision))
    if not (failed := [check for check in checks if not check.passed]):
        return ""
    worst = max(failed, key=miss)
    return f"{target} fails its gate: {worst.name} {worst.figure:.6g}, limit {worst.limit:g}"


def next_release(release: str) -> str:
    """The semantic version after one: its last number raised (1.0.0 → 1.0.1, 1.0.0-rc.1 → 1.0.0-rc.2), or a first one added
    to a pre-release without (1.0.0-rc → 1.0.0-rc.1)."""
    start, number = re.fullmatch(r"(.*?)([0-9]*)", release).groups()  # type: ignore[union-attr]
    if not number or not start.endswith("."):
        return f"{release}.1"
    return f"{start}{int(number) + 1}"


def free_release(target: Path) -> str:
    """The next version after a release's folder that is not taken."""
    free = target.name
    while os.path.lexists(target.parent / free):
        free = next_release(free)
    return free


def history_path(output: Path, name: str) -> Path:
    """Where the inputs of a model's last steps are noted."""
    return output / FOLDER / name / "steps.json"


def read_history(path: Path) -> dict[str, dict[str, str]]:
    """The noted inputs by step; empty when there are none, or they cannot be read: they only explain."""
    try:
        history = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return history if isinstance(history, dict) else {}


def _in_order(files: Sequence[File], first: Sequence[str]) -> tuple[File, ...]:
    """Files with the one to open first, then the others by name."""
    return tuple(sorted(files, key=lambda file: (first.index(file.path) if file.path in first else len(first), file.path)))
