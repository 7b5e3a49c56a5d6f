"""The registry at hf://, against a hub of its own process, with the hub's own client as it is installed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from compiler import registries
from compiler.errors import CompileError, RegistryError, ReleaseError, StageError
from compiler.hashing import canonical, hash_folder
from compiler.manifest import MANIFEST, to_bytes
from compiler.registries import transfer
from compiler.registries.hub import Hub as HubRegistry
from compiler.registries.hub import precedence
from compiler.stages.publish import pull, push
from compiler.types import File
from tests.registries.conftest import FILES, make_release, manifest_of
from tests.registries.proxy import ALWAYS, Fault, Proxy

ROOT = Path(__file__).parents[2]
LARGE = os.urandom(3 << 20)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Server:
    """The hub's process. It may be killed and started again, with the same addresses and what it holds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port, self.storage_port = free_port(), free_port()
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "tests.registries.hub_server", str(self.folder), str(self.port), str(self.storage_port)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        end = time.monotonic() + 20
        while time.monotonic() < end:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            time.sleep(0.02)
        raise AssertionError("the hub does not start")

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def storage_url(self) -> str:
        return f"http://127.0.0.1:{self.storage_port}"

    def set(self, **settings: Any) -> None:
        aside = self.folder / "settings.new"
        aside.write_text(json.dumps(settings))
        os.replace(aside, self.folder / "settings.json")

    def requests(self, method: str = "", path: str = "") -> list[dict[str, Any]]:
        try:
            lines = (self.folder / "requests.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        every = [json.loads(line) for line in lines]
        return [request for request in every if method in request["method"] and path in request["path"]]

    def state(self, name: str) -> dict[str, Any]:
        state: dict[str, Any] = json.loads((self.folder / name / "repo.json").read_bytes())
        return state

    def files(self, name: str, revision: str) -> dict[str, Any]:
        state = self.state(name)
        commit = state["tags"].get(revision) or state["branches"][revision]
        files: dict[str, Any] = state["commits"][commit]["files"]
        return files

    def content(self, name: str, entry: dict[str, Any]) -> Path:
        return self.folder / name / ("objects" if "lfs" in entry else "blobs") / entry.get("lfs", entry)["oid"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("hub"))
    yield server
    server.stop()


@pytest.fixture
def hub(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    """The hub, without what earlier tests told it, and a login that may do everything."""
    server.set()
    (server.folder / "requests.jsonl").unlink(missing_ok=True)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "writer")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    if server.process.poll() is not None:
        server.start()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries follow each other without the pauses, in our own code and in the library."""
    from huggingface_hub.utils import _http

    monkeypatch.setattr(transfer, "DELAYS", (0.0, 0.0, 0.0, 0.0))
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None))


@pytest.fixture
def url(request: pytest.FixtureRequest) -> str:
    """A repository for a test alone."""
    return f"hf://org/{request.node.name.partition('[')[0].replace('_', '-')}-{os.urandom(3).hex()}"


def repo(url: str) -> str:
    return url.removeprefix("hf://")


def same(folder: Path, other: Path) -> bool:
    return hash_folder(folder) == hash_folder(other)


def test_a_release_comes_back_byte_for_byte(hub: Server, url: str, tmp_path: Path) -> None:
    files = {**FILES, "README.md": b"---\nlicense: mit\n---\nThe checkpoint's own.\n", "1_Pooling/config.json": b"{}", "empty.txt": b""}
    make_release(tmp_path / "made", {**files, "onnx/model.onnx": LARGE})
    published = push(tmp_path / "made", url, ("latest", "prod"))
    assert published.made and published.moved == ("latest", "prod")
    for reference in ("", "@1.0.0", "@prod", f"@sha256:{published.version.digest}"):
        target = tmp_path / f"pulled{reference.replace(':', '-')}"
        _, fetched = pull(url + reference, target)
        assert fetched and same(tmp_path / "made", target)
    storage = [request for request in hub.requests() if request["storage"]]
    assert {request["method"] for request in storage} == {"PUT", "GET"}
    assert not any(request["authorization"] for request in storage), "the login went to another host"
    assert not (tmp_path / "hf").exists(), "a second copy, in the library's cache"
    assert all("torch/" not in request["agent"] for request in hub.requests())


def test_a_version_is_a_tag_on_exactly_the_release(hub: Server, url: str, tmp_path: Path) -> None:
    make_release(tmp_path / "made")
    push(tmp_path / "made", url)
    tagged = hub.files(repo(url), "1.0.0")
    assert set(tagged) == {".gitattributes", *(file.path for file in hash_folder(tmp_path / "made"))}
    for file in hash_folder(tmp_path / "made"):
        assert hashlib.sha256(hub.content(repo(url), tagged[file.path]).read_bytes()).hexdigest() == file.sha256
    assert set(hub.state(repo(url))["branches"]) == {"main"}, "the branch that it was put together on is gone"
    assert hub.state(repo(url))["private"]


def test_a_public_repository_on_request(hub: Server, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_release(tmp_path / "made")
    push(tmp_path / "made", f"{url}?private=false", ("prod",))
    assert not hub.state(repo(url))["private"]
    monkeypatch.setenv("HF_TOKEN", "")
    assert pull(f"{url}@prod", tmp_path / "pulled")[1]


def test_main_shows_the_newest_version_with_a_card(hub: Server, url: str, tmp_path: Path) -> None:
    own = b"---\nlicense: mit\n---\nThe checkpoint's own.\n"
    for release, extra in (("1.0.0", {"old.txt": b"old"}), ("2.0.0", {"README.md": own}), ("1.0.1", {"late.txt": b"late"})):
        manifest = make_release(tmp_path / release, {**FILES, **extra}, release=release)
        push(tmp_path / release, url)
        if release == "2.0.0":
            newest = manifest
    shown = hub.files(repo(url), "main")
    assert set(shown) == {".gitattributes", "README.md", MANIFEST, *(file.path for file in newest.every_file)}
    card = hub.content(repo(url), shown["README.md"]).read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front == {
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "feature-extraction",
        "tags": ["torchscript", "onnx"],
    }
    assert f"sha256:{newest.identity}" in card and "| `onnx/model.onnx` | onnx | fp32 | 0.0 | – | 1.0000000 | – |" in card
    assert "README.md at 2.0.0" in card
    assert hub.content(repo(url), hub.files(repo(url), "2.0.0")["README.md"]).read_bytes() == own
    assert [version.release for version in registries.connect(url).list()] == ["1.0.0", "1.0.1", "2.0.0"]


def test_the_same_again_sends_nothing_and_other_content_is_refused(hub: Server, url: str, tmp_path: Path) -> None:
    make_release(tmp_path / "made")
    push(tmp_path / "made", url)
    before, count = hub.state(repo(url)), len(hub.requests())
    again = push(tmp_path / "made", url)
    assert not again.made and hub.state(repo(url)) == before
    assert {request["method"] for request in hub.requests()[count:]} == {"GET"}
    make_release(tmp_path / "other", {"onnx/model.onnx": b"other"})
    with pytest.raises(RegistryError, match=r"1\.0\.0 is published already, with other content"):
        push(tmp_path / "other", url)
    assert hub.state(repo(url)) == before


def test_aliases_are_branches_and_move_in_one_call(hub: Server, url: str, tmp_path: Path) -> None:
    for release in ("1.0.0", "1.1.0"):
        make_release(tmp_path / release, {**FILES, "a.txt": release.encode()}, release=release)
        push(tmp_path / release, url, ("prod",))
    state = hub.state(repo(url))
    assert state["branches"]["prod"] == state["tags"]["1.1.0"]
    assert len(hub.requests("", "/branch/prod")) == 2
    registry = registries.connect(url)
    assert [version.aliases for version in registry.list()] == [(), ("prod",)]
    old = registry.resolve("1.0.0")
    assert old is not None
    registry.alias("prod", old)
    assert (found := registry.resolve("prod")) is not None and found.release == "1.0.0"


def test_a_branch_of_somebody_else_is_no_alias(hub: Server, url: str, tmp_path: Path) -> None:
    make_release(tmp_path / "made")
    version = push(tmp_path / "made", url).version
    registry = registries.connect(url)
    with pytest.raises(RegistryError, match="main is the branch"):
        registry.alias("main", version)
    from huggingface_hub import HfApi

    api = HfApi(hub.url, token="writer")
    api.create_branch(repo(url), branch="dev")
    api.upload_file(path_or_fileobj=b"work", path_in_repo="work.txt", repo_id=repo(url), revision="dev")
    with pytest.raises(RegistryError, match="a branch dev with other commits"):
        registry.alias("dev", version)
    assert registry.resolve("dev") is None and registry.resolve("main") is None


def test_nothing_is_there(hub: Server, url: str, tmp_path: Path) -> None:
    registry = registries.connect(url)
    assert registry.list() == () and registry.resolve("1.0.0") is None and registry.resolve(f"sha256:{'0' * 64}") is None
    with pytest.raises(RegistryError, match=r"has no prod; nothing is published there"):
        pull(f"{url}@prod", tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("hf://org", "no repository can be called so"),
        ("hf://org/name/more", "no repository can be called so"),
        ("hf://org/na--me", "no repository can be called so"),
        ("hf://org/name?public=true", "only [?]private=true or [?]private=false"),
        ("hf://org/name?private=perhaps", "only [?]private=true or [?]private=false"),
        ("hf://hf_secret@org/name", "a URL has no place for a login"),
    ],
)
def test_addresses_that_are_none(bad: str, said: str) -> None:
    with pytest.raises(RegistryError, match=said) as caught:
        registries.connect(bad)
    assert "secret" not in str(caught.value)


def test_semver_orders_versions() -> None:
    ordered = "1.0.0-alpha 1.0.0-alpha.1 1.0.0-alpha.beta 1.0.0-beta.2 1.0.0-beta.11 1.0.0-rc.1 1.0.0 1.2.0 1.10.0".split()
    assert sorted(reversed(ordered), key=precedence) == ordered
