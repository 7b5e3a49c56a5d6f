"""What every registry's transfers share: trying again, and receiving files that are believed only once they are hashed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import random
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from compiler.errors import ReleaseError
from compiler.hashing import CHUNK, digest, sync
from compiler.manifest import MANIFEST, OUTSIDE, Manifest, from_bytes
from compiler.registries import Parcel
from compiler.store import write_file
from compiler.types import File

T = TypeVar("T")

# Seconds between tries; each is drawn between half of it and all of it, so that many clients do not come back at once.
DELAYS = (0.5, 1.0, 2.0, 4.0)
# A manifest, a list of sums or a signature that is larger than this is none.
SMALL_BYTES = 16 << 20


class FaultError(Exception):
    """A fault that may pass: a connection cut or refused, a truncated body, a server's 429 or 5xx. Never leaves a registry's
    module: `retrying` tries again and, at last, raises what it was raised from as a RegistryError."""


def retrying(work: Callable[[], T], give_up: Callable[[FaultError], Exception]) -> T:
    """What `work` returns, tried again with growing pauses while it raises a FaultError.

    Raises:
        RegistryError: as made by `give_up`, when the last try failed too.
    """
    for delay in DELAYS:
        try:
            return work()
        except FaultError:
            time.sleep(delay * random.uniform(0.5, 1.0))  # noqa: S311
    try:
        return work()
    except FaultError as fault:
        raise give_up(fault) from fault


def key_of(parcel: Parcel) -> str:
    """The digest (hex) of all that a push sends, signatures and a recorded benchmark included, which the manifest's identity
    leaves out: two pushes that share it send the same bytes."""
    manifest = hashlib.sha256(parcel.content).hexdigest()
    return digest([[MANIFEST, manifest], *sorted([file.path, file.sha256] for file in parcel.files)])


def bounded(chunks: Iterable[bytes], where: str) -> bytes:
    """All of a small file's content. Raises ReleaseError, and reads no more, when that is more than `SMALL_BYTES`."""
    content = bytearray()
    for chunk in chunks:
        content += chunk
        if len(content) > SMALL_BYTES:
            raise ReleaseError(f"{where} is larger than any that a push writes ({SMALL_BYTES >> 20} MB); do not use it")
    return bytes(content)


def receive(
    folder: Path,
    where: str,
    digest: str,
    small: Callable[[str], bytes | None],
    read: Callable[[File], contextlib.AbstractContextManager[Iterator[bytes]]],
    retry: Callable[[Callable[[], File]], File],
) -> Manifest:
    """Write a published release into an empty folder. Nothing that the registry says is believed: the manifest must be whole,
    have the digest that was resolved, and name only paths inside; each file is hashed while it streams, and no more of it is
    written than the manifest says that there is.

    Args:
        where: what errors call the release.
        digest: the manifest's digest (hex) that a reference resolved to.
        small: the content of manifest.json, SHA256SUMS or model.sig, `bounded`; None where there is none.
        read: opens one file's content as a stream; raises FaultError for what may pass.
        retry: `retrying`, with the registry's words.

    Raises:
        ReleaseError: what is published is damaged or hostile.
        OSError: the folder cannot be written.
    """
    content = small(MANIFEST)
    if content is None:
        raise ReleaseError(f"{where}: has no {MANIFEST}; it is no release, or is damaged")
    manifest = from_bytes(content, f"{where}: {MANIFEST}")
    if manifest.identity != digest:
        raise ReleaseError(f"{where}: holds another manifest than its name says; it is damaged, do not use it")
    root = folder.resolve()
    if sum(file.size for file in manifest.every_file) > shutil.disk_usage(root).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    for file in manifest.every_file:
        target = folder / file.path
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise ReleaseError(f"{where}: names {file.path} below what is a file; do not use it") from None
        if os.path.lexists(target):
            raise ReleaseError(f"{where}: {file.path} is another file's name on this disk; do not use it")
        if not target.parent.resolve().is_relative_to(root):
            raise ReleaseError(f"{where}: {file.path} leads out of the release; do not use it")
        retry(lambda file=file, target=target: _download(file, target, where, read))  # type: ignore[misc]
    for name in OUTSIDE:
        if (companion := small(name)) is not None:
            write_file(folder / name, companion)
    write_file(folder / MANIFEST, content)
    return manifest


def _download(
    file: File, target: Path, where: str, read: Callable[[File], contextlib.AbstractContextManager[Iterator[bytes]]]
) -> File:
    hasher = hashlib.sha256()
    size = 0
    with open(target, "wb") as writer, read(file) as chunks:
        for chunk in chunks:
            size += len(chunk)
            if size > file.size:
                break
            hasher.update(chunk)
            writer.write(chunk)
        sync(writer)
    if size < file.size:
        raise FaultError(f"{file.path} ends after {size} of {file.size} bytes")
    if size > file.size or hasher.hexdigest() != file.sha256:
        raise ReleaseError(f"{where}: {file.path} is not what the manifest says (sha256, size); it is damaged, do not use it")
    return file


def chunks_of(path: Path) -> Iterator[bytes]:
    """The content of a release's file, a piece at a time. Raises ReleaseError when it cannot be read."""
    try:
        with open(path, "rb") as stream:
            while chunk := stream.read(CHUNK):
                yield chunk
    except OSError as error:
        raise ReleaseError(f"{path}: cannot be read ({error.strerror})") from error
