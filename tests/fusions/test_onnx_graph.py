"""Fusions of an ONNX graph: what fires, what must not, and the same answers in ONNX Runtime before and after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper

from compiler.backends import onnx as backend
from compiler.fusions import onnx_graph
from compiler.types import Artifact, File, Model, Target
from tests.backends.conftest import export, load_checkpoint
from tests.zoo import save_checkpoint

Array = np.ndarray[Any, Any]
# Of what is given and what is answered: one text of as many tokens as there are, eight wide.
TEXT = [1, "tokens", 8]


def array(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def node(operator: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(operator, inputs.split(), [output], **attributes)


def model_of(
    nodes: Sequence[onnx.NodeProto],
    outputs: dict[str, list[Any]],
    constants: dict[str, Array],
    shape: Sequence[Any] = TEXT,
    opset: int = 20,
) -> onnx.ModelProto:
    """A model of the input `x`, with the shapes inside of it inferred, as torch's exporter leaves them."""

    def value(name: str, shape: Sequence[Any]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)

    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    results = [value(name, shape) for name, shape in outputs.items()]
    graph = helper.make_graph(nodes, "graph", [value("x", shape)], results, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return onnx.shape_inference.infer_shapes(model)


def fused(model: onnx.ModelProto, given: Array) -> tuple[dict[str, int], onnx.ModelProto]:
    """What fired, and the model after it; fails if that has other outputs, or answers otherwise."""
    program = onnx_ir.from_proto(model)
    counts = onnx_graph.fuse(program)
    after = onnx_ir.to_proto(program)
    sessions = [onnxruntime.InferenceSession(one.SerializeToString()) for one in (model, after)]
    names = [[output.name for output in session.get_outputs()] for session in sessions]
    assert names[0] == names[1]
    expected, actual = (session.run(None, {"x": given}) for session in sessions)
    for one, other in zip(expected, actual, strict=True):
        assert one.shape == other.shape
        assert np.abs(one - other).max() < 1e-5 * max(1.0, float(np.abs(one).max()))
    return counts, after


ADD_GELU = [node("Add", "x b", "y"), node("Gelu", "y", "z")]
PRODUCT = [node("MatMul", "x a", "m"), node("Add", "m b", "y")]
PRODUCTS = [node("MatMul", "x a", "y"), node("MatMul", "x b", "z")]
# The graph, its outputs, its constants, what fires, and the shape of `x` where it is another.
CASES: dict[str, tuple[list[onnx.NodeProto], dict[str, list[Any]], dict[str, Array], dict[str, int], list[Any]]] = {
    "a bias and a gelu": (ADD_GELU, {"z": TEXT}, {"b": array(8)}, {"BiasGelu": 1}, TEXT),
    "the bias comes first": (
        [node("Add", "b x", "y"), node("Gelu", "y", "z")], {"z": TEXT}, {"b": array(8)}, {"BiasGelu": 1}, TEXT
    ),
    "an approximate gelu": (
        [ADD_GELU[0], node("Gelu", "y", "z", approximate="tanh")], {"z": TEXT}, {"b": array(8)}, {}, TEXT
    ),
    "a bias of one number": (ADD_GELU, {"z": TEXT}, {"b": array(1)}, {}, TEXT),
    "a bias wider than what it is added to": (ADD_GELU, {"z": TEXT}, {"b": array(8)}, {}, [1, "tokens", 1]),
    "a width that is not known": (ADD_GELU, {"z": [1, "tokens", "width"]}, {"b": array(8)}, {}, [1, "tokens", "width"]),
    "a sum that is an output too": (ADD_GELU, {"z": TEXT, "y": TEXT}, {"b": array(8)}, {"BiasGelu": 1}, TEXT),
    "two gelus of one sum": (
        [*ADD_GELU, node("Gelu", "y", "w")], {"z": TEXT, "w": TEXT}, {"b": array(8)}, {"BiasGelu": 2}, TEXT
    ),
    "a linear layer": (PRODUCT, {"y": [1, "tokens", 4]}, {"a": array(8, 4), "b": array(4)}, {"Gemm": 1}, TEXT),
    "a linear layer of a batch": (
        PRODUCT, {"y": [2, "tokens", 4]}, {"a": array(8, 4), "b": array(4)}, {}, [2, "tokens", 8]
    ),
    "a product that is an output too": (
        PRODUCT, {"y": [1, "tokens", 4], "m": [1, "tokens", 4]}, {"a": array(8, 4), "b": array(4)}, {}, TEXT
    ),
    "a product that is used twice": (
        [*PRODUCT, node("Relu", "m", "r")],
        {"y": [1, "tokens", 4], "r": [1, "tokens", 4]},
        {"a": array(8, 4), "b": array(4)},
        {},
        TEXT,
    ),
    "a linear layer with a bias of one number": (
        PRODUCT, {"y": [1, "tokens", 4]}, {"a": array(8, 4), "b": array(1)}, {}, TEXT
    ),
    "a linear layer with a wider bias": (PRODUCT, {"y": [1, "tokens", 4]}, {"a": array(8, 1), "b": array(4)}, {}, TEXT),
    "products that are outputs": (
        PRODUCTS,
        {"y": [1, "tokens", 4], "z": [1, "tokens", 6]},
        {"a": array(8, 4), "b": array(8, 6)},
        {"concat_linear": 1},
        TEXT,
    ),
    "products of which one is an output": (
        [*PRODUCTS, node("Relu", "z", "w")],
        {"y": [1, "tokens", 4], "w": [1, "tokens", 6]},
        {"a": array(8, 4), "b": array(8, 6)},
        {"concat_linear": 1},
        TEXT,
    ),
    "products of four axes": (
        PRODUCTS,
        {"y": ["batch", 3, "tokens", 4], "z": ["batch", 3, "tokens", 6]},
        {"a": array(8, 4), "b": array(8, 6)},
        {"concat_linear": 1},
        ["batch", 3, "tokens", 8],
    ),
    "products with stacks of weights": (
        PRODUCTS, {"y": [3, 5, 4], "z": [3, 5, 6]}, {"a": array(3, 8, 4), "b": array(3, 8, 6)}, {}, [1, 5, 8]
    ),
    "products with what is multiplied from the left": (
        [node("MatMul", "a x", "y"), node("MatMul", "b x", "z")],
        {"y": [1, 4, 8], "z": [1, 6, 8]},
        {"a": array(4, 5), "b": array(6, 5)},
        {},
        [1, 5, 8],
    ),
    "products from both sides": (
        [*PRODUCTS, node("MatMul", "c x", "w")],
        {"y": [1, 5, 4], "z": [1, 5, 6], "w": [1, 4, 8]},
        {"a": array(8, 4), "b": array(8, 6), "c": array(4, 5)},
        {"concat_linear": 1},
        [1, 5, 8],
    ),
    "products of two inputs, twice": (
        [*PRODUCTS, node("Relu", "x", "w"), node("MatMul", "w a", "u"), node("MatMul", "w b", "v")],
        {"y": [1, "tokens", 4], "z": [1, "tokens", 6], "u": [1, "tokens", 4], "v": [1, "tokens", 6]},
        {"a": array(8, 4), "b": array(8, 6)},
        {"concat_linear": 2},
        TEXT,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_fuses_what_it_should(name: str) -> None:
    nodes, outputs, constants, expected, shape = CASES[name]
    given = array(*(size if isinstance(size, int) else {"batch": 2, "tokens": 5, "width": 1}[size] for size in shape))
    counts, after = fused(model_of(nodes, outputs, constants, shape), given)
    assert counts == expected
    names = [one.name for one in after.graph.node]
    assert all(names)
    assert len(names) == len(set(names))


def test_own_operators_are_declared() -> None:
    """Those of ONNX Runtime's, and only where there is one."""
    for name, domains in (("a bias and a gelu", {"", "com.microsoft"}), ("a linear layer", {""})):
        nodes, outputs, constants, _, shape = CASES[name]
        _, after = fused(model_of(nodes, outputs, constants, shape), array(1, 5, 8))
        assert {entry.domain for entry in after.opset_import} == domains


def run(path: Path, given: dict[str, torch.Tensor]) -> dict[str, Array]:
    """The outputs of a file by their names, as the format's backend opens it."""
    files = (File(path.name, "", 0),)
    artifact = Artifact("onnx", "fp32", files, backend.runtime("fp32"), key="")
    return backend.open(path.parent, artifact, 1)({name: value.numpy() for name, value in given.items()})


@pytest.fixture(scope="module", params=[None, 18, 23])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model: Model) -> Path:
    """BERT's file, at the exporter's own opset, the lowest and a high one."""
    out = tmp_path_factory.mktemp("onnx")
    known = export(backend, out, model, Target("onnx", "fp32", opset=request.param))
    assert known["opset"] == (request.param or 20)
    assert known["fusions"]["Attention"] == 2
    return out / "onnx/model.onnx"


@pytest.mark.parametrize("padded", [False, True])
def test_every_opset_answers_as_the_original(model: Model, exported: Path, padded: bool) -> None:
    ids = torch.randint(6, 200, (4, 30), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 6:] = mask[2, :9] = 0
    given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": mask * 0}
    with torch.inference_mode():
        expected = model.module(**given)["last_hidden_state"]
    actual = torch.from_numpy(run(exported, given)["last_hidden_state"])
    assert float((actual - expected)[mask > 0].abs().max()) < 1e-5 * max(1.0, float(expected.abs().max()))
    assert not actual[mask == 0].any()


def test_no_texts_at_all(exported: Path) -> None:
    """A batch of none has no answer, of the right shape; a `Reshape` would take its 0 for what it was given there."""
    none = torch.zeros((0, 8), dtype=torch.int64)
    outputs = run(exported, {"input_ids": none, "attention_mask": none, "token_type_ids": none})
    assert {name: value.shape for name, value in outputs.items()} == {
        "last_hidden_state": (0, 8, 32),
        "pooler_output": (0, 32),
    }


def test_no_texts_with_what_has_positions_of_its_own(tmp_path: Path) -> None:
    """Where attention takes queries, keys and values that are ready."""
    export(backend, tmp_path, load_checkpoint(save_checkpoint(tmp_path / "modernbert", "modernbert")), Target("onnx", "fp32"))
    none = torch.zeros((0, 8), dtype=torch.int64)
    outputs = run(tmp_path / "onnx/model.onnx", {"input_ids": none, "attention_mask": none})
    assert outputs["last_hidden_state"].shape == (0, 8, 32)


def optimized(path: Path, out: Path) -> list[str]:
    """The operators that ONNX Runtime makes of a file when it opens it."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(out)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options)
    return [one.op_type for one in onnx.load(out).graph.node]


def test_norms_are_not_joined_with_sums(exported: Path, tmp_path: Path) -> None:
    """ONNX Runtime's kernel for both is slower than its kernels for each."""
    operators = optimized(exported, tmp_path / "optimized.onnx")
    assert operators.count("LayerNormalization") == 5
    assert "SkipLayerNormalization" not in operators


def test_norms_would_be_joined_where_shapes_are_known(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is why they are left out. When this fails, ONNX Runtime needs no keeping from it any more."""
    monkeypatch.setattr(onnx_graph, "_forget_shapes", lambda graph: None)
    export(backend, tmp_path, model, Target("onnx", "fp32"))
    assert "SkipLayerNormalization" in optimized(tmp_path / "onnx/model.onnx", tmp_path / "joined.onnx")


def test_counts_are_of_onnx_and_of_ours() -> None:
    """From opset 23 on ONNX has an `Attention` of its own, which is not the one that is expected here."""
    given = [onnx_ir.Value(name=name) for name in "qkv"]
    nodes = [
        onnx_ir.node("Attention", given),
        onnx_ir.node("LayerNormalization", given),
        onnx_ir.node("Gelu", given[:1], domain="com.example"),
    ]
    graph = onnx_ir.Graph(given, nodes[0].outputs, nodes=nodes, opset_imports={"": 23})
    assert backend.fusions(graph, {}) == {"LayerNormalization": 1}
    assert backend.fusions(graph, {"Attention": 2}) == {"Attention": 2, "LayerNormalization": 1}
