"""A release appears whole or not at all, holds what was hashed before, and any later change of it is found and named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compiler.bom import BOM
from compiler.errors import ReleaseError, StageError
from compiler.hashing import canonical, digest, hash_file, hash_folder, list_files
from compiler.manifest import MANIFEST, SAMPLES, SIGNATURE, SUMS, VALIDATION, Manifest, Source, from_bytes, sums
from compiler.provenance import PROVENANCE
from compiler.stages.package import package
from compiler.store import Entry, scratch
from compiler.types import Artifact, File, Signature, Tensor
from compiler.verify import read_release, record_benchmark, verify_files, verify_sums
from tests.test_store import small_disk

VALIDATED = {
    "schema": 1,
    "data": {"name": "lines.jsonl", "sha256": "d" * 64, "lines": 3},
    "calibration": {"name": "more.jsonl", "sha256": "e" * 64, "samples": 2, "held": 0},
    "cpu": "avx2",
    "threads": 1,
    "artifacts": [
        {
            "format": "onnx",
            "precision": "fp32",
            "checks": [{"output": "logits", "name": "cosine", "figure": 1.0, "limit": 0.9, "passed": True, "worst": "sample"}],
        }
    ],
}


class Parts:
    """What a release is made of: a checkpoint's files, an artifact in a cache entry, and samples."""

    def __init__(self, folder: Path, size: int = 64) -> None:
        self.checkpoint, self.cache = folder / "checkpoint", folder / "cache"
        self.output = folder / "artifacts"
        self.target = self.output / "tiny" / "1.0.0"
        for path, content in {
            self.checkpoint / "config.json": b'{"model_type": "bert"}',
            self.checkpoint / "1_Pooling" / "config.json": b"{}",
            self.checkpoint / "empty.txt": b"",
            self.cache / "export" / "onnx" / "model.onnx": b"onnx" * size,
            self.cache / "export" / "onnx" / "model.onnx.data": b"data" * size,
            self.cache / "load" / "samples.safetensors": b"samples" * 4,
            self.cache / "load" / "support" / "tokenizer.json": b'{"own": 1}',
        }.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        self.entry = Entry(self.cache / "export", "a" * 64, hash_folder(self.cache / "export"), {})
        self.artifact = Artifact("onnx", "fp32", self.entry.files, {"threads": 1}, self.entry.key, 18)
        names = ("config.json", "1_Pooling/config.json", "empty.txt")
        self.support: list[tuple[Path, File]] = [(self.checkpoint, hash_file(self.checkpoint, name)) for name in names]
        self.support.append((self.cache / "load", hash_file(self.cache / "load", "support/tokenizer.json")))

    def manifest(self) -> Manifest:
        tensor = Tensor("logits", "float32", ("batch", 3))
        return Manifest(
            name="tiny",
            release="1.0.0",
            task="text-classification",
            architecture="BertForSequenceClassification",
            source=Source("path:checkpoint", None, None, tuple(file for _, file in self.support[:3])),
            entry={"name": "tiny", "release": "1.0.0"},
            signature=Signature((Tensor("input_ids", "int64", ("batch", "sequence")),), (tensor,)),
            positions=64,
            left_out=(),
            artifacts=(self.artifact,),
            files=(),
            libraries={},
            python="3.11",
            compiler="0.1.0",
            steps={},
            key="b" * 64,
            refused={},
        )

    def package(self, validation: dict[str, Any] = VALIDATED) -> Manifest:
        with scratch(self.output) as aside:
            samples = (self.cache / "load", hash_file(self.cache / "load", "samples.safetensors"))
            made = [(self.artifact, self.entry)]
            return package(aside, self.target, self.manifest(), made, self.support, samples, validation)


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    return Parts(tmp_path)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parts = Parts(tmp_path_factory.mktemp("original"))
    parts.package()
    return parts.target


@pytest.fixture
def release(tmp_path: Path, original: Path) -> Path:
    """A release of its own for a test that damages it."""
    shutil.copytree(original, tmp_path / "release")
    return tmp_path / "release"


def verify(path: Path) -> None:
    manifest, _ = read_release(path)
    verify_files(path, manifest)


def refused(path: Path, *words: str) -> None:
    with pytest.raises(ReleaseError) as caught:
        verify(path)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


FILES = (
    "1_Pooling/config.json",
    "config.json",
    "empty.txt",
    "onnx/model.onnx",
    "onnx/model.onnx.data",
    "tokenizer.json",
    BOM,
    PROVENANCE,
    VALIDATION,
    SAMPLES,
)


class TestRelease:
    def test_it_holds_everything_and_nothing_else(self, parts: Parts) -> None:
        whole = parts.package()
        assert list_files(parts.target) == sorted([*FILES, MANIFEST, SUMS])
        assert [file.path for file in whole.every_file] == sorted(FILES)
        assert list_files(parts.output) == sorted(f"tiny/1.0.0/{name}" for name in (*FILES, MANIFEST, SUMS))

    def test_every_file_is_as_it_was(self, parts: Parts) -> None:
        parts.package()
        assert (parts.target / "config.json").read_bytes() == (parts.checkpoint / "config.json").read_bytes()
        assert (parts.target / "onnx/model.onnx").read_bytes() == b"onnx" * 64
        assert (parts.target / "tokenizer.json").read_bytes() == b'{"own": 1}'
        assert json.loads((parts.target / VALIDATION).read_bytes()) == VALIDATED

    def test_the_manifest_on_disk_is_the_one_returned(self, parts: Parts) -> None:
        whole = parts.package()
        assert from_bytes((parts.target / MANIFEST).read_bytes(), "x") == whole
        assert whole.artifacts == (parts.artifact,)

    def test_it_verifies(self, release: Path) -> None:
        verify(release)
        _, (report,) = read_release(release)
        assert report.passed
        assert report.figure("cosine") == 1

    def test_the_same_parts_give_the_same_bytes(self, tmp_path: Path) -> None:
        for name in ("one", "two"):
            Parts(tmp_path / name).package()
        one, two = (hash_folder(tmp_path / name / "artifacts") for name in ("one", "two"))
        assert one == two

    def test_it_names_no_path_of_this_machine(self, release: Path) -> None:
        here = str(release.parent.parent).encode()
        assert [name for name in list_files(release) if here in (release / name).read_bytes()] == []

    def test_sha256sum_reads_the_sums(self, release: Path) -> None:
        """Of every file but the sums themselves, manifest.json included."""
        checked = subprocess.run(
            ["sha256sum", "--check", "--strict", SUMS], cwd=release, capture_output=True, text=True, check=True
        )
        assert sorted(checked.stdout.splitlines()) == sorted(f"{name}: OK" for name in (*FILES, MANIFEST))

    def test_linked_files_of_a_checkpoint_become_files(self, parts: Parts) -> None:
        """As in a hub's cache."""
        path = parts.checkpoint / "config.json"
        path.rename(parts.checkpoint / "blob")
        path.symlink_to(parts.checkpoint / "blob")
        parts.package()
        assert not (parts.target / "config.json").is_symlink()
        verify(parts.target)


class TestNotAtAll:
    def refused(self, parts: Parts, *words: str) -> None:
        with pytest.raises(StageError) as caught:
            parts.package()
        message = str(caught.value)
        assert "\n" not in message
        assert all(word in message for word in words), message
        assert not parts.target.exists()
        assert list_files(parts.output) == []

    @pytest.mark.parametrize("content", [b'{"model_type": "bort"}', b"", b'{"model_type": "bert"}\n'])
    def test_a_source_file_that_changed(self, parts: Parts, content: bytes) -> None:
        (parts.checkpoint / "config.json").write_bytes(content)
        self.refused(parts, "config.json", "changed while the build ran", "build again")

    def test_an_artifact_that_changed(self, parts: Parts) -> None:
        path = parts.entry.root / "onnx/model.onnx"
        path.write_bytes(b"x" + path.read_bytes()[1:])
        self.refused(parts, "model.onnx", "changed")

    def test_a_source_file_that_is_gone(self, parts: Parts) -> None:
        (parts.checkpoint / "config.json").unlink()
        self.refused(parts, "config.json")

    def test_a_target_whose_parent_is_a_file(self, parts: Parts) -> None:
        parts.output.mkdir()
        (parts.output / "tiny").touch()
        with pytest.raises(StageError) as caught:
            parts.package()
        assert "packaging" in str(caught.value)
        assert list_files(parts.output) == ["tiny"]

    def test_two_files_of_one_name(self, parts: Parts) -> None:
        parts.support.append(parts.support[0])
        self.refused(parts, "config.json")

    @pytest.mark.parametrize("name", ["a\nb.json", "a\\b.json", f"{SUMS}/config.json", f"{SIGNATURE}/config.json"])
    def test_a_name_that_no_release_can_hold(self, parts: Parts, name: str) -> None:
        (parts.checkpoint / name).parent.mkdir(exist_ok=True)
        (parts.checkpoint / name).write_bytes(b"{}")
        parts.support.append((parts.checkpoint, hash_file(parts.checkpoint, name)))
        self.refused(parts, "cannot be a name in a release", "rename")

    @pytest.mark.parametrize("name", [BOM, PROVENANCE, VALIDATION])
    def test_a_file_in_the_place_of_one_of_ours(self, parts: Parts, name: str) -> None:
        (parts.checkpoint / name).write_bytes(b"{}")
        parts.support.append((parts.checkpoint, hash_file(parts.checkpoint, name)))
        self.refused(parts, name, "the release's own")

    def test_a_figure_that_is_not_a_number(self, parts: Parts) -> None:
        with pytest.raises(ValueError, match="JSON"):
            parts.package({**VALIDATED, "figure": float("nan")})
        assert list_files(parts.output) == []

    def test_a_release_that_is_there_is_never_replaced(self, parts: Parts) -> None:
        parts.package()
        before = hash_folder(parts.target)
        with pytest.raises(StageError):
            parts.package({**VALIDATED, "other": 1})
        assert hash_folder(parts.target) == before


def test_a_full_disk(tmp_path: Path) -> None:
    parts = Parts(tmp_path, size=100_000)
    with small_disk(tmp_path / "disk", "512k") as disk:
        parts.output, parts.target = disk / "artifacts", disk / "artifacts" / "tiny" / "1.0.0"
        with pytest.raises(StageError) as caught:
            parts.package()
        message = str(caught.value)
        assert "\n" not in message
        assert "no space is left" in message
        assert "packaging" in message
        assert not parts.target.exists()
        assert list_files(disk) == []


class TestDamage:
    @pytest.mark.parametrize("name", [name for name in FILES if name != "empty.txt"])
    def test_a_flipped_byte(self, release: Path, name: str) -> None:
        content = bytearray((release / name).read_bytes())
        content[len(content) // 2] ^= 1
        (release / name).write_bytes(content)
        refused(release, name)

    @pytest.mark.parametrize("name", [name for name in FILES if name != VALIDATION])
    def test_a_flipped_byte_is_called_changed(self, release: Path, name: str) -> None:
        (release / name).write_bytes(b"x" + (release / name).read_bytes()[1:])
        refused(release, f"{name} is changed", "do not use this release")

    def test_every_byte_of_the_manifest(self, release: Path) -> None:
        content = (release / MANIFEST).read_bytes()
        for position in range(0, len(content), 23):
            changed = bytearray(content)
            changed[position] ^= 1 << position % 8
            (release / MANIFEST).write_bytes(changed)
            refused(release, MANIFEST)

    @pytest.mark.parametrize("name", [*FILES, MANIFEST, SUMS])
    def test_a_file_cut_off_or_longer(self, release: Path, name: str) -> None:
        content = (release / name).read_bytes()
        (release / name).write_bytes(content + b" ")
        refused(release, name)
        if content:
            (release / name).write_bytes(content[:-1])
            refused(release, name)

    def test_every_byte_of_the_sums(self, release: Path) -> None:
        content = (release / SUMS).read_bytes()
        for position in range(len(content)):
            changed = bytearray(content)
            changed[position] ^= 1 << position % 8
            (release / SUMS).write_bytes(changed)
            refused(release, SUMS)

    @pytest.mark.parametrize("change", [lambda lines: lines[1:], lambda lines: [*lines, lines[0]], lambda lines: lines[::-1]])
    def test_other_lines_in_the_sums(self, release: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
        lines = (release / SUMS).read_bytes().splitlines(keepends=True)
        (release / SUMS).write_bytes(b"".join(change(lines)))
        refused(release, f"{SUMS} is changed")

    @pytest.mark.parametrize("name", [SUMS, SIGNATURE])
    def test_what_is_no_file_beside_the_manifest(self, release: Path, tmp_path: Path, name: str) -> None:
        (tmp_path / "other").write_bytes(b"x")
        (release / name).unlink(missing_ok=True)
        (release / name).symlink_to(tmp_path / "other")
        refused(release, f"{name} is a link")
        (release / name).unlink()
        os.mkfifo(release / name)
        refused(release, name)

    @pytest.mark.parametrize("name", [*FILES, MANIFEST, SUMS])
    def test_a_missing_file(self, release: Path, name: str) -> None:
        (release / name).unlink()
        refused(release, name)

    @pytest.mark.parametrize("name", ["extra.txt", "onnx/extra", ".hidden", "new/folder/file"])
    def test_a_file_too_many(self, release: Path, name: str) -> None:
        (release / name).parent.mkdir(parents=True, exist_ok=True)
        (release / name).touch()
        refused(release, f"{name} is not in the manifest")

    @pytest.mark.parametrize("name", FILES)
    def test_a_link_in_a_files_place(self, release: Path, tmp_path: Path, name: str) -> None:
        (release / name).rename(tmp_path / "moved")
        (release / name).symlink_to(tmp_path / "moved")
        refused(release, f"{name} is a link")

    def test_a_link_in_the_manifests_place(self, release: Path, tmp_path: Path) -> None:
        (release / MANIFEST).rename(tmp_path / "moved")
        (release / MANIFEST).symlink_to(tmp_path / "moved")
        refused(release, MANIFEST)

    def test_a_linked_folder(self, release: Path, tmp_path: Path) -> None:
        (release / "onnx").rename(tmp_path / "moved")
        (release / "onnx").symlink_to(tmp_path / "moved")
        refused(release, "onnx")

    def test_a_folder_in_a_files_place(self, release: Path) -> None:
        (release / "config.json").unlink()
        (release / "config.json").mkdir()
        refused(release, "config.json is missing")

    @pytest.mark.parametrize("make", [os.mkfifo], ids=["fifo"])
    def test_what_is_no_file_does_not_hang(self, release: Path, make: Callable[[Path], None]) -> None:
        (release / "config.json").unlink()
        make(release / "config.json")
        refused(release, "config.json")

    def test_two_files_swapped(self, release: Path, tmp_path: Path) -> None:
        one, other = release / "onnx/model.onnx", release / "onnx/model.onnx.data"
        one.rename(tmp_path / "moved")
        other.rename(one)
        (tmp_path / "moved").rename(other)
        refused(release, "model.onnx is changed", "model.onnx.data is changed")

    def test_many_problems_are_counted(self, release: Path) -> None:
        for number in range(5):
            (release / f"extra{number}").touch()
        refused(release, "extra0", "extra2", "and 2 more")

    @pytest.mark.parametrize("path", ["missing", "file"])
    def test_what_is_no_release(self, tmp_path: Path, path: str) -> None:
        (tmp_path / "file").touch()
        refused(tmp_path / path, str(tmp_path / path), "no such release")

    def test_an_empty_folder(self, tmp_path: Path) -> None:
        refused(tmp_path, MANIFEST)


BENCHMARK = {"rounds": 1}


class TestRecord:
    """`bench --record` writes two files of a release: either both are there, or it is said which is behind."""

    def recorded(self, release: Path) -> object:
        return from_bytes((release / MANIFEST).read_bytes(), "x").benchmark

    def test_it_still_verifies(self, release: Path) -> None:
        for rounds in (1, 2):
            record_benchmark(release, {"rounds": rounds})
            verify(release)
            assert self.recorded(release) == {"rounds": rounds}
            subprocess.run(["sha256sum", "--check", "--strict", "--quiet", SUMS], cwd=release, check=True)
        assert [name for name in list_files(release.parent) if not name.startswith("release/")] == []

    def test_of_another_versions_manifest_it_changes_nothing_else(self, release: Path) -> None:
        """Which knew fewer fields: the digest says what the release is, and stays."""
        old = json.loads((release / MANIFEST).read_bytes())
        del old["digest"], old["schema"], old["artifacts"][0]["fast_on"]
        content = canonical({**old, "digest": digest(old)})
        (release / MANIFEST).write_bytes(content)
        (release / SUMS).write_bytes(sums(from_bytes(content, "x"), content))
        for rounds in (1, 2):
            record_benchmark(release, {"rounds": rounds})
            verify(release)
            recorded = json.loads((release / MANIFEST).read_bytes())
            assert recorded.pop("benchmark")["rounds"] == rounds
            assert canonical(recorded) == content

    @pytest.mark.parametrize("renames", [0, 1])
    def test_one_that_is_cut_off(self, release: Path, monkeypatch: pytest.MonkeyPatch, renames: int) -> None:
        rename = os.replace
        done: list[Path] = []

        def stop(source: Path, target: Path) -> None:
            if len(done) == renames:
                raise KeyboardInterrupt
            done.append(target)
            rename(source, target)

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(os, "replace", stop)
            record_benchmark(release, BENCHMARK)
        if renames:
            refused(release, f"{SUMS} is of another {MANIFEST}", "bench --record", "run it again")
        else:
            verify(release)
        manifest, _ = read_release(release)
        verify_files(release, manifest, recording=True)
        record_benchmark(release, BENCHMARK)
        verify(release)

    def test_one_that_is_killed(self, release: Path) -> None:
        """Between writing and renaming."""
        for name in (MANIFEST, SUMS):
            (release / f".{name}.new").write_bytes(b"half of it")
        refused(release, f".{MANIFEST}.new is not in the manifest (bench --record", "run it again")
        manifest, _ = read_release(release)
        verify_files(release, manifest, recording=True)
        record_benchmark(release, BENCHMARK)
        verify(release)

    def test_where_the_release_is_a_mount_point(self, release: Path, tmp_path: Path) -> None:
        with small_disk(tmp_path / "disk", "1m") as disk:
            shutil.copytree(release, disk, dirs_exist_ok=True)
            record_benchmark(disk, BENCHMARK)
            verify(disk)
            assert self.recorded(disk) == BENCHMARK
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
            with pytest.raises(StageError) as caught:
                record_benchmark(disk, BENCHMARK)
            where = "copy the release to where you can write, and record there"
            assert str(caught.value) == f"the manifest: {disk}: cannot be written (Read-only file system); {where}"

    def test_recording_overlooks_nothing_else(self, release: Path) -> None:
        manifest, _ = read_release(release)
        content = (release / SUMS).read_bytes()
        (release / SUMS).write_bytes(content.replace(b"  config.json", b"  konfig.json"))
        with pytest.raises(ReleaseError, match=f"{SUMS} is changed"):
            verify_files(release, manifest, recording=True)
        (release / SUMS).unlink()
        with pytest.raises(ReleaseError, match=f"{SUMS} is missing"):
            verify_files(release, manifest, recording=True)

    def test_a_full_disk_changes_nothing(self, release: Path, tmp_path: Path) -> None:
        with small_disk(tmp_path / "disk", "64k") as disk:
            shutil.copytree(release, disk / "release")
            with pytest.raises(StageError, match="no space is left"):
                record_benchmark(disk / "release", {"text": "x" * 70_000})
            verify(disk / "release")
            assert self.recorded(disk / "release") is None


def test_sums_of_a_pulled_release(release: Path) -> None:
    """Where every file was hashed while it came, what says so is held against the manifest alone."""
    manifest, _ = read_release(release)
    verify_sums(release, manifest)
    assert (release / SUMS).read_bytes() == sums(manifest, (release / MANIFEST).read_bytes())
    (release / SUMS).write_bytes(b"")
    with pytest.raises(ReleaseError, match=f"{SUMS} is changed"):
        verify_sums(release, manifest)
    (release / SUMS).unlink()
    with pytest.raises(ReleaseError, match=f"{SUMS} is missing"):
        verify_sums(release, manifest)
