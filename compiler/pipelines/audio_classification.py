"""audio-classification: the labels of a sound with their scores, the best first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compiler.pipelines import sounds, text_classification
from compiler.pipelines.base import Pipeline

TASK = "audio-classification"
# `top_k` labels, all for None. `function_to_apply`: softmax, sigmoid or none.
OPTIONS: Mapping[str, Any] = {"top_k": None, "function_to_apply": None}
prepare, items, features, size, collate, rows = (
    sounds.prepare, sounds.items, sounds.features, sounds.size, sounds.collate, sounds.rows,
)  # fmt: skip
WINDOW, group, single, reduce = sounds.WINDOW, sounds.group, sounds.single, text_classification.reduce


def finish(pipe: Pipeline, item: Any, parts: Sequence[tuple[Any, Any]], options: Mapping[str, Any]) -> Any:
    found = text_classification.finish(pipe, item, parts, options)
    return [{"score": one["score"], "label": one["label"]} for one in found]
