"""Rebuild: does a release come out again, to the byte, from what its manifest says that it was made from?"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from compiler.bom import BOM
from compiler.build import FOLDER, Context
from compiler.config import ModelSpec
from compiler.errors import CompileError, ConfigError, ReleaseError, SourceError
from compiler.hashing import digest, file_sha256
from compiler.manifest import MANIFEST, Manifest, differences
from compiler.plan import Plan, make_plan
from compiler.provenance import PROVENANCE
from compiler.spine import build_model
from compiler.store import Store, remove, scratch, writing
from compiler.types import Event
from compiler.verify import find_original, homes

# Where a rebuild that failed leaves its log, and what did not pass, or the release that came out different, below the cache.
KEPT = "rebuild"
# What names the packages and the compiler that made a release: in another environment it is another.
RECORDS = (MANIFEST, BOM, PROVENANCE)
# What of a manifest does so.
ENVIRONMENT = ("libraries", "python", "compiler", "steps", "key")


def rebuild(
    path: Path,
    manifest: Manifest,
    work: Path,
    tell: Callable[[Event], None],
    source: str | None,
    folder: Path | None,
    options: Mapping[str, bool],
    *,
    any_environment: bool = False,
) -> tuple[str, ...]:
    """Build a release again with an empty cache, below `work`, and compare every file; returns their names. In another
    environment `RECORDS` are left out, but for what the manifest says of the model itself. What comes out different is kept.

    Args:
        source: where the checkpoint is now, when it is not where the manifest says.
        folder: what the manifest's relative paths start from, when that is neither this folder nor the pipeline's.
        options: `trust_remote_code` and `allow_pickle`, when the checkpoint needs them.
        any_environment: rebuild also where the libraries, the CPU or the compiler are not those that made the release.

    Raises:
        SourceError, ConfigError: the checkpoint or the validation text is not there, or is another.
        ReleaseError: files come out different, which it names; or the environment is another one.
    """
    plan = plan_again(path, manifest, source, folder, options)
    environment = _environment(manifest, plan)
    if environment and not any_environment:
        more = f" and {len(environment) - 3} more" if len(environment) > 3 else ""
        raise ReleaseError(
            f"{path}: was made in another environment ({', '.join(environment[:3])}{more}), so other bytes are to be "
            "expected; rebuild it where all is as recorded, or give --any-environment"
        )
    with writing(work, "the cache"), scratch(work) as aside:
        context = Context(Path(), aside / "output", Store(aside / "cache"), tell)
        try:
            release = build_model(plan, context)
        except CompileError as error:
            if not (context.output / FOLDER).is_dir():  # it did not get so far
                raise
            remove(work / KEPT)
            shutil.move(context.output / FOLDER, work / KEPT)
            raise _moved(error, str(context.output / FOLDER), str(work / KEPT)) from error
        names, changed = _compare(manifest, release.manifest, other=bool(environment))
        kept = work / KEPT / manifest.name / manifest.release
        if changed:
            remove(work / KEPT)
            kept.parent.mkdir(parents=True)
            shutil.move(release.path, kept)
    if changed:
        raise ReleaseError(
            f"{path}: {len(changed)} of {len(names)} files come out different when it is built again; it is not what its "
            f"manifest says that it was made from, or this machine computes differently: compile diff {path} {kept}",
            changed,
        )
    return names


def _compare(manifest: Manifest, made: Manifest, *, other: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The files that are compared to the byte, and those that differ: in an `other` environment also the manifest, when it
    differs in more than that."""
    before = {file.path: file.sha256 for file in manifest.every_file}
    after = {file.path: file.sha256 for file in made.every_file}
    before[MANIFEST], after[MANIFEST] = manifest.identity, made.identity
    for name in RECORDS if other else ():
        before.pop(name, None)
        after.pop(name, None)
    changed = [name for name in {*before, *after} if before.get(name) != after.get(name)]
    if other and _lasting(manifest) != _lasting(made):
        changed.append(MANIFEST)
    return tuple(sorted({*before, *after})), tuple(sorted(changed))


def _lasting(manifest: Manifest) -> str:
    """The digest of what a manifest says that is the same in every environment; files are compared by themselves."""
    body = asdict(manifest)
    for name in (*ENVIRONMENT, "files", "benchmark", "read"):
        del body[name]
    for artifact in body["artifacts"]:
        del artifact["key"], artifact["files"]
    return digest(body)


def plan_again(path: Path, manifest: Manifest, source: str | None, folder: Path | None, options: Mapping[str, bool]) -> Plan:
    """The plan of a build that would make a release again. Raises as `rebuild` does."""
    load = manifest.steps.get("load")
    recorded = load.inputs if load else {}
    if recorded.get("trust_remote_code") == str(True) and not options["trust_remote_code"]:
        raise SourceError(f"{path}: was built with the checkpoint's own code; read that code, then give --trust-remote-code")
    try:
        spec = ModelSpec.model_validate({**manifest.entry, **options})
        spec = spec.model_copy(update={"budget": spec.budget.departing()})
    except ValidationError as error:
        detail = error.errors()[0]
        place = ".".join(map(str, detail["loc"]))
        raise ReleaseError(f"{path}: this version cannot build its entry again: {place}: {detail['msg']}") from error
    found = find_original(path, manifest, source, options, folder)
    snapshot = replace(found, uri=manifest.source.uri, revision=manifest.source.revision)
    calibrate = manifest.steps.get("calibrate")
    texts = {}
    if spec.data.validation is not None:
        texts["validation"] = (spec.data.validation.path, recorded.get("data"))
    if spec.data.calibration is not None and calibrate is not None:
        texts["calibration"] = (spec.data.calibration.path, calibrate.inputs.get("calibration"))
    return make_plan(spec, snapshot, _data_folder(path, texts, folder))


def _data_folder(path: Path, texts: Mapping[str, tuple[str, str | None]], folder: Path | None) -> Path:
    """The folder from which texts, by their use, are at these paths, with the sha256 that is recorded."""
    if not texts:
        return Path()
    found = homes(path, folder)
    for use, (name, sha256) in texts.items():
        there = [home for home in found if (home / name).is_file()]
        if not there:
            raise ConfigError(f"{name}: the {use} text is not there; give --folder, where pipeline.yaml is")
        try:
            found = [home for home in there if file_sha256(home / name) == sha256]
        except OSError as error:
            raise ConfigError(f"{error.filename}: cannot be read ({error.strerror})") from error
        if not found:
            raise ConfigError(
                f"{os.path.normpath(there[0] / name)}: is not the {use} text that this release was made with; give "
                "--folder, where that is"
            )
    return found[0]


def _environment(manifest: Manifest, plan: Plan) -> list[str]:
    """What separates the environment that made a release from this one, each once."""
    found: dict[str, None] = {}
    for step in plan.steps:
        old = manifest.steps.get(step.id)
        texts = differences(old.inputs if old else {}, step.inputs)
        found |= dict.fromkeys(text for text in texts if not text.startswith("step "))
    return list(found)


def _moved(error: CompileError, old: str, new: str) -> CompileError:
    """An error that names where its log was moved."""
    values: list[Any] = [value.replace(old, new) if isinstance(value, str) else value for value in error.args]
    moved = type(error)(*values)
    moved.__dict__.update(error.__dict__)
    return moved
