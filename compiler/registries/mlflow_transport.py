"""What `compiler.registries.mlflow` reaches its files by: MLflow's client, its faults in our words, and artifacts as streams.

A tracking server's artifacts go through the server (`--serve-artifacts`, its default), at the address that the user gave and
nowhere else: what a server says of other places, a path on this machine or a redirect among them, is not followed. A folder's
artifacts are below it: what its database says of other places is not followed, nor is a link.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar
from urllib.parse import quote, unquote, urlsplit

from compiler.errors import CompileError, RegistryError, ReleaseError
from compiler.hashing import CHUNK, sync
from compiler.registries.transfer import FaultError, chunks_of, retrying
from compiler.types import File

T = TypeVar("T")

# MLflow's own answer to a fault is seven tries with pauses that come to minutes; ours (`retrying`) take their place.
SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
# What is not for the user's environment to change.
FIXED = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ALLOW_HTTP_REDIRECTS": "false"}
PROXY = "mlflow-artifacts"
ENDPOINT = "/api/2.0/mlflow-artifacts/artifacts"
LOGIN = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"


class MissingError(Exception):
    """There is no such artifact."""


class Outgoing:
    """A file on its way out: its length, and its content piece by piece, hashed as it goes.

    Raises:
        ReleaseError: it is not what the manifest says that it is, or cannot be read.
    """

    def __init__(self, path: Path, file: File) -> None:
        self.path = path
        self.file = file

    def __len__(self) -> int:
        return self.file.size

    def __iter__(self) -> Iterator[bytes]:
        hasher = hashlib.sha256()
        left = self.file.size
        try:
            for chunk in chunks_of(self.path):
                left -= len(chunk)
                hasher.update(chunk)
                if left < 0:
                    break
                yield chunk
        except OSError as error:
            raise ReleaseError(f"{self.path}: cannot be read ({error.strerror}); the release is damaged") from error
        if left or hasher.hexdigest() != self.file.sha256:
            raise ReleaseError(f"{self.path}: is not what the manifest says (sha256, size); build or fetch the release again")


class Artifacts(Protocol):
    """The artifacts below one place. Faults leave it as FaultError, refusals as RegistryError."""

    def put(self, path: str, content: bytes | Outgoing) -> None:
        """Write an artifact, which appears whole or not at all."""

    def get(self, path: str) -> contextlib.AbstractContextManager[Iterator[bytes]]:
        """Open an artifact. Raises MissingError when there is none."""


def imported(url: str, *, folder: bool) -> Any:
    """MLflow's client class, quiet, and phoning nobody. Raises RegistryError when it is not installed."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    os.environ.update(FIXED)
    try:
        from mlflow import MlflowClient

        if folder:
            import alembic  # noqa: F401
            import sqlalchemy  # noqa: F401
    except ImportError as error:
        raise RegistryError(f"{url}: needs {error.name}: pip install 'aot-model-compiler[mlflow]'") from error
    return MlflowClient


def client(tracking: str, url: str) -> Any:
    """MLflow's client, without its own retries.

    Raises:
        RegistryError: it is not installed, or cannot open its database.
    """
    made = imported(url, folder=tracking.startswith("sqlite:"))
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return call(lambda: made(tracking_uri=tracking, registry_uri=tracking), url)


def call(work: Callable[[], T], url: str) -> T:
    """What a call of the client returns, tried again while it fails for what may pass.

    Raises:
        RegistryError: it was refused, or the last try failed too.
    """

    def once() -> T:
        import requests
        from mlflow.exceptions import MlflowException

        try:
            return work()
        except MlflowException as error:
            raise told(error, url) from error
        except requests.HTTPError as error:  # how the client tells of an artifact's refusal
            status = 500 if error.response is None else error.response.status_code
            raise refusal(status, url) from error
        except Exception as error:
            if not type(error).__module__.startswith("sqlalchemy"):
                raise
            raise broken(error, url) from error

    return retrying(once, lambda fault: gave_up(fault, url))


def gave_up(fault: FaultError, url: str) -> RegistryError:
    """The last fault of several as an error."""
    hint = "see that the server runs there, then" if urlsplit(url).netloc else "see that nothing else holds it, then"
    return RegistryError(f"{url}: {fault}; {hint} try again")


def broken(error: Exception, url: str) -> RegistryError:
    """A database that cannot be used."""
    reason = next(iter(str(error).strip().splitlines()), "")[:200]
    return RegistryError(f"{url}: its database cannot be used ({reason}); restore it, or run mlflow db upgrade")


def absent(error: BaseException | None) -> bool:
    """Whether an error says that what was asked for is not there."""
    while error is not None:
        if getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST":
            return True
        error = error.__cause__
    return False


def exists(error: BaseException) -> bool:
    """Whether an error says that what was to be made is there already."""
    return getattr(error.__cause__, "error_code", None) == "RESOURCE_ALREADY_EXISTS"


def told(error: Any, url: str) -> Exception:
    """An MlflowException as a FaultError, when it may pass, or else as a RegistryError. What it says is shown only where it is
    the server's reason: it may quote whole pages."""
    status = error.get_http_status_code()
    # A request that never came to an answer has status 500 too, and the reason behind it.
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, CompileError):  # what was to be sent is at fault
            return cause
        if match := re.search(r"too many (\d{3}) error responses", str(cause)):
            return FaultError(f"answers {match[1]}")
        if type(cause).__module__.startswith(("requests", "urllib3")):
            return FaultError(f"cannot be reached ({_reason(cause)})")
        cause = cause.__cause__ or cause.__context__
    if status == 500 and not urlsplit(url).netloc:
        return broken(error, url)
    if match := re.search(r"failed with error code (3\d\d) ", str(error)):  # to which MLflow gives status 500
        return refusal(int(match[1]), url)
    return refusal(status, url, str(error))


def refusal(status: int, url: str, reason: str = "") -> Exception:
    """An answer's status as an error."""
    if status == 401:
        return RegistryError(f"{url}: the server does not know who asks (401); {LOGIN}")
    if status == 403:
        return RegistryError(f"{url}: the server does not allow it (403); ask whoever runs it for the right, or {LOGIN}")
    if 300 <= status < 400:
        return RegistryError(f"{url}: the server sends requests on to another address ({status}); give that one instead")
    if status == 404 and "RESOURCE_DOES_NOT_EXIST" not in reason:
        return RegistryError(f"{url}: what answers there is no MLflow server, or does not serve artifacts (404)")
    line = next(iter(reason.strip().splitlines()), "")[:200]
    # Two that note the same at once: the server looks, then inserts, and calls the slower one's a bad request.
    if status in (408, 429) or status >= 500 or (status == 400 and "UNIQUE constraint failed: tags." in reason):
        return FaultError(f"answers {status}" + (f" ({line})" if line else ""))
    return RegistryError(f"{url}: the server refuses ({status}{f': {line}' if line else ''})")


def _reason(error: BaseException) -> str:
    text = str(error)
    for sign, reason in (("refused", "connection refused"), ("timed out", "timed out"), ("resolve", "no such host")):
        if sign in text:
            return reason
    return "certificate not trusted" if "CERTIFICATE" in text else "connection broken"


@dataclass(frozen=True)
class Served:
    """Artifacts of a tracking server."""

    tracking: str
    url: str
    root: str

    def put(self, path: str, content: bytes | Outgoing) -> None:
        if isinstance(content, Outgoing) and not len(content):
            content = b"".join(content)  # a stream of no bytes would go without a length
        self._request("PUT", path, data=content).close()

    @contextlib.contextmanager
    def get(self, path: str) -> Iterator[Iterator[bytes]]:
        response = self._request("GET", path, stream=True)
        with contextlib.closing(response):
            yield _read(response)

    def _request(self, method: str, path: str, **options: Any) -> Any:
        from mlflow.exceptions import MlflowException
        from mlflow.utils.credentials import get_default_host_creds
        from mlflow.utils.rest_utils import http_request

        credentials = get_default_host_creds(self.tracking)
        endpoint = f"{ENDPOINT}/{quote(f'{self.root}/{path}')}"
        headers = {"Content-Type": "application/octet-stream", "Accept-Encoding": "identity"}
        try:
            response = http_request(
                credentials, endpoint, method, max_retries=0, extra_headers=headers, allow_redirects=False, **options
            )
        except MlflowException as error:
            raise told(error, self.url) from error
        if response.status_code == 200:
            return response
        response.close()
        if method == "GET" and response.status_code == 404:
            raise MissingError(path)
        raise refusal(response.status_code, self.url)


def _read(response: Any) -> Iterator[bytes]:
    import requests

    try:
        yield from response.iter_content(CHUNK)
    except requests.RequestException as error:
        raise FaultError("the download broke off") from error


@dataclass(frozen=True)
class Local:
    """Artifacts in a folder, whose path leads through no link."""

    url: str
    root: Path

    def put(self, path: str, content: bytes | Outgoing) -> None:
        target = self.root / path
        aside = target.with_name(f".{target.name}.part")
        if os.path.realpath(target.parent) != str(target.parent):
            raise RegistryError(f"{self.url}: {target.parent} is a link, or leads through one; remove it and push again")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            aside.unlink(missing_ok=True)
            with open(aside, "xb") as writer:  # which follows no link
                for chunk in [content] if isinstance(content, bytes) else content:
                    writer.write(chunk)
                sync(writer)
            os.replace(aside, target)
        except OSError as error:
            raise RegistryError(
                f"{self.url}: {target}: cannot be written ({error.strerror}); mend that and push again"
            ) from error
        finally:
            with contextlib.suppress(OSError):
                os.unlink(aside)

    @contextlib.contextmanager
    def get(self, path: str) -> Iterator[Iterator[bytes]]:
        from compiler.registries.filesystem import _open  # who reads any folder that others may have written to

        if not os.path.lexists(self.root / path):
            raise MissingError(path)
        with contextlib.ExitStack() as stack:
            with self._telling(path):
                stream = stack.enter_context(_open(self.root, path, self.url))
            yield self._read(stream, path)

    def _read(self, stream: BinaryIO, path: str) -> Iterator[bytes]:
        while True:
            with self._telling(path):
                chunk = stream.read(CHUNK)
            if not chunk:
                return
            yield chunk

    @contextlib.contextmanager
    def _telling(self, path: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RegistryError(f"{self.url}: {self.root / path}: cannot be read ({error.strerror})") from error


def artifacts(tracking: str, url: str, uri: str, below: Path | None) -> Artifacts:
    """The artifacts at a place that MLflow names.

    Args:
        below: where a folder's artifacts are; None for a server's.

    Raises:
        RegistryError: they are not where a user of this URL may look.
    """
    parts = urlsplit(uri)
    if below is None:
        if parts.scheme != PROXY:
            raise RegistryError(
                f"{url}: keeps its artifacts at {parts.scheme or 'a path'}:, past the server; run it with --serve-artifacts "
                f"and without --default-artifact-root"
            )
        return Served(tracking, url, unquote(parts.path).strip("/"))
    if parts.scheme not in ("", "file"):
        raise RegistryError(
            f"{url}: its artifacts are behind a server ({parts.scheme}:); give that server's mlflow://host:port"
        )
    named, allowed = unquote(parts.path) if parts.scheme else uri, os.path.realpath(below)
    place = "" if "\0" in named else os.path.realpath(named)
    if not place.startswith(f"{allowed}{os.sep}"):
        shown = (place or named)[:200]
        raise RegistryError(
            f"{url}: its database has artifacts at {shown!r}, outside of the folder; if that was moved, move it back, or put "
            f"a link to it where it was"
        )
    return Local(url, Path(place))
