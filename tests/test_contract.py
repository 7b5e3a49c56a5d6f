"""Every format, at every precision, on every architecture and task: exported, opened from its file, and held to the gate.

A new format in `BACKENDS`, or a new precision of one, is tested here by itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from compiler.backends import BACKENDS
from compiler.build import _in_order
from compiler.config import DEFAULT_LIMITS, Limits, ModelSpec, OnnxTargets, Targets
from compiler.hashing import hash_folder, list_files
from compiler.numerics import judge
from compiler.plan import read_texts
from compiler.sources import resolve
from compiler.stages.export import export
from compiler.stages.load import REFERENCE, SAMPLES, reference
from compiler.stages.validate import validate
from compiler.tasks import TASKS
from compiler.types import Artifact, Target
from tests.zoo import ALL, IMAGES, SOUNDS, ZOO, save_checkpoint

# Heads of random numbers give logits with near ties and rows near zero, where bf16's rounding decides. What is wrong with a
# graph shows in fp32, whose limits are the strict ones.
LIMITS = {"fp32": DEFAULT_LIMITS["fp32"], "bf16": Limits(cosine=0.95, argmax=0.8)}
BATCHES, SEQUENCES = (1, 3), (16, 33)
# int8 is not exported but searched for: its contract is in tests/quantization.
PRECISIONS = [
    (name, precision) for name, backend in BACKENDS.items() for precision in backend.PRECISIONS if precision != "int8"
]


class Prepared:
    """A checkpoint with its reference, and the files that were exported from it so far."""

    def __init__(self, folder: Path, architecture: str, task: str, **config: Any) -> None:
        self.folder = folder
        self.name = architecture
        self.task = task
        save_checkpoint(folder / "checkpoint", architecture, task, **config)
        spec = ModelSpec(
            name="zoo",
            release="1.0.0",
            source="path:checkpoint",
            targets=Targets(onnx=OnnxTargets(precisions=("fp32",))),
        )
        self.snapshot = resolve(spec, folder)
        (folder / "reference").mkdir()
        texts = read_texts(spec, task, folder).lines
        sequences = SEQUENCES if TASKS[task].modality == "text" else None
        self.known = reference(folder / "reference", self.snapshot, task, texts, BATCHES, sequences, {})

    def export(self, target: Target) -> tuple[Path, Artifact]:
        backend = BACKENDS[target.format]
        out = self.folder / target.format / target.precision
        source = backend.PRECISIONS[target.precision]
        exported = None if source is None else self.export(Target(target.format, source))[0]
        if not out.exists():
            out.mkdir(parents=True)
            export(out, target, self.snapshot, self.task, {}, exported)
        files = _in_order(hash_folder(out), backend.files(target.precision))
        return out, Artifact(target.format, target.precision, files, backend.runtime(target.precision), key="")


COMBINATIONS = [
    pytest.param((name, task), marks=pytest.mark.slow if task in architecture.slow else ())
    for name, architecture in ZOO.items()
    for task in architecture.tasks
]


@pytest.fixture(scope="module", params=COMBINATIONS, ids="-".join)
def prepared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prepared]:
    architecture, task = request.param
    yield Prepared(tmp_path_factory.mktemp(f"{architecture}-{task}"), architecture, task)


@pytest.mark.parametrize(("format", "precision"), PRECISIONS, ids=["-".join(pair) for pair in PRECISIONS])
def test_artifact_answers_as_the_original(prepared: Prepared, format: str, precision: str) -> None:
    out, artifact = prepared.export(Target(format, precision))  # type: ignore[arg-type]
    reference = prepared.folder / "reference"
    figures = validate(out, artifact, reference / SAMPLES, reference / REFERENCE, prepared.known)
    checks = judge(figures, LIMITS[precision])
    assert checks
    assert [check for check in checks if not check.passed] == []
    if table := os.environ.get("COMPILE_TABLE"):  # `python -m tests.table` makes a table of it
        with open(table, "a", encoding="utf-8") as stream:
            stream.write(f"{prepared.task}\t{prepared.name}\t{format} {precision}\n")


def test_every_promise_is_covered() -> None:
    text = {"bert", "roberta", "xlm-roberta", "distilbert", "albert", "electra", "mpnet", "deberta-v2", "modernbert"}
    images = {"vit", "convnext", "resnet", "swin"}
    sounds = {"wav2vec2", "wav2vec2-lv60", "hubert"}
    assert set(ZOO) == text | images | sounds | {"clip"}
    assert {name for name, entry in ZOO.items() if entry.tasks == ALL} == text
    assert {name for name, entry in ZOO.items() if entry.tasks == IMAGES} == images
    assert {name for name, entry in ZOO.items() if entry.tasks == SOUNDS} == sounds
    assert {task for entry in ZOO.values() for task in entry.tasks} == set(TASKS)
    # Every task, and every architecture, is in `make test`.
    assert {task for entry in ZOO.values() for task in entry.tasks if task not in entry.slow} == set(TASKS)
    assert all(set(entry.tasks) - set(entry.slow) for entry in ZOO.values())


def test_files_have_the_names_that_loaders_look_for(tmp_path: Path) -> None:
    prepared = Prepared(tmp_path, "bert", "feature-extraction")
    names = {
        f"{format} {precision}": list_files(prepared.export(Target(format, precision))[0]) for format, precision in PRECISIONS
    }
    assert names == {
        "torchscript fp32": ["torchscript/model.pt"],
        "torchscript bf16": ["torchscript/model_bf16.pt"],
        "onnx fp32": ["onnx/export.json", "onnx/model.onnx", "onnx/model.onnx.data"],
        "openvino fp32": ["openvino/export.json", "openvino/openvino_model.bin", "openvino/openvino_model.xml"],
        "openvino bf16": ["openvino/openvino_model_bf16.bin", "openvino/openvino_model_bf16.xml"],
    }
