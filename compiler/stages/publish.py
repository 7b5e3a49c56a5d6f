"""Publish and fetch: releases go to a registry whole, under a version that never changes, and come back verified."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from compiler import registries
from compiler.errors import CompileError, RegistryError, ReleaseError
from compiler.hashing import hash_file
from compiler.manifest import MANIFEST, OUTSIDE, Manifest, from_bytes
from compiler.registries import Parcel, Registry, TakenError, Version
from compiler.store import scratch, writing
from compiler.types import Event
from compiler.verify import read_release, verify_files


@dataclass(frozen=True)
class Published:
    """What a push came to: the release, the place, the version, whether this push sent it, and the aliases that it moved."""

    path: Path
    url: str
    version: Version
    made: bool
    moved: tuple[str, ...]


def push(path: Path, url: str, aliases: Sequence[str] = (), *, verified: Manifest | None = None) -> Published:
    """Publish a release under its version, then move aliases to it. Publishing the same again changes nothing.

    Args:
        verified: the release's manifest, when every file of it was hashed in this process already.

    Raises:
        ReleaseError: the release is damaged.
        RegistryError: that version is published with another content, or the registry cannot be reached or refuses.
    """
    for name in aliases:
        registries.check_alias(name)
    registry = registries.connect(registries.check_place(url))
    manifest = verified if verified is not None else read_release(path)[0]
    content = (path / MANIFEST).read_bytes()
    if from_bytes(content, str(path / MANIFEST)).identity != manifest.identity:
        raise RegistryError(f"{path}: changed while it was pushed; push it again")
    outside = tuple(hash_file(path, name) for name in OUTSIDE if os.path.lexists(path / name))
    made = False
    version = _same(registry, manifest)
    if verified is None:
        # Each file is hashed once: here or, by a registry that does so, while it is sent.
        verify_files(path, manifest, hashing=version is not None or not getattr(registry, "hashes", False))
    if version is None:
        try:
            registry.push(Parcel(path, manifest, content, (*manifest.every_file, *outside)))
            made = True
        except TakenError:
            pass
        if (version := _same(registry, manifest)) is None:
            raise RegistryError(f"{url}: {manifest.release} does not resolve after it was pushed; push it again")
    moved = tuple(dict.fromkeys(name for name in aliases if name not in version.aliases))
    for name in moved:
        registry.alias(name, version)
    return Published(path, url, replace(version, aliases=tuple(sorted({*version.aliases, *moved}))), made, moved)


def alias(url: str, name: str) -> tuple[Version, bool]:
    """Make `name` name the version that a URL's reference names.

    Returns:
        The version, and whether the alias was moved: not when it names that version already.

    Raises:
        RegistryError: the URL has no reference or nothing is published under it, or the registry cannot be reached or refuses.
    """
    registries.check_alias(name)
    place, reference = registries.parse(url)
    if place == url:
        raise RegistryError(f"{url}: names no version; say which: {url}@1.0.0")
    registry = registries.connect(place)
    version = _find(registry, reference)
    if name in version.aliases:
        return version, False
    registry.alias(name, version)
    return replace(version, aliases=tuple(sorted({*version.aliases, name}))), True


def versions(url: str) -> tuple[Version, ...]:
    """What is published at a URL, oldest version first. Raises RegistryError when it cannot be reached or refuses."""
    return registries.connect(registries.check_place(url)).list()


def publish(
    path: Path,
    url: str,
    aliases: Sequence[str],
    tell: Callable[[Event], None],
    manifest: Manifest,
    *,
    verified: bool = False,
) -> Published:
    """As `push`, telling of it. `manifest` is the release's, `verified` whether all of it was hashed in this process."""
    # Before the URL is shown to anybody: one that holds a password is refused, and not repeated.
    registries.check_place(url)
    model, step, started = f"{manifest.name} {manifest.release}", f"publish {url}", time.monotonic()
    tell(Event(model, step, "start"))
    try:
        published = push(path, url, aliases, verified=manifest if verified else None)
    except CompileError:
        tell(Event(model, step, "failed", time.monotonic() - started))
        raise
    state = "published" if published.made else "there"
    tell(Event(model, step, state, time.monotonic() - started, ", ".join(published.moved)))
    return published


def _same(registry: Registry, manifest: Manifest) -> Version | None:
    """The published version of a release. Raises RegistryError when that has another content."""
    version = registry.resolve(manifest.release)
    if version is not None and version.digest != manifest.identity:
        raise RegistryError(
            f"{registry.url}: {manifest.release} is published already, with other content ({version.digest[:12]}…, this is "
            f"{manifest.identity[:12]}…); a published version never changes: set another release:"
        )
    return version


def pull(url: str, folder: Path) -> tuple[Manifest, bool]:
    """Fetch the release that a URL's reference names into a folder, which appears whole and verified, or not at all.

    Returns:
        Its manifest, and whether it was fetched: not when the folder holds it already.

    Raises:
        RegistryError: nothing is published under that name, or the registry cannot be reached or refuses.
        ReleaseError: what is published is damaged or hostile, or the folder holds something else.
        StageError: the folder cannot be written, or its disk is full.
    """
    place, reference = registries.parse(url)
    registry = registries.connect(place)
    version = _find(registry, reference)
    if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        return _there(folder, version), False
    with writing(folder.parent, f"pulling {place}"), scratch(folder.absolute().parent) as aside:
        registry.pull(version, aside)
        manifest, _ = read_release(aside)
        if manifest.release != version.release:
            raise ReleaseError(f"{place}: {version.release} holds release {manifest.release}; do not use it")
        if folder.is_dir():
            folder.rmdir()
        os.rename(aside, folder)
    return manifest, True


def _find(registry: Registry, reference: str) -> Version:
    version = registry.resolve(reference)
    if version is None:
        known = ", ".join(found.release for found in registry.list()[-3:])
        has = f"it has {known}" if known else "nothing is published there"
        raise RegistryError(f"{registry.url}: has no {reference}; {has}")
    return version


def _there(folder: Path, version: Version) -> Manifest:
    """The release that is in a folder already, verified. Raises RegistryError when it is not that version."""
    if (folder / MANIFEST).is_file():
        manifest, _ = read_release(folder)
        if manifest.identity == version.digest:
            verify_files(folder, manifest)
            return manifest
    raise RegistryError(f"{folder}: is there already and is not {version.release}; give another folder")
