"""Verify: is a release on disk what its manifest says, and does each artifact still answer as the original did?"""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypeVar

from pydantic import AllowInfNan, PositiveInt, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic reads no other before Python 3.12

from compiler import workers
from compiler.config import SEMVER, Limits, ModelSpec, OnnxTargets, Targets
from compiler.errors import ConfigError, NumericsError, ReleaseError, SourceError
from compiler.hashing import hash_files, list_files
from compiler.manifest import (
    MANIFEST,
    OUTSIDE,
    SAMPLES,
    SIGNATURE,
    SUMS,
    VALIDATION,
    Manifest,
    from_bytes,
    sums,
    with_benchmark,
)
from compiler.numerics import judge, miss
from compiler.sources import resolve
from compiler.stages.load import REFERENCE, reference_again
from compiler.stages.validate import validate
from compiler.store import Step, Store, aside_name, replace_files, scratch, writing
from compiler.types import Check, Event, Report, Snapshot

T = TypeVar("T")

# What of a release is written in place, and so may be left by what was cut off.
RECORDED = dict.fromkeys(
    map(aside_name, (MANIFEST, SUMS)), " (bench --record, when it was cut off, leaves that and removes it: run it again)"
)
CUT_OFF = {**RECORDED, aside_name(SIGNATURE): " (sign, when it was cut off, leaves that and removes it: run it again)"}


#: What no build writes otherwise: there is no NaN in a file of a release.
Figure = Annotated[float, AllowInfNan(False)]


class Outcome(TypedDict):
    figures: dict[str, Figure]


class Entry(TypedDict):
    """What validation.json says of an artifact, as `compiler.build` writes it; `metrics` are a user's own."""

    format: str
    precision: str
    outputs: NotRequired[dict[str, Outcome]]
    checks: tuple[Check, ...]
    metrics: NotRequired[dict[str, Figure]]


class _Validation(TypedDict):
    artifacts: list[Entry]
    known: NotRequired[Any]


class _Case(TypedDict):
    name: str


class _Answering(TypedDict):
    """Of what it says of answers, what was otherwise in earlier builds."""

    pooling: list[str]


class _Known(TypedDict):
    """What is used of what `compiler.stages.load.reference` returned."""

    cases: list[_Case]
    keep: dict[str, PositiveInt]
    answering: NotRequired[_Answering | None]


@dataclass(frozen=True)
class Validation:
    """What a release's validation.json says: of each artifact, by format and precision; and what the build knew of the
    samples, which `known_samples` reads."""

    entries: Mapping[tuple[str, str], Entry]
    known: Any

    @property
    def reports(self) -> tuple[Report, ...]:
        """The verdicts."""
        return tuple(Report(*target, entry["checks"]) for target, entry in self.entries.items())


def read_release(path: Path) -> tuple[Manifest, tuple[Report, ...]]:
    """A release's manifest, and the verdicts that its validation.json records. Raises as `open_release` does."""
    manifest, validation = open_release(path)
    return manifest, validation.reports


def open_release(path: Path) -> tuple[Manifest, Validation]:
    """A release's manifest, and what its validation.json says.

    Raises:
        ReleaseError: it is no release, or is damaged.
    """
    if not path.is_dir():
        raise ReleaseError(f"{path}: no such release; a release is the folder that holds {MANIFEST}")
    try:
        if not stat.S_ISREG(os.lstat(path / MANIFEST).st_mode):
            raise ReleaseError(f"{path / MANIFEST}: a link, not a file; do not use this release")
        content = (path / MANIFEST).read_bytes()
    except OSError as error:
        raise ReleaseError(f"{path / MANIFEST}: cannot be read ({error.strerror}); a release always has one") from error
    manifest = from_bytes(content, str(path / MANIFEST))
    validation = _read_validation(path)
    for artifact in manifest.artifacts:
        if (artifact.format, artifact.precision) not in validation.entries or not artifact.files:
            raise ReleaseError(
                f"{path / VALIDATION}: says nothing of {artifact.format} {artifact.precision}, or that has no file; the "
                "release is damaged, fetch or build it again"
            )
    return manifest, validation


def _read_validation(path: Path) -> Validation:
    try:
        read = TypeAdapter(_Validation).validate_json((path / VALIDATION).read_bytes(), strict=True)
    except (OSError, ValidationError) as error:
        if isinstance(error, ValidationError) and error.errors()[0]["type"] != "json_invalid":
            raise _not_a_builds(path, error) from error
        raise ReleaseError(f"{path / VALIDATION}: cannot be read; the release is damaged, fetch or build it again") from error
    entries = {(entry["format"], entry["precision"]): entry for entry in read["artifacts"]}
    if len(entries) != len(read["artifacts"]):
        raise ReleaseError(f"{path / VALIDATION}: names an artifact twice; the release is damaged")
    return Validation(entries, read.get("known"))


def _not_a_builds(path: Path, error: ValidationError, *place: str) -> ReleaseError:
    where = ".".join(str(part) for part in (*place, *error.errors()[0]["loc"]))
    return ReleaseError(f"{path / VALIDATION}: not what a build writes ({where!r}); the release is damaged")


def known_samples(path: Path, manifest: Manifest, validation: Validation) -> dict[str, Any]:
    """What a build knew of a release's samples, as `compiler.stages.load.reference` returned it. Raises ReleaseError when
    validation.json says something else."""
    try:
        known = TypeAdapter(_Known).validate_python(validation.known, strict=True)
    except ValidationError as error:
        raise _not_a_builds(path, error, "known") from error
    if missing := [tensor.name for tensor in manifest.signature.outputs if tensor.name not in known["keep"]]:
        raise ReleaseError(f"{path / VALIDATION}: not what a build writes ('known.keep.{missing[0]}'); the release is damaged")
    return {**validation.known, "signature": asdict(manifest.signature)}


def is_signed(path: Path) -> bool:
    """Whether a release has a signature; nothing is said of whether it holds."""
    return os.path.lexists(path / SIGNATURE)


def check_unpublished(path: Path) -> None:
    """Raises ReleaseError when a release stands in a folder that is a registry, where nothing of it may change."""
    from compiler.registries.filesystem import ALIASES, INCOMING

    place = path.resolve()
    beside = [place.parent / name for name in (INCOMING, ALIASES)]
    if re.fullmatch(SEMVER, place.name) and any(folder.is_dir() for folder in beside):
        raise ReleaseError(
            f"{path}: is published (in {place.parent}), and a published version never changes; record and sign a release "
            "where it was built, before it is pushed"
        )


def check_unsigned(path: Path) -> None:
    """Raises ReleaseError when a release is signed, or published, so that its manifest must not be written any more."""
    check_unpublished(path)
    if is_signed(path):
        raise ReleaseError(
            f"{path}: is signed, and a benchmark in its {MANIFEST} would break the signature; record first, then sign: "
            f"remove {SIGNATURE} to begin again"
        )


def record_benchmark(path: Path, benchmark: Mapping[str, Any]) -> None:
    """Put a benchmark's result into a release's manifest, in place of an earlier one, and the manifest into SHA256SUMS. Each
    is replaced by one rename; when only the first was, `verify_files` says so, and recording again mends it.

    Raises:
        ReleaseError: the release is signed, or published, or is damaged.
    """
    check_unsigned(path)
    read_release(path)
    with writing(path, "the manifest", "copy the release to where you can write, and record there"):
        stored = (path / MANIFEST).read_bytes()
        manifest = from_bytes(stored, str(path / MANIFEST))
        content = with_benchmark(stored, benchmark)
        replace_files(path, {MANIFEST: content, SUMS: sums(manifest, content)})


def verify_files(path: Path, manifest: Manifest, *, hashing: bool = True, recording: bool = False) -> None:
    """Hash every file again, and look for what is not in the manifest. A signature is not checked.

    Args:
        hashing: without it, only that all are there and no more: for who hashes them anyway.
        recording: SHA256SUMS may be of another manifest.json, or a new one of either be there, as a recording that was cut off
            leaves them: they are to be written again.

    Raises:
        ReleaseError: a file is missing, changed or too many, or is a link.
    """
    expected = {file.path: file for file in manifest.every_file}
    present = set(list_files(path)) - {MANIFEST, *OUTSIDE} - (RECORDED.keys() if recording else set())
    problems = [f"{name} is missing" for name in sorted(set(expected) - present)]
    problems += [f"{name} is not in the manifest{CUT_OFF.get(name, '')}" for name in sorted(present - set(expected))]
    regular = []
    for name in sorted(present & set(expected)):
        if stat.S_ISREG(os.lstat(path / name).st_mode):
            regular.append(name)
        else:
            problems.append(f"{name} is a link, not a file")
    try:
        for file in hash_files(path, regular if hashing else ()):
            if file != expected[file.path]:
                problems.append(f"{file.path} is changed (sha256 {file.sha256[:12]}…, was {expected[file.path].sha256[:12]}…)")
    except OSError as error:
        raise ReleaseError(f"{error.filename}: cannot be read ({error.strerror})") from error
    problems += _outside(path, manifest, recording)
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ReleaseError(
            f"{path}: {'; '.join(problems[:3])}{more}; do not use this release: remove it and build or fetch it again"
        )


def verify_sums(path: Path, manifest: Manifest) -> None:
    """Hold SHA256SUMS against a manifest; for who has hashed the other files already.

    Raises:
        ReleaseError: it is missing or says something else, or the signature is no file.
    """
    if problems := _outside(path, manifest, recording=False):
        raise ReleaseError(f"{path}: {'; '.join(problems)}; do not use this release: fetch it again")


def _outside(path: Path, manifest: Manifest, recording: bool) -> list[str]:
    """What is wrong with the files that the manifest cannot list, apart from whether the signature holds."""
    problems = []
    for name in OUTSIDE:
        if not os.path.lexists(path / name):
            problems += [f"{name} is missing"] * (name == SUMS)
        elif not stat.S_ISREG(os.lstat(path / name).st_mode):
            kind = "a link, not" if os.path.islink(path / name) else "not"
            problems.append(f"{name} is {kind} a file")
    if problems:
        return problems
    try:
        expected = sums(manifest, (path / MANIFEST).read_bytes())
        with open(path / SUMS, "rb") as stream:
            found = stream.read(len(expected) + 1)
    except OSError as error:
        raise ReleaseError(f"{error.filename}: cannot be read ({error.strerror})") from error
    if found == expected:
        return []
    line = rf"(?m)^[0-9a-f]{{64}}  {re.escape(MANIFEST)}$".encode()
    if re.sub(line, b"", found) != re.sub(line, b"", expected):
        return [f"{SUMS} is changed"]
    if recording:
        return []
    return [f"{SUMS} is of another {MANIFEST} (bench --record, when it was cut off, leaves that and mends it: run it again)"]


def verify_numerics(
    path: Path,
    manifest: Manifest,
    validation: Validation,
    store: Store,
    tell: Callable[[Event], None],
    source: str | None,
    options: Mapping[str, bool],
    folder: Path | None = None,
) -> tuple[Report, ...]:
    """Open every artifact of a release in its runtime again and hold it against the original, under the recorded limits.

    The original's answers come from the cache of the build that made the release or, where that is gone, from the
    checkpoint, whose files must be the very ones that the manifest names.

    Args:
        source: where the checkpoint is now, when it is not where the manifest says.
        options: `trust_remote_code` and `allow_pickle`, when the checkpoint needs them.
        folder: what the manifest's relative paths start from, when that is neither this folder nor the pipeline's.

    Raises:
        NumericsError: an artifact does not pass.
        SourceError: the checkpoint is needed and is not there, or is another.
        ReleaseError: validation.json is not what a build writes.
    """
    known = known_samples(path, manifest, validation)
    limits = {target: limits_of(path, entry["checks"]) for target, entry in validation.entries.items()}
    model = f"{manifest.name} {manifest.release}"

    def timed(step: str, job: Callable[[], T]) -> T:
        started = time.monotonic()
        tell(Event(model, step, "start"))
        result = job()
        tell(Event(model, step, "run", time.monotonic() - started))
        return result

    with writing(store.root, "the cache"), scratch(store.root) as aside:
        log = store.root / "verify.log"
        log.write_bytes(b"")
        made = manifest.steps.get("load")
        cached = store.look(Step(model, "load", "", made.inputs)) if made else None
        if cached is not None and source is None:
            reference = cached.root / REFERENCE
        else:
            snapshot = find_original(path, manifest, source, options, folder)
            arguments = (aside, snapshot, manifest.task, path / SAMPLES, known, manifest.loading(options))
            timed("load", lambda: workers.run(reference_again, *arguments, log=log))
            reference = aside / REFERENCE
        reports = []
        for artifact in manifest.artifacts:
            target = (artifact.format, artifact.precision)
            inputs = (path, artifact, path / SAMPLES, reference, known)
            figures = timed(f"validate {' '.join(target)}", lambda inputs=inputs: workers.run(validate, *inputs, log=log))  # type: ignore[misc]
            reports.append(Report(*target, judge(figures, limits[target])))
            _check_same(path, reports[-1], validation.entries[target]["checks"])
    for report in reports:
        if failed := [check for check in report.checks if not check.passed]:
            check = max(failed, key=miss)
            raise NumericsError(
                f"{path}: {report.format} {report.precision}: {check.name} is {check.figure:.6g} here, its limit is "
                f"{check.limit:g}, at {check.worst}; do not use this artifact on this machine",
                tuple(reports),
            )
    return tuple(reports)


def limits_of(path: Path, checks: tuple[Check, ...]) -> Limits:
    """The limits of an artifact's checks. Raises ReleaseError when they are none that a build sets."""
    try:
        return Limits(**{check.name: check.limit for check in checks})
    except ValidationError as error:
        raise _not_a_builds(path, error, "limit") from error


def _check_same(path: Path, report: Report, recorded: tuple[Check, ...]) -> None:
    """Raises ReleaseError when other checks were made than are recorded, so that one would be left out in silence."""
    sides = [{f"{check.output} {check.name}" for check in checks} for checks in (recorded, report.checks)]
    if sides[0] != sides[1] or not recorded:
        other = ", ".join(sorted(sides[0] ^ sides[1])) or "it has none"
        raise ReleaseError(
            f"{path / VALIDATION}: records other checks of {report.format} {report.precision} than a build makes ({other}); "
            "the release is damaged"
        )


def _spec(**keys: Any) -> ModelSpec:
    try:
        return ModelSpec(**keys)
    except ValidationError as error:
        detail = error.errors()[0]
        raise ConfigError(f"--source {keys['source']}: {detail['msg']}") from error


def homes(path: Path, folder: Path | None = None) -> list[Path]:
    """Where a release's relative paths may start from: a folder that the user names, or else this one and the pipeline's
    own, which by default holds the folder of the releases."""
    if folder is not None:
        return [folder]
    return [Path(), *([path.absolute().parents[2]] if len(path.absolute().parents) > 2 else [])]


def find_original(
    path: Path, manifest: Manifest, source: str | None, options: Mapping[str, bool], folder: Path | None = None
) -> Snapshot:
    """The checkpoint that a release was made from, found again and compared file by file. `folder` is the pipeline's, when
    it is not one of `homes`."""
    uri = source or manifest.source.uri
    if not re.match(r"(path|package|hf):", uri):
        uri = f"path:{uri}"
    places = homes(path, folder)
    # What a user names on the command line is relative to where they are.
    home = next((home for home in places if (home / uri.partition(":")[2]).exists()), Path())
    pins = {file.path: file.sha256 for file in manifest.source.files}
    spec = _spec(
        name=manifest.name,
        release=manifest.release,
        source=uri,
        sha256=pins,
        allow_pickle=options["allow_pickle"],
        trust_remote_code=options["trust_remote_code"],
        targets=Targets(onnx=OnnxTargets(precisions=("fp32",))),
    )
    try:
        snapshot = resolve(spec, home)
    except SourceError as error:
        text = str(error).replace("set allow_pickle: true", "give --allow-pickle")
        if "pinned" in text:
            raise SourceError(f"{uri}: is not the checkpoint that this release was made from; give --source") from error
        hint = "" if "--allow-pickle" in text or source is not None else "; give --source, where the checkpoint is now"
        if hint and uri.startswith("path:") and not Path(uri.removeprefix("path:")).is_absolute():
            hint += ", or --folder, where pipeline.yaml's paths start, if the command has it"
        raise SourceError(f"{text}{hint}") from error
    if more := sorted({file.path for file in snapshot.files} - set(pins)):
        raise SourceError(f"{uri}: has {', '.join(more)}, which the release was not made from; give --source")
    return snapshot
