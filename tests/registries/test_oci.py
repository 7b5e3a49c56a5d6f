"""oci:// against Debian's docker-registry: what is pushed comes back, is what other clients understand, never changes, and
is never half there, whatever breaks."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from compiler import registries, verify
from compiler.errors import CompileError, RegistryError, ReleaseError, StageError
from compiler.hashing import hash_files
from compiler.registries import modelpack, oci, oci_client, transfer
from compiler.registries.oci_client import Client, Upload
from compiler.stages.publish import pull, push
from compiler.types import File
from tests import debian
from tests.debian import MISSING, program
from tests.registries.conftest import FILES, make_release, signed_round_trip
from tests.registries.proxy import ALWAYS, Fault, Proxy
from tests.registries.servers import DockerRegistry

pytestmark = pytest.mark.skipif(program("docker-registry") is None, reason=MISSING.format("docker-registry"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DockerRegistry]:
    with DockerRegistry(tmp_path_factory.mktemp("registry")) as registry:
        yield registry


@pytest.fixture
def own(tmp_path: Path) -> Iterator[DockerRegistry]:
    """A server that a test may kill, or damage."""
    with DockerRegistry(tmp_path / "registry") as registry:
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
    return f"oci://{server.host}/{repository(request)}"


@pytest.fixture
def via(proxy: Proxy, request: pytest.FixtureRequest) -> str:
    """The same repository, through the proxy."""
    return f"oci://{proxy.url.removeprefix('http://')}/{repository(request)}"


def repository(request: pytest.FixtureRequest) -> str:
    return "tests/" + hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:12]


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a release."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def noise(size: int) -> bytes:
    return hashlib.shake_128(b"noise").digest(size)


def big_release(folder: Path) -> None:
    """A release with files of 6, 4 and 2 MiB, which take several reads to send."""
    make_release(folder, {**FILES, **{f"onnx/{size}.onnx": noise(size << 20) for size in (2, 4, 6)}})


def failure(kind: type[CompileError], work: Callable[[], object]) -> str:
    """The one line of an expected failure."""
    with pytest.raises(kind) as caught:
        work()
    text = str(caught.value)
    assert text and "\n" not in text and len(text) < 400
    return text


def refused_pull(url: str, folder: Path, kind: type[CompileError] = ReleaseError) -> str:
    """The one line of a pull that must fail, and leave nothing."""
    folder.mkdir()
    text = failure(kind, lambda: pull(url, folder / "deeper" / "back"))
    assert not [path for path in folder.rglob("*") if path.is_file()]
    return text


def test_a_release_comes_back_by_version_alias_and_digest(tmp_path: Path, url: str) -> None:
    manifest = make_release(tmp_path / "release", {**FILES, "empty.txt": b"", "ü/ß.json": b"{}"})
    (tmp_path / "release" / "model.sig").write_bytes(b"signature")
    published = push(tmp_path / "release", url, ("latest", "prod"))
    assert published.made and published.moved == ("latest", "prod")
    references = ("", "@1.0.0", ":1.0.0", "@prod", ":prod", f"@sha256:{manifest.identity}")
    for index, reference in enumerate(references):
        back, fetched = pull(url + reference, tmp_path / f"back{index}")
        assert fetched and back == manifest
        assert content(tmp_path / f"back{index}") == content(tmp_path / "release")
    assert registries.connect(url).list() == (registries.Version("1.0.0", manifest.identity, ("latest", "prod")),)


def test_pushing_again_changes_nothing_and_sends_nothing(tmp_path: Path, url: str, via: str, proxy: Proxy) -> None:
    make_release(tmp_path / "release")
    assert push(tmp_path / "release", url, ("latest",)).made
    again = push(tmp_path / "release", via, ("latest",))
    assert not again.made and again.moved == ()
    assert {request.method for request in proxy.requests} == {"GET"}


def test_versions_come_in_their_order_with_aliases_that_move(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = ("0.9.0", "1.0.0-alpha", "1.0.0-alpha.2", "1.0.0-alpha.10", "1.0.0-alpha.beta", "1.0.0", "1.2.0", "1.10.0")
    for release in sorted(order):
        make_release(tmp_path / release, release=release)
        push(tmp_path / release, url, ("first",))
    push(tmp_path / "1.2.0", url, ("prod", "first"))
    found = registries.connect(url).list()
    assert tuple(version.release for version in found) == order
    assert {version.release: version.aliases for version in found if version.aliases} == {"1.2.0": ("first", "prod")}
    assert push(tmp_path / "1.10.0", url, ("prod",)).moved == ("prod",)
    resolved = registries.connect(url).resolve("prod")
    assert resolved is not None and (resolved.release, resolved.aliases) == ("1.10.0", ("prod",))
    assert registries.connect(url).resolve("2.0.0") is None
    assert registries.connect(url).resolve("sha256:" + "0" * 64) is None


def test_nothing_is_published_in_a_repository_that_is_not_there(url: str, tmp_path: Path) -> None:
    assert registries.connect(url).list() == ()
    assert "nothing is published there" in failure(RegistryError, lambda: pull(f"{url}@1.0.0", tmp_path / "back"))


def test_tags_come_a_page_at_a_time(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_release(tmp_path / "release")
    push(tmp_path / "release", url, ("a", "b", "c", "d"))
    # docker-registry gives as many as are asked for and a link to the next page.
    monkeypatch.setattr(oci_client, "TAGS", 2)
    assert registries.connect(url).list()[0].aliases == ("a", "b", "c", "d")


def test_other_content_under_a_published_version_is_refused(tmp_path: Path, url: str) -> None:
    first = make_release(tmp_path / "first")
    make_release(tmp_path / "second", {**FILES, "config.json": b"{}"})
    push(tmp_path / "first", url)
    text = failure(RegistryError, lambda: push(tmp_path / "second", url, ("latest",)))
    assert "1.0.0 is published already" in text
    assert registries.connect(url).list() == (registries.Version("1.0.0", first.identity),)


# What other clients see


def stored_manifest(server: DockerRegistry, url: str, reference: str = "1.0.0") -> tuple[dict[str, Any], bytes]:
    raw = Client(url, server.host, url.split("/", 3)[3]).manifest(reference)
    assert raw is not None
    return json.loads(raw), raw


def test_the_artifact_is_a_modelpack_of_raw_layers_and_always_the_same_bytes(
    tmp_path: Path, server: DockerRegistry, url: str
) -> None:
    files = {
        **FILES,
        "README.md": b"# tiny",
        "LICENSE": b"free",
        "onnx/export.json": b"{}",
        "model.py": b"pass",
        "bom.cdx.json": b"{}",
        "provenance.json": b"{}",
    }
    manifest = make_release(tmp_path / "release", files)
    push(tmp_path / "release", url, ("latest",))
    body, raw = stored_manifest(server, url)
    assert body["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    assert body["mediaType"] == "application/vnd.oci.image.manifest.v1+json" and body["schemaVersion"] == 2
    kinds = {}
    for layer in body["layers"]:
        path = layer["annotations"]["org.cncf.model.filepath"]
        kinds[path] = layer["mediaType"].removeprefix("application/vnd.cncf.model.").removesuffix(".v1.raw")
        stored = (tmp_path / "release" / path).read_bytes()
        assert layer["digest"] == f"sha256:{hashlib.sha256(stored).hexdigest()}" and layer["size"] == len(stored)
        assert server.blob(layer["digest"][7:]).read_bytes() == stored
        assert json.loads(layer["annotations"]["org.cncf.model.file.metadata+json"])["size"] == len(stored)
    assert kinds == {
        "manifest.json": "weight.config",
        "config.json": "weight.config",
        "tokenizer.json": "weight.config",
        "onnx/model.onnx": "weight",
        "onnx/export.json": "weight.config",
        "torchscript/model.pt": "weight",
        "validation.json": "doc",
        "README.md": "doc",
        "LICENSE": "doc",
        "bom.cdx.json": "doc",
        "provenance.json": "doc",
        "SHA256SUMS": "doc",
        "model.py": "code",
    }
    assert body["config"]["mediaType"] == "application/vnd.cncf.model.config.v1+json"
    config = json.loads(server.blob(body["config"]["digest"][7:]).read_bytes())
    assert config == {
        "descriptor": {"name": "tiny", "version": "1.0.0", "family": "bert", "licenses": ["apache-2.0"]},
        "config": {"architecture": "BertModel", "format": "onnx,torchscript", "precision": "fp32"},
        "modelfs": {"type": "layers", "diffIds": [layer["digest"] for layer in body["layers"]]},
    }
    assert f"sha256:{manifest.identity}" in body["annotations"].values()
    push(tmp_path / "release", f"{url}/elsewhere")
    assert stored_manifest(server, f"{url}/elsewhere")[1] == raw == stored_manifest(server, url, "latest")[1]


@pytest.mark.skipif(program("skopeo") is None, reason=MISSING.format("skopeo"))
def test_skopeo_reads_and_copies_what_was_pushed(tmp_path: Path, server: DockerRegistry, url: str) -> None:
    make_release(tmp_path / "release")
    push(tmp_path / "release", url, ("latest",))
    environment = {**debian.environment(), "HOME": str(tmp_path)}

    def skopeo(*arguments: str) -> bytes:
        command = [str(program("skopeo")), "--insecure-policy", *arguments]
        run = subprocess.run(command, env=environment, capture_output=True, check=False, timeout=60)
        assert run.returncode == 0, run.stderr.decode()
        return run.stdout

    image = f"docker://{server.host}/{url.split('/', 3)[3]}"
    assert skopeo("inspect", "--raw", "--tls-verify=false", f"{image}:latest") == stored_manifest(server, url)[1]
    assert set(json.loads(skopeo("list-tags", "--tls-verify=false", image))["Tags"]) == {"1.0.0", "latest"}
    skopeo("copy", "--src-tls-verify=false", f"{image}:1.0.0", f"dir:{tmp_path / 'copy'}")
    copied = {path.read_bytes() for path in (tmp_path / "copy").iterdir()}
    assert set(content(tmp_path / "release").values()) <= copied
    # And what skopeo put somewhere else is a release there.
    there = f"{server.host}/{url.split('/', 3)[3]}/mirror"
    skopeo("copy", "--dest-tls-verify=false", f"dir:{tmp_path / 'copy'}", f"docker://{there}:1.0.0")
    pull(f"oci://{there}:1.0.0", tmp_path / "back")
    assert content(tmp_path / "back") == content(tmp_path / "release")


# The network and the server


def test_a_refused_connection_is_tried_again_and_then_one_line(tmp_path: Path, own: DockerRegistry) -> None:
    make_release(tmp_path / "release")
    own.kill()
    assert "refuses connections" in failure(RegistryError, lambda: push(tmp_path / "release", f"oci://{own.host}/m"))
    waiting = threading.Timer(0.1, own.start)
    waiting.start()
    push(tmp_path / "release", f"oci://{own.host}/m")
    waiting.join()


def kill_at_read(monkeypatch: pytest.MonkeyPatch, server: DockerRegistry, number: int, then: Callable[[], object]) -> None:
    """Have the server killed when the sender reads a file for the n-th time."""
    reads = iter(range(1, 1000))
    read = Upload.read

    def counted(self: Upload, size: int | None = -1, /) -> bytes:
        if next(reads) == number:
            server.kill()
            then()
        return read(self, size)

    monkeypatch.setattr(Upload, "read", counted)


def test_a_server_killed_in_the_middle_of_a_push_holds_nothing_and_is_not_sent_again_what_it_has(
    tmp_path: Path, own: DockerRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    big_release(tmp_path / "release")
    monkeypatch.setattr(oci, "THREADS", 1)
    url = f"oci://{own.host}/m"
    with monkeypatch.context() as patch:
        # The file of 6 MiB goes first, in seven reads; then that of 4.
        kill_at_read(patch, own, 10, lambda: None)
        failure(RegistryError, lambda: push(tmp_path / "release", url, ("latest",)))
    own.start()
    assert registries.connect(url).list() == () and registries.connect(url).resolve("latest") is None
    with Proxy(own.url) as proxy:
        push(tmp_path / "release", f"oci://{proxy.url.removeprefix('http://')}/m", ("latest",))
        sent = sum(request.sent for request in proxy.requests)
    assert 6 << 20 < sent < 7 << 20  # the files of 4 and 2, not of 6
    pull(f"oci://{own.host}/m", tmp_path / "back")
    assert content(tmp_path / "back") == content(tmp_path / "release")


def test_a_push_survives_a_server_that_comes_back(
    tmp_path: Path, own: DockerRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    big_release(tmp_path / "release")
    kill_at_read(monkeypatch, own, 5, own.start)
    assert push(tmp_path / "release", f"oci://{own.host}/m", ("latest",)).made
    pull(f"oci://{own.host}/m", tmp_path / "back")
    assert content(tmp_path / "back") == content(tmp_path / "release")


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_server_killed_in_the_middle_of_a_pull(
    tmp_path: Path, own: DockerRegistry, monkeypatch: pytest.MonkeyPatch, comes_back: bool
) -> None:
    # Large enough not to fit in the sockets' buffers.
    make_release(tmp_path / "release", {**FILES, "onnx/big.onnx": noise(48 << 20)})
    stream = Client.stream
    killed: list[bool] = []

    def broken(self: Client, response: Any) -> Iterator[bytes]:
        for index, chunk in enumerate(stream(self, response)):
            yield chunk
            if index == 3 and not killed:
                killed.append(True)
                own.kill()
                if comes_back:
                    own.start()

    push(tmp_path / "release", f"oci://{own.host}/m")
    monkeypatch.setattr(Client, "stream", broken)
    with Proxy(own.url) as proxy:
        url = f"oci://{proxy.url.removeprefix('http://')}/m"
        if not comes_back:
            assert "m: 127.0.0.1" in refused_pull(f"{url}@1.0.0", tmp_path / "to", RegistryError)
            own.start()
        pull(f"{url}@1.0.0", tmp_path / "back")
        received = sum(request.received for request in proxy.requests)
    assert killed and content(tmp_path / "back") == content(tmp_path / "release")
    if comes_back:
        assert received < 60 << 20  # it went on from where it was


@pytest.mark.parametrize("lost", [False, True])
def test_any_one_request_of_a_push_and_of_a_pull_may_fail(tmp_path: Path, proxy: Proxy, via: str, lost: bool) -> None:
    make_release(tmp_path / "release", {"onnx/model.onnx": b"onnx"})
    fault = Fault(lost=True) if lost else Fault(status=500)
    number = 0
    while True:
        number += 1
        proxy.heal()
        proxy.inject(Fault(status=fault.status, lost=fault.lost, first=number))
        published = push(tmp_path / "release", f"{via}/{number}", ("latest",))
        assert published.made or lost  # an answer that was lost may be that of the last step
        sent = len(proxy.requests)
        proxy.heal()
        proxy.inject(Fault(status=fault.status, lost=fault.lost, first=number))
        pull(f"{via}/{number}", tmp_path / f"back{number}")
        assert content(tmp_path / f"back{number}") == content(tmp_path / "release")
        if number > max(sent, len(proxy.requests)):
            break
    assert number > 15


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault(status=500, times=ALWAYS), "answered 500"),
        (Fault(status=429, times=ALWAYS), "answered 429"),
        (Fault(status=403, times=ALWAYS, body=b"secret"), "forbidden"),
        (Fault(status=401, times=ALWAYS), "docker login"),
        (Fault(status=403, method="POST|PUT", times=ALWAYS), "forbidden"),
        (Fault(status=500, method="PUT", path="/manifests/", times=ALWAYS), "answered 500"),
        (Fault(status=405, method="POST", times=ALWAYS), "refused a POST (status 405)"),
        (Fault(status=404, method="POST", times=ALWAYS), "create it there first"),
        (Fault(status=202, headers=(("Location", "ftp://a/b"),), method="POST", times=ALWAYS), "sends an upload on"),
        (Fault(status=202, method="POST", times=ALWAYS), "on to nowhere"),
        (Fault(reset=100, method="PUT", path="/blobs/", times=ALWAYS), "broke the connection off"),
    ],
)
def test_a_push_that_cannot_be_ends_in_one_line_and_publishes_nothing(
    tmp_path: Path, proxy: Proxy, via: str, url: str, fault: Fault, words: str
) -> None:
    make_release(tmp_path / "release")
    proxy.inject(fault)
    text = failure(RegistryError, lambda: push(tmp_path / "release", via, ("latest",)))
    assert words in text and via in text and "secret" not in text
    assert registries.connect(url).list() == ()


def test_a_push_that_failed_sends_no_more(tmp_path: Path, proxy: Proxy, via: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_release(tmp_path / "release", {**FILES, "onnx/big.onnx": noise(40 << 20)})
    reads: list[float] = []
    read = Upload.read

    def slow(self: Upload, size: int | None = -1, /) -> bytes:
        reads.append(time.monotonic())
        time.sleep(0.02)
        return read(self, size)

    monkeypatch.setattr(Upload, "read", slow)
    proxy.inject(Fault(status=403, method="HEAD", first=3, times=ALWAYS))
    failure(RegistryError, lambda: push(tmp_path / "release", via))
    assert len(reads) < 30


@pytest.mark.parametrize("times", [1, ALWAYS])
def test_a_truncated_download_goes_on_where_it_broke_off(tmp_path: Path, proxy: Proxy, url: str, via: str, times: int) -> None:
    make_release(tmp_path / "release", {**FILES, "onnx/big.onnx": noise(5 << 20)})
    push(tmp_path / "release", url)
    # Every answer ends after two megabytes, and the next one starts there.
    proxy.inject(Fault(cut=2 << 20, method="GET", path="/blobs/", times=times))
    pull(f"{via}@1.0.0", tmp_path / "back")
    assert content(tmp_path / "back") == content(tmp_path / "release")
    assert sum(request.received for request in proxy.requests) < 8 << 20


def test_a_download_that_never_gets_anywhere_is_one_line(tmp_path: Path, proxy: Proxy, via: str) -> None:
    make_release(tmp_path / "release")
    push(tmp_path / "release", via)
    proxy.inject(Fault(cut=100, method="GET", path="/blobs/", times=ALWAYS))
    assert "broke a download off" in refused_pull(f"{via}@1.0.0", tmp_path / "to", RegistryError)


def test_a_bit_that_flips_on_the_way_is_found(tmp_path: Path, proxy: Proxy, via: str) -> None:
    make_release(tmp_path / "release", {"onnx/model.onnx": bytes(100_000)})
    push(tmp_path / "release", via)
    proxy.inject(Fault(corrupt=50_000, method="GET", path="/blobs/", times=ALWAYS))
    assert "onnx/model.onnx is not what the manifest says" in refused_pull(f"{via}@1.0.0", tmp_path / "to")


@pytest.mark.parametrize("damage", ["changed", "shorter", "longer", "gone"])
@pytest.mark.parametrize("path", ["onnx/model.onnx", "manifest.json", "SHA256SUMS"])
def test_a_blob_damaged_on_the_servers_disk_is_found(tmp_path: Path, own: DockerRegistry, damage: str, path: str) -> None:
    make_release(tmp_path / "release")
    url = f"oci://{own.host}/m"
    push(tmp_path / "release", url)
    stored = (tmp_path / "release" / path).read_bytes()
    blob = own.blob(hashlib.sha256(stored).hexdigest())
    assert blob.read_bytes() == stored
    if damage == "gone":
        blob.unlink()
    else:
        blob.write_bytes({"changed": b"x" + stored[1:], "shorter": stored[:-1], "longer": stored + b"x"}[damage])
    text = refused_pull(f"{url}@1.0.0", tmp_path / "to")
    assert path in text and "damaged" in text
    if damage == "shorter" and path == "onnx/model.onnx":
        # Another version that has the same file is not published with the damaged copy.
        make_release(tmp_path / "next", release="1.1.0")
        assert "storage is damaged" in failure(RegistryError, lambda: push(tmp_path / "next", url))
        assert registries.connect(url).resolve("1.1.0") is None


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounting a small tmpfs takes root on Linux")
def test_a_disk_that_fills_while_pulling_is_one_line_and_left_empty(tmp_path: Path, url: str) -> None:
    make_release(tmp_path / "release", {**FILES, "onnx/big.onnx": noise(1 << 20)})
    push(tmp_path / "release", url)
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    try:
        assert "no space is left" in failure(StageError, lambda: pull(f"{url}@1.0.0", small / "back"))
        assert not list(small.iterdir())
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_one_who_may_not_list_tags_may_pull(tmp_path: Path, url: str, via: str, proxy: Proxy) -> None:
    make_release(tmp_path / "release")
    push(tmp_path / "release", url, ("prod", "latest"))
    proxy.inject(Fault(status=403, path="/tags/list", times=ALWAYS))
    for reference in ("@1.0.0", "@prod"):
        pull(via + reference, tmp_path / f"back{reference}")
        assert content(tmp_path / f"back{reference}") == content(tmp_path / "release")
    assert registries.connect(via).resolve("prod").aliases == ("prod",)  # type: ignore[union-attr]
    assert "forbidden" in failure(RegistryError, lambda: registries.connect(via).list())


def test_a_file_that_changes_while_it_is_sent_is_refused(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_release(tmp_path / "release")
    read = Upload.read
    monkeypatch.setattr(Upload, "read", lambda self, size=-1, /: read(self, size).replace(b"onnx ", b"ONNX "))
    text = failure(ReleaseError, lambda: push(tmp_path / "release", url))
    assert "onnx/model.onnx was refused: it changed since it was hashed" in text
    assert registries.connect(url).list() == ()


def test_what_this_process_hashed_is_not_hashed_again(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a build: the registry holds what it gets against the sha256 that it is given."""
    manifest = make_release(tmp_path / "release")
    hashed: list[str] = []

    def counted(root: Path, paths: Collection[str]) -> tuple[File, ...]:
        hashed.extend(paths)
        return hash_files(root, paths)

    monkeypatch.setattr(verify, "hash_files", counted)
    file = tmp_path / "release" / "onnx/model.onnx"
    sound = file.read_bytes()
    file.write_bytes(sound[::-1])
    text = failure(ReleaseError, lambda: push(tmp_path / "release", url, verified=manifest))
    assert "onnx/model.onnx was refused" in text
    assert registries.connect(url).list() == ()
    file.write_bytes(sound)
    assert push(tmp_path / "release", url, verified=manifest).made
    assert hashed == []
    assert not push(tmp_path / "release", url).made
    assert "onnx/model.onnx" in hashed


# Two pushes at once


def push_both(monkeypatch: pytest.MonkeyPatch, url: str, folders: tuple[Path, Path], apart: float = 0.0) -> list[str]:
    """Push two releases at once, so that each looks for the tag before either has put it, the second of them so many
    seconds after the first; what became of each."""
    gate = threading.Barrier(2)
    put = Client.put_manifest
    late: set[int] = set()

    def together(self: Client, tag: str, body: bytes) -> None:
        if threading.get_ident() not in late:
            late.add(threading.get_ident())
            time.sleep(apart * gate.wait(timeout=20))
        put(self, tag, body)

    def attempt(folder: Path) -> str:
        try:
            return "made" if push(folder, url).made else "there"
        except RegistryError as error:
            return str(error)

    monkeypatch.setattr(Client, "put_manifest", together)
    with ThreadPoolExecutor(2) as pool:
        return sorted(pool.map(attempt, folders))


def test_of_two_pushes_at_once_with_other_content_one_is_published_and_the_other_told(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_release(tmp_path / "first")
    make_release(tmp_path / "second", {**FILES, "config.json": b"{}"})
    for number in range(3):
        with monkeypatch.context() as patch:
            made, told = push_both(patch, f"{url}/{number}", (tmp_path / "first", tmp_path / "second"))
        assert made == "made" and "1.0.0 is published already, with other content" in told
        pull(f"{url}/{number}@1.0.0", tmp_path / f"back{number}")
        assert content(tmp_path / f"back{number}") in (content(tmp_path / "first"), content(tmp_path / "second"))


def test_a_push_whose_tag_is_put_over_a_little_later_does_not_succeed(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_release(tmp_path / "first")
    make_release(tmp_path / "second", {**FILES, "config.json": b"{}"})
    monkeypatch.setattr(oci, "SETTLE_SECONDS", 1.0)
    made, told = push_both(monkeypatch, url, (tmp_path / "first", tmp_path / "second"), apart=0.2)
    assert made == "made" and "published already" in told


def test_two_pushes_at_once_of_the_same_content_both_succeed(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_release(tmp_path / "release")
    assert push_both(monkeypatch, url, (tmp_path / "release", tmp_path / "release")) == ["made", "made"]
    assert len(registries.connect(url).list()) == 1


@pytest.mark.parametrize("meanwhile", ["at the same time", "before"])
def test_of_a_signed_and_an_unsigned_push_of_one_release_only_one_says_that_it_published(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch, meanwhile: str
) -> None:
    make_release(tmp_path / "signed")
    make_release(tmp_path / "plain")
    (tmp_path / "signed" / "model.sig").write_bytes(b"signature")
    if meanwhile == "at the same time":
        monkeypatch.setattr(oci, "SETTLE_SECONDS", 0.5)
        assert push_both(monkeypatch, url, (tmp_path / "signed", tmp_path / "plain")) == ["made", "there"]
    else:
        put = Client.put_blob

        def slow(self: Client, digest: str, body: Any) -> None:
            monkeypatch.setattr(Client, "put_blob", put)
            push(tmp_path / "signed", url)
            put(self, digest, body)

        monkeypatch.setattr(Client, "put_blob", slow)
        assert not push(tmp_path / "plain", url).made
        pull(f"{url}@1.0.0", tmp_path / "back")
        assert content(tmp_path / "back") == content(tmp_path / "signed")


def test_a_push_looks_once_more_before_it_puts_its_tag(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_release(tmp_path / "first")
    make_release(tmp_path / "second", {**FILES, "config.json": b"{}"})
    put = Client.put_blob

    def slow(self: Client, digest: str, body: Any) -> None:
        monkeypatch.undo()
        push(tmp_path / "first", url)
        put(self, digest, body)

    monkeypatch.setattr(oci, "THREADS", 1)
    monkeypatch.setattr(Client, "put_blob", slow)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    text = failure(RegistryError, lambda: push(tmp_path / "second", url))
    assert "published already" in text


def test_a_registry_that_refuses_to_move_a_tag_is_understood(
    tmp_path: Path, via: str, url: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Registries with immutable tags answer so; docker-registry has none, so the proxy says it."""
    make_release(tmp_path / "first")
    make_release(tmp_path / "second", {**FILES, "config.json": b"{}"})
    put = Client.put_manifest

    def first_by_another(self: Client, tag: str, body: bytes) -> None:
        monkeypatch.setattr(Client, "put_manifest", put)
        push(tmp_path / "first", url)
        proxy.inject(Fault(status=409, method="PUT", path="/manifests/", times=ALWAYS))
        put(self, tag, body)

    monkeypatch.setattr(Client, "put_manifest", first_by_another)
    assert "published already" in failure(RegistryError, lambda: push(tmp_path / "second", via))


# Hostile and foreign manifests


Change = Callable[[dict[str, Any]], object]


def layer(path: str, blob: bytes = b"{}\n", **changes: Any) -> dict[str, Any]:
    digest = f"sha256:{hashlib.sha256(blob).hexdigest()}"
    found = {"mediaType": modelpack.DOC, "digest": digest, "size": len(blob), "annotations": {modelpack.FILE_PATH: path}}
    return {**found, **changes}


def of(body: dict[str, Any], path: str) -> dict[str, Any]:
    found: dict[str, Any] = next(each for each in body["layers"] if each["annotations"][modelpack.FILE_PATH] == path)
    return found


HOSTILE: dict[str, tuple[Change, str]] = {
    "a path that leads out": (lambda body: body["layers"].append(layer("../../evil")), "a layer '../../evil' that its"),
    "an absolute path": (lambda body: body["layers"].append(layer("/etc/evil")), "a layer '/etc/evil' that its"),
    "a path with a line break": (lambda body: body["layers"].append(layer("a\nb")), r"a layer 'a\nb' that its"),
    "a path twice": (lambda body: body["layers"].append(layer("config.json")), "names 'config.json' twice"),
    "manifest.json twice": (lambda body: body["layers"].append(layer("manifest.json")), "names 'manifest.json' twice"),
    "a layer too many": (lambda body: body["layers"].append(layer("evil.so")), "a layer 'evil.so' that its"),
    "a very long path": (lambda body: body["layers"].append(layer("x" * 100_000)), "that its manifest.json does not name"),
    "a layer that is missing": (lambda body: body["layers"].remove(of(body, "config.json")), "no layer for config.json"),
    "no manifest.json": (lambda body: body["layers"].remove(of(body, "manifest.json")), "has no manifest.json"),
    "a huge file": (lambda body: of(body, "config.json").update(size=1 << 60), "for config.json is not what"),
    "a huge manifest.json": (lambda body: of(body, "manifest.json").update(size=1 << 60), "claims 1152921504606846976 bytes"),
    "a size below nothing": (lambda body: of(body, "config.json").update(size=-1), "no raw file of a model"),
    "another file's blob": (
        lambda body: of(body, "config.json").update({key: of(body, "tokenizer.json")[key] for key in ("digest", "size")}),
        "for config.json is not what its manifest.json says",
    ),
    "a tar": (lambda body: of(body, "config.json").update(mediaType=f"{modelpack.WEIGHT[:-3]}tar"), "no raw file of a model"),
    "no path": (lambda body: of(body, "config.json").update(annotations={}), "no raw file of a model"),
    "a huge signature": (
        lambda body: body["layers"].append(layer("model.sig", size=1 << 40)),
        "model.sig claims 1099511627776",
    ),
}


def hostile(tmp_path: Path, url: str, change: Change) -> None:
    """Publish a release and change its manifest of OCI in place, as one who controls the registry can."""
    make_release(tmp_path / "release")
    push(tmp_path / "release", url)
    client = Client(url, url.split("/")[2], url.split("/", 3)[3])
    body = json.loads(client.manifest("1.0.0") or b"")
    change(body)
    client.put_manifest("1.0.0", json.dumps(body).encode())


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_manifest_is_one_line_and_nothing_is_written(tmp_path: Path, url: str, case: str) -> None:
    change, words = HOSTILE[case]
    hostile(tmp_path, url, change)
    assert words in refused_pull(f"{url}@1.0.0", tmp_path / "to")


def test_a_tag_that_names_another_version_is_refused(tmp_path: Path, url: str) -> None:
    hostile(tmp_path, url, lambda body: body["annotations"].update({modelpack.VERSION: "2.0.0"}))
    assert "names release 2.0.0" in failure(RegistryError, lambda: pull(f"{url}@1.0.0", tmp_path / "back"))


def test_a_label_that_lies_about_the_digest_is_found(tmp_path: Path, url: str) -> None:
    hostile(tmp_path, url, lambda body: body["annotations"].update({modelpack.DIGEST: f"sha256:{'0' * 64}"}))
    assert "another manifest than its name says" in refused_pull(f"{url}@1.0.0", tmp_path / "to")


IMAGE = {
    "schemaVersion": 2,
    "mediaType": modelpack.OCI_MANIFEST,
    "config": layer("", mediaType="application/vnd.oci.image.config.v1+json"),
    "layers": [],
}
INDEX = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": []}


@pytest.mark.parametrize(
    ("kind", "words"), [("image", "a container's image"), ("index", "an index of images"), ("model", "another tool packed")]
)
def test_what_is_no_release_is_named_and_left_alone(
    tmp_path: Path, server: DockerRegistry, url: str, kind: str, words: str
) -> None:
    make_release(tmp_path / "release")
    push(tmp_path / "release", url)
    client = Client(url, server.host, url.split("/", 3)[3])
    client.put_blob(layer("")["digest"], b"{}\n")
    body: dict[str, Any] = json.loads(client.manifest("1.0.0") or b"")
    del body["annotations"]
    found = {"image": IMAGE, "index": INDEX, "model": body}[kind]
    with client._send("PUT", "manifests/latest", {"Content-Type": str(found["mediaType"])}, body=json.dumps(found).encode()):
        pass
    assert words in failure(RegistryError, lambda: pull(f"{url}@latest", tmp_path / "back"))
    assert [version.aliases for version in registries.connect(url).list()] == [()]
    # An image's tag is not taken for an alias and moved.
    assert words in failure(RegistryError, lambda: push(tmp_path / "release", url, ("latest",)))
    with client._send("PUT", "manifests/1.1.0", {"Content-Type": str(found["mediaType"])}, body=json.dumps(found).encode()):
        pass
    make_release(tmp_path / "next", release="1.1.0")
    assert words in failure(RegistryError, lambda: push(tmp_path / "next", url))


def test_a_manifest_that_registries_do_not_take_is_refused_before_anything_is_sent(
    tmp_path: Path, via: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modelpack, "MANIFEST_BYTES", 1000)
    make_release(tmp_path / "release")
    assert "larger than registries take" in failure(RegistryError, lambda: push(tmp_path / "release", via))
    assert not proxy.count("POST|PUT")


def test_a_server_that_is_no_registry_is_named(tmp_path: Path, via: str, proxy: Proxy) -> None:
    proxy.inject(Fault(status=200, body=b"<html>", times=ALWAYS))
    assert "not JSON" in failure(RegistryError, lambda: pull(f"{via}@1.0.0", tmp_path / "back"))
    assert "no OCI registry" in failure(RegistryError, lambda: registries.connect(via).list())


def test_an_answer_without_end_is_not_read_to_its_end(tmp_path: Path, url: str, via: str, proxy: Proxy) -> None:
    make_release(tmp_path / "release")
    push(tmp_path / "release", url)
    proxy.inject(Fault(status=200, body=b" " * (modelpack.MANIFEST_BYTES + 1), path="/manifests/|/tags/", times=ALWAYS))
    assert "larger than any of a release" in failure(RegistryError, lambda: pull(f"{via}@1.0.0", tmp_path / "back"))
    assert "no OCI registry" in failure(RegistryError, lambda: registries.connect(via).list())


def test_a_signed_release(url: str, tmp_path: Path) -> None:
    signed_round_trip(url, tmp_path)
