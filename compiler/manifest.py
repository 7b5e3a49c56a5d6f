"""manifest.json: what a release is, from what and how it was made, and the sha256 of every other file. Pure.

The file is canonical JSON and holds its own digest, so that a change of any byte of it shows. It holds no time, no host
and no absolute path: the same inputs give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from compiler.config import NAME, SEMVER
from compiler.errors import ReleaseError
from compiler.hashing import canonical, digest
from compiler.types import Artifact, File, Signature

MANIFEST = "manifest.json"
VALIDATION = "validation.json"
SAMPLES = "validation.safetensors"
SUMS = "SHA256SUMS"
SIGNATURE = "model.sig"
# Files of a release that its manifest cannot list, since they cover the manifest itself.
OUTSIDE = (SUMS, SIGNATURE)
RESERVED = {name.casefold() for name in (MANIFEST, *OUTSIDE)}


@dataclass(frozen=True)
class Source:
    """The checkpoint: where it was asked for, the commit that was found, and every file that was read."""

    uri: str
    revision: str | None
    licence: str | None
    files: tuple[File, ...]


@dataclass(frozen=True)
class Made:
    """A step of the build: its cache key and everything that the key was made from."""

    key: str
    inputs: Mapping[str, str]


@dataclass(frozen=True)
class Manifest:
    """`files` are all files of the release that belong to no artifact; `positions` is the longest sequence in tokens;
    `left_out` names parts of the architecture that the checkpoint has no weights for and the task does not need;
    `entry` is the model's entry of pipeline.yaml, to build it again from; `key` is the cache key of the whole, which a
    rebuild compares."""

    name: str
    release: str
    task: str
    architecture: str
    source: Source
    entry: Mapping[str, Any]
    signature: Signature
    positions: int | None
    left_out: tuple[str, ...]
    artifacts: tuple[Artifact, ...]
    files: tuple[File, ...]
    libraries: Mapping[str, str]
    python: str
    compiler: str
    steps: Mapping[str, Made]
    key: str
    # Targets that were asked for and are not here, each with the reason: int8 that was not worth it.
    refused: Mapping[str, str]
    schema: Literal[1] = 1
    # What `bench --record` measured. It says nothing of what the release is, so the digest leaves it out.
    benchmark: Mapping[str, Any] | None = None
    # The digest that was read with it: of what another version wrote, which may know fewer fields.
    read: str | None = field(default=None, compare=False)

    @property
    def every_file(self) -> tuple[File, ...]:
        return tuple(sorted((*self.files, *(file for artifact in self.artifacts for file in artifact.files))))

    def loading(self, options: Mapping[str, bool]) -> dict[str, bool]:
        """What `compiler.stages.load.load` takes for the original: who asks gives its permissions, the release the rest."""
        return {**options, "sentence_embedding": bool(self.entry.get("sentence_embedding"))}

    @property
    def identity(self) -> str:
        """The digest (sha256, hex) of all that a release is, each file's hash included; a recorded benchmark is not in it."""
        if self.read is not None:
            return self.read
        body = asdict(self)
        del body["benchmark"], body["read"]
        return digest(body)


def to_bytes(manifest: Manifest) -> bytes:
    """The content of manifest.json."""
    body = asdict(manifest)
    benchmark = body.pop("benchmark")
    del body["read"]
    stored = canonical({**body, "digest": digest(body)})
    return stored if benchmark is None else with_benchmark(stored, benchmark)


def with_benchmark(content: bytes, benchmark: Mapping[str, Any]) -> bytes:
    """The content of a manifest.json with another benchmark. All else stays as it was written, by whatever version."""
    return canonical({**json.loads(content), "benchmark": {**benchmark, "digest": digest(benchmark)}})


def from_bytes(content: bytes, where: str) -> Manifest:
    """Read a manifest and make sure that it is whole and names only files inside its release.

    Raises:
        ReleaseError: it is not a manifest of this schema, was changed after it was written, or names a path outside.
    """
    try:
        stored = json.loads(content)
        claimed = stored.pop("digest")
        manifest = TypeAdapter(Manifest).validate_python(stored)
        benchmark = stored.pop("benchmark", None)
        measured = None if benchmark is None else benchmark.pop("digest")
    except ValidationError as error:
        detail = error.errors()[0]
        place = ".".join(str(part) for part in detail["loc"])
        raise ReleaseError(f"{where}: not a manifest that this version reads: {place}: {detail['msg']}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ReleaseError(f"{where}: not a manifest: not JSON, or not its keys; the release is damaged") from error
    try:
        again = {**stored, "digest": claimed}
        whole = digest(stored) == claimed
        if benchmark is not None:
            again["benchmark"] = {**benchmark, "digest": measured}
            whole = whole and digest(benchmark) == measured
        whole = whole and canonical(again) == content
    except ValueError:  # NaN, or half of a surrogate pair
        whole = False
    if not whole:
        raise ReleaseError(f"{where}: changed since it was written; do not use this release, build or fetch it again")
    manifest = replace(manifest, benchmark=benchmark, read=claimed)
    if not re.fullmatch(NAME, manifest.name) or not re.fullmatch(SEMVER, manifest.release):
        raise ReleaseError(
            f"{where}: {manifest.name!r} {manifest.release!r} is no name and version of a release; do not use it"
        )
    for file in (*manifest.every_file, *manifest.source.files):
        if file.size < 0:
            raise ReleaseError(f"{where}: {file.path!r} has a size of {file.size} bytes, which no file has; do not use it")
    paths = [file.path for file in manifest.every_file]
    for path in paths:
        if not portable(path):
            raise ReleaseError(f"{where}: names {path!r}, which is no name of a file in a release; do not use it")
    if len(set(paths)) != len(paths):
        raise ReleaseError(f"{where}: names a file twice; do not use this release")
    return manifest


def portable(path: str) -> bool:
    """Whether a manifest may list a path: relative, inside the release, in its only form, without what another system or the
    lines of SHA256SUMS would take for something else, and none of the files that cover the manifest, in whatever case: on some
    disks they are the same."""
    pure = PurePosixPath(path)
    if not pure.parts or pure.is_absolute() or ".." in pure.parts or str(pure) != path:
        return False
    return not re.search(r"[\\:\x00-\x1f\x7f]", path) and pure.parts[0].casefold() not in RESERVED


def sums(manifest: Manifest, content: bytes) -> bytes:
    """The content of SHA256SUMS, as `sha256sum -c` reads it: every file of the release, manifest.json included, but for the
    signature and itself. `content` is that of manifest.json."""
    hashes = {file.path: file.sha256 for file in manifest.every_file} | {MANIFEST: hashlib.sha256(content).hexdigest()}
    return "".join(f"{sha256}  {path}\n" for path, sha256 in sorted(hashes.items())).encode()


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What separates two steps' inputs, as `name old → new`, for a reader."""
    found = []
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        if before != after:
            found.append(f"{name} {_short(before)} → {_short(after)}")
    return found


def _short(value: str | None) -> str:
    if value is None:
        return "none"
    return f"{value[:8]}…" if re.fullmatch("[0-9a-f]{64}", value) else value
