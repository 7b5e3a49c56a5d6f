"""image-feature-extraction: the vectors of an image's patches, or its one pooled vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from compiler.errors import InputError
from compiler.pipelines import images
from compiler.pipelines.base import Pipeline

if TYPE_CHECKING:
    import numpy as np

TASK = "image-feature-extraction"
# With `pool` the pooler's output. With `return_tensors` the answer is an array, float32 `[1, …]`, instead of nested lists.
OPTIONS: Mapping[str, Any] = {"pool": False, "return_tensors": False}
prepare, items, features, size, collate, rows = (
    images.prepare, images.items, images.features, images.size, images.collate, images.rows,
)  # fmt: skip
WINDOW, group, single = images.WINDOW, images.group, images.single


def reduce(
    pipe: Pipeline, feature: Any, outputs: Mapping[str, np.ndarray[Any, Any]], options: Mapping[str, Any]
) -> np.ndarray[Any, Any]:
    if options["pool"] and "pooler_output" not in outputs:
        raise InputError(f"pool: the model has no pooler_output; it has {', '.join(outputs)}")
    found = outputs["pooler_output"] if options["pool"] else next(iter(outputs.values()))
    return found[None].copy()


def finish(pipe: Pipeline, item: Any, parts: Sequence[tuple[Any, Any]], options: Mapping[str, Any]) -> Any:
    ((_, vectors),) = parts
    return vectors if options["return_tensors"] else vectors.tolist()
