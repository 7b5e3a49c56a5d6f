"""The gate sees what can go wrong with an artifact: a weight, a mask, token types, a shape that was baked in, an output
that is missing or not finite, a file that does not open. Each against a reference that a sound artifact meets."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file, save_file

from compiler.backends import BACKENDS
from compiler.build import _in_order
from compiler.config import DEFAULT_LIMITS, ModelSpec, OnnxTargets, Targets
from compiler.errors import NumericsError
from compiler.hashing import hash_folder
from compiler.numerics import judge
from compiler.samples import LEFT, NONE, TEXT, read_cases
from compiler.sources import resolve
from compiler.stages import validate as stage
from compiler.stages.export import export
from compiler.stages.load import REFERENCE, SAMPLES, load, reference, run_eager
from compiler.stages.validate import Part, validate
from compiler.types import Artifact, Check, Model, Snapshot, Target
from tests.backends.conftest import export as export_artifact
from tests.zoo import save_checkpoint

FEATURES, ANSWERS = "feature-extraction", "question-answering"
TEXTS: dict[str, list[tuple[str, ...]]] = {
    FEATURES: [("the quick brown fox jumps over the lazy dog",), ("hello",), ("a second line of text",)],
    ANSWERS: [("who jumps over it?", "the quick brown fox jumps over the lazy dog"), ("what?", "a line")],
}
WEIGHT = "encoder.layer.0.output.dense.weight"
Outputs = dict[str, torch.Tensor]


def found(folder: Path) -> Snapshot:
    targets = Targets(onnx=OnnxTargets(precisions=("fp32",)))
    return resolve(ModelSpec(name="tiny", release="1.0.0", source=f"path:{folder}", targets=targets), Path())


class Bench:
    """A checkpoint, its reference, and the sound artifacts that were made of it."""

    def __init__(self, folder: Path, task: str) -> None:
        self.folder, self.task = folder, task
        self.checkpoint = save_checkpoint(folder / "checkpoint", "bert", task)
        self.snapshot = found(self.checkpoint)
        self.reference = folder / "reference"
        self.reference.mkdir()
        self.known = reference(self.reference, self.snapshot, task, TEXTS[task], (1, 3), (8, 16), {})
        self._sound: dict[str, Path] = {}

    def sound(self, name: str) -> Path:
        """The folder of a sound artifact. Read only."""
        if name not in self._sound:
            self._sound[name] = self.folder / name
            self._sound[name].mkdir()
            export(self._sound[name], Target(name, "fp32"), self.snapshot, self.task, {}, None)
        return self._sound[name]

    def traced(self, out: Path, wrap: Callable[[torch.nn.Module], torch.nn.Module]) -> Path:
        """TorchScript of the model inside another module."""
        out.mkdir()
        model: Model = load(self.snapshot, self.task)
        wrapped = replace(model, module=wrap(model.module).eval())
        export_artifact(BACKENDS["torchscript"], out, wrapped, Target("torchscript", "fp32"))
        return out

    def figures(self, name: str, folder: Path) -> dict[str, Any]:
        backend = BACKENDS[name]
        files = _in_order(hash_folder(folder), backend.files("fp32"))
        artifact = Artifact(name, "fp32", files, backend.runtime("fp32"), key="")
        return validate(folder, artifact, self.reference / SAMPLES, self.reference / REFERENCE, self.known)

    def failed(self, name: str, folder: Path) -> list[Check]:
        """The checks that do not pass under the default limits."""
        checks = judge(self.figures(name, folder), DEFAULT_LIMITS["fp32"])
        assert checks
        return [check for check in checks if not check.passed]

    def error(self, name: str, folder: Path) -> str:
        """The one line that an artifact is refused with before there are figures."""
        with pytest.raises(NumericsError) as caught:
            self.figures(name, folder)
        message = str(caught.value)
        assert len(message.splitlines()) == 1
        assert len(message) < 600
        assert message.startswith(f"validate {name} fp32: ")
        return message


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("features"), FEATURES)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("answers"), ANSWERS)


FORMATS = list(BACKENDS)


@pytest.mark.parametrize("name", FORMATS)
def test_a_sound_artifact_passes(bench: Bench, name: str) -> None:
    assert bench.failed(name, bench.sound(name)) == []


@pytest.mark.parametrize("name", FORMATS)
def test_one_weight_of_another_value(bench: Bench, tmp_path: Path, name: str) -> None:
    changed = Path(shutil.copytree(bench.checkpoint, tmp_path / "changed"))
    tensors = load_file(changed / "model.safetensors")
    tensors[WEIGHT][3, 5] += 1
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "out").mkdir()
    export(tmp_path / "out", Target(name, "fp32"), found(changed), bench.task, {}, None)
    failed = bench.failed(name, tmp_path / "out")
    assert {check.output for check in failed} == {"last_hidden_state", "pooler_output"}
    assert all("sample " in check.worst and check.output in check.worst for check in failed)


def test_one_flipped_bit_in_the_file(bench: Bench, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bench.sound("onnx"), tmp_path / "flipped"))
    path = folder / "onnx/model.onnx"
    graph = onnx.load(path)
    matrix = next(tensor for tensor in graph.graph.initializer if list(tensor.dims) in ([32, 48], [48, 32]))
    values = numpy_helper.to_array(matrix).copy()
    values.view("uint32")[0, 0] ^= 1 << 25  # of the exponent
    matrix.CopyFrom(numpy_helper.from_array(values, matrix.name))
    onnx.save(graph, path)
    assert bench.failed("onnx", folder)


class Wrapped(torch.nn.Module):
    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def run(self, **inputs: torch.Tensor) -> Outputs:
        return dict(self.module(**inputs).items())


class WithoutMask(Wrapped):
    def forward(self, attention_mask: torch.Tensor, **inputs: torch.Tensor) -> Outputs:
        return self.run(attention_mask=torch.ones_like(attention_mask), **inputs)


class WithoutTokenTypes(Wrapped):
    def forward(self, token_type_ids: torch.Tensor, **inputs: torch.Tensor) -> Outputs:
        return self.run(token_type_ids=torch.zeros_like(token_type_ids), **inputs)


class BakedShape(Wrapped):
    def forward(self, **inputs: torch.Tensor) -> Outputs:
        return {name: value.reshape(2, *value.shape[1:]) for name, value in self.run(**inputs).items()}


class BakedMask(Wrapped):
    """The mask of the example, as a constant."""

    def forward(self, attention_mask: torch.Tensor, **inputs: torch.Tensor) -> Outputs:
        constant = torch.tensor(attention_mask.tolist())
        return self.run(attention_mask=constant, **inputs)


class FirstRow(Wrapped):
    def forward(self, **inputs: torch.Tensor) -> Outputs:
        return {name: value[:1] for name, value in self.run(**inputs).items()}


class RowsTurned(Wrapped):
    """Each text gets another's answer."""

    def forward(self, **inputs: torch.Tensor) -> Outputs:
        return {name: value.flip(0) for name, value in self.run(**inputs).items()}


class OtherNames(Wrapped):
    def forward(self, **inputs: torch.Tensor) -> Outputs:
        return {f"output_{number}": value for number, value in enumerate(self.run(**inputs).values())}


class NotANumber(Wrapped):
    """At the last token of a long text alone."""

    def forward(self, **inputs: torch.Tensor) -> Outputs:
        outputs = self.run(**inputs)
        length = torch.ones_like(inputs["input_ids"]).cumsum(1).unsqueeze(-1)
        hidden = outputs["last_hidden_state"]
        return {**outputs, "last_hidden_state": torch.where(length == 16, hidden * torch.nan, hidden)}


class AtPadding(Wrapped):
    """Other numbers where there is padding, which is nobody's result."""

    def forward(self, **inputs: torch.Tensor) -> Outputs:
        outputs = self.run(**inputs)
        mask = inputs["attention_mask"].unsqueeze(-1)
        hidden = outputs["last_hidden_state"]
        return {**outputs, "last_hidden_state": torch.where(mask == 1, hidden, hidden * torch.nan)}


def test_a_mask_that_is_ignored(bench: Bench, tmp_path: Path) -> None:
    """Under the limits of either precision."""
    figures = bench.figures("torchscript", bench.traced(tmp_path / "out", WithoutMask))
    for limits in DEFAULT_LIMITS.values():
        failed = [check for check in judge(figures, limits) if not check.passed]
        assert {check.output for check in failed} == {"last_hidden_state", "pooler_output"}
        assert all("padding" in check.worst or "text" in check.worst for check in failed)


def test_token_types_that_are_ignored(answers: Bench, tmp_path: Path) -> None:
    assert answers.failed("torchscript", answers.sound("torchscript")) == []
    failed = answers.failed("torchscript", answers.traced(tmp_path / "out", WithoutTokenTypes))
    assert {check.output for check in failed} == {"start_logits", "end_logits"}


def test_a_mask_that_is_ignored_by_answers(answers: Bench, tmp_path: Path) -> None:
    assert answers.failed("torchscript", answers.traced(tmp_path / "out", WithoutMask))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("wrap", [BakedShape, BakedMask])
def test_a_shape_that_is_baked_in(bench: Bench, tmp_path: Path, wrap: Callable[[torch.nn.Module], torch.nn.Module]) -> None:
    message = bench.error("torchscript", bench.traced(tmp_path / "out", wrap))
    assert "(1x8)" in message
    assert "'no padding'" in message


def test_a_batch_that_is_fixed(bench: Bench, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bench.sound("onnx"), tmp_path / "static"))
    path = folder / "onnx/model.onnx"
    graph = onnx.load(path)
    for tensor in graph.graph.input:
        tensor.type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(graph, path)
    message = bench.error("onnx", folder)
    assert "does not run on sample 'no padding' (1x8)" in message


def test_an_output_of_another_shape(bench: Bench, tmp_path: Path) -> None:
    message = bench.error("torchscript", bench.traced(tmp_path / "out", FirstRow))
    assert "output last_hidden_state of sample" in message
    assert "(3x8) is [1, 8, 32], the original's is [3, 8, 32]" in message


def test_rows_in_another_order(bench: Bench, tmp_path: Path) -> None:
    assert bench.failed("torchscript", bench.traced(tmp_path / "out", RowsTurned))


def test_outputs_of_other_names(bench: Bench, tmp_path: Path) -> None:
    message = bench.error("torchscript", bench.traced(tmp_path / "out", OtherNames))
    assert "no output last_hidden_state" in message
    assert "output_0" in message


def test_a_value_that_is_not_finite(bench: Bench, tmp_path: Path) -> None:
    failed = bench.failed("torchscript", bench.traced(tmp_path / "out", NotANumber))
    assert {(check.output, check.name) for check in failed} == {("last_hidden_state", name) for name in ("max_abs", "cosine")}
    assert all(check.worst.endswith(": nan") for check in failed)


def test_values_at_padding_do_not_matter(bench: Bench, tmp_path: Path) -> None:
    assert bench.failed("torchscript", bench.traced(tmp_path / "out", AtPadding)) == []


@pytest.mark.parametrize("content", [b"", b"garbage", None], ids=["empty", "garbage", "half"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_file_that_does_not_open(bench: Bench, tmp_path: Path, name: str, content: bytes | None) -> None:
    folder = Path(shutil.copytree(bench.sound(name), tmp_path / "damaged"))
    path = folder / BACKENDS[name].files("fp32")[0]
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    assert "does not open" in bench.error(name, folder)


def test_an_artifact_of_another_model(bench: Bench, answers: Bench) -> None:
    message = bench.error("torchscript", answers.sound("torchscript"))
    assert "no output last_hidden_state; it has start_logits" in message


def test_the_parts_of_int8_are_all_of_it(tmp_path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search measures answers, of what it finds the elements too: no sample is run twice, and none is left out."""
    lines = [(" ".join(text for (text,) in TEXTS[FEATURES])[number:],) for number in range(20)]
    known = reference(tmp_path, bench.snapshot, FEATURES, lines, (1, 3), (8, 16), {}, accurate=True)
    model = load(bench.snapshot, FEATURES)
    runs: list[bytes] = []

    def runner(inputs: Any) -> dict[str, Any]:
        runs.append(inputs["input_ids"].tobytes() + inputs["attention_mask"].tobytes())
        return run_eager(model, inputs)

    monkeypatch.setattr(stage, "BACKENDS", {"onnx": SimpleNamespace(open=lambda *_: runner)})
    artifact = Artifact("onnx", "int8", (), {}, key="")
    found: dict[Part, dict[str, Any]] = {}
    ran: dict[Part, list[bytes]] = {}
    parts: tuple[Part, ...] = ("all", "answers", "elements")
    for part in parts:
        runs.clear()
        found[part] = validate(tmp_path, artifact, tmp_path / SAMPLES, tmp_path / REFERENCE, known, part=part)
        ran[part] = sorted(runs)
    assert found["answers"].keys() == {"answers"}
    assert "answers" not in found["elements"]
    assert found["elements"] | found["answers"] == found["all"]
    assert sorted(ran["answers"] + ran["elements"]) == ran["all"]
    assert ran["answers"] and ran["elements"]


@pytest.mark.parametrize(
    ("kind", "spoil"),
    [
        (NONE, lambda values: np.full_like(values, np.nan)),
        (LEFT, lambda values: np.full_like(values, np.nan)),
        (NONE, lambda values: values[:, ::-1]),
        (LEFT, np.zeros_like),
        (TEXT, lambda values: np.roll(values, 1, axis=1)),
    ],
    ids=["nan", "nan, padded on the left", "turned round", "zeros, padded on the left", "moved by a token"],
)
@pytest.mark.parametrize("single", [False, True], ids=["every shape", "the smallest alone"])
def test_int8_is_held_to_every_shape_and_padding(
    tmp_path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch, kind: str, spoil: Callable[[Any], Any], single: bool
) -> None:
    """Its answers come from batches that are padded on the right; what goes wrong elsewhere must not pass for that."""
    lines = [(" ".join(text for (text,) in TEXTS[FEATURES])[number:],) for number in range(20)]
    known = reference(tmp_path, bench.snapshot, FEATURES, lines, (1, 3), (8, 16), {}, accurate=True)
    cases = {case.inputs["input_ids"].tobytes() + case.mask.tobytes(): case for case in read_cases(tmp_path / SAMPLES, known)}
    model = load(bench.snapshot, FEATURES)

    shapes = {name: min(case.shape for case in cases.values() if case.name == name) for name in (NONE, LEFT, TEXT)}

    def figures(wrong: str) -> list[Check]:
        def runner(inputs: Any) -> dict[str, Any]:
            outputs = run_eager(model, inputs)
            mask = inputs["attention_mask"].astype(bool)
            case = cases[inputs["input_ids"].tobytes() + mask.tobytes()]
            if case.name != wrong or (single and case.shape != shapes[wrong]):
                return outputs
            return {key: spoil(value) for key, value in outputs.items()}

        backend = SimpleNamespace(open=lambda *_: runner)
        monkeypatch.setattr(stage, "BACKENDS", {"onnx": backend})
        artifact = Artifact("onnx", "int8", (), {}, key="")
        return list(
            judge(validate(tmp_path, artifact, tmp_path / SAMPLES, tmp_path / REFERENCE, known), DEFAULT_LIMITS["int8"])
        )

    assert all(check.passed for check in figures("none"))
    failed = [check for check in figures(kind) if not check.passed]
    assert {check.name for check in failed} == {"noise"}
    assert f"samples with {kind}, " in failed[0].worst
    assert len(shapes) == 3
    assert not single or failed[0].worst.endswith(f", {'x'.join(map(str, shapes[kind]))}")
