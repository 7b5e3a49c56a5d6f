"""The distribution specification of OCI over HTTP: manifests, tags and blobs of one repository, streamed.

Only `requests` speaks to the network. A login goes to the registry itself and, as docker does it, to the server that the
registry names for tokens, whosever that is (`oci_login`); to nobody that either redirects to. Words of the network's errors
are our own, since those of the libraries hold addresses, and those of storage hold signatures.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import io
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from compiler.errors import RegistryError
from compiler.hashing import CHUNK
from compiler.registries.modelpack import MANIFEST_BYTES, OCI_MANIFEST
from compiler.registries.oci_login import HUB, HUB_SERVER, Login, loopback
from compiler.registries.transfer import FaultError

if TYPE_CHECKING:
    import requests

# Blobs that are sent, and requests for manifests, side by side.
THREADS = 4
# Seconds to connect, and between two pieces of an answer. A registry may move a blob of gigabytes before it answers.
CONNECT_SECONDS, READ_SECONDS, UPLOAD_SECONDS = 10, 60, 600
REDIRECTS = 5
# Tags asked for at a time; a registry may give fewer, and says where the others are.
TAGS = 1000
# What `list` asks of an index may be any kind of manifest: what is there is named, not taken for missing.
ACCEPT = ", ".join(
    (
        OCI_MANIFEST,
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
    )
)


class RefusedError(RegistryError):
    """The registry understood a request and will not do it; trying again does not help."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Upload(io.FileIO):
    """A file that is being sent; reading it fails once `stop` is set, so that a push which failed ends at once."""

    def __init__(self, path: Path, stop: threading.Event) -> None:
        super().__init__(path)
        self._stop = stop

    def read(self, size: int | None = -1, /) -> bytes:
        if self._stop.is_set():
            raise FaultError("stopped")
        try:
            return super().read(size) or b""
        except OSError as error:
            raise RegistryError(f"{self.name}: cannot be read ({error.strerror}); push it again") from error


class Client:
    """One repository of a registry. Methods raise FaultError for what may pass and RegistryError for what does not."""

    def __init__(self, url: str, host: str, name: str) -> None:
        self.url = url
        self.host = host
        self.name = name
        self._loopback = loopback(urlsplit(f"//{host}").hostname or "")

    @functools.cached_property
    def _session(self) -> requests.Session:
        from http.cookiejar import DefaultCookiePolicy

        import requests
        from requests.adapters import HTTPAdapter

        class Adapter(HTTPAdapter):
            def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
                # urllib3 sends a file 16 KiB at a time unless told otherwise.
                super().init_poolmanager(*arguments, **options, blocksize=CHUNK)

        session = requests.Session()
        for scheme in ("http://", "https://"):
            session.mount(scheme, Adapter(pool_maxsize=2 * THREADS))
        session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        # A login comes from docker's configuration: .netrc must not put another in its place.
        session.auth = lambda request: request
        session.headers["Accept-Encoding"] = "identity"
        session.headers["User-Agent"] = "aot-model-compiler"
        return session

    @functools.cached_property
    def _login(self) -> Login:
        return Login(self.host, self._session)

    @functools.cached_property
    def _base(self) -> str:
        """Where the API is. This machine's registries speak http, unless they answer that they speak https."""
        server = HUB_SERVER if self.host == HUB else self.host
        scheme = "https"
        if self._loopback:
            response = self._exchange("GET", f"http://{server}/v2/", {}, b"", READ_SECONDS)
            with response:
                scheme = "https" if response.status_code == 400 and b"HTTPS" in response.raw.read(1000) else "http"
        return f"{scheme}://{server}/v2/{self.name}/"

    def manifest(self, reference: str) -> bytes | None:
        """A manifest by tag or digest; None where there is none."""
        with self._send("GET", f"manifests/{reference}", {"Accept": ACCEPT}, allowed=(404,)) as response:
            if response.status_code == 404:
                return None
            content = self._content(response, MANIFEST_BYTES)
        if content is None:
            raise RegistryError(f"{self.url}: the manifest of {reference} is larger than any of a release; do not use it")
        return content

    def put_manifest(self, tag: str, content: bytes) -> None:
        """Make a tag name a manifest: in one step, and only when every blob that it names is there."""
        with self._send("PUT", f"manifests/{tag}", {"Content-Type": OCI_MANIFEST}, body=content):
            pass

    def tags(self) -> list[str]:
        """Every tag; none where there is no such repository yet."""
        found: list[str] = []
        url = urljoin(self._base, f"tags/list?n={TAGS}")
        seen = {url}
        while True:
            with self._send("GET", url, allowed=(404,)) as response:
                if response.status_code == 404:
                    return found
                content = self._content(response, MANIFEST_BYTES)
                link = response.links.get("next", {}).get("url")
            try:
                names = json.loads(content or b"")["tags"] or []
                found += [str(name) for name in names]
            except (ValueError, KeyError, TypeError):
                raise RegistryError(f"{self.url}: what answers there is no OCI registry; check the URL") from None
            if not link or (url := urljoin(url, link)) in seen:
                return found
            seen.add(url)

    def blob_size(self, digest: str) -> int | None:
        """The size of a blob that is there already, -1 where the registry does not say; None where it is not there."""
        with self._send("HEAD", f"blobs/{digest}", allowed=(404,)) as response:
            length = response.headers.get("Content-Length", "")
            return None if response.status_code == 404 else int(length) if length.isdecimal() else -1

    def put_blob(self, digest: str, body: bytes | Callable[[], Upload]) -> None:
        """Send a blob, in one request; a body that is a file is opened anew whenever it has to be sent anew."""
        with self._send("POST", "blobs/uploads/") as response:
            place = self._follow(response, "an upload")
        place += ("&" if urlsplit(place).query else "?") + f"digest={digest}"
        headers = {"Content-Type": "application/octet-stream"}
        with self._send("PUT", place, headers, body=body, seconds=UPLOAD_SECONDS):
            pass

    def blob(self, digest: str, offset: int = 0) -> requests.Response:
        """A blob as a response to stream from, from a byte on; the caller closes it. Status 200, 206, 404 or 416."""
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        return self._send("GET", f"blobs/{digest}", headers, allowed=(404, 416))

    def stream(self, response: requests.Response) -> Iterator[bytes]:
        """What a response holds, a piece at a time. Raises FaultError where it breaks off."""
        import requests
        import urllib3

        try:
            yield from response.iter_content(CHUNK)
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            raise FaultError(f"{self.host} broke a download off") from error

    def _content(self, response: requests.Response, limit: int) -> bytes | None:
        """What a response holds; None when that is more than `limit` bytes."""
        content = b""
        for chunk in self.stream(response):
            content += chunk
            if len(content) > limit:
                return None
        return content

    def _send(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str] | None = None,
        *,
        body: bytes | Callable[[], Upload] = b"",
        allowed: tuple[int, ...] = (),
        seconds: float = READ_SECONDS,
    ) -> requests.Response:
        """The answer to a request, after its challenges and redirects; its body is not read."""
        url = urljoin(self._base, path)
        challenged = 0
        for _ in range(REDIRECTS + 2):
            ours = _origin(url) == _origin(self._base)
            login = self._login.header if ours else None
            sent = {**(headers or {}), **({"Authorization": login} if login else {})}
            response = self._exchange(method, url, sent, body, seconds)
            status = response.status_code
            if status < 300:
                return response
            # The body of an answer that is an error is read, so that the connection is of use again.
            if response.headers.get("Content-Length", "").isdecimal() and int(response.headers["Content-Length"]) < CHUNK:
                with contextlib.suppress(FaultError):
                    collections.deque(self.stream(response), maxlen=0)
            if status in allowed:
                return response
            with response:
                # A token may have run out, and may then turn out to lack a right: two challenges are met.
                if status == 401 and ours and challenged < 2:
                    challenged += 1
                    if self._login.answer(response.headers.get("WWW-Authenticate", ""), login):
                        continue
                if method in ("GET", "HEAD") and status in (301, 302, 303, 307, 308):
                    url = self._follow(response, "a download")
                    continue
                raise self._refusal(response, ours, login is not None)
        raise RegistryError(f"{self.url}: redirects in circles; check the URL")

    def _follow(self, response: requests.Response, what: str) -> str:
        """Where an answer sends us on to."""
        if not response.headers.get("Location"):
            raise RegistryError(f"{self.url}: sends {what} on to nowhere; what answers there is no OCI registry")
        place = urljoin(response.url, response.headers["Location"])
        if urlsplit(place).scheme not in ("https", urlsplit(self._base).scheme):
            raise RegistryError(f"{self.url}: sends {what} on to a place without encryption; refused")
        return place

    def _refusal(self, response: requests.Response, ours: bool, logged_in: bool) -> Exception:
        status = response.status_code
        if status in (408, 429) or status >= 500:
            return FaultError(f"{self.host} answered {status}")
        if ours and status == 401:
            if logged_in:
                reason = f"the login is refused, or lacks the right; log in again: docker login {self.host}"
            else:
                reason = f"a login is needed: docker login {self.host}"
        elif ours and status == 403:
            reason = f"forbidden to this login (status 403); ask for the right, or log in as another: docker login {self.host}"
        elif ours and status == 404:
            reason = "the registry does not know this repository; create it there first, or log in as one who may"
        else:
            place = self.host if ours else "the storage that it redirects to"
            reason = f"{place} refused a {response.request.method} (status {status})"
        return RefusedError(f"{self.url}: {reason}", status)

    def _exchange(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | Callable[[], Upload], seconds: float
    ) -> requests.Response:
        import requests

        data = body() if callable(body) else body
        server = urlsplit(url).netloc
        # As docker does: no proxy stands between this machine and itself.
        direct = {"no_proxy": "*"} if loopback(urlsplit(url).hostname or "") else None
        try:
            return self._session.request(
                method,
                url,
                proxies=direct,
                headers=dict(headers),
                data=data,
                stream=True,
                allow_redirects=False,
                timeout=(CONNECT_SECONDS, seconds),
            )
        except requests.exceptions.SSLError as error:
            raise RegistryError(
                f"{self.url}: {server}'s certificate is not trusted; have REQUESTS_CA_BUNDLE name its authority"
            ) from error
        except requests.Timeout as error:
            raise FaultError(f"{server} does not answer in time") from error
        except requests.exceptions.InvalidURL as error:
            raise RegistryError(f"{self.url}: {server!r} is no host; check the URL") from error
        except (requests.RequestException, OSError) as error:
            text = str(error)
            if "refused" in text:
                raise FaultError(f"{server} refuses connections") from error
            if "resolve" in text or "getaddrinfo" in text:
                raise FaultError(f"{server} is not known to the network") from error
            raise FaultError(f"{server} broke the connection off") from error
        finally:
            if isinstance(data, Upload):
                data.close()


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc.lower()
