"""What rounding does to answers: are neighbours still neighbours, and labels still the labels? Pure numpy.

Every element of an int8 artifact's output departs a little. What a user must know is how many answers change, so these
figures are over a text's answer: its embedding, its label, its words' labels, its span.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from compiler.embedding import NAME as SENTENCE_EMBEDDING
from compiler.metrics import OUTSIDE, entity_f1, f1, spearman
from compiler.numerics import Array, Case, cosine
from compiler.pooling import POOLING
from compiler.types import LEAST_TEXTS, Model

# The longest answer, in tokens, of a question; as SQuAD's evaluation of BERT has it.
MAX_SPAN = 30

Answers = Mapping[str, Array]
# Rows of logits that are looked at together: a vocabulary may have hundreds of thousands.
ROWS = 64
# Of the texts nearest to one, those that may take the place of the nearest.
RIVALS = 8
# What is one nearest text as well as another: two cosines that only rounding tells apart.
TIE = 1e-6
# A classifier of one label of several, and what others' answers are called.
CHOICE = "single_label_classification"
KINDS = {"regression": "scores", "multi_label_classification": "labels"}
# What the names of answers start with among references.
ANSWER = "answer."


class Answering:
    """Answers, stacked as they come. `how` is what `compiler.stages.load.reference` returned as `answering`."""

    def __init__(self, how: Mapping[str, Any] | None) -> None:
        self.how = how or {}
        self._parts: list[dict[str, Array]] = []

    def add(self, case: Case, outputs: Mapping[str, Array]) -> dict[str, Array]:
        """Take the answers of one more batch, and return them."""
        masked = case.inputs["input_ids"] == self.how["mask_token"] if self.how["task"] == "fill-mask" else None
        how = self.how
        self._parts.append(answers(how["task"], outputs, case.mask, how["pooling"], masked, how["problem"]))
        return self._parts[-1]

    def stacked(self) -> dict[str, Array]:
        """All of them, by name; empty when there was none."""
        return {name: np.concatenate([part[name] for part in self._parts]) for name in (self._parts or [{}])[0]}


def problem(model: Model) -> str:
    """What a text classifier's logits are, as transformers has it: `regression` (one number a text),
    `multi_label_classification` (each label by itself), or else `single_label_classification`."""
    config: Any = model.module.config
    if model.task != "text-classification":
        return CHOICE
    # Of one label there is nothing to choose, whatever a config calls it.
    if config.num_labels == 1 and config.problem_type != "multi_label_classification":
        return "regression"
    return config.problem_type or CHOICE


def answers(
    task: str,
    outputs: Mapping[str, Array],
    mask: Array,
    pooling: Sequence[str],
    places: Array | None = None,
    problem: str = CHOICE,
) -> dict[str, Array]:
    """The answers of a batch by name; embeddings as float64.

    Args:
        outputs: the model's, as arrays.
        mask: True at real tokens, `[batch, sequence]`.
        pooling: for feature-extraction without the sentence embedding in the graph, how tokens become a text's vector, by the
            names of `compiler.pooling.POOLING`.
        places: for fill-mask, True at the masked tokens, `[batch, sequence]`.
        problem: for text-classification, as the function of that name has it.

    Returns:
        feature-extraction: `embedding` `[batch, hidden]`, of length 1; text-classification: `logits` `[batch, labels]`, called
        `scores` where they are numbers or `labels` where each is for itself; multiple-choice: `logits` `[batch, choices]`;
        token-classification and fill-mask: `logits` `[tokens, labels]` of the real, or masked, tokens;
        question-answering: `span` `[batch, 2]`, the tokens where the best answer starts and ends.
    """
    if task == "feature-extraction":
        if SENTENCE_EMBEDDING in outputs:
            return {"embedding": unit(outputs[SENTENCE_EMBEDDING])}
        return {"embedding": embed(outputs["last_hidden_state"], mask, pooling)}
    if task == "question-answering":
        return {"span": spans(outputs["start_logits"], outputs["end_logits"], mask)}
    logits = np.asarray(outputs["logits"])
    if logits.shape[:2] == mask.shape and logits.ndim == 3:
        return {"logits": logits[mask if places is None else places & mask]}
    return {KINDS.get(problem, "logits"): logits.reshape(len(logits), -1)}


def embed(tokens: Array, mask: Array, pooling: Sequence[str]) -> Array:
    """Tokens' vectors `[batch, sequence, hidden]` as texts' `[batch, width]`, float64, of length 1, pooled by each of
    `compiler.pooling.POOLING` that is named, one behind the other; zeros for a text without a token."""
    values = np.asarray(tokens, dtype=np.float64)
    rows = [row[real] if real.any() else np.zeros((1, values.shape[-1])) for row, real in zip(values, mask, strict=True)]
    return unit(np.stack([np.concatenate([POOLING[mode](row) for mode in pooling]) for row in rows]))


def unit(rows: Array) -> Array:
    """Rows as float64, of length 1."""
    values = np.asarray(rows, dtype=np.float64)
    result: Array = values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
    return result


def spans(starts: Array, ends: Array, mask: Array) -> Array:
    """The best span of each text, int64 `[batch, 2]`: the largest sum of a start and an end that does not come before it; -1
    for a text of which a real token's logit is not finite."""
    found = np.zeros((len(starts), 2), dtype=np.int64)
    for row, (start, end, real) in enumerate(zip(starts, ends, mask, strict=True)):
        if not (np.isfinite(start[real]).all() and np.isfinite(end[real]).all()):
            found[row] = -1
            continue
        scores = np.where(real, start, -np.inf)[:, None] + np.where(real, end, -np.inf)[None]
        length = np.arange(len(start))[None] - np.arange(len(start))[:, None]
        scores = np.where((length >= 0) & (length < MAX_SPAN), scores, -np.inf)
        found[row] = np.unravel_index(int(scores.argmax()), scores.shape)
    return found


def finite(name: str, values: Array) -> bool:
    """Whether the answers of that name are made of finite numbers, as `answers` gives them."""
    return bool((values >= 0).all() if name == "span" else np.isfinite(values).all())


def metric(given: Answers, expected: Sequence[Any], tags: Sequence[str] = ()) -> tuple[str, float]:
    """The task's own metric of answers, by its name.

    Of the labels' logits `accuracy`, and `f1` (micro) where a text may have several; of words' `tags`, which are called so,
    entities' `f1`; of spans `exact_match`; of scores, and of the cosines of pairs of embeddings (the first and the second, the
    third and the fourth …), `spearman` with those that are expected, of several scores a text the lowest. `expected` is what
    `compiler.expected.expected` returns.
    """
    if "embedding" in given:
        pairs = given["embedding"][: 2 * len(expected)]
        return "spearman", spearman((pairs[::2] * pairs[1::2]).sum(axis=1), np.asarray(expected))
    if "scores" in given:
        columns = np.asarray(expected, dtype=np.float64).reshape(len(expected), -1).T
        return "spearman", min(map(spearman, given["scores"].T, columns))
    if "span" in given:
        return "exact_match", float(
            np.mean([span in right for span, right in zip(given["span"].tolist(), expected, strict=True)])
        )
    if "labels" in given:
        return "f1", f1(expected, [np.flatnonzero(row > 0).tolist() for row in given["labels"]], "micro")
    if tags:
        chosen = given["logits"].argmax(axis=1)
        said = [[OUTSIDE if place < 0 else tags[chosen[place]] for place in text["places"]] for text in expected]
        return "f1", entity_f1([text["tags"] for text in expected], said)["f1"]
    return "accuracy", float((given["logits"].argmax(axis=1) == np.asarray(expected)).mean())


def tag_names(model: Model) -> list[str]:
    """What the labels of a token classifier are called, in the order of their numbers; none of another model."""
    if model.task != "token-classification":
        return []
    config: Any = model.module.config
    return [str(config.id2label.get(number, f"LABEL_{number}")) for number in range(config.num_labels)]


def figures(
    reference: Answers, actual: Answers, labels: Sequence[Any] | None = None, tags: Sequence[str] = ()
) -> dict[str, float]:
    """How far answers, stacked over all texts, are from the original's.

    `cosine`: the smallest of a text's two embeddings. `neighbours`: the share of texts whose nearest other text, among the
    artifact's own embeddings, is the one it was, or as near as that one was; texts to which the original gives the same
    embedding are no others. `neighbours_expected`: that share as it is to be expected of other texts, which chance moves
    less. `rank`: Spearman's correlation of the similarities of all pairs of texts; of scores, of the texts' own. `argmax`:
    the share of rows of logits with the same largest element; where each label is for itself, with the same labels above
    1/2. `kl`: the mean of KL(original || artifact) of their softmax, nats; where each label is for itself, the sum over
    them. `spans`: the share of answers with the same start and end. With `labels`, the task's `metric` (of words by their
    `tags`), and `drop`, by how much that fell (0.01 is a point; negative when it rose; none where the original's is 0). An
    answer that is not finite makes every figure the worst possible.
    """
    found: dict[str, float] = {}
    # Of nothing, nothing can be lost: no evidence is no pass.
    was = 0.0 if labels is None else metric(reference, labels, tags)[1]
    if not all(finite(name, value) for name, value in actual.items()):
        names = {
            "embedding": {"cosine": -1.0, "neighbours": 0.0, "neighbours_expected": 0.0, "rank": -1.0},
            "logits": {"argmax": 0.0, "kl": 1e308},
            "labels": {"argmax": 0.0, "kl": 1e308},
            "scores": {"rank": -1.0},
        }
        found = {name: worst for kind in actual for name, worst in names.get(kind, {"spans": 0.0}).items()}
        return {**found, "drop": 1.0} if was else found
    if "embedding" in reference:
        before, after = reference["embedding"], actual["embedding"]
        found["cosine"] = float(cosine(before, after).min())
        similar, since = before @ before.T, after @ after.T
        # What the model itself takes for the same text says nothing: it stays the same, and the nearest, in any file.
        told = (similar < 1 - TIE) & ~np.eye(len(similar), dtype=bool)
        if (some := told.any(axis=1)).sum() >= LEAST_TEXTS:
            near = [np.where(told, values, -np.inf)[some] for values in (similar, since)]
            found["neighbours"], found["neighbours_expected"] = _as_near(*near), _expected(*near)
            upper: Array = np.triu(told, 1)
            found["rank"] = spearman(similar[upper], since[upper])
    if "logits" in reference:
        before, after = reference["logits"], actual["logits"]
        choices = [before.argmax(axis=1), after.argmax(axis=1)]
        found["argmax"] = float((choices[0] == choices[1]).mean())
        found["kl"] = _kl(before, after)
    if "labels" in reference:
        before, after = reference["labels"], actual["labels"]
        found["argmax"] = float(((before > 0) == (after > 0)).all(axis=1).mean())
        pairs = [np.stack([np.zeros_like(values), values], axis=-1).reshape(-1, 2) for values in (before, after)]
        found["kl"] = _kl(*pairs) * before.shape[1]
    if "scores" in reference and len(reference["scores"]) >= LEAST_TEXTS:
        found["rank"] = min(map(spearman, reference["scores"].T, actual["scores"].T))
    if "span" in reference:
        found["spans"] = float((reference["span"] == actual["span"]).all(axis=1).mean())
    if labels is not None:
        name, now = metric(actual, labels, tags)
        found |= {name: now, "drop": was - now} if was else {name: now}
    return found


def _as_near(before: Array, after: Array) -> float:
    """The share of rows of similarities of which the largest in `after` is the largest in `before`, or as large as that."""
    chosen = before[np.arange(len(after)), after.argmax(axis=1)]
    return float((chosen >= before.max(axis=1) - TIE).mean())


def _expected(before: Array, after: Array) -> float:
    """What `_as_near` would be if each row's similarities departed as any row's do: the mean over all pairs of a row, of which
    the margins are taken, and a row, of which the departures are.

    In some hundred texts few have a nearest text that changes, and which of the close ones do is chance. How many are close,
    and how far they are moved, is less so. The cosine s of two rows departs by about sqrt(1 - s²) of what the rows do, so
    margins and departures are in units of that: those of near texts and of distant ones are alike.
    """
    nearest = np.argsort(-before, axis=1, kind="stable")[:, : RIVALS + 1]
    was, now = (np.take_along_axis(values, nearest, axis=1) for values in (before, after))
    there = np.isfinite(was)
    was, now = np.where(there, was, 0), np.where(there, now, 0)
    there = there[:, 1:]
    margin = was[:, :1] - was[:, 1:]
    unit = np.sqrt(np.maximum(2 - was[:, :1] ** 2 - was[:, 1:] ** 2, TIE))
    moved = np.where(there, (now[:, 1:] - now[:, :1] + margin) / unit, -np.inf)
    margin = np.where(there & (margin > TIE), margin / unit, np.inf)  # else none, or as near as the nearest
    same = np.ones((len(margin), len(moved)), dtype=bool)
    for rival in range(margin.shape[1]):
        same &= moved[None, :, rival] <= margin[:, None, rival]
    return float(same.mean())


def _kl(before: Array, after: Array) -> float:
    total = 0.0
    for start in range(0, len(before), ROWS):
        logs = [_log_probabilities(values[start : start + ROWS].astype(np.float64)) for values in (before, after)]
        total += float((np.exp(logs[0]) * (logs[0] - logs[1])).sum())
    return total / len(before)


def _log_probabilities(logits: Array) -> Array:
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result
