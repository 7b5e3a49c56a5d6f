"""pipeline.lock: what builds write into it, what `--locked` refuses, and what faults leave of it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import compiler
from compiler import cpu, plan
from compiler.config import ModelSpec, read
from compiler.errors import LockError
from compiler.hashing import canonical, file_sha256
from compiler.lock import check_lock, lock_path, read_lock, write_lock
from compiler.plan import Plan
from compiler.spine import locked_plans, plan_model
from tests.conftest import Command, error_line, write_pipeline
from tests.test_build import gone, start, wait_for

TEXT = '{"text": "A ship left the port at dawn."}\n' * 3
FIXTURE_TARGETS = {"onnx": ["fp32"]}


@pytest.fixture
def folder(tmp_path: Path, bert: Path) -> Path:
    """A pipeline of one model with its checkpoint and text, and nothing built."""
    shutil.copytree(bert, tmp_path / "checkpoint")
    (tmp_path / "text.jsonl").write_text(TEXT)
    data = {"validation": {"path": "text.jsonl"}}
    write_pipeline(tmp_path, "path:checkpoint", targets=FIXTURE_TARGETS, data=data)
    return tmp_path


def plans(folder: Path) -> list[Plan]:
    return [plan_model(spec, folder) for spec in read(folder / "pipeline.yaml").models]


@pytest.fixture
def lock(folder: Path) -> Path:
    """The pipeline's lock, as a build of it writes it."""
    path = folder / "pipeline.lock"
    write_lock(path, plans(folder))
    return path


def refused(folder: Path) -> str:
    with pytest.raises(LockError) as caught:
        locked_plans(read(folder / "pipeline.yaml"), folder, folder / "pipeline.lock", ())
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{folder}/pipeline.lock: ")
    return message


def add_model(folder: Path, name: str) -> None:
    """Another model in the pipeline, of the same checkpoint."""
    path = folder / "pipeline.yaml"
    text = path.read_text()
    model = text[text.index("- name: tiny") :].split("- name: other")[0]
    path.write_text(text + model.replace("name: tiny", f"name: {name}"))


def test_what_a_lock_holds(folder: Path, lock: Path) -> None:
    content = lock.read_bytes()
    stored = json.loads(content)
    assert content == canonical(stored)
    entry = stored["models"]["tiny 1.0.0"]
    assert entry["files"]["model.safetensors"] == file_sha256(folder / "checkpoint/model.safetensors")
    assert entry["data"] == {"text.jsonl": file_sha256(folder / "text.jsonl")}
    assert entry["python"] == platform.python_version()
    assert entry["cpu"] == cpu.features()
    assert {"torch", "transformers", "onnx", "onnxruntime"} <= set(entry["packages"])
    assert "openvino" not in entry["packages"]
    assert set(entry["code"]) == {"stages", "onnx"}
    assert str(folder) not in content.decode()
    assert locked_plans(read(folder / "pipeline.yaml"), folder, lock, ()) == plans(folder)


def test_an_absolute_source_is_not_told(folder: Path) -> None:
    data = {"validation": {"path": str(folder / "text.jsonl")}}
    write_pipeline(folder, folder / "checkpoint", targets=FIXTURE_TARGETS, data=data)
    write_lock(folder / "pipeline.lock", plans(folder))
    assert str(folder) not in (folder / "pipeline.lock").read_text()
    assert str(folder) not in json.dumps(plans(folder)[0].entry)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda folder: flip(folder / "checkpoint/model.safetensors"), "file model.safetensors "),
        (lambda folder: (folder / "checkpoint/NOTICE").write_text("x"), "file NOTICE none → "),
        (lambda folder: (folder / "text.jsonl").write_text(TEXT + "\n"), "data text.jsonl "),
        (lambda folder: write_pipeline(folder, "path:./checkpoint", targets=FIXTURE_TARGETS), "path:./checkpoint"),
    ],
    ids=["weights", "another file", "data", "source"],
)
def test_another_input(folder: Path, lock: Path, change: Callable[[Path], object], says: str) -> None:
    change(folder)
    message = refused(folder)
    assert "tiny 1.0.0: " in message
    assert says in message
    assert "nothing is built" in message


@pytest.mark.parametrize(
    ("module", "name", "value", "says"),
    [
        (plan, "version", lambda name: "9.9.9", "package accelerate "),
        (platform, "python_version", lambda: "3.99.0", "→ 3.99.0"),
        (cpu, "features", lambda: "x86_64 avx9", "→ x86_64 avx9"),
        (plan, "_code", lambda: "0" * 64, "code of stages "),
        (compiler, "__version__", "99.0.0", "compiler 0.1.0 → 99.0.0"),
    ],
    ids=["package", "python", "cpu", "code", "compiler"],
)
def test_another_environment(
    folder: Path, lock: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, value: object, says: str
) -> None:
    monkeypatch.setattr(module, name, value)
    assert says in refused(folder)


def test_the_first_three_differences_and_how_many_more(folder: Path, lock: Path) -> None:
    stored = json.loads(lock.read_bytes())
    entry = stored["models"]["tiny 1.0.0"]
    entry["packages"] |= {"torch": "2.12.0", "numpy": "1.0", "onnx": "1.0", "tiktoken": "0.1"}
    lock.write_bytes(canonical(stored))
    message = refused(folder)
    assert message.count("→") == 3
    assert "package numpy 1.0 → " in message
    assert " and 1 more; nothing is built" in message


def test_a_release_that_is_not_recorded(folder: Path, lock: Path) -> None:
    write_pipeline(folder, "path:checkpoint", targets=FIXTURE_TARGETS, release="1.1.0")
    message = refused(folder)
    assert "tiny 1.1.0 is not in it; tiny 1.0.0 is no longer in the pipeline; nothing is built" in message


def test_only_compares_that_model(folder: Path) -> None:
    add_model(folder, "other")
    path = folder / "pipeline.lock"
    tiny, other = plans(folder)
    write_lock(path, [tiny])
    pipeline = read(folder / "pipeline.yaml")
    assert locked_plans(pipeline, folder, path, ["tiny"]) == [tiny]
    with pytest.raises(LockError, match=r"other 1\.0\.0 is not in it"):
        locked_plans(pipeline, folder, path, ["other"])
    with pytest.raises(LockError, match=r"other 1\.0\.0 is not in it"):
        check_lock(path, [tiny, other], whole=True)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<<<<<<< ours\n{}",
        b"[]",
        b"\xff",
        b'{"schema": 1}',
        b'{"schema": 1, "models": {"a 1.0.0": {}}}',
        b'{"schema": 1, "models": []}',
    ],
)
def test_a_damaged_lock(folder: Path, content: bytes) -> None:
    (folder / "pipeline.lock").write_bytes(content)
    assert "damaged, or not what a build writes" in refused(folder)
    with pytest.raises(LockError):
        write_lock(folder / "pipeline.lock", plans(folder))
    assert (folder / "pipeline.lock").read_bytes() == content


def test_a_lock_of_another_version(folder: Path) -> None:
    (folder / "pipeline.lock").write_text('{"schema": 2, "models": {}}')
    assert "schema 2, this version reads 1" in refused(folder)


def test_a_folder_in_its_place(folder: Path) -> None:
    (folder / "pipeline.lock").mkdir()
    assert "cannot be read (Is a directory)" in refused(folder)


def test_no_lock(command: Command, folder: Path) -> None:
    for verb in ("build", "plan"):
        line = error_line(command(verb, "--locked"))
        assert "pipeline.lock: no such lock; --locked wants one" in line
    assert not (folder / "artifacts").exists()


def test_each_pipeline_has_a_lock_of_its_own() -> None:
    names = {
        "pipeline.yaml": "pipeline.lock",
        "pipeline-1.1.yaml": "pipeline-1.1.lock",
        "pipeline-1.1": "pipeline-1.1.lock",
        "pipeline-1.2": "pipeline-1.2.lock",
        "pipeline.yml": "pipeline.yml.lock",
        ".yaml": ".lock",
    }
    assert {name: lock_path(Path("models") / name) for name in names} == {
        name: Path("models") / lock for name, lock in names.items()
    }


def test_a_pipeline_called_like_a_lock() -> None:
    with pytest.raises(LockError, match=r"call the pipeline a\.yaml"):
        lock_path(Path("models/a.lock"))


def test_a_build_writes_it_and_the_same_build_passes(command: Command, folder: Path) -> None:
    """A first build, the same again, another output, and another byte of the data."""
    lock = folder / "pipeline.lock"
    add_model(folder, "other")
    assert command("build", "--only", "other").returncode == 0
    assert list(read_lock(lock) or {}) == ["other 1.0.0"]
    assert command("build").returncode == 0
    content, written = lock.read_bytes(), lock.stat()
    assert list(read_lock(lock) or {}) == ["other 1.0.0", "tiny 1.0.0"]
    for arguments in (("build", "--locked"), ("plan", "--locked"), ("build",), ("build", "--locked", "--output", "second")):
        assert command(*arguments).returncode == 0
        assert (lock.stat().st_ino, lock.stat().st_mtime_ns) == (written.st_ino, written.st_mtime_ns)  # not even touched
    # A model that left the pipeline leaves the lock with the next build of all; what a build may not write stays.
    data = {"validation": {"path": "text.jsonl"}}
    write_pipeline(folder, "path:checkpoint", targets=FIXTURE_TARGETS, data=data)
    assert "other 1.0.0 is no longer in the pipeline" in error_line(command("build", "--locked"))
    assert command("build", "--only", "tiny", "--locked").returncode == 0
    assert command("build", "--only", "tiny").returncode == 0
    assert lock.read_bytes() == content
    assert command("build").returncode == 0
    assert list(read_lock(lock) or {}) == ["tiny 1.0.0"]
    # Nothing runs, not even a look at the release, when a byte of the data is another.
    shutil.rmtree(folder / "artifacts")
    (folder / "text.jsonl").write_text(TEXT + "\n")
    before = lock.read_bytes()
    result = command("build", "--locked")
    assert "tiny 1.0.0: data text.jsonl " in error_line(result)
    assert len(result.stderr.splitlines()) == 1
    assert not (folder / "artifacts").exists()
    assert lock.read_bytes() == before
    assert [path.name for path in folder.glob(".*")] == []


def test_a_damaged_lock_stops_a_build_before_it_works(command: Command, folder: Path) -> None:
    (folder / "pipeline.lock").write_text("<<<<<<< ours")
    assert "pipeline.lock: damaged" in error_line(command("build"))
    assert not (folder / "artifacts").exists()


def test_a_model_that_fails_keeps_its_entry(command: Command, folder: Path, lock: Path) -> None:
    """And that of the model before it is written."""
    before = (read_lock(lock) or {})["tiny 1.0.0"]
    text = (folder / "pipeline.yaml").read_text()
    other = text[text.index("- name: tiny") :].replace("name: tiny", "name: other")
    broken = text.replace("path:checkpoint", "path:nowhere")
    (folder / "pipeline.yaml").write_text(broken.replace("- name: tiny", f"{other}- name: tiny"))
    assert "nowhere" in error_line(command("build"))
    after = read_lock(lock) or {}
    assert list(after) == ["other 1.0.0", "tiny 1.0.0"]
    assert after["tiny 1.0.0"] == before


def test_a_lock_that_cannot_be_written(command: Command, tmp_path: Path, folder: Path) -> None:
    """The release stays, is shown, and the error says so."""
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in ("checkpoint", "text.jsonl", "pipeline.yaml"):
        (folder / name).rename(checkout / name)
    (checkout / ".pipeline.lock.new").mkdir()  # as root, no permission would stop it
    result = command("build", "checkout/pipeline.yaml", "--output", "elsewhere")
    line = error_line(result)
    assert "pipeline.lock: cannot be written (Is a directory); tiny 1.0.0 is released and stays" in line
    assert "onnx/model.onnx" in result.stdout
    assert command("verify", "elsewhere/tiny/1.0.0").returncode == 0
    (checkout / ".pipeline.lock.new").rmdir()
    assert command("build", "checkout/pipeline.yaml", "--output", "elsewhere").returncode == 0
    assert (checkout / "pipeline.lock").is_file()


def test_a_full_disk_leaves_the_old_lock(folder: Path, lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = lock.read_bytes()
    (one,) = plans(folder)
    other = replace(one, spec=ModelSpec.model_validate({**one.entry, "name": "other"}))

    def full(descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LockError, match="No space left on device"):
        write_lock(lock, [other])
    assert lock.read_bytes() == before


def test_what_a_killed_build_left_is_taken_over(folder: Path, lock: Path) -> None:
    lock.unlink()
    (folder / ".pipeline.lock.new").write_text("half of a lock, and longer than one " * 1000)
    write_lock(lock, plans(folder))
    assert list(read_lock(lock) or {}) == ["tiny 1.0.0"]
    assert not (folder / ".pipeline.lock.new").exists()


def test_many_at_once_lose_nothing(folder: Path, lock: Path) -> None:
    (one,) = plans(folder)
    specs = [ModelSpec.model_validate({**one.entry, "name": f"model-{number}"}) for number in range(24)]
    writers = [threading.Thread(target=write_lock, args=(lock, [replace(one, spec=spec)])) for spec in specs]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(read_lock(lock) or {}) == 25
    assert not (folder / ".pipeline.lock.new").exists()


def test_two_builds_at_once(folder: Path, shared_cache: Path) -> None:
    add_model(folder, "other")
    environment = {**os.environ, "COMPILE_CACHE_DIR": str(shared_cache)}
    builds = [
        subprocess.Popen(
            [sys.executable, "-m", "compiler", "build", "--only", name],
            cwd=folder,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for name in ("tiny", "other")
    ]
    assert [(build.communicate(timeout=120)[1], build.returncode)[1] for build in builds] == [0, 0]
    assert list(read_lock(folder / "pipeline.lock") or {}) == ["other 1.0.0", "tiny 1.0.0"]


def test_a_killed_build_leaves_the_lock_alone(folder: Path, lock: Path, tmp_path: Path) -> None:
    before = lock.read_bytes()
    (folder / "text.jsonl").write_text(TEXT * 2)
    build = start(folder / "pipeline.yaml", tmp_path / "cache")
    wait_for("load +done", build)
    os.kill(build.pid, signal.SIGKILL)
    build.communicate()
    assert gone(build.pid)
    assert lock.read_bytes() == before


def test_calibration_text_is_locked(folder: Path) -> None:
    lines = [json.dumps({"text": f"line {number} of some text"}) for number in range(40)]
    for name, half in (("more", lines[:16]), ("text", lines[16:])):
        (folder / f"{name}.jsonl").write_text("\n".join(half))
    data = {"validation": {"path": "text.jsonl"}, "calibration": {"path": "more.jsonl", "samples": 16}}
    write_pipeline(folder, "path:checkpoint", targets={"onnx": ["int8"]}, data=data)
    path = folder / "pipeline.lock"
    write_lock(path, plans(folder))
    stored = json.loads(path.read_bytes())["models"]["tiny 1.0.0"]["data"]
    hashes = {name: file_sha256(folder / name) for name in ("text.jsonl", "more.jsonl")}
    assert stored == {"text.jsonl": hashes["text.jsonl"], "calibration more.jsonl": hashes["more.jsonl"]}
    (folder / "more.jsonl").write_text("\n".join([*lines[:15], json.dumps({"text": "another"})]))
    with pytest.raises(LockError, match=r"data calibration more\.jsonl "):
        locked_plans(read(folder / "pipeline.yaml"), folder, path, ())
