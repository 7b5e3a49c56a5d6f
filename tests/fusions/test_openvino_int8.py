"""Layers in int8 as OpenVINO runs them, held against their formula, wherever their input comes from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import openvino
import openvino.opset14 as ops
import pytest
import torch

from compiler.fusions.openvino_int8 import quantize
from compiler.quantization.layers import Layers, QuantizedLinear, digest
from tests.quantization.formula import formula, widened

RANDOM = np.random.default_rng(4)
WIDTH = 12


def normal(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


BEFORE, BIAS, WEIGHT, OTHER, INPUTS = normal(WIDTH, 8), normal(WIDTH), normal(5, WIDTH), normal(6, WIDTH), normal(1, 9, 8)
LAYER = QuantizedLinear(
    "layer",
    digest(WEIGHT),
    RANDOM.integers(-127, 128, WEIGHT.shape).astype(np.int8),
    RANDOM.random(5, dtype=np.float32),
    RANDOM.random(WIDTH, dtype=np.float32) + np.float32(0.5),
    float(np.float32(0.1)),
    110,
    normal(5),
)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize("behind", ["product", "gelu", "sum"])
def test_a_layer_behind_a_product(behind: str, other: bool, bias: bool, smooth: bool, wide: bool) -> None:
    """As embeddings that are projected are the input of one layer in int8 and of some that are not. OpenVINO computes that
    with tokens for channels where it may join what evens the channels out with the rounding."""
    layer = LAYER if smooth else replace(LAYER, smooth=None)
    (layer,) = widened([layer]) if wide else (layer,)
    given = ops.parameter([1, -1, 8], np.float32, name="given")
    source, x = ops.matmul(given, BEFORE, False, True), torch.from_numpy(INPUTS @ BEFORE.T)
    if bias:
        source, x = ops.add(source, BIAS), x + torch.from_numpy(BIAS)
    if behind == "gelu":
        source, x = ops.gelu(source, "erf"), torch.nn.functional.gelu(x)
    if behind == "sum":
        source, x = (
            ops.add(source, ops.matmul(given, BEFORE[::-1].copy(), False, True)),
            x + torch.from_numpy(INPUTS @ BEFORE[::-1].T),
        )
    outputs = [ops.matmul(source, WEIGHT, False, True)]
    if other:
        outputs += [ops.matmul(source, OTHER, False, True), ops.add(source, np.float32(1))]
    program = openvino.Model([ops.result(output) for output in outputs], [given], "program")
    done, alive = quantize(program, Layers([layer]))
    assert done == {"layer": "MatMul u8 × i8"} and alive
    compiled = openvino.Core().compile_model(program, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled([INPUTS])
    steps = layer.scale * np.abs(layer.weight).max() * layer.weight_scale.max()
    expected = formula(x, layer, None).numpy()
    wrong = np.abs(found[compiled.outputs[0]] - expected)
    # A sum that rounds otherwise is a step of one channel off; few are.
    assert wrong.max() <= 2 * steps and np.median(wrong) < 1e-3 * np.abs(expected).max()
    if other:
        np.testing.assert_allclose(found[compiled.outputs[2]], (x + 1).numpy(), rtol=1e-4, atol=1e-4)
