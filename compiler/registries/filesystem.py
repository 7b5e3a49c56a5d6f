"""file:///folder: releases as plain folders, which loaders and `compile verify` open where they are.

<root>/1.0.0/                a release; it appears by one rename, which fails where there is one already; read-only
<root>/aliases/latest        the version that an alias names, on one line; replaced in one step
<root>/.incoming/<key>/      what an interrupted push has sent, by the digest of all that the push sends
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, ClassVar
from urllib.parse import unquote

from filelock import FileLock, Timeout

from compiler.config import SEMVER
from compiler.errors import RegistryError, ReleaseError
from compiler.hashing import CHUNK, copy, file_sha256, list_files, sync_folder
from compiler.manifest import MANIFEST, Manifest, from_bytes
from compiler.registries import (
    ALIAS,
    ALIAS_BYTES,
    Parcel,
    Registry,
    TakenError,
    Version,
    look_up,
    newest,
    precedence,
    read_alias,
)
from compiler.registries.transfer import SMALL_BYTES, FaultError, bounded, key_of, receive
from compiler.store import locked, write_file
from compiler.types import File

ALIASES = "aliases"
INCOMING = ".incoming"
# What was sent by a push that nobody took up again for this long is removed by the next push.
ABANDONED_SECONDS = 7 * 24 * 3600
# Modes of what is published, whatever the umask of who publishes: all may read it, and nothing is written by mistake.
FILE_MODE, FOLDER_MODE, ALIAS_MODE = 0o444, 0o755, 0o644
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def connect(url: str) -> Registry:
    """The registry in a folder. Nothing is touched before the first call."""
    path = unquote(url.removeprefix("file://").removeprefix("localhost"))
    if not path.startswith("/"):
        raise RegistryError(f"{url}: a folder's URL is file:// and an absolute path: file:///srv/models/minilm")
    return Folder(url, Path(path))


@dataclass(frozen=True)
class Folder:
    """See `compiler.registries.Registry`."""

    url: str
    root: Path
    hashes: ClassVar[bool] = True

    def list(self) -> tuple[Version, ...]:
        with self._telling():
            aliases = self._aliases()
            names = [name for name in _names(self.root) if re.fullmatch(SEMVER, name)]
            found = (self._version(name, aliases) for name in sorted(names, key=precedence))
            return tuple(version for version in found if version is not None)

    def resolve(self, reference: str) -> Version | None:
        with self._telling():
            return look_up(reference, self.url, self.list, self._aliases, self._version)

    def model(self) -> str | None:
        with self._telling():
            if (release := newest(_names(self.root))) is not None:
                with contextlib.suppress(ReleaseError):
                    return _manifest(self.root / release).name
        return None

    def push(self, parcel: Parcel) -> None:
        with self._telling():
            incoming = self.root / INCOMING
            incoming.mkdir(parents=True, exist_ok=True)
            _sweep(incoming)
            aside = incoming / key_of(parcel)
            lock = Path(f"{aside}.lock")
            with locked(lock):
                try:
                    self._publish(parcel, aside)
                finally:
                    # Nothing of it is needed any more; whoever waits for the lock finds the release there.
                    if os.path.lexists(self.root / parcel.manifest.release):
                        shutil.rmtree(aside, ignore_errors=True)
                        os.unlink(lock)

    def _publish(self, parcel: Parcel, aside: Path) -> None:
        target = self.root / parcel.manifest.release
        taken = TakenError(f"{self.url}: {parcel.manifest.release} was published by somebody else meanwhile")
        if os.path.lexists(target):
            raise taken
        # Files are written in one folder and moved to the other, so that what is there is whole.
        whole, part = aside / "whole", aside / "part"
        wanted = {file.path for file in parcel.files}
        for folder in (whole, part):
            folder.mkdir(parents=True, exist_ok=True)
            for left in set(list_files(folder)) - (wanted if folder is whole else set()):
                os.unlink(folder / left)
        # The largest first, so that no thread is left with it alone at the end.
        files = sorted(parcel.files, key=lambda file: -file.size)
        with ThreadPoolExecutor() as pool:
            for _ in pool.map(lambda file: _put(parcel.path, file, whole, part), files):
                pass
        write_file(part / MANIFEST, parcel.content)
        os.replace(part / MANIFEST, whole / MANIFEST)
        for inside, _, names in os.walk(whole):
            for name in names:
                _set_mode(Path(inside) / name, FILE_MODE)
            _set_mode(Path(inside), FOLDER_MODE)
            sync_folder(Path(inside))
        try:
            os.rename(whole, target)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise taken from error
            raise
        sync_folder(self.root)

    def alias(self, name: str, version: Version) -> None:
        with self._telling():
            folder = self.root / ALIASES
            folder.mkdir(parents=True, exist_ok=True)
            # A name of its own: two may move the same alias at once.
            aside = folder / f".{name}.{os.getpid()}.{secrets.token_hex(4)}"
            try:
                write_file(aside, f"{version.release}\n".encode())
                _set_mode(aside, ALIAS_MODE)
                os.replace(aside, folder / name)
            except BaseException:
                aside.unlink(missing_ok=True)
                raise
            sync_folder(folder)

    def pull(self, version: Version, folder: Path) -> None:
        where = f"{self.url}@{version.release}"
        release = self.root / version.release

        def small(name: str) -> bytes | None:
            if not os.path.lexists(release / name):
                return None
            with self._telling(), _open(release, name, where) as stream:
                return bounded([stream.read(SMALL_BYTES + 1)], f"{where}: {name}")

        @contextlib.contextmanager
        def read(file: File) -> Iterator[Iterator[bytes]]:
            with self._telling():
                stream = _open(release, file.path, where)
            with stream:
                yield self._chunks(stream)

        def once(work: Callable[[], File]) -> File:
            try:
                return work()
            except FaultError as fault:  # a disk does not get better by trying again
                raise ReleaseError(f"{where}: {fault}; it is damaged, do not use it") from fault

        receive(folder, where, version.digest, small, read, once)

    def _chunks(self, stream: BinaryIO) -> Iterator[bytes]:
        while True:
            with self._telling():
                chunk = stream.read(CHUNK)
            if not chunk:
                return
            yield chunk

    def _version(self, release: str, aliases: Mapping[str, str | None]) -> Version | None:
        folder = self.root / release
        if not os.path.lexists(folder):
            return None
        if folder.is_symlink() or not os.path.lexists(folder / MANIFEST):
            raise RegistryError(f"{folder}: is in the way of a release and is none; remove it")
        try:
            manifest = _manifest(folder)
        except ReleaseError as error:
            raise RegistryError(str(error)) from error
        if manifest.release != release:
            raise RegistryError(f"{folder}: holds release {manifest.release}; it was renamed, do not use it")
        return Version(release, manifest.identity, tuple(sorted(name for name, named in aliases.items() if named == release)))

    def _aliases(self) -> dict[str, str | None]:
        """The aliases: name → version; None for what cannot be read or names none, which is in nobody's way but its own."""
        found: dict[str, str | None] = {}
        folder = self.root / ALIASES
        for name in _names(folder):
            if ALIAS.fullmatch(name):
                found[name] = None
                with contextlib.suppress(ReleaseError, OSError), _open(folder, name, str(folder)) as stream:
                    found[name] = read_alias(stream.read(ALIAS_BYTES))
        return found

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Turn what goes wrong in the registry's folder into one line."""
        try:
            yield
        except OSError as error:
            if error.errno in NO_ROOM:
                reason = "no space is left; make room and push again: what was sent is kept"
                raise RegistryError(f"{self.url}: {reason}") from error
            what = f"{self.url}: {error.filename or self.root}: {error.strerror or error}"
            raise RegistryError(f"{what}; choose a folder that can be read and written") from error


def _names(folder: Path) -> Sequence[str]:
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []


def _manifest(folder: Path) -> Manifest:
    with _open(folder, MANIFEST, str(folder)) as stream:
        return from_bytes(bounded([stream.read(SMALL_BYTES + 1)], str(folder / MANIFEST)), str(folder / MANIFEST))


def _put(source: Path, file: File, whole: Path, part: Path) -> None:
    """Copy a file of a release to where it is gathered, unless it is there already. It is hashed as it is copied.

    Raises:
        ReleaseError: it is not the file that the manifest names.
    """
    target = whole / file.path
    with contextlib.suppress(FileNotFoundError):
        there = os.lstat(target)
        if stat.S_ISREG(there.st_mode) and there.st_size == file.size and file_sha256(target) == file.sha256:
            return
    aside = part / hashlib.sha256(file.path.encode()).hexdigest()
    copied = copy(source / file.path, aside)
    if (copied.sha256, copied.size) != (file.sha256, file.size):
        raise ReleaseError(f"{source}: {file.path} is not what the manifest says (sha256, size); do not use this release")
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(aside, target)


def _sweep(incoming: Path) -> None:
    """Remove what pushes left behind that nobody took up again."""
    for aside in incoming.iterdir():
        # Others publish, and sweep, at the same time: what is here now may be gone at any step.
        with contextlib.suppress(Timeout, OSError):
            if aside.suffix == ".lock" or time.time() - aside.stat().st_mtime < ABANDONED_SECONDS:
                continue
            with FileLock(f"{aside}.lock", timeout=0):
                shutil.rmtree(aside)
                os.unlink(f"{aside}.lock")


def _set_mode(path: Path, mode: int) -> None:
    # It is refused for a disk that has no modes, such as vfat, and for a file that another user's push has sent.
    with contextlib.suppress(PermissionError):
        path.chmod(mode)


def _open(root: Path, path: str, where: str) -> BinaryIO:
    """Open a file of a folder that others may have written to: a regular file, and no link on the way to it.

    Raises:
        ReleaseError: it is something else.
    """
    real = os.path.realpath(root)
    if os.path.realpath(root / path) != os.path.join(real, path):
        raise ReleaseError(f"{where}: {path} is a link, or leads through one; do not use it")
    try:
        # Without waiting, should it be a pipe.
        descriptor = os.open(os.path.join(real, path), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise ReleaseError(f"{where}: {path} is missing; it is damaged, do not use it") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ReleaseError(f"{where}: {path} is no file; do not use it")
    return open(descriptor, "rb")
