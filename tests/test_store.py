"""The stage cache: made once and found again, never trusted unseen, never half there, shared between processes, and clear
about disks that are full or cannot be written."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from compiler.errors import SourceError, StageError
from compiler.hashing import list_files
from compiler.store import ENTRY, SCRATCH, Entry, Step, Store, remove, replace_files, scratch, sweep, write_file, writing

STEP = Step("tiny 1.0.0", "load", "", {"a": "1", "torch": "2"})


class Maker:
    """A `make` that counts."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, out: Path) -> dict[str, Any]:
        self.count += 1
        (out / "inner").mkdir()
        (out / "inner" / "payload").write_bytes(b"content")
        (out / "other").write_bytes(b"")
        return {"answer": [42, None], "pair": (1, 2)}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


@pytest.fixture
def make() -> Maker:
    return Maker()


def leftovers(store: Store) -> list[str]:
    return [path.name for path in store.root.glob(f"{SCRATCH}*")]


class TestStep:
    def test_the_key_is_of_stage_and_inputs_alone(self) -> None:
        assert Step("other", "load", "target", dict(STEP.inputs)).key == STEP.key
        assert Step("tiny 1.0.0", "export", "", STEP.inputs).key != STEP.key
        assert Step("tiny 1.0.0", "load", "", {**STEP.inputs, "b": ""}).key != STEP.key

    def test_the_order_of_inputs_does_not_matter(self) -> None:
        assert Step("", "load", "", {"torch": "2", "a": "1"}).key == STEP.key


class TestHit:
    def test_it_makes_once_and_then_hits(self, store: Store, make: Maker) -> None:
        first, cached = store.get_or_make(STEP, make)
        assert not cached
        second, cached = store.get_or_make(STEP, make)
        assert cached
        assert make.count == 1
        assert first == second
        assert [file.path for file in first.files] == ["inner/payload", "other"]
        assert first.info == {"answer": [42, None], "pair": [1, 2]}
        assert (first.root / "inner/payload").read_bytes() == b"content"
        assert leftovers(store) == []

    def test_another_store_finds_it(self, store: Store, make: Maker) -> None:
        store.get_or_make(STEP, make)
        assert Store(store.root).get_or_make(STEP, make)[1]

    def test_without_the_cache_it_is_made_again(self, store: Store, make: Maker) -> None:
        store.get_or_make(STEP, make)
        _, cached = store.get_or_make(STEP, make, use_cache=False)
        assert not cached
        assert make.count == 2
        assert store.look(STEP) is not None

    def test_other_inputs_are_another_entry(self, store: Store, make: Maker) -> None:
        store.get_or_make(STEP, make)
        assert not store.get_or_make(Step("", "load", "", {"a": "2"}), make)[1]
        assert store.look(STEP) is not None

    def test_look_and_has(self, store: Store, make: Maker) -> None:
        assert store.look(STEP) is None
        assert not store.has(STEP)
        store.get_or_make(STEP, make)
        assert store.has(STEP)

    def test_a_step_that_writes_nothing(self, store: Store) -> None:
        entry, _ = store.get_or_make(STEP, lambda out: {"outputs": {}})
        assert entry.files == ()
        assert store.look(STEP) == entry


def flip_payload(root: Path) -> None:
    (root / "inner/payload").write_bytes(b"cnntent")


def flip_entry(root: Path) -> None:
    (root / ENTRY).write_bytes((root / ENTRY).read_bytes().replace(b"42", b"43"))


def empty_entry(root: Path) -> None:
    (root / ENTRY).write_bytes(b"")


def garbage_entry(root: Path) -> None:
    (root / ENTRY).write_bytes(b"\xff\0")


def list_entry(root: Path) -> None:
    (root / ENTRY).write_text("[]")


def other_keys(root: Path) -> None:
    (root / ENTRY).write_text(json.dumps({**json.loads((root / ENTRY).read_text()), "files": [{"x": 1}]}))


def other_files(root: Path) -> None:
    (root / ENTRY).write_text(json.dumps({**json.loads((root / ENTRY).read_text()), "files": 3}))


def infinite_info(root: Path) -> None:
    (root / ENTRY).write_text((root / ENTRY).read_text().replace("42", "Infinity"))


def deep_entry(root: Path) -> None:
    (root / ENTRY).write_text("[" * 200_000)


def no_entry(root: Path) -> None:
    (root / ENTRY).unlink()


def extra_file(root: Path) -> None:
    (root / "inner/extra").touch()


def missing_file(root: Path) -> None:
    (root / "other").unlink()


def longer_file(root: Path) -> None:
    with open(root / "inner/payload", "ab") as stream:
        stream.write(b"x")


def dead_link(root: Path) -> None:
    (root / "extra").symlink_to("nowhere")


def no_folder(root: Path) -> None:
    remove(root)
    root.write_text("a file where the entry was")


DAMAGES = [
    flip_payload, flip_entry, empty_entry, garbage_entry, list_entry, other_keys, other_files, infinite_info, deep_entry,
    no_entry, extra_file, missing_file, longer_file, dead_link, no_folder,
]  # fmt: skip


class TestDamage:
    @pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
    def test_it_is_made_again(self, store: Store, make: Maker, damage: Callable[[Path], None]) -> None:
        good, _ = store.get_or_make(STEP, make)
        damage(store.path(STEP))
        entry, cached = store.get_or_make(STEP, make)
        assert not cached
        assert make.count == 2
        assert entry == good
        assert store.look(STEP) == good
        assert list_files(entry.root) == [ENTRY, "inner/payload", "other"]

    def test_every_bit_of_the_entry_file(self, store: Store, make: Maker) -> None:
        store.get_or_make(STEP, make)
        path = store.path(STEP) / ENTRY
        content = path.read_bytes()
        for position in range(0, len(content), 5):
            remove(store.path(STEP))
            store.get_or_make(STEP, make)
            changed = bytearray(content)
            changed[position] ^= 1 << position % 8
            path.write_bytes(changed)
            assert store.look(STEP) is None, (position, bytes(changed))
            assert not store.get_or_make(STEP, make)[1]

    def test_an_entry_of_other_inputs_is_not_taken(self, store: Store, make: Maker) -> None:
        """Copied or renamed by hand, an entry is sound in itself but answers another question."""
        store.get_or_make(STEP, make)
        other = Step("", "load", "", {"a": "2"})
        store.path(STEP).rename(store.path(other))
        assert store.look(other) is None

    def test_an_entry_linked_to_elsewhere_leaves_the_other_alone(self, store: Store, make: Maker, tmp_path: Path) -> None:
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        (elsewhere / "precious").write_text("content")
        store.path(STEP).parent.mkdir(parents=True)
        store.path(STEP).symlink_to(elsewhere)
        entry, _ = store.get_or_make(STEP, make)
        assert (elsewhere / "precious").read_text() == "content"
        assert store.look(STEP) == entry


class TestFailure:
    @pytest.mark.parametrize("error", [SourceError("no"), RuntimeError("bug"), KeyboardInterrupt()])
    def test_it_leaves_nothing_behind(self, store: Store, make: Maker, error: BaseException) -> None:
        def failing(out: Path) -> dict[str, Any]:
            (out / "half").write_text("half")
            raise error

        with pytest.raises(type(error)) as caught:
            store.get_or_make(STEP, failing)
        assert caught.value is error
        assert leftovers(store) == []
        assert not store.has(STEP)
        assert not store.path(STEP).exists()
        assert not store.get_or_make(STEP, make)[1]

    def test_what_json_cannot_hold_leaves_nothing_behind(self, store: Store) -> None:
        with pytest.raises(ValueError, match="JSON"):
            store.get_or_make(STEP, lambda out: {"figure": float("nan")})
        assert leftovers(store) == []
        assert not store.path(STEP).exists()

    def test_a_failure_without_the_cache_keeps_the_old_entry(self, store: Store, make: Maker) -> None:
        good, _ = store.get_or_make(STEP, make)

        def failing(out: Path) -> dict[str, Any]:
            raise SourceError("no")

        with pytest.raises(SourceError):
            store.get_or_make(STEP, failing, use_cache=False)
        assert store.look(STEP) == good


def run(*lines: str) -> subprocess.Popen[bytes]:
    program = "\n".join(["from pathlib import Path", "from compiler.store import *", "import os, time", *lines])
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)


def maker(store: Store) -> subprocess.Popen[bytes]:
    """A process that stands inside `make`."""
    lines = (
        "def make(out):",
        "    (out / 'half').write_text('half')",
        "    print('started', flush=True)",
        "    time.sleep(60)",
        f"Store(Path({str(store.root)!r})).get_or_make(Step('m', 'load', '', {dict(STEP.inputs)!r}), make)",
    )
    process = run(*lines)
    assert process.stdout is not None
    assert process.stdout.readline() == b"started\n"
    return process


class TestProcesses:
    def test_a_dead_makers_scratch_folder_is_swept(self, store: Store, make: Maker) -> None:
        process = maker(store)
        assert len(leftovers(store)) == 2
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert len(leftovers(store)) == 2
        assert not store.has(STEP)
        assert not store.get_or_make(STEP, make)[1]  # the lock died with its holder, too
        assert leftovers(store) == []

    def test_a_live_makers_scratch_folder_is_not(self, store: Store, make: Maker) -> None:
        process = maker(store)
        try:
            before = sorted(leftovers(store))
            sweep(store.root)
            store.get_or_make(Step("", "load", "", {"a": "2"}), make)
            assert sorted(leftovers(store)) == before
            assert [path.read_text() for path in store.root.glob(f"{SCRATCH}*/half")] == ["half"]
        finally:
            process.kill()
            process.communicate()

    def test_two_that_ask_at_once_make_once(self, store: Store, tmp_path: Path) -> None:
        count = tmp_path / "count"
        line = f"from tests.jobs import make_slowly; print(make_slowly({str(store.root)!r}, {str(count)!r}, 1))"
        processes = [run(line) for _ in range(3)]
        answers = sorted(process.communicate()[0].strip().decode() for process in processes)
        assert answers == ["False", "True", "True"]
        assert len(count.read_text().splitlines()) == 1
        assert leftovers(store) == []

    def test_many_makers_of_other_keys_do_not_sweep_each_other(self, store: Store, tmp_path: Path) -> None:
        lines = (
            "def make(out):",
            "    time.sleep(0.001)",
            "    (out / 'payload').write_text('content')",
            "    return {}",
            f"store = Store(Path({str(store.root)!r}))",
            "for number in range(40):",
            "    store.get_or_make(Step('m', 'load', '', {'key': f'{os.getpid()} {number}'}), make)",
        )
        processes = [run(*lines) for _ in range(3)]
        assert [process.wait(60) for process in processes] == [0, 0, 0]
        for process in processes:
            process.communicate()
        assert len([path for path in (store.root / "load").iterdir() if path.is_dir()]) == 120
        assert leftovers(store) == []


class TestScratch:
    def test_it_is_gone_at_the_end(self, tmp_path: Path) -> None:
        with scratch(tmp_path / "parent") as folder:
            (folder / "file").touch()
            assert folder.parent == tmp_path / "parent"
        assert list((tmp_path / "parent").iterdir()) == []

    def test_what_was_renamed_stays(self, tmp_path: Path) -> None:
        with scratch(tmp_path) as folder:
            (folder / "file").touch()
            folder.rename(tmp_path / "kept")
        assert list_files(tmp_path) == ["kept/file"]

    def test_sweep_leaves_other_things_alone(self, tmp_path: Path) -> None:
        (tmp_path / "scratch-notes").mkdir()
        (tmp_path / "other.lock").touch()
        sweep(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["other.lock", "scratch-notes"]

    def test_sweep_of_what_is_not_there(self, tmp_path: Path) -> None:
        sweep(tmp_path / "missing")


def test_write_file(tmp_path: Path) -> None:
    write_file(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of that size, mounted on a folder; skips where it may not be mounted."""
    if platform.system() != "Linux" or os.geteuid() != 0:
        pytest.skip("mounting a file system takes root on Linux")
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip("mounting a file system is not permitted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def one_line(caught: pytest.ExceptionInfo[StageError], *words: str) -> None:
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


class TestDisk:
    def test_full_while_making(self, tmp_path: Path) -> None:
        with small_disk(tmp_path / "disk", "256k") as disk:
            store = Store(disk / "cache")

            def big(out: Path) -> dict[str, Any]:
                (out / "payload").write_bytes(b"x" * (1 << 20))
                return {}

            with pytest.raises(StageError) as caught:
                store.get_or_make(STEP, big)
            one_line(caught, str(disk), "no space is left", "make room")
            assert leftovers(store) == []
            assert not store.has(STEP)

    def test_full_before_it_starts(self, tmp_path: Path, make: Maker) -> None:
        with small_disk(tmp_path / "disk", "64k") as disk:
            with contextlib.suppress(OSError):
                (disk / "filler").write_bytes(b"x" * (1 << 20))
            with pytest.raises(StageError) as caught:
                Store(disk / "cache").get_or_make(STEP, make)
            one_line(caught, "no space is left")

    def test_full_keeps_what_is_there(self, tmp_path: Path, make: Maker) -> None:
        with small_disk(tmp_path / "disk", "256k") as disk:
            store = Store(disk / "cache")
            good, _ = store.get_or_make(STEP, make)
            with contextlib.suppress(OSError):
                (disk / "filler").write_bytes(b"x" * (1 << 20))
            with pytest.raises(StageError):
                store.get_or_make(Step("", "load", "", {"a": "2"}), lambda out: {"x": "y" * 8192})
            assert store.look(STEP) == good

    def test_a_cache_below_a_regular_file(self, tmp_path: Path, make: Maker) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(StageError) as caught:
            Store(tmp_path / "file" / "cache").get_or_make(STEP, make)
        one_line(caught, "the cache", str(tmp_path / "file"), "choose a folder that can")
        assert make.count == 0

    def test_a_cache_that_is_a_regular_file(self, tmp_path: Path, make: Maker) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(StageError) as caught:
            Store(tmp_path / "file").get_or_make(STEP, make)
        one_line(caught, "the cache")

    def test_looking_below_a_regular_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        assert Store(tmp_path / "file" / "cache").look(STEP) is None

    def test_a_cache_that_is_read_only(self, tmp_path: Path, make: Maker) -> None:
        with small_disk(tmp_path / "disk", "64k") as disk:
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
            with pytest.raises(StageError) as caught:
                Store(disk / "cache").get_or_make(STEP, make)
            one_line(caught, "the cache", "Read-only")

    @pytest.mark.parametrize("relative", [False, True])
    def test_no_scratch_path_is_told(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relative: bool) -> None:
        with small_disk(tmp_path / "disk", "64k") as disk:
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
            monkeypatch.chdir(disk)
            where = Path() if relative else disk
            with pytest.raises(StageError) as caught, writing(where, "it", "go elsewhere"), scratch(disk):
                raise AssertionError
            assert str(caught.value) == f"it: {where}: cannot be written (Read-only file system); go elsewhere"

    def test_a_mount_point_in_a_renames_way(self, tmp_path: Path) -> None:
        """Also one of the same file system, which looks like any folder until then."""
        for name in ("there", "mount", "made"):
            (tmp_path / name).mkdir()
        if platform.system() != "Linux" or os.geteuid() != 0:
            pytest.skip("mounting takes root on Linux")
        mount = ["mount", "--bind", str(tmp_path / "there"), str(tmp_path / "mount")]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("mounting is not permitted here")
        try:
            with pytest.raises(StageError) as caught, writing(tmp_path, "it"):
                os.rename(tmp_path / "made", tmp_path / "mount")
        finally:
            subprocess.run(["umount", "-l", tmp_path / "mount"], check=True)
        one_line(caught, f"it: {tmp_path}/mount: is a mount point", f"such as {tmp_path}/mount/release")

    def test_replacing_files_is_all_or_nothing(self, tmp_path: Path) -> None:
        with small_disk(tmp_path / "disk", "64k") as disk:
            write_file(disk / "a", b"old")
            with pytest.raises(OSError, match="No space left"):
                replace_files(disk, {"a": b"new", "b": b"x" * 70_000})
            assert {path.name: path.read_bytes() for path in disk.iterdir()} == {"a": b"old"}
            replace_files(disk, {"a": b"new", "b": b"more"})
            assert {path.name: path.read_bytes() for path in disk.iterdir()} == {"a": b"new", "b": b"more"}

    def test_a_compilers_own_error_is_left_alone(self, tmp_path: Path) -> None:
        error = SourceError("own")
        with pytest.raises(SourceError) as caught, writing(tmp_path, "the cache"):
            raise error
        assert caught.value is error

    def test_a_file_that_cannot_be_read_is_not_blamed_on_the_cache(self, store: Store, tmp_path: Path) -> None:
        """An error of a stage's own reading must name what it read."""

        def reading(out: Path) -> dict[str, Any]:
            (tmp_path / "checkpoint" / "config.json").read_bytes()
            return {}

        with pytest.raises(StageError) as caught:
            store.get_or_make(STEP, reading)
        one_line(caught, "config.json")


def test_an_entry_says_what_it_holds(store: Store, make: Maker) -> None:
    """Whoever looks into a cache finds what an entry was made from."""
    entry: Entry = store.get_or_make(STEP, make)[0]
    stored = json.loads((entry.root / ENTRY).read_text())
    assert stored["inputs"] == dict(STEP.inputs)
