"""Export: an optimized model, or an artifact of a higher precision, into a format's files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compiler.backends import BACKENDS
from compiler.stages.load import load
from compiler.stages.optimize import optimize
from compiler.types import Snapshot, Target


def export(
    out: Path, target: Target, snapshot: Snapshot, task: str, options: Mapping[str, bool], exported: Path | None
) -> dict[str, Any]:
    """Write the target's files below `out`, from the checkpoint, or from the files below `exported` where the backend
    makes this precision from another. Returns what the backend says of them (`opset`, `fusions`) and, of a checkpoint, why
    a fusion was `declined`.

    Raises:
        SourceError: as `load` does.
    """
    backend = BACKENDS[target.format]
    if exported is not None:
        return backend.reduce(out, exported, target.precision)
    model = optimize(load(snapshot, task, aside=out, **options), backend.FUSIONS)
    return {**backend.export(out, model, target), "declined": dict(model.declined)}
