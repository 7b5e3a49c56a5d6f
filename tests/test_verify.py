"""`compile verify` and `compile inspect` as users run them: on a sound release, without its cache, and on damaged ones."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from compiler.hashing import canonical, digest, hash_file
from compiler.manifest import MANIFEST, from_bytes
from tests.conftest import Command, error_line, seal, write_pipeline
from tests.zoo import save_checkpoint

TARGETS = {"torchscript": ["fp32"], "onnx": ["fp32"], "openvino": ["fp32", "bf16"]}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> Path:
    """A folder with a checkpoint, a pipeline, a cache and a release. Read only: `release` copies it."""
    from tests.conftest import run_command

    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(bert, folder / "checkpoint")
    pipeline = write_pipeline(folder, "path:checkpoint", targets=TARGETS)
    result = run_command(folder, folder / "cache", pipeline)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture
def release(tmp_path: Path, built: Path) -> Path:
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    return tmp_path / "artifacts/tiny/1.0.0"


def test_numerics_from_the_cache(command: Command, tmp_path: Path, release: Path) -> None:
    result = command("verify", release, "--numerics", cache=tmp_path / "cache")
    assert result.returncode == 0, result.stderr
    assert "files are what the manifest says" in result.stdout
    assert result.stdout.count("passed") == 4
    assert "load" not in result.stderr
    assert result.stderr.count("validate") == 4


def test_numerics_from_the_checkpoint(command: Command, tmp_path: Path, release: Path) -> None:
    """Without the cache the original is loaded again, from where the manifest says."""
    result = command("verify", release, "--numerics", "--json", cache=tmp_path / "empty")
    assert result.returncode == 0, result.stderr
    assert re.search(r"load +done", result.stderr)
    answer = json.loads(result.stdout)
    assert [check["passed"] for check in answer["checks"]] == [True] * 4
    assert list((tmp_path / "empty").glob("scratch-*")) == []


def test_numerics_needs_the_original(command: Command, tmp_path: Path, release: Path) -> None:
    (tmp_path / "checkpoint").rename(tmp_path / "moved")
    assert "--source" in error_line(command("verify", release, "--numerics", cache=tmp_path / "empty"))
    moved = command("verify", release, "--numerics", "--source", "path:moved", cache=tmp_path / "empty")
    assert moved.returncode == 0, moved.stderr
    save_checkpoint(tmp_path / "other", "bert", hidden_size=64)
    line = error_line(command("verify", release, "--numerics", "--source", "path:other", cache=tmp_path / "empty"))
    assert "is not the checkpoint that this release was made from" in line
    (tmp_path / "moved/added.json").write_text("{}")
    line = error_line(command("verify", release, "--numerics", "--source", "path:moved", cache=tmp_path / "empty"))
    assert "added.json" in line


def test_numerics_sees_another_model(command: Command, tmp_path: Path, release: Path) -> None:
    """An artifact that is exchanged for a sound one of another checkpoint, with a manifest that was made to fit."""
    other = tmp_path / "other"
    other.mkdir()
    save_checkpoint(other / "checkpoint", "bert", initializer_range=0.3)
    assert command(write_pipeline(other, "path:checkpoint", targets={"onnx": ["fp32"]})).returncode == 0
    shutil.copy(other / "artifacts/tiny/1.0.0/onnx/model.onnx", release / "onnx/model.onnx")
    manifest = from_bytes((release / MANIFEST).read_bytes(), "")
    swapped = hash_file(release, "onnx/model.onnx")
    artifacts = tuple(replace(a, files=(swapped, *a.files[1:])) if a.format == "onnx" else a for a in manifest.artifacts)
    seal(release, replace(manifest, artifacts=artifacts))
    assert command("verify", release).returncode == 0
    line = error_line(command("verify", release, "--numerics", cache=tmp_path / "cache"))
    assert "onnx fp32" in line
    assert "its limit is" in line


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(bytes(content))


def test_one_byte_of_any_file(command: Command, release: Path) -> None:
    files = [path for path in release.rglob("*") if path.is_file()]
    assert len(files) > 8
    for path in files:
        content = path.read_bytes()
        flip(path)
        line = error_line(command("verify", release))
        assert path.relative_to(release).as_posix() in line, line
        path.write_bytes(content)
    assert command("verify", release).returncode == 0


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda release: (release / "config.json").unlink(), "config.json is missing"),
        (lambda release: (release / "more.txt").write_text("x"), "more.txt is not in the manifest"),
        (lambda release: (release / MANIFEST).unlink(), "manifest.json: cannot be read"),
        (shutil.rmtree, "no such release"),
    ],
    ids=["missing", "added", "no manifest", "gone"],
)
def test_damaged_release(command: Command, release: Path, damage: Callable[[Path], object], says: str) -> None:
    damage(release)
    assert says in error_line(command("verify", release))


def test_inspect(command: Command, release: Path) -> None:
    result = command("inspect", release)
    assert result.returncode == 0, result.stderr
    for text in (
        "tiny 1.0.0: BertModel for feature-extraction",
        "path:checkpoint",
        "input_ids int64 [batch, sequence]",
        "last_hidden_state float32 [batch, sequence, 32]",
        "INFERENCE_PRECISION_HINT=f32",
        "INFERENCE_PRECISION_HINT=bf16",
        "opset 20",
        "LayerNormalization 5",
        "at most 64 tokens",
    ):
        assert text in result.stdout, text
    assert re.search(r"ok +last_hidden_state max_abs [0-9.e-]+ <= 0\.0001", result.stdout)
    answer = json.loads(command("inspect", release, "--json").stdout)
    assert answer["manifest"]["name"] == "tiny"
    assert len(answer["checks"]) == 4
    assert "no such release" in error_line(command("inspect", release.parent / "2.0.0"))


def test_inspect_without_what_earlier_versions_did_not_write(command: Command, release: Path) -> None:
    path = release / "manifest.json"
    body = json.loads(path.read_bytes())
    del body["digest"]
    for artifact in body["artifacts"]:
        assert artifact.pop("fast_on")
    content = canonical({**body, "digest": digest(body)})
    path.write_bytes(content)
    assert from_bytes(content, "").identity == digest(body)
    result = command("inspect", release)
    assert result.returncode == 0, result.stderr
    assert "  fused    " in result.stdout
    assert "fast on" not in result.stdout
