"""The stage cache: look, lock, look again, build aside, publish by one rename.

An entry is a folder named by its key, `<stage>/<key>`, with the files a stage made and `entry.json`: their hashes, what
the stage returned, and the inputs that the key was made from. A hit is re-hashed before use; one that does not match is
thrown away and made again. Nobody ever sees half an entry: it is built in a scratch folder and renamed, and a scratch
folder whose maker died is swept by the next build.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from compiler import workers
from compiler.errors import CompileError, StageError
from compiler.hashing import canonical, digest, hash_folder, list_files, sync
from compiler.types import File

ENTRY = "entry.json"
SCRATCH = "scratch-"
# A disk with less than this left is full: no artifact fits.
FULL_BYTES = 1 << 20
# How long to wait for a lock before looking whether the build was stopped.
LOCK_SECONDS = 0.2
# A scratch folder's lock comes before the folder; without one for this long, its maker died in between.
LONELY_SECONDS = 3600
MOUNTED = "is a mount point, in whose place no folder can be put; give a folder in it, such as {}"


@dataclass(frozen=True)
class Step:
    """One piece of work and everything that shapes its result, flat, so that two can be compared line by line."""

    model: str
    stage: str
    target: str
    inputs: Mapping[str, str]

    @property
    def key(self) -> str:
        return digest({"stage": self.stage, "inputs": dict(self.inputs)})

    @property
    def id(self) -> str:
        return f"{self.stage} {self.target}".strip()


@dataclass(frozen=True)
class Entry:
    """A finished step: its folder, the files in it, and what the stage returned (JSON)."""

    root: Path
    key: str
    files: tuple[File, ...]
    info: dict[str, Any]


class Store:
    """A folder of entries, safe to share between processes."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, step: Step) -> Path:
        return self.root / step.stage / step.key

    def has(self, step: Step) -> bool:
        """Whether an entry is there; it is not opened."""
        return (self.path(step) / ENTRY).is_file()

    def look(self, step: Step, *, hashed: bool = True) -> Entry | None:
        """The entry, re-hashed; None when there is none, or it is damaged: the next to make it replaces it. Without
        `hashed`, of its files only the names and sizes are looked at: for whoever hashes them while copying."""
        path = self.path(step)
        try:
            stored = json.loads((path / ENTRY).read_text(encoding="utf-8"))
            files = tuple(File(**file) for file in stored["files"])
            if not (
                stored["inputs"] == dict(step.inputs)
                and stored["digest"] == digest({name: stored[name] for name in ("files", "info", "inputs")})
                and (_hashed(path) == files if hashed else _sizes(path) == {file.path: file.size for file in files})
            ):
                return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        return Entry(path, step.key, files, stored["info"])

    def get_or_make(self, step: Step, make: Callable[[Path], dict[str, Any]], *, use_cache: bool = True) -> tuple[Entry, bool]:
        """The entry of a step, and whether it was in the cache. `make` writes files into the folder it is given and
        returns what else is to be kept, as JSON.

        Raises:
            StageError: the cache cannot be written, or its disk is full.
        """
        if use_cache and (entry := self.look(step)):
            return entry, True
        path = self.path(step)
        with writing(self.root, "the cache"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with locked(Path(f"{path}.lock")):
                if use_cache and (entry := self.look(step)):
                    return entry, True
                with scratch(self.root) as aside:
                    info = json.loads(canonical(self._made(make, aside)))
                    made = Entry(path, step.key, hash_folder(aside), info)
                    # Somebody may be reading an entry that is there; the same again need not replace it.
                    if self.look(step) != made:
                        stored = {"files": [asdict(file) for file in made.files], "info": info, "inputs": dict(step.inputs)}
                        write_file(aside / ENTRY, canonical({**stored, "digest": digest(stored)}))
                        remove(path)
                        os.rename(aside, path)
        return made, False

    def _made(self, make: Callable[[Path], dict[str, Any]], aside: Path) -> dict[str, Any]:
        """What `make` returns. Native writers do not say that a disk is full: they abort, or fail in their own words."""
        try:
            return make(aside)
        except StageError:
            if shutil.disk_usage(aside).free < FULL_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None
            raise


def _hashed(path: Path) -> tuple[File, ...]:
    return tuple(file for file in hash_folder(path) if file.path != ENTRY)


def _sizes(path: Path) -> dict[str, int]:
    return {name: os.stat(path / name).st_size for name in list_files(path) if name != ENTRY}


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock that only one process, and one thread of it, has at a time; give up when the build is stopped."""
    lock = FileLock(path)
    while True:
        try:
            lock.acquire(timeout=LOCK_SECONDS)
            break
        except Timeout:
            if workers.stopped():
                raise StageError("stopped") from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """A folder below `parent` to build in, gone at the end unless it was renamed. Sweeps those of makers that died."""
    sweep(parent)
    parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=SCRATCH, suffix=".lock", dir=parent)
    os.close(descriptor)
    folder = Path(name.removesuffix(".lock"))
    # The lock dies with the process that holds it, so a folder whose lock can be had has no maker any more.
    with FileLock(name):
        folder.mkdir()
        try:
            yield folder
        finally:
            remove(folder)
            os.unlink(name)


def sweep(parent: Path) -> None:
    """Remove scratch folders whose maker is gone."""
    for name in parent.glob(f"{SCRATCH}*.lock"):
        folder = name.with_suffix("")
        # Not yet a folder: its maker stands between making the lock's file and locking it.
        if not folder.is_dir():
            with contextlib.suppress(OSError):
                if time.time() - name.stat().st_mtime > LONELY_SECONDS:
                    os.unlink(name)
            continue
        with contextlib.suppress(Timeout, OSError), FileLock(name, timeout=0):
            # Its maker had it locked when there was a folder, and never locks it again: this file is ours to remove,
            # even where opening it has just made it anew.
            remove(folder)
            os.unlink(name)


def remove(path: Path) -> None:
    """Remove a folder, if it is there, so that no one can mistake what is left of it for a whole one."""
    if path.is_symlink() or path.is_file():
        os.unlink(path)
    elif path.exists():
        with contextlib.suppress(OSError):
            os.unlink(path / ENTRY)
        shutil.rmtree(path, ignore_errors=True)


def write_file(path: Path, content: bytes) -> None:
    """Write a file and have it on the disk."""
    with open(path, "wb") as stream:
        stream.write(content)
        sync(stream)


def aside_name(name: str) -> str:
    """What a file that is to replace another is called until then; a process that is killed leaves it."""
    return f".{name}.new"


def replace_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Replace files of a folder, each by one rename, once all are on the disk. They are written in that very folder: it may be
    a mount point, or all that may be written."""
    try:
        for name, content in contents.items():
            write_file(folder / aside_name(name), content)
        for name in contents:
            os.replace(folder / aside_name(name), folder / name)
    finally:
        for name in contents:
            (folder / aside_name(name)).unlink(missing_ok=True)


def check_can_appear(folder: Path) -> None:
    """Raises StageError when a folder cannot be made by renaming another to it, for what is known before any work."""
    if os.path.ismount(folder):
        raise StageError(f"{folder}: {MOUNTED.format(folder / 'release')}")
    there = next(parent for parent in folder.absolute().parents if parent.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        raise StageError(f"{folder}: cannot be made, since {there} cannot be written; give a folder where you can write")


@contextlib.contextmanager
def writing(folder: Path, what: str, instead: str = "choose a folder that can") -> Iterator[None]:
    """Turn the errors of a disk that is full, or of a folder that cannot be written, into one line. `instead` is what to do
    about the latter."""
    try:
        yield
    except CompileError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = "no space is left; make room, or choose another folder"
        else:
            if error.errno == errno.EBUSY and error.filename2:  # the target of a rename
                place = os.fsdecode(error.filename2)
                raise StageError(f"{what}: {place}: {MOUNTED.format(os.path.join(place, 'release'))}") from error
            if error.filename and not Path(os.fsdecode(error.filename)).absolute().is_relative_to(folder.absolute()):
                raise StageError(f"{what}: {error.filename}: {error.strerror}") from error
            reason = f"cannot be written ({error.strerror or error}); {instead}"
        raise StageError(f"{what}: {folder}: {reason}") from error
