"""Scaled dot products as plain matrix products, a few sequences at a time, where those are faster than torch's flash kernel.

Measured on CPUs with AVX-512: torch's kernel works on blocks that are too small for heads of 32 or 64. Two batched products
with a softmax between them take half of its time in bf16, unless there are few scores, and less in fp32 up to some hundred
tokens, as long as the scores of one step stay in the cache.
"""

from __future__ import annotations

import torch
from torch.nn import functional


@torch.jit.script
def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """softmax(query · keyᵀ · scale) · value, `[batch, heads, sequence, size]`, of one dtype.

    Args:
        mask: bool, true at keys that may be seen, or what is added to the scores; broadcasts to
            `[batch, heads, sequence, sequence]`. One of other than four dimensions is left to torch's kernel.
    """
    batch, heads, sequence = query.shape[0], query.shape[1], query.shape[2]
    if query.dtype == torch.bfloat16:
        plain = torch.ops.mkldnn._is_mkldnn_bf16_supported() and batch * heads * sequence * sequence >= 1 << 15
        most = 1 << 21
    else:
        plain = sequence <= 192
        most = 1 << 18
    if not plain or key.shape[2] != sequence or (mask is not None and mask.dim() != 4):
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    if mask is not None and mask.dtype == torch.bool:
        # Finite, so that a sequence without any key gives numbers that nobody reads, and no NaN.
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), -1e30)
    keys = key.transpose(2, 3)
    step = max(1, most // max(1, heads * sequence * sequence))
    if batch <= step:
        scores = torch.matmul(query * scale, keys)
        if mask is not None:
            scores = scores.add_(mask)
        return torch.matmul(torch.softmax(scores, -1), value)
    outputs: list[torch.Tensor] = []
    start = 0
    while start < batch:  # a loop over a range would be unrolled, eight times, at each of its places in a file
        end = min(start + step, batch)
        scores = torch.matmul(query[start:end] * scale, keys[start:end])
        if mask is not None:
            scores = scores.add_(mask if mask.shape[0] == 1 else mask[start:end])
        outputs.append(torch.matmul(torch.softmax(scores, -1), value[start:end]))
        start = end
    return torch.cat(outputs)
