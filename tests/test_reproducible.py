"""The same pipeline gives the same bytes wherever, whenever and by whomever it is built; and `verify --rebuild` proves it."""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compiler.bom import BOM
from compiler.errors import ConfigError, StageError
from compiler.hashing import file_sha256, hash_file
from compiler.manifest import MANIFEST, Made, Manifest, from_bytes
from compiler.provenance import PROVENANCE
from compiler.rebuild import _data_folder, _lasting, rebuild
from compiler.types import Signature
from tests.conftest import Command, build_folder, error_line, seal, write_pipeline
from tests.hub import Hub
from tests.zoo import save_checkpoint

ALL_TARGETS = {"torchscript": ["fp32", "bf16"], "onnx": ["fp32"], "openvino": ["fp32", "bf16"]}
TEXT = "".join(f'{{"text": "A ship of {number} sails left the port at dawn."}}\n' for number in range(9))
# What two builds differ in, beside their folders, caches, times, and what `elsewhere` adds.
FIRST = {
    "PYTHONHASHSEED": "1",
    "TZ": "Asia/Tokyo",
    "LC_ALL": "C",
    "LANG": "C",
    "USER": "first-builder",
    "LOGNAME": "first-builder",
    "HOSTNAME": "first-machine",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "SOURCE_DATE_EPOCH": "86400",
}
SECOND = {
    "PYTHONHASHSEED": "4242",
    "TZ": "America/St_Johns",
    "LC_ALL": "de_DE.UTF-8",
    "LANG": "tr_TR.UTF-8",
    "USER": "second-builder",
    "LOGNAME": "second-builder",
    "HOSTNAME": "second-machine",
    "OMP_NUM_THREADS": "3",
    "MKL_NUM_THREADS": "2",
    "OMP_DYNAMIC": "TRUE",
    "SOURCE_DATE_EPOCH": "1700000000",
}
OTHER = 65534  # nobody
HOST = "second-machine-of-all"


def works(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def elsewhere() -> list[str]:
    """A command's beginning that runs it with one core and, as far as this machine lets us, as another user on another host.
    The other user may read and write everywhere, so that it finds this interpreter wherever that is."""
    prefix = ["taskset", "--cpu-list", str(min(os.sched_getaffinity(0)))]
    named = ["unshare", "--uts", "sh", "-c", f'hostname {HOST} && exec "$@"', "sh"]
    other = [
        f"--reuid={OTHER}",
        f"--regid={OTHER}",
        "--clear-groups",
        "--inh-caps=+dac_override",
        "--ambient-caps=+dac_override",
    ]
    if os.geteuid() == 0:
        for more in (named, ["setpriv", *other]):
            if works(*prefix, *more, "true"):
                prefix += more
    return prefix


class Builds:
    """Two builds of one pipeline that differ in all that must not matter."""

    def __init__(self, root: Path, checkpoint: Path) -> None:
        self.root = root
        self.one = self.build("one", checkpoint, 3, 0o077, FIRST, [])
        self.two = self.build("two/deeper/a folder", checkpoint, 1, 0o002, SECOND, elsewhere())

    def build(
        self, name: str, checkpoint: Path, jobs: int, umask: int, environment: dict[str, str], prefix: list[str]
    ) -> Path:
        folder = self.root / name
        shutil.copytree(checkpoint, folder / "checkpoint")
        (folder / "text.jsonl").write_text(TEXT)
        for path in folder.rglob("*"):
            os.utime(path, (jobs * 10**9 // 2, jobs * 10**9 // 2))
        for inner in ("home", "temporary"):
            (folder / inner).mkdir()
        pipeline = write_pipeline(folder, "path:checkpoint", targets=ALL_TARGETS, data={"validation": {"path": "text.jsonl"}})
        if "setpriv" in prefix:
            for path in (self.root, *self.root.rglob("*")):
                if path == self.root or folder in (path, *path.parents):
                    os.chown(path, OTHER, OTHER)
        result = subprocess.run(
            [*prefix, sys.executable, "-m", "compiler", "build", str(pipeline), "--jobs", str(jobs)],
            cwd=self.root if jobs == 1 else folder,
            env={
                **os.environ,
                **environment,
                "HOME": str(folder / "home"),
                "TMPDIR": str(folder / "temporary"),
                "COMPILE_CACHE_DIR": str(folder / "cache"),
                "PYTHONPATH": str(Path(__file__).parents[1]),
            },
            umask=umask,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return folder

    @property
    def releases(self) -> tuple[Path, Path]:
        return self.one / "artifacts/tiny/1.0.0", self.two / "artifacts/tiny/1.0.0"


@pytest.fixture(scope="module")
def builds(bert: Path) -> Iterator[Builds]:
    # Not below pytest's own folder, which only its user may enter.
    root = Path(tempfile.mkdtemp(prefix="compile-test-"))
    try:
        yield Builds(root, bert)
    finally:
        shutil.rmtree(root)


def files(release: Path) -> dict[str, bytes]:
    return {path.relative_to(release).as_posix(): path.read_bytes() for path in release.rglob("*") if path.is_file()}


def test_every_byte_is_the_same(builds: Builds) -> None:
    one, two = (files(release) for release in builds.releases)
    assert len(one) > 12
    assert sorted(one) == sorted(two)
    assert [name for name in one if one[name] != two[name]] == []


def test_the_locks_are_the_same(builds: Builds) -> None:
    assert (builds.one / "pipeline.lock").read_bytes() == (builds.two / "pipeline.lock").read_bytes()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can build as another user")
def test_the_second_builder_was_another(builds: Builds) -> None:
    """Or the comparison would say nothing of it."""
    owners = {path.stat().st_uid for release in builds.releases for path in release.rglob("*")}
    assert owners == {0, OTHER}


def test_nothing_tells_where_when_or_by_whom(builds: Builds) -> None:
    today = datetime.datetime.now(datetime.UTC)
    forbidden = [str(builds.root), str(Path(__file__).parents[1]), sys.prefix, tempfile.gettempdir() + "/", HOST]
    forbidden += [f"{which}-{what}" for which in ("first", "second") for what in ("builder", "machine")]
    forbidden += [f"{today - datetime.timedelta(days=days):%Y-%m-%d}" for days in (0, 1)]
    forbidden += [socket.gethostname()] if len(socket.gethostname()) > 5 else []
    for release in builds.releases:
        for name, content in files(release).items():
            found = [text for text in forbidden if text.encode() in content]
            assert found == [], name
            if name.endswith(".pt"):
                with zipfile.ZipFile(release / name) as archive:
                    assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> Path:
    """A folder with a checkpoint, a text, a pipeline and a release. Read only: `release` copies it."""
    folder = tmp_path_factory.mktemp("built")
    (folder / "text.jsonl").write_text(TEXT)
    return build_folder(folder, bert, data={"validation": {"path": "text.jsonl"}})


@pytest.fixture
def release(tmp_path: Path, built: Path) -> Path:
    for name in ("checkpoint", "artifacts"):
        shutil.copytree(built / name, tmp_path / name)
    shutil.copy(built / "text.jsonl", tmp_path)
    return tmp_path / "artifacts/tiny/1.0.0"


def edit(release: Path, change: Callable[[Manifest], Manifest]) -> None:
    """Change a release's manifest, with the digest that belongs to it."""
    manifest = from_bytes((release / MANIFEST).read_bytes(), "")
    seal(release, change(manifest))


def made_with(**inputs: str) -> Callable[[Manifest], Manifest]:
    """A manifest whose load step has other inputs."""

    def change(manifest: Manifest) -> Manifest:
        load = manifest.steps["load"]
        return replace(manifest, steps={**manifest.steps, "load": Made(load.key, {**load.inputs, **inputs})})

    return change


def test_rebuild(command: Command, tmp_path: Path, release: Path) -> None:
    """A release says all that it takes to build it again, wherever it lies and without its pipeline."""
    before = files(release)
    moved = release.rename(tmp_path / "fetched")
    cache = tmp_path / "cache"
    result = command("verify", moved, "--rebuild", "--json", cache=cache)
    assert result.returncode == 0, result.stderr
    assert re.search("export torchscript fp32 +done", result.stderr)
    assert json.loads(result.stdout)["rebuild"] is True
    assert files(moved) == before
    assert [path.name for path in cache.iterdir()] == []  # it read no cache, and left nothing there
    assert not (tmp_path / "pipeline.lock").exists()


def test_rebuild_under_default_limits(command: Command, tmp_path: Path, bert: Path) -> None:
    """Also under those of what this task has no figure of, which a manifest's entry holds beside the others."""
    built = build_folder(tmp_path / "low", bert, targets={"openvino": ["fp32", "bf16"]})
    result = command("verify", built / "artifacts/tiny/1.0.0", "--rebuild")
    assert result.returncode == 0, result.stderr


def test_rebuild_names_what_differs(command: Command, tmp_path: Path, release: Path) -> None:
    """A sound release whose manifest fits, that was not made from the checkpoint it names."""
    flip(release / "torchscript/model.pt")
    swapped = hash_file(release, "torchscript/model.pt")
    edit(release, lambda old: replace(old, artifacts=(replace(old.artifacts[0], files=(swapped,)),)))
    assert command("verify", release).returncode == 0
    result = command("verify", release, "--rebuild", cache=tmp_path / "cache")
    kept = tmp_path / "cache/rebuild/tiny/1.0.0"
    assert "2 of 9 files come out different" in error_line(result)
    assert error_line(result).endswith(f": compile diff {release} {kept}")
    assert "torchscript/model.pt" in command("diff", release, kept).stdout
    assert [line for line in result.stdout.splitlines() if line.startswith("differs")] == [
        "differs  manifest.json",
        "differs  torchscript/model.pt",
    ]


def test_rebuild_in_another_environment(command: Command, release: Path) -> None:
    edit(release, made_with(torch="2.12.0", cpu="x86_64 avx2"))
    torch = from_bytes((release / MANIFEST).read_bytes(), "").libraries["torch"].partition("+")[0]
    for name in (BOM, PROVENANCE):  # which name it too
        content = (release / name).read_text()
        assert torch in content
        (release / name).write_text(content.replace(torch, "2.12.0"))
    edit(release, lambda old: replace(old, files=tuple(hash_file(release, file.path) for file in old.files)))
    assert command("verify", release).returncode == 0
    line = error_line(command("verify", release, "--rebuild"))
    assert "torch 2.12.0 → 2." in line
    assert "cpu x86_64 avx2 → " in line
    assert "give --any-environment" in line
    result = command("verify", release, "--rebuild", "--any-environment")
    assert result.returncode == 0, result.stderr
    assert "6 files are the same bytes; not compared, since they record another environment: " in result.stdout
    assert result.stdout.endswith(f": {BOM}, {PROVENANCE}, and libraries, python, compiler, steps, key of {MANIFEST}\n")
    # What the manifest says of the model is the same everywhere.
    edit(release, lambda old: replace(old, positions=8192))
    result = command("verify", release, "--rebuild", "--any-environment")
    assert "1 of 6 files come out different" in error_line(result)
    assert f"differs  {MANIFEST}\n" in result.stdout


@pytest.mark.parametrize(
    ("same", "change"),
    [
        (True, lambda old: replace(old, libraries={}, python="4", compiler="0", steps={}, key="", benchmark={"rounds": 1})),
        (True, lambda old: replace(old, artifacts=(replace(old.artifacts[0], key=""),))),
        (False, lambda old: replace(old, artifacts=(replace(old.artifacts[0], runtime={}),))),
        (False, lambda old: replace(old, signature=Signature((), ()))),
        (False, lambda old: replace(old, architecture="GPT")),
        (False, lambda old: replace(old, left_out=("pooler", "head"))),
    ],
)
def test_what_of_a_manifest_is_the_same_everywhere(built: Path, same: bool, change: Callable[[Manifest], Manifest]) -> None:
    manifest = from_bytes((built / "artifacts/tiny/1.0.0" / MANIFEST).read_bytes(), "")
    assert (_lasting(manifest) == _lasting(change(manifest))) is same


def test_a_rebuild_that_fails_before_it_writes(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: object) -> object:
        raise StageError("the first thing that was done failed")

    monkeypatch.setattr("compiler.rebuild.build_model", fail)
    release = built / "artifacts/tiny/1.0.0"
    manifest = from_bytes((release / MANIFEST).read_bytes(), "")
    options = {"trust_remote_code": False, "allow_pickle": False}
    with pytest.raises(StageError, match="the first thing that was done failed"):
        rebuild(release, manifest, tmp_path, lambda event: None, None, built, options, any_environment=True)


def test_rebuild_wants_the_same_text(command: Command, tmp_path: Path, release: Path) -> None:
    text = tmp_path / "text.jsonl"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(text, elsewhere)
    text.write_text(TEXT.replace("dawn", "noon"))
    assert "text.jsonl: is not the validation text" in error_line(command("verify", release, "--rebuild"))
    text.unlink()
    assert "the validation text is not there; give --folder" in error_line(command("verify", release, "--rebuild"))
    # Found again, it is told what else is wrong.
    edit(release, made_with(torch="2.12.0"))
    assert "another environment" in error_line(command("verify", release, "--rebuild", "--folder", elsewhere))


def test_rebuild_wants_the_same_checkpoint(command: Command, tmp_path: Path, release: Path) -> None:
    flip(tmp_path / "checkpoint/model.safetensors")
    assert "is not the checkpoint that this release was made from" in error_line(command("verify", release, "--rebuild"))
    (tmp_path / "checkpoint").rename(tmp_path / "moved")
    flip(tmp_path / "moved/model.safetensors")
    assert "give --source" in error_line(command("verify", release, "--rebuild"))
    # Found again, it is told what else is wrong.
    edit(release, made_with(torch="2.12.0"))
    assert "another environment" in error_line(command("verify", release, "--rebuild", "--source", "path:moved"))


def test_rebuild_does_not_run_code_unasked(command: Command, release: Path) -> None:
    edit(release, made_with(trust_remote_code="True"))
    assert "then give --trust-remote-code" in error_line(command("verify", release, "--rebuild"))


def test_rebuild_of_an_entry_that_this_version_does_not_know(command: Command, release: Path) -> None:
    edit(release, lambda old: replace(old, entry={**old.entry, "targets": {"future": ["fp4"]}}))
    line = error_line(command("verify", release, "--rebuild"))
    assert "this version cannot build its entry again: targets.future" in line


def test_a_rebuild_that_fails_keeps_its_log(command: Command, tmp_path: Path, release: Path) -> None:
    """Nothing meets this limit, so the rebuild does not get as far as comparing."""
    impossible: dict[str, Any] = {"fp32": {"max_abs": 1e-30}}
    edit(release, lambda old: replace(old, entry={**old.entry, "budget": impossible}))
    line = error_line(command("verify", release, "--rebuild", "--any-environment", cache=tmp_path / "cache"))
    assert "max_abs" in line
    kept = tmp_path / "cache/rebuild/tiny/1.0.0"
    assert f"what failed is in {kept}/failed" in line
    assert (kept / "build.log").is_file()
    assert (kept / "failed/torchscript/model.pt").is_file()


def test_options_of_a_rebuild_alone(command: Command, release: Path) -> None:
    for option in ("--any-environment", f"--folder={release}"):
        result = command("verify", release, option)
        assert result.returncode == 2
        assert "is for --" in result.stderr


def test_rebuild_from_a_hub_asks_for_the_recorded_commit(command: Command, tmp_path: Path, bert: Path) -> None:
    """Where the branch that was built has moved on, and then where the hub is gone."""
    with Hub() as hub:
        content = {path.name: path.read_bytes() for path in bert.iterdir()}
        commit = hub.add("org/tiny", content, branches=["main"])
        environment = hub.environment(tmp_path)
        pipeline = write_pipeline(tmp_path, "hf:org/tiny@main")
        built = command(pipeline, environment=environment)
        assert built.returncode == 0, built.stderr
        release = tmp_path / "artifacts/tiny/1.0.0"
        assert json.loads((tmp_path / "pipeline.lock").read_text())["models"]["tiny 1.0.0"]["revision"] == commit
        hub.add("org/tiny", {**content, "README.md": b"Read this."}, branches=["main"])
        line = error_line(command("build", "--locked", environment=environment))
        assert f"tiny 1.0.0: revision {commit} → " in line
    result = command("verify", release, "--rebuild", environment=environment)
    assert result.returncode == 0, result.stderr
    assert "files are the same bytes" in result.stdout
    # Or from a copy, under whatever name.
    edit(release, made_with(torch="2.12.0"))
    assert "another environment" in error_line(command("verify", release, "--rebuild", "--source", f"path:{bert}"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["modernbert", "deberta-v2", "mpnet", "distilbert", "albert"])
def test_every_architecture_comes_out_again(command: Command, tmp_path: Path, name: str) -> None:
    save_checkpoint(tmp_path / "checkpoint", name)
    assert command(write_pipeline(tmp_path, "path:checkpoint", targets=ALL_TARGETS)).returncode == 0
    environment = {"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "5"}
    result = command("verify", "artifacts/tiny/1.0.0", "--rebuild", environment=environment)
    assert result.returncode == 0, result.stdout + result.stderr


def test_rebuild_wants_the_same_calibration(tmp_path: Path) -> None:
    """Both texts must be those that are recorded, and found from one folder."""
    first, second = tmp_path / "first", tmp_path / "second"
    hashes = {}
    for folder in (first, second):
        folder.mkdir()
        for name in ("validation", "calibration"):
            (folder / f"{name}.jsonl").write_text(f"{name}" if folder == second or name == "validation" else "another")
            hashes[name] = (f"{name}.jsonl", file_sha256(folder / f"{name}.jsonl"))
    release = first / "artifacts/tiny/1.0.0"
    assert _data_folder(release, hashes, second) == second
    with pytest.raises(ConfigError, match=r"first/calibration\.jsonl: is not the calibration text that this release was made"):
        _data_folder(release, hashes, first)
    (first / "calibration.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"^calibration\.jsonl: the calibration text is not there; give --folder, where"):
        _data_folder(release, hashes, first)
