"""Package: files that passed, with all that a loader needs beside them, as one folder that appears whole or not at all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from compiler.bom import BOM, bom
from compiler.errors import DamagedError, StageError
from compiler.hashing import canonical, copy, sync_folder
from compiler.manifest import MANIFEST, SAMPLES, SUMS, VALIDATION, Manifest, portable, sums, to_bytes
from compiler.provenance import PROVENANCE, provenance
from compiler.store import Entry, write_file, writing
from compiler.types import Artifact, File


def package(
    aside: Path,
    target: Path,
    manifest: Manifest,
    artifacts: Sequence[tuple[Artifact, Entry]],
    support: Sequence[tuple[Path, File]],
    samples: tuple[Path, File],
    validation: Mapping[str, Any],
) -> Manifest:
    """Assemble a release in `aside` and rename it to `target`. Every byte is hashed as it is copied.

    Args:
        manifest: complete but for `files`, which grows from what is written here.
        artifacts: each with the cache entry that holds its files.
        support: the checkpoint's own files, each as (folder it is in, file).
        samples: the tokenized samples, so that the checks can be repeated without the text, as a file of `support` is.
        validation: the content of validation.json.

    Raises:
        DamagedError: a file is not the one that was validated.
        StageError: the disk is full or cannot be written.
    """
    with writing(target.parent, "packaging"):
        parts = [(samples[0] / samples[1].path, SAMPLES, samples[1])]
        parts += [(folder / file.path, file.path.removeprefix("support/"), file) for folder, file in support]
        made = [(entry.root / file.path, file.path, file) for artifact, entry in artifacts for file in artifact.files]
        with ThreadPoolExecutor() as pool:
            written = list(pool.map(lambda part: _put(aside, *part), [*made, *parts]))
        files = [*written[len(made) :], _write(aside, VALIDATION, canonical(validation))]
        # Each covers what was written before it: the bill of materials, the provenance, the manifest, the sums.
        whole = replace(manifest, files=tuple(sorted(files)))
        files.append(_write(aside, BOM, bom(whole, validation)))
        whole = replace(manifest, files=tuple(sorted(files)))
        files.append(_write(aside, PROVENANCE, provenance(whole, validation, whole.entry)))
        whole = replace(manifest, files=tuple(sorted(files)))
        _write(aside, MANIFEST, content := to_bytes(whole))
        _write(aside, SUMS, sums(whole, content))
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(aside, target)
        sync_folder(target.parent)
    return whole


def _put(aside: Path, source: Path, path: str, expected: File) -> File:
    """Copy a file into the release as `path`, and make sure that it is the one that was hashed before."""
    if not portable(path):
        raise StageError(f"packaging: {source.parent}: {path!r} cannot be a name in a release; rename the file")
    (aside / path).parent.mkdir(parents=True, exist_ok=True)
    written = replace(copy(source, aside / path), path=path)
    if (written.sha256, written.size) != (expected.sha256, expected.size):
        raise DamagedError(f"packaging: {source}: changed while the build ran; build again")
    return written


def _write(aside: Path, path: str, content: bytes) -> File:
    """Write a file of our own, which must not take the place of one that is there."""
    if os.path.lexists(aside / path):
        raise StageError(f"packaging: {path}: the checkpoint has a file of that name, which is the release's own; rename it")
    write_file(aside / path, content)
    return File(path, hashlib.sha256(content).hexdigest(), len(content))
