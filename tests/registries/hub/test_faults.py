"""What can go wrong between a release and a hub: each fault is real, on a real server, and leaves nothing half-published."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compiler import registries
from compiler.errors import CompileError, RegistryError, ReleaseError, StageError
from compiler.hashing import hash_folder
from compiler.manifest import MANIFEST, from_bytes, to_bytes
from compiler.registries import Parcel, TakenError, hub_client
from compiler.stages.publish import Published, move_aliases, pull, push, send
from compiler.types import Event, File
from compiler.verify import read_release
from tests.ports import free_port
from tests.registries.conftest import FILES, make_release, manifest_of
from tests.registries.hub.conftest import ROOT, HubProcess
from tests.registries.proxy import ALWAYS, Fault, Proxy
from tests.test_store import small_disk

LARGE = {**FILES, "onnx/model.onnx": os.urandom(3 << 20)}
SECRETS = ("hf_writer", "hf_reader", "hf_stolen", "signature")


def one_line(error: CompileError, *parts: str) -> None:
    """An error is one line, says these things, and no secret."""
    text = str(error)
    assert "\n" not in text and all(part in text for part in parts), text
    assert not any(secret in text for secret in SECRETS), text


def parcel_of(folder: Path) -> Parcel:
    content = (folder / MANIFEST).read_bytes()
    manifest = from_bytes(content, str(folder))
    return Parcel(folder, manifest, content, manifest.every_file)


def nothing_there(hub: HubProcess, url: str) -> bool:
    registry = registries.connect(url)
    return registry.list() == () and registry.resolve("1.0.0") is None


def puts(hub: HubProcess) -> list[dict[str, Any]]:
    return [request for request in hub.requests("PUT") if request["status"] == 200]


def soon_again(hub: HubProcess) -> threading.Thread:
    """Start the hub again a moment after it was killed."""

    def wait() -> None:
        hub.process.wait()
        time.sleep(0.2)
        hub.start()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


class TestTheServerIsKilled:
    @pytest.mark.parametrize(
        ("method", "path", "after"), [("PUT", "", 1 << 20), ("POST", "/commit/", 1), ("POST", "/tag/", 1)]
    )
    def test_while_pushing(
        self, hub: HubProcess, url: str, tmp_path: Path, impatient: None, method: str, path: str, after: int
    ) -> None:
        make_release(tmp_path / "made", LARGE)
        hub.set(die=[method, path, after])
        with pytest.raises(RegistryError) as caught:
            push(tmp_path / "made", url)
        one_line(caught.value, url, "the hub cannot be reached", "try again later")
        hub.process.wait()
        sent = {request["path"] for request in puts(hub)}
        hub.start()
        assert nothing_there(hub, url)
        hub.forget()
        assert push(tmp_path / "made", url).made
        again = {request["path"] for request in puts(hub)}
        assert not sent & again, "what the hub had was sent again"
        if path:
            assert len(sent) == 2 and not again
        pull(url + "@1.0.0", tmp_path / "pulled")
        assert hash_folder(tmp_path / "made") == hash_folder(tmp_path / "pulled")

    def test_while_pushing_and_is_soon_there_again(self, hub: HubProcess, url: str, tmp_path: Path) -> None:
        make_release(tmp_path / "made", LARGE)
        hub.set(die=["PUT", "", 1 << 20])
        thread = soon_again(hub)
        assert push(tmp_path / "made", url).made
        thread.join()
        assert pull(url + "@1.0.0", tmp_path / "pulled")[1]

    def test_while_pulling(self, hub: HubProcess, url: str, tmp_path: Path, impatient: None) -> None:
        make_release(tmp_path / "made", LARGE)
        push(tmp_path / "made", url)
        hub.set(die=["GET", "[0-9a-f]{64}", 1 << 20])
        with pytest.raises(RegistryError) as caught:
            pull(url + "@1.0.0", tmp_path / "pulled")
        one_line(caught.value, url, "fetching onnx/model.onnx", "the hub cannot be reached")
        assert [path.name for path in tmp_path.iterdir() if path.name != "hf"] == ["made"]
        hub.process.wait()
        hub.start()
        assert pull(url + "@1.0.0", tmp_path / "pulled")[1]

    def test_while_pulling_and_is_soon_there_again(self, hub: HubProcess, url: str, tmp_path: Path) -> None:
        make_release(tmp_path / "made", LARGE)
        push(tmp_path / "made", url)
        hub.set(die=["GET", "[0-9a-f]{64}", 1 << 20])
        thread = soon_again(hub)
        assert pull(url + "@1.0.0", tmp_path / "pulled")[1]
        thread.join()


def test_the_client_is_killed_and_the_next_one_sends_no_file_again(
    hub: HubProcess, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_release(tmp_path / "made", LARGE)
    with Proxy(hub.url) as proxy:
        proxy.inject(Fault(path="/commit/", delay=60))
        code = "import sys, pathlib, compiler.stages.publish as publish; publish.push(pathlib.Path(sys.argv[1]), sys.argv[2])"
        environment = {**os.environ, "HF_ENDPOINT": proxy.url}
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "made"), url], cwd=ROOT, env=environment)
        end = time.monotonic() + 60
        while not hub.requests("POST", "/commit/") and time.monotonic() < end:
            time.sleep(0.02)
        process.kill()
        process.wait()
    assert len(puts(hub)) == 2 and nothing_there(hub, url)
    assert push(tmp_path / "made", url).made
    assert len(puts(hub)) == 2, "files that the hub has were sent again"


def test_connection_refused(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, impatient: None) -> None:
    make_release(tmp_path / "made")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    for work in (lambda: push(tmp_path / "made", url), lambda: pull(url + "@1.0.0", tmp_path / "pulled")):
        with pytest.raises(RegistryError) as caught:
            work()
        one_line(caught.value, url, "the hub cannot be reached (ConnectError)", "HF_ENDPOINT")


@pytest.mark.parametrize(
    ("token", "pushing", "pulling"),
    [
        ("hf_stolen", "not for this login (401)", "not for this login (401)"),
        ("", "not for this login (401)", "not for this login (401)"),
        ("hf_reader", "forbidden to this login (403)", ""),
    ],
)
def test_logins(
    hub: HubProcess, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str, pushing: str, pulling: str
) -> None:
    for release in ("1.0.0", "1.1.0"):
        make_release(tmp_path / release, release=release)
    version = push(tmp_path / "1.0.0", url).version
    monkeypatch.setenv("HF_TOKEN", token)
    before = hub.state(url)
    for place in (url, url + "-new"):
        with pytest.raises(RegistryError) as caught:
            push(tmp_path / "1.1.0", place)
        one_line(caught.value, place, pushing, "HF_TOKEN")
    with pytest.raises(RegistryError) as caught:
        registries.connect(url).alias("prod", version)
    one_line(caught.value, pushing)
    assert hub.state(url) == before and not hub.there(url + "-new")
    if not pulling:
        assert pull(url + "@1.0.0", tmp_path / "pulled")[1]
        return
    with pytest.raises(RegistryError) as caught:
        pull(url + "@1.0.0", tmp_path / "pulled")
    one_line(caught.value, url, pulling, "HF_TOKEN")
    assert not (tmp_path / "pulled").exists()


@pytest.mark.parametrize("kind", ["status", "reset", "lost"])
def test_any_one_request_fails(
    hub: HubProcess, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, impatient: None, kind: str
) -> None:
    """Each request of a push in turn is answered 500, never arrives, or arrives and its answer is lost."""
    made = make_release(tmp_path / "made", LARGE)
    faults: dict[str, dict[str, Any]] = {"status": {"status": 500}, "reset": {"reset": 0}, "lost": {"lost": True}}
    with Proxy(hub.url) as proxy, Proxy(hub.storage_url) as storage:
        monkeypatch.setenv("HF_ENDPOINT", proxy.url)
        hub.set(storage=storage.url)
        push(tmp_path / "made", url, ("prod",))
        count = len(proxy.requests)
        assert count > 12 and len(storage.requests) == 2
        for number in range(1, count + 1):
            proxy.heal()
            storage.heal()
            proxy.inject(Fault(first=number, **faults[kind]))
            storage.inject(Fault(first=1 + number % 2, **faults[kind]))
            place = f"{url}-{number}"
            assert push(tmp_path / "made", place, ("prod",)).version.digest == made.identity
            state = hub.state(place)
            assert set(state["tags"]) == {"1.0.0"} and state["branches"]["prod"] == state["tags"]["1.0.0"]
            found = registries.connect(place).resolve("prod")
            assert found is not None and found.digest == made.identity
        proxy.heal()
        storage.heal()
        fault = {"cut": 10} if kind == "reset" else faults[kind]
        storage.inject(Fault(**fault))
        proxy.inject(Fault(path="/resolve/", first=2, **fault))
        assert pull(url + "@prod", tmp_path / "pulled")[1]
        assert len(storage.requests) == 3


def test_the_storage_always_fails(
    hub: HubProcess,
    url: str,
    tmp_path: Path,
    impatient: None,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    make_release(tmp_path / "made", LARGE)
    with Proxy(hub.storage_url) as storage:
        hub.set(storage=storage.url)
        storage.inject(Fault(status=503, times=ALWAYS))
        with pytest.raises(RegistryError) as caught:
            push(tmp_path / "made", url)
        one_line(caught.value, url, "sending files: the hub answers 503")
        assert nothing_there(hub, url)
    shown = "".join(capfd.readouterr()) + caplog.text
    assert not any(secret in shown for secret in SECRETS), shown


def test_a_silent_server(hub: HubProcess, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils._http import close_session

    make_release(tmp_path / "made")
    with Proxy(hub.url) as proxy:
        monkeypatch.setenv("HF_ENDPOINT", proxy.url)
        monkeypatch.setattr(hub_client, "SILENCE", 0.3)
        close_session()  # the next one is made with that
        proxy.inject(Fault(path="/refs", delay=2))
        assert push(tmp_path / "made", url).made
        assert proxy.count("GET", "/refs") > 2
    monkeypatch.undo()
    close_session()


def test_damaged_on_the_server(hub: HubProcess, url: str, tmp_path: Path) -> None:
    make_release(tmp_path / "made", LARGE)
    push(tmp_path / "made", url)
    content = hub.content(url, hub.files(url, "1.0.0")["onnx/model.onnx"])
    damaged = bytearray(content.read_bytes())
    damaged[1000] ^= 1
    content.write_bytes(damaged)
    with pytest.raises(ReleaseError) as caught:
        pull(url + "@1.0.0", tmp_path / "pulled")
    one_line(caught.value, f"{url}@1.0.0", "onnx/model.onnx is not what the manifest says")
    assert not (tmp_path / "pulled").exists()


def test_truncated_downloads(hub: HubProcess, url: str, tmp_path: Path, impatient: None) -> None:
    make_release(tmp_path / "made", LARGE)
    push(tmp_path / "made", url)
    with Proxy(hub.storage_url) as storage:
        hub.set(storage=storage.url)
        storage.inject(Fault(cut=1 << 20, times=ALWAYS))
        with pytest.raises(RegistryError) as caught:
            pull(url + "@1.0.0", tmp_path / "pulled")
        one_line(caught.value, url, "onnx/model.onnx")
        assert not (tmp_path / "pulled").exists()
        storage.heal()
        storage.inject(Fault(cut=1 << 20))
        assert pull(url + "@1.0.0", tmp_path / "pulled")[1]
        assert len(storage.requests) == 3


def test_a_full_disk(hub: HubProcess, url: str, tmp_path: Path) -> None:
    make_release(tmp_path / "made", LARGE)
    push(tmp_path / "made", url)
    with small_disk(tmp_path / "disk", "1m") as disk:
        with pytest.raises(StageError) as caught:
            pull(url + "@1.0.0", disk / "pulled")
        one_line(caught.value, str(disk), "no space is left")
        assert list(disk.iterdir()) == []


class TestTwoAtOnce:
    @staticmethod
    def both(folders: list[Path], url: str) -> list[Published | CompileError]:
        barrier = threading.Barrier(len(folders))
        found: list[Published | CompileError] = []

        def work(folder: Path) -> None:
            barrier.wait()
            try:
                found.append(push(folder, url))
            except CompileError as error:
                found.append(error)

        threads = [threading.Thread(target=work, args=(folder,)) for folder in folders]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    def test_of_the_same_version(self, hub: HubProcess, url: str, tmp_path: Path) -> None:
        for name in ("one", "other"):
            make_release(tmp_path / name, {**FILES, "a.txt": name.encode()})
        for number in range(5):
            place = f"{url}-{number}"
            found = self.both([tmp_path / "one", tmp_path / "other"], place)
            won = [result for result in found if isinstance(result, Published)]
            lost = [result for result in found if isinstance(result, RegistryError)]
            assert len(won) == len(lost) == 1 and won[0].made
            one_line(lost[0], "1.0.0 is published already, with other content")
            (version,) = registries.connect(place).list()
            assert version.digest == won[0].version.digest
            assert set(hub.state(place)["branches"]) == {"main"}

    def test_of_the_same_release(self, hub: HubProcess, url: str, tmp_path: Path) -> None:
        make_release(tmp_path / "made")
        for number in range(3):
            found = self.both([tmp_path / "made"] * 3, f"{url}-{number}")
            assert all(isinstance(result, Published) for result in found), found
            assert len(registries.connect(f"{url}-{number}").list()) == 1

    def test_of_two_versions(self, hub: HubProcess, url: str, tmp_path: Path) -> None:
        for release in ("1.0.0", "2.0.0"):
            make_release(tmp_path / release, release=release)
        found = self.both([tmp_path / "1.0.0", tmp_path / "2.0.0"], url)
        assert all(isinstance(result, Published) and result.made for result in found), found
        assert [version.release for version in registries.connect(url).list()] == ["1.0.0", "2.0.0"]
        shown = hub.content(url, hub.files(url, "main")["README.md"]).read_text()
        assert "# tiny 2.0.0" in shown

    def test_the_slower_is_told_so(self, hub: HubProcess, url: str, tmp_path: Path) -> None:
        for name in ("one", "other"):
            make_release(tmp_path / name, {**FILES, "a.txt": name.encode()})
        push(tmp_path / "one", url)
        with pytest.raises(TakenError) as caught:
            registries.connect(url).push(parcel_of(tmp_path / "other"))
        one_line(caught.value, "1.0.0 was published by another push")


def publish_by_hand(hub: HubProcess, url: str, content: bytes, files: dict[str, bytes]) -> None:
    """What somebody can put into a repository of theirs: any manifest, any files, a tag."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(hub.url)
    name = url.removeprefix("hf://")
    api.create_repo(name)
    operations = [CommitOperationAdd(path, data) for path, data in {**files, MANIFEST: content}.items()]
    api.create_commit(name, operations, commit_message="mine")
    api.create_tag(name, tag="1.0.0")


def naming(*paths: str, size: int = 4) -> Callable[[], bytes]:
    return lambda: to_bytes(manifest_of(tuple(File(path, "0" * 64, size) for path in paths)))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (naming("../outside.txt"), "no name of a file in a release"),
        (naming("a/../../outside.txt"), "no name of a file in a release"),
        (naming("/outside.txt"), "no name of a file in a release"),
        (naming("C:\\outside.txt"), "no name of a file in a release"),
        (naming("a.txt", "a.txt"), "names a file twice"),
        (naming("manifest.json"), "names 'manifest.json', which is no name of a file in a release"),
        (naming("gone.txt"), "lacks gone.txt"),
        (naming("a.txt", size=3), "is not what the manifest says"),
        (naming("a.txt", size=1 << 50), "no space is left"),
        (lambda: b"{}", "not a manifest"),
        (lambda: naming("a.txt")().replace(b"tiny", b"evil"), "changed since it was written"),
        (lambda: b" " * (17 << 20), "larger than any that a push writes (16 MB)"),
        (lambda: to_bytes(replace(manifest_of(()), release="2.0.0")), "its tag 1.0.0 holds release 2.0.0"),
    ],
)
def test_hostile_manifests(
    hub: HubProcess, url: str, tmp_path: Path, impatient: None, content: Callable[[], bytes], said: str
) -> None:
    publish_by_hand(hub, url, content(), {"a.txt": b"evil"})
    inside = tmp_path / "inside"
    inside.mkdir()
    with pytest.raises(CompileError) as caught:
        pull(url + "@1.0.0", inside / "pulled")
    one_line(caught.value, said)
    assert [path for path in tmp_path.rglob("*") if path.name not in ("hf", "inside")] == []


def test_a_tag_without_a_release(hub: HubProcess, url: str, tmp_path: Path) -> None:
    from huggingface_hub import HfApi

    api = HfApi(hub.url)
    api.create_repo(url.removeprefix("hf://"))
    api.create_tag(url.removeprefix("hf://"), tag="1.0.0")
    make_release(tmp_path / "made")
    assert registries.connect(url).list() == ()
    with pytest.raises(RegistryError) as caught:
        push(tmp_path / "made", url)
    one_line(caught.value, "has a tag 1.0.0 that holds no release", "raise release: in pipeline.yaml")


@pytest.mark.parametrize("token", ["hf_reader", ""])
def test_a_gated_repository(hub: HubProcess, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    make_release(tmp_path / "made")
    push(tmp_path / "made", url + "?private=false")
    hub.set(gated=[url.removeprefix("hf://")])
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(RegistryError) as caught:
        pull(url + "@1.0.0", tmp_path / "pulled")
    one_line(caught.value, url, "is gated", "HF_TOKEN")


def test_offline(hub: HubProcess, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RegistryError) as caught:
        pull(url + "@1.0.0", tmp_path / "pulled")
    one_line(caught.value, "HF_HUB_OFFLINE is set")


def test_something_that_is_no_hub(
    hub: HubProcess, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, impatient: None
) -> None:
    with Proxy(hub.url) as proxy:
        monkeypatch.setenv("HF_ENDPOINT", proxy.url)
        proxy.inject(Fault(status=200, body=b"<html>Welcome</html>", times=ALWAYS))
        with pytest.raises(RegistryError) as caught:
            pull(url + "@1.0.0", tmp_path / "pulled")
    one_line(caught.value, "answer is not JSON", "HF_ENDPOINT")


def test_files_that_the_hub_would_leave_out(hub: HubProcess, url: str, tmp_path: Path) -> None:
    make_release(tmp_path / "made")
    hub.set(ignored=["tokenizer.json"])
    with pytest.raises(RegistryError) as caught:
        push(tmp_path / "made", url)
    one_line(caught.value, "did not take tokenizer.json", "nothing is published")
    assert nothing_there(hub, url)


def test_a_name_that_a_hub_does_not_take(hub: HubProcess, url: str, tmp_path: Path) -> None:
    make_release(tmp_path / "made", {".cache/a.txt": b"a"})
    with pytest.raises(RegistryError) as caught:
        push(tmp_path / "made", url)
    one_line(caught.value, ".cache/a.txt")


def test_a_card_that_the_hub_refuses(hub: HubProcess, url: str, tmp_path: Path) -> None:
    make_release(tmp_path / "made", {"README.md": b"---\nlicense: not a licence\n---\n"})
    with pytest.raises(RegistryError) as caught:
        push(tmp_path / "made", url)
    one_line(caught.value, "refuses the release's README.md", '"license" must be one of', "build again")


@pytest.mark.parametrize(
    ("path", "said"), [("config.json", "config.json changed while"), ("onnx/model.onnx", "sending files")]
)
def test_a_file_that_changes_meanwhile(hub: HubProcess, url: str, tmp_path: Path, path: str, said: str) -> None:
    make_release(tmp_path / "made")
    parcel = parcel_of(tmp_path / "made")
    content = bytearray((tmp_path / "made" / path).read_bytes())
    content[0] ^= 1
    (tmp_path / "made" / path).write_bytes(content)
    with pytest.raises(RegistryError) as caught:
        registries.connect(url).push(parcel)
    one_line(caught.value, said)
    assert nothing_there(hub, url)


def test_large_files_in_parts(hub: HubProcess, url: str, tmp_path: Path) -> None:
    make_release(tmp_path / "made", LARGE)
    hub.set(part=1 << 20)
    push(tmp_path / "made", url)
    assert len([request for request in puts(hub) if request["path"].endswith((".1", ".2", ".3"))]) == 4
    assert pull(url + "@1.0.0", tmp_path / "pulled")[1]


def test_main_that_cannot_be_shown(
    hub: HubProcess, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, impatient: None
) -> None:
    """The version and its aliases are there all the same; the next push has `main` show it, also when no alias moves."""
    says = "is published, but main does not show it yet: committing: the hub answers 500"
    make_release(tmp_path / "made")
    with Proxy(hub.url) as proxy:
        monkeypatch.setenv("HF_ENDPOINT", proxy.url)
        proxy.inject(Fault(path="/commit/main", status=500, times=ALWAYS))
        for alias in ("latest", "prod"):
            with pytest.raises(RegistryError) as caught:
                push(tmp_path / "made", url, (alias,))
            one_line(caught.value, f"1.0.0 {says}")
            assert pull(f"{url}@{alias}", tmp_path / "pulled")[0].release == "1.0.0"
        assert set(hub.files(url, "main")) == {".gitattributes"}
        proxy.heal()
        sent = len(puts(hub))
        (tmp_path / "made" / "model.sig").write_bytes(b"made since, and not published")
        assert not push(tmp_path / "made", url).made
        assert set(hub.files(url, "main")) == {*hub.files(url, "1.0.0"), "README.md"}
        assert len(puts(hub)) == sent, "a file that the hub has was sent again"
        make_release(tmp_path / "newer", release="1.1.0")
        proxy.inject(Fault(path="/commit/main", status=500, times=ALWAYS))
        with pytest.raises(RegistryError) as caught:
            push(tmp_path / "newer", url)
        one_line(caught.value, f"1.1.0 {says}")
        proxy.heal()
        # By the build's own way, which tells of a step only where an alias moves.
        manifest, _ = read_release(tmp_path / "newer")
        told: list[Event] = []
        move_aliases(send(tmp_path / "newer", url), (), told.append, manifest)
        assert told == []
        shown = hub.files(url, "main")
        assert shown[MANIFEST] == hub.files(url, "1.1.0")[MANIFEST]
        count = proxy.count("POST", "/commit/main")
        push(tmp_path / "made", url, ("prod",))
        assert hub.files(url, "main") == shown and proxy.count("POST", "/commit/main") == count


def test_an_alias_that_does_not_move(hub: HubProcess, url: str, tmp_path: Path) -> None:
    for release in ("1.0.0", "1.1.0"):
        make_release(tmp_path / release, release=release)
    push(tmp_path / "1.0.0", url, ("prod",))
    hub.set(fixed=["prod"])
    with pytest.raises(RegistryError) as caught:
        push(tmp_path / "1.1.0", url, ("prod",))
    one_line(caught.value, "prod does not name 1.1.0 after it was moved")
