"""`compile verify` and `compile inspect` as users run them: on a sound release, without its cache, and on damaged ones."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies

from compiler.errors import CompileError, StageError
from compiler.hashing import canonical, digest, hash_file
from compiler.manifest import MANIFEST, SAMPLES, VALIDATION, from_bytes
from compiler.samples import read_cases
from compiler.verify import known_samples, limits_of, open_release
from tests.conftest import Command, build_folder, error_line, seal, write_pipeline
from tests.zoo import save_checkpoint

TARGETS = {"torchscript": ["fp32"], "onnx": ["fp32"], "openvino": ["fp32", "bf16"]}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> Path:
    """A folder with a checkpoint, a pipeline, a cache and a release. Read only: `release` copies it."""
    return build_folder(tmp_path_factory.mktemp("built"), bert, targets=TARGETS)


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


def resealed(release: Path, change: Callable[[Any], Any], samples: bytes | None = None) -> None:
    """A release with another validation.json, and samples, and a manifest that was made to fit."""
    path = release / VALIDATION
    path.write_bytes(canonical(change(json.loads(path.read_bytes()))))
    if samples is not None:
        (release / SAMPLES).write_bytes(samples)
    manifest = from_bytes((release / MANIFEST).read_bytes(), "")
    files = tuple(hash_file(release, file.path) for file in manifest.files)
    seal(release, replace(manifest, files=files, read=None))


def known(**keys: Any) -> Callable[[Any], Any]:
    return lambda stored: {**stored, "known": {**stored["known"], **keys}}


def checks(change: Callable[[dict[str, Any]], list[dict[str, Any]]]) -> Callable[[Any], Any]:
    """Other checks of every artifact, in place of each."""
    return lambda stored: {
        **stored,
        "artifacts": [
            {**entry, "checks": [new for old in entry["checks"] for new in change(old)]} for entry in stored["artifacts"]
        ],
    }


HOSTILE: list[tuple[Callable[[Any], Any], str]] = [
    (lambda stored: {name: value for name, value in stored.items() if name != "known"}, "not what a build writes ('known')"),
    (lambda stored: {**stored, "known": []}, "not what a build writes ('known')"),
    (known(cases=7), "('known.cases')"),
    (known(cases=[{}]), "('known.cases.0.name')"),
    (known(cases=[{"name": ["x"]}]), "('known.cases.0.name')"),
    (known(cases=[{"name": "x"}] * 99), "does not hold what validation.json describes"),
    (known(keep={}), "('known.keep.last_hidden_state')"),
    (known(keep={"last_hidden_state": -1}), "('known.keep.last_hidden_state')"),
    (known(keep={"last_hidden_state": "1"}), "('known.keep.last_hidden_state')"),
    (checks(lambda check: [{**check, "name": "beauty"}]), "('limit.beauty')"),
    (checks(lambda check: [{**check, "limit": -7.0}]), "('limit."),
    # What would be a check less than a build makes.
    (checks(lambda check: []), "records other checks of torchscript fp32 than a build makes (it has none)"),
    (checks(lambda check: [{**check, "output": "logits"}]), "records other checks of torchscript fp32 than a build makes ("),
]


@pytest.mark.parametrize(("change", "says"), HOSTILE, ids=range(len(HOSTILE)))
def test_numerics_of_a_hostile_validation(
    command: Command, tmp_path: Path, release: Path, change: Callable[[Any], Any], says: str
) -> None:
    resealed(release, change)
    assert says in error_line(command("verify", release, "--numerics", cache=tmp_path / "cache"))


def test_numerics_of_hostile_samples(tmp_path: Path, release: Path) -> None:
    import numpy as np
    from safetensors.numpy import load_file, save

    arrays = load_file(release / SAMPLES)
    name = next(name for name in arrays if name.endswith("input_ids"))
    for samples, says in (
        (b"", "does not hold what validation.json describes"),
        (save({}), "does not hold what validation.json describes"),
        (save({**arrays, name: arrays[name].astype(np.float32)}), "is not int64 [batch, sequence]"),
        (save({**arrays, name: arrays[name].ravel()}), "is not int64 [batch, sequence]"),
    ):
        resealed(release, lambda stored: stored, samples)
        manifest, validation = open_release(release)
        with pytest.raises(StageError) as caught:
            read_cases(release / SAMPLES, known_samples(release, manifest, validation))
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=strategies.data())
def test_any_value_of_validation_may_be_another(release: Path, data: strategies.DataObject) -> None:
    """It is read, or refused in one line."""
    path = release / VALIDATION
    content = path.read_bytes()
    stored = json.loads(content)
    place = stored
    while True:  # down to some value of it
        keys = list(place) if isinstance(place, dict) else range(len(place))
        key = data.draw(strategies.sampled_from(list(keys)))
        if not isinstance(place[key], (dict, list)) or not place[key] or data.draw(strategies.integers(0, 4)) == 0:
            break
        place = place[key]
    odd: list[Any] = [
        None,
        True,
        -1,
        0,
        1e308,
        10**400,
        "",
        "x",
        [],
        [[]],
        {},
        {"name": "x"},
        float("nan"),
        float("inf"),
        "\ud800",
    ]
    place[key] = data.draw(strategies.sampled_from(odd))
    path.write_text(json.dumps(stored))
    try:
        manifest, validation = open_release(release)
        for entry in validation.entries.values():
            limits_of(release, entry["checks"])
        read_cases(release / SAMPLES, known_samples(release, manifest, validation))
    except CompileError as error:
        assert "\n" not in str(error)
    finally:
        path.write_bytes(content)


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
