"""ONNX files: named axes, stated opset, no paths, weights where loaders look for them."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from compiler.backends import onnx as backend
from compiler.types import Model, Target
from tests.backends.conftest import export


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, model: Model) -> Path:
    out = tmp_path_factory.mktemp("onnx")
    known = export(backend, out, model, Target("onnx", "fp32", opset=18))
    assert known["opset"] == 18
    return out / "onnx/model.onnx"


def test_axes_are_named(exported: Path) -> None:
    graph = onnx.load(exported).graph
    shapes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert shapes == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "sequence"],
        "token_type_ids": ["batch", "sequence"],
        "last_hidden_state": ["batch", "sequence", 32],
        "pooler_output": ["batch", 32],
    }


def test_opset_is_as_asked(exported: Path) -> None:
    assert {entry.domain: entry.version for entry in onnx.load(exported).opset_import}[""] == 18


def test_model_is_valid_and_holds_no_paths(exported: Path) -> None:
    onnx.checker.check_model(str(exported), full_check=True)
    assert b"site-packages" not in exported.read_bytes()
    assert b".py" not in exported.read_bytes()


def test_weights_are_inline_or_beside(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "INLINE_BYTES", 1000)
    export(backend, tmp_path, model, Target("onnx", "fp32"))
    assert sorted(path.name for path in (tmp_path / "onnx").iterdir()) == [
        "export.json",
        "model.onnx",
        "model.onnx.data",  # a note, for transformers' ExportedModel
        "model.onnx_data",
    ]
    onnx.checker.check_model(str(tmp_path / "onnx/model.onnx"))
