"""Logins of OCI registries: docker's configuration, credential helpers, Basic and tokens on the real server; and that no
secret is told to anybody but the registry."""

from __future__ import annotations

import base64
import http.server
import json
import logging
import stat
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
import requests

from compiler import registries
from compiler.errors import RegistryError
from compiler.registries import transfer
from compiler.registries.oci_login import Credentials, Login, credentials, parse_challenge
from compiler.stages.publish import pull, push
from tests.debian import MISSING, program
from tests.registries.conftest import make_release
from tests.registries.proxy import ALWAYS, Fault, Proxy
from tests.registries.servers import DockerRegistry

needs_server = pytest.mark.skipif(program("docker-registry") is None, reason=MISSING.format("docker-registry"))

USER, PASSWORD = "engineer", "correct-horse-battery"
# htpasswd -nbB engineer correct-horse-battery
HTPASSWD = "engineer:$2b$04$abcdefghijklmnopqrstuupOWRSKKNe562z1DsLEArFuJDHVyRIMa"


@pytest.fixture(autouse=True)
def docker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Docker's configuration, of the test's own."""
    monkeypatch.setattr(transfer, "DELAYS", (0.02, 0.05))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    (tmp_path / "docker").mkdir()
    return tmp_path / "docker" / "config.json"


def log_in(docker: Path, host: str, password: str = PASSWORD) -> None:
    auth = base64.b64encode(f"{USER}:{password}".encode()).decode()
    docker.write_text(json.dumps({"auths": {host: {"auth": auth}}}), encoding="utf-8")


def helper(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, script: str) -> None:
    """A credential helper on the PATH."""
    (folder / "bin").mkdir(exist_ok=True)
    path = folder / "bin" / f"docker-credential-{name}"
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:/usr/bin:/bin")


def refusal(work: Any) -> str:
    with pytest.raises(RegistryError) as caught:
        work()
    text = str(caught.value)
    assert "\n" not in text and PASSWORD not in text and "d3Jvbmc" not in text and "wrong-horse" not in text
    return text


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DockerRegistry]:
    """A registry that wants a login."""
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "htpasswd").write_text(f"{HTPASSWD}\n", encoding="utf-8")
    with DockerRegistry(folder, {"auth": {"htpasswd": {"realm": "models", "path": str(folder / "htpasswd")}}}) as server:
        yield server


@needs_server
def test_a_registry_that_wants_a_login_gets_it(
    tmp_path: Path, docker: Path, guarded: DockerRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    make_release(tmp_path / "release")
    url = f"oci://{guarded.host}/basic"
    assert f"a login is needed: docker login {guarded.host}" in refusal(lambda: push(tmp_path / "release", url))
    log_in(docker, guarded.host, "wrong-horse")
    assert "the login is refused" in refusal(lambda: push(tmp_path / "release", url))
    log_in(docker, f"https://{guarded.host}/v2/")
    assert push(tmp_path / "release", url, ("latest",)).made
    pull(url, tmp_path / "back")
    secrets = (PASSWORD, "wrong-horse", base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode())
    assert not any(secret in caplog.text for secret in secrets)
    written = "".join(path.read_text(errors="ignore") for path in (tmp_path / "back").rglob("*") if path.is_file())
    assert not any(secret in written for secret in secrets)


@needs_server
def test_credential_helpers_are_asked(
    tmp_path: Path, docker: Path, guarded: DockerRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_release(tmp_path / "release")
    url = f"oci://{guarded.host}/helper"
    answer = json.dumps({"ServerURL": guarded.host, "Username": USER, "Secret": PASSWORD})
    helper(tmp_path, monkeypatch, "safe", f'[ "$1" = get ] && [ "$(cat)" = "{guarded.host}" ] && echo \'{answer}\'')
    docker.write_text(json.dumps({"credHelpers": {guarded.host: "safe"}, "credsStore": "other"}), encoding="utf-8")
    assert push(tmp_path / "release", url).made
    docker.write_text(json.dumps({"credsStore": "safe"}), encoding="utf-8")
    assert not push(tmp_path / "release", url).made


def test_what_docker_configured_and_is_broken_is_one_line(
    tmp_path: Path, docker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert credentials("here:1") is None
    docker.write_text("{", encoding="utf-8")
    assert "is not JSON; log in again: docker login here:1" in refusal(lambda: credentials("here:1"))
    docker.write_text("[]", encoding="utf-8")
    assert "not docker's configuration" in refusal(lambda: credentials("here:1"))
    for auth in ("d3Jvbmc", base64.b64encode(b"no colon").decode(), "\x00"):
        docker.write_text(json.dumps({"auths": {"here:1": {"auth": auth}}}), encoding="utf-8")
        assert "is no login" in refusal(lambda: credentials("here:1"))
    docker.write_text(json.dumps({"credsStore": "gone"}), encoding="utf-8")
    assert "docker-credential-gone" in refusal(lambda: credentials("here:1"))
    docker.write_text(json.dumps({"credsStore": "../../evil"}), encoding="utf-8")
    assert "as a credential helper" in refusal(lambda: credentials("here:1"))
    docker.write_text(json.dumps({"credsStore": "broken"}), encoding="utf-8")
    for script in (f"echo {PASSWORD}", f"echo {PASSWORD} >&2; exit 1", "echo '{}'", "echo '[]'"):
        helper(tmp_path, monkeypatch, "broken", script)
        assert "docker-credential-broken: gave no login for here:1" in refusal(lambda: credentials("here:1"))


def test_what_docker_configured_is_found(tmp_path: Path, docker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    auth = base64.b64encode(b"user:pass:word").decode()
    entries = {"https://index.docker.io/v1/": {"auth": auth}, "here:1": {"identitytoken": "token"}, "empty:1": {}}
    docker.write_text(json.dumps({"auths": {**entries, "plain:1": {"username": "u", "password": "p"}}}), encoding="utf-8")
    assert credentials("docker.io") == Credentials("user", "pass:word")
    assert credentials("here:1") == Credentials("<token>", "token")
    assert credentials("plain:1") == Credentials("u", "p")
    assert credentials("empty:1") is None and credentials("other:1") is None
    assert "pass" not in repr(credentials("docker.io"))
    helper(tmp_path, monkeypatch, "store", "echo 'credentials not found in native keychain'; exit 1")
    docker.write_text(json.dumps({"credsStore": "store", "auths": {"here:1": {"auth": auth}}}), encoding="utf-8")
    assert credentials("other:1") is None and credentials("here:1") == Credentials("user", "pass:word")


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ('Bearer realm="https://a/t",service="s",scope="repository:m:pull,push"',
         ("bearer", {"realm": "https://a/t", "service": "s", "scope": "repository:m:pull,push"})),
        ('Basic realm="models", Bearer realm="https://a/t"', ("bearer", {"realm": "https://a/t"})),
        ("Basic realm=models", ("basic", {"realm": "models"})),
        ('BASIC realm="a, Bearer realm=b"', ("basic", {"realm": "a, Bearer realm=b"})),
        ("Negotiate", ("", {})),
        ("", ("", {})),
        ("Basic", ("basic", {})),
        ('Negotiate a/b==, Bearer realm = "https://a/t?a=b", x-e="1", service=""',
         ("bearer", {"realm": "https://a/t?a=b", "x-e": "1", "service": ""})),
        ('Bearer realm="https://a/t", scope="never ends', ("bearer", {"realm": "https://a/t"})),
    ],
)  # fmt: skip
def test_challenges_are_understood(header: str, expected: tuple[str, dict[str, str]]) -> None:
    assert parse_challenge(header) == expected


@pytest.mark.parametrize("piece", ["a", " ", "a ", '"', 'a="', "a= ", "=", ",", "a b,"])
def test_a_long_challenge_is_read_in_a_moment(piece: str) -> None:
    """As long as Python's HTTP client takes a header: 64 KiB, in which a square would be a minute."""
    started = time.monotonic()
    parse_challenge(f"Bearer {piece * (65000 // len(piece))}!")
    assert time.monotonic() - started < 1


class Listener:
    """An HTTP server that keeps the headers and the form of what it is asked, and answers what it is told."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, dict[str, str], dict[str, str]]] = []
        self.answer: Any = lambda query, headers: (404, b"")
        listener = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                form = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
                query = dict(parse_qsl(form if self.command == "POST" else urlsplit(self.path).query))
                listener.seen.append((self.command, self.path, dict(self.headers), query))
                status, body = listener.answer(query, self.headers)
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET  # noqa: N815

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def listener() -> Iterator[Listener]:
    found = Listener()
    yield found
    found.close()


@needs_server
@pytest.mark.parametrize("status", [302, 307])
def test_a_redirect_to_another_host_gets_no_login(
    tmp_path: Path, docker: Path, guarded: DockerRegistry, listener: Listener, status: int
) -> None:
    make_release(tmp_path / "release", {"onnx/model.onnx": b"weights"})
    with Proxy(guarded.url) as proxy:
        host = proxy.url.removeprefix("http://")
        log_in(docker, host)
        url = f"oci://{host}/redirect"
        push(tmp_path / "release", url)
        by_digest = {path.name: path for path in (guarded.storage / "docker/registry/v2/blobs/sha256").glob("*/*")}
        listener.answer = lambda query, headers: (200, (by_digest[query["blob"]] / "data").read_bytes())
        for digest in by_digest:
            place = (("Location", f"{listener.url}/storage?signature=s3cr3t&blob={digest}"),)
            proxy.inject(Fault(status=status, headers=place, method="GET", path=f"/blobs/sha256:{digest}", times=ALWAYS))
        pull(f"{url}@1.0.0", tmp_path / "back")
        assert len(listener.seen) >= 3
        assert all("Authorization" not in headers for _, _, headers, _ in listener.seen)
        listener.answer = lambda query, headers: (403, b"")
        text = refusal(lambda: pull(f"{url}@1.0.0", tmp_path / "again"))
        assert "the storage that it redirects to refused" in text and "s3cr3t" not in text
        proxy.heal()
        proxy.inject(Fault(status=status, headers=(("Location", "/v2/"),), method="GET", times=ALWAYS))
        assert "in circles" in refusal(lambda: pull(f"{url}@1.0.0", tmp_path / "again"))
        proxy.heal()
        proxy.inject(
            Fault(status=status, headers=(("Location", "ftp://a/b"),), method="GET", path="/manifests/", times=ALWAYS)
        )
        assert "without encryption" in refusal(lambda: pull(f"{url}@1.0.0", tmp_path / "again"))


@needs_server
def test_a_realm_without_encryption_elsewhere_gets_no_login(tmp_path: Path, docker: Path, guarded: DockerRegistry) -> None:
    with Proxy(guarded.url) as proxy:
        host = proxy.url.removeprefix("http://")
        log_in(docker, host)
        challenge = (("WWW-Authenticate", 'Bearer realm="http://tokens.example/t",service="s"'),)
        proxy.inject(Fault(status=401, headers=challenge, path="/manifests/", times=ALWAYS))
        assert "sent to tokens.example without encryption" in refusal(lambda: pull(f"oci://{host}/m@1.0.0", tmp_path / "back"))


class Authority:
    """A key and its certificate, and tokens signed with it as docker's registry wants them."""

    def __init__(self, folder: Path) -> None:
        import ipaddress

        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import rsa

        self.key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
        now = datetime.now(UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(self.key.public_key())
            .serial_number(1)
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
            .sign(self.key, hashes.SHA256())
        )
        encoding = serialization.Encoding
        self.x5c = base64.b64encode(certificate.public_bytes(encoding.DER)).decode()
        self.certificate, self.private = folder / "certificate.pem", folder / "key.pem"
        self.certificate.write_bytes(certificate.public_bytes(encoding.PEM))
        self.private.write_bytes(
            self.key.private_bytes(encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        )

    def token(self, scopes: list[str], seconds: int = 60) -> str:
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import padding

        access = [
            {"type": kind, "name": name, "actions": actions.split(",")}
            for kind, name, actions in (scope.split(":") for scope in scopes)
        ]
        now = int(time.time())
        claims = {"iss": "tests", "sub": USER, "aud": "models", "iat": now, "nbf": now - 60, "exp": now + seconds, "jti": "1"}
        parts = ({"typ": "JWT", "alg": "RS256", "x5c": [self.x5c]}, {**claims, "access": access})

        def encoded(value: bytes) -> str:
            return base64.urlsafe_b64encode(value).decode().rstrip("=")

        signed = ".".join(encoded(json.dumps(part).encode()) for part in parts)
        return f"{signed}.{encoded(self.key.sign(signed.encode(), padding.PKCS1v15(), hashes.SHA256()))}"


@needs_server
@pytest.mark.parametrize("kind", ["password", "identity token"])
def test_tokens_are_asked_for_and_renewed(
    tmp_path: Path, docker: Path, listener: Listener, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The registry hands every challenge to a token server, whose tokens it checks."""
    caplog.set_level(logging.DEBUG)
    authority = Authority(tmp_path)
    make_release(tmp_path / "release")
    lifetimes = iter([-100, 60, -100, *([60] * 100)])
    allowed = {"pull", "push"}

    def answer(query: dict[str, str], headers: Any) -> tuple[int, bytes]:
        known = query.get("refresh_token") == PASSWORD
        known = known or headers.get("Authorization") == Credentials(USER, PASSWORD).basic
        if not known:
            return 401, b"{}"
        repository, _, actions = query["scope"].split(" ")[-1].rpartition(":")
        scope = f"{repository}:{','.join(sorted(set(actions.split(',')) & allowed))}"
        name = "access_token" if "refresh_token" in query else "token"
        return 200, json.dumps({name: authority.token([scope], next(lifetimes))}).encode()

    listener.answer = answer
    token = {"realm": f"{listener.url}/token", "service": "models", "issuer": "tests"}
    config = {"auth": {"token": {**token, "rootcertbundle": str(authority.certificate)}}}
    with DockerRegistry(tmp_path / "registry", config) as server:
        url = f"oci://{server.host}/tokens"
        assert "gave no token (status 401)" in refusal(lambda: push(tmp_path / "release", url))
        if kind == "password":
            log_in(docker, server.host)
        else:
            docker.write_text(json.dumps({"auths": {server.host: {"identitytoken": PASSWORD}}}), encoding="utf-8")
        # The first token and the third have run out when they are used.
        assert push(tmp_path / "release", url, ("latest",)).made
        pull(url, tmp_path / "back")
        assert next(lifetimes) == 60 and len(listener.seen) >= 4
        allowed.remove("push")
        make_release(tmp_path / "next", release="1.1.0")
        assert "lacks the right" in refusal(lambda: push(tmp_path / "next", url))
        assert registries.connect(url).resolve("1.1.0") is None
    assert PASSWORD not in caplog.text and authority.x5c not in caplog.text


@needs_server
def test_tokens_of_a_server_that_has_a_fault(
    tmp_path: Path, docker: Path, listener: Listener, guarded: DockerRegistry
) -> None:
    with Proxy(guarded.url) as proxy:
        host = proxy.url.removeprefix("http://")
        challenge = (("WWW-Authenticate", f'Bearer realm="{listener.url}/token"'),)
        proxy.inject(Fault(status=401, headers=challenge, path="/manifests/", times=ALWAYS))
        for status, body, words in (
            (500, b"", "answered 500"),
            (200, b"[]", "no token"),
            (200, b"{}", "no token"),
            (302, b"", "no token"),
        ):
            listener.answer = lambda query, headers, status=status, body=body: (status, body)
            assert words in refusal(lambda: pull(f"oci://{host}/m@1.0.0", tmp_path / "back"))
        listener.close()
        assert "does not answer" in refusal(lambda: pull(f"oci://{host}/m@1.0.0", tmp_path / "back"))


@needs_server
def test_a_registry_on_this_machine_may_speak_https(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = Authority(tmp_path)
    make_release(tmp_path / "release")
    tls = {"certificate": str(authority.certificate), "key": str(authority.private)}
    with DockerRegistry(tmp_path / "registry", tls=tls) as server:
        url = f"oci://{server.host}/tls"
        monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
        monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
        assert "certificate is not trusted" in refusal(lambda: push(tmp_path / "release", url))
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(authority.certificate))
        assert push(tmp_path / "release", url).made
        pull(f"{url}:1.0.0", tmp_path / "back")


def test_of_many_threads_that_are_refused_one_logs_in(docker: Path) -> None:
    log_in(docker, "here:1")
    login = Login("here:1", requests.Session())
    assert login.answer("Basic realm=models", None)
    header = login.header
    log_in(docker, "here:1", "another")
    assert login.answer("Basic realm=models", None) and login.header == header
    assert login.answer("Basic realm=models", header) and login.header != header


def test_netrc_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listener: Listener) -> None:
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1 login {USER} password {PASSWORD}\n", encoding="utf-8")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    refusal(lambda: pull(f"oci://{urlsplit(listener.url).netloc}/m@1.0.0", tmp_path / "back"))
    assert listener.seen and all("Authorization" not in headers for _, _, headers, _ in listener.seen)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("oci://", "not oci://host"),
        ("oci:///name", "not oci://host"),
        ("oci://host", "no repository's name"),
        ("oci://host:port/name", "is no port"),
        ("oci://user@host/name", "holds a user's name"),
        ("oci://host/name?query", "has no ? or #"),
        ("oci://host/Name", "lower-case"),
        ("oci://host/a//b", "no repository's name"),
        ("oci://host/../b", "no repository's name"),
        ("oci://host/name:1.0.0", "leave the tag out"),
        ("oci://host/" + "a" * 256, "no repository's name"),
    ],
)
def test_a_url_that_names_no_repository_is_one_line(url: str, words: str) -> None:
    assert words in refusal(lambda: registries.connect(url))


@pytest.mark.parametrize(
    ("url", "place", "reference"),
    [
        ("oci://host/name", "oci://host/name", "latest"),
        ("oci://host:5000/name", "oci://host:5000/name", "latest"),
        ("oci://host:5000/name:1.0.0", "oci://host:5000/name", "1.0.0"),
        ("oci://host:5000/name@prod", "oci://host:5000/name", "prod"),
        ("oci://[::1]:5000/a/b:prod", "oci://[::1]:5000/a/b", "prod"),
        ("oci://[::1]/a/b", "oci://[::1]/a/b", "latest"),
        ("oci://host:5000", "oci://host:5000", "latest"),
        ("oci://host/name@sha256:" + "0" * 64, "oci://host/name", "sha256:" + "0" * 64),
        ("s3://bucket/a:b", "s3://bucket/a:b", "latest"),
    ],
)
def test_a_reference_follows_an_at_or_a_colon(url: str, place: str, reference: str) -> None:
    assert registries.parse(url) == (place, reference)


def test_a_reference_that_is_none_is_refused() -> None:
    for url in ("oci://host/name:", "oci://host/name:a b", "oci://host/name:sha256:0", "oci://host/a:5000/name:1"):
        with pytest.raises(RegistryError):
            registries.connect(registries.parse(url)[0])
