"""Fusions: rewrites of the eager model, of which this is the list, and those of a graph that has been exported (`*_graph`).

A backend names the rewrites that it wants (`FUSIONS` in its module): what helps one runtime can blind another's own fusions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Declined:
    """Why a fusion does not apply to a model; the build goes on without it and the manifest says so."""

    reason: str


def _padding_free(module: torch.nn.Module, example: Mapping[str, torch.Tensor]) -> Any:
    from compiler.fusions import padding_free

    return padding_free.rewrite(module, example)


def _linear(module: torch.nn.Module, example: Mapping[str, torch.Tensor]) -> Any:
    from compiler.fusions import linear

    return linear.rewrite(module, example)


#: Each takes a module and inputs to try it on, leaves the module as it is, and returns what a backend applies while it
#: traces, or `Declined`.
REWRITES: Mapping[str, Callable[..., Any]] = {"padding_free": _padding_free, "linear": _linear}
