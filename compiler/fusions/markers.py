"""Operators that stand for what padding-free execution does to tokens, for exporters that trace a graph.

They have shapes and no implementation: whoever exports a graph replaces them. `tokens` is a size of its own in the graph, so
nothing that was traced assumes how many there are.
"""

from __future__ import annotations

from typing import Any

import torch

from compiler.fusions.padding_free import NAMESPACE

_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_LIBRARY.define("pack(Tensor values, Tensor mask) -> Tensor")
_LIBRARY.define("unpack(Tensor hidden, Tensor mask) -> Tensor")
_LIBRARY.define("columns(Tensor mask) -> Tensor")
_LIBRARY.define("attention(Tensor query, Tensor key, Tensor value, Tensor mask, float scale, int window) -> Tensor")
MARKERS: Any = getattr(torch.ops, NAMESPACE)


def _tokens() -> Any:
    return torch.library.get_ctx().new_dynamic_size(min=2)


def _pack(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return values.new_empty((1, _tokens()))


def _unpack(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return hidden.new_empty((*mask.shape, hidden.shape[-1]))


def _columns(mask: torch.Tensor) -> torch.Tensor:
    return mask.new_empty((1, _tokens()))


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float, window: int
) -> torch.Tensor:
    return query.new_empty((query.shape[0], query.shape[2], query.shape[1], query.shape[3]))


for _name, _fake in (("pack", _pack), ("unpack", _unpack), ("columns", _columns), ("attention", _attention)):
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=_LIBRARY)
