"""mlflow:// against a real `mlflow server` on sqlite, which this module starts, and without a server in a folder."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from compiler import registries
from compiler.errors import CompileError, RegistryError, ReleaseError, StageError
from compiler.hashing import hash_folder
from compiler.manifest import MANIFEST, to_bytes
from compiler.registries import transfer
from compiler.registries.mlflow import Model
from compiler.stages import publish
from compiler.types import File
from tests.ports import free_port
from tests.registries.conftest import make_release, manifest_of, signed_round_trip
from tests.registries.proxy import ALWAYS, Fault, Proxy

BIG = "onnx/model.onnx"
FILES = {"config.json": b"{}\n", "empty": b"", "a b/ü+=%.txt": b"x", BIG: bytes(range(256)) * (3 << 13)}  # 6 MB
ARTIFACTS = "mlflow-artifacts/artifacts"


class Server:
    """`mlflow server` with its database and artifacts in a folder; it may be killed and started again on the same port."""

    def __init__(self, folder: Path, *options: str, environment: dict[str, str] | None = None) -> None:
        self.folder = folder
        self.options = options
        self.environment = environment or {}
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        options = {
            "--host": "127.0.0.1",
            "--port": str(self.port),
            "--workers": "1",
            "--backend-store-uri": f"sqlite:///{self.folder}/mlflow.db",
            "--artifacts-destination": str(self.folder / "a"),
        }
        given = [word for option in options.items() for word in option]
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *given, "--serve-artifacts", *self.options],
                env={**os.environ, **quiet, **self.environment},
                cwd=self.folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return
            except OSError:
                time.sleep(0.05)
        pytest.fail(f"mlflow server did not start: {(self.folder / 'log').read_text()[-2000:]}")

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, database: Path) -> Iterator[Server]:
    started = Server(tmp_path_factory.mktemp("server"))
    shutil.copy(database, started.folder)
    started.start()
    yield started
    started.kill()


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    with Proxy(server.url) as through:
        yield through


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A model of its own for every test."""
    return re.sub(r"[^\w-]+", ".", request.node.name).strip(".")


@pytest.fixture
def url(proxy: Proxy, name: str) -> str:
    """The model, through the proxy."""
    return f"{proxy.url.replace('http:', 'mlflow:')}/{name}"


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The first push into a folder, which makes its database, and a pull, in a process of their own."""
    folder = tmp_path_factory.mktemp("first")
    make_release(folder / "release", FILES)
    script = (
        "import sys; from pathlib import Path; from compiler.stages import publish; "
        "publish.push(Path(sys.argv[1]), sys.argv[2], ('latest',)); publish.pull(sys.argv[2], Path(sys.argv[3])); "
        "from mlflow.telemetry import get_telemetry_client; assert get_telemetry_client() is None"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, str(folder / "release"), f"mlflow://{folder}/store/first", str(folder / "pulled")],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    return folder, ran


@pytest.fixture(scope="module")
def database(first: tuple[Path, subprocess.CompletedProcess[str]]) -> Path:
    """A database, which takes MLflow seconds to make."""
    return first[0] / "store" / "mlflow.db"


@pytest.fixture(params=["server", "folder"])
def place(request: pytest.FixtureRequest, tmp_path: Path, name: str) -> str:
    if request.param == "server":
        return str(request.getfixturevalue("url"))
    (tmp_path / "store").mkdir()
    shutil.copy(request.getfixturevalue("database"), tmp_path / "store")
    return f"mlflow://{tmp_path}/store/{name}"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "DELAYS", (0.02, 0.04))


@pytest.fixture
def release(tmp_path: Path) -> Path:
    make_release(tmp_path / "release", FILES)
    return tmp_path / "release"


def one_line(caught: pytest.ExceptionInfo[CompileError]) -> str:
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 400, text
    return text


def client(url: str) -> Any:
    """MLflow's own client for the server, or folder, of a registry's URL."""
    registry = registries.connect(url)
    assert isinstance(registry, Model)
    return registry._client


def stored(server: Server, path: str) -> list[Path]:
    """A release's file as it lies on the server's disk, newest last."""
    found = [file for file in (server.folder / "a").rglob(Path(path).name) if file.as_posix().endswith(f"/release/{path}")]
    return sorted(found, key=lambda file: file.stat().st_mtime_ns)


def test_push_resolve_pull(place: str, release: Path, tmp_path: Path) -> None:
    registry = registries.connect(place)
    assert registry.list() == ()
    assert registry.resolve("latest") is None
    first = publish.push(release, place, ("latest", "prod", "v1", "a.b"))
    assert (first.made, first.moved, first.version.release) == (True, ("latest", "prod", "v1", "a.b"), "1.0.0")
    again = publish.push(release, place, ("latest", "prod"))
    assert (again.made, again.moved) == (False, ())
    later = make_release(tmp_path / "later", {"config.json": b"[]\n"}, release="1.1.0")
    publish.push(tmp_path / "later", place, ("latest",))
    assert [(found.release, found.aliases) for found in registry.list()] == [
        ("1.0.0", ("a.b", "prod", "v1")),
        ("1.1.0", ("latest",)),
    ]
    for reference in ("latest", "1.1.0", f"sha256:{later.identity}"):
        assert registry.resolve(reference) == registry.list()[1]
    manifest, fetched = publish.pull(f"{place}@prod", tmp_path / "pulled")
    assert fetched
    assert manifest.release == "1.0.0"
    assert hash_folder(tmp_path / "pulled") == hash_folder(release)
    assert len(client(place).search_model_versions(f"name='{place.rpartition('/')[2]}'")) == 2


def test_a_version_that_was_published_without_the_flavour(place: str, release: Path, tmp_path: Path) -> None:
    """A published version takes nothing new: who asks for the flavour then is told that it is not there."""
    assert publish.push(release, place).made
    with pytest.raises(RegistryError) as caught:
        publish.push(release, f"{place}?pyfunc=true", ("prod",))
    assert "1.0.0 is published already, without pyfunc" in one_line(caught)
    assert [found.aliases for found in registries.connect(place).list()] == [()]
    make_release(tmp_path / "next", release="1.1.0")
    for made, query in ((True, "?pyfunc=true"), (False, "?pyfunc=true"), (False, "")):
        assert publish.push(tmp_path / "next", place + query).made == made


def test_version_says_what_it_is(place: str, release: Path) -> None:
    publish.push(release, place, ("prod",))
    found = client(place).get_model_version_by_alias(place.rpartition("/")[2], "prod")
    assert found.tags["compile.release"] == "1.0.0"
    assert found.tags["compile.formats"] == "onnx fp32"
    assert (found.tags["compile.task"], found.tags["compile.licence"]) == ("feature-extraction", "apache-2.0")


def test_other_content_is_refused(place: str, release: Path, tmp_path: Path) -> None:
    publish.push(release, place)
    before = registries.connect(place).list()
    make_release(tmp_path / "other", {"config.json": b"other\n"})
    with pytest.raises(RegistryError, match="published already, with other content") as caught:
        publish.push(tmp_path / "other", place)
    one_line(caught)
    assert registries.connect(place).list() == before


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("mlflow://127.0.0.1:5000", "names no model"),
        ("mlflow:///tiny", "names no model"),
        ("mlflow://127.0.0.1:5000/na'me", "names no model"),
        ("mlflow://127.0.0.1:5000/name?flavor=pyfunc", "only option"),
        ("mlflow://me@127.0.0.1:5000/name", "holds a user's name"),
        ("mlflow://me:secret@127.0.0.1:5000/name", "or a password"),
    ],
)
def test_wrong_url(url: str, says: str) -> None:
    with pytest.raises(RegistryError, match=says) as caught:
        registries.connect(url)
    assert "secret" not in one_line(caught)


def test_plain_http_is_for_this_machine() -> None:
    schemes = {}
    for url in ("mlflow://localhost:1/n", "mlflow://[::1]:1/n", "mlflow://h/prefix/n", "mlflow+http://h:1/n"):
        registry = registries.connect(url)
        assert isinstance(registry, Model)
        schemes[url] = registry.tracking
    assert list(schemes.values()) == ["http://localhost:1", "http://[::1]:1", "https://h/prefix", "http://h:1"]


def test_reference_and_option_stay_apart() -> None:
    assert registries.parse("mlflow://h/n?pyfunc=true@1.0.0") == ("mlflow://h/n?pyfunc=true", "1.0.0")
    assert registries.parse("mlflow:///srv/store/n@prod") == ("mlflow:///srv/store/n", "prod")


def test_interrupted_push_resumes(proxy: Proxy, url: str, release: Path) -> None:
    proxy.inject(Fault(method="POST", path="model-versions/create", status=500, times=ALWAYS))
    with pytest.raises(RegistryError, match="answers 500") as caught:
        publish.push(release, url, ("latest",))
    one_line(caught)
    proxy.heal()
    assert registries.connect(url).list() == ()
    # What was meant to be the last step is taken; the run was finished, and is not trusted any more.
    assert publish.push(release, url, ("latest",)).made
    proxy.heal()
    shutil.rmtree(release)
    make_release(release, FILES, release="1.0.1")
    proxy.inject(Fault(method="PUT", path="manifest.json", status=500, times=ALWAYS))
    with pytest.raises(RegistryError):
        publish.push(release, url)
    assert proxy.count("PUT", BIG) == 1
    proxy.heal()
    assert publish.push(release, url).made
    assert proxy.count("PUT", BIG) == 0
    assert publish.pull(f"{url}@1.0.1", release.parent / "pulled")[1]


def test_what_was_sent_and_is_gone_is_sent_again(server: Server, proxy: Proxy, url: str, release: Path) -> None:
    proxy.inject(Fault(method="PUT", path="manifest.json", status=500, times=ALWAYS))
    with pytest.raises(RegistryError):
        publish.push(release, url)
    os.truncate(stored(server, BIG)[-1], 1000)
    proxy.heal()
    proxy.inject(Fault(method="GET", path=r"artifacts\?path", status=403))
    with pytest.raises(RegistryError, match="does not allow") as caught:
        publish.push(release, url)
    one_line(caught)
    proxy.heal()
    assert publish.push(release, url).made
    assert proxy.count("PUT", BIG) == 1


@pytest.mark.parametrize("nth", [1, 4, 9, 14])
def test_500_on_the_nth_request(proxy: Proxy, url: str, release: Path, nth: int) -> None:
    proxy.inject(Fault(status=500, first=nth))
    assert publish.push(release, url, ("latest",)).made
    proxy.heal()
    proxy.inject(Fault(status=503, first=nth - 1 or 1))
    assert publish.pull(url, release.parent / "pulled")[1]


@pytest.mark.parametrize(
    "path", ["model-versions/create", "registered-models/create", "runs/create", "experiments/create", BIG]
)
def test_lost_answer(proxy: Proxy, url: str, release: Path, path: str) -> None:
    """The server did its work and the client asks again: one version all the same, and it is this push's."""
    proxy.inject(Fault(path=path, lost=True))
    assert publish.push(release, url).made
    assert len(client(url).search_model_versions(f"name='{url.rpartition('/')[2]}'")) == 1


def test_broken_transfers(proxy: Proxy, url: str, release: Path) -> None:
    proxy.inject(Fault(method="PUT", path=BIG, reset=100_000))
    assert publish.push(release, url).made
    proxy.inject(Fault(method="GET", path=f"{ARTIFACTS}.*{BIG}", cut=100_000))
    proxy.inject(Fault(method="GET", path=f"{ARTIFACTS}.*{MANIFEST}", cut=10))
    assert publish.pull(f"{url}@1.0.0", release.parent / "pulled")[1]
    shutil.rmtree(release.parent / "pulled")
    proxy.inject(Fault(method="GET", path=BIG, cut=100_000, times=ALWAYS))
    with pytest.raises(RegistryError, match=r"broke off|ends after") as caught:
        publish.pull(f"{url}@1.0.0", release.parent / "pulled")
    one_line(caught)
    assert not (release.parent / "pulled").exists()


def test_corrupted_on_the_way_and_on_the_disk(server: Server, proxy: Proxy, url: str, release: Path) -> None:
    publish.push(release, url, ("latest",))
    proxy.inject(Fault(method="GET", path=BIG, corrupt=5_000_000))
    with pytest.raises(ReleaseError, match=f"{BIG} is not what the manifest says"):
        publish.pull(url, release.parent / "pulled")
    with open(stored(server, BIG)[-1], "r+b") as stream:
        stream.seek(77)
        stream.write(b"\0")
    with pytest.raises(ReleaseError, match=f"{BIG} is not what the manifest says") as caught:
        publish.pull(url, release.parent / "pulled")
    one_line(caught)
    with open(stored(server, BIG)[-1], "ab") as stream:
        stream.truncate(400 << 20)  # sparse: more than there may be
    with pytest.raises(ReleaseError, match="damaged"):
        publish.pull(url, release.parent / "pulled")
    stored(server, BIG)[-1].unlink()
    with pytest.raises(ReleaseError, match="not there any more"):
        publish.pull(url, release.parent / "pulled")
    stored(server, MANIFEST)[-1].unlink()
    with pytest.raises(ReleaseError, match=f"has no {MANIFEST}"):
        publish.pull(url, release.parent / "pulled")
    assert not list(release.parent.glob("pulled*"))


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ((File("../outside", "0" * 64, 1),), "no name of a file in a release"),
        ((File("/outside", "0" * 64, 1),), "no name of a file in a release"),
        ((File("twice", "0" * 64, 1), File("twice", "1" * 64, 1)), "names a file twice"),
        ((File(MANIFEST, "0" * 64, 1),), "names 'manifest.json', which is no name of a file in a release"),
    ],
)
def test_hostile_manifest(server: Server, url: str, release: Path, tmp_path: Path, files: tuple[File, ...], says: str) -> None:
    publish.push(release, url, ("latest",))
    stored(server, MANIFEST)[-1].write_bytes(to_bytes(manifest_of(files)))
    with pytest.raises(ReleaseError, match=says) as caught:
        publish.pull(url, tmp_path / "in" / "pulled")
    one_line(caught)
    assert not (tmp_path / "in").exists() or not list((tmp_path / "in").iterdir())


def test_another_manifest_than_the_digest(server: Server, url: str, release: Path, tmp_path: Path) -> None:
    publish.push(release, url, ("latest",))
    stored(server, MANIFEST)[-1].write_bytes(to_bytes(make_release(tmp_path / "other", release="9.9.9")))
    with pytest.raises(ReleaseError, match="another manifest"):
        publish.pull(url, tmp_path / "pulled")
    with open(stored(server, MANIFEST)[-1], "ab") as stream:
        stream.truncate(1 << 30)
    with pytest.raises(ReleaseError, match="larger than any"):
        publish.pull(url, tmp_path / "pulled")


@pytest.mark.parametrize(("status", "says"), [(401, "MLFLOW_TRACKING_USERNAME"), (403, "does not allow"), (418, "418")])
@pytest.mark.parametrize("path", ["", ARTIFACTS], ids=["registry", "artifacts"])
def test_refused(
    proxy: Proxy, url: str, release: Path, monkeypatch: pytest.MonkeyPatch, status: int, says: str, path: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "somebody")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "s3cr3t-word")
    proxy.inject(Fault(path=path, status=status, times=ALWAYS, body=b"no\nSorry.\n"))
    with pytest.raises(RegistryError, match=says) as caught:
        publish.push(release, url)
    assert "s3cr3t-word" not in one_line(caught)
    assert "s3cr3t-word" not in repr(caught.value.__cause__)
    proxy.heal()
    assert registries.connect(url).list() == ()


def test_nobody_listens(release: Path) -> None:
    port = free_port()
    began = time.monotonic()
    with pytest.raises(RegistryError, match="connection refused") as caught:
        publish.push(release, f"mlflow://127.0.0.1:{port}/tiny")
    one_line(caught)
    assert time.monotonic() - began < 10


def when(there: Callable[[], bool], then: Callable[[], None]) -> threading.Thread:
    """A thread that waits for a condition and then acts."""

    def watch() -> None:
        deadline = time.monotonic() + 30
        while not there() and time.monotonic() < deadline:
            time.sleep(0.001)
        then()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_server_killed_in_the_middle(server: Server, proxy: Proxy, url: str, tmp_path: Path) -> None:
    big = {**FILES, "openvino/openvino_model.bin": os.urandom(96 << 20)}
    make_release(tmp_path / "release", big)
    before = set((server.folder / "a").rglob("*"))

    def arriving() -> bool:
        return any("openvino_model.bin" in path.name for path in set((server.folder / "a").rglob("*")) - before)

    killer = when(arriving, server.kill)
    try:
        with pytest.raises(RegistryError, match="connection") as caught:
            publish.push(tmp_path / "release", url, ("latest",))
        one_line(caught)
    finally:
        killer.join()
        server.start()
    assert registries.connect(url).list() == ()
    proxy.heal()
    assert publish.push(tmp_path / "release", url, ("latest",)).made
    assert proxy.count("PUT", BIG) == 0
    assert proxy.count("PUT", "openvino_model.bin") <= 1  # none when all of it was there before the server died

    def receiving() -> bool:
        return any(path.stat().st_size for path in tmp_path.glob("scratch-*/openvino/openvino_model.bin"))

    killer = when(receiving, server.kill)
    try:
        with pytest.raises(RegistryError, match=r"connection|broke off"):
            publish.pull(url, tmp_path / "pulled")
        assert not (tmp_path / "pulled").exists()
        assert not list(tmp_path.glob("scratch-*"))
    finally:
        killer.join()
        server.start()
    assert publish.pull(url, tmp_path / "pulled")[1]


def test_disk_full_while_pulling(url: str, release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish.push(release, url, ("latest",))

    def full(stream: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(transfer, "sync", full)
    with pytest.raises(StageError, match="no space is left") as caught:
        publish.pull(url, release.parent / "pulled")
    one_line(caught)
    assert not (release.parent / "pulled").exists()


def race(url: str, *releases: Path) -> list[Any]:
    """Push releases at the same moment, each in a process's worth of state of its own; what each came to."""
    gate = threading.Barrier(len(releases))
    outcomes: list[Any] = [None] * len(releases)

    def go(index: int) -> None:
        gate.wait()
        try:
            outcomes[index] = publish.push(releases[index], url)
        except CompileError as error:
            outcomes[index] = error

    threads = [threading.Thread(target=go, args=(index,)) for index in range(len(releases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def test_two_pushes_at_once(place: str, release: Path, tmp_path: Path) -> None:
    same = tmp_path / "same"
    shutil.copytree(release, same)
    outcomes = race(place, release, same)
    assert [isinstance(outcome, publish.Published) for outcome in outcomes] == [True, True], outcomes
    assert len(registries.connect(place).list()) == 1
    publish.pull(f"{place}@1.0.0", tmp_path / "pulled")
    releases = [tmp_path / f"other{index}" for index in range(3)]
    identities = [make_release(path, {"config.json": path.name.encode()}, release="2.0.0").identity for path in releases]
    outcomes = race(place, *releases)
    won = [index for index, outcome in enumerate(outcomes) if isinstance(outcome, publish.Published)]
    assert len(won) == 1, outcomes
    assert all(isinstance(outcome, publish.Published) or "published already" in str(outcome) for outcome in outcomes), outcomes
    found = registries.connect(place).resolve("2.0.0")
    assert found is not None
    assert found.digest == identities[won[0]]


def test_the_first_version_is_the_release(url: str, release: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two that looked at the same time and saw nothing: the second to create takes its version away again."""
    other = make_release(tmp_path / "other", {"config.json": b"other\n"})
    original = Model._publish

    def overtaken(self: Model, *arguments: Any) -> None:
        monkeypatch.setattr(Model, "_publish", original)
        publish.push(tmp_path / "other", url)
        original(self, *arguments)

    monkeypatch.setattr(Model, "_publish", overtaken)
    with pytest.raises(RegistryError, match="published already, with other content"):
        publish.push(release, url)
    assert [found.digest for found in registries.connect(url).list()] == [other.identity]
    assert len(client(url).search_model_versions(f"name='{url.rpartition('/')[2]}'")) == 1


def test_versions_of_others_are_no_releases(url: str, release: Path, tmp_path: Path) -> None:
    name = url.rpartition("/")[2]
    mlflow = client(url)
    mlflow.create_registered_model(name)
    run = mlflow.create_run("0")
    theirs = {"compile.release": "1.0.0", "compile.digest": "not one"}
    for tags in ({}, theirs):
        mlflow.create_model_version(name, f"{run.info.artifact_uri}/model", run.info.run_id, tags=tags)
    mlflow.set_registered_model_alias(name, "champion", "1")
    assert registries.connect(url).list() == ()
    assert publish.push(release, url, ("latest",)).made
    assert [found.release for found in registries.connect(url).list()] == ["1.0.0"]
    with pytest.raises(RegistryError, match="champion names MLflow's version 1, which no push of ours made") as caught:
        publish.pull(f"{url}@champion", tmp_path / "pulled")
    one_line(caught)
    with pytest.raises(RegistryError, match=r"has no unknown; it has 1\.0\.0"):
        publish.pull(f"{url}@unknown", tmp_path / "pulled")


def test_a_server_that_names_other_places_is_not_followed(url: str, release: Path, tmp_path: Path) -> None:
    mlflow = client(url)
    name = url.rpartition("/")[2]
    mlflow.create_experiment(f"releases/{name}", artifact_location=(tmp_path / "elsewhere").as_uri())
    with pytest.raises(RegistryError, match="--serve-artifacts") as caught:
        publish.push(release, url)
    one_line(caught)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("path", ["", ARTIFACTS], ids=["registry", "artifacts"])
def test_a_redirect_is_not_followed(
    proxy: Proxy, server: Server, url: str, release: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "s3cr3t-token")
    monkeypatch.setenv("MLFLOW_ALLOW_HTTP_REDIRECTS", "true")
    publish.push(release, url, ("latest",))
    with Proxy(server.url) as other:
        to = (("Location", f"{other.url}/elsewhere?signature=s3cr3t"),)
        for status in (302, 307):
            proxy.heal()
            proxy.inject(Fault(path=path, status=status, headers=to, body=b"<html>", times=ALWAYS))
            with pytest.raises(RegistryError, match=rf"sends requests on to another address \({status}\)") as caught:
                publish.pull(url, release.parent / "pulled")
            assert "s3cr3t" not in one_line(caught)
        assert other.requests == []
    assert not (release.parent / "pulled").exists()


@pytest.fixture
def store(tmp_path: Path, database: Path) -> Path:
    """A folder with MLflow's database."""
    (tmp_path / "store").mkdir()
    shutil.copy(database, tmp_path / "store")
    return tmp_path / "store"


@pytest.mark.parametrize("elsewhere", ["outside", "store/mlartifacts/../../outside", "store/mlartifacts2/a"])
def test_a_database_that_names_other_places_is_not_followed(
    store: Path, release: Path, tmp_path: Path, elsewhere: str
) -> None:
    url = f"mlflow://{store}/tiny"
    publish.push(release, url, ("latest",))
    kept = hash_folder(tmp_path)
    with contextlib.closing(sqlite3.connect(store / "mlflow.db")) as connection:
        place = f"file://{tmp_path}/{elsewhere}"
        connection.execute("update experiments set artifact_location = ?", (place,))
        connection.execute("update model_versions set source = ?, storage_location = ?", (place, place))
        connection.commit()
    make_release(tmp_path / "next", FILES, release="1.1.0")
    for work in (lambda: publish.pull(url, tmp_path / "pulled"), lambda: publish.push(tmp_path / "next", url)):
        with pytest.raises(RegistryError, match="outside of the folder; if that was moved, move it back") as caught:
            work()
        one_line(caught)
    now = {file.path for file in hash_folder(tmp_path) if not file.path.startswith(("next/", "store/mlflow."))}
    assert now == {file.path for file in kept if not file.path.startswith("store/mlflow.")}


def test_a_folder_that_was_moved_says_so(store: Path, release: Path, tmp_path: Path) -> None:
    publish.push(release, f"mlflow://{store}/tiny", ("latest",))
    store.rename(tmp_path / "moved")
    with pytest.raises(RegistryError, match="outside of the folder; if that was moved, move it back") as caught:
        publish.pull(f"mlflow://{tmp_path}/moved/tiny", tmp_path / "pulled")
    one_line(caught)
    # Another way to the same folder is none.
    (tmp_path / "store").symlink_to(tmp_path / "moved")
    assert publish.pull(f"mlflow://{tmp_path}/store/tiny", tmp_path / "pulled")[1]


@pytest.mark.parametrize("name", ["model.sig", "SHA256SUMS", "config.json", "a b"])
@pytest.mark.parametrize("there", [True, False])
def test_a_link_in_a_folder_is_not_read(store: Path, release: Path, tmp_path: Path, name: str, there: bool) -> None:
    url = f"mlflow://{store}/tiny"
    publish.push(release, url, ("latest",))
    (root,) = store.glob("mlartifacts/**/release")
    secret = tmp_path / "secret"
    if there and name == "a b":
        shutil.copytree(root / name, secret)
    elif there:
        secret.write_bytes(b"mine alone")
    if (root / name).is_dir():
        shutil.rmtree(root / name)
    (root / name).unlink(missing_ok=True)
    (root / name).symlink_to(secret)
    with pytest.raises(ReleaseError) as caught:
        publish.pull(url, tmp_path / "pulled")
    # Of a folder that is a link to nowhere the files are not there.
    assert "is a link, or leads through one" in one_line(caught) or (name == "a b" and not there)
    assert not (tmp_path / "pulled").exists()


@pytest.mark.parametrize("link", ["model", "model/release", "model/release/onnx", "model/release/.config.json.part"])
def test_a_link_in_a_folder_is_not_written_through(
    store: Path, release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, link: str
) -> None:
    url, outside = f"mlflow://{store}/tiny", tmp_path / "outside"
    run = Model._run

    def linked(self: Model, *arguments: Any) -> tuple[str, str]:
        name, root = run(self, *arguments)
        planted = Path(root.removeprefix("file://")).parent / link
        planted.parent.mkdir(parents=True)
        planted.symlink_to(outside)
        return name, root

    monkeypatch.setattr(Model, "_run", linked)
    if link.endswith(".part"):
        outside.write_bytes(b"kept")
        assert publish.push(release, url, ("latest",)).made
        assert outside.read_bytes() == b"kept"
        assert publish.pull(url, tmp_path / "pulled")[1]
        return
    outside.mkdir()
    with pytest.raises(RegistryError, match=r"is a link, or leads through one|outside of the folder") as caught:
        publish.push(release, url)
    one_line(caught)
    assert list(outside.iterdir()) == []


def test_a_file_that_changes_while_it_is_sent(place: str, release: Path, tmp_path: Path) -> None:
    content = (release / BIG).read_bytes()
    for wrong in (content[:-1] + b"?", content + b"more"):
        (release / BIG).write_bytes(wrong)
        with pytest.raises(ReleaseError, match=f"{BIG}: is not what the manifest says") as caught:
            publish.push(release, place)
        one_line(caught)
        assert registries.connect(place).list() == ()
    (release / BIG).write_bytes(content)
    assert publish.push(release, place, ("latest",)).made
    publish.pull(place, tmp_path / "pulled")


def test_folder_that_cannot_be_written(release: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(RegistryError, match="cannot be written") as caught:
        publish.push(release, f"mlflow://{tmp_path}/file/tiny")
    one_line(caught)


def test_database_that_cannot_be_used(database: Path, tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"no database " * 1000)
    with pytest.raises(RegistryError, match="its database cannot be used") as caught:
        registries.connect(f"mlflow://{tmp_path}/tiny").list()
    one_line(caught)
    (tmp_path / "old").mkdir()
    shutil.copy(database, tmp_path / "old")
    with contextlib.closing(sqlite3.connect(tmp_path / "old" / "mlflow.db")) as connection:
        connection.execute("update alembic_version set version_num = '451aebb31d03'")
        connection.commit()
    with pytest.raises(RegistryError, match="mlflow db upgrade") as caught:
        registries.connect(f"mlflow://{tmp_path}/old/tiny").list()
    one_line(caught)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").touch()
    for module in ("sqlalchemy", "mlflow"):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(RegistryError, match=r"pip install 'aot-model-compiler\[mlflow\]'") as caught:
            registries.connect(f"mlflow://{tmp_path}/tiny").list()
        assert f"needs {module}" in one_line(caught)


def test_looking_makes_no_folder(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="nothing is published there"):
        publish.pull(f"mlflow://{tmp_path}/nowhere/tiny", tmp_path / "pulled")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def guarded(tmp_path: Path, database: Path) -> Iterator[Server]:
    """A server with MLflow's own basic authentication."""
    settings = tmp_path / "auth.ini"
    settings.write_text(
        f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{tmp_path}/auth.db\n"
        "admin_username = admin\nadmin_password = s3cr3t-w0rd-of-admin\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    environment = {"MLFLOW_AUTH_CONFIG_PATH": str(settings), "MLFLOW_FLASK_SERVER_SECRET_KEY": "test"}
    shutil.copy(database, tmp_path)
    server = Server(tmp_path, "--app-name", "basic-auth", environment=environment)
    server.start()
    yield server
    server.kill()


@pytest.mark.slow  # its server hashes the password at every request
def test_login_by_mlflows_variables(guarded: Server, release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def log_in(user: str, password: str) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", user)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)

    url = f"mlflow://127.0.0.1:{guarded.port}/tiny"
    with pytest.raises(RegistryError, match="401"):
        publish.push(release, url)
    log_in("admin", "s3cr3t-wrong")
    with pytest.raises(RegistryError, match="401") as caught:
        publish.push(release, url)
    assert "s3cr3t" not in one_line(caught)
    log_in("admin", "s3cr3t-w0rd-of-admin")
    assert publish.push(release, url, ("latest",)).made
    reader = {"username": "reader", "password": "s3cr3t-w0rd-of-reader"}
    response = requests.post(
        f"{guarded.url}/api/2.0/mlflow/users/create", json=reader, auth=("admin", "s3cr3t-w0rd-of-admin"), timeout=30
    )
    assert response.status_code == 200, response.text
    log_in(*reader.values())
    assert publish.pull(url, release.parent / "pulled")[1]
    make_release(release.parent / "next", FILES, release="1.0.1")
    with pytest.raises(RegistryError, match="403") as caught:
        publish.push(release.parent / "next", url)
    assert "s3cr3t" not in one_line(caught)
    with pytest.raises(RegistryError, match="403"):
        registries.connect(url).alias("prod", registries.connect(url).list()[0])


def test_nothing_is_printed(first: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    """Neither MLflow's progress bars, links and logs nor its telemetry come with a push, nor files beside the folder."""
    folder, ran = first
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
    assert sorted(path.name for path in folder.iterdir()) == ["pulled", "release", "store"]
    assert hash_folder(folder / "pulled") == hash_folder(folder / "release")
    assert not list((folder / "store").rglob("MLmodel"))  # the pyfunc flavour comes on request


@pytest.mark.parametrize("query", ["", "?pyfunc=true"])
def test_a_signed_release(place: str, tmp_path: Path, query: str) -> None:
    signed_round_trip(place + query, tmp_path)
