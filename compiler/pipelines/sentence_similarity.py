"""sentence-similarity: how alike two texts are, or one text and each of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from compiler.errors import InputError
from compiler.pipelines import sentence_embedding as embedding
from compiler.pipelines import text
from compiler.pipelines.base import Pipeline

if TYPE_CHECKING:
    import tokenizers

TASK = "feature-extraction"
OPTIONS = embedding.OPTIONS
prepare, size, collate, rows, reduce = embedding.prepare, text.size, text.collate, text.rows, embedding.reduce
WINDOW, group = text.WINDOW, text.group


def items(args: tuple[Any, ...], named: dict[str, Any]) -> tuple[list[Any], bool]:
    """Mappings with `text` and `text_pair`, answered with a number, or with `source_sentence` and `sentences`, answered with
    a list of them: one mapping, or a list."""
    given = text.single_argument(args, named)
    one = isinstance(given, Mapping)
    found = []
    for item in [given] if one else given:
        if not isinstance(item, Mapping):
            raise InputError("sentence-similarity: an input has text and text_pair, or source_sentence and sentences")
        texts = [item.get("text"), item.get("text_pair")]
        if several := "source_sentence" in item:
            texts = [item["source_sentence"], *(item.get("sentences") or [None])]
        for value in texts:
            text.check_text(value, "a sentence")
        found.append((several, texts))
    return found, one


def features(pipe: Pipeline, items: Sequence[Any], options: Mapping[str, Any]) -> list[list[tokenizers.Encoding]]:
    every = iter(embedding.features(pipe, [value for _, texts in items for value in texts], options))
    return [[next(every)[0] for _ in texts] for _, texts in items]


def finish(pipe: Pipeline, item: Any, parts: Sequence[tuple[Any, Any]], options: Mapping[str, Any]) -> Any:
    first, *others = (vector for _, vector in parts)
    scores = [embedding.similar(pipe.prepared, first, other) for other in others]
    return scores if item[0] else scores[0]


single = text.single
