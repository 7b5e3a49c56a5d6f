"""Content hashes. Files stream; none is read whole into memory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from compiler.types import File

CHUNK = 1 << 20


def canonical(value: Any) -> bytes:
    """JSON with sorted keys, two spaces of indent and a final newline: the same value gives the same bytes.

    Raises:
        ValueError: the value holds NaN or an infinity, which JSON has no word for.
    """
    return (json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def digest(value: Any) -> str:
    """The sha256 (hex) of a JSON value's canonical form."""
    return hashlib.sha256(canonical(value)).hexdigest()


def file_sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_file(root: Path, path: str) -> File:
    """The `File` at `root/path`."""
    return File(path, file_sha256(root / path), os.stat(root / path).st_size)


def hash_files(root: Path, paths: Iterable[str]) -> tuple[File, ...]:
    """As `hash_file`, for many, on the machine's cores (hashlib lets go of the interpreter's lock)."""
    with ThreadPoolExecutor() as pool:
        return tuple(pool.map(lambda path: hash_file(root, path), sorted(paths)))


def hash_folder(root: Path) -> tuple[File, ...]:
    """Every file below `root`."""
    return hash_files(root, list_files(root))


def list_files(root: Path) -> list[str]:
    """The paths of everything below `root` that is not a folder, relative to it with `/`, sorted."""
    found = []
    for folder, folders, names in os.walk(root):
        folders.sort()
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        found += [(Path(folder) / name).relative_to(root).as_posix() for name in (*names, *links)]
    return sorted(found)


def copy(source: Path, target: Path) -> File:
    """Copy a file and hash what was copied, in one pass. The `File`'s path is the target's name."""
    hasher = hashlib.sha256()
    size = 0
    with open(source, "rb") as reader, open(target, "xb") as writer:
        while chunk := reader.read(CHUNK):
            hasher.update(chunk)
            writer.write(chunk)
            size += len(chunk)
        sync(writer)
    return File(target.name, hasher.hexdigest(), size)


def sync(stream: BinaryIO) -> None:
    """Have what was written survive a loss of power, before a rename makes it visible."""
    stream.flush()
    os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Have a folder's names survive a loss of power: those of files that were made or renamed in it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
