"""Registries: where releases are published to and fetched from, a module each behind one protocol, chosen by URL.

A registry's URL names the place of one model. A release's version is its name there and never changes; an alias such as
`latest` or `prod` is a name that moves. A reference is a version, an alias, or `sha256:` and a manifest's digest, after an
`@` at the end of the URL: `file:///srv/models/minilm@1.0.0`, `oci://registry.example/models/minilm@prod`.
"""

from __future__ import annotations

import importlib
import posixpath
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import SplitResult, unquote, urlsplit

from compiler.config import SEMVER
from compiler.errors import RegistryError
from compiler.manifest import Manifest
from compiler.types import File

ALIAS = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,63}")
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
LATEST = "latest"
# An alias' file holds one version; what is longer is none.
ALIAS_BYTES = 256


@dataclass(frozen=True)
class Version:
    """A published release: its version, its manifest's digest (hex), and the aliases that name it now."""

    release: str
    digest: str
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Parcel:
    """A release on disk, verified, ready to be sent. `files` are all of its files but manifest.json, each hashed."""

    path: Path
    manifest: Manifest
    content: bytes
    files: tuple[File, ...]


class Registry(Protocol):
    """One model's place in a registry. Every method raises RegistryError, in one line, and nothing else.

    A published version is whole from the moment that it resolves; until then nothing of a push can be seen by `resolve`
    and `list`. Network faults are tried again (`compiler.registries.transfer.retrying`) before they are an error.

    One with a true attribute `hashes` hashes every file as it sends it, and publishes nothing when one is not what the
    manifest says (a ReleaseError). One with a true attribute `checks` leaves that to its server, whose refusal is a
    ReleaseError: what was hashed in this process before is not hashed again. For the others a release's files are hashed
    right before they are sent. One with a method
    `check_alias(name)` raises RegistryError there for what cannot be an alias in it, before anything is sent. One with a
    method `show(path)` has its page show the newest version, when that is the release at `path`; it is called at the end of
    every push, once the aliases are where they belong. One with a method `check_same(version)` raises RegistryError when a
    version that is there, with the release's content, is not what the URL's option asks for.
    """

    @property
    def url(self) -> str: ...

    def list(self) -> tuple[Version, ...]:
        """Every published version, oldest version first; empty where nothing is published yet."""

    def resolve(self, reference: str) -> Version | None:
        """The version that a release's name, an alias or a digest names; None where there is none."""

    def model(self) -> str | None:
        """The name of the model that the newest version is of, by few requests; None where nothing is published yet, or where
        what is there does not say: a version that is damaged is in no other's way."""

    def push(self, parcel: Parcel) -> None:
        """Publish a release whose version does not resolve yet. What an interrupted push sent is not sent again.

        Raises:
            TakenError: another push of that version came first.
        """

    def alias(self, name: str, version: Version) -> None:
        """Make `name` name a published version, in one step."""

    def pull(self, version: Version, folder: Path) -> None:
        """Write a published release into an empty folder, by `compiler.registries.transfer.receive`."""


class TakenError(RegistryError):
    """The version was published by somebody else meanwhile."""


# Which module serves a URL's scheme; every other scheme is for fsspec. A module has `connect(url) -> Registry`, and
# `ready(url)` where its `connect` does not find out all that a push needs, such as a package.
REGISTRIES = {"file": "filesystem", "oci": "oci", "mlflow": "mlflow", "mlflow+http": "mlflow", "hf": "hub"}
OTHERS = "objects"
# What may stand after the '?' of a URL, as true or false.
OPTIONS = {"mlflow": "pyfunc", "mlflow+http": "pyfunc", "hf": "private"}
SCHEMES = "file://, s3://, oci://, mlflow:// or hf://"


def connect(url: str) -> Registry:
    """The registry that serves a URL without a reference.

    Raises:
        RegistryError: it is no URL, names a scheme that nothing serves, or holds a login.
    """
    registry: Registry = _module(url).connect(_trim(url))
    return registry


def ready(url: str) -> Registry:
    """As `connect`, once it is seen, without a request, that a release can be published at a URL: all that this needs is
    installed, and the registry takes releases. Raises RegistryError when not."""
    # First: nobody need install a package to be told that this does not help.
    if (check := getattr(_module(url), "ready", None)) is not None:
        check(_trim(url))
    return connect(url)


def _trim(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    return f"{scheme}{separator}{rest.rstrip('/')}"


def _module(url: str) -> Any:
    return importlib.import_module(f"{__name__}.{REGISTRIES.get(_split(url).scheme, OTHERS)}")


def parse(url: str) -> tuple[str, str]:
    """A URL with its reference taken off, and the reference; `latest` where it has none. In oci:// it may follow a colon too.

    Raises:
        RegistryError: as `connect`, or the reference is no version, alias or digest.
    """
    parts = _split(url)
    at = url.rfind("@", url.rfind("/"))
    if at < 0 and parts.scheme == "oci":
        # As users of containers write it. A repository's name has no colon; a port stands before its first slash.
        at = url.rfind(":", url.rfind("/")) if "/" in parts.path else -1
    if at < 0 or at < len(parts.scheme) + 3:
        return url, LATEST
    place, reference = url[:at], url[at + 1 :]
    check_reference(reference, url)
    return place, reference


def check_place(url: str) -> str:
    """A URL that names a model's place and nothing in it.

    Raises:
        RegistryError: as `connect`, or it has a reference.
    """
    scheme = _split(url).scheme
    if parse(url)[0] != url:
        raise RegistryError(f"{url}: names a version or an alias; leave out what follows the '@'")
    if scheme not in REGISTRIES:
        from fsspec.registry import known_implementations

        if scheme not in known_implementations:
            raise RegistryError(f"{url}: nothing serves {scheme}://; give {SCHEMES}")
    return url


def normal(url: str) -> str:
    """A text that two URLs share when they name one place in two ways; not for use as a URL."""
    parts = _split(url)
    if parts.scheme == "file":
        return "file:///" + posixpath.normpath(unquote(parts.path.removeprefix("localhost"))).lstrip("/")
    return f"{parts.scheme}://{parts.netloc.lower()}{parts.path.rstrip('/')}"


def check_reference(reference: str, url: str) -> None:
    """Raises RegistryError when a text is no version, alias or digest."""
    if not (re.fullmatch(SEMVER, reference) or ALIAS.fullmatch(reference) or DIGEST.fullmatch(reference)):
        raise RegistryError(f"{url}: {reference!r} is no version (1.0.0), alias (prod) or digest (sha256:…); correct it")


def check_alias(name: str) -> None:
    """Raises RegistryError when a text cannot be an alias: it must not be taken for a version or a digest."""
    if not ALIAS.fullmatch(name):
        raise RegistryError(f"alias {name!r}: an alias starts with a letter and is letters, digits, '.', '_' and '-'")


def match(versions: Sequence[Version], reference: str) -> Version | None:
    """The version among `versions` that a reference names."""
    for version in versions:
        if reference in (version.release, f"sha256:{version.digest}", *version.aliases):
            return version
    return None


def newest(names: Iterable[str]) -> str | None:
    """The newest version among names, of which others may be none."""
    return max((name for name in names if re.fullmatch(SEMVER, name)), key=precedence, default=None)


def read_alias(content: bytes) -> str | None:
    """The version that an alias' file names; None when it names none: a damaged file is told of only to who asks for it."""
    release = content.decode("utf-8", "replace").strip()
    return release if re.fullmatch(SEMVER, release) else None


Aliases = Mapping[str, str | None]


def look_up(
    reference: str,
    url: str,
    every: Callable[[], Sequence[Version]],
    aliases: Callable[[], Aliases],
    one: Callable[[str, Aliases], Version | None],
) -> Version | None:
    """The version that a reference names, where an alias is a file of its own that names a version.

    Args:
        every: all versions; asked for when the reference is a digest.
        aliases: name → version; None for what is there and names none.
        one: a version by its name, with its aliases among those given.

    Raises:
        RegistryError: the reference is an alias that names no version, or one that is not there.
    """
    if DIGEST.fullmatch(reference):
        return match(every(), reference)
    known = aliases()
    release = known.get(reference, reference)
    if release is None:
        move = f"compile alias {url}@1.0.0 {reference}"
        raise RegistryError(f"{url}: alias {reference}: cannot be read, or names no version; move it again: {move}")
    version = one(release, known) if re.fullmatch(SEMVER, release) else None
    if version is None and release != reference:
        raise RegistryError(f"{url}: {reference} names {release}, which is not there; move it, or push {release}")
    return version


def precedence(release: str) -> tuple[Any, ...]:
    """A key that sorts semantic versions, oldest first: numbers by value, a pre-release before its release."""
    core, _, pre = release.partition("-")
    parts = [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in pre.split(".")] if pre else []
    return (*(int(number) for number in core.split(".")), not pre, parts)


def _split(url: str) -> SplitResult:
    """The parts of a URL that may be shown: one with a login, or with what may be one, is refused and not repeated."""
    scheme, found, rest = url.partition("://")
    if not found or not re.fullmatch("[A-Za-z][A-Za-z0-9+.-]*", scheme):
        raise RegistryError(f"{'…' if re.search('[@?#]', url) else url}: no registry's URL; give {SCHEMES}")
    hidden = f"{scheme}://…"
    if re.search(r"[\x00-\x1f\x7f]|%[01][0-9a-f]|%7f", rest, re.IGNORECASE):
        raise RegistryError(f"{hidden}: holds a control character; leave it out")
    if scheme == "file":
        return SplitResult(scheme, "", rest, "", "")
    if scheme not in REGISTRIES and (whole := re.fullmatch(rf"([^/?#@:]+)@(?:{SEMVER}|{DIGEST.pattern})", rest)):
        return urlsplit(f"{scheme}://{whole[1]}")  # a bucket and a reference
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        # What stands where the port does may be a password with a slash in it.
        raise RegistryError(f"{hidden}: no registry's URL: what follows the host's ':' is no port") from None
    del port
    if "@" in parts.netloc or re.search("@.*/", rest):
        raise RegistryError(
            f"{hidden}: holds a user's name or a password before an '@'; leave it out, each registry's own variables or login "
            "file have it (and an alias follows the path)"
        )
    option = OPTIONS.get(parts.scheme)
    if parts.query and option and not re.fullmatch(rf"{option}=(true|false)(@[^@?#]*)?", parts.query):
        raise RegistryError(f"{hidden}: the only option after '?' is {option}=true or {option}=false")
    if (parts.query and not option) or parts.fragment:
        raise RegistryError(f"{hidden}: a registry's URL has no ? or #; leave it out")
    return parts
