"""token-classification: a label for each token, or entities with their places in the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from compiler.errors import InputError
from compiler.pipelines import text
from compiler.pipelines.base import Pipeline

if TYPE_CHECKING:
    import numpy as np
    import tokenizers

TASK = "token-classification"
# `aggregation_strategy` is none, simple, first, average or max, as in transformers; with `stride`, a text that is too long is
# read in windows that overlap by so many tokens, instead of being cut.
OPTIONS: Mapping[str, Any] = {"aggregation_strategy": "none", "ignore_labels": ("O",), "stride": None}
STRATEGIES = ("none", "simple", "first", "average", "max")
prepare, items, size, collate, rows = text.prepare, text.items, text.size, text.collate, text.rows
WINDOW, group = text.WINDOW, text.group


def features(pipe: Pipeline, items: Sequence[Any], options: Mapping[str, Any]) -> list[list[tokenizers.Encoding]]:
    strategy, stride = options["aggregation_strategy"], options["stride"]
    if strategy not in STRATEGIES:
        raise InputError(f"aggregation_strategy: {strategy!r}; {', '.join(STRATEGIES)}")
    if stride is None:
        return text.features(pipe, items, options)
    limit = pipe.prepared.limit
    special = pipe.prepared.backend.num_special_tokens_to_add(is_pair=False)
    if strategy == "none":
        raise InputError("stride: needs an aggregation_strategy, which joins what the windows say")
    if not 0 <= stride < (limit or 1 << 30) - special:
        raise InputError(f"stride: {stride}; the model takes {limit} tokens at a time, {special} of them special")
    found = pipe.prepared.encode([(item,) for item in items], stride=stride)
    return [[encoding, *encoding.overflowing] for encoding in found]


def reduce(
    pipe: Pipeline, feature: tokenizers.Encoding, outputs: Mapping[str, np.ndarray[Any, Any]], options: Mapping[str, Any]
) -> Any:
    return text.softmax(outputs["logits"])


def finish(pipe: Pipeline, item: Any, parts: Sequence[tuple[Any, Any]], options: Mapping[str, Any]) -> Any:
    strategy = options["aggregation_strategy"]
    found: list[dict[str, Any]] = []
    for encoding, scores in parts:
        tokens = _tokens(pipe, item, encoding, scores)
        if strategy in ("none", "simple"):
            labelled = [_labelled(pipe, token, token["scores"]) for token in tokens]
        else:
            labelled = _words(pipe, tokens, strategy)
        if strategy == "none":
            ordered = ("entity", "score", "index", "word", "start", "end")
            labelled = [{name: token[name] for name in ordered} for token in labelled]
        else:
            labelled = _groups(pipe, labelled)
        found += labelled
    name = "entity" if strategy == "none" else "entity_group"
    found = [entity for entity in found if entity[name] not in options["ignore_labels"]]
    return _without_overlap(found) if len(parts) > 1 else found


def _tokens(pipe: Pipeline, item: str, encoding: tokenizers.Encoding, scores: np.ndarray[Any, Any]) -> list[dict[str, Any]]:
    """The tokens of the text itself, each with its scores, its place, and whether it goes on a word."""
    prefix = getattr(pipe.prepared.backend.model, "continuing_subword_prefix", None)
    found = []
    for index, row in enumerate(scores):
        if encoding.special_tokens_mask[index]:
            continue
        word = encoding.tokens[index]
        start, end = encoding.offsets[index]
        inside = len(word) != end - start if prefix else start > 0 and " " not in item[start - 1 : start + 1]
        if encoding.ids[index] == pipe.prepared.specials.get("unk"):
            word, inside = item[start:end], False
        found.append({"index": index, "word": word, "scores": row, "start": start, "end": end, "inside": inside})
    return found


def _labelled(pipe: Pipeline, token: dict[str, Any], scores: np.ndarray[Any, Any]) -> dict[str, Any]:
    best = int(scores.argmax())
    return {**token, "entity": pipe.model.config.id2label[best], "score": float(scores[best])}


def _words(pipe: Pipeline, tokens: Sequence[dict[str, Any]], strategy: str) -> list[dict[str, Any]]:
    """Tokens as words, each with one label."""
    import numpy as np

    words: list[list[dict[str, Any]]] = []
    for token in tokens:
        if words and token["inside"]:
            words[-1].append(token)
        else:
            words.append([token])
    found = []
    for word in words:
        rows = np.stack([token["scores"] for token in word])
        if strategy == "first":
            scores = rows[0]
        elif strategy == "max":
            scores = rows[int(rows.max(axis=1).argmax())]
        else:
            scores = rows.mean(axis=0)
        joined = pipe.prepared.join([token["word"] for token in word])
        found.append(_labelled(pipe, {"word": joined, "start": word[0]["start"], "end": word[-1]["end"]}, scores))
    return found


def _groups(pipe: Pipeline, entities: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Neighbours of one type as one entity; a `B-` begins another."""
    groups: list[list[dict[str, Any]]] = []
    for entity in entities:
        if groups and _tag(entity) == _tag(groups[-1][-1]) and not entity["entity"].startswith("B-"):
            groups[-1].append(entity)
        else:
            groups.append([entity])
    return [
        {
            "entity_group": group[0]["entity"].split("-", 1)[-1],
            "score": sum(entity["score"] for entity in group) / len(group),
            "word": pipe.prepared.join([entity["word"] for entity in group]),
            "start": group[0]["start"],
            "end": group[-1]["end"],
        }
        for group in groups
    ]


def _tag(entity: Mapping[str, Any]) -> str:
    name: str = entity["entity"]
    return name[2:] if name.startswith(("B-", "I-")) else name


def _without_overlap(entities: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of entities of several windows that overlap, the longest; of those as long, the likeliest."""
    found: list[dict[str, Any]] = []
    for entity in sorted(entities, key=lambda entity: entity["start"]):
        if found and found[-1]["start"] <= entity["start"] < found[-1]["end"]:
            if _weight(entity) > _weight(found[-1]):
                found[-1] = entity
        else:
            found.append(entity)
    return found


def _weight(entity: Mapping[str, Any]) -> tuple[int, float]:
    return entity["end"] - entity["start"], entity["score"]


single = text.single
