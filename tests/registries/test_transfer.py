"""What every registry's transfers share: hostile and damaged releases, full disks, killed pulls, and trying again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from compiler.errors import CompileError, RegistryError, ReleaseError, StageError
from compiler.hashing import hash_file, list_files
from compiler.manifest import MANIFEST, SUMS, VALIDATION
from compiler.registries import connect, precedence
from compiler.registries.transfer import DELAYS, SMALL_BYTES, FaultError, retrying
from compiler.stages.publish import pull
from compiler.types import File
from compiler.verify import read_release, verify_files
from tests.conftest import seal
from tests.registries.conftest import finish, make_release, manifest_of, one_line, start
from tests.test_store import small_disk


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A registry's folder with a sound release in it."""
    make_release(tmp_path / "deep/registry/1.0.0")
    return tmp_path / "deep/registry"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "mine").mkdir()
    return tmp_path / "mine/out"


def refused(root: Path, target: Path, reference: str = "1.0.0") -> str:
    """The one line that a pull fails with. Fails when it wrote anything to anywhere."""
    top = root.parent.parent
    before = list_files(top)
    with pytest.raises(CompileError) as caught:
        pull(f"file://{root}@{reference}", target)
    assert list_files(top) == before
    assert os.listdir(target.parent) == []
    return one_line(caught)


def rewrite(root: Path, *files: File) -> None:
    """Exchange the manifest for a whole one that names these files as well."""
    folder = root / "1.0.0"
    own = tuple(hash_file(folder, path) for path in list_files(folder) if path not in (MANIFEST, SUMS))
    seal(folder, manifest_of((*own, *files)))


EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


class TestHostileManifest:
    @pytest.mark.parametrize(
        "path",
        [
            "../outside",
            "../../mine/outside",
            "onnx/../../outside",
            "/outside-of-a-release",
            "//outside",
            "..",
            ".",
            "",
            "onnx/./x",
            "onnx//x",
            "x/",
            "..\\outside",
            "C:outside",
            "nul\x00byte",
        ],
    )
    def test_a_path_that_leads_out(self, root: Path, target: Path, path: str) -> None:
        rewrite(root, File(path, EMPTY, 0))
        assert "which is no name of a file in a release" in refused(root, target)

    @pytest.mark.parametrize("path", [MANIFEST, SUMS, "model.sig"])
    def test_a_file_that_covers_the_manifest(self, root: Path, target: Path, path: str) -> None:
        rewrite(root, File(path, EMPTY, 0))
        assert f"names {path!r}, which is no name of a file in a release" in refused(root, target)

    def test_a_file_named_twice(self, root: Path, target: Path) -> None:
        rewrite(root, hash_file(root / "1.0.0", "config.json"))
        assert "names a file twice" in refused(root, target)

    def test_a_file_below_a_file(self, root: Path, target: Path) -> None:
        rewrite(root, File("config.json/x", EMPTY, 0))
        assert "config.json" in refused(root, target)

    def test_names_that_differ_by_case(self, root: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Two files here; where a disk takes them for one, the release is refused rather than one of them lost."""
        (root / "1.0.0/Config.json").write_bytes(b"other")
        rewrite(root)
        with monkeypatch.context() as patch:
            patch.setattr(
                "os.path.lexists",
                lambda path: (
                    Path(path).parent.is_dir()
                    and Path(path).name.lower() in {name.lower() for name in os.listdir(Path(path).parent)}
                ),
            )
            assert "another file's name on this disk" in refused(root, target)
        pull(f"file://{root}@1.0.0", target)
        assert (target / "Config.json").read_bytes() == b"other"
        assert (target / "config.json").read_bytes() != b"other"

    @pytest.mark.parametrize("size", [10**15, 10**18, 10**400])
    def test_a_huge_size(self, root: Path, target: Path, size: int) -> None:
        rewrite(root, File("huge", EMPTY, size))
        (root / "1.0.0/huge").touch()
        assert "no space is left" in refused(root, target)

    @pytest.mark.parametrize("size", [-1, 5000, 1])
    def test_another_size(self, root: Path, target: Path, size: int) -> None:
        found = hash_file(root / "1.0.0", "config.json")
        (root / "1.0.0/more").write_bytes((root / "1.0.0/config.json").read_bytes())
        rewrite(root)
        content = (root / "1.0.0" / MANIFEST).read_bytes()
        manifest = manifest_of(
            tuple(
                File("more", found.sha256, size) if path == "more" else hash_file(root / "1.0.0", path)
                for path in list_files(root / "1.0.0")
                if path not in (MANIFEST, SUMS)
            )
        )
        seal(root / "1.0.0", manifest)
        assert content != (root / "1.0.0" / MANIFEST).read_bytes()
        assert "more" in refused(root, target)

    def test_one_that_was_touched(self, root: Path, target: Path) -> None:
        content = (root / "1.0.0" / MANIFEST).read_bytes()
        (root / "1.0.0" / MANIFEST).write_bytes(content.replace(b"BertModel", b"EvilModel"))
        assert "changed since it was written" in refused(root, target)

    def test_one_that_never_ends(self, root: Path, target: Path) -> None:
        with open(root / "1.0.0" / MANIFEST, "r+b") as stream:
            stream.truncate(SMALL_BYTES + 1)
        assert "larger than any that a push writes" in refused(root, target)

    def test_another_sound_one_after_it_was_resolved(self, root: Path, target: Path) -> None:
        registry = connect(f"file://{root}")
        version = registry.resolve("1.0.0")
        assert version is not None
        shutil.rmtree(root / "1.0.0")
        make_release(root / "1.0.0", {"config.json": b"{}"})
        target.mkdir()
        with pytest.raises(ReleaseError) as caught:
            registry.pull(version, target)
        one_line(caught, "holds another manifest than its name says")
        assert os.listdir(target) == []


class TestHostileFolder:
    @pytest.mark.parametrize("kind", ["file", "folder", "manifest", "sums", "device", "pipe", "gone"])
    def test_a_link_in_the_registry(self, root: Path, target: Path, tmp_path: Path, kind: str) -> None:
        """Links to the very same content, a device that never ends, a pipe that never answers: none of them is followed."""
        release = root / "1.0.0"
        path = {"folder": "onnx", "manifest": MANIFEST, "sums": SUMS}.get(kind, "config.json")
        shutil.move(release / path, tmp_path / "elsewhere")
        if kind == "device":
            (release / path).symlink_to("/dev/zero")
        elif kind == "pipe":
            os.mkfifo(release / path)
        elif kind == "gone":
            (release / path).symlink_to(tmp_path / "nowhere")
        else:
            (release / path).symlink_to(tmp_path / "elsewhere")
        assert path in refused(root, target)

    def test_a_link_in_the_target_is_not_written_through(self, root: Path, tmp_path: Path) -> None:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(CompileError):
            pull(f"file://{root}@1.0.0", tmp_path / "out")
        assert os.listdir(tmp_path / "elsewhere") == []


class TestDamage:
    @pytest.mark.parametrize(
        ("damage", "says"),
        [
            (lambda path: path.write_bytes(b"onnX " * 2000), "onnx/model.onnx is not what the manifest says"),
            (lambda path: path.write_bytes(b"onnx " * 1999), "onnx/model.onnx ends after 9995 of 10000 bytes"),
            (lambda path: path.write_bytes(b"onnx " * 2001), "onnx/model.onnx is not what the manifest says"),
            (lambda path: path.unlink(), "onnx/model.onnx is missing"),
            (lambda path: (path.unlink(), path.mkdir()), "onnx/model.onnx is no file"),
        ],
        ids=["changed", "shorter", "longer", "missing", "folder"],
    )
    def test_a_file(self, root: Path, target: Path, damage: Callable[[Path], object], says: str) -> None:
        damage(root / "1.0.0/onnx/model.onnx")
        assert says in refused(root, target)

    def test_a_record_of_the_checks(self, root: Path, target: Path) -> None:
        """Sound by its hash, and yet no release: the pull does not appear."""
        (root / "1.0.0" / VALIDATION).write_bytes(b"{}")
        rewrite(root)
        assert "validation.json: not what a build writes" in refused(root, target)


class TestTarget:
    def test_full(self, root: Path, tmp_path: Path) -> None:
        with small_disk(tmp_path / "disk", "128k") as disk:
            (disk / "filler").write_bytes(b"x" * 100_000)
            with pytest.raises(StageError) as caught:
                pull(f"file://{root}@1.0.0", disk / "out")
            one_line(caught, "no space is left", str(disk))
            assert os.listdir(disk) == ["filler"]
            (disk / "filler").unlink()
            assert pull(f"file://{root}@1.0.0", disk / "out")[1]

    def test_full_in_the_middle(self, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Another program takes the space after it was looked for."""
        with small_disk(tmp_path / "disk", "64k") as disk:
            (disk / "filler").write_bytes(b"x" * 40_000)
            monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1 << 40))
            with pytest.raises(StageError) as caught:
                pull(f"file://{root}@1.0.0", disk / "out")
            one_line(caught, "no space is left")
            assert os.listdir(disk) == ["filler"]

    def test_something_else_is_there(self, root: Path, target: Path) -> None:
        target.mkdir()
        (target / "file").write_text("precious")
        with pytest.raises(RegistryError) as caught:
            pull(f"file://{root}@1.0.0", target)
        one_line(caught, "is there already and is not 1.0.0; give another folder")
        assert (target / "file").read_text() == "precious"

    def test_another_version_is_there(self, root: Path, target: Path) -> None:
        make_release(root / "1.1.0", release="1.1.0")
        pull(f"file://{root}@1.1.0", target)
        with pytest.raises(RegistryError):
            pull(f"file://{root}@1.0.0", target)
        assert read_release(target)[0].release == "1.1.0"

    def test_the_same_is_there_and_is_damaged(self, root: Path, target: Path) -> None:
        pull(f"file://{root}@1.0.0", target)
        (target / "config.json").write_text("{}")
        with pytest.raises(ReleaseError) as caught:
            pull(f"file://{root}@1.0.0", target)
        one_line(caught, "config.json is changed")

    def test_an_empty_folder_is_taken(self, root: Path, target: Path) -> None:
        target.mkdir()
        assert pull(f"file://{root}@1.0.0", target)[1]
        verify_files(target, read_release(target)[0])

    def test_below_a_file(self, root: Path, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(StageError) as caught:
            pull(f"file://{root}@1.0.0", tmp_path / "file/below/out")
        one_line(caught, "cannot be written")

    @pytest.mark.parametrize("chunks", [0, 3])
    def test_killed(self, root: Path, target: Path, chunks: int) -> None:
        """kill -9 in the middle: nothing is there under its name; the next pull clears away what is left, and is whole."""
        lines = (
            "from compiler.registries import filesystem",
            "read, left = filesystem.Folder._chunks, [" + str(chunks) + "]",
            "def counted(*given):",
            "    if not left[0]: die()",
            "    left[0] -= 1",
            "    yield from read(*given)",
            "filesystem.Folder._chunks = counted",
            f"pull('file://{root}@1.0.0', Path({str(target)!r}))",
        )
        finish(start(*lines), code=-signal.SIGKILL)
        assert not target.exists()
        assert len(os.listdir(target.parent)) == 2
        assert pull(f"file://{root}@1.0.0", target)[1]
        verify_files(target, read_release(target)[0])
        assert os.listdir(target.parent) == ["out"]

    def test_two_at_once(self, root: Path, target: Path) -> None:
        """The slower one finds the other's release, whole and the same."""
        lines = (
            "import compiler.stages.publish as publish",
            "read = publish.read_release",
            "publish.read_release = lambda path: (print('fetched', flush=True), input(), read(path))[2]",
            f"print(pull('file://{root}@1.0.0', Path({str(target)!r}))[1])",
        )
        slow = start(*lines, stdin=subprocess.PIPE)
        assert slow.stdout is not None
        assert slow.stdout.readline() == "fetched\n"
        assert pull(f"file://{root}@1.0.0", target)[1]
        stdout, stderr = slow.communicate("\n\n", timeout=60)
        assert (stdout.split()[-1], slow.returncode) == ("False", 0), stderr
        assert os.listdir(target.parent) == ["out"]


class TestRetrying:
    def test_it_tries_again_and_gives_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        paused: list[float] = []
        monkeypatch.setattr("time.sleep", paused.append)
        tried = []

        def work() -> int:
            tried.append(1)
            raise FaultError("reset")

        with pytest.raises(RegistryError) as caught:
            retrying(work, lambda fault: RegistryError(f"gone: {fault}"))
        one_line(caught, "gone: reset")
        assert len(tried) == len(DELAYS) + 1
        assert all(delay / 2 <= pause <= delay for delay, pause in zip(DELAYS, paused, strict=True))

    def test_it_returns_the_first_success(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("time.sleep", lambda _: None)
        answers = [FaultError("1"), FaultError("2"), 3]

        def work() -> object:
            answer = answers.pop(0)
            if isinstance(answer, FaultError):
                raise answer
            return answer

        assert retrying(work, lambda fault: RegistryError(str(fault))) == 3
        assert answers == []


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ("1.0.0-alpha", "1.0.0-alpha.1"),
        ("1.0.0-alpha.1", "1.0.0-alpha.beta"),
        ("1.0.0-alpha.beta", "1.0.0-beta"),
        ("1.0.0-beta.2", "1.0.0-beta.11"),
        ("1.0.0-beta.11", "1.0.0-rc.1"),
        ("1.0.0-rc.1", "1.0.0"),
        ("1.0.0", "1.0.1-0"),
        ("1.9.9", "1.10.0"),
        ("1.0.0-9", "1.0.0-a"),
        ("1.0.0--", "1.0.0-0a"),
    ],
)
def test_precedence(older: str, newer: str) -> None:
    """The order that semver.org's eleventh point gives."""
    assert precedence(older) < precedence(newer)
