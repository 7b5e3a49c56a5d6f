"""Logins of OCI registries: docker's own configuration and credential helpers, and the token handshake.

A login goes to the registry or, where the registry asks for a token, to the server that it names for that: any that speaks
https, as docker does it, and one that does not only on this machine. Whoever logs in to a registry trusts it that far. No
credential leaves this module but in a request to one of the two, and none is in what it raises.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import json
import os
import re
import subprocess
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from compiler.errors import RegistryError
from compiler.registries.transfer import FaultError

if TYPE_CHECKING:
    import requests

# Docker's own hub is logged in to, and answers, under other names than the one it goes by.
HUB = "docker.io"
HUB_SERVER = "registry-1.docker.io"
HUB_KEY = "https://index.docker.io/v1/"
# A credential helper's name for "the secret is a token to get tokens with, there is no user".
TOKEN_USER = "<token>"  # noqa: S105
# A word with the value that it is given, or alone; or what stands between words. A match begins wherever the last one ended
# and gives nothing back, so that the time is linear in a header that a server may make long.
_CHALLENGE = re.compile(r'([^\s,="]++)(?:\s*+(=)\s*+(?:"([^"]*+)"|([^\s,"]++)))?+|"[^"]*+"?+|[\s,=]++')
HELPER_SECONDS = 60
TIMEOUT = (10, 60)


@dataclass(frozen=True)
class Credentials:
    """A user and a password, or `TOKEN_USER` and an identity token."""

    user: str
    secret: str = field(repr=False)

    @property
    def basic(self) -> str:
        return "Basic " + base64.b64encode(f"{self.user}:{self.secret}".encode()).decode()


def loopback(host: str) -> bool:
    """Whether a host, without its port, is this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def credentials(host: str) -> Credentials | None:
    """What `docker login HOST` left: in a credential helper's keeping, or in docker's config.json.

    Args:
        host: the registry's, with its port where the URL has one.

    Raises:
        RegistryError: config.json or the helper's answer cannot be read.
    """
    path = Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker") / "config.json"
    again = f"log in again: docker login {host}"
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RegistryError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError):
        raise RegistryError(f"{path}: is not JSON; {again}") from None
    if not isinstance(config, dict):
        raise RegistryError(f"{path}: is not docker's configuration; {again}")
    keys = (
        (HUB_KEY, HUB, HUB_SERVER) if host == HUB else (host, f"https://{host}", f"https://{host}/v1/", f"https://{host}/v2/")
    )
    helpers, auths = (found if isinstance(found := config.get(name), dict) else {} for name in ("credHelpers", "auths"))
    helper = next((helpers[key] for key in keys if key in helpers), config.get("credsStore"))
    if helper and (found := _ask(str(helper), keys[0])):
        return found
    entry = next((auths[key] for key in keys if isinstance(auths.get(key), dict)), None)
    return _stored(entry, f"{path}: what it has for {host} is no login; {again}") if entry else None


def _stored(entry: Mapping[str, Any], problem: str) -> Credentials | None:
    if entry.get("identitytoken"):
        return Credentials(TOKEN_USER, str(entry["identitytoken"]))
    if not entry.get("auth"):
        user, secret = entry.get("username"), entry.get("password")
        return Credentials(str(user), str(secret)) if user and secret else None
    try:
        user, colon, secret = base64.b64decode(str(entry["auth"]), validate=True).decode().partition(":")
    except (binascii.Error, ValueError):
        raise RegistryError(problem) from None
    if not colon:
        raise RegistryError(problem)
    return Credentials(user, secret.rstrip("\0"))


def _ask(helper: str, server: str) -> Credentials | None:
    """What a credential helper keeps for a server; None where it has nothing."""
    program = f"docker-credential-{helper}"
    if not re.fullmatch(r"[A-Za-z0-9._-]+", helper):
        raise RegistryError(f"docker's configuration names {helper!r} as a credential helper; correct it")
    try:
        run = subprocess.run([program, "get"], input=server.encode(), capture_output=True, timeout=HELPER_SECONDS, check=False)
    except FileNotFoundError:
        raise RegistryError(f"{program}: docker's configuration names it and it is not on the PATH; install it") from None
    except (OSError, subprocess.TimeoutExpired):
        raise RegistryError(f"{program}: could not be run, or did not answer; docker's configuration names it") from None
    # The protocol has no code for it: a helper that has nothing fails with these words.
    if run.returncode and b"credentials not found" in run.stdout + run.stderr:
        return None
    try:
        answer = json.loads(run.stdout)
        found = Credentials(answer["Username"], answer["Secret"])
    except (ValueError, KeyError, TypeError):
        found = None
    if run.returncode or found is None:
        raise RegistryError(
            f"{program}: gave no login for {server} (exit {run.returncode}); log in again: docker login {server}"
        )
    return found if found.secret else None


class Login:
    """The `Authorization` header of one registry, got by answering its challenges. Safe to share between threads."""

    def __init__(self, host: str, session: requests.Session) -> None:
        self.host = host
        self._session = session
        self._lock = threading.Lock()
        self._header: str | None = None
        self._scopes: set[str] = set()

    @property
    def header(self) -> str | None:
        return self._header

    def answer(self, challenge: str, refused: str | None) -> bool:
        """Get a header that meets a 401's `WWW-Authenticate`; false when there is nothing to get it with.

        Args:
            refused: the header that the refused request had, so that of many threads only the first gets a new one.

        Raises:
            RegistryError: the login is refused, or its token would go where it can be read on the way.
            FaultError: the token's server has a fault that may pass.
        """
        with self._lock:
            if self._header != refused:
                return True
            scheme, parameters = parse_challenge(challenge)
            login = credentials(self.host)
            if scheme == "basic" and login is not None and login.basic != refused:
                self._header = login.basic
                return True
            if scheme == "bearer" and parameters.get("realm"):
                self._header = f"Bearer {self._token(parameters, login)}"
                return True
            return False

    def _token(self, parameters: Mapping[str, str], login: Credentials | None) -> str:
        import requests

        realm = parameters["realm"]
        server = urlsplit(realm)
        if server.scheme != "https" and not (server.scheme == "http" and loopback(server.hostname or "")):
            raise RegistryError(f"{self.host}: wants its login sent to {server.netloc} without encryption; refused")
        self._scopes |= set(filter(None, [parameters.get("scope")]))
        values: list[tuple[str, str]] = [("scope", scope) for scope in sorted(self._scopes)]
        if "service" in parameters:
            values.append(("service", parameters["service"]))
        try:
            if login is not None and login.user == TOKEN_USER:
                form = [("scope", " ".join(sorted(self._scopes))), *(pair for pair in values if pair[0] != "scope")]
                form += [("grant_type", "refresh_token"), ("refresh_token", login.secret), ("client_id", "aot-model-compiler")]
                response = self._session.post(realm, data=form, timeout=TIMEOUT, allow_redirects=False)
            else:
                headers = {} if login is None else {"Authorization": login.basic}
                response = self._session.get(realm, params=values, headers=headers, timeout=TIMEOUT, allow_redirects=False)
        except requests.RequestException:
            raise FaultError(f"{server.netloc}, which gives out its tokens, does not answer") from None
        if response.status_code in (408, 429) or response.status_code >= 500:
            raise FaultError(f"{server.netloc}, which gives out its tokens, answered {response.status_code}")
        if response.status_code == 200:
            try:
                answer = response.json()
                if token := answer.get("token") or answer.get("access_token"):
                    return str(token)
            except (ValueError, AttributeError):
                pass
        raise RegistryError(
            f"{self.host}: {server.netloc} gave no token (status {response.status_code}); log in: docker login {self.host}"
        )


def parse_challenge(header: str) -> tuple[str, dict[str, str]]:
    """The scheme (bearer rather than basic, where both are offered) and the parameters of a `WWW-Authenticate`."""
    found: dict[str, dict[str, str]] = {}
    scheme = ""
    for word, equals, quoted, plain in _CHALLENGE.findall(header):
        if word and not equals:
            scheme = word.lower()
            found.setdefault(scheme, {})
        elif word and scheme:
            found[scheme][word.lower()] = quoted or plain
    for scheme in ("bearer", "basic"):
        if scheme in found:
            return scheme, found[scheme]
    return "", {}
