"""feature-extraction: the vectors of a text's tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from compiler.pipelines import text
from compiler.pipelines.base import Pipeline

if TYPE_CHECKING:
    import numpy as np
    import tokenizers

TASK = "feature-extraction"
# With `return_tensors` the answer is an array, float32 `[1, tokens, width]`, instead of nested lists.
OPTIONS: Mapping[str, Any] = {"return_tensors": False}
prepare, items, features, size = text.prepare, text.items, text.features, text.size
collate, rows, single = text.collate, text.rows, text.single
WINDOW, group = text.WINDOW, text.group


def reduce(
    pipe: Pipeline, feature: tokenizers.Encoding, outputs: Mapping[str, np.ndarray[Any, Any]], options: Mapping[str, Any]
) -> Any:
    vectors = next(iter(outputs.values()))[None]
    return vectors.copy() if options["return_tensors"] else vectors.tolist()


def finish(pipe: Pipeline, item: Any, parts: Sequence[tuple[Any, Any]], options: Mapping[str, Any]) -> Any:
    ((_, vectors),) = parts
    return vectors
