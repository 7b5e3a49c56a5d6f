"""Linear layers: what is fused where, odd sizes, CPUs without oneDNN's kernels, and a C++ program."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from compiler.backends import torchscript
from compiler.fusions import linear
from compiler.quantization.layers import Layers
from compiler.stages.load import run_eager
from compiler.types import Model, Target
from tests.backends.conftest import export as export_artifact
from tests.backends.conftest import load_checkpoint
from tests.backends.test_torchscript_int8 import plan
from tests.zoo import save_checkpoint

CPP = """
#include <torch/script.h>
#include <iostream>
int main(int argc, const char* argv[]) {
  torch::jit::Module model = torch::jit::load(argv[1]);
  torch::NoGradGuard guard;
  torch::Tensor ids = torch::arange(6, 20, torch::kInt64).reshape({2, 7});
  torch::Tensor mask = torch::ones_like(ids);
  if (argc > 2) mask.index_put_({1, torch::indexing::Slice(4)}, 0);
  auto outputs = model.forward({ids, mask, torch::zeros_like(ids)}).toGenericDict();
  torch::Tensor hidden = outputs.at("last_hidden_state").toTensor();
  std::cout.precision(9);
  std::cout << (hidden * mask.unsqueeze(-1)).sum().item<double>() << std::endl;
}
"""
CMAKE = """
cmake_minimum_required(VERSION 3.18)
project(encode CXX)
set(CMAKE_CXX_STANDARD 20)
find_package(Torch REQUIRED)
add_executable(encode encode.cpp)
target_link_libraries(encode "${TORCH_LIBRARIES}")
"""


def export(out: Path, model: Model, precision: str) -> tuple[Path, dict[str, int]]:
    out.mkdir(exist_ok=True)
    known = export_artifact(torchscript, out, model, Target("torchscript", precision))  # type: ignore[arg-type]
    return out / torchscript.files(precision)[0], known["fusions"]  # type: ignore[arg-type]


def test_counts(model: Model, tmp_path: Path) -> None:
    """BERT: a layer has one joined query, key and value, one gelu, and two sums; the pooler is a plain one."""
    _, fusions = export(tmp_path / "out", model, "fp32")
    assert fusions == {"padding_free": 2, "attention": 2, "concat_linear": 2, "linear": 1, "linear_add": 4, "linear_gelu": 2}


def test_every_weight_is_in_the_file_once(model: Model, tmp_path: Path) -> None:
    path, _ = export(tmp_path / "out", model, "fp32")
    weights = sum(parameter.numel() * 4 for parameter in model.module.parameters())
    assert path.stat().st_size < weights + 150_000  # code and alignment


@pytest.mark.parametrize(("hidden", "heads", "inner"), [(35, 5, 21), (33, 3, 7), (34, 1, 130)])
def test_sizes_that_are_odd(tmp_path: Path, hidden: int, heads: int, inner: int) -> None:
    folder = save_checkpoint(tmp_path / "odd", "bert", hidden_size=hidden, num_attention_heads=heads, intermediate_size=inner)
    model = load_checkpoint(folder)
    for precision, close in (("fp32", 1e-5), ("bf16", 0.3)):
        path, fusions = export(tmp_path / precision, model, precision)
        assert fusions["concat_linear"] == 2
        script = torch.jit.load(path)
        for mask in (torch.ones(3, 11, dtype=torch.int64), (torch.arange(11)[None] < torch.tensor([[11], [4], [7]])).long()):
            given = {"input_ids": mask * 9, "attention_mask": mask, "token_type_ids": mask * 0}
            expected = run_eager(model, {name: value.numpy() for name, value in given.items()})["last_hidden_state"]
            actual = script(**given)["last_hidden_state"]
            assert float((actual - torch.from_numpy(expected))[mask > 0].abs().max()) < close * 3


def test_tied_weights(tmp_path: Path) -> None:
    """An output layer that is the embedding: joined with nothing, and in the file once."""
    model = load_checkpoint(save_checkpoint(tmp_path / "tied", "bert", "fill-mask"), "fill-mask")
    path, fusions = export(tmp_path / "out", model, "fp32")
    assert fusions["linear_gelu"] == 3
    given = dict(model.example)
    expected = run_eager(model, {name: value.numpy() for name, value in given.items()})["logits"]
    actual = torch.jit.load(path)(**given)["logits"]
    assert float((actual - torch.from_numpy(expected))[given["attention_mask"] > 0].abs().max()) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_and_packed_weights_answer_alike(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, other = (torch.randn(5, size, generator=generator).to(dtype) for size in (12, 9))
    weight, bias = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((9, 12), (9,)))
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU has no bf16 kernels in oneDNN")
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    close = 1e-5 if dtype == torch.float32 else 5e-2

    def same(one: torch.Tensor, two: torch.Tensor) -> None:
        assert one.shape == two.shape
        assert float((one.float() - two.float()).abs().max()) <= close * max(1.0, float(two.abs().max()))

    same(linear.linear(x, packed, bias), linear.linear(x, weight, bias))
    for approximate in ("none", "tanh"):
        same(linear.linear_gelu(x, packed, bias, approximate), linear.linear_gelu(x, weight, bias, approximate))
    same(linear.linear_add(x, other, packed, bias), linear.linear_add(x, other, weight, bias))


@pytest.mark.parametrize("isa", ["AVX2", "SSE41"])
def test_cpu_without_bf16(model: Model, tmp_path: Path, isa: str) -> None:
    """With oneDNN's instructions capped, the same bf16 file opens and answers, by way of the plain kernels where it must."""
    path, _ = export(tmp_path / "out", model, "bf16")
    script = (
        "import torch, sys\n"
        f"model = torch.jit.load({str(path)!r})\n"
        "ids = torch.arange(6, 20).reshape(2, 7); mask = torch.ones_like(ids); mask[1, 4:] = 0\n"
        "torch.save(model(ids, mask, ids * 0)['last_hidden_state'], sys.argv[1])\n"
        "print(torch.ops.mkldnn._is_mkldnn_bf16_supported())\n"
    )

    def run(name: str, environment: dict[str, str]) -> tuple[str, torch.Tensor]:
        command = [sys.executable, "-c", script, str(tmp_path / name)]
        answer = subprocess.run(command, env={**os.environ, **environment}, check=True, capture_output=True, text=True)
        return answer.stdout.strip(), torch.load(tmp_path / name)

    _, expected = run("as it is", {})
    able, actual = run("capped", {"ONEDNN_MAX_CPU_ISA": isa, "ATEN_CPU_CAPABILITY": "avx2"})
    assert able == "False"
    cosine = functional.cosine_similarity(actual, expected, dim=-1)[torch.tensor([[1] * 7, [1] * 4 + [0] * 3]) > 0]
    assert float(cosine.min()) > 0.999


def test_what_changes_in_place_is_not_fused_away() -> None:
    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = torch.nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.dense(x)
            hidden *= 0.5
            gelu = functional.gelu(hidden)
            other = self.dense(x)
            x += 1
            return gelu + functional.gelu(other)

    module, x = Scaled(), torch.randn(3, 8)
    linears = linear.Linears()
    with torch.no_grad():
        weights = linears.weights(module, {"x": x.clone()})
        expected = module(x.clone())
        with linears.applied(weights, weights.tensors, [weights.tensors[place] for place in weights.packs]) as mode:
            actual = module(x.clone())
    assert torch.allclose(actual, expected, atol=1e-6)
    assert "linear_gelu" not in mode.counts()


def test_who_alone_follows_gelu() -> None:
    """A result may be made wider for the layer that takes gelu of it, unless another does, or it is added to something too."""
    a, b, c = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8), torch.nn.Linear(16, 8)
    down = torch.nn.Linear(8, 16)
    gelu = functional.gelu
    forwards: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "alone": lambda x: b(gelu(a(x))),
        "added too": lambda x: (h := a(x)) + down(b(gelu(h))),
        "two": lambda x: c(gelu(a(b(gelu(a(x)))))),
    }
    module = torch.nn.ModuleList([a, b, c, down])
    found = {}
    for name, forward in forwards.items():
        x = torch.randn(3, 8)
        weights = linear.collect(module, lambda: forward(x))  # noqa: B023
        packed = [weights.tensors[place] for place in weights.packs]
        with torch.no_grad(), linear.Fuse(weights, weights.tensors, packed) as mode:
            forward(x)
        places = {
            id(part.weight): weights.layers[id(part.weight)].pack for part in module if id(part.weight) in weights.layers
        }
        found[name] = (mode.followed()[places[id(a.weight)]], places.get(id(b.weight)))
    assert found["alone"][0] == found["alone"][1] is not None
    assert found["added too"][0] is None
    assert found["two"][0] is None


@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("c++")), reason="no cmake or no C++ compiler here")
def test_runs_in_cpp(model: Model, tmp_path: Path) -> None:
    """Files open in torch's own C++ library, pack their weights there, and answer as in Python, padded and not."""
    path, _ = export(tmp_path / "out", model, "fp32")
    (tmp_path / "encode.cpp").write_text(CPP)
    (tmp_path / "CMakeLists.txt").write_text(CMAKE)
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    for command in (["cmake", "-S", ".", "-B", "build", prefix], ["cmake", "--build", "build"]):
        built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert built.returncode == 0, built.stdout + built.stderr
    torchscript.quantize(tmp_path / "int8", tmp_path / "out", Layers(plan(model.module, dict(model.example))), "fp32")
    for file in (path, tmp_path / "int8" / torchscript.files("int8")[0]):
        script = torch.jit.load(file)
        for padded in (False, True):
            ids = torch.arange(6, 20).reshape(2, 7)
            mask = torch.ones_like(ids)
            if padded:
                mask[1, 4:] = 0
            expected = float((script(ids, mask, ids * 0)["last_hidden_state"] * mask[..., None]).sum())
            arguments = [str(tmp_path / "build/encode"), str(file), *(["padded"] if padded else [])]
            answer = subprocess.run(arguments, capture_output=True, text=True, check=True)
            assert abs(float(answer.stdout) - expected) < 1e-3 * max(1.0, abs(expected))
