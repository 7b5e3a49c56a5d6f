"""`compile bench`: every artifact and the original, in turn, in processes of their own; and what it may leave behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from compiler.bench import EAGER, Result, Timing
from compiler.manifest import from_bytes
from compiler.samples import TEXT
from tests.conftest import Command, error_line, write_pipeline

TARGETS = {"torchscript": ["fp32"], "onnx": ["fp32"], "openvino": ["fp32"]}


@pytest.fixture
def release(command: Command, tmp_path: Path, bert: Path) -> Path:
    shutil.copytree(bert, tmp_path / "checkpoint")
    built = command(write_pipeline(tmp_path, "path:checkpoint", targets=TARGETS))
    assert built.returncode == 0, built.stderr
    return tmp_path / "artifacts/tiny/1.0.0"


def test_times_all_and_names_the_best(command: Command, release: Path) -> None:
    run = command("bench", release, "--rounds", "2", "--threads", "1", "--shape", "2x7", "--json")
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    (result,) = json.loads(run.stdout)
    names = [EAGER, "torchscript fp32", "onnx fp32", "openvino fp32"]
    assert list(result["memory"]) == names
    assert {(timing["subject"], timing["shape"]) for timing in result["timings"]} == {
        (name, shape) for name in names for shape in ("2x7", TEXT)
    }
    assert result["threads"] == 1
    assert 0 < result["padding"] < 1
    assert all(0 < timing["p50"] <= timing["p90"] for timing in result["timings"])
    assert all(timing["ratio"] == 1 for timing in result["timings"] if timing["subject"] == EAGER)
    assert set(result["best"]) == {"2x7", TEXT}
    assert set(result["best"].values()) <= set(names[1:])
    # The runtimes that need no torch load none: their processes are far smaller.
    assert result["memory"]["onnx fp32"] < 0.6 * result["memory"][EAGER]


def test_table(command: Command, release: Path) -> None:
    run = command("bench", release, "--rounds", "1")
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[0] == f"tiny 1.0.0  {release}"
    assert "threads, 1 rounds" in lines[1]
    assert lines[3].split() == ["artifact", "1x16", "1x64", "8x16", "8x64", "text", "text/s", "peak", "MB"]
    assert lines[-1].startswith("best      1x16: ")


def test_record_is_outside_of_what_is_hashed(command: Command, tmp_path: Path, release: Path) -> None:
    path = release / "manifest.json"
    before = json.loads(path.read_text())
    assert command("bench", release, "--rounds", "1", "--shape", "1x8", "--record").returncode == 0
    after = json.loads(path.read_text())
    assert after["digest"] == before["digest"]
    benchmark = from_bytes(path.read_bytes(), "").benchmark
    assert benchmark is not None
    assert benchmark["rounds"] == 1
    assert command("verify", release).returncode == 0
    again = command(tmp_path / "pipeline.yaml")
    assert "unchanged" in again.stderr
    assert sorted(entry.name for entry in release.parent.iterdir()) == ["1.0.0"]

    content = path.read_bytes()
    place = content.index(b'"rounds": 1')
    path.write_bytes(content.replace(b'"rounds": 1', b'"rounds": 9'))
    assert place
    assert "changed since it was written" in error_line(command("verify", release))


def test_bad_input(command: Command, tmp_path: Path, release: Path) -> None:
    assert "the model has 64 positions" in error_line(command("bench", release, "--shape", "1x65"))
    assert command("bench", release, "--shape", "big").returncode == 2
    assert command("bench").returncode == 2
    assert "no such release" in error_line(command("bench", tmp_path / "nothing"))
    shutil.rmtree(tmp_path / "checkpoint")
    assert "--source" in error_line(command("bench", release))


def test_best_is_never_the_original() -> None:
    timings = (Timing(EAGER, "1x1", 1, 1, 1, 1), Timing("a", "1x1", 3, 3, 1, 1), Timing("b", "1x1", 2, 9, 1, 1))
    assert Result(1, 1, "", 0, {}, timings).best("1x1") == "b"
