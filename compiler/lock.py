"""pipeline.lock: what the last builds of a pipeline were made from, to be kept under version control beside it.

The file is canonical JSON with one key a line, so that a change of anything that shapes a release shows in a diff. It
holds no time, no host and no path of a machine: the same inputs give the same bytes. What pipeline.yaml says itself
(targets, shapes, limits) is not repeated.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

import compiler
from compiler.errors import LockError
from compiler.hashing import canonical, sync
from compiler.manifest import differences
from compiler.plan import Plan
from compiler.store import aside_name

SCHEMA = 1


@dataclass(frozen=True)
class Locked:
    """What a model was built from. `files` and `data` are sha256 (hex) by name, of the checkpoint, and of the validation and
    calibration text; `revision` is the hub's commit; `cpu` are the features that shape the gate's figures; `code` hashes the
    compiler's own modules."""

    source: str
    revision: str | None
    files: Mapping[str, str]
    data: Mapping[str, str]
    python: str
    compiler: str
    cpu: str
    packages: Mapping[str, str]
    code: Mapping[str, str]


def locked(plan: Plan) -> Locked:
    """What a lock records of a plan."""
    text = plan.calibration
    calibration = {} if text is None else {f"calibration {text.name}": text.sha256}
    return Locked(
        source=plan.snapshot.uri,
        revision=plan.snapshot.revision,
        files={file.path: file.sha256 for file in plan.snapshot.files},
        data={plan.texts.name: plan.texts.sha256, **plan.texts.files, **calibration},
        python=platform.python_version(),
        compiler=compiler.__version__,
        cpu=plan.load.inputs["cpu"],
        packages=plan.libraries,
        code=plan.code,
    )


def lock_path(pipeline: Path) -> Path:
    """Where a pipeline's lock is: beside it, under its name with `.lock` in place of `.yaml`, or added to any other, so that
    `pipeline-1.1` and `pipeline-1.2` do not share one."""
    if pipeline.suffix == ".lock":
        raise LockError(f"{pipeline}: is called as a lock is; call the pipeline {pipeline.with_suffix('.yaml').name}")
    return pipeline.with_name(f"{pipeline.name.removesuffix('.yaml')}.lock")


def read_lock(path: Path) -> dict[str, Locked] | None:
    """What a lock records, by model; None when there is no lock.

    Raises:
        LockError: it cannot be read, or is no lock.
    """
    try:
        stored = json.loads(path.read_bytes())
        schema = stored["schema"]
        if schema != SCHEMA:
            raise LockError(
                f"{path}: has schema {schema!r}, this version reads {SCHEMA}; build with the version that wrote it"
            )
        return TypeAdapter(dict[str, Locked]).validate_python(stored["models"])
    except FileNotFoundError:
        return None
    except OSError as error:
        raise LockError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, RecursionError, ValidationError) as error:
        raise LockError(
            f"{path}: damaged, or not what a build writes; take it from version control again, or remove it: a build writes it"
        ) from error


def check_lock(path: Path, plans: Sequence[Plan], *, whole: bool) -> None:
    """Hold plans against what their lock records. `whole`: they are all that the pipeline has.

    Raises:
        LockError: there is no lock, it is damaged, or anything differs.
    """
    recorded = read_lock(path)
    if recorded is None:
        raise LockError(f"{path}: no such lock; --locked wants one: build without it, and commit the lock that this writes")
    found = []
    for plan in plans:
        model = str(plan.spec)
        if model not in recorded:
            found.append(f"{model} is not in it")
            continue
        found += [f"{model}: {text}" for text in differences(_flat(recorded[model]), _flat(locked(plan)))]
    if whole:
        gone = set(recorded) - {str(plan.spec) for plan in plans}
        found += [f"{model} is no longer in the pipeline" for model in sorted(gone)]
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise LockError(
            f"{path}: {'; '.join(found[:3])}{more}; nothing is built: go back to what it records, or build without --locked "
            "and commit the lock that this writes"
        )


def _flat(entry: Locked) -> dict[str, str | None]:
    """An entry as one level of names, as a reader is told them."""
    return {
        "source": entry.source,
        "revision": entry.revision,
        "python": entry.python,
        "compiler": entry.compiler,
        "cpu": entry.cpu,
        **{f"file {name}": sha256 for name, sha256 in entry.files.items()},
        **{f"data {name}": sha256 for name, sha256 in entry.data.items()},
        **{f"package {name}": version for name, version in entry.packages.items()},
        **{f"code of {name}": sha256 for name, sha256 in entry.code.items()},
    }


def write_lock(path: Path, plans: Sequence[Plan], keep: Collection[str] | None = None) -> None:
    """Record plans in their lock. Of the other models it keeps those in `keep`; all when that is None. A lock that says so
    already is not touched.

    Raises:
        LockError: it cannot be written, or what is there is damaged.
    """
    if not _changed(path, plans, keep):
        return
    try:
        with _alone(path) as descriptor:
            if (content := _changed(path, plans, keep)) is None:
                os.unlink(_aside(path))
                return
            with os.fdopen(os.dup(descriptor), "wb") as stream:
                stream.truncate(0)
                stream.write(content)
                sync(stream)
            os.rename(_aside(path), path)
    except OSError as error:
        released = ", ".join(str(plan.spec) for plan in plans)
        raise LockError(
            f"{path}: cannot be written ({error.strerror}); {released or 'everything'} is released and stays: make the folder "
            "writable and build again, which writes the lock alone"
        ) from error


def _changed(path: Path, plans: Sequence[Plan], keep: Collection[str] | None) -> bytes | None:
    """The lock's content with the plans in it; None when that is what it holds."""
    before = read_lock(path)
    after = {model: entry for model, entry in (before or {}).items() if keep is None or model in keep}
    after |= {str(plan.spec): locked(plan) for plan in plans}
    if after == before:
        return None
    return canonical({"schema": SCHEMA, "models": {model: asdict(entry) for model, entry in after.items()}})


def _aside(path: Path) -> Path:
    return path.with_name(aside_name(path.name))


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[int]:
    """The file that becomes the lock by a rename, which one process holds at a time; what a killed one left is taken over.

    `store.locked` would do, but for the file that it locks, which must stay: here it would lie in the user's own checkout.
    """
    while True:
        descriptor = os.open(_aside(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            try:
                ours = os.path.samestat(os.fstat(descriptor), os.stat(_aside(path)))
            except FileNotFoundError:
                ours = False
            if ours:
                yield descriptor
                return
            # The one before us made it the lock, or removed it: open a new one.
        finally:
            os.close(descriptor)
