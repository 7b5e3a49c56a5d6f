"""The label of each word of sentences that are split into words, as token-classification data has them: that of its first
token. Words beyond what the model takes are `O`, which is said once."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from compiler.metrics import OUTSIDE
from compiler.pipelines import text
from compiler.pipelines.base import Pipeline

if TYPE_CHECKING:
    import numpy as np
    import tokenizers

TASK = "token-classification"
OPTIONS: Mapping[str, Any] = {}
prepare, size, collate, rows, single = text.prepare, text.size, text.collate, text.rows, text.single
WINDOW, group = text.WINDOW, text.group


def items(args: tuple[Any, ...], named: dict[str, Any]) -> tuple[list[Any], bool]:
    """A list of lists of words."""
    return list(text.single_argument(args, named)), False


def features(pipe: Pipeline, items: Sequence[Any], options: Mapping[str, Any]) -> list[list[tokenizers.Encoding]]:
    return [[encoding] for encoding in text.encode(pipe, [(item,) for item in items], words=True)]


def reduce(
    pipe: Pipeline, feature: tokenizers.Encoding, outputs: Mapping[str, np.ndarray[Any, Any]], options: Mapping[str, Any]
) -> Any:
    return outputs["logits"].argmax(axis=-1)


def finish(pipe: Pipeline, item: Any, parts: Sequence[tuple[Any, Any]], options: Mapping[str, Any]) -> list[str]:
    ((encoding, best),) = parts
    labels = [OUTSIDE] * len(item)
    ids = encoding.word_ids
    for word, places in itertools.groupby(range(len(best)), key=lambda place: ids[place]):
        if word is not None:
            labels[word] = pipe.model.config.id2label[int(best[next(places)])]
    return labels
