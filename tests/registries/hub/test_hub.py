"""The registry at hf://, against a hub of its own process, with the hub's own client as it is installed."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import yaml

from compiler import registries
from compiler.errors import RegistryError
from compiler.hashing import hash_folder
from compiler.manifest import MANIFEST, SUMS
from compiler.stages.publish import pull, push
from tests.conftest import run_command
from tests.registries.conftest import FILES, make_release, signed_round_trip
from tests.registries.hub.conftest import HubProcess

LARGE = os.urandom(3 << 20)


def repo(url: str) -> str:
    return url.removeprefix("hf://")


def same(folder: Path, other: Path) -> bool:
    return hash_folder(folder) == hash_folder(other)


def test_a_release_comes_back_byte_for_byte(hub: HubProcess, url: str, tmp_path: Path) -> None:
    files = {
        **FILES,
        "README.md": b"---\nlicense: mit\n---\nThe checkpoint's own.\n",
        "1_Pooling/config.json": b"{}",
        "empty.txt": b"",
    }
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


def test_a_version_is_a_tag_on_exactly_the_release(hub: HubProcess, url: str, tmp_path: Path) -> None:
    make_release(tmp_path / "made")
    push(tmp_path / "made", url)
    tagged = hub.files(url, "1.0.0")
    assert set(tagged) == {".gitattributes", *(file.path for file in hash_folder(tmp_path / "made"))}
    for file in hash_folder(tmp_path / "made"):
        assert hashlib.sha256(hub.content(url, tagged[file.path]).read_bytes()).hexdigest() == file.sha256
    assert set(hub.state(url)["branches"]) == {"main"}, "the branch that it was put together on is gone"
    assert hub.state(url)["private"]


def test_a_push_takes_only_its_own_versions_branches_away(hub: HubProcess, url: str, tmp_path: Path) -> None:
    from huggingface_hub import HfApi

    api = HfApi(hub.url)
    api.create_repo(repo(url))
    left = ("push/1.0.0-rc.1-0123456789ab", "push/1.0.0-notes", "push/1.0.01-0123456789ab", "push/1x0.0-0123456789ab")
    for branch in ("push/1.0.0-0123456789ab", *left):
        api.create_branch(repo(url), branch=branch)
    make_release(tmp_path / "made")
    push(tmp_path / "made", url)
    assert set(hub.state(url)["branches"]) == {"main", *left}


def test_a_public_repository_on_request(hub: HubProcess, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_release(tmp_path / "made")
    push(tmp_path / "made", f"{url}?private=false", ("prod",))
    assert not hub.state(url)["private"]
    monkeypatch.setenv("HF_TOKEN", "")
    assert pull(f"{url}@prod", tmp_path / "pulled")[1]


def test_main_shows_the_newest_version_with_a_card(hub: HubProcess, url: str, tmp_path: Path) -> None:
    own = b"---\nlicense: mit\n---\nThe checkpoint's own.\n"
    for release, extra in (("1.0.0", {"old.txt": b"old"}), ("2.0.0", {"README.md": own}), ("1.0.1", {"late.txt": b"late"})):
        manifest = make_release(tmp_path / release, {**FILES, **extra}, release=release)
        push(tmp_path / release, url)
        if release == "2.0.0":
            newest = manifest
    shown = hub.files(url, "main")
    assert set(shown) == {".gitattributes", "README.md", MANIFEST, SUMS, *(file.path for file in newest.every_file)}
    card = hub.content(url, shown["README.md"]).read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front == {
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "feature-extraction",
        "tags": ["torchscript", "onnx"],
    }
    assert f"sha256:{newest.identity}" in card and "| `onnx/model.onnx` | onnx | fp32 | 0.0 | – | 1.0000000 | – |" in card
    assert "README.md at 2.0.0" in card
    assert hub.content(url, hub.files(url, "2.0.0")["README.md"]).read_bytes() == own
    assert [version.release for version in registries.connect(url).list()] == ["1.0.0", "1.0.1", "2.0.0"]


def test_the_same_again_sends_nothing_and_other_content_is_refused(hub: HubProcess, url: str, tmp_path: Path) -> None:
    make_release(tmp_path / "made")
    push(tmp_path / "made", url)
    before, count = hub.state(url), len(hub.requests())
    again = push(tmp_path / "made", url)
    assert not again.made and hub.state(url) == before
    assert {request["method"] for request in hub.requests()[count:]} == {"GET"}
    make_release(tmp_path / "other", {"onnx/model.onnx": b"other"})
    with pytest.raises(RegistryError, match=r"1\.0\.0 is published already, with other content"):
        push(tmp_path / "other", url)
    assert hub.state(url) == before


def test_aliases_are_branches_and_move_in_one_call(hub: HubProcess, url: str, tmp_path: Path) -> None:
    for release in ("1.0.0", "1.1.0"):
        make_release(tmp_path / release, {**FILES, "a.txt": release.encode()}, release=release)
        push(tmp_path / release, url, ("prod",))
    state = hub.state(url)
    assert state["branches"]["prod"] == state["tags"]["1.1.0"]
    assert len(hub.requests("", "/branch/prod")) == 2
    registry = registries.connect(url)
    assert [version.aliases for version in registry.list()] == [(), ("prod",)]
    old = registry.resolve("1.0.0")
    assert old is not None
    registry.alias("prod", old)
    assert (found := registry.resolve("prod")) is not None and found.release == "1.0.0"


def test_a_branch_of_somebody_else_is_no_alias(hub: HubProcess, url: str, tmp_path: Path) -> None:
    make_release(tmp_path / "made")
    with pytest.raises(RegistryError, match="main is the branch"):
        push(tmp_path / "made", url, ("main",))
    assert registries.connect(url).list() == (), "it is told before anything is sent"
    version = push(tmp_path / "made", url).version
    registry = registries.connect(url)
    with pytest.raises(RegistryError, match="main is the branch"):
        registry.alias("main", version)
    from huggingface_hub import HfApi

    api = HfApi(hub.url)
    api.create_branch(repo(url), branch="dev")
    api.upload_file(path_or_fileobj=b"work", path_in_repo="work.txt", repo_id=repo(url), revision="dev")
    with pytest.raises(RegistryError, match="a branch dev with other commits"):
        registry.alias("dev", version)
    assert registry.resolve("dev") is None and registry.resolve("main") is None


def test_nothing_is_there(hub: HubProcess, url: str, tmp_path: Path) -> None:
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
        ("hf://org/name?public=true", "only option .* private=true or private=false"),
        ("hf://org/name?private=perhaps", "only option .* private=true or private=false"),
        ("hf://hf_secret@org/name", "holds a user's name"),
    ],
)
def test_addresses_that_are_none(bad: str, said: str) -> None:
    with pytest.raises(RegistryError, match=said) as caught:
        registries.connect(bad)
    assert "secret" not in str(caught.value)


def test_published_releases_can_be_compared(hub: HubProcess, url: str, tmp_path: Path) -> None:
    for release, changed in (("1.0.0", b"{}"), ("1.1.0", b"{ }")):
        make_release(tmp_path / release, {"config.json": changed}, release=release)
        push(tmp_path / release, url)
    result = run_command(tmp_path, tmp_path / "cache", "diff", f"{url}@1.0.0", f"{url}@1.1.0", "--json", "--fail-on", "files")
    assert result.returncode == 1, result.stderr
    assert json.loads(result.stdout)["files"]["changed"] == {"config.json": [2, 3]}
    assert "is worse than" in result.stderr and len(result.stderr.splitlines()) == 1


def test_a_signed_release(hub: HubProcess, url: str, tmp_path: Path) -> None:
    signed_round_trip(url, tmp_path)
