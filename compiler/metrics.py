"""What tasks are judged by: accuracy, F1, Spearman's correlation, entities' F1, SQuAD's exact match and F1, word error rate.
Pure.

Every figure is a share of 1, and more is better, except of those in `ERRORS`.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Collection, Hashable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Numbers = Sequence[float] | np.ndarray[Any, np.dtype[Any]]


# The tag of a word that is of no entity, which one that a model does not see is taken for.
OUTSIDE = "O"
# Figures of which less is better.
ERRORS = frozenset({"wer"})


def accuracy(expected: Sequence[Collection[str]], predicted: Sequence[Collection[str]]) -> float:
    """The share of inputs whose labels are all right, and no others; of one label each, the usual accuracy."""
    return sum(set(a) == set(b) for a, b in zip(expected, predicted, strict=True)) / len(expected)


def f1(expected: Sequence[Collection[Hashable]], predicted: Sequence[Collection[Hashable]], average: str = "macro") -> float:
    """F1 of labels, one or several an input: `micro`, of all decisions together; `macro`, the mean over the labels that are
    expected or predicted anywhere (scikit-learn's definitions)."""
    right: Counter[Hashable] = Counter()
    found: Counter[Hashable] = Counter()
    wanted: Counter[Hashable] = Counter()
    for truth, guess in zip(expected, predicted, strict=True):
        right.update(set(truth) & set(guess))
        found.update(set(guess))
        wanted.update(set(truth))
    if average == "micro":
        return _f1(right.total(), found.total(), wanted.total())
    labels = found.keys() | wanted.keys()
    return sum(_f1(right[label], found[label], wanted[label]) for label in labels) / len(labels) if labels else 1.0


def _f1(right: int, found: int, wanted: int) -> float:
    """2 · precision · recall / (precision + recall); 0 where nothing was found or there is nothing to find."""
    return 2 * right / (found + wanted) if found + wanted else 0.0


def spearman(first: Numbers, second: Numbers) -> float:
    """Spearman's rank correlation: Pearson's of the ranks, equal values sharing their mean rank. 0 where one side does not
    vary, which orders nothing."""
    import numpy as np

    one, other = _ranks(np.asarray(first, dtype=np.float64)), _ranks(np.asarray(second, dtype=np.float64))
    one, other = one - one.mean(), other - other.mean()
    scale = float(np.sqrt((one @ one) * (other @ other)))
    return float(one @ other) / scale if scale else 0.0


def _ranks(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    import numpy as np

    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[place])


def entities(labels: Sequence[str]) -> set[tuple[str, int, int]]:
    """The entities of a sentence's labels as (type, first word, last word), read as CoNLL's `conlleval` and seqeval's default
    do: an `I-` that follows nothing of its type begins an entity too. `E-` and `S-` are known, other labels are a type."""
    found = set()
    start, kind = 0, ""
    before, kind_before = "O", ""
    for place, label in enumerate([*labels, "O"]):
        tag = label[:1]
        kind = "" if label == "O" else label[1:].partition("-")[2] or label[1:] or "_"
        ends = before in "ES" or (before in "BI" and tag in "BSO") or (before != "O" and kind_before != kind)
        begins = tag in "BS" or (before in "ESO" and tag in "EI") or (tag != "O" and kind_before != kind)
        if ends and before != "O":
            found.add((kind_before, start, place - 1))
        if begins:
            start = place
        before, kind_before = tag, kind
    return found


def entity_f1(expected: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, float]:
    """Precision, recall and F1 of entities, over all sentences: one counts when its type and both its ends are right."""
    right = found = wanted = 0
    for truth, guess in zip(expected, predicted, strict=True):
        one, other = entities(truth), entities(guess)
        right, found, wanted = right + len(one & other), found + len(other), wanted + len(one)
    return {
        "f1": _f1(right, found, wanted),
        "precision": right / found if found else 0.0,
        "recall": right / wanted if wanted else 0.0,
    }


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, articles and further white space: `normalize_answer` of SQuAD's evaluate-v2.0.py."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(answers: Sequence[str], predicted: str) -> float:
    """1 when a prediction is one of the answers, once both are normalized; no answers are the empty one."""
    return float(any(normalize_answer(answer) == normalize_answer(predicted) for answer in _golden(answers)))


def answer_f1(answers: Sequence[str], predicted: str) -> float:
    """The best F1 of a prediction's words with those of an answer, once both are normalized."""
    return max(_words_f1(answer, predicted) for answer in _golden(answers))


def _golden(answers: Sequence[str]) -> list[str]:
    return [answer for answer in answers if normalize_answer(answer)] or [""]


def _words_f1(answer: str, predicted: str) -> float:
    one, other = normalize_answer(answer).split(), normalize_answer(predicted).split()
    if not one or not other:
        return float(one == other)
    return _f1((Counter(one) & Counter(other)).total(), len(other), len(one))


def squad(expected: Sequence[Sequence[str]], predicted: Sequence[str]) -> dict[str, float]:
    """Exact match and F1 over questions, each with its answers: none for a question that has no answer (SQuAD 2)."""
    pairs = list(zip(expected, predicted, strict=True))
    return {
        "exact_match": sum(exact_match(answers, guess) for answers, guess in pairs) / len(pairs),
        "f1": sum(answer_f1(answers, guess) for answers, guess in pairs) / len(pairs),
    }


def spoken(text: str) -> list[str]:
    """The words of a text as they sound: in lower case, without punctuation but the apostrophes within words. What
    recognizes speech has often one case and no punctuation."""
    kept = "".join(" " if unicodedata.category(one)[0] in "PS" and one not in "'’" else one for one in text.casefold())
    return [word for part in kept.replace("’", "'").split() if (word := part.strip("'"))]


def word_error_rate(expected: Sequence[str], predicted: Sequence[str]) -> float:
    """Words that were substituted, left out and put in, over all texts, by the number of words that were expected; it may be
    above 1."""
    errors = words = 0
    for truth, guess in zip(expected, predicted, strict=True):
        one, other = spoken(truth), spoken(guess)
        errors, words = errors + edits(one, other), words + len(one)
    return errors / words


def edits(one: Sequence[str], other: Sequence[str]) -> int:
    """Levenshtein's distance: the fewest items to substitute, delete or insert."""
    row = list(range(len(other) + 1))
    for place, item in enumerate(one, 1):
        above, row = row, [place]
        for column, candidate in enumerate(other):
            row.append(min(above[column] + (item != candidate), above[column + 1] + 1, row[column] + 1))
    return row[-1]
