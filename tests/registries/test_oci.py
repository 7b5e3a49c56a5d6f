"""oci:// against Debian's docker-registry: what is pushed comes back, is what other clients understand, never changes, and
is never half there, whatever breaks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from compiler.registries import transfer
from compiler.stages.publish import pull, push
from tests.registries.conftest import make_release
from tests.registries.proxy import Proxy
from tests.registries.servers import MISSING, DockerRegistry, program

pytestmark = pytest.mark.skipif(program("docker-registry") is None, reason=MISSING.format("docker-registry"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DockerRegistry]:
    with DockerRegistry(tmp_path_factory.mktemp("registry")) as registry:
        yield registry


@pytest.fixture
def proxy(server: DockerRegistry) -> Iterator[Proxy]:
    with Proxy(server.url) as proxy:
        yield proxy


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Short pauses between tries, and no login of whoever runs the tests."""
    monkeypatch.setattr(transfer, "DELAYS", (0.02, 0.05, 0.1, 0.2))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))


@pytest.fixture
def url(server: DockerRegistry, request: pytest.FixtureRequest) -> str:
    """A repository of a test's own."""
    name = hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:12]
    return f"oci://{server.host}/tests/{name}"


def through(proxy: Proxy, url: str) -> str:
    return "oci://" + proxy.url.removeprefix("http://") + url[url.index("/", len("oci://")) :]


def test_a_release_comes_back_by_version_alias_and_digest(tmp_path: Path, url: str) -> None:
    manifest = make_release(tmp_path / "release")
    published = push(tmp_path / "release", url, ("latest", "prod"))
    assert published.made and published.moved == ("latest", "prod")
    references = ("", "@1.0.0", ":1.0.0", "@prod", ":prod", f"@sha256:{manifest.identity}")
    for index, reference in enumerate(references):
        back, fetched = pull(url + reference, tmp_path / f"back{index}")
        assert fetched and back == manifest
        assert {
            path.relative_to(tmp_path / f"back{index}").as_posix(): path.read_bytes()
            for path in (tmp_path / f"back{index}").rglob("*")
            if path.is_file()
        } == {
            path.relative_to(tmp_path / "release").as_posix(): path.read_bytes()
            for path in (tmp_path / "release").rglob("*")
            if path.is_file()
        }


def test_pushing_again_changes_nothing_and_sends_nothing(tmp_path: Path, url: str, proxy: Proxy) -> None:
    make_release(tmp_path / "release")
    assert push(tmp_path / "release", through(proxy, url), ("latest",)).made
    proxy.heal()
    again = push(tmp_path / "release", through(proxy, url), ("latest",))
    assert not again.made and again.moved == ()
    assert {request.method for request in proxy.requests} == {"GET"}
