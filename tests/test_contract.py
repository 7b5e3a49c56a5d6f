"""Every format, at every precision, on every architecture and task: exported, opened from its file, and held to the gate.

A new format in `BACKENDS`, or a new precision of one, is tested here by itself.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compiler.backends import BACKENDS
from compiler.config import DEFAULT_LIMITS, Limits
from compiler.hashing import list_files
from compiler.numerics import judge
from compiler.plan import read_texts
from compiler.stages.load import REFERENCE, SAMPLES, reference
from compiler.stages.validate import validate
from compiler.tasks import TASKS
from compiler.types import Runner, Target
from tests.exports import Exports, shared
from tests.zoo import ALL, IMAGES, SOUNDS, ZOO

# Heads of random numbers give logits with near ties and rows near zero, where bf16's rounding decides. What is wrong with a
# graph shows in fp32, whose limits are the strict ones.
LIMITS = {"fp32": DEFAULT_LIMITS["fp32"], "bf16": Limits(cosine=0.95, argmax=0.8)}
BATCHES, SEQUENCES = (1, 3), (16, 33)
# int8 is not exported but searched for: its contract is in tests/quantization.
PRECISIONS = [
    (name, precision) for name, backend in BACKENDS.items() for precision in backend.PRECISIONS if precision != "int8"
]


class Prepared(Exports):
    """With what the original answers."""

    def __init__(self, folder: Path, architecture: str, task: str, **config: Any) -> None:
        super().__init__(folder, architecture, task, **config)
        texts = read_texts(self.spec, task, folder).lines
        sequences = SEQUENCES if TASKS[task].modality == "text" else None
        self.reference = Path(tempfile.mkdtemp(prefix="reference-", dir=folder))
        self.known = reference(self.reference, self.snapshot, task, texts, BATCHES, sequences, {})


COMBINATIONS = [
    pytest.param((name, task), marks=pytest.mark.slow if task in architecture.slow else ())
    for name, architecture in ZOO.items()
    for task in architecture.tasks
]


@pytest.fixture(scope="module", params=COMBINATIONS, ids="-".join)
def prepared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    architecture, task = request.param
    return Prepared(shared(tmp_path_factory) / "zoo" / f"{architecture}-{task}", architecture, task)


@pytest.mark.parametrize(("format", "precision"), PRECISIONS, ids=["-".join(pair) for pair in PRECISIONS])
def test_artifact_answers_as_the_original(prepared: Prepared, format: str, precision: str) -> None:
    out, artifact = prepared.export(Target(format, precision))  # type: ignore[arg-type]
    figures = validate(out, artifact, prepared.reference / SAMPLES, prepared.reference / REFERENCE, prepared.known)
    checks = judge(figures, LIMITS[precision])
    assert checks
    assert [check for check in checks if not check.passed] == []
    if table := os.environ.get("COMPILE_TABLE"):  # `python -m tests.table` makes a table of it
        with open(table, "a", encoding="utf-8") as stream:
            stream.write(f"{prepared.task}\t{prepared.name}\t{format} {precision}\n")


@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
@pytest.mark.parametrize(("format", "precision"), PRECISIONS, ids=["-".join(pair) for pair in PRECISIONS])
@pytest.mark.parametrize(
    "first", [(1, 1, 0), (2, 1, 0), (3, 16, 15)], ids=["one token", "two of one token", "padded to one token"]
)
def test_no_answer_depends_on_the_batch_before(
    exports: Callable[..., Exports], architecture: str, format: str, precision: str, first: tuple[int, int, int]
) -> None:
    """Runtimes compile for the shapes that they meet first, and some of that stays."""
    out, artifact = exports(architecture).export(Target(format, precision))  # type: ignore[arg-type]

    def fresh() -> Runner:
        return BACKENDS[format].open(out, artifact, 1)

    def batch(count: int, length: int, padding: int) -> dict[str, Any]:
        ids = np.random.default_rng(length).integers(5, 200, (count, length))
        mask = np.ones_like(ids)
        mask[1:, length - padding :] = 0
        inputs = {"input_ids": ids, "attention_mask": mask}
        return inputs | ({"token_type_ids": np.zeros_like(ids)} if architecture == "bert" else {})

    opened = fresh()
    for shape in (first, (1, 20, 0), (3, 17, 6)):
        answers, expected = opened(batch(*shape)), fresh()(batch(*shape))
        for name, values in expected.items():
            assert np.abs(answers[name] - values).max() < 1e-5


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


def test_files_have_the_names_that_loaders_look_for(exports: Callable[..., Exports]) -> None:
    bert = exports("bert")
    names = {
        f"{format} {precision}": list_files(bert.export(Target(format, precision))[0]) for format, precision in PRECISIONS
    }
    assert names == {
        "torchscript fp32": ["torchscript/model.pt"],
        "torchscript bf16": ["torchscript/model_bf16.pt"],
        "onnx fp32": ["onnx/export.json", "onnx/model.onnx", "onnx/model.onnx.data"],
        "openvino fp32": ["openvino/export.json", "openvino/openvino_model.bin", "openvino/openvino_model.xml"],
        "openvino bf16": ["openvino/openvino_model_bf16.bin", "openvino/openvino_model_bf16.xml"],
    }
