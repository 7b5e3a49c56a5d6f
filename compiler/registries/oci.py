"""oci://host[:port]/repository: releases as artifacts of CNCF ModelPack in any registry of containers.

A version is a tag, and so is an alias, of the manifest of OCI; each is put there in one request, after all blobs, so a tag
never names part of a release. A blob is named by its sha256, which is the file's in the release's own manifest: what is there
is not sent again, and what comes back is held against it.

Nothing in the distribution specification makes a tag only where there is none, and nothing that it has could: of two pushes
of one version with other content, the later one's tag stands. What is done about it: the tag is looked up once more right
before it is put, and read back after a pause that is twice as long as the registry took to put it; a push that does
not find its own bytes then has not published (a signature is a layer too, which the release's digest does not cover). So
both can succeed only if one request is on its way for longer than that pause, and a reader can see the losing release,
whole, for no longer than it. A registry that can make tags immutable closes the gap.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import hashlib
import re
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar
from urllib.parse import urlsplit

from compiler.config import SEMVER
from compiler.errors import RegistryError, ReleaseError
from compiler.manifest import MANIFEST, from_bytes
from compiler.registries import ALIAS, DIGEST, Parcel, TakenError, Version, match, modelpack, newest, precedence
from compiler.registries.oci_client import THREADS, Client, RefusedError, Upload
from compiler.registries.transfer import SMALL_BYTES, FaultError, receive, retrying
from compiler.types import File

T = TypeVar("T")

# A repository's name, as the distribution specification has it.
_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
NAME = re.compile(rf"{_PART}(?:/{_PART})*")
# The pause before a new tag is read back: this many times what the registry took to put it, and at least, at most, seconds.
SETTLE_TIMES, SETTLE_SECONDS, SETTLE_MOST_SECONDS = 2, 0.05, 5.0


@dataclass(frozen=True)
class Oci:
    """A repository of an OCI registry. Implements `compiler.registries.Registry`."""

    url: str
    client: Client
    # A blob is made under its sha256, which the distribution specification has the registry hold it against.
    checks: ClassVar[bool] = True

    def list(self) -> tuple[Version, ...]:
        """Every published version with its aliases. Tags of anything but releases are passed over: they are not ours."""
        tags = self._retry(self.client.tags)
        labels = self._labels([tag for tag in tags if re.fullmatch(SEMVER, tag) or ALIAS.fullmatch(tag)])
        found = []
        for tag, (release, digest) in labels.items():
            if tag == release:
                aliases = tuple(sorted(name for name, named in labels.items() if named == (release, digest) and name != tag))
                found.append(Version(release, digest, aliases))
        return tuple(sorted(found, key=lambda version: precedence(version.release)))

    def resolve(self, reference: str) -> Version | None:
        """As `Registry.resolve`. Where the registry lets nobody list tags, a version's aliases are those asked for."""
        if DIGEST.fullmatch(reference):
            return match(self.list(), reference)
        if (named := self._label(reference)) is None:
            return None
        release, digest = named
        if re.fullmatch(SEMVER, reference) and reference != release:
            raise RegistryError(f"{self.url}: the tag {reference} names release {release}; it is damaged, do not use it")
        labels = self._labels([tag for tag in self._tags(reference) if ALIAS.fullmatch(tag)])
        return Version(release, digest, tuple(sorted(name for name, found in labels.items() if found == named)))

    def _tags(self, *otherwise: str) -> Sequence[str]:
        """Every tag, or others where the registry lets nobody list them."""
        try:
            return self._retry(self.client.tags)
        except RefusedError as error:
            if error.status not in (401, 403, 405):
                raise
            return otherwise

    def model(self) -> str | None:
        """As `Registry.model`."""
        tag = newest(self._tags())
        content = None if tag is None else self._retry(lambda: self.client.manifest(tag))
        return None if content is None else modelpack.title(content)

    def push(self, parcel: Parcel) -> None:
        """As `Registry.push`."""
        content, config, files = modelpack.pack(parcel)
        if len(content) > modelpack.MANIFEST_BYTES:
            raise RegistryError(f"{self.url}: {len(files)} files make a manifest larger than registries take; publish fewer")
        stop = threading.Event()
        bodies: dict[str, tuple[int, str, bytes | Callable[[], Upload]]] = {}
        for file in files:
            path = parcel.path / file.path
            body = parcel.content if file.path == MANIFEST else functools.partial(Upload, path, stop)
            bodies[f"sha256:{file.sha256}"] = (file.size, file.path, body if file.size else b"")
        bodies[f"sha256:{hashlib.sha256(config).hexdigest()}"] = (len(config), "the config", config)
        # The largest first, so that none of the senders is left with it at the end.
        order = sorted(bodies.items(), key=lambda item: -item[1][0])
        pool = concurrent.futures.ThreadPoolExecutor(THREADS)
        try:
            for done in concurrent.futures.as_completed(
                [pool.submit(self._send_blob, digest, *blob, stop) for digest, blob in order]
            ):
                done.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
        self._publish(parcel.manifest.release, content)

    def _send_blob(self, digest: str, size: int, path: str, body: bytes | Callable[[], Upload], stop: threading.Event) -> None:
        def work() -> None:
            if stop.is_set():
                return
            there = self.client.blob_size(digest)
            if there is None:
                self.client.put_blob(digest, body)
            elif there not in (size, -1):
                raise RegistryError(
                    f"{self.url}: has {there} of the {size} bytes of {path}; its storage is damaged, have it repaired"
                )

        try:
            self._retry(work)
        except RefusedError as error:
            if error.status != 400:
                raise
            # The sha256 of what arrived is not the name it was given.
            raise ReleaseError(
                f"{self.url}: {path} was refused: it changed since it was hashed; verify the release, then push it again"
            ) from error
        except OSError as error:
            raise RegistryError(f"{path}: cannot be read ({error.strerror}); push it again") from error

    def _publish(self, release: str, content: bytes) -> None:
        """Put a version's tag, unless there is one, and make sure that it stays. Only the same bytes are the same: a label
        names the release's manifest, which a signature is not part of."""

        def work() -> float:
            # Looked up in every try: an answer that was lost may hide that the tag is there, and whose it is by now.
            if (there := self.client.manifest(release)) is not None:
                if there == content:
                    return 0.0
                raise TakenError(f"{self.url}: another push of {release} came first")
            started = time.monotonic()
            self.client.put_manifest(release, content)
            return time.monotonic() - started

        try:
            took = self._retry(work)
        except RefusedError:
            # A registry that makes tags immutable refuses the later of two pushes.
            if self._retry(lambda: self.client.manifest(release)) is None:
                raise
            raise TakenError(f"{self.url}: another push of {release} came first") from None
        time.sleep(min(max(SETTLE_TIMES * took, SETTLE_SECONDS), SETTLE_MOST_SECONDS))
        if self._retry(lambda: self.client.manifest(release)) not in (None, content):
            raise TakenError(f"{self.url}: another push of {release} came at the same time")

    def alias(self, name: str, version: Version) -> None:
        """As `Registry.alias`; a tag of that name on anything but a release is left alone."""
        self._label(name)
        content = self._retry(lambda: self.client.manifest(version.release))
        if content is None or modelpack.label(content, self._where(version.release)) != (version.release, version.digest):
            raise RegistryError(f"{self.url}: {version.release} is not what it was a moment ago; do not use it")
        self._retry(lambda: self.client.put_manifest(name, content))

    def pull(self, version: Version, folder: Path) -> None:
        """As `Registry.pull`. Of what the registry says, only what the release's own manifest says too is fetched."""
        where = self._where(version.release)
        content = self._retry(lambda: self.client.manifest(version.release))
        if content is None or modelpack.label(content, where) != (version.release, version.digest):
            raise RegistryError(f"{where}: is not what it was a moment ago; pull it again")
        layers = modelpack.layers(content, where)
        own = self._small(layers, MANIFEST, where)
        if own is not None:
            modelpack.compare(layers, from_bytes(own, f"{where}: {MANIFEST}"), where)

        def small(name: str) -> bytes | None:
            return own if name == MANIFEST else self._small(layers, name, where)

        receive(folder, where, version.digest, small, functools.partial(self._opened, where), self._retry)

    def _small(self, layers: dict[str, File], path: str, where: str) -> bytes | None:
        """A small file's content, hashed; None where there is no such layer."""
        file = layers.get(path)
        if file is None:
            return None
        if file.size > SMALL_BYTES:
            raise ReleaseError(f"{where}: {path} claims {file.size} bytes, which none has; do not use it")

        def work() -> bytes:
            with self._opened(where, file) as chunks:
                content = b""
                for chunk in chunks:
                    content += chunk
            if len(content) < file.size:
                raise FaultError(f"{path} ends after {len(content)} of {file.size} bytes")
            return content

        content = self._retry(work)
        if hashlib.sha256(content).hexdigest() != file.sha256:
            raise ReleaseError(f"{where}: {path} is not what its digest says; it is damaged, do not use it")
        return content

    @contextlib.contextmanager
    def _opened(self, where: str, file: File) -> Iterator[Iterator[bytes]]:
        with contextlib.closing(self._chunks(where, file)) as chunks:
            yield chunks

    def _chunks(self, where: str, file: File) -> Generator[bytes, None, None]:
        """A blob's content. After a cut it goes on from where it was, as long as something comes each time."""
        offset = 0
        while offset < file.size:
            start = offset
            response = self._retry(functools.partial(self.client.blob, f"sha256:{file.sha256}", offset))
            with response:
                length = response.headers.get("Content-Length", "")
                if response.status_code == 404 or response.status_code == 416:
                    raise ReleaseError(f"{where}: {file.path} is not there, or not all of it; it is damaged, do not use it")
                if offset and response.status_code != 206:
                    raise FaultError(f"{file.path} broke off after {offset} of {file.size} bytes")
                if length.isdecimal() and (there := offset + int(length)) != file.size:
                    raise ReleaseError(
                        f"{where}: has {there} of the {file.size} bytes of {file.path}; it is damaged, do not use it"
                    )
                try:
                    for chunk in self.client.stream(response):
                        offset += len(chunk)
                        yield chunk
                        if offset > file.size:
                            return
                except FaultError:
                    if offset == start:
                        raise
                else:
                    if offset == start:
                        raise FaultError(f"{file.path} ends after {offset} of {file.size} bytes")

    def _labels(self, tags: Sequence[str]) -> dict[str, tuple[str, str]]:
        """What each tag names; without those that name no release."""

        def look(tag: str) -> tuple[str, str] | None:
            try:
                return self._label(tag)
            except modelpack.OtherError:
                return None

        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            return {tag: found for tag, found in zip(tags, pool.map(look, tags), strict=True) if found is not None}

    def _label(self, reference: str) -> tuple[str, str] | None:
        return self._retry(lambda: self._label_once(reference))

    def _label_once(self, reference: str) -> tuple[str, str] | None:
        content = self.client.manifest(reference)
        return None if content is None else modelpack.label(content, self._where(reference))

    def _where(self, reference: str) -> str:
        return f"{self.url}@{reference}"

    def _retry(self, work: Callable[[], T]) -> T:
        return retrying(work, lambda fault: RegistryError(f"{self.url}: {fault}; try again when it is well"))


def connect(url: str) -> Oci:
    """The repository at oci://host[:port]/name.

    Raises:
        RegistryError: the URL names none.
    """
    parts = urlsplit(url)
    name = parts.path.removeprefix("/")
    if not parts.hostname or parts.port == 0:
        raise RegistryError(f"{url}: not oci://host[:port]/repository; correct it")
    if not NAME.fullmatch(name) or len(name) > 255:
        tag = "; leave the tag out, a release brings its own version" if ":" in name else ""
        raise RegistryError(
            f"{url}: {name!r} is no repository's name: parts of lower-case letters and digits, with '.', '_' or '-' inside, "
            f"between '/'{tag}"
        )
    return Oci(url, Client(url, parts.netloc, name))
