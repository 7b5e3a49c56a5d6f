"""Export: an optimized model, or an artifact of a higher precision, into a format's files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from compiler.backends import BACKENDS
from compiler.stages.load import load
from compiler.stages.optimize import optimize
from compiler.store import remove
from compiler.types import Snapshot, Target

PACKED = "padding_free"


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
    try:
        made = backend.export(out, model, target)
    except Exception as error:
        if PACKED not in model.rewrites:
            raise
        # It answers right on packed tokens, but an exporter may want more of a model's code than to run.
        reason = f"it does not export on packed tokens ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
        model = replace(
            model,
            rewrites={name: rewrite for name, rewrite in model.rewrites.items() if name != PACKED},
            declined={**model.declined, PACKED: reason},
        )
        for left in out.iterdir():
            remove(left)
        made = backend.export(out, model, target)
    return {**made, "declined": dict(model.declined)}
