"""Fusions: rewrites of the eager model, of which this is the list, and those of a graph that has been exported (`*_graph`).

A backend names the rewrites that it wants (`FUSIONS` in its module): what helps one runtime can blind another's own fusions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compiler.types import Model


@dataclass(frozen=True)
class Declined:
    """Why a fusion does not apply to a model; the build goes on without it and the manifest says so."""

    reason: str


def _padding_free(model: Model) -> Any:
    from compiler.fusions import padding_free

    if model.axes.get("input_ids") != ("batch", "sequence"):
        taken = ", ".join(f"{name} {list(axes)}".replace("'", "") for name, axes in model.axes.items())
        return Declined(f"it packs the tokens of texts, input_ids [batch, sequence]; this model takes {taken}")
    tokenizer = model.tokenizer
    padding = tokenizer.pad_token_id
    special = [token for token in tokenizer.all_special_ids if token != padding]
    return padding_free.rewrite(
        model.module,
        dict(model.example),
        special if padding is None else (padding, *special),
        left=tokenizer.padding_side == "left",
    )


def _linear(model: Model) -> Any:
    from compiler.fusions import linear

    return linear.Linears()


#: Each takes a model, leaves it as it is, and returns what a backend applies while it traces, or `Declined`.
REWRITES: Mapping[str, Callable[..., Any]] = {"padding_free": _padding_free, "linear": _linear}

#: What each counted fusion does, so that two mixes of them can be compared: a layer's bias that `Gemm` adds is added by
#: `BiasGelu` as well, which does more. One that is not listed does what nothing else does.
WORK: Mapping[str, tuple[str, ...]] = {
    "Gelu": ("gelu",),
    "BiasGelu": ("gelu", "bias of a linear layer"),
    "Gemm": ("bias of a linear layer",),
    "linear": ("linear layer",),
    "linear_gelu": ("linear layer", "gelu"),
    "linear_add": ("linear layer", "sum after a linear layer"),
    "Attention": ("attention", "queries, keys and values in one product"),
    "MultiHeadAttention": ("attention",),
    "ScaledDotProductAttention": ("attention",),
    "concat_linear": ("queries, keys and values in one product",),
    "LayerNormalization": ("norm",),
    "RMSNormalization": ("norm",),
    "MVN": ("norm",),
    "RMS": ("norm",),
    "RotaryEmbedding": ("rotary embedding",),
    "RoPE": ("rotary embedding",),
}
#: Work that one of these takes in, at most so often, where another fusion would do it: the biases and products of queries,
#: keys and values.
TAKES_IN: Mapping[str, Mapping[str, int]] = {
    "Attention": {"bias of a linear layer": 3},
    "MultiHeadAttention": {"bias of a linear layer": 3},
    "concat_linear": {"bias of a linear layer": 2, "linear layer": 3},  # the bias of the joined layer is one
}
