"""Publish and fetch: releases go to a registry whole, under a version that never changes, and come back verified."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from compiler import registries
from compiler.errors import CompileError, RegistryError, ReleaseError
from compiler.hashing import hash_file, sync_folder
from compiler.manifest import MANIFEST, OUTSIDE, SIGNATURE, SUMS, Manifest, from_bytes, sums
from compiler.registries import LATEST, Parcel, Registry, TakenError, Version, precedence
from compiler.store import scratch, writing
from compiler.types import Event
from compiler.verify import read_release, verify_files, verify_sums


@dataclass(frozen=True)
class Published:
    """What a push came to: the release, the place, the version, whether this push sent it, the aliases that it moved,
    whether the release on disk is signed, the open registry, and the versions that moved aliases named before, if any."""

    path: Path
    url: str
    version: Version
    made: bool
    moved: tuple[str, ...]
    signed: bool
    registry: Registry = field(compare=False, repr=False)
    before: Mapping[str, str] = field(default_factory=dict)

    @property
    def unsent(self) -> bool:
        """Whether a signature was not sent: the version was there, and takes nothing new. Whether the published one has that
        very signature is not known without fetching it."""
        return self.signed and not self.made

    @property
    def new(self) -> str:
        """The aliases that were made, which named nothing before."""
        return ", ".join(name for name in self.moved if name not in self.before)

    @property
    def taken(self) -> tuple[str, ...]:
        """A sentence for each alias that was taken from another version: somebody may have put it there on purpose."""
        return tuple(moved_from(name, before, self.version.release) for name, before in self.before.items())


def moved_from(name: str, before: str, release: str) -> str:
    return f"{name} moved from {before} to {release}"


UNSENT = "nothing was sent, not even a signature made since: sign before you push"


def push(path: Path, url: str, aliases: Sequence[str] = (), *, verified: Manifest | None = None) -> Published:
    """Publish a release under its version, then move aliases to it. Publishing the same again changes nothing.

    Args:
        verified: the release's manifest, when every file of it was hashed in this process already.

    Raises:
        ReleaseError: the release is damaged.
        RegistryError: that version is published with another content, the versions there are another model's, `latest` names
            a newer one, or the registry cannot be reached or refuses.
    """
    return move(send(path, url, aliases, verified=verified), aliases)


def send(path: Path, url: str, aliases: Sequence[str] = (), *, verified: Manifest | None = None) -> Published:
    """The first half of `push`: nothing is sent when one of the aliases could not be moved afterwards."""
    registry = registries.ready(registries.check_place(url))
    manifest = verified if verified is not None else read_release(path)[0]
    content = _read(path / MANIFEST)
    if from_bytes(content, str(path / MANIFEST)).identity != manifest.identity:
        raise RegistryError(f"{path}: changed while it was pushed; push it again")
    _check_aliases(registry, aliases, manifest.release)
    if (version := _same(registry, manifest)) is None and (there := registry.model()) not in (None, manifest.name):
        raise RegistryError(f"{url}: is the place of {there}, this is {manifest.name}; give each model a place of its own")
    # Each file is hashed once: in this process before, here, or by a registry that does so while it is sent.
    once = version is not None or getattr(registry, "checks", False)
    verify_files(path, manifest, hashing=verified is None if once else not getattr(registry, "hashes", False))
    try:
        outside = tuple(hash_file(path, name) for name in OUTSIDE if os.path.lexists(path / name))
    except OSError as error:
        raise ReleaseError(f"{error.filename}: cannot be read ({error.strerror})") from error
    # What is sent as the manifest is what was read above: the sums must be of that, whatever is on disk by now.
    if next(file.sha256 for file in outside if file.path == SUMS) != hashlib.sha256(sums(manifest, content)).hexdigest():
        raise RegistryError(f"{path}: changed while it was pushed; push it again")
    made = False
    if version is None:
        try:
            registry.push(Parcel(path, manifest, content, (*manifest.every_file, *outside)))
            made = True
        except TakenError:
            pass
        if (version := _same(registry, manifest)) is None:
            raise RegistryError(f"{url}: {manifest.release} does not resolve after it was pushed; push it again")
    return Published(path, url, version, made, (), any(file.path == SIGNATURE for file in outside), registry)


def move(published: Published, aliases: Sequence[str]) -> Published:
    """The second half of `push`: move aliases, which `send` was given too, to what it gave, then have a registry with a page
    of its own show what is newest, also where an earlier push could not. Raises RegistryError as `push` does."""
    version, registry = published.version, published.registry
    moved = tuple(dict.fromkeys(name for name in aliases if name not in version.aliases))
    # Of `latest` it must be known.
    before = {name: named for name in moved if (named := _named(registry, name, strict=name == LATEST)) is not None}
    if LATEST in before:  # somebody may have pushed since `send` looked
        _check_latest(registry, before[LATEST], version.release)
    for name in moved:
        registry.alias(name, version)
    version = replace(version, aliases=tuple(sorted({*version.aliases, *moved})))
    if (show := getattr(registry, "show", None)) is not None:
        show(published.path)
    return replace(published, version=version, moved=moved, before=before)


def _named(registry: Registry, name: str, *, strict: bool = False) -> str | None:
    """The version that an alias names before it is moved; None where it names none or, unless `strict`, cannot be read, which
    moving it mends."""
    try:
        return version.release if (version := registry.resolve(name)) is not None else None
    except RegistryError:
        if strict:
            raise
        return None


def _check_aliases(registry: Registry, aliases: Sequence[str], release: str) -> None:
    """Raises RegistryError when an alias cannot be one here, or `latest` would go back to a version that is not."""
    for name in aliases:
        registries.check_alias(name)
        if (check := getattr(registry, "check_alias", None)) is not None:
            check(name)
    if LATEST in aliases and (named := registry.resolve(LATEST)) is not None:
        _check_latest(registry, named.release, release)


def _check_latest(registry: Registry, named: str, release: str) -> None:
    if precedence(named) > precedence(release):
        raise RegistryError(
            f"{registry.url}: {LATEST} names {named}, which is newer than {release}; leave {LATEST} out, or, to go "
            f"back, move it yourself: compile alias"
        )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ReleaseError(f"{path}: cannot be read ({error.strerror})") from error


def alias(url: str, name: str) -> tuple[Version, bool, str | None]:
    """Make `name` name the version that a URL's reference names.

    Returns:
        The version; whether the alias was moved, which it is not when it names that version already; and the version that it
        named before, if any.

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
        return version, False, version.release
    before = _named(registry, name)
    registry.alias(name, version)
    return replace(version, aliases=tuple(sorted({*version.aliases, name}))), True, before


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
    """As `send`, telling of it. `manifest` is the release's, `verified` whether all of it was hashed in this process."""
    # Before the URL is shown to anybody: one that holds a password is refused, and not repeated.
    registries.check_place(url)
    with _told(f"publish {url}", manifest, tell) as end:
        published = send(path, url, aliases, verified=manifest if verified else None)
        end("published" if published.made else "there", UNSENT if published.unsent else "")
    return published


def move_aliases(published: Published, aliases: Sequence[str], tell: Callable[[Event], None], manifest: Manifest) -> Published:
    """As `move`, telling of it when there is something to move."""
    if set(aliases) <= set(published.version.aliases):
        return move(published, ())
    with _told(f"alias {published.url}", manifest, tell) as end:
        published = move(published, aliases)
        end("moved", "; ".join(filter(None, (published.new, *published.taken))))
    return published


@contextlib.contextmanager
def _told(step: str, manifest: Manifest, tell: Callable[[Event], None]) -> Iterator[Callable[[str, str], None]]:
    model, started = f"{manifest.name} {manifest.release}", time.monotonic()
    tell(Event(model, step, "start"))
    try:
        yield lambda state, detail: tell(Event(model, step, state, time.monotonic() - started, detail))
    except CompileError:
        tell(Event(model, step, "failed", time.monotonic() - started))
        raise


def _same(registry: Registry, manifest: Manifest) -> Version | None:
    """The published version of a release. Raises RegistryError when that has another content."""
    version = registry.resolve(manifest.release)
    if version is not None and version.digest != manifest.identity:
        raise RegistryError(
            f"{registry.url}: {manifest.release} is published already, with other content ({version.digest[:12]}…, this is "
            f"{manifest.identity[:12]}…); a published version never changes: raise release: in pipeline.yaml"
        )
    if version is not None and (check := getattr(registry, "check_same", None)) is not None:
        check(version)
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
        verify_sums(aside, manifest)  # every other file was hashed while it came
        try:
            os.rename(aside, folder)  # an empty folder makes room, any other does not
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                return _there(folder, version), False  # another pull was faster
            raise
        sync_folder(folder.absolute().parent)
    return manifest, True


def _find(registry: Registry, reference: str) -> Version:
    version = registry.resolve(reference)
    if version is None:
        found = registry.list()
        known = ", ".join(one.release for one in found[-3:])
        aliases = ", ".join(sorted({name for one in found for name in one.aliases}))
        has = (
            f"it has {known}" + (f", and the aliases {aliases}" if aliases else "") if known else "nothing is published there"
        )
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
