"""OpenVINO files: half the size in bf16, rounded as torch rounds, and distances that bf16 cannot misplace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino.opset14 as ops
import pytest
import torch

from compiler.backends import openvino as backend
from compiler.fusions.openvino_graph import every_node
from compiler.stages.load import run_eager
from compiler.types import Artifact, File, Model, Target
from tests.backends.conftest import export


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, mpnet: Model) -> tuple[Path, Path]:
    fp32, bf16 = tmp_path_factory.mktemp("fp32"), tmp_path_factory.mktemp("bf16")
    export(backend, fp32, mpnet, Target("openvino", "fp32"))
    backend.reduce(bf16, fp32, "bf16")
    return fp32, bf16


def weights(path: Path) -> dict[str, Any]:
    model = openvino.Core().read_model(path)
    return {
        node.get_friendly_name(): node
        for node in model.get_ordered_ops()
        if node.get_type_name() == "Constant" and node.get_byte_size() >= 2 * backend.SMALLEST_WEIGHT
    }


def test_weights_are_rounded_as_torch_rounds(exported: tuple[Path, Path]) -> None:
    fp32 = weights(exported[0] / "openvino/openvino_model.xml")
    bf16 = weights(exported[1] / "openvino/openvino_model_bf16.xml")
    large = {name for name, node in fp32.items() if node.get_byte_size() >= 4 * backend.SMALLEST_WEIGHT}
    assert large
    for name in large:
        assert bf16[name].get_element_type() == openvino.Type.bf16
        bits = np.asarray(bf16[name].data).view(np.uint16)
        expected = torch.from_numpy(np.array(fp32[name].data)).to(torch.bfloat16).view(torch.uint16).numpy()
        assert np.array_equal(bits.reshape(expected.shape), expected)


def test_rounded_weights_are_used_as_they_are(model: Model, tmp_path: Path) -> None:
    """In both branches, and what else is converted is not said to be a weight."""
    export(backend, tmp_path / "fp32", model, Target("openvino", "fp32"))
    backend.reduce(tmp_path / "bf16", tmp_path / "fp32", "bf16")
    program = openvino.Core().read_model(tmp_path / "bf16/openvino/openvino_model_bf16.xml")
    converts = [node for node in every_node(program) if node.get_type_name() == "Convert"]
    rounded = [node for node in converts if node.input_value(0).get_element_type() == openvino.Type.bf16]
    assert len(rounded) == 2 * len({node.input_value(0).get_node().data.ctypes.data for node in rounded}) > 0
    assert [node for node in converts if "decompression_0" in node.get_rt_info()] == rounded


def test_ties_round_to_even() -> None:
    values = np.array([1.0, 1.00390625, 1.01171875, -1.00390625, 3.3895314e38, 1e-40], dtype=np.float32)
    many = np.tile(values, 1000)
    constant = openvino.op.Constant(many)
    rounded = backend._round_to_bf16(constant)
    expected = torch.from_numpy(many).to(torch.bfloat16).view(torch.uint16).numpy()
    assert np.array_equal(rounded, expected)


def test_distances_are_looked_up(exported: tuple[Path, Path], mpnet: Model) -> None:
    """No logarithm is left in the graph, and bf16 stays close to the original where it used to fail its gate."""
    model = openvino.Core().read_model(exported[0] / "openvino/openvino_model.xml")
    assert "Log" not in {node.get_type_name() for node in model.get_ordered_ops()}
    ids = np.random.default_rng(0).integers(5, 200, (3, 60), dtype=np.int64)
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    expected = run_eager(mpnet, inputs)["last_hidden_state"]
    for precision, root, close in (("fp32", exported[0], 1e-4), ("bf16", exported[1], 0.2)):
        files = tuple(File(path, "", 0) for path in backend.files(precision))  # type: ignore[arg-type]
        artifact = Artifact("openvino", precision, files, backend.runtime(precision), "")  # type: ignore[arg-type]
        actual = backend.open(root, artifact, 1)(inputs)["last_hidden_state"]
        assert np.abs(actual - expected).max() < close, precision


def test_bounds_of_the_table(exported: tuple[Path, Path], mpnet: Model) -> None:
    """The whole length that the model has positions for, which needs the table's first and last entries."""
    assert mpnet.positions == 64
    ids = np.random.default_rng(1).integers(5, 200, (1, 64), dtype=np.int64)
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    files = tuple(File(path, "", 0) for path in backend.files("fp32"))
    artifact = Artifact("openvino", "fp32", files, backend.runtime("fp32"), "")
    actual = backend.open(exported[0], artifact, 1)(inputs)["last_hidden_state"]
    assert np.abs(actual - run_eager(mpnet, inputs)["last_hidden_state"]).max() < 1e-4


@pytest.mark.parametrize("own", [False, True])
def test_packing_is_counted_where_it_is_ours(model: Model, own: bool, tmp_path: Path) -> None:
    """A model may choose between branches with attention by itself; that is not running on packed tokens."""
    if own:
        parameter = ops.parameter([-1, 4, -1, 8], np.float32, "x")
        flag = ops.parameter([], np.bool_, "flag")
        choice = ops.if_op(flag.output(0))
        bodies = []
        for _ in range(2):
            inner = ops.parameter([-1, 4, -1, 8], np.float32)
            bodies.append(openvino.Model([ops.result(ops.scaled_dot_product_attention(*[inner] * 3))], [inner]))
        choice.set_then_body(bodies[0])
        choice.set_else_body(bodies[1])
        choice.set_input(parameter.output(0), *(body.get_parameters()[0] for body in bodies))
        output = choice.set_output(*(body.get_results()[0] for body in bodies))
        known = backend._save(openvino.Model([ops.result(output)], [parameter, flag]), tmp_path / "fp32", "fp32")
    else:
        known = export(backend, tmp_path / "fp32", model, Target("openvino", "fp32"))
    assert known["fusions"].get("padding_free", 0) == (0 if own else 2)
    # And so when the file is read again.
    assert backend.reduce(tmp_path / "bf16", tmp_path / "fp32", "bf16")["fusions"] == known["fusions"]


def test_fp32_is_pinned(exported: tuple[Path, Path]) -> None:
    assert backend.runtime("fp32")["INFERENCE_PRECISION_HINT"] == "f32"
    settings = {key: value for key, value in backend.runtime("fp32").items() if key != "device"}
    compiled = openvino.Core().compile_model(str(exported[0] / "openvino/openvino_model.xml"), "CPU", settings)
    assert compiled.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.f32


def test_file_is_half(exported: tuple[Path, Path]) -> None:
    sizes = [
        sum(node.get_byte_size() for node in weights(path).values() if node.get_byte_size() >= 2 * backend.SMALLEST_WEIGHT)
        for path in (exported[0] / "openvino/openvino_model.xml", exported[1] / "openvino/openvino_model_bf16.xml")
    ]
    assert sizes[1] < sizes[0]


@pytest.mark.parametrize("divisor", [2, 5, 7, 320])
@pytest.mark.parametrize("reciprocal", [False, True])
def test_whole_numbers_are_divided_as_such(divisor: int, reciprocal: bool) -> None:
    """Rounded down, as before, and also in bf16, whose eight bits hold no length of a sound."""
    x = ops.parameter([-1], np.int64, "x")
    real = ops.convert(x, "f32")
    by = np.array([1 / divisor if reciprocal else divisor], dtype=np.float32)
    quotient = ops.multiply(real, by) if reciprocal else ops.divide(real, by)
    model = openvino.Model([ops.result(ops.convert(ops.floor(quotient), "i64"))], [x])
    assert backend._divide_in_integers(model) == 1
    values = np.array([0, 1, divisor - 1, divisor, 8000, 8001, 123_457, -1, -divisor, -divisor - 1], dtype=np.int64)
    for hint in ("f32", "bf16"):
        compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": hint})
        assert compiled(values)[0].tolist() == (values // divisor).tolist()


@pytest.mark.parametrize("by", [[2.5], [-2.0], [2.0, 4.0], [0.0]])
def test_other_divisions_stay(by: list[float]) -> None:
    x = ops.parameter([2], np.int64, "x")
    quotient = ops.divide(ops.convert(x, "f32"), np.array(by, dtype=np.float32))
    model = openvino.Model([ops.result(ops.convert(ops.floor(quotient), "i64"))], [x])
    assert backend._divide_in_integers(model) == 0
