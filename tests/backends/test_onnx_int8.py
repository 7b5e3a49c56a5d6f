"""int8 in ONNX files: the same answers as the formula has in PyTorch, layers found and left, nothing in the file twice."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from compiler.backends import onnx as backend
from compiler.fusions import onnx_int8
from compiler.quantization.layers import NO_TABLE, Layers, QuantizedLinear, digest
from compiler.stages.load import run_eager
from compiler.types import Model, Target
from tests.backends.conftest import export, load_checkpoint
from tests.debian import MISSING, environment, program
from tests.quantization.formula import formula, rows_of, widened, with_rows
from tests.zoo import save_checkpoint

Array = np.ndarray[Any, Any]
FILE = "onnx/model_quantized.onnx"


def quantized(name: str, weight: Array, samples: Array, smooth: Array | None, top: int = 127) -> QuantizedLinear:
    """A layer of round numbers: symmetric weights by the channel, activations between their smallest and largest."""
    factors = np.ones(weight.shape[1], dtype=np.float32) if smooth is None else smooth
    values = np.append(samples * factors, 0)
    scale = float(np.float32((values.max() - values.min()) / 255))
    smoothed = weight / factors
    weight_scale = (np.abs(smoothed).max(axis=1) / top).astype(np.float32)
    rounded = np.rint(smoothed / weight_scale[:, None]).astype(np.int8)
    shift = np.linspace(-0.01, 0.01, len(weight), dtype=np.float32)
    return QuantizedLinear(name, digest(weight), rounded, weight_scale, smooth, scale, round(-values.min() / scale), shift)


def rounded_by(model: Model, layers: Iterable[QuantizedLinear]) -> Model:
    """A copy of the model that computes these layers by the formula."""
    copied = replace(model, module=copy.deepcopy(model.module))
    modules: dict[str, Any] = dict(linears(copied))
    for layer in layers:
        bias = modules[layer.name].bias.detach()
        modules[layer.name].forward = lambda x, layer=layer, bias=bias: formula(x, layer, bias).float()
    return copied


def linears(model: Model) -> dict[str, torch.nn.Linear]:
    return {name: module for name, module in model.module.named_modules() if isinstance(module, torch.nn.Linear)}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, model: Model) -> Path:
    out = tmp_path_factory.mktemp("fp32")
    export(backend, out, model, Target("onnx", "fp32"))
    return out


@pytest.fixture(scope="module")
def layers(model: Model) -> list[QuantizedLinear]:
    return plan(model)


def plan(model: Model) -> list[QuantizedLinear]:
    """All layers, smoothed but for the feed-forward's second; those of one input have scale and factors in common."""
    generator = np.random.default_rng(3)
    inputs: dict[str, Array] = {}
    hooks = []
    for name, module in linears(model).items():
        hook = module.register_forward_hook(lambda _, given, __, name=name: inputs.update({name: given[0].numpy()}))
        hooks.append(hook)
    run_eager(model, {name: value.numpy() for name, value in model.example.items()})
    for hook in hooks:
        hook.remove()
    found: list[QuantizedLinear] = []
    smooths: dict[bytes, Array] = {}
    for name, module in linears(model).items():
        samples = inputs[name].reshape(-1, module.in_features)
        smooth = smooths.setdefault(samples.tobytes(), generator.uniform(0.5, 2, module.in_features).astype(np.float32))
        unsmoothed = name.endswith(".output.dense") and "attention" not in name
        found.append(quantized(name, module.weight.detach().numpy(), samples, None if unsmoothed else smooth))
    return found


def answer(path: Path, inputs: dict[str, Array], **entries: str) -> Array:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {one.name: inputs[one.name] for one in session.get_inputs()})[0])


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx_ir.load(path).graph.all_nodes()]


def batch(mask: Iterable[Iterable[int]]) -> dict[str, Array]:
    flags = np.array(list(map(list, mask)), dtype=np.int64)
    ids = np.random.default_rng(flags.size).integers(5, 30, flags.shape)
    return {"input_ids": ids, "attention_mask": flags, "token_type_ids": np.zeros_like(flags)}


def test_attention_behind_a_projection_of_embeddings(tmp_path: Path) -> None:
    """ELECTRA's, where these are narrower than the encoder: what is given to the first attention comes by way of a reshape."""
    model = load_checkpoint(save_checkpoint(tmp_path / "narrow", "electra", embedding_size=16))
    (tmp_path / "fp32").mkdir()
    export(backend, tmp_path / "fp32", model, Target("onnx", "fp32"))
    given = {name: value.numpy() for name, value in model.example.items()}
    found = plan(model)
    known = backend.quantize(tmp_path, tmp_path / "fp32", Layers(found), "fp32")
    assert known["left"] == {}
    assert set(known["int8"]) == {layer.name for layer in found}
    for inputs in (given, {**given, "attention_mask": np.ones_like(given["attention_mask"])}):
        real = inputs["attention_mask"].astype(bool)
        expected = run_eager(rounded_by(model, found), inputs)["last_hidden_state"]
        assert np.median(np.abs(answer(tmp_path / FILE, inputs) - expected)[real]) < 1e-5


BATCHES = {
    "one token": batch([[1]]),
    "unpadded": batch(np.ones((3, 7), dtype=np.int64)),
    "right": batch([[1] * 9, [1] * 4 + [0] * 5, [1] * 2 + [0] * 7]),
    "left": batch([[0] * 5 + [1] * 4, [1] * 9]),
    "holes": batch([[1, 0, 1, 1, 0, 1], [0, 1, 0, 1, 0, 1]]),
    "an empty row": batch([[1] * 5, [0] * 5, [1, 1, 0, 0, 0]]),
    "eight texts": batch((np.arange(11) < np.arange(3, 11)[:, None]).astype(np.int64)),
}


@pytest.fixture(scope="module")
def file(
    tmp_path_factory: pytest.TempPathFactory, exported: Path, layers: list[QuantizedLinear]
) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("int8")
    known = backend.quantize(out, exported, Layers(layers), "fp32")
    return out / FILE, known


@pytest.mark.parametrize("name", BATCHES)
def test_answers_are_those_of_the_formula(
    name: str, model: Model, layers: list[QuantizedLinear], file: tuple[Path, dict[str, Any]]
) -> None:
    inputs = BATCHES[name]
    original = next(iter(run_eager(model, inputs).values()))
    expected = next(iter(run_eager(rounded_by(model, layers), inputs).values()))
    real = inputs["attention_mask"].astype(bool)
    error, rounding = (np.abs(side - expected)[real] for side in (answer(file[0], inputs), original))
    assert rounding.max() > 3e-3  # else the next says nothing
    # Where a value lies between two steps, one of them may be taken here and the other there.
    assert np.median(error) < 1e-5
    assert error.max() < rounding.max() / 2
    assert not answer(file[0], inputs)[~real].any()


@pytest.mark.parametrize("name", ["unpadded", "right", "left"])
def test_channels_given_more_than_once(
    name: str, tmp_path: Path, model: Model, exported: Path, layers: list[QuantizedLinear]
) -> None:
    wide = widened(layers)
    known = backend.quantize(tmp_path, exported, Layers(wide), "fp32")
    assert set(known["int8"]) == {layer.name for layer in layers}
    onnx.checker.check_model(str(tmp_path / FILE))
    inputs = BATCHES[name]
    real = inputs["attention_mask"].astype(bool)
    expected = next(iter(run_eager(rounded_by(model, wide), inputs).values()))
    narrow = next(iter(run_eager(rounded_by(model, layers), inputs).values()))
    error, difference = (np.abs(side - expected)[real] for side in (answer(tmp_path / FILE, inputs), narrow))
    assert np.median(error) < 1e-5
    assert error.max() < difference.max() / 2


def test_every_layer_is_int8_and_nothing_is_in_the_file_twice(
    exported: Path, layers: list[QuantizedLinear], file: tuple[Path, dict[str, Any]]
) -> None:
    path, known = file
    assert known["int8"] == dict.fromkeys(sorted(layer.name for layer in layers), "MatMulIntegerToFloat")
    assert known["left"] == {}
    assert known["opset"] == onnx_ir.load(path).graph.opset_imports[""]
    counts = known["fusions"]
    assert counts["padding_free"] == counts["MultiHeadAttention"] == 2
    assert counts["MatMulIntegerToFloat"] == len(layers)
    onnx.checker.check_model(str(path))
    kept = [numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer]
    small = [array.T.tobytes() for array in kept if array.dtype == np.int8]
    assert sorted(small) == sorted(layer.weight.tobytes() for layer in layers)
    replaced = {layer.weight.shape for layer in layers} | {layer.weight.shape[::-1] for layer in layers}
    assert not [array for array in kept if array.dtype == np.float32 and array.shape in replaced and len(array) > 2 * 32]
    unused = [value.name for value in onnx_ir.load(path).graph.initializers.values() if not value.uses()]
    assert unused == []


def test_queries_keys_and_values_share_their_input(layers: list[QuantizedLinear], file: tuple[Path, dict[str, Any]]) -> None:
    inputs = {(layer.scale, layer.zero_point) for layer in layers}
    assert file[1]["fusions"]["QuantizeLinear"] == operators(file[0]).count("QuantizeLinear") == len(inputs)


def test_attention_has_its_smoothing_in_the_values(layers: list[QuantizedLinear], file: tuple[Path, dict[str, Any]]) -> None:
    """A product by the factors is left for each input that has some, but for the two that attention gives."""
    smoothed = {(layer.scale, layer.zero_point) for layer in layers if layer.smooth is not None}
    products = [str(node.name) for node in onnx_ir.load(file[0]).graph if node.op_type == "Mul"]
    assert len([name for name in products if name.startswith("int8.")]) == len(smoothed) - 2


def test_other_layers_stay_as_they_were(tmp_path: Path, exported: Path, layers: list[QuantizedLinear], model: Model) -> None:
    """Some of one attention's layers only, and one product of the feed-forward."""
    names = [name for name in linears(model) if "layer.0" in name and ("value" in name or "intermediate" in name)]
    assert len(names) == 2
    some = [layer for layer in layers if layer.name in names]
    known = backend.quantize(tmp_path, exported, Layers(some), "fp32")
    assert set(known["int8"]) == set(names)
    assert known["fusions"]["Attention"] == known["fusions"]["MultiHeadAttention"] == 1
    inputs = BATCHES["right"]
    expected = next(iter(run_eager(rounded_by(model, some), inputs).values()))
    real = inputs["attention_mask"].astype(bool)
    assert np.median(np.abs(answer(tmp_path / FILE, inputs) - expected)[real]) < 1e-5


def test_no_layers_change_nothing(tmp_path: Path, exported: Path) -> None:
    known = backend.quantize(tmp_path, exported, Layers([]), "fp32")
    assert known["int8"] == known["left"] == {}
    for inputs in BATCHES.values():
        assert np.array_equal(answer(tmp_path / FILE, inputs), answer(exported / "onnx/model.onnx", inputs))


def test_layers_that_are_not_there_are_left(tmp_path: Path, exported: Path, layers: list[QuantizedLinear]) -> None:
    other = replace(layers[0], name="other", digest="0" * 64)
    known = backend.quantize(tmp_path, exported, Layers([*layers[1:], other]), "fp32")
    assert known["left"] == {"other": "its weights are not in the graph"}
    assert set(known["int8"]) == {layer.name for layer in layers[1:]}


def test_the_same_file_is_made_again(tmp_path: Path, exported: Path, model: Model, layers: list[QuantizedLinear]) -> None:
    for name in ("one", "two"):
        backend.quantize(tmp_path / name, exported, Layers(layers, rows_of(model.module)), "fp32")
    assert (tmp_path / "one" / FILE).read_bytes() == (tmp_path / "two" / FILE).read_bytes()


def test_embeddings_by_the_row(tmp_path: Path, exported: Path, model: Model) -> None:
    tables = rows_of(model.module)
    assert "embeddings.word_embeddings" in {table.name for table in tables}
    other = replace(tables[0], name="other", digest="0" * 64)
    known = backend.quantize(tmp_path, exported, Layers([], [*tables, other]), "fp32")
    assert known["int8"] == {table.name: "Gather" for table in tables}
    assert known["left"] == {"other": NO_TABLE}
    kept = onnx_ir.load(tmp_path / FILE).graph.initializers
    assert not {f"{table.name}.weight" for table in tables} & set(kept)
    copied = replace(model, module=with_rows(model.module, tables))
    inputs = BATCHES["left"]
    expected = next(iter(run_eager(copied, inputs).values()))
    real = inputs["attention_mask"].astype(bool)
    assert np.allclose(answer(tmp_path / FILE, inputs)[real], expected[real], atol=2e-5)


def graph_of(nodes: list[onnx.NodeProto], shape: list[Any], outputs: list[str], **constants: Array) -> onnx_ir.Model:
    kind = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        nodes,
        "graph",
        [onnx.helper.make_tensor_value_info("x", kind, shape)],
        [onnx.helper.make_tensor_value_info(name, kind, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return onnx_ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10))


def run_graph(model: onnx_ir.Model, values: Array) -> list[Array]:
    session = onnxruntime.InferenceSession(onnx_ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return [np.asarray(array) for array in session.run(None, {"x": values})]


def test_gemm_of_both_orientations_and_what_is_joined() -> None:
    generator = np.random.default_rng(5)
    values = generator.standard_normal((4, 16)).astype(np.float32)
    weights = [generator.standard_normal((size, 16)).astype(np.float32) for size in (8, 12, 8)]
    bias = np.arange(8, dtype=np.float32)
    found = [quantized(name, weight, values, None) for name, weight in zip("abc", weights, strict=True)]
    make = onnx.helper.make_node
    nodes = [
        make("Gemm", ["x", "a", "bias"], ["y"], transB=1),
        make("MatMul", ["x", "bc"], ["z"]),
        make("MatMul", ["y", "tied"], ["t"]),
        make("Transpose", ["tied"], ["u"]),
    ]
    tied = generator.standard_normal((8, 8)).astype(np.float32)
    constants = {"a": weights[0], "bc": np.concatenate(weights[1:]).T.copy(), "bias": bias, "tied": tied}
    model = graph_of(nodes, ["rows", 16], ["y", "z", "t", "u"], **constants)
    last = quantized("d", tied.T.copy(), np.eye(8, dtype=np.float32), None)
    done, left = onnx_int8.quantize(model, Layers([*found, last]))
    assert list(done) == ["a", "b", "c"]
    assert left == {"d": "its weights are used by Transpose as well"}
    got = run_graph(model, values)
    expected = [formula(torch.tensor(values), layer, None).float().numpy() for layer in found]
    assert np.allclose(got[0], expected[0] + bias, atol=1e-4)
    assert np.allclose(got[1], np.concatenate(expected[1:], axis=1), atol=1e-4)
    assert np.allclose(got[2], got[0] @ tied, atol=1e-3)


# It has AVX2 and no VNNI. ONNX Runtime itself has no setting that caps what it uses of a CPU.
HASWELL = pytest.mark.skipif(program("qemu-x86_64") is None, reason=MISSING.format("qemu-x86_64"))


def haswell(script: str, *arguments: str) -> None:
    command = [str(program("qemu-x86_64")), "-cpu", "Haswell", sys.executable, "-c", script, *arguments]
    subprocess.run(command, env=environment(), check=True, capture_output=True, timeout=300)


SATURATING = """
import sys, numpy as np, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
options.add_session_config_entry("session.x64quantprecision", sys.argv[2])
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
np.save(sys.argv[1] + ".npy", session.run(None, {"x": np.ones((3, 64), np.float32)})[0])
"""


@HASWELL
@pytest.mark.parametrize(("top", "precise", "right"), [(127, "0", False), (127, "1", True), (63, "0", True)])
def test_cpus_whose_sums_saturate(tmp_path: Path, top: int, precise: str, right: bool) -> None:
    """With AVX2 alone two products are summed in 16 bits: 2 × 255 × 127 is too much for these, 2 × 255 × 63 is not."""
    weight = np.ones((8, 64), dtype=np.float32)
    layer = replace(quantized("a", weight, np.ones((1, 64), dtype=np.float32), None, top), zero_point=0)
    model = graph_of([onnx.helper.make_node("MatMul", ["x", "w"], ["y"])], ["rows", 64], ["y"], w=weight.T.copy())
    onnx_int8.quantize(model, Layers([layer]))
    path = tmp_path / "model.onnx"
    onnx_ir.save(model, path)
    haswell(SATURATING, str(path), precise)
    expected = formula(torch.ones(3, 64), layer, None).float().numpy()
    assert np.allclose(np.load(f"{path}.npy"), expected, rtol=1e-5) == right
