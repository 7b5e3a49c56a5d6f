"""image-classification: the labels of an image with their scores, the best first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compiler.pipelines import images, text_classification
from compiler.pipelines.base import Pipeline

TASK = "image-classification"
# `top_k` labels, all for None. `function_to_apply`: softmax, sigmoid or none.
OPTIONS: Mapping[str, Any] = {"top_k": 5, "function_to_apply": None}
prepare, items, features, size, collate, rows = (
    images.prepare, images.items, images.features, images.size, images.collate, images.rows,
)  # fmt: skip
WINDOW, group, single, reduce = images.WINDOW, images.group, images.single, text_classification.reduce


def finish(pipe: Pipeline, item: Any, parts: Sequence[tuple[Any, Any]], options: Mapping[str, Any]) -> Any:
    return text_classification.finish(pipe, item, parts, options)
