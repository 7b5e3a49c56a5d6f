"""TorchScript files: free of Python and of paths, called by name, bf16 inside where asked."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compiler.backends import torchscript
from compiler.errors import StageError
from compiler.fusions.linear import Weights
from compiler.fusions.script import assemble
from compiler.stages.load import run_eager
from compiler.types import Model, Target
from tests.backends.conftest import export, load_checkpoint
from tests.zoo import ZOO, save_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: Model) -> Path:
    out = tmp_path_factory.mktemp("torchscript")
    for number, precision in enumerate(precision for precision in torchscript.PRECISIONS if precision != "int8"):
        (out / str(number)).mkdir()
        export(torchscript, out / str(number), model, Target("torchscript", precision))
    return out


def test_loads_without_our_packages(folder: Path) -> None:
    """In a process where neither transformers nor this package can be imported."""
    script = (
        "import sys; sys.modules['transformers'] = sys.modules['compiler'] = None\n"
        "import torch\n"
        f"model = torch.jit.load({str(folder / '0/torchscript/model.pt')!r})\n"
        "ids = torch.ones(3, 7, dtype=torch.int64)\n"
        "outputs = model(attention_mask=ids, token_type_ids=ids * 0, input_ids=ids)\n"
        "assert type(outputs) is dict and sorted(outputs) == ['last_hidden_state', 'pooler_output'], outputs\n"
        "assert outputs['last_hidden_state'].shape == (3, 7, 32)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=folder)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_memory_between_layers_is_kept(folder: Path) -> None:
    """Where a file was opened, what large batches free is there for the next, and not asked of the system again."""
    script = (
        "import resource, torch\n"
        f"model = torch.jit.load({str(folder / '0/torchscript/model.pt')!r})\n"
        "def layers():\n"
        "    tensors = [torch.ones((1 << 20) - 4096 * part) for part in range(8)]\n"  # 32 MB, 8,000 pages
        "for _ in range(3): layers()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(5): layers()\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 5)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, cwd=folder, capture_output=True, text=True)
    assert float(done.stdout) < 800


def test_no_loop_is_unrolled_when_the_file_is_compiled(folder: Path) -> None:
    """torch unrolls a loop over a range eight times wherever it stands, and the first calls take seconds."""
    unit = torch._C.CompilationUnit()
    torch._C.import_ir_module(unit, str(folder / "0/torchscript/model.pt"), torch.device("cpu"), {}, False)  # type: ignore[call-arg]
    functions: Any = unit.get_functions()  # type: ignore[func-returns-value]
    loops = {function.name: list(function.graph.findAllNodes("prim::Loop")) for function in functions}
    assert loops["attention"]  # it has one, and it is not over a range
    for name, found in loops.items():
        for node in found:
            _, condition = list(node.inputs())[:2]
            assert name == "pack" or condition.node().kind() != "prim::Constant", name


def test_bf16_is_inside_and_fp32_outside(folder: Path) -> None:
    script = torch.jit.load(folder / "1/torchscript/model_bf16.pt")
    large = [weight for weight in script.tensors if weight.dim() > 1]
    assert len(large) > 5
    assert {weight.dtype for weight in large} == {torch.bfloat16}
    ids = torch.ones(1, 4, dtype=torch.int64)
    assert {value.dtype for value in script(ids, ids, ids * 0).values()} == {torch.float32}


def test_export_leaves_the_model_alone(model: Model, folder: Path) -> None:
    assert folder.exists()
    assert {parameter.dtype for parameter in model.module.parameters()} == {torch.float32}
    assert torch.isfinite(torch.from_numpy(run_eager(model, _numpy(model))["last_hidden_state"])).all()


def _numpy(model: Model) -> dict[str, np.ndarray[Any, Any]]:
    return {name: value.numpy() for name, value in model.example.items()}


def test_archive_is_canonical(folder: Path) -> None:
    with zipfile.ZipFile(folder / "0/torchscript/model.pt") as archive:
        entries = archive.infolist()
        assert {entry.date_time for entry in entries} == {torchscript.ZIP_EPOCH}
        # The id is made of the debug records too, whose paths follow where this package is installed.
        assert not any(entry.filename.endswith((".debug_pkl", "serialization_id")) for entry in entries)
        assert [entry.filename for entry in entries] == sorted(entry.filename for entry in entries)
        assert all(entry.filename.startswith("model/") for entry in entries)
        for entry in entries:
            offset = entry.header_offset + 30 + len(entry.filename) + len(entry.extra)
            assert offset % torchscript.ALIGNMENT == 0, entry.filename
            assert b"site-packages" not in archive.read(entry)


class TestOtherInputs:
    """Modules of sound and of images beside texts; what is left out of a call is what the original takes it for."""

    @pytest.fixture(scope="class")
    def opened(self, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Model, Any]]:
        def make(name: str) -> tuple[Model, Any]:
            folder = tmp_path_factory.mktemp(name)
            model = load_checkpoint(save_checkpoint(folder / "checkpoint", name), ZOO[name].tasks[0])
            export(torchscript, folder, model, Target("torchscript", "fp32"))
            return model, torch.jit.load(folder / "torchscript/model.pt")

        return make

    @pytest.mark.parametrize(("name", "word"), [("wav2vec2-lv60", "samples"), ("clip", "texts")])
    def test_a_mask_may_be_left_out(self, opened: Callable[[str], tuple[Model, Any]], name: str, word: str) -> None:
        model, script = opened(name)
        inputs = {key: value for key, value in model.example.items() if key != "attention_mask"}
        ones = torch.ones_like(model.example["attention_mask"])
        with torch.inference_mode():
            expected = model.module(**inputs, attention_mask=ones)
            for made in (script(**inputs), script(**inputs, attention_mask=ones)):
                for key, value in made.items():
                    torch.testing.assert_close(value, expected[key], atol=1e-4, rtol=1e-4)
            with pytest.raises(Exception, match=rf"attention_mask: must be \[.*{word}"):
                script(**inputs, attention_mask=ones[:, :-1])

    def test_a_model_without_linear_layers(self, tmp_path: Path) -> None:
        """torch traces no empty list of packed weights."""
        checkpoint = save_checkpoint(tmp_path / "checkpoint", "resnet", "image-feature-extraction")
        model = load_checkpoint(checkpoint, "image-feature-extraction")
        export(torchscript, tmp_path, model, Target("torchscript", "fp32"))
        pixels = torch.rand(1, 3, 40, 33)
        made = torch.jit.load(tmp_path / "torchscript/model.pt")(pixels)
        with torch.inference_mode():
            torch.testing.assert_close(made["pooler_output"], model.module(pixels).pooler_output, atol=1e-4, rtol=1e-4)

    def test_inputs_that_no_module_takes(self, model: Model) -> None:
        odd = replace(model, axes={"input_features": ("batch", 80, "frames")})
        weights = Weights([torch.zeros(1, 1)], [0])
        with pytest.raises(StageError, match="input_features") as caught:
            assemble(odd.inputs, None, None, weights, [], "")
        assert len(str(caught.value).splitlines()) == 1
