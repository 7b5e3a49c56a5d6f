"""Export: what an exporter cannot do with packed tokens costs the packing, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compiler.backends import onnx
from compiler.config import ModelSpec, OnnxTargets, Targets
from compiler.sources import resolve
from compiler.stages.export import export
from compiler.types import Model, Target


def test_falls_back_when_packed_tokens_do_not_export(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = onnx.export

    def fails(out: Path, model: Model, target: Target) -> dict[str, Any]:
        if "padding_free" in model.rewrites:
            (out / "left.onnx").write_bytes(b"half")
            raise RuntimeError("could not\nguard on a size")
        return plain(out, model, target)

    monkeypatch.setattr(onnx, "export", fails)
    targets = Targets(onnx=OnnxTargets(precisions=("fp32",)))
    spec = ModelSpec(name="tiny", release="1.0.0", source=f"path:{bert.name}", targets=targets)
    options = {"trust_remote_code": False, "allow_pickle": False}
    made = export(tmp_path, Target("onnx", "fp32"), resolve(spec, bert.parent), "feature-extraction", options, None)
    reason = made["declined"]["padding_free"]
    assert reason == "it does not export on packed tokens (RuntimeError: could not guard on a size)"
    assert "padding_free" not in made["fusions"]
    assert (tmp_path / "onnx/model.onnx").is_file()
    assert not (tmp_path / "left.onnx").exists()


def test_another_failure_is_told(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(out: Path, model: Model, target: Target) -> dict[str, Any]:
        raise RuntimeError("no")

    monkeypatch.setattr(onnx, "export", fails)
    targets = Targets(onnx=OnnxTargets(precisions=("fp32",)))
    spec = ModelSpec(name="tiny", release="1.0.0", source=f"path:{bert.name}", targets=targets)
    options = {"trust_remote_code": False, "allow_pickle": False}
    with pytest.raises(RuntimeError, match="no"):
        export(tmp_path, Target("onnx", "fp32"), resolve(spec, bert.parent), "feature-extraction", options, None)
