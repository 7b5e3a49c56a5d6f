"""A group of linear layers in int8: how its input is quantized, and weights that are rounded for that.

The input's channels are evened out (SmoothQuant, Xiao et al. 2022, with the exponent that does best), the few that are far
wider than the others, or cost the most, are given several times (as outlier channel splitting, Zhao et al. 2019, but finer
with each time: see `layers`), and weights are rounded one column after the other, each taking over the error of those before
(GPTQ, Frantar et al. 2022), against the inputs as they are once quantized.

What was tried and does not help: scales of each token's own, zero points of each channel's own, narrower ranges that cut
what is beyond, least squares before GPTQ, the means of texts beside tokens in its Hessian, and training the rounded weights
against the original (four epochs: 4 % less error). What remains is the noise of 8-bit inputs, which no weights can take back.
Inputs of 16 bits, as two products in ONNX, have 0.4 of the error and take 0.7 of the time of fp32; files with as many of them
as a budget asks for were no faster than those with layers left in fp32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from compiler.quantization.layers import QuantizedLinear, digest

# Of an input's rows, what SmoothQuant's exponent is chosen on.
TRIAL_ROWS = 768
EXPONENTS = (0.0, 0.6, 0.8, 0.9, 1.0)
# Of so many channels one may be given once more, if that makes this of the error: columns cost time. Besides, how many are so
# wide that weights are narrowed for them, and how often one of these is given at most.
COLUMNS, WORTH = 32, 0.67
WIDE, TIMES = 8, 16
# The share that GPTQ leaves of the error of weights that are rounded to the nearest: 0.1 to 0.8 was measured.
LEFT = 0.5
# What is added to the diagonal of GPTQ's Hessian, in units of its mean; columns that are rounded between two updates.
DAMPING, BLOCK = 0.01, 128


@dataclass
class Group:
    """Linear layers that are given the same tensor, so that it is quantized once for all of them."""

    names: tuple[str, ...]
    low: torch.Tensor
    high: torch.Tensor
    rows: list[torch.Tensor] = field(default_factory=list)
    tokens: int = 0

    @property
    def name(self) -> str:
        return " + ".join(self.names)


def quantize(module: torch.nn.Module, group: Group, bits: int) -> list[QuantizedLinear]:
    """The layers of a group in int8: the exponent of SmoothQuant by the error that is to be expected, the weights by GPTQ."""
    parts = dict(module.named_modules())
    weights: list[Any] = [parts[name].weight.detach().float() for name in group.names]
    rows = torch.cat(group.rows)
    group.rows.clear()
    largest = 2 ** (bits - 1) - 1
    trial = rows[:: max(1, len(rows) // TRIAL_ROWS)]
    joined = torch.cat(weights)
    exact = rows @ joined.T

    def best(columns: int) -> tuple[list[QuantizedLinear], float]:
        made = (Quantizer.make(group, joined, exponent, columns) for exponent in EXPONENTS)
        quantizer = min(made, key=lambda one: _expected(one, joined, trial, largest))
        return _rounded(quantizer, group.names, weights, rows, exact, largest)

    found, least = best(0)
    if columns := joined.shape[1] // COLUMNS:
        # Whether more columns are worth it shows after rounding only: of what wide channels do to weights it leaves more.
        wide, lower = best(columns)
        if lower < WORTH * least:
            return wide
    return found


def _expected(quantizer: Quantizer, weight: torch.Tensor, rows: torch.Tensor, largest: int) -> float:
    """The mean squared error of the outputs that is to be expected: what rounding the input makes, and the share of what
    rounding weights to the nearest would, that GPTQ leaves."""
    spread, exact = quantizer.spread(weight), quantizer.exact(rows)
    number, scale = _nearest(spread, largest)
    of_inputs = (quantizer(rows) - exact) @ spread.T
    of_weights = exact @ (number * scale[:, None] - spread).T
    # Constants are taken back by `shift`.
    return float(of_inputs.var(dim=0).mean() + LEFT * of_weights.var(dim=0).mean())


def _rounded(
    quantizer: Quantizer,
    names: Sequence[str],
    weights: Sequence[torch.Tensor],
    rows: torch.Tensor,
    exact: torch.Tensor,
    largest: int,
) -> tuple[list[QuantizedLinear], float]:
    """The layers with weights rounded for a quantizer, and the mean squared error of what they make of `rows`, of which the
    original makes `exact`."""
    inputs = quantizer(rows)
    numbers, scales = gptq(quantizer.spread(torch.cat(list(weights))), (inputs.T @ inputs).double(), largest)
    departures = exact - inputs @ (numbers * scales[:, None]).T
    shifts = departures.mean(dim=0)
    squares = float(departures.var(dim=0).mean())
    found = []
    smooth = None if bool((quantizer.smooth == 1).all()) else quantizer.smooth.numpy()
    repeated = quantizer.repeated.numpy() if len(quantizer.repeated) else None
    parts = [torch.split(values, [len(weight) for weight in weights]) for values in (numbers, scales, shifts)]
    for name, weight, number, scale, shift in zip(names, weights, *parts, strict=True):
        found.append(
            QuantizedLinear(
                name,
                digest(weight.numpy()),
                number.to(torch.int8).numpy(),
                scale.numpy(),
                smooth,
                quantizer.scale,
                quantizer.zero_point,
                shift.numpy(),
                repeated,
                None if repeated is None else quantizer.offset.numpy(),
            )
        )
    return found, squares


@dataclass(frozen=True)
class Quantizer:
    """An input's quantization, and back: what int8 arithmetic sees of it, in floating point. See `QuantizedLinear`."""

    smooth: torch.Tensor
    scale: float
    zero_point: int
    repeated: torch.Tensor
    offset: torch.Tensor

    @classmethod
    def of(cls, layer: QuantizedLinear) -> Quantizer:
        return cls(
            torch.ones(layer.inputs) if layer.smooth is None else torch.from_numpy(layer.smooth),
            layer.scale,
            layer.zero_point,
            torch.empty(0, dtype=torch.int64) if layer.repeated is None else torch.from_numpy(layer.repeated),
            torch.empty(0) if layer.offset is None else torch.from_numpy(layer.offset),
        )

    @classmethod
    def make(cls, group: Group, weight: torch.Tensor, exponent: float, columns: int = 0) -> Quantizer:
        """The whole range of the calibration's tokens, with zero at a whole number.

        SmoothQuant: channel j is divided by max|x_j|^a / max|w_j|^(1 - a); 0 stands for none.

        Some of `columns` go to the `WIDE` channels of which range and weights together are the largest: they are left out of
        that, made as narrow as the others, and given as often as it takes to have their weights no larger than those of the
        others. What remains goes, one after the other, to the channel where one more takes away the most of the error:
        rounding channel j makes one of |w_j|² / smooth_j² / 12 steps, and m of its kind 1/m² of that.
        """
        reach = torch.maximum(group.low.abs(), group.high.abs()).clamp(min=1e-5)
        others = torch.ones(len(reach), dtype=torch.bool)
        if columns:
            others[torch.topk(reach**2 * (weight**2).sum(dim=0), min(WIDE, len(reach) - 1)).indices] = False
        largest = weight.abs().amax(dim=0).clamp(min=1e-5)
        smooth = torch.ones_like(reach)
        if exponent:
            divisor = reach**exponent / largest ** (1 - exponent)
            smooth = torch.exp(torch.log(divisor[others]).mean()) / divisor
        low = min(float((group.low * smooth)[others].min()), 0.0)
        high = max(float((group.high * smooth)[others].max()), 0.0)
        scale = float(np.float32(max(high - low, 1e-12) / 255))
        zero_point = round(-low / scale)
        # A step of room at the top, for the offsets. Channels that reach it are given no more than once.
        room = torch.minimum(
            scale * max(254 - zero_point, 1) / group.high.clamp(min=1e-9),
            scale * max(zero_point, 1) / (-group.low).clamp(min=1e-9),
        )
        smooth = torch.where(others, smooth, torch.minimum(smooth, room))
        amplitude = largest / smooth
        times = torch.ones(len(reach), dtype=torch.int64)
        times[~others] = torch.ceil(amplitude[~others] / amplitude[others].max()).clamp(1, TIMES).long()
        able = group.high * smooth <= scale * (254 - zero_point)
        errors = ((weight**2).sum(dim=0) / smooth**2).double() * able
        for _ in range(columns - int(times.sum() - len(times)) if able.any() else 0):
            times[int(torch.argmax(errors * (1 / times**2 - 1 / (times + 1) ** 2)))] += 1
        repeated = torch.repeat_interleave(torch.arange(len(reach)), times - 1)
        offset = torch.cat([torch.arange(1, int(count)) / int(count) for count in times])
        return cls(smooth, scale, zero_point, repeated, offset)

    def exact(self, rows: torch.Tensor) -> torch.Tensor:
        """Wide and smoothed, with the offsets, as it is before it is rounded."""
        smoothed = rows * self.smooth
        return torch.cat([smoothed, smoothed[..., self.repeated] + self.offset * self.scale], dim=-1)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Quantized and back, wide and still smoothed."""
        steps = self.exact(rows) / self.scale
        return ((torch.round(steps) + self.zero_point).clamp(0, 255) - self.zero_point) * self.scale

    def spread(self, weight: torch.Tensor) -> torch.Tensor:
        """Weights `[out, in]` as those of the wide and smoothed input, `[out, wide]`."""
        times = torch.ones(weight.shape[1]).index_add_(0, self.repeated, torch.ones(len(self.repeated)))
        weight = weight / times / self.smooth
        return torch.cat([weight, weight[:, self.repeated]], dim=1)


def _scale(weight: torch.Tensor, largest: int) -> torch.Tensor:
    return (weight.abs().amax(dim=1) / largest).clamp(min=1e-9).float()


def _nearest(weight: torch.Tensor, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    scale = _scale(weight, largest)
    return torch.round(weight / scale[:, None]).clamp(-largest, largest), scale


def gptq(weight: torch.Tensor, hessian: torch.Tensor, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights `[out, in]` as whole numbers from -largest to largest, and a scale for each row, by GPTQ's algorithm 1.

    Args:
        hessian: `[in, in]` float64, XᵀX of the inputs X that the rounded weights will see.
    """
    scale = _scale(weight, largest)
    damped = hessian + torch.eye(len(hessian), dtype=hessian.dtype) * max(float(hessian.diagonal().mean()) * DAMPING, 1e-12)
    order = torch.argsort(damped.diagonal(), descending=True, stable=True)
    back = torch.argsort(order)
    damped = damped[order][:, order]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    # Transposed: a column that is rounded is then a row in memory.
    left = (weight / scale[:, None]).T[order].contiguous()
    numbers = torch.empty_like(left)
    for start in range(0, len(left), BLOCK):
        end = min(start + BLOCK, len(left))
        block, errors = left[start:end].clone(), torch.empty_like(left[start:end])
        corner = factor[start:end, start:end]
        for column in range(end - start):
            numbers[start + column] = torch.round(block[column]).clamp_(-largest, largest)
            errors[column] = (block[column] - numbers[start + column]) / corner[column, column]
            block[column + 1 :].sub_(torch.outer(corner[column, column + 1 :], errors[column]))
        left[end:] -= factor[start:end, end:].T @ errors
    return numbers[back].T.contiguous(), scale


class Emulation:
    """The eager model with some of its linear layers as int8 arithmetic computes them, in floating point."""

    def __init__(self, module: torch.nn.Module, layers: Iterable[QuantizedLinear]) -> None:
        self.parts = dict(module.named_modules())
        self.layers = {layer.name: layer for layer in layers}

    @contextmanager
    def applied(self, names: Sequence[str]) -> Iterator[None]:
        """Layers of those names in int8 meanwhile."""
        before: list[tuple[Any, Any, Any]] = []
        handles = []
        for name in names:
            part: Any = self.parts[name]
            layer = self.layers[name]
            quantizer = Quantizer.of(layer)
            before.append((part, part.weight, part.bias))
            rounded = torch.from_numpy(layer.weight.astype(np.float32) * layer.weight_scale[:, None])
            shift = torch.from_numpy(layer.shift)
            part.weight = torch.nn.Parameter(rounded, requires_grad=False)
            part.bias = torch.nn.Parameter(shift if part.bias is None else part.bias + shift, requires_grad=False)
            handles.append(part.register_forward_pre_hook(lambda _, given, quantizer=quantizer: (quantizer(given[0]),)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for part, weight, bias in before:
                part.weight, part.bias = weight, bias
