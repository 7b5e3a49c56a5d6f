"""Optimize: which rewrites of the eager model its architecture allows, of those that a backend wants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from compiler.errors import StageError
from compiler.fusions import REWRITES, Declined
from compiler.types import Model


def optimize(model: Model, wanted: Sequence[str]) -> Model:
    """The model with its `rewrites`, and the reasons of those that were `declined`. The module itself is untouched: a
    backend applies them while it traces."""
    found = {name: REWRITES[name](model) for name in wanted}
    return replace(
        model,
        rewrites={name: rewrite for name, rewrite in found.items() if not isinstance(rewrite, Declined)},
        declined={name: rewrite.reason for name, rewrite in found.items() if isinstance(rewrite, Declined)},
    )


def check_fusions(artifact: str, fired: Mapping[str, int], expected: Mapping[str, int]) -> None:
    """Hold an artifact's counts against what its user expects: an upgrade of a library that stops fusing says nothing.

    Raises:
        StageError: a fusion fired less often than expected.
    """
    short = [
        f"{name} fired {fired.get(name, 0)} times, optimize.expect says {count}"
        for name, count in expected.items()
        if fired.get(name, 0) < count
    ]
    if short:
        found = " ".join(f"{name}={count}" for name, count in sorted(fired.items())) or "nothing"
        raise StageError(
            f"{artifact}: {', '.join(short)}; fused here: {found}; the model or a library changed: go back to what fused, or "
            "set optimize.expect to what there is"
        )
