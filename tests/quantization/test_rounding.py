"""How a layer is made int8: smoothing, channels that are given several times, and GPTQ, each against its formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compiler.quantization.rounding import DAMPING, Emulation, Group, Quantizer, _nearest, _rounded, gptq, quantize
from tests.quantization.formula import formula


def correlated(rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs whose channels go together, and weights."""
    generator = torch.Generator().manual_seed(8)
    mixed = torch.randn((width // 4, width), generator=generator)
    inputs = torch.randn((rows, width // 4), generator=generator) @ mixed
    inputs += 0.1 * torch.randn((rows, width), generator=generator)
    return inputs, torch.randn((24, width), generator=generator)


@pytest.mark.parametrize("largest", [127, 63, 7])
def test_gptq_loses_less_than_rounding_to_the_nearest(largest: int) -> None:
    inputs, weight = correlated(1000, 160)
    number, scale = gptq(weight, (inputs.T @ inputs).double(), largest)
    nearest, same = _nearest(weight, largest)
    assert torch.equal(scale, same)
    assert torch.equal(number, number.round())
    assert number.abs().max() <= largest
    errors = [float(((inputs @ (weight - one * scale[:, None]).T) ** 2).mean()) for one in (number, nearest)]
    assert errors[0] < 0.5 * errors[1]


def test_gptq_is_the_method_as_published() -> None:
    """Column by column, with the inverse Hessian of the columns that are left (Optimal Brain Surgeon), in float64."""
    inputs, weight = correlated(1000, 160)  # more columns than one block
    hessian = (inputs.T @ inputs).double()
    number, scale = gptq(weight, hessian, 7)
    damped = hessian + torch.eye(160).double() * hessian.diagonal().mean() * DAMPING
    inverse = torch.linalg.inv(damped)
    left = (weight / scale[:, None]).double()
    expected = torch.zeros_like(left)
    for column in torch.argsort(damped.diagonal(), descending=True, stable=True):
        expected[:, column] = left[:, column].round().clamp(-7, 7)
        error = (left[:, column] - expected[:, column]) / inverse[column, column]
        left -= torch.outer(error, inverse[column])
        inverse -= torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    # A tie that float32 breaks the other way changes what follows in its row.
    assert float((number == expected).float().mean()) > 0.99


def test_weights_for_cpus_without_wide_sums() -> None:
    part = torch.nn.Sequential(torch.nn.Linear(16, 8))
    rows = torch.randn((500, 16), generator=torch.Generator().manual_seed(2))
    group = Group(("0",), rows.amin(dim=0), rows.amax(dim=0), [rows], len(rows))
    (layer,) = quantize(part, group, 7)
    assert np.abs(layer.weight).max() <= 63


def test_smoothing_evens_channels_out() -> None:
    """One channel is a hundred times the others: without smoothing, these would be a step or two."""
    linear = torch.nn.Linear(16, 8)
    part = torch.nn.Sequential(linear)
    rows = torch.randn((500, 16), generator=torch.Generator().manual_seed(2))
    rows[:, 3] *= 100
    weight = linear.weight.detach()
    weight[:, 3] /= 100
    group = Group(("0",), rows.amin(dim=0), rows.amax(dim=0), [rows.clone()], len(rows))
    (layer,) = quantize(part, group, 8)
    assert layer.smooth is not None
    assert layer.smooth[3] < 0.1 * np.delete(layer.smooth, 3).min()
    plain = Quantizer.make(group, weight, 0.0)
    with Emulation(part, [layer]).applied(["0"]), torch.inference_mode():
        smoothed = part(rows)
    with torch.inference_mode():
        exact, rough = part(rows), torch.nn.functional.linear(plain(rows), weight, linear.bias)
    assert ((smoothed - exact) ** 2).mean() < 0.1 * ((rough - exact) ** 2).mean()


def test_wide_channels_cost_the_others_nothing() -> None:
    """One channel ten times as wide as the others, which matters as much as they do: given more than once it is far
    closer than smoothed."""
    generator = torch.Generator().manual_seed(8)
    part = torch.nn.Linear(64, 32)
    with torch.no_grad():
        part.weight.copy_(torch.randn(32, 64, generator=generator))
        rows = torch.randn(2000, 64, generator=generator)
        rows[:, 5] *= 10
    module = torch.nn.ModuleDict({"one": part})
    group = Group(("one",), rows.amin(dim=0), rows.amax(dim=0), [rows], len(rows))
    (layer,) = quantize(module, group, 8)
    assert layer.repeated is not None
    assert layer.offset is not None
    times = np.bincount(layer.repeated, minlength=64) + 1
    assert times.argmax() == 5
    assert np.delete(times, 5).max() <= 2
    assert layer.offset[layer.repeated == 5] == pytest.approx(np.arange(1, times[5]) / times[5])
    weight = part.weight.detach()
    quantizer = Quantizer.make(group, weight, 0.8)
    smoothed, _ = _rounded(quantizer, ("one",), [weight], rows, rows @ weight.T, 127)
    exact = part(rows).detach()
    wide, narrow = (float(((formula(rows, one, part.bias).detach() - exact) ** 2).mean()) for one in (layer, smoothed[0]))
    assert wide < 0.2 * narrow


def test_channels_alike_are_given_once() -> None:
    part = torch.nn.Linear(64, 32)
    rows = torch.randn(2000, 64, generator=torch.Generator().manual_seed(8))
    group = Group(("one",), rows.amin(dim=0), rows.amax(dim=0), [rows], len(rows))
    (layer,) = quantize(torch.nn.ModuleDict({"one": part}), group, 8)
    assert layer.repeated is None
    assert layer.offset is None
