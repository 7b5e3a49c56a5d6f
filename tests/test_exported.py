"""`export.json`: transformers' own loader opens the folder of a format, and answers as the original."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers.exporters import ExportedModel
from transformers.utils import ModelOutput

from compiler.backends import BACKENDS
from compiler.stages.load import run_eager
from compiler.types import Model, Target
from tests.backends.conftest import export, load_checkpoint
from tests.zoo import save_checkpoint


@pytest.fixture(scope="module", params=["bert", "mpnet"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """One that runs on packed tokens, and one that does not: they are exported by other ways."""
    return load_checkpoint(save_checkpoint(tmp_path_factory.mktemp(request.param), request.param))


@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_loads_in_transformers(model: Model, name: str, tmp_path: Path) -> None:
    export(BACKENDS[name], tmp_path, model, Target(name, "fp32"))
    options = {"config": {"INFERENCE_PRECISION_HINT": "f32"}} if name == "openvino" else {}
    opened = ExportedModel.from_pretrained(tmp_path, subfolder=name, device="cpu", **options)
    mask = (torch.arange(11)[None] < torch.tensor([[11], [4], [7]])).long()
    given = {"input_ids": mask * 9, "attention_mask": mask}
    if "token_type_ids" in model.inputs:
        given["token_type_ids"] = mask * 0
    answer = opened(**given)
    assert isinstance(answer, ModelOutput)
    expected = run_eager(model, {key: value.numpy() for key, value in given.items()})
    assert set(answer) == set(expected)
    error = (answer["last_hidden_state"] - torch.from_numpy(expected["last_hidden_state"]))[mask > 0]
    assert float(error.abs().max()) < 1e-4
    assert (answer["pooler_output"] - torch.from_numpy(expected["pooler_output"])).abs().max() < 1e-4


def test_names_no_place_of_this_machine(model: Model, tmp_path: Path) -> None:
    for name in ("onnx", "openvino"):
        export(BACKENDS[name], tmp_path, model, Target(name, "fp32"))
        content = (tmp_path / name / "export.json").read_bytes()
        assert b"site-packages" not in content and str(Path.home()).encode() not in content and b"/tmp" not in content


def test_weights_are_not_overwritten(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What says that no weights are there stands beside them, and never in their place."""
    from compiler.backends import onnx

    monkeypatch.setattr(onnx, "INLINE_BYTES", 1000)
    export(onnx, tmp_path, load_checkpoint(bert), Target("onnx", "fp32"))
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "onnx").iterdir()}
    assert sorted(sizes) == ["export.json", "model.onnx", "model.onnx.data", "model.onnx_data"]
    assert sizes["model.onnx.data"] < 200 < 10_000 < sizes["model.onnx_data"]
    opened = ExportedModel.from_pretrained(tmp_path, subfolder="onnx", device="cpu")
    assert opened(**{name: torch.ones(2, 5, dtype=torch.int64) for name in opened.runners["model"].metadata.kwargs})
