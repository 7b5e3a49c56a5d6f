"""file://: releases as plain folders that appear whole, once, whatever happens to who pushes them."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from compiler.cli import cli
from compiler.errors import RegistryError, ReleaseError
from compiler.hashing import list_files
from compiler.manifest import MANIFEST, SIGNATURE
from compiler.registries import connect, filesystem
from compiler.registries.filesystem import ABANDONED_SECONDS, INCOMING
from compiler.stages.publish import alias, pull, push, versions
from compiler.verify import read_release, record_benchmark, verify_files
from tests.registries.conftest import FILES, finish, make_release, one_line, race, signed_round_trip, start
from tests.test_store import small_disk

OTHER = {**FILES, "config.json": b'{"model_type": "other"}\n'}


@pytest.fixture
def release(tmp_path: Path) -> Path:
    make_release(tmp_path / "release")
    return tmp_path / "release"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "registry"


@pytest.fixture
def url(root: Path) -> str:
    return f"file://{root}"


def whole(root: Path) -> list[str]:
    """The versions in a registry's folder, each verified; fails when anything but versions and aliases is left there."""
    found = [version.release for version in versions(f"file://{root}")]
    for name in found:
        verify_files(root / name, read_release(root / name)[0])
    assert set(os.listdir(root)) <= {*found, INCOMING, "aliases"}
    return found


def modes(root: Path) -> dict[str, int]:
    """The permissions of a folder and of all that is in it."""
    return {path.relative_to(root).as_posix(): stat.S_IMODE(path.stat().st_mode) for path in (root, *root.rglob("*"))}


class TestPushAndPull:
    def test_a_published_release_is_a_plain_folder(self, release: Path, root: Path, url: str) -> None:
        published = push(release, url, ["latest"])
        assert published.made
        assert published.moved == ("latest",)
        manifest, _ = read_release(root / "1.0.0")
        verify_files(root / "1.0.0", manifest)
        assert published.version.digest == manifest.identity
        assert list_files(root / "1.0.0") == list_files(release)
        assert list_files(root / INCOMING) == []

    def test_the_same_again_changes_nothing(self, release: Path, root: Path, url: str) -> None:
        push(release, url)
        before = {path: os.stat(root / path).st_ino for path in list_files(root)}
        assert not push(release, url).made
        assert {path: os.stat(root / path).st_ino for path in list_files(root)} == before

    def test_other_content_is_refused(self, release: Path, root: Path, url: str, tmp_path: Path) -> None:
        push(release, url, ["latest"])
        make_release(tmp_path / "other", OTHER)
        before = (root / "1.0.0" / MANIFEST).read_bytes()
        with pytest.raises(RegistryError) as caught:
            push(tmp_path / "other", url, ["prod"])
        one_line(caught, "1.0.0 is published already, with other content", "raise release: in pipeline.yaml")
        assert (root / "1.0.0" / MANIFEST).read_bytes() == before
        assert versions(url)[0].aliases == ("latest",)

    def test_what_comes_back_is_what_was_sent(self, release: Path, url: str, tmp_path: Path) -> None:
        (release / SIGNATURE).write_text("signature")
        push(release, url)
        manifest, made = pull(f"{url}@1.0.0", tmp_path / "out")
        assert made
        assert list_files(tmp_path / "out") == list_files(release)
        assert all((tmp_path / "out" / path).read_bytes() == (release / path).read_bytes() for path in list_files(release))
        assert pull(f"{url}@sha256:{manifest.identity}", tmp_path / "out") == (manifest, False)

    def test_a_release_that_changed_is_not_published(self, release: Path, root: Path, url: str) -> None:
        """It is hashed while it is sent; what was sent of it cannot be seen."""
        (release / "onnx/model.onnx").write_bytes(b"onnX " * 2000)
        with pytest.raises(ReleaseError) as caught:
            push(release, url)
        one_line(caught, "onnx/model.onnx is not what the manifest says")
        assert whole(root) == []

    def test_a_file_too_many_is_not_published(self, release: Path, root: Path, url: str) -> None:
        (release / "more").touch()
        with pytest.raises(ReleaseError) as caught:
            push(release, url)
        one_line(caught, "more is not in the manifest")
        assert not root.exists()

    def test_a_damaged_release_is_told_of_although_it_is_published(self, release: Path, url: str) -> None:
        push(release, url)
        (release / "config.json").write_bytes(b'{"model_type": "berT"}\n')
        with pytest.raises(ReleaseError) as caught:
            push(release, url)
        one_line(caught, "config.json is changed")

    def test_a_damaged_version_is_in_no_others_way(self, release: Path, root: Path, url: str, tmp_path: Path) -> None:
        push(release, url)
        (root / "1.0.0" / MANIFEST).unlink()
        (root / "1.0.0" / MANIFEST).write_bytes(b"{}")
        make_release(tmp_path / "next", release="1.1.0")
        assert push(tmp_path / "next", url).made

    def test_versions_by_precedence(self, root: Path, url: str, tmp_path: Path) -> None:
        order = ["0.9.0", "1.0.0-alpha", "1.0.0-alpha.1", "1.0.0-alpha.beta", "1.0.0-beta.2", "1.0.0-beta.11", "1.0.0-rc.1"]
        order += ["1.0.0", "1.2.0", "1.10.0", "10.0.0"]
        for name in reversed(order):
            make_release(root / name, {"config.json": b"{}"}, release=name)
        assert [version.release for version in versions(url)] == order

    def test_a_folder_with_odd_letters(self, release: Path, tmp_path: Path) -> None:
        push(release, f"file://{tmp_path}/a b%20c")
        assert (tmp_path / "a b c" / "1.0.0" / MANIFEST).is_file()

    def test_a_relative_folder(self) -> None:
        with pytest.raises(RegistryError) as caught:
            connect("file://srv/models")
        one_line(caught, "file:///srv/models/minilm")

    def test_a_name_with_a_null_byte(self) -> None:
        with pytest.raises(RegistryError) as caught:
            connect("file:///srv/a%00b")
        one_line(caught, "file://", "control character")

    @pytest.mark.parametrize(("umask", "pulled"), [(0o022, 0o644), (0o077, 0o600), (0o000, 0o666)])
    def test_what_is_published_is_read_only(
        self, release: Path, root: Path, url: str, tmp_path: Path, umask: int, pulled: int
    ) -> None:
        """Whatever the umask, and also for what an earlier push has sent; what is pulled belongs to who pulled it."""
        before = os.umask(umask)
        try:
            TestKilled.interrupted(release, root, url)
            seen: list[dict[str, int]] = []
            with pytest.MonkeyPatch.context() as patch:
                rename = os.rename

                def look(source: Path, target: Path) -> None:
                    seen.append(modes(source))
                    rename(source, target)

                patch.setattr(os, "rename", look)
                push(release, url, ["latest"])
            pull(url, tmp_path / "out")
        finally:
            os.umask(before)
        published = modes(root / "1.0.0")
        assert {published[path] for path in list_files(release)} == {0o444}
        assert {published[path] for path in set(published) - set(list_files(release))} == {0o755}
        assert seen == [published]  # before the release can be seen
        assert stat.S_IMODE((root / "aliases/latest").stat().st_mode) == 0o644
        assert {modes(tmp_path / "out")[path] for path in list_files(release)} == {pulled}
        assert CliRunner().invoke(cli, ["verify", str(root / "1.0.0")]).exit_code == 0
        assert whole(root) == ["1.0.0"]

    def test_a_disk_without_modes(self, release: Path, root: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(path: Path, mode: int) -> None:
            raise PermissionError(1, "Operation not permitted", str(path))

        monkeypatch.setattr(Path, "chmod", refuse)
        assert push(release, url, ["latest"]).made
        assert whole(root) == ["1.0.0"]


class TestAliases:
    def test_they_move_and_nothing_else_does(self, release: Path, root: Path, url: str, tmp_path: Path) -> None:
        make_release(tmp_path / "next", release="1.1.0")
        push(release, url, ["latest", "prod"])
        assert push(tmp_path / "next", url, ["latest"]).version.aliases == ("latest",)
        assert pull(url, tmp_path / "one")[0].release == "1.1.0"
        assert pull(f"{url}@prod", tmp_path / "two")[0].release == "1.0.0"
        assert alias(f"{url}@latest", "prod")[1]
        assert not alias(f"{url}@1.1.0", "prod")[1]
        assert [version.aliases for version in versions(url)] == [(), ("latest", "prod")]
        assert (root / "aliases/prod").read_text() == "1.1.0\n"

    @pytest.mark.parametrize("name", ["1.0.0", "", "../x", ".hidden", "a/b", "sha256:00", "-x", "a b"])
    def test_what_is_no_alias(self, release: Path, root: Path, url: str, name: str) -> None:
        with pytest.raises(RegistryError):
            push(release, url, [name])
        assert not root.exists()

    def test_racing_ones_always_name_a_version(self, release: Path, root: Path, url: str, tmp_path: Path) -> None:
        make_release(tmp_path / "next", release="1.1.0")
        push(release, url, ["latest"])
        push(tmp_path / "next", url)
        registry = connect(url)
        done = threading.Event()

        def move(version: str) -> None:
            found = registry.resolve(version)
            assert found is not None
            while not done.is_set():
                registry.alias("latest", found)

        movers = [threading.Thread(target=move, args=(version,)) for version in ("1.0.0", "1.1.0")]
        for mover in movers:
            mover.start()
        try:
            seen: set[str] = set()
            deadline = time.monotonic() + 20
            while len(seen) < 2 and time.monotonic() < deadline:
                found = registry.resolve("latest")
                assert found is not None
                seen.add(found.release)
        finally:
            done.set()
            for mover in movers:
                mover.join()
        assert seen == {"1.0.0", "1.1.0"}
        assert os.listdir(root / "aliases") == ["latest"]

    def test_one_that_names_nothing(self, release: Path, root: Path, url: str) -> None:
        push(release, url, ["latest"])
        shutil.rmtree(root / "1.0.0")
        with pytest.raises(RegistryError) as caught:
            connect(url).resolve("latest")
        one_line(caught, "latest names 1.0.0, which is not there")
        (root / "aliases/latest").write_text("../../etc/passwd\n")
        with pytest.raises(RegistryError) as caught:
            connect(url).resolve("latest")
        one_line(caught, "alias latest", "names no version", "compile alias")

    @pytest.mark.parametrize("kind", ["text", "folder", "link", "pipe", "socket"])
    def test_what_is_none_is_in_the_way_of_nothing_else(
        self, release: Path, root: Path, url: str, tmp_path: Path, kind: str
    ) -> None:
        push(release, url, ["latest"])
        stray = root / "aliases/README"
        if kind == "text":
            stray.write_text("hello\n")
        elif kind == "folder":
            stray.mkdir()
        elif kind == "link":
            stray.symlink_to("latest")
        elif kind == "pipe":
            os.mkfifo(stray)
        else:
            os.mknod(stray, stat.S_IFSOCK | 0o644)
        assert [version.aliases for version in versions(url)] == [("latest",)]
        assert pull(f"{url}@1.0.0", tmp_path / "out")[1]
        assert pull(url, tmp_path / "latest")[1]
        make_release(tmp_path / "next", release="1.1.0")
        assert push(tmp_path / "next", url, ["latest"]).made
        assert alias(f"{url}@1.0.0", "prod")[1]
        with pytest.raises(RegistryError) as caught:
            pull(f"{url}@README", tmp_path / "none")
        one_line(caught, "alias README", "names no version", f"compile alias {url}@1.0.0 README")
        if kind != "folder":
            assert alias(f"{url}@1.0.0", "README")[1]
            assert pull(f"{url}@README", tmp_path / "out") == (read_release(release)[0], False)


class TestAtOnce:
    def test_the_same_content(self, release: Path, root: Path, url: str, tmp_path: Path) -> None:
        answers = race(tmp_path, *[f"print(push(Path({str(release)!r}), {url!r}).made)"] * 3)
        assert sorted(answer.split()[0] for answer in answers) == ["False", "False", "True"]
        assert whole(root) == ["1.0.0"]
        assert list_files(root / INCOMING) == []

    def test_other_content(self, release: Path, root: Path, url: str, tmp_path: Path) -> None:
        make_release(tmp_path / "other", OTHER)
        answers = race(tmp_path, *(f"push(Path({str(path)!r}), {url!r})" for path in (release, tmp_path / "other") * 2))
        published = read_release(root / "1.0.0")[0].identity
        won = [read_release(path)[0].identity == published for path in (release, tmp_path / "other") * 2]
        assert [answer == "won" for answer in answers] == won, answers
        assert all("with other content" in answer for answer in answers if answer != "won"), answers
        assert whole(root) == ["1.0.0"]
        assert list_files(root / INCOMING) == []


class TestKilled:
    @pytest.mark.parametrize("sent", [0, 2, 5])
    def test_a_push_is_taken_up_again(self, release: Path, root: Path, url: str, sent: int) -> None:
        """kill -9 after some files: nothing can be seen, and what was sent whole is the very file that is published later."""
        lines = (
            "from compiler.registries import filesystem",
            "put, left = filesystem._put, [" + str(sent) + "]",
            "def counted(*arguments):",
            "    if not left[0]: die()",
            "    left[0] -= 1",
            "    put(*arguments)",
            "filesystem._put = counted",
            "filesystem.ThreadPoolExecutor = lambda: __import__('concurrent.futures').futures.ThreadPoolExecutor(1)",
            "filesystem.write_file = lambda *_: die()",
            f"push(Path({str(release)!r}), {url!r})",
        )
        finish(start(*lines), code=-signal.SIGKILL)
        assert whole(root) == []
        assert connect(url).resolve("1.0.0") is None
        (staged,) = (root / INCOMING).glob("*/whole")
        there = {path: os.stat(staged / path).st_ino for path in list_files(staged)}
        assert len(there) == sent
        assert push(release, url).made
        assert {path: os.stat(root / "1.0.0" / path).st_ino for path in there} == there
        assert whole(root) == ["1.0.0"]
        assert list_files(root / INCOMING) == []

    def test_in_the_middle_of_a_file(self, release: Path, root: Path, url: str) -> None:
        lines = (
            "from compiler import hashing",
            "hashing.sync = lambda stream: (stream.truncate(7), die())",
            f"push(Path({str(release)!r}), {url!r})",
        )
        finish(start(*lines), code=-signal.SIGKILL)
        assert whole(root) == []
        assert push(release, url).made
        assert whole(root) == ["1.0.0"]

    def test_right_after_the_rename(self, release: Path, root: Path, url: str) -> None:
        lines = (
            "rename = os.rename",
            "os.rename = lambda *names: (rename(*names), die())",
            f"push(Path({str(release)!r}), {url!r})",
        )
        finish(start(*lines), code=-signal.SIGKILL)
        assert whole(root) == ["1.0.0"]
        assert not push(release, url, ["latest"]).made

    def test_what_was_sent_is_hashed_before_it_is_believed(self, release: Path, root: Path, url: str) -> None:
        key = self.interrupted(release, root, url)
        staged = root / INCOMING / key / "whole/torchscript/model.pt"
        staged.write_bytes(b"x" * staged.stat().st_size)
        assert push(release, url).made
        assert whole(root) == ["1.0.0"]

    def test_a_link_that_was_put_there_is_not_published(self, release: Path, root: Path, url: str) -> None:
        key = self.interrupted(release, root, url)
        for path in ("config.json", "onnx"):
            staged = root / INCOMING / key / "whole" / path
            staged.rename(root.parent / path)
            staged.symlink_to(root.parent / path)
        assert push(release, url).made
        assert whole(root) == ["1.0.0"]

    def test_what_does_not_belong_there_is_left_out(self, release: Path, root: Path, url: str) -> None:
        key = self.interrupted(release, root, url)
        (root / INCOMING / key / "whole/more").touch()
        (root / INCOMING / key / "part/more").touch()
        assert push(release, url).made
        assert whole(root) == ["1.0.0"]

    def test_what_nobody_takes_up_is_removed(self, release: Path, root: Path, url: str, tmp_path: Path) -> None:
        self.interrupted(release, root, url)
        make_release(tmp_path / "other", OTHER)
        shutil.rmtree(release)
        make_release(tmp_path / "next", release="1.1.0")
        push(tmp_path / "next", url)
        (left,) = (path for path in (root / INCOMING).iterdir() if path.is_dir())
        old = time.time() - ABANDONED_SECONDS - 60
        os.utime(left, (old, old))
        push(tmp_path / "other", url)
        assert list((root / INCOMING).iterdir()) == []

    def test_what_another_push_removes_meanwhile(
        self, release: Path, root: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What was listed is gone when it is looked at."""
        self.interrupted(release, root, url)
        make_release(tmp_path / "next", release="1.1.0")
        listed = Path.iterdir

        def gone(folder: Path) -> Iterator[Path]:
            for path in list(listed(folder)):
                if folder.name == INCOMING and path.is_dir():
                    shutil.rmtree(path)
                yield path

        monkeypatch.setattr(Path, "iterdir", gone)
        assert push(tmp_path / "next", url).made

    @staticmethod
    def interrupted(release: Path, root: Path, url: str) -> str:
        """Leave a push behind that sent all files; the folder that they are in."""
        line = f"push(Path({str(release)!r}), {url!r})"
        finish(start("from compiler.registries import filesystem", "filesystem.write_file = lambda *_: die()", line), code=-9)
        (folder,) = (path for path in (root / INCOMING).iterdir() if path.is_dir())
        return folder.name


class TestFolder:
    def test_full_while_pushing(self, release: Path, tmp_path: Path) -> None:
        with small_disk(tmp_path / "disk", "128k") as disk:
            filler = disk / "filler"
            filler.write_bytes(b"x" * 90_000)
            url = f"file://{disk}/registry"
            with pytest.raises(RegistryError) as caught:
                push(release, url)
            one_line(caught, "no space is left", "push again")
            assert versions(url) == ()
            filler.unlink()
            assert push(release, url).made
            assert whole(disk / "registry") == ["1.0.0"]

    def test_one_that_is_a_file(self, release: Path, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        for url in (f"file://{tmp_path}/file", f"file://{tmp_path}/file/below"):
            with pytest.raises(RegistryError) as caught:
                push(release, url)
            one_line(caught, "choose a folder")

    def test_one_that_is_read_only(self, release: Path, tmp_path: Path) -> None:
        with small_disk(tmp_path / "disk", "1m") as disk:
            push(release, f"file://{disk}")
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
            assert not push(release, f"file://{disk}").made
            with pytest.raises(RegistryError) as caught:
                alias(f"file://{disk}@1.0.0", "latest")
            one_line(caught, "Read-only")

    @pytest.mark.parametrize("kind", ["file", "folder", "link", "renamed", "damaged"])
    def test_what_is_in_the_way(self, release: Path, root: Path, url: str, kind: str, tmp_path: Path) -> None:
        root.mkdir()
        target = root / "1.0.0"
        if kind == "file":
            target.touch()
        elif kind == "folder":
            (target / "inner").mkdir(parents=True)
        elif kind == "link":
            target.symlink_to(release)
        elif kind == "renamed":
            make_release(target, release="2.0.0")
        else:
            make_release(target)
            (target / MANIFEST).write_bytes((target / MANIFEST).read_bytes().replace(b"BertModel", b"BertMode1"))
        before = list_files(root)
        for work in (lambda: push(release, url), lambda: versions(url), lambda: pull(f"{url}@1.0.0", tmp_path / "out")):
            with pytest.raises(RegistryError) as caught:
                work()
            one_line(caught, str(target))
        assert list_files(root) == before

    def test_an_empty_place(self, url: str, tmp_path: Path) -> None:
        assert versions(url) == ()
        with pytest.raises(RegistryError) as caught:
            pull(url, tmp_path / "out")
        one_line(caught, "has no latest; nothing is published there")

    def test_a_benchmark_that_was_recorded_meanwhile(self, release: Path, root: Path, url: str) -> None:
        """It is no part of what a release is: the version is the same, and stays as it was published."""
        push(release, url)
        record_benchmark(release, {"threads": 2})
        assert not push(release, url).made
        assert read_release(root / "1.0.0")[0].benchmark is None


def test_nothing_is_sent_while_the_lock_is_held(release: Path, root: Path, url: str) -> None:
    """Of two that push the same content, the second waits for the first and uses what it sent."""
    lines = (
        "from compiler.registries import filesystem",
        "write = filesystem.write_file",
        "filesystem.write_file = lambda *given: (print('holding', flush=True), time.sleep(1), write(*given))",
        f"print(push(Path({str(release)!r}), {url!r}).made)",
    )
    first = start(*lines)
    assert first.stdout is not None
    assert first.stdout.readline() == "holding\n"
    copied: list[Path] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filesystem, "copy", lambda source, target: copied.append(source))
        assert not push(release, url).made
    assert finish(first) == ["True"]
    assert copied == []


def test_a_signed_release(url: str, tmp_path: Path) -> None:
    signed_round_trip(url, tmp_path)
