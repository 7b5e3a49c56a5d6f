"""Attention as plain products: torch's own answer, at every length, mask and number of steps."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from compiler.fusions.attention import attention

# The last two take several steps, in bf16 and in fp32.
SHAPES = [(1, 3, 1, 5), (2, 2, 17, 8), (5, 3, 64, 8), (3, 2, 200, 4), (0, 2, 4, 8), (40, 12, 80, 4), (9, 12, 300, 4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["none", "keys", "pairs", "added", "one for all", "one a head"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_answers_as_torch(shape: tuple[int, int, int, int], kind: str, dtype: torch.dtype) -> None:
    batch, heads, sequence, _ = shape
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(shape, generator=generator) for _ in range(3))
    mask = None
    if kind == "keys":
        mask = torch.rand(batch, 1, 1, sequence, generator=generator) > 0.4
        mask[..., 0] = True
    elif kind == "pairs":
        distance = torch.arange(sequence)
        mask = ((distance[:, None] - distance).abs() < 3).expand(batch, 1, sequence, sequence)
    elif kind == "added":
        mask = torch.randn(1, 1, sequence, sequence, generator=generator)
    elif kind == "one for all":
        mask = torch.randn(sequence, sequence, generator=generator) > -1
        mask.fill_diagonal_(True)
    elif kind == "one a head":
        mask = torch.randn(heads, sequence, sequence, generator=generator)
    expected = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3)
    given = mask.to(dtype) if mask is not None and mask.dtype != torch.bool else mask
    actual = attention(query.to(dtype), key.to(dtype), value.to(dtype), given, 0.3)
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert torch.allclose(actual.float(), expected, atol=tolerance)


def test_a_sequence_without_a_key_is_finite() -> None:
    """A row of padding in a group: nobody reads its answer, and it must not disturb the others."""
    query = torch.randn(2, 2, 8, 4)
    mask = torch.ones(2, 1, 1, 8, dtype=torch.bool)
    mask[0] = False
    actual = attention(query, query, query, mask, 0.5)
    assert torch.isfinite(actual).all()
    assert torch.allclose(actual[1], functional.scaled_dot_product_attention(query, query, query, scale=0.5)[1], atol=1e-6)
