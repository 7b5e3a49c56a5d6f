"""The formula of `compiler.quantization.layers` in plain torch, and layers to try it with."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch

from compiler.quantization.layers import QuantizedLinear, QuantizedTable, digest


def formula(x: torch.Tensor, layer: QuantizedLinear, bias: torch.Tensor | None) -> torch.Tensor:
    """What a layer computes, float64. Steps are taken in the dtype of `x`, sums in float64, where they are exact."""
    steps = (x if layer.smooth is None else x * torch.from_numpy(layer.smooth).to(x.dtype)) / layer.scale
    if layer.repeated is not None:
        steps = torch.cat([steps, steps[..., torch.from_numpy(layer.repeated)]], dim=-1)
    if layer.offset is not None:
        steps[..., layer.inputs :] += torch.from_numpy(layer.offset)
    rounded = torch.clamp(torch.round(steps) + layer.zero_point, 0, 255).double() - layer.zero_point
    product = rounded @ torch.from_numpy(layer.weight).double().T * layer.scale * torch.from_numpy(layer.weight_scale).double()
    return product + torch.from_numpy(layer.shift).double() + (0 if bias is None else bias.double())


def rows_of(module: torch.nn.Module) -> list[QuantizedTable]:
    """Every embedding of a model, by the row, as the nearest of 255 numbers."""
    found = []
    for name, part in module.named_modules():
        if isinstance(part, torch.nn.Embedding):
            rows = part.weight.detach().numpy()
            scale = np.abs(rows).max(axis=1) / np.float32(127) + np.float32(1e-12)  # the padding's row may be of zeros
            found.append(QuantizedTable(name, digest(rows), np.rint(rows / scale[:, None]).astype(np.int8), scale))
    return found


def with_rows(module: torch.nn.Module, tables: Iterable[QuantizedTable]) -> torch.nn.Module:
    """A copy of a model that looks up these tables' rows."""
    module = copy.deepcopy(module)
    for table in tables:
        rows = table.weight.astype(np.float32) * table.weight_scale[:, None]
        module.get_submodule(table.name).weight = torch.nn.Parameter(torch.from_numpy(rows))
    return module


def widened(layers: Iterable[QuantizedLinear]) -> list[QuantizedLinear]:
    """The layers with their second channel given three times and their last twice."""
    found = []
    for layer in layers:
        last = layer.inputs - 1
        repeated = np.array([1, 1, last])
        times = np.ones(layer.inputs)
        times[[1, last]] = 3, 2
        weight = np.rint(layer.weight / times).astype(np.int8)
        found.append(
            replace(
                layer,
                weight=np.concatenate([weight, weight[:, repeated]], axis=1),
                repeated=repeated,
                offset=np.array([1 / 3, 2 / 3, 1 / 2], dtype=np.float32),
            )
        )
    return found
