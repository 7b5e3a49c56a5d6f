"""Comparing releases: hand-made pairs, whose differences are known, and a built one, whose files other readers count."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compiler.diff import KINDS, diff, parse_gate, worse
from compiler.diff_text import text
from compiler.errors import ConfigError, ReleaseError
from compiler.graphs import read_graph
from compiler.hashing import canonical, hash_file
from compiler.manifest import MANIFEST, VALIDATION, Made, Manifest, from_bytes
from compiler.types import Artifact
from compiler.verify import read_release
from tests.conftest import Command, error_line, seal, write_pipeline
from tests.registries.conftest import make_release, one_line

BASE = {"config.json": b"{}", "tokenizer.json": b"tokens"}


def onnx_model(*, dtype: str = "float32", gelu: bool = True) -> bytes:
    """[batch, 4] times a weight, plus a bias, halved, an activation, and in a branch a second weight, of two bytes each."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights = [
        numpy_helper.from_array(np.ones((4, 4), dtype=dtype), "first.weight"),
        numpy_helper.from_array(np.ones(4, dtype=dtype), "first.bias"),
        numpy_helper.from_array(np.array([-1, 4], dtype=np.int64), "shape"),
        numpy_helper.from_array(np.array(0.5, dtype=dtype), "half"),
    ]
    inner = helper.make_graph(
        [helper.make_node("MatMul", ["sum", "second.weight"], ["then"], name="second")],
        "then",
        [],
        [helper.make_tensor_value_info("then", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.ones((4, 4), dtype=np.float16), "second.weight")],
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["sum"], ["else"])], "else", [], [helper.make_tensor_value_info("else", 1, None)]
    )
    nodes = [
        helper.make_node("Cast", ["first.weight"], ["wide"], to=TensorProto.FLOAT, name="cast"),
        helper.make_node("MatMul", ["x", "wide"], ["product"], name="first"),
        helper.make_node("Add", ["product", "first.bias"], ["sum"], name="first.add"),
        helper.make_node("If", ["flag"], ["chosen"], then_branch=inner, else_branch=other, name="if"),
        helper.make_node("Mul", ["chosen", "half"], ["less"], name="half"),
        helper.make_node("Reshape", ["less", "shape"], ["flat"], name="reshape"),
        helper.make_node("Gelu" if gelu else "Erf", ["flat"], ["y"], name="activation"),
    ]
    inputs = [helper.make_tensor_value_info("x", 1, ["b", 4]), helper.make_tensor_value_info("flag", TensorProto.BOOL, [])]
    graph = helper.make_graph(nodes, "graph", inputs, [helper.make_tensor_value_info("y", 1, ["b", 4])], weights)
    content: bytes = onnx.ModelProto.SerializeToString(helper.make_model(graph))
    return content


def release(
    folder: Path,
    files: Mapping[str, bytes],
    *,
    checks: Mapping[str, tuple[float, float]] | None = None,
    figures: Mapping[str, float] | None = None,
    metrics: Mapping[str, float] | None = None,
    fusions: Mapping[str, int] | None = None,
    speed: Mapping[str, float] | None = None,
    change: Callable[[Manifest], Manifest] = lambda manifest: manifest,
) -> Path:
    """A release whose artifacts all have these checks (figure, limit), figures without a limit, metrics, fusions and recorded
    ratios to eager."""
    manifest = make_release(folder, files)
    stored = json.loads((folder / VALIDATION).read_bytes())
    checked = {"logits cosine": (0.9999, 0.999), "logits max_abs": (1e-5, 1e-4)} if checks is None else checks
    for entry in stored["artifacts"]:
        entry["metrics"] = dict(metrics or {})
        entry["outputs"] = {name.split()[0]: {"figures": {name.split()[1]: one}} for name, one in (figures or {}).items()}
        entry["checks"] = [
            {"output": name.split()[0], "name": name.split()[1], "figure": figure, "limit": limit, "passed": True, "worst": ""}
            for name, (figure, limit) in checked.items()
        ]
    (folder / VALIDATION).write_bytes(canonical(stored))
    timings = [
        {"subject": subject, "shape": "1x16", "p50": 10 / ratio, "p90": 10.0, "ratio": ratio, "texts_per_second": 1.0}
        for subject, ratio in {"eager fp32": 1.0, **(speed or {})}.items()
    ]
    manifest = replace(
        manifest,
        files=tuple(hash_file(folder, file.path) for file in manifest.files),
        artifacts=tuple(replace(one, fusions=dict(fusions or {})) for one in manifest.artifacts),
        benchmark=None if speed is None else {"threads": 2, "rounds": 1, "cpu": "avx2", "machine": "x86", "timings": timings},
    )
    seal(folder, change(manifest))
    return folder


@pytest.fixture(scope="module")
def model() -> bytes:
    return onnx_model()


def test_the_same_release_twice(tmp_path: Path, model: bytes) -> None:
    one, two = (release(tmp_path / name, {**BASE, "onnx/model.onnx": model}) for name in "ab")
    found = diff(one, two)
    assert found["artifacts"]["onnx fp32"]["same"]
    assert not any(found["files"][kind] for kind in ("added", "removed", "changed")) and found["files"]["same"] == 4
    assert worse(found, [parse_gate(kind) for kind in ("regress", "files", "numerics", "size", "fusions", "artifacts")]) == []
    lines = text(found).splitlines()
    assert "files: the same" in lines and "onnx fp32: the same" in lines and "  recorded  for neither release" in lines


def test_files(tmp_path: Path, model: bytes) -> None:
    one = release(tmp_path / "a", {**BASE, "onnx/model.onnx": model, "old.txt": b"old"})
    two = release(tmp_path / "b", {**BASE, "onnx/model.onnx": model, "new.txt": b"newer", "config.json": b"{ }"})
    files = diff(one, two)["files"]
    assert (
        files["added"] == {"new.txt": 5} and files["removed"] == {"old.txt": 3} and files["changed"] == {"config.json": [2, 3]}
    )
    assert worse(diff(one, two), [parse_gate("files")]) == ["new.txt is added", "old.txt is removed", "config.json is changed"]
    shown = text(diff(one, two))
    assert (
        "  added    new.txt  5 bytes\n  removed  old.txt  3 bytes\n  changed  config.json  2 bytes → 3 bytes (+50.0 %)"
        in shown
    )


def test_what_is_in_an_onnx_file(tmp_path: Path, model: bytes) -> None:
    one = release(tmp_path / "a", {**BASE, "onnx/model.onnx": model})
    two = release(tmp_path / "b", {**BASE, "onnx/model.onnx": onnx_model(dtype="float16", gelu=False)})
    before = read_graph(one, Artifact("onnx", "fp32", (hash_file(one, "onnx/model.onnx"),), {}, ""))
    assert before.operators == {"Add": 1, "Cast": 1, "Gelu": 1, "Identity": 1, "If": 1, "MatMul": 2, "Mul": 1, "Reshape": 1}
    assert before.layers == {"first": "fp32", "first.add": "fp32", "second": "fp16"}
    found = diff(one, two)["artifacts"]["onnx fp32"]
    assert not found["same"]
    assert found["operators"] == {"Erf": [None, 1], "Gelu": [1, None]}
    assert found["layers"] == {"first": ["fp32", "fp16"], "first.add": ["fp32", "fp16"]}
    shown = text(diff(one, two))
    assert "precision  fp32 → fp16  2 layers: first, first.add" in shown and "operators  Erf  none → 1" in shown


def test_what_is_in_an_openvino_file(tmp_path: Path) -> None:
    """Against OpenVINO's own reader, on weights that are stored as they are, or narrow and converted."""
    import numpy as np
    import openvino
    from openvino import opset13 as ops

    x = ops.parameter([-1, 4], np.float32)
    product = ops.matmul(x, ops.constant(np.full((4, 4), 0.3, np.float32)), False, False, name="product")
    product = ops.multiply(product, ops.constant(np.float32(0.5)))
    total = ops.add(product, ops.constant(np.full((1, 4), 0.3, np.float32)))
    graph = openvino.Model([ops.reshape(total, ops.constant(np.array([-1], np.int64)), False)], [x], "net")
    for name, narrow in (("wide", False), ("narrow", True)):
        openvino.save_model(graph, str(tmp_path / f"{name}.xml"), compress_to_fp16=narrow)
        found = read_graph(tmp_path, Artifact("openvino", "fp32", (hash_file(tmp_path, f"{name}.xml"),), {}, ""))
        read = openvino.Core().read_model(str(tmp_path / f"{name}.xml"))
        kinds = Counter(node.get_type_name() for node in read.get_ops())
        assert found.operators == {kind: n for kind, n in kinds.items() if kind not in ("Constant", "Parameter", "Result")}
        assert found.layers == dict.fromkeys(("product", "Add 1"), "fp16" if narrow else "fp32")


def test_what_is_in_a_torchscript_file(tmp_path: Path) -> None:
    import torch

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Linear(4, 4)
            self.second = torch.nn.Linear(4, 4).to(torch.bfloat16)

        def forward(self, x: torch.Tensor) -> Any:
            return torch.tanh(self.second(self.first(x).to(torch.bfloat16)))

    traced = torch.jit.trace(Layer().eval(), torch.ones(1, 4))
    traced.save(str(tmp_path / "model.pt"))
    found = read_graph(tmp_path, Artifact("torchscript", "fp32", (hash_file(tmp_path, "model.pt"),), {}, ""))
    graph = traced.inlined_graph
    nodes = {kind: len(graph.findAllNodes(kind)) for kind in ("aten::linear", "aten::tanh")}
    assert {kind: found.operators[kind] for kind in nodes} == nodes == {"aten::linear": 2, "aten::tanh": 1}
    truth = {name: str(value.dtype).removeprefix("torch.") for name, value in traced.named_parameters()}
    assert found.layers == {name: {"float32": "fp32", "bfloat16": "bf16"}[dtype] for name, dtype in truth.items()}


def test_a_torchscript_file_that_would_run_something(tmp_path: Path) -> None:
    import pickle
    import zipfile

    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("model/code/__torch__.py", "torch.add(x, y)\n")
        archive.writestr("model/data.pkl", pickle.dumps(Evil(), protocol=2))
    with pytest.raises(ReleaseError):
        read_graph(tmp_path, Artifact("torchscript", "fp32", (hash_file(tmp_path, "model.pt"),), {}, ""))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("format", ["onnx", "openvino", "torchscript"])
def test_files_that_cannot_be_read(tmp_path: Path, format: str) -> None:
    (tmp_path / "model").write_bytes(b"nothing of the kind")
    with pytest.raises(ReleaseError, match=f"cannot be read as {format}"):
        read_graph(tmp_path, Artifact(format, "fp32", (hash_file(tmp_path, "model"),), {}, ""))


def test_everything_else_that_can_differ(tmp_path: Path, model: bytes) -> None:
    def change(manifest: Manifest) -> Manifest:
        return replace(
            manifest,
            libraries={"torch": "2.14.0"},
            python="3.12.1",
            positions=128,
            source=replace(manifest.source, files=(replace(manifest.source.files[0], sha256="1" * 64),)),
            steps={"load": Made("2", {"torch": "2.14.0", "data": "x", "step load": "9"})},
            artifacts=tuple(replace(one, opset=21, runtime={"threads": 2}, declined={"x": "y"}) for one in manifest.artifacts),
        )

    def base(manifest: Manifest) -> Manifest:
        steps = {"load": Made("1", {"torch": "2.13.0", "data": "x", "step load": "8"}), "export": Made("3", {"torch": "2"})}
        return replace(manifest, steps=steps)

    one = release(tmp_path / "a", {**BASE, "onnx/model.onnx": model}, change=base)
    two = release(tmp_path / "b", {**BASE, "onnx/model.onnx": model}, change=change)
    found = diff(one, two)
    assert found["release"] == {"python": ["3.11.2", "3.12.1"], "positions": [512, 128]}
    assert found["libraries"] == {"torch": ["2.13.0", "2.14.0"]}
    assert found["source"] == {"model.safetensors": ["0" * 64, "1" * 64]}
    assert found["steps"] == {"load": ["torch 2.13.0 → 2.14.0"], "export": ["removed"]}
    artifact = found["artifacts"]["onnx fp32"]
    assert artifact["settings"] == {"opset": [None, 21], "runtime threads": [None, 2]} and not artifact["same"]
    assert artifact["declined"] == {"x": [None, "y"]}
    assert worse(found, [parse_gate("regress=0")]) == []


CASES: list[tuple[str, dict[str, Any], dict[str, Any], str | None]] = [
    # An error of a tenth of its limit that becomes two tenths.
    ("numerics=9", {"checks": {"a max_abs": (1e-5, 1e-4)}}, {"checks": {"a max_abs": (2e-5, 1e-4)}}, "10 % of what its limit"),
    ("numerics=11", {"checks": {"a max_abs": (1e-5, 1e-4)}}, {"checks": {"a max_abs": (2e-5, 1e-4)}}, None),
    ("numerics", {"checks": {"a max_abs": (2e-5, 1e-4)}}, {"checks": {"a max_abs": (1e-5, 1e-4)}}, None),
    ("numerics=9", {"checks": {"a cosine": (0.9999, 0.999)}}, {"checks": {"a cosine": (0.9998, 0.999)}}, "a cosine went from"),
    ("numerics=11", {"checks": {"a cosine": (0.9999, 0.999)}}, {"checks": {"a cosine": (0.9998, 0.999)}}, None),
    # Three times the error, and rounding; just more than that.
    ("numerics", {"checks": {"a max_abs": (9e-7, 1e-4)}}, {"checks": {"a max_abs": (2.8e-6, 1e-4)}}, None),
    ("regress", {"checks": {"a max_abs": (9e-7, 1e-4)}}, {"checks": {"a max_abs": (3e-6, 1e-4)}}, "2 % may be"),
    ("numerics", {"checks": {"a cosine": (1 - 1e-12, 0.999)}}, {"checks": {"a cosine": (1 - 2e-12, 0.999)}}, None),
    ("regress=5", {"checks": {"a argmax": (1.0, 0.98)}}, {"checks": {"a argmax": (0.99, 0.98)}}, "50 % of what its limit"),
    ("numerics=9", {"checks": {"a kl": (1e-5, 1e-4)}}, {"checks": {"a kl": (2e-5, 1e-4)}}, "a kl went from"),
    ("numerics=9", {"checks": {"a drop": (2e-5, 1e-4)}}, {"checks": {"a drop": (1e-5, 1e-4)}}, None),
    ("numerics", {"checks": {"a argmax": (1.0, 1.0)}}, {"checks": {"a argmax": (0.99, 0.98)}}, "its limit is 1"),
    # A looser limit does not hide that an error grew.
    ("numerics=9", {"checks": {"a max_abs": (1e-5, 1e-4)}}, {"checks": {"a max_abs": (2e-5, 1.0)}}, "limit 0.0001 allows"),
    ("numerics=5", {"checks": {"a cosine": (1.0, 0.999)}}, {"checks": {}}, "a cosine is checked no more"),
    ("regress", {"figures": {"a max_rel": 0.1}}, {"figures": {"a max_rel": 1e3}}, None),
    ("regress", {"figures": {"a max_rel": 0.1}}, {}, None),
    (
        "numerics",
        {"checks": {"a cosine": (1.0, 0.999)}, "figures": {"a cosine": 1.0}},
        {"checks": {}, "figures": {"a cosine": 1.0}},
        "a cosine is checked no more",
    ),
    ("fusions", {"fusions": {"Gelu": 6}}, {"fusions": {"Gelu": 5}}, "fuses gelu 1 times fewer (Gelu 6 → 5)"),
    ("regress=50", {"fusions": {"new": 6}}, {}, "fuses new 6 times fewer (new 6 → 0)"),
    ("fusions", {}, {"fusions": {"Gelu": 5}}, None),
    # What one did is done by another, which does more; back again that is lost, and nothing else.
    ("regress", {"fusions": {"Gemm": 18}}, {"fusions": {"Gemm": 12, "BiasGelu": 6}}, None),
    (
        "regress",
        {"fusions": {"Gemm": 12, "BiasGelu": 6}},
        {"fusions": {"Gemm": 18}},
        "fuses gelu 6 times fewer (BiasGelu 6 → 0)",
    ),
    (
        "fusions",
        {"fusions": {"Gemm": 12, "BiasGelu": 6}},
        {"fusions": {"Gemm": 11, "Gelu": 6}},
        "fuses bias of a linear layer 7 times fewer (BiasGelu 6 → 0, Gemm 12 → 11)",
    ),
    ("fusions", {"fusions": {"linear": 7, "Gelu": 6}}, {"fusions": {"linear": 1, "linear_gelu": 6}}, None),
    ("fusions", {"fusions": {"Attention": 6}}, {"fusions": {"MultiHeadAttention": 6, "concat_linear": 6}}, None),
    ("fusions", {"fusions": {"Attention": 6}}, {"fusions": {"MultiHeadAttention": 6}}, "in one product 6 times fewer"),
    # What made queries, keys and values is one product now, or inside the attention, with its biases.
    ("fusions", {"fusions": {"linear": 19}}, {"fusions": {"linear": 1, "concat_linear": 6}}, None),
    ("fusions", {"fusions": {"linear": 20}}, {"fusions": {"linear": 1, "concat_linear": 6}}, "linear layer 1 times fewer"),
    ("fusions", {"fusions": {"Gemm": 36}}, {"fusions": {"Gemm": 24, "concat_linear": 6}}, None),
    ("fusions", {"fusions": {"Gemm": 24, "concat_linear": 6}}, {"fusions": {"Gemm": 36}}, "one product 6 times fewer"),
    ("fusions", {"fusions": {"Gemm": 30}}, {"fusions": {"Gemm": 12, "Attention": 6}}, None),
    ("fusions", {"fusions": {"MultiHeadAttention": 6, "concat_linear": 6}}, {"fusions": {"Attention": 6}}, None),
    ("metrics=2", {"metrics": {"accuracy": 0.9}}, {"metrics": {"accuracy": 0.88}}, "accuracy fell from 0.9 to 0.88"),
    ("metrics=3", {"metrics": {"accuracy": 0.9}}, {"metrics": {"accuracy": 0.88}}, None),
    ("metrics", {"metrics": {"accuracy": 0.9}}, {}, "accuracy is measured no more"),
    ("speed=10", {"speed": {"onnx fp32": 2.0}}, {"speed": {"onnx fp32": 1.7}}, "from 2.00 to 1.70 times eager"),
    ("speed=20", {"speed": {"onnx fp32": 2.0}}, {"speed": {"onnx fp32": 1.7}}, None),
    ("regress=10", {"speed": {"onnx fp32": 2.0}}, {"speed": {"onnx fp32": 1.7}}, "from 2.00 to 1.70 times eager"),
    ("regress=10", {"speed": {"onnx fp32": 2.0}}, {}, None),
]


@pytest.mark.parametrize(("gate", "before", "after", "said"), CASES)
def test_what_is_worse(
    tmp_path: Path, model: bytes, gate: str, before: dict[str, Any], after: dict[str, Any], said: str | None
) -> None:
    one, two = (
        release(tmp_path / name, {**BASE, "onnx/model.onnx": model}, **changes)
        for name, changes in (("a", before), ("b", after))
    )
    found = worse(diff(one, two), [parse_gate(gate)])
    if said is None:
        assert found == []
    else:
        assert len(found) == 1 and found[0].startswith("onnx fp32") and said in found[0]
        assert text(diff(one, two)).count("onnx fp32: the same") <= (1 if "times eager" in said else 0)


def test_sizes_and_lost_artifacts(tmp_path: Path, model: bytes) -> None:
    import onnx

    grown = onnx.load_from_string(model)
    grown.doc_string = "x" * (len(model) // 10)
    one = release(tmp_path / "a", {**BASE, "onnx/model.onnx": model, "torchscript/model.pt": b"x"})
    two = release(tmp_path / "b", {**BASE, "onnx/model.onnx": grown.SerializeToString()})
    found = diff(one, two)
    assert worse(found, [parse_gate("artifacts")]) == ["torchscript fp32 is lost"]
    assert worse(found, [parse_gate("size=20")]) == []
    (said,) = worse(found, [parse_gate("size=5")])
    assert said.startswith("onnx fp32 grew from") and "allowed is 5 %" in said
    assert worse(found, [parse_gate("regress=20"), parse_gate("artifacts")]) == ["torchscript fp32 is lost"]
    assert "torchscript fp32\n  removed  1 bytes" in text(found)


@pytest.mark.parametrize(
    ("gate", "said"),
    [
        ("slower", "there is no 'slower'; give one of " + ", ".join(KINDS)),
        ("size=much", "'much' is no percentage, such as size=5"),
        ("size=-5", "'-5' is no percentage"),
        ("size=", "'' is no percentage"),
        ("files=5", "files takes no percentage"),
    ],
)
def test_gates_that_are_none(gate: str, said: str) -> None:
    with pytest.raises(ValueError, match=gate) as caught:
        parse_gate(gate)
    assert said in str(caught.value)


@pytest.mark.parametrize(("gate", "said"), [("speed=5", "the second release has no recorded"), ("metrics", "neither release")])
def test_gates_that_could_not_fail(tmp_path: Path, model: bytes, gate: str, said: str) -> None:
    one = release(tmp_path / "a", {"onnx/model.onnx": model}, speed={"onnx fp32": 2.0})
    two = release(tmp_path / "b", {"onnx/model.onnx": model})
    with pytest.raises(ConfigError, match=said):
        worse(diff(one, two), [parse_gate(gate)])


def test_a_damaged_release(tmp_path: Path, model: bytes) -> None:
    one, two = (release(tmp_path / name, {**BASE, "onnx/model.onnx": model}) for name in "ab")
    (two / "config.json").write_bytes(b"other")
    with pytest.raises(ReleaseError, match=r"config\.json is changed"):
        diff(one, two)


def test_the_command(command: Command, tmp_path: Path, model: bytes) -> None:
    one = release(tmp_path / "a", {**BASE, "onnx/model.onnx": model}, fusions={"Gelu": 1})
    two = release(tmp_path / "b", {**BASE, "onnx/model.onnx": model})
    plain = command("diff", one, two)
    assert plain.returncode == 0 and "fusions  Gelu  1 → none" in plain.stdout and not plain.stderr
    failed = command("diff", one, two, "--fail-on", "regress=5", "--fail-on", "files", "--json")
    assert failed.returncode == 1 and failed.stderr.count("\n") == 1
    assert failed.stderr.startswith(f"error: {two} is worse than {one}: onnx fp32 fuses gelu 1 times fewer (Gelu 1 → 0)")
    found = json.loads(failed.stdout)
    assert found["worse"][0] == "onnx fp32 fuses gelu 1 times fewer (Gelu 1 → 0)" and found["files"]["same"] == 4
    # Not 1, which says that the second is worse.
    misspelt = command("diff", one, two, "--fail-on", "slower")
    assert misspelt.returncode == 2 and "'--fail-on': slower: there is no 'slower'; give one of regress" in misspelt.stderr
    assert "no such release" in error_line(command("diff", one, tmp_path / "c"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, bert: Path, shared_cache: Path) -> tuple[Path, Path]:
    """A tiny encoder twice, with different targets and operator sets."""
    from tests.conftest import run_command

    folder = tmp_path_factory.mktemp("built")
    targets: list[dict[str, Any]] = [
        {"onnx": {"precisions": ["fp32"], "opset": 20}},
        {"onnx": {"precisions": ["fp32"], "opset": 18}, "openvino": ["bf16"]},
    ]
    found = []
    for number, target in enumerate(targets):
        pipeline = write_pipeline(folder, bert, release=f"1.{number}.0", targets=target)
        result = run_command(folder, shared_cache, "build", pipeline)
        assert result.returncode == 0, result.stderr
        found.append(folder / "artifacts" / "tiny" / f"1.{number}.0")
    return found[0], found[1]


def test_a_built_pair(built: tuple[Path, Path]) -> None:
    import onnx

    one, two = built
    found = diff(one, two)
    assert found["artifacts"]["openvino bf16"]["bytes"][0] is None
    changed = found["artifacts"]["onnx fp32"]
    assert changed["settings"]["opset"] == [20, 18]
    counts = []
    for folder in built:
        model = onnx.load(str(folder / "onnx" / "model.onnx"))
        # Each node is a message with an op_type of its own: count them in protobuf's text, branches and all.
        counts.append(Counter(line.split('"')[1] for line in str(model).splitlines() if line.strip().startswith("op_type:")))
    truth = {name: [counts[0].get(name), counts[1].get(name)] for name in sorted({*counts[0], *counts[1]})}
    assert changed["operators"] == {name: pair for name, pair in truth.items() if pair[0] != pair[1]}
    assert changed["operators"], "opset 18 has no Gelu"
    assert found["steps"]["validate openvino bf16"] == ["added"]
    assert worse(found, [parse_gate("artifacts")]) == []
    assert worse(diff(two, one), [parse_gate("artifacts")]) == ["openvino bf16 is lost"]
    assert found["steps"]["export onnx fp32"] == ["opset 20 → 18"]


def test_a_built_bf16_file(built: tuple[Path, Path]) -> None:
    """The precision of layers against the element types that OpenVINO itself finds behind each layer's inputs."""
    import openvino

    _, two = built
    path = two / "openvino" / "openvino_model_bf16.xml"
    found = read_graph(two, Artifact("openvino", "bf16", (hash_file(two, "openvino/openvino_model_bf16.xml"),), {}, ""))

    def stored(node: Any) -> str | None:
        while node.get_type_name() in ("Convert", "Transpose", "Reshape"):
            node = node.input_value(0).get_node()
        kinds = {"f32": "fp32", "bf16": "bf16"}
        return kinds.get(node.get_element_type().get_type_name()) if node.get_type_name() == "Constant" else None

    def truth(model: Any) -> Counter[str]:
        kinds: Counter[str] = Counter()
        for node in model.get_ordered_ops():
            place = {"MatMul": 1, "Gather": 0}.get(node.get_type_name())
            if place is not None and (kind := stored(node.input_value(place).get_node())):
                kinds[kind] += 1
            if node.get_type_name() == "If":
                for branch in (0, 1):
                    kinds += truth(node.get_function(branch))
        return kinds

    counted = Counter(
        kind for name, kind in found.layers.items() if "MatMul" in name or "Gather" in name or "embedding" in name
    )
    assert truth(openvino.Core().read_model(str(path))) == counted
    assert counted["bf16"] and counted["fp32"]


def rewritten(folder: Path, change: Callable[[Any], Any]) -> None:
    """A release whose validation.json is another, with a manifest and sums that were made to fit."""
    manifest = from_bytes((folder / MANIFEST).read_bytes(), "")
    stored = change(json.loads((folder / VALIDATION).read_bytes()))
    (folder / VALIDATION).write_bytes(stored if isinstance(stored, bytes) else canonical(stored))
    files = tuple(hash_file(folder, file.path) for file in manifest.files)
    seal(folder, replace(manifest, files=files, read=None))


def entry_with(**keys: Any) -> Callable[[Any], Any]:
    return lambda stored: {**stored, "artifacts": [{**entry, **keys} for entry in stored["artifacts"]]}


CHECK = {"output": "logits", "name": "cosine", "figure": 1.0, "limit": 0.999, "passed": True, "worst": ""}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda stored: b"[" * 100_000, "cannot be read"),
        (lambda stored: [], "not what a build writes"),
        (lambda stored: {"artifacts": 1}, "not what a build writes ('artifacts')"),
        (lambda stored: {**stored, "artifacts": []}, "says nothing of torchscript fp32"),
        (entry_with(checks=[{**CHECK, "figure": "one"}]), "not what a build writes ('artifacts.0.checks.0.figure')"),
        (entry_with(checks=[{**CHECK, "more": 1}]), "not what a build writes"),
        (entry_with(checks={}), "not what a build writes"),
        (entry_with(outputs={"logits": {}}), "not what a build writes"),
        (entry_with(outputs={"logits": {"figures": {"cosine": None}}}), "not what a build writes"),
        (entry_with(metrics={"accuracy": "good"}), "not what a build writes"),
        (entry_with(format=["onnx"]), "not what a build writes"),
    ],
)
def test_a_hostile_validation_is_one_line(tmp_path: Path, change: Callable[[Any], Any], says: str) -> None:
    make_release(tmp_path / "sound")
    make_release(tmp_path / "hostile")
    rewritten(tmp_path / "hostile", change)
    with pytest.raises(ReleaseError) as caught:
        read_release(tmp_path / "hostile")
    one_line(caught, says)
    with pytest.raises(ReleaseError):
        diff(tmp_path / "sound", tmp_path / "hostile")


def test_an_artifact_without_a_file(tmp_path: Path) -> None:
    manifest = make_release(tmp_path / "one")
    seal(tmp_path / "one", replace(manifest, artifacts=tuple(replace(one, files=()) for one in manifest.artifacts), read=None))
    with pytest.raises(ReleaseError) as caught:
        read_release(tmp_path / "one")
    one_line(caught, "that has no file")


@pytest.mark.parametrize("benchmark", [{}, {"timings": 1}, {"timings": [{"subject": "eager fp32", "shape": "1x1"}]}])
def test_a_hostile_benchmark_is_one_line(tmp_path: Path, benchmark: dict[str, Any]) -> None:
    manifest = make_release(tmp_path / "one")
    seal(tmp_path / "one", replace(manifest, benchmark=benchmark))
    with pytest.raises(ReleaseError) as caught:
        diff(tmp_path / "one", tmp_path / "one")
    one_line(caught, "record it again")
