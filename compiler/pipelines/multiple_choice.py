"""multiple-choice: which of several texts goes on from another, with scores that add up to 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from compiler.errors import InputError
from compiler.pipelines import base, text
from compiler.pipelines.base import Pipeline

if TYPE_CHECKING:
    import numpy as np
    import tokenizers

TASK = "multiple-choice"
OPTIONS: Mapping[str, Any] = {}
prepare, WINDOW, single, rows = text.prepare, text.WINDOW, text.single, base.rows


def items(args: tuple[Any, ...], named: dict[str, Any]) -> tuple[list[Any], bool]:
    """Mappings with `text` and `choices`: one, or a list."""
    given = text.single_argument(args, named)
    one = isinstance(given, Mapping)
    found = []
    for item in [given] if one else given:
        choices = item.get("choices") if isinstance(item, Mapping) else None
        if not isinstance(choices, (list, tuple)) or len(choices) < 2:
            raise InputError(f"{TASK}: an input has text, and choices: a list of two or more")
        for value in (item.get("text"), *choices):
            text.check_text(value, "a text or a choice")
        found.append((item["text"], tuple(choices)))
    return found, one


def features(pipe: Pipeline, items: Sequence[Any], options: Mapping[str, Any]) -> list[list[list[tokenizers.Encoding]]]:
    """An item's feature are the encodings of its text beside each choice."""
    coded = iter(text.encode(pipe, [(one, choice) for one, choices in items for choice in choices]))
    return [[[next(coded) for _ in choices]] for _, choices in items]


def size(feature: Sequence[tokenizers.Encoding]) -> int:
    return len(feature) * max(len(encoding) for encoding in feature)


def group(pipe: Pipeline, feature: Sequence[tokenizers.Encoding]) -> int:
    """A batch is of texts with as many choices."""
    return len(feature)


def collate(pipe: Pipeline, features: Sequence[Sequence[tokenizers.Encoding]]) -> dict[str, np.ndarray[Any, Any]]:
    """int64 `[batch, choices, sequence]`."""
    flat = text.collate(pipe, [encoding for feature in features for encoding in feature])
    return {name: value.reshape(len(features), len(features[0]), -1) for name, value in flat.items()}


def reduce(
    pipe: Pipeline, feature: Any, outputs: Mapping[str, np.ndarray[Any, Any]], options: Mapping[str, Any]
) -> np.ndarray[Any, Any]:
    return text.softmax(outputs["logits"])


def finish(pipe: Pipeline, item: Any, parts: Sequence[tuple[Any, Any]], options: Mapping[str, Any]) -> Any:
    ((_, scores),) = parts
    return text.best_first(item[1], scores)
