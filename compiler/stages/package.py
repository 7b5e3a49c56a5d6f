"""Package: files that passed, with all that a loader needs beside them, as one folder that appears whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from compiler.errors import StageError
from compiler.hashing import canonical, copy, hash_file, sync_folder
from compiler.manifest import MANIFEST, SAMPLES, VALIDATION, Manifest, to_bytes
from compiler.store import Entry, write_file, writing
from compiler.types import Artifact, File


def package(
    aside: Path,
    target: Path,
    manifest: Manifest,
    artifacts: Sequence[tuple[Artifact, Entry]],
    support: Sequence[tuple[Path, File]],
    samples: Path,
    validation: Mapping[str, Any],
) -> Manifest:
    """Assemble a release in `aside` and rename it to `target`. Every byte is hashed as it is copied.

    Args:
        manifest: complete but for `files`, which grows from what is written here.
        artifacts: each with the cache entry that holds its files.
        support: the checkpoint's own files, each as (folder it is in, file).
        samples: the tokenized samples, so that the checks can be repeated without the text.
        validation: the content of validation.json.

    Raises:
        StageError: a file is not the one that was validated, or the disk is full or cannot be written.
    """
    with writing(target.parent, "packaging"):
        parts: list[tuple[Path, str, File | None]] = [(samples, SAMPLES, None)]
        parts += [(folder / file.path, file.path.removeprefix("support/"), file) for folder, file in support]
        made: list[tuple[Path, str, File | None]]
        made = [(entry.root / file.path, file.path, file) for artifact, entry in artifacts for file in artifact.files]
        with ThreadPoolExecutor() as pool:
            written = list(pool.map(lambda part: _put(aside, *part), [*made, *parts]))
        write_file(aside / VALIDATION, canonical(validation))
        files = [*written[len(made) :], hash_file(aside, VALIDATION)]
        whole = replace(manifest, files=tuple(sorted(files)))
        write_file(aside / MANIFEST, to_bytes(whole))
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(aside, target)
        sync_folder(target.parent)
    return whole


def _put(aside: Path, source: Path, path: str, expected: File | None) -> File:
    """Copy a file into the release as `path`, and make sure that it is the one that was hashed before."""
    (aside / path).parent.mkdir(parents=True, exist_ok=True)
    written = replace(copy(source, aside / path), path=path)
    if expected is not None and (written.sha256, written.size) != (expected.sha256, expected.size):
        raise StageError(f"packaging: {source}: changed while the build ran; build again")
    return written
