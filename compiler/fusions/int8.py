"""Linear layers in int8 as TorchScript runs them: quantize the input, then oneDNN's product with all that follows it inside.

What a layer needs beside its packed weight are eight tensors, its *record*. All are empty where the layer is not in int8, so
one trace serves every plan: which layers are in int8 is decided by what a file holds.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from compiler.quantization.layers import QuantizedLinear

# The tensors of a record. `factor` float32 [out] is scale · weight_scale, and `bias` float32 [out] has the zero point's part
# of the product in it, since what is known beforehand costs nothing when the layer runs. For the wide input: `multiplier`
# float32 [wide], smooth / scale, or [1] when all are alike; `offset` float32 [wide], zero_point + 0.5 and what repeated
# channels add, or [1] without these. For the layer before, when it makes its result uint8 for this one: `scale` float32 [1],
# `zero_point` int32 [1]. `like` [0, out] has no element, but the dtype of the result and its width, which the weight's is not
# where the layer gives channels more than once for the one that follows. `repeated` int64 [wide - in] are the channels of the
# input that are given more than once, or empty.
RECORD = 8


def record(
    layer: QuantizedLinear, bias: torch.Tensor | None, dtype: torch.dtype, outputs: int | None = None
) -> list[torch.Tensor]:
    """The record of a layer that had this bias, and whose results are of `dtype`; the first `outputs` of them, where the
    others are for the layer that follows alone."""
    smooth = torch.ones(1) if layer.smooth is None else torch.from_numpy(layer.smooth)
    repeated = torch.empty(0, dtype=torch.int64) if layer.repeated is None else torch.from_numpy(layer.repeated)
    added = torch.zeros(1)
    if layer.offset is not None:
        added = torch.cat([torch.zeros(layer.inputs), torch.from_numpy(layer.offset)])
        smooth = torch.cat([smooth.expand(layer.inputs), smooth.expand(layer.inputs)[repeated]])
    factor = torch.from_numpy(layer.weight_scale).double() * layer.scale
    shift = torch.from_numpy(layer.shift) if bias is None else torch.from_numpy(layer.shift) + bias.float()
    zero = torch.from_numpy(layer.weight).sum(dim=1, dtype=torch.int64) * layer.zero_point
    return [
        factor.float(),
        (smooth.double() / layer.scale).float(),
        added + (layer.zero_point + 0.5),
        torch.tensor([layer.scale], dtype=torch.float32),
        torch.tensor([layer.zero_point], dtype=torch.int32),
        (shift.double() - factor * zero).float(),
        torch.empty(0, layer.outputs if outputs is None else outputs, dtype=dtype),
        repeated,
    ]


def repeating(
    layer: QuantizedLinear, bias: torch.Tensor | None, following: QuantizedLinear
) -> tuple[QuantizedLinear, torch.Tensor | None]:
    """A layer, and its bias, that gives the channels which `following` takes more than once as often: products are faster than
    copies of what they made."""
    if (again := following.repeated) is None:
        return layer, bias
    rows = np.concatenate([np.arange(layer.outputs), again])
    wide = replace(layer, weight=layer.weight[rows], weight_scale=layer.weight_scale[rows], shift=layer.shift[rows])
    return wide, None if bias is None else bias[torch.from_numpy(rows)]


@torch.jit.script
def cut(steps: torch.Tensor) -> torch.Tensor:
    """Steps, a half added to each, as uint8; what is given is overwritten.

    Adding the half before the fraction is cut rounds as it should, since nothing below 0 is left. int16 comes between since
    torch converts it to uint8 with vector instructions, which it does not do for float32 (6 times slower).
    """
    number: torch.Tensor = steps.clamp_(0.0, 255.0).to(torch.int16).to(torch.uint8)
    return number


@torch.jit.script
def quantize(x: torch.Tensor, record: list[torch.Tensor]) -> torch.Tensor:
    """`x` as uint8, with the repeated channels behind; as it is where the layer before has done so."""
    if x.dtype == torch.uint8:
        return x
    wide = x if record[7].numel() == 0 else torch.cat([x, x.index_select(-1, record[7])], -1)
    number: torch.Tensor = cut(torch.addcmul(record[2], wide, record[1]))
    return number


@torch.jit.script
def supported(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a product may have on this CPU, for one that is wanted."""
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.float32
    return dtype


@torch.jit.script
def int8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    record: list[torch.Tensor],
    gelu: str | None,
    following: list[torch.Tensor] | None,
) -> torch.Tensor:
    """The layer, and gelu (of `gelu`'s approximation) of it.

    Args:
        weight: packed.
        following: the record of the layer that the result is for alone, or none. Where that is in int8, the result is
            quantized for it: by the product where one step serves all channels, else of what that has made as float32.
    """
    post = "none" if gelu is None else "gelu"
    dtype = record[6].dtype
    scale, zero_point, made = 1.0, 0, supported(dtype)
    if following is not None and following[1].numel() > 0:
        made = torch.float32
        if following[1].numel() == 1 and following[7].numel() == 0:
            scale, zero_point, made = float(following[3]), int(following[4]), torch.uint8
    output: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
        quantize(x, record),
        1.0,
        0,
        weight,
        record[0],
        record[4],
        record[5],
        scale,
        zero_point,
        made,
        post,
        [],
        "none" if gelu is None else gelu,
    )
    if output.dim() != x.dim():  # of no rows at all it makes a matrix
        output = output.reshape(x.shape[:-1] + record[0].shape)
    if made == torch.uint8:
        return output
    if following is not None and following[1].numel() > 0:
        if output.size(-1) < following[2].numel():
            output = torch.cat([output, output.index_select(-1, following[7])], -1)
        number: torch.Tensor = cut(output.mul_(following[1]).add_(following[2]))
        return number
    if output.size(-1) > record[6].size(1):
        output = output.narrow(-1, 0, record[6].size(1))
    return output if made == dtype else output.to(dtype)


@torch.jit.script
def int8_linear_add(x: torch.Tensor, other: torch.Tensor, weight: torch.Tensor, record: list[torch.Tensor]) -> torch.Tensor:
    """`other` plus the layer, in the dtype of `other`."""
    made = supported(other.dtype)
    output: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
        quantize(x, record),
        1.0,
        0,
        weight,
        record[0],
        record[4],
        other if made == other.dtype else other.to(made),
        record[5],
        1.0,
        0,
        made,
        1.0,
        0,
        "add",
        1.0,
        "none",
        [],
        "",
    )
    if output.dim() != other.dim():
        output = output.reshape(other.shape)
    return output if made == other.dtype else output.to(other.dtype)
