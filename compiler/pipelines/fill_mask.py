"""fill-mask: the likeliest tokens for each masked one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from compiler.errors import InputError
from compiler.pipelines import text
from compiler.pipelines.base import Pipeline

if TYPE_CHECKING:
    import numpy as np
    import tokenizers

TASK = "fill-mask"
# `targets`: the only words to choose among.
OPTIONS: Mapping[str, Any] = {"top_k": 5, "targets": None}
prepare, size, collate, rows = text.prepare, text.size, text.collate, text.rows
WINDOW, group = text.WINDOW, text.group


def items(args: tuple[Any, ...], named: dict[str, Any]) -> tuple[list[Any], bool]:
    """Texts. A list of one gives one answer, as transformers does."""
    found, one = text.items(args, named)
    return found, one or len(found) == 1


def features(pipe: Pipeline, items: Sequence[Any], options: Mapping[str, Any]) -> list[list[tokenizers.Encoding]]:
    mask = _mask(pipe)
    found = text.features(pipe, items, options)
    for item, (encoding,) in zip(items, found, strict=True):
        if mask not in encoding.ids:
            lost = " left of what is not cut off" if any(mask in rest.ids for rest in encoding.overflowing) else ""
            raise InputError(f"fill-mask: no {pipe.prepared.backend.id_to_token(mask)} in {item[:60]!r}{lost}")
    return found


def _mask(pipe: Pipeline) -> int:
    mask: int | None = pipe.prepared.specials.get("mask")
    if mask is None:
        raise InputError("fill-mask: the tokenizer has no mask token")
    return mask


def reduce(
    pipe: Pipeline, feature: tokenizers.Encoding, outputs: Mapping[str, np.ndarray[Any, Any]], options: Mapping[str, Any]
) -> Any:
    """Of each masked place, the best tokens and their scores: all others would be a vocabulary each."""
    import numpy as np

    places = [place for place, token in enumerate(feature.ids) if token == _mask(pipe)]
    scores = text.softmax(outputs["logits"][places])
    targets = _targets(pipe, options["targets"])
    chosen = scores if targets is None else scores[:, targets]
    top = options["top_k"]
    if not isinstance(top, int) or top < 1:
        raise InputError(f"top_k: {top!r}; a whole number from 1")
    order = np.argsort(-chosen, axis=-1, kind="stable")[:, :top]
    tokens = order if targets is None else np.asarray(targets)[order]
    return places, tokens.tolist(), np.take_along_axis(chosen, order, axis=-1).tolist()


def _targets(pipe: Pipeline, targets: Any) -> list[int] | None:
    """The ids of words; of one that is several tokens, the first, which is said once."""
    if targets is None:
        return None
    backend = pipe.prepared.backend
    found = []
    for word in [targets] if isinstance(targets, str) else targets:
        text.check_text(word, "a target")
        token = backend.token_to_id(word)
        if token is None:
            ids = backend.encode(word, add_special_tokens=False).ids
            if not ids:
                raise InputError(f"targets: {word!r} is no token of the model")
            token = ids[0]
            pipe.say_once(
                f"target {word}", f"targets: {word!r} is no single token; {backend.id_to_token(token)!r} stands for it"
            )
        found.append(token)
    if not found:
        raise InputError("targets: at least one, or leave it out")
    return sorted(set(found))


def finish(pipe: Pipeline, item: Any, parts: Sequence[tuple[Any, Any]], options: Mapping[str, Any]) -> Any:
    ((encoding, (places, tokens, scores)),) = parts
    answers = []
    for place, row, values in zip(places, tokens, scores, strict=True):
        found = []
        for token, score in zip(row, values, strict=True):
            ids = [*encoding.ids[:place], token, *encoding.ids[place + 1 :]]
            pad = pipe.prepared.specials["pad"]
            sequence = pipe.prepared.decode([one for one in ids if one != pad], skip_special_tokens=len(places) == 1)
            found.append({"score": score, "token": token, "token_str": pipe.prepared.decode([token]), "sequence": sequence})
        answers.append(found)
    return answers[0] if len(answers) == 1 else answers


single = text.single
