"""int8 in OpenVINO files: the same answers as the formula has in PyTorch, in both branches, with weights that are int8."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino.opset14 as ops
import pytest
import torch

from compiler import cpu
from compiler.backends import openvino as backend
from compiler.fusions import openvino_int8
from compiler.fusions.openvino_graph import every_node
from compiler.quantization.layers import Layers, QuantizedLinear, digest
from compiler.stages.load import run_eager
from compiler.types import Model, Target
from tests.backends.conftest import export
from tests.backends.test_onnx_int8 import HASWELL, haswell
from tests.backends.test_torchscript_int8 import emulate, plan
from tests.quantization.formula import rows_of, widened, with_rows

Array = np.ndarray[Any, Any]
FILE = backend.files("int8")[0]
RANDOM = np.random.default_rng(6)


def batch(mask: Array) -> dict[str, Array]:
    flags: Array = mask.astype(np.int64)
    ids = np.asarray(RANDOM.integers(5, 200, flags.shape))
    return {"input_ids": ids, "attention_mask": flags, "token_type_ids": np.zeros_like(flags)}


BATCHES = {
    "one token": batch(np.ones((1, 1))),
    "unpadded": batch(np.ones((3, 17))),
    "right": batch(np.arange(13) < np.array([[13], [4], [9]])),
    "left": batch(np.arange(13) >= np.array([[0], [6]])),
    "holes": batch(np.array([[1, 0, 1, 1, 0, 1], [0, 1, 1, 1, 0, 1]])),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, model: Model) -> Path:
    out = tmp_path_factory.mktemp("fp32")
    export(backend, out, model, Target("openvino", "fp32"))
    return out


@pytest.fixture(scope="module")
def layers(model: Model) -> list[QuantizedLinear]:
    """All layers, smoothed and shifted, by their ranges on the batches' kind of text."""
    most = 127 if cpu.has(cpu.WIDE_SUMS) else 63
    return plan(model.module, {name: torch.from_numpy(value) for name, value in BATCHES["unpadded"].items()}, most=most)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, exported: Path, layers: list[QuantizedLinear]) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("int8")
    known = backend.quantize(out, exported, Layers(layers), "fp32")
    return out / FILE, known


def answer(path: Path, inputs: dict[str, Array]) -> Array:
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.array(compiled(inputs)[0])


@pytest.mark.parametrize("name", BATCHES)
def test_answers_are_those_of_the_formula(
    name: str, model: Model, layers: list[QuantizedLinear], made: tuple[Path, Any]
) -> None:
    inputs = BATCHES[name]
    real = inputs["attention_mask"].astype(bool)
    original = next(iter(run_eager(model, inputs).values()))
    expected = next(iter(run_eager(replace(model, module=emulate(model.module, layers)), inputs).values()))
    error, rounding = (np.abs(side - expected)[real] for side in (answer(made[0], inputs), original))
    assert rounding.max() > 3e-3  # else the next says nothing
    # Where a value lies between two steps, one of them may be taken here and the other there.
    assert np.median(error) < 1e-5
    assert error.max() < rounding.max() / 2


def test_channels_given_more_than_once(tmp_path: Path, model: Model, exported: Path, layers: list[QuantizedLinear]) -> None:
    wide = widened(layers)
    backend.quantize(tmp_path, exported, Layers(wide), "fp32")
    for name in ("unpadded", "right"):
        inputs = BATCHES[name]
        real = inputs["attention_mask"].astype(bool)
        expected, narrow = (
            next(iter(run_eager(replace(model, module=emulate(model.module, some)), inputs).values()))
            for some in (wide, layers)
        )
        error, difference = (np.abs(side - expected)[real] for side in (answer(tmp_path / FILE, inputs), narrow))
        assert np.median(error) < 1e-5
        assert error.max() < difference.max() / 2


ANSWER = """
import sys, numpy as np, openvino
compiled = openvino.Core().compile_model(sys.argv[1], "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
np.save(sys.argv[1] + ".npy", compiled(dict(np.load(sys.argv[2])))[0])
"""


@HASWELL
def test_cpu_without_vnni(tmp_path: Path, model: Model, exported: Path) -> None:
    """The sums of pairs are of 16 bits on AVX2, which weights within ±63 cannot fill: they answer as the formula there too."""
    inputs = BATCHES["right"]
    narrow = plan(model.module, {name: torch.from_numpy(value) for name, value in BATCHES["unpadded"].items()}, most=63)
    backend.quantize(tmp_path, exported, Layers(narrow), "fp32")
    np.savez(tmp_path / "given.npz", allow_pickle=False, **inputs)
    haswell(ANSWER, str(tmp_path / FILE), str(tmp_path / "given.npz"))
    real = inputs["attention_mask"].astype(bool)
    expected = next(iter(run_eager(replace(model, module=emulate(model.module, narrow)), inputs).values()))
    original = next(iter(run_eager(model, inputs).values()))
    error, rounding = (np.abs(side - expected)[real] for side in (np.load(f"{tmp_path / FILE}.npy"), original))
    assert np.median(error) < 1e-5
    assert error.max() < rounding.max() / 2


def test_embeddings_by_the_row(tmp_path: Path, model: Model, exported: Path) -> None:
    tables = rows_of(model.module)
    other = replace(tables[0], name="other", digest="0" * 64)
    known = backend.quantize(tmp_path, exported, Layers([], [*tables, other]), "fp32")
    assert known["int8"] == {table.name: "Gather i8" for table in tables}
    assert list(known["left"]) == ["other"]
    inputs = BATCHES["right"]
    real = inputs["attention_mask"].astype(bool)
    expected = next(iter(run_eager(replace(model, module=with_rows(model.module, tables)), inputs).values()))
    assert np.allclose(answer(tmp_path / FILE, inputs)[real], expected[real], atol=2e-5)


def test_every_layer_is_found_in_both_branches(layers: list[QuantizedLinear], made: tuple[Path, Any]) -> None:
    path, known = made
    assert set(known["int8"]) == {layer.name for layer in layers}
    assert known["left"] == {}
    nodes = every_node(openvino.Core().read_model(path))
    constants = [node for node in nodes if node.get_type_name() == "Constant" and node.get_element_type() == openvino.Type.i8]
    stored = [np.array(node.data) for node in constants]
    for layer in layers:
        rows = [
            weight
            for weight in (*stored, *(one.T for one in stored))
            if weight.shape[1] == layer.inputs and any(np.array_equal(row, layer.weight[0]) for row in weight)
        ]
        assert len(rows) == 2, layer.name


def test_layers_outside_the_plan_stay(tmp_path: Path, model: Model, exported: Path, layers: list[QuantizedLinear]) -> None:
    """And what is no layer of this graph is told."""
    some = [layer for layer in layers if layer.name.startswith("encoder.layer.0.")]
    foreign = replace(some[0], name="elsewhere", digest="0" * 64)
    known = backend.quantize(tmp_path, exported, Layers([*some, foreign]), "fp32")
    assert set(known["int8"]) == {layer.name for layer in some}
    assert set(known["left"]) == {"elsewhere"}
    inputs = BATCHES["right"]
    real = inputs["attention_mask"].astype(bool)
    expected = next(iter(run_eager(replace(model, module=emulate(model.module, some)), inputs).values()))
    assert np.median(np.abs(answer(tmp_path / FILE, inputs) - expected)[real]) < 1e-5


def test_the_rest_in_bf16(tmp_path: Path, exported: Path, layers: list[QuantizedLinear]) -> None:
    """The other weights are half as large, and the file says how it is to be run."""
    some = [layer for layer in layers if layer.name.startswith("encoder.layer.0.")]
    backend.quantize(tmp_path, exported, Layers(some), "bf16")
    program = openvino.Core().read_model(tmp_path / FILE)
    kinds = {node.get_element_type() for node in every_node(program) if node.get_type_name() == "Constant"}
    assert {openvino.Type.i8, openvino.Type.bf16} <= kinds
    assert program.get_rt_info(["runtime_options", "INFERENCE_PRECISION_HINT"]).astype(str) == "bf16"


def test_the_same_layers_are_the_same_bytes(tmp_path: Path, exported: Path, layers: list[QuantizedLinear], made: Any) -> None:
    backend.quantize(tmp_path, exported, Layers(layers), "fp32")
    for suffix in (".xml", ".bin"):
        assert (tmp_path / FILE).with_suffix(suffix).read_bytes() == made[0].with_suffix(suffix).read_bytes()


def test_layers_with_one_input_and_different_ranges() -> None:
    """Each has its own quantization of it."""
    x = ops.parameter([-1, 8], np.float32)
    weights = [RANDOM.standard_normal((4, 8)).astype(np.float32) for _ in range(2)]
    made = [
        QuantizedLinear(
            f"layer {number}",
            digest(weight),
            np.clip(np.round(weight / 0.03), -127, 127).astype(np.int8),
            np.full(4, 0.03, dtype=np.float32),
            None,
            scale,
            128,
            np.zeros(4, dtype=np.float32),
        )
        for number, (weight, scale) in enumerate(zip(weights, (0.02, 0.4), strict=True))
    ]
    products = [ops.matmul(x, ops.constant(weight), False, True) for weight in weights]
    program = openvino.Model([ops.result(product) for product in products], [x])
    done, arrays = openvino_int8.quantize(program, Layers(made))
    assert len(done) == 2
    rows = RANDOM.standard_normal((50, 8)).astype(np.float32)
    compiled = openvino.Core().compile_model(program, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for layer, found in zip(made, compiled(rows).values(), strict=True):
        steps = np.clip(np.round(rows / layer.scale), -128, 127) * layer.scale
        expected = steps @ (layer.weight.astype(np.float32) * layer.weight_scale[:, None]).T
        assert np.abs(found - expected).max() < 1e-3
    del arrays
