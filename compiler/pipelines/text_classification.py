"""text-classification: labels with their scores; multi-label, and pairs of texts (`text`, `text_pair`) too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from compiler.errors import InputError
from compiler.pipelines import text
from compiler.pipelines.base import Pipeline
from compiler.runtime import Config

if TYPE_CHECKING:
    import numpy as np
    import tokenizers

TASK = "text-classification"
# `top_k` labels, all for None; by default the best alone. `function_to_apply`: softmax, sigmoid or none.
OPTIONS: Mapping[str, Any] = {"top_k": "", "function_to_apply": None}
prepare, size, collate, rows = text.prepare, text.size, text.collate, text.rows
WINDOW, group = text.WINDOW, text.group


def items(args: tuple[Any, ...], named: dict[str, Any]) -> tuple[list[Any], bool]:
    """Texts, or mappings with `text` and perhaps `text_pair`: one, or a list."""
    given = text.single_argument(args, named)
    one = isinstance(given, (str, Mapping))
    found = []
    for item in [given] if one else given:
        values = [item] if isinstance(item, str) else [item.get("text")] if isinstance(item, Mapping) else [None]
        if isinstance(item, Mapping) and item.get("text_pair"):  # an empty one is none, as in transformers
            values.append(item["text_pair"])
        for value in values:
            text.check_text(value, "an input's text")
        found.append(tuple(values))
    # One text gives a list of one answer, as transformers does; a mapping its answer.
    if isinstance(given, str) and "top_k" not in named:
        return found, False
    return found, one


def features(pipe: Pipeline, items: Sequence[Any], options: Mapping[str, Any]) -> list[list[tokenizers.Encoding]]:
    singles = [item for item in items if len(item) == 1]
    pairs = [item for item in items if len(item) == 2]
    coded = {1: iter(text.encode(pipe, singles)), 2: iter(text.encode(pipe, pairs))}
    return [[next(coded[len(item)])] for item in items]


def reduce(
    pipe: Pipeline, feature: tokenizers.Encoding, outputs: Mapping[str, np.ndarray[Any, Any]], options: Mapping[str, Any]
) -> Any:
    return apply(pipe.model.config, outputs["logits"], options["function_to_apply"])


def apply(config: Config, logits: np.ndarray[Any, Any], function: str | None = None) -> np.ndarray[Any, Any]:
    """Logits `[labels]` as scores: by `function`, or as the config says."""
    import numpy as np

    if function is None:
        if config.problem_type == "regression":
            function = "none"
        elif config.problem_type == "multi_label_classification" or config.num_labels == 1:
            function = "sigmoid"
        else:
            function = "softmax"
    if function == "softmax":
        return text.softmax(logits)
    if function == "sigmoid":
        return np.asarray(1.0 / (1.0 + np.exp(-logits)))
    if function == "none":
        return np.array(logits)
    raise InputError(f"function_to_apply: {function!r}; softmax, sigmoid or none")


def finish(pipe: Pipeline, item: Any, parts: Sequence[tuple[Any, Any]], options: Mapping[str, Any]) -> Any:
    ((_, scores),) = parts
    names = pipe.model.config.id2label
    found = [{"label": names[number], "score": float(score)} for number, score in enumerate(scores)]
    top = options["top_k"]
    if top == "":
        return found[int(scores.argmax())]
    if top is not None and (not isinstance(top, int) or top < 1):
        raise InputError(f"top_k: {top!r}; a whole number from 1, or None for all labels")
    return sorted(found, key=lambda answer: -answer["score"])[:top]


single = text.single
