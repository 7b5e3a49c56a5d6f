"""int8 in TorchScript: numbers against the formula in plain torch, what runs and what is left, other CPUs, C++."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from compiler.backends import torchscript
from compiler.fusions import int8, linear
from compiler.quantization import calibrate
from compiler.quantization.layers import NO_TABLE, Layers, QuantizedLinear, digest
from compiler.types import Model, Precision, Target
from tests.backends.conftest import export, load_checkpoint
from tests.quantization.formula import formula, rows_of, widened, with_rows
from tests.zoo import save_checkpoint

INT8 = torchscript.files("int8")[0]
RESTS: tuple[Precision, ...] = ("fp32", "bf16")


def quantized(
    name: str, weight: torch.Tensor, low: float, high: float, seed: int, smooth: bool = True, most: int = 127
) -> QuantizedLinear:
    """A layer in int8 for inputs from `low` to `high`, smoothed by what its seed says."""
    generator = np.random.default_rng(seed)
    factors = generator.uniform(0.5, 2, weight.shape[1]).astype(np.float32) if smooth else None
    own = weight.detach().numpy() / (1 if factors is None else factors)
    weight_scale = np.maximum(np.abs(own).max(axis=1), 1e-6).astype(np.float32) / most
    low, high = (low * 2, high * 2) if smooth else (low, high)
    scale = float(np.float32((high - low) / 255))
    return QuantizedLinear(
        name,
        digest(weight.detach().numpy()),
        np.round(own / weight_scale[:, None]).astype(np.int8),
        weight_scale,
        factors,
        scale,
        round(-low / scale),
        generator.normal(0, 0.01, len(own)).astype(np.float32),
    )


def plan(
    module: torch.nn.Module, example: dict[str, torch.Tensor], smooth: bool = True, most: int = 127
) -> list[QuantizedLinear]:
    """All linear layers of a model, by the inputs that they have on the example."""
    found: dict[int, tuple[int, float, float]] = {}
    layers: list[QuantizedLinear] = []
    kept: list[Any] = []

    def hook(name: str, part: torch.nn.Linear) -> Any:
        def record(_: Any, inputs: Any) -> None:
            kept.append(inputs[0])
            found.setdefault(id(inputs[0]), (len(found), float(inputs[0].min()), float(inputs[0].max())))
            seed, low, high = found[id(inputs[0])]
            layers.append(quantized(name, part.weight, low, high, seed, smooth, most))

        return part.register_forward_pre_hook(record)

    hooks = [hook(name, part) for name, part in module.named_modules() if isinstance(part, torch.nn.Linear)]
    with torch.no_grad():
        module(**example)
    for handle in hooks:
        handle.remove()
    return layers


def emulate(module: torch.nn.Module, layers: Iterable[QuantizedLinear]) -> Any:
    """A copy of the model that computes these layers by the formula."""
    module = copy.deepcopy(module)
    for layer in layers:
        part: Any = module.get_submodule(layer.name)
        part.forward = lambda x, layer=layer, bias=part.bias: formula(x.double(), layer, bias).float()
    return module


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, model: Model) -> Path:
    out = tmp_path_factory.mktemp("exported")
    for precision in RESTS:
        export(torchscript, out, model, Target("torchscript", precision))
    return out


def batches() -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    masks = {
        "one": torch.ones(1, 1),
        "odd": torch.ones(3, 13),
        "right": (torch.arange(19)[None] < torch.tensor([[19], [4], [7], [1]])).float(),
        "left": (torch.arange(19)[None] >= torch.arange(8)[:, None]).float(),
        "holes, and a row of padding": torch.cat([torch.rand(8, 19, generator=generator).round(), torch.zeros(1, 19)]),
        "padding alone": torch.zeros(2, 5),
    }
    made = {}
    for name, mask in masks.items():
        ids = torch.randint(6, 90, mask.shape, generator=generator)
        made[name] = {"input_ids": ids, "attention_mask": mask.long(), "token_type_ids": ids % 2}
    return made


@pytest.mark.parametrize("kind", ["smooth", "plain", "wide"])
def test_answers_as_the_formula(model: Model, exported: Path, tmp_path: Path, kind: str) -> None:
    layers = plan(model.module, {**batches()["odd"]}, kind == "smooth")
    if kind == "wide":
        layers = widened(layers)
    known = torchscript.quantize(tmp_path, exported, Layers(layers), "fp32")
    assert known["left"] == {}
    assert sorted(known["int8"]) == sorted(layer.name for layer in layers)
    script = torch.jit.load(tmp_path / INT8)
    original = torch.jit.load(exported / torchscript.files("fp32")[0])
    emulation = emulate(model.module, layers)
    for name, given in batches().items():
        actual = script(**given)["last_hidden_state"]
        assert torch.isfinite(actual).all(), name
        with torch.no_grad():
            expected = emulation(**given)["last_hidden_state"]
        real = given["attention_mask"] > 0
        if not real.any():
            continue
        noise = (original(**given)["last_hidden_state"] - expected)[real].abs().mean()
        # A step of difference here or there is what float32 sums in another order make; one wrong layer is all the noise.
        assert (actual - expected)[real].abs().mean() < 0.15 * noise, name


def test_what_runs_and_what_is_left(model: Model, exported: Path, tmp_path: Path) -> None:
    layers = {layer.name: layer for layer in plan(model.module, {**batches()["odd"]})}
    first = "encoder.layer.0."
    chosen = [layer for name, layer in layers.items() if name.startswith("encoder.layer.1.") or name == first + "output.dense"]
    chosen.append(layers[first + "attention.self.key"])
    chosen.append(replace(layers["pooler.dense"], digest="0" * 64))
    known = torchscript.quantize(tmp_path, exported, Layers(chosen), "bf16")
    runs = {
        "attention.self.query": "concat_linear",
        "attention.self.key": "concat_linear",
        "attention.self.value": "concat_linear",
        "attention.output.dense": "linear_add",
        "intermediate.dense": "linear_gelu",
        "output.dense": "linear_add",
    }
    expected = {f"encoder.layer.1.{name}": how for name, how in runs.items()} | {first + "output.dense": "linear_add"}
    assert known["int8"] == expected
    assert known["left"] == {
        first + "attention.self.key": torchscript.JOINED,
        "pooler.dense": torchscript.UNKNOWN,
    }
    assert known["fusions"]["concat_linear"] == 2
    script = torch.jit.load(tmp_path / INT8)
    types = [script.tensors[place].dtype for place in script.packs]
    assert types.count(torch.int8) == 5
    assert types.count(torch.bfloat16) == len(types) - 5
    given = batches()["right"]
    real = given["attention_mask"] > 0
    before = torch.jit.load(exported / torchscript.files("bf16")[0])(**given)["last_hidden_state"]
    after = script(**given)["last_hidden_state"]
    assert after.dtype == torch.float32
    assert float(functional.cosine_similarity(before, after, dim=-1)[real].min()) > 0.97
    assert not torch.equal(before, after)


@pytest.mark.parametrize("rest", RESTS)
def test_embeddings_by_the_row(model: Model, exported: Path, tmp_path: Path, rest: Precision) -> None:
    tables = rows_of(model.module)
    known = torchscript.quantize(tmp_path, exported, Layers([], tables), rest)
    assert known["int8"] == {table.name: "embedding" for table in tables}
    assert known["left"] == {}
    script = torch.jit.load(tmp_path / INT8)
    assert [tensor.dtype for tensor in script.tensors].count(torch.int8) == len(tables)
    expected = with_rows(model.module, tables)
    for given in batches().values():
        real = given["attention_mask"] > 0
        with torch.no_grad():
            exact = expected(**given)["last_hidden_state"][real]
        actual = script(**given)["last_hidden_state"][real]
        assert torch.allclose(actual, exact, atol=2e-5 if rest == "fp32" else 0.1)


def test_tied_weights_are_left(tmp_path: Path) -> None:
    """An output layer that is the embedding too would be in the file twice."""
    model = load_checkpoint(save_checkpoint(tmp_path / "tied", "bert", "fill-mask"), "fill-mask")
    (tmp_path / "out").mkdir()
    export(torchscript, tmp_path / "out", model, Target("torchscript", "fp32"))
    layers = plan(model.module, dict(model.example))
    tied = "bert.embeddings.word_embeddings"
    tables, others = calibrate.tables(model.module, 1)
    assert tied not in {table.name for table in tables}
    assert others == {tied: "its weights are used elsewhere as well"}
    table = next(table for table in rows_of(model.module) if table.name == tied)
    known = torchscript.quantize(tmp_path, tmp_path / "out", Layers(layers, [table]), "fp32")
    assert known["left"] == {"cls.predictions.decoder": torchscript.UNKNOWN, tied: NO_TABLE}
    assert known["int8"]["cls.predictions.transform.dense"] == "linear_gelu"
    outputs = torch.jit.load(tmp_path / INT8)(**dict(model.example))
    assert torch.isfinite(outputs["logits"]).all()


def test_every_weight_is_in_the_file_once(tmp_path: Path) -> None:
    """And a search that makes the file again and again waits for no trace, and gets the same bytes."""
    folder = save_checkpoint(tmp_path / "wide", "bert", hidden_size=192, intermediate_size=768, num_hidden_layers=3)
    model = load_checkpoint(folder)
    (tmp_path / "out").mkdir()
    export(torchscript, tmp_path / "out", model, Target("torchscript", "fp32"))
    layers = plan(model.module, dict(model.example))
    start = time.monotonic()
    torchscript.quantize(tmp_path / "one", tmp_path / "out", Layers(layers), "fp32")
    assert time.monotonic() - start < 5
    path = tmp_path / "one" / INT8
    linears = sum(layer.weight.size for layer in layers)
    others = sum(parameter.numel() for parameter in model.module.parameters()) - linears
    assert path.stat().st_size < linears + 4 * others + 250_000  # scales, code and alignment
    torchscript.quantize(tmp_path / "two", tmp_path / "out", Layers(layers), "fp32")
    assert path.read_bytes() == (tmp_path / "two" / INT8).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 5, 4000])
@pytest.mark.parametrize("smooth", [True, False])
def test_one_layer(dtype: torch.dtype, rows: int, smooth: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, other = (torch.randn(1, rows, size, generator=generator).to(dtype) for size in (131, 77))
    weight, bias = (torch.randn(*shape, generator=generator) for shape in ((77, 131), (77,)))
    layer = quantized("a", weight, -2, 2.5, 0, smooth)  # some inputs are beyond, and are clipped
    record = int8.record(layer, bias, dtype)
    packed = torch.ops.onednn.qlinear_prepack(torch.from_numpy(layer.weight), None)
    expected = formula(x.double(), layer, bias)
    close = 1e-4 if dtype == torch.float32 else 1e-2
    # An input that is half-way between two steps may go to either.
    one = (
        float((torch.from_numpy(layer.weight).abs().max(1).values * torch.from_numpy(layer.weight_scale)).max()) * layer.scale
    )

    def same(actual: torch.Tensor, expected: torch.Tensor) -> None:
        assert actual.shape == expected.shape
        assert actual.dtype == dtype
        if rows:
            difference = (actual.double() - expected).abs() / expected.abs().max()
            assert float(difference.flatten()[:100_000].quantile(0.99)) < close
            assert float((actual.double() - expected).abs().max()) < close * float(expected.abs().max()) + 2 * one

    same(linear.linear(x, packed, None, record), expected)
    same(linear.linear_add(x, other, packed, None, record), expected + other.double())
    for approximate in ("none", "tanh"):
        gelu = functional.gelu(expected, approximate=approximate)
        same(linear.linear_gelu(x, packed, None, approximate, record, None), gelu)


@pytest.mark.parametrize("repeats", ["in the product", "afterwards", "not"])
@pytest.mark.parametrize("smooth", [True, False])
def test_gelu_quantizes_for_the_layer_that_follows(smooth: bool, repeats: str) -> None:
    """And gives it channels more than once, where the weight has them more than once too; to others it gives each once."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 64, generator=generator)
    bias = torch.randn(96, generator=generator)
    up = quantized("up", torch.randn(96, 64, generator=generator) / 8, -3, 3, 1)
    down = quantized("down", torch.randn(64, 96, generator=generator) / 9, -0.2, 4, 2, smooth)
    if repeats != "not":
        (down,) = widened([down])
    wide, biases = int8.repeating(up, bias, down) if repeats == "in the product" else (up, bias)
    packed = [torch.ops.onednn.qlinear_prepack(torch.from_numpy(layer.weight), None) for layer in (wide, down)]
    records = [int8.record(wide, biases, torch.float32, 96), int8.record(down, None, torch.float32)]
    between = linear.linear_gelu(x, packed[0], None, "none", records[0], records[1])
    assert between.dtype == torch.uint8
    assert between.shape == (9, down.weight.shape[1])
    assert (down.weight.shape[1] > 96) == (repeats != "not")
    actual = linear.linear(between, packed[1], None, records[1])
    hidden = functional.gelu(formula(x.double(), up, bias))
    assert float((actual - formula(hidden, down, None)).abs().max()) < 0.02
    bare = linear.linear_gelu(x, packed[0], None, "none", records[0], [torch.empty(0)] * int8.RECORD)
    assert bare.shape == (9, 96)
    assert float((bare - hidden).abs().max()) < 1e-4


CAPPED = """
import sys, torch
torch.save([torch.jit.load(path)(*torch.load(sys.argv[1]))['last_hidden_state'] for path in sys.argv[3:]], sys.argv[2])
"""


def test_cpu_without_vnni(model: Model, exported: Path, tmp_path: Path) -> None:
    """The sums of pairs are of 16 bits on AVX2, which weights within ±63 cannot fill: they answer the same there."""
    given = batches()["right"]
    torch.save([given["input_ids"], given["attention_mask"], given["token_type_ids"]], tmp_path / "given.pt")
    layers = Layers(plan(model.module, {**batches()["odd"]}, most=63))
    paths = []
    for rest in RESTS:
        torchscript.quantize(tmp_path / rest, exported, layers, rest)
        paths.append(str(tmp_path / rest / INT8))
    command = [sys.executable, "-c", CAPPED, str(tmp_path / "given.pt"), str(tmp_path / "made.pt"), *paths]
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    subprocess.run(command, env=environment, check=True)
    real = given["attention_mask"] > 0
    for path, actual in zip(paths, torch.load(tmp_path / "made.pt"), strict=True):
        expected = torch.jit.load(path)(**given)["last_hidden_state"]
        assert float(functional.cosine_similarity(actual, expected, dim=-1)[real].min()) > 0.99


def test_saturation_is_what_small_weights_avoid(tmp_path: Path) -> None:
    """The largest inputs times the largest weights: 2 · 255 · 63 fits into 16 bits, 2 · 255 · 127 does not."""
    script = (
        "import torch\n"
        "x = torch.full((4, 64), 255, dtype=torch.uint8)\n"
        "for most in (63, 127):\n"
        "    weight = torch.ops.onednn.qlinear_prepack(torch.full((32, 64), most, dtype=torch.int8), None)\n"
        "    one, zero = torch.ones(32), torch.zeros(32, dtype=torch.int32)\n"
        "    none = (None, 1.0, 0, torch.float32, 'none', [], '')\n"
        "    y = torch.ops.onednn.qlinear_pointwise(x, 1.0, 0, weight, one, zero, *none)\n"
        "    print(bool((y == 255 * 64 * most).all()))\n"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    answer = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["True", "False"]
