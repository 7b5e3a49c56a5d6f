"""s3:// and what else fsspec reaches: object stores, which have no rename, but can create an object only where there is none.

    <root>/objects/<key>/…       a release's files, by the digest of all that a push sends, so that two pushes never mix
    <root>/versions/1.0.0        names the key and the manifest's digest; created last and never again: the version
    <root>/aliases/latest        the version that an alias names, on one line; replaced in one step

What is in objects/ and no version names is what an interrupted push has sent.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar
from urllib.parse import urlsplit

from compiler.config import SEMVER
from compiler.errors import CompileError, RegistryError, ReleaseError
from compiler.hashing import canonical
from compiler.manifest import MANIFEST, from_bytes
from compiler.registries import (
    ALIAS,
    ALIAS_BYTES,
    SCHEMES,
    Parcel,
    Registry,
    TakenError,
    Version,
    look_up,
    newest,
    precedence,
    read_alias,
)
from compiler.registries.transfer import SMALL_BYTES, FaultError, bounded, chunks_of, key_of, receive, retrying
from compiler.types import File

T = TypeVar("T")

OBJECTS, VERSIONS, ALIASES = "objects", "versions", "aliases"
POINTER_BYTES = 4096
# What one request carries: an upload's part (S3 takes at least 5 MiB, and at most 10,000 of them) and a download's range.
BLOCK = 16 << 20
MAX_PARTS = 9_000
# Files on the way at once; each holds a block in memory.
AT_ONCE = 4
S3 = ("s3", "s3a")
# Where two pushes of one version cannot both succeed, because the store itself refuses to create an object twice.
CREATES = S3
NEEDS = {"s3": "s3", "s3a": "s3"}
VARIABLES = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "s3a": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "gcs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    "abfs": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
# Faults of a connection, by the names of their classes in botocore, aiohttp, requests and fsspec: none of them need be here.
FAULTS = {
    "HTTPClientError", "IncompleteReadError", "ResponseParserError", "ResponseStreamingError", "FlexibleChecksumError",
    "ClientConnectionError", "ClientPayloadError", "IncompleteRead", "RequestException", "FSTimeoutError", "ConnectionError",
    "TimeoutError",
}  # fmt: skip


def connect(url: str) -> Registry:
    """The registry at an fsspec URL. Nothing is asked of the store before the first call.

    Raises:
        RegistryError: fsspec knows no such scheme, its package is not installed, or a URL alone does not open it.
    """
    import fsspec

    parts = urlsplit(url)
    scheme = parts.scheme
    if not parts.netloc:
        raise RegistryError(f"{url}: names no bucket; a registry's URL is {scheme}://BUCKET/PATH")
    try:
        implementation = fsspec.get_filesystem_class(scheme)
    except ValueError:
        raise RegistryError(f"{url}: nothing serves {scheme}://; give {SCHEMES}") from None
    except ImportError as error:
        package = f"pip install 'aot-model-compiler[{NEEDS[scheme]}]'" if scheme in NEEDS else " ".join(str(error).split())
        raise RegistryError(f"{url}: {scheme}:// needs a package that is not installed: {package}") from error
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if scheme in S3:
        # We try again ourselves; three layers that each try five times would take minutes to say that a server is away.
        given = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
        options["config_kwargs"] = {"retries": {"total_max_attempts": 1}, **given}
    try:
        # What it lacks is told before it is made: ftp's, half made, prints a traceback of its own when it is dropped.
        inspect.signature(implementation.__init__).bind(None, **fsspec.config.apply_config(implementation, options))
        filesystem = implementation(**options)
        root = filesystem._strip_protocol(url)
    except Exception as error:  # each implementation asks for what it likes
        reason = f"fsspec cannot open {scheme}:// by this URL alone ({_short(error)})"
        raise RegistryError(f"{url}: {reason}; set {_variables(scheme)}, or give {SCHEMES}") from error
    if scheme in S3:
        filesystem.retries = 1
    return Objects(url, scheme, filesystem, root)


def ready(url: str) -> None:
    """Raises RegistryError when two pushes to a URL could both succeed, or nothing would be there afterwards."""
    scheme = urlsplit(url).scheme
    if scheme == "memory":
        raise RegistryError(f"{url}: memory:// is gone once this command has ended; push to {SCHEMES}")
    if scheme not in CREATES:
        raise RegistryError(f"{url}: {scheme}:// cannot be kept from replacing a published version; push to {SCHEMES}")


@dataclass(frozen=True)
class Objects:
    """See `compiler.registries.Registry`. `root` is what fsspec calls the place, without the scheme."""

    url: str
    scheme: str
    filesystem: Any
    root: str
    hashes: ClassVar[bool] = True

    def list(self) -> tuple[Version, ...]:
        aliases = self._aliases()
        releases = sorted((name for name in self._names(VERSIONS) if re.fullmatch(SEMVER, name)), key=precedence)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            found = pool.map(lambda release: self._version(release, aliases), releases)
            return tuple(version for version in found if version is not None)

    def resolve(self, reference: str) -> Version | None:
        return look_up(reference, self.url, self.list, self._aliases, self._version)

    def model(self) -> str | None:
        if (release := newest(self._names(VERSIONS))) is None:
            return None
        pointer = _read_pointer(self._small(f"{VERSIONS}/{release}", POINTER_BYTES) or b"", release)
        content = pointer and self._small(f"{OBJECTS}/{pointer['content']}/{MANIFEST}", SMALL_BYTES)
        with contextlib.suppress(ReleaseError):
            return from_bytes(content, self.url).name if content else None
        return None

    def push(self, parcel: Parcel) -> None:
        key, release = key_of(parcel), parcel.manifest.release
        # The largest first, so that no thread is left with it alone at the end.
        files = sorted(parcel.files, key=lambda file: -file.size)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for sent in [pool.submit(self._put, parcel.path, file, f"{OBJECTS}/{key}/{file.path}") for file in files]:
                try:
                    sent.result()
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
        manifest = self._at(f"{OBJECTS}/{key}/{MANIFEST}")
        self._try(lambda: self.filesystem.pipe_file(manifest, parcel.content))
        # That the store does not create an object twice is what keeps a version from being replaced: it must show it.
        with contextlib.suppress(FileExistsError):
            self._try(lambda: self.filesystem.pipe_file(manifest, parcel.content, mode="create"))
            raise RegistryError(
                f"{self.url}: this store creates an object that is there already (it ignores If-None-Match), so that a push "
                f"could replace a published version; push to a store that refuses it"
            )
        taken = f"{self.url}: {release} was published by somebody else meanwhile"
        pointer = canonical({"content": key, "digest": parcel.manifest.identity, "release": release})
        try:
            self._try(lambda: self.filesystem.pipe_file(self._at(f"{VERSIONS}/{release}"), pointer, mode="create"))
        except FileExistsError as error:
            raise TakenError(taken) from error
        if self._small(f"{VERSIONS}/{release}", POINTER_BYTES) != pointer:
            raise TakenError(taken)

    def alias(self, name: str, version: Version) -> None:
        content = f"{version.release}\n".encode()
        self._try(lambda: self.filesystem.pipe_file(self._at(f"{ALIASES}/{name}"), content))

    def pull(self, version: Version, folder: Path) -> None:
        where = f"{self.url}@{version.release}"
        pointer = self._pointer(version.release)
        if pointer is None or pointer["digest"] != version.digest:
            raise RegistryError(f"{where}: changed while it was fetched; do not use it")
        place = f"{OBJECTS}/{pointer['content']}"

        def small(name: str) -> bytes | None:
            content = self._small(f"{place}/{name}", SMALL_BYTES)
            return None if content is None else bounded([content], f"{where}: {name}")

        @contextlib.contextmanager
        def read(file: File) -> Iterator[Iterator[bytes]]:
            yield self._chunks(f"{place}/{file.path}", f"{where}: {file.path}")

        receive(folder, where, version.digest, small, read, lambda work: retrying(work, self._give_up))

    def _put(self, source: Path, file: File, path: str) -> None:
        """Send a file, unless it is there whole. It is hashed as it is sent, and dropped when it is not the manifest's.

        Raises:
            ReleaseError: it is not what the manifest says.
        """
        if self._try(lambda: self._there(path, file)):
            return
        retrying(lambda: self._send(source, file, path), self._give_up)

    def _send(self, source: Path, file: File, path: str) -> None:
        named = {"Metadata": {"sha256": file.sha256}} if self.scheme in S3 else {}
        with self._telling():
            writer = self.filesystem.open(self._at(path), "wb", block_size=max(BLOCK, -(-file.size // MAX_PARTS)), **named)
        try:
            hasher = hashlib.sha256()
            for chunk in chunks_of(source / file.path):
                hasher.update(chunk)
                with self._telling():
                    writer.write(chunk)
            if hasher.hexdigest() != file.sha256:
                raise ReleaseError(f"{source}: {file.path} is not what the manifest says (sha256); do not use this release")
            with self._telling():
                writer.close()
        except BaseException:
            # What was sent of it is dropped where the store can be told so; else its own rules for what is unfinished do.
            with contextlib.suppress(Exception):
                writer.discard()
            writer.closed = True
            raise

    def _there(self, path: str, file: File) -> bool:
        """Whether an earlier push sent a file whole. A name and a size are not believed: S3 keeps the sha256 that we gave
        when the upload was complete, elsewhere the object is read and hashed again."""
        at = self._at(path)
        try:
            if self.scheme in S3:
                bucket, key, _ = self.filesystem.split_path(at)
                head = self.filesystem.call_s3("head_object", Bucket=bucket, Key=key)
                return bool(head["ContentLength"] == file.size and head["Metadata"].get("sha256") == file.sha256)
            if self.filesystem.info(at)["size"] != file.size:
                return False
        except FileNotFoundError:
            return False
        hasher = hashlib.sha256()
        for chunk in self._chunks(path, path):
            hasher.update(chunk)
        return hasher.hexdigest() == file.sha256

    def _chunks(self, path: str, where: str) -> Iterator[bytes]:
        """An object's content. Raises FaultError for what may pass."""
        with self._telling():
            try:
                stream = self.filesystem.open(self._at(path), "rb", cache_type="none")
            except FileNotFoundError:
                raise ReleaseError(f"{where} is missing; it is damaged, do not use it") from None
        with stream:
            while True:
                with self._telling():
                    chunk = stream.read(BLOCK)
                if not chunk:
                    return
                yield chunk

    def _pointer(self, release: str) -> dict[str, str] | None:
        """What names a version's content; None where there is no such version."""
        path = f"{VERSIONS}/{release}"
        content = self._small(path, POINTER_BYTES)
        if content is None:
            return None
        if (pointer := _read_pointer(content, release)) is None:
            raise RegistryError(f"{self.url}/{path}: is not what a push writes; the version is damaged, do not use it")
        return pointer

    def _version(self, release: str, aliases: Mapping[str, str | None]) -> Version | None:
        if (pointer := self._pointer(release)) is None:
            return None
        named = tuple(sorted(name for name, other in aliases.items() if other == release))
        return Version(release, pointer["digest"], named)

    def _aliases(self) -> dict[str, str | None]:
        """The aliases: name → version; None for what names none, which is in nobody's way but its own."""
        names = [name for name in self._names(ALIASES) if ALIAS.fullmatch(name)]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            contents = tuple(pool.map(lambda name: self._small(f"{ALIASES}/{name}", ALIAS_BYTES), names))
        return {name: read_alias(content) for name, content in zip(names, contents, strict=True) if content is not None}

    def _names(self, folder: str) -> tuple[str, ...]:
        try:
            found = self._try(lambda: self.filesystem.ls(self._at(folder), detail=False))
        except FileNotFoundError:
            return ()
        return tuple(name.rstrip("/").rpartition("/")[2] for name in found)

    def _small(self, path: str, limit: int) -> bytes | None:
        """The first bytes of an object, one more than `limit` at most; None where there is none."""
        try:
            return bytes(self._try(lambda: self.filesystem.cat_file(self._at(path), start=0, end=limit + 1)))
        except FileNotFoundError:
            return None
        except EOFError:
            return b""

    def _at(self, path: str) -> str:
        return f"{self.root}/{path}"

    def _try(self, work: Callable[[], T]) -> T:
        """Raises FileNotFoundError and FileExistsError besides RegistryError: what they mean is for the caller to say."""

        def once() -> T:
            with self._telling():
                return work()

        return retrying(once, self._give_up)

    def _give_up(self, fault: FaultError) -> RegistryError:
        return RegistryError(f"{self.url}: {fault}; tried again and again; see that the store can be reached")

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Turn what fsspec's implementations raise into faults that may pass, and errors in one line."""
        try:
            yield
        except (CompileError, FaultError):
            raise
        except Exception as error:
            status, code = _answer(error)
            if isinstance(error, FileExistsError) or status == 412:
                raise FileExistsError from error
            if status == 416:
                raise EOFError from error  # not even a first byte
            if code == "NoSuchBucket":
                raise RegistryError(f"{self.url}: there is no such bucket; make it, or correct the URL") from error
            if isinstance(error, FileNotFoundError):
                raise
            names = {kind.__name__ for kind in type(error).__mro__}
            if status in (401, 403) or isinstance(error, PermissionError) or any("Credential" in name for name in names):
                refused = f"refused ({code or status})" if status else "has no credentials to show"
                raise RegistryError(f"{self.url}: {refused}; set {_variables(self.scheme)}, of somebody who may") from error
            short = _short(error)
            if names & FAULTS or status in (408, 409, 425, 429) or (status or 0) >= 500:
                raise FaultError(f"{code or status}: {short}" if status else short) from error
            raise RegistryError(f"{self.url}: {short}") from error


def _read_pointer(content: bytes, release: str) -> dict[str, str] | None:
    """A version's object; None when it is not what a push writes."""
    try:
        pointer = json.loads(content)
        if pointer["release"] == release and all(
            re.fullmatch("[0-9a-f]{64}", pointer[name]) for name in ("content", "digest")
        ):
            return dict(pointer)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    return None


def _answer(error: BaseException) -> tuple[int | None, str]:
    """The HTTP status and the store's own code for an error, from wherever the implementation keeps it."""
    link: BaseException | None = error
    while link is not None:
        response = getattr(link, "response", None)
        if isinstance(response, dict):
            return response.get("ResponseMetadata", {}).get("HTTPStatusCode"), str(response.get("Error", {}).get("Code", ""))
        for holder in (link, response):
            for name in ("status_code", "status", "code"):
                if isinstance(status := getattr(holder, name, None), int):
                    return status, ""
        link = link.__cause__
    return None, ""


def _variables(scheme: str) -> str:
    return VARIABLES.get(scheme, f"what fsspec's {scheme} takes (FSSPEC_{scheme.upper()}_…)")


def _short(error: Exception) -> str:
    """What a library says, in one line, without what signs a URL or logs in by it: stores redirect to such addresses."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"\?\S+", "?…", re.sub(r"://[^/\s]*@", "://…@", text))
    return text if len(text) <= 200 else f"{text[:197]}..."
