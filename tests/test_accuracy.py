"""Figures of answers, each against an independent truth: scipy, brute force, or a value worked out by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import special, stats

from compiler.accuracy import CHOICE, MAX_SPAN, RIVALS, TIE, Answering, answers, embed, figures, problem, spans, tag_names
from compiler.config import DEFAULT_LIMITS
from compiler.metrics import spearman
from compiler.numerics import Case, judge
from compiler.types import LEAST_TEXTS

Array = np.ndarray[Any, Any]
RANDOM = np.random.default_rng(5)


def unit(count: int, width: int = 8, random: np.random.Generator = RANDOM) -> Array:
    rows = random.standard_normal((count, width))
    result: Array = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return result


@pytest.mark.parametrize("ties", [False, True])
def test_spearman_is_scipys(ties: bool) -> None:
    one, other = RANDOM.standard_normal((2, 300))
    other += one
    if ties:
        one, other = np.round(one, 1), np.round(other)
    assert spearman(one, other) == pytest.approx(stats.spearmanr(one, other).statistic, abs=1e-12)


def test_spearman_of_a_constant_is_no_agreement() -> None:
    assert spearman(np.ones(5), np.arange(5.0)) == 0.0


def nearest(rows: Array) -> Array:
    """The nearest other row of each."""
    similarity = rows @ rows.T - 9 * np.eye(len(rows))
    result: Array = similarity.argmax(axis=1)
    return result


def test_figures_of_embeddings() -> None:
    before = unit(LEAST_TEXTS)
    after = before + 0.3 * unit(LEAST_TEXTS)
    after /= np.linalg.norm(after, axis=1, keepdims=True)
    found = figures({"embedding": before}, {"embedding": after})
    assert found["cosine"] == pytest.approx((before * after).sum(axis=1).min())
    pairs = list(itertools.combinations(range(LEAST_TEXTS), 2))
    similarities = [[float(side[a] @ side[b]) for a, b in pairs] for side in (before, after)]
    assert found["rank"] == pytest.approx(stats.spearmanr(*similarities).statistic)
    assert found["neighbours"] == (nearest(before) == nearest(after)).sum() / LEAST_TEXTS
    assert set(figures({"embedding": before[1:]}, {"embedding": after[1:]})) == {"cosine"}


def noisy(before: Array, loud: float, random: np.random.Generator) -> Array:
    after = before + loud * unit(len(before), before.shape[1], random)
    result: Array = after / np.linalg.norm(after, axis=1, keepdims=True)
    return result


@pytest.mark.parametrize("count", [LEAST_TEXTS, 40])
def test_what_is_to_be_expected_by_brute_force(count: int) -> None:
    """Of each pair of texts: does the one keep its nearest if its similarities depart as the other's do?"""
    random = np.random.default_rng(count)
    before = unit(count, random=random)
    before[1] = before[0]  # no other text
    after = noisy(before, 0.2, random)
    similar, since = before @ before.T, after @ after.T
    nearest = [
        [j for j in np.argsort(-similar[i], kind="stable") if j != i and {i, j} != {0, 1}][: RIVALS + 1] for i in range(count)
    ]
    kept = []
    for (i, own), (t, theirs) in itertools.product(enumerate(nearest), repeat=2):
        same = True
        for mine, other in zip(own[1:], theirs[1:], strict=True):
            margin = similar[i, own[0]] - similar[i, mine]
            moved = (since[t, other] - similar[t, other]) - (since[t, theirs[0]] - similar[t, theirs[0]])
            wide = [
                math.sqrt(2 - similar[row, one] ** 2 - similar[row, two] ** 2)
                for row, one, two in ((i, own[0], mine), (t, theirs[0], other))
            ]
            same &= bool(margin <= TIE or moved / wide[1] <= margin / wide[0])
        kept.append(same)
    found = figures({"embedding": before}, {"embedding": after})
    assert found["neighbours_expected"] == pytest.approx(np.mean(kept), abs=1e-9)
    assert 0.2 < found["neighbours_expected"] < 0.95


def alone(random: np.random.Generator) -> Array:
    return unit(128, 16, random)


def in_groups(random: np.random.Generator) -> Array:
    """Half of them in groups of eight that say nearly the same: near to each other, and hardly moved."""
    rows = alone(random)
    rows[:64] = np.repeat(rows[:8], 8, axis=0) + 0.2 * unit(64, 16, random)
    result: Array = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return result


@pytest.mark.parametrize("make", [alone, in_groups])
def test_what_is_to_be_expected_is_what_is_found_on_average(make: Callable[[np.random.Generator], Array]) -> None:
    """Of many sets of texts both shares have the same mean, and the one that is expected differs less."""
    shares = []
    random = np.random.default_rng(1)
    for _ in range(100):
        before = make(random)
        found = figures({"embedding": before}, {"embedding": noisy(before, 0.03, random)})
        shares.append([found["neighbours"], found["neighbours_expected"]])
    (mean, expected), (spread, steady) = np.mean(shares, axis=0), np.std(shares, axis=0)
    assert 0.8 < mean < 0.97
    assert expected == pytest.approx(mean, abs=0.01)
    assert steady < spread


def test_what_is_to_be_expected_has_a_limit_in_a_search() -> None:
    found = {"neighbours": 1.0, "neighbours_expected": 0.985}
    outputs = {"answers": {"figures": found, "worst": dict.fromkeys(found, "")}}
    limits = DEFAULT_LIMITS["int8"]
    for limit, passed in ((0.95, True), (0.985, True), (0.99, False), (1.0, False)):
        given = limits.model_copy(update={"neighbours": limit})
        assert [check.name for check in judge(outputs, given)] == ["neighbours"]
        checks = {check.name: check for check in judge(outputs, given, expected=True)}
        assert checks["neighbours_expected"].passed is passed
        assert checks["neighbours_expected"].limit == min(limit, 0.99)
    assert not judge(outputs, limits.model_copy(update={"neighbours": None}), expected=True)


def test_of_equal_answers_nothing_is_lost() -> None:
    rows = unit(20)
    same = figures({"embedding": rows}, {"embedding": rows})
    assert same == pytest.approx({"cosine": 1, "neighbours": 1, "neighbours_expected": 1, "rank": 1})
    assert figures({"logits": rows}, {"logits": rows}) == {"argmax": 1, "kl": 0}


def test_kl_and_argmax_of_labels() -> None:
    before = np.log([[0.7, 0.2, 0.1], [0.4, 0.5, 0.1]]) + 3  # a softmax does not see what is added
    after = np.log([[0.6, 0.3, 0.1], [0.5, 0.4, 0.1]])
    found = figures({"logits": before}, {"logits": after})
    expected = [
        special.rel_entr(*rows).sum() for rows in zip(special.softmax(before, 1), special.softmax(after, 1), strict=True)
    ]
    assert found["kl"] == pytest.approx(np.mean(expected))
    assert found["kl"] == pytest.approx(
        (0.7 * math.log(7 / 6) + 0.2 * math.log(2 / 3) + 0.4 * math.log(4 / 5) + 0.5 * math.log(5 / 4)) / 2
    )
    assert found["argmax"] == 0.5


def test_labels_each_for_itself() -> None:
    """A row is the same when all its labels are; each label is a choice between two, by its sigmoid."""
    before, after = RANDOM.standard_normal((2, 150, 3))
    found = figures({"labels": before}, {"labels": after})
    chances = [special.expit(side) for side in (before, after)]
    expected = special.rel_entr(*chances) + special.rel_entr(*(1 - chance for chance in chances))
    assert found["kl"] == pytest.approx(expected.sum(axis=1).mean())
    assert found["argmax"] == np.mean([all((one > 0) == (other > 0)) for one, other in zip(before, after, strict=True)])
    spoilt = after.copy()
    spoilt[:, 1] = -before[:, 1]
    assert figures({"labels": before}, {"labels": spoilt})["argmax"] == 0.0


def test_scores_are_ranked() -> None:
    """Of a regression that is always positive, a sign would say nothing."""
    before = 3 + RANDOM.random((LEAST_TEXTS, 1))
    assert figures({"scores": before}, {"scores": 2 * before + 1}) == {"rank": pytest.approx(1.0)}
    after = 3 + RANDOM.random((LEAST_TEXTS, 1))
    expected = stats.spearmanr(before[:, 0], after[:, 0]).statistic
    assert figures({"scores": before}, {"scores": after}) == {"rank": pytest.approx(expected)}
    assert figures({"scores": before[1:]}, {"scores": before[1:]}) == {}


@pytest.mark.parametrize(
    ("named", "labels", "expected"),
    [
        (None, 3, "logits"),
        (None, 1, "scores"),
        ("regression", 2, "scores"),
        ("single_label_classification", 2, "logits"),
        ("single_label_classification", 1, "scores"),
        ("multi_label_classification", 1, "labels"),
        ("multi_label_classification", 3, "labels"),
    ],
)
def test_what_a_classifiers_logits_are(named: str | None, labels: int, expected: str) -> None:
    config = SimpleNamespace(problem_type=named, num_labels=labels)
    model: Any = SimpleNamespace(task="text-classification", module=SimpleNamespace(config=config))
    logits = RANDOM.standard_normal((len(MASK), labels))
    found = answers("text-classification", {"logits": logits}, MASK, [], None, problem(model))
    assert list(found) == [expected]


@pytest.mark.parametrize("loud", [1e-7, 0.5])
def test_texts_that_stand_twice_are_no_evidence(loud: float) -> None:
    """They are each other's nearest in any file; what counts is which text is the nearest beside them."""
    before = unit(20)
    after = before + loud * unit(20)
    after /= np.linalg.norm(after, axis=1, keepdims=True)
    once = figures({"embedding": before}, {"embedding": after})
    twice = figures({"embedding": np.repeat(before, 2, axis=0)}, {"embedding": np.repeat(after, 2, axis=0)})
    assert once["neighbours"] == twice["neighbours"]
    assert (once["neighbours"] < 0.9) == (loud > 1e-3)
    assert twice["rank"] == pytest.approx(once["rank"])
    same = np.repeat(before[:1], 20, axis=0)
    assert set(figures({"embedding": same}, {"embedding": same})) == {"cosine"}


def test_drop_is_of_the_accuracy_on_labels() -> None:
    before, after = np.eye(4), np.eye(4)[[0, 1, 3, 2]]
    found = figures({"logits": before}, {"logits": after}, labels=[0, 1, 2, 0])
    assert (found["accuracy"], found["drop"]) == (0.5, 0.25)
    assert figures({"logits": after}, {"logits": before}, labels=[0, 1, 2, 0])["drop"] == -0.25


def test_drop_is_of_the_metric_of_the_task() -> None:
    """Each worked out by hand: of what is expected, the original answers all, and the artifact a part."""
    several = np.array([[1.0, -1.0, 1.0], [-1.0, 1.0, -1.0]])
    found = figures({"labels": several}, {"labels": several * [1, 1, -1]}, labels=[[0, 2], [1]])
    assert (found["f1"], found["drop"]) == pytest.approx((2 / 3, 1 / 3))  # 2 · 2 / (3 + 3)

    names = ["O", "B-PER", "I-PER"]
    config = SimpleNamespace(num_labels=2, id2label={1: "a", 2: "b"})
    model: Any = SimpleNamespace(task="token-classification", module=SimpleNamespace(config=config))
    assert tag_names(model) == ["LABEL_0", "a"]
    # Of seven tokens; the second, third and fourth, and the sixth begin words.
    logits = np.eye(3)[[0, 1, 2, 0, 0, 1, 0]]
    words: list[Any] = [{"places": [1, 2, 3], "tags": ["B-PER", "I-PER", "O"]}, {"places": [5], "tags": ["B-PER"]}]
    shorter = logits.copy()
    shorter[2] = np.eye(3)[0]  # an entity ends too early
    found = figures({"logits": logits}, {"logits": shorter}, labels=words, tags=names)
    assert (found["f1"], found["drop"]) == (0.5, 0.5)  # 2 · 1 / (2 + 2)

    right = np.array([[1, 2], [0, 0], [5, 5], [3, 4]])
    expected = [[[7, 8], [1, 2]], [[0, 0]], [[5, 5]], [[3, 4]]]
    found = figures({"span": right}, {"span": np.array([[1, 3], [0, 0], [5, 5], [3, 4]])}, labels=expected)
    assert (found["exact_match"], found["drop"], found["spans"]) == (0.75, 0.25, 0.75)

    order = np.arange(20.0)[:, None]
    swapped = order.copy()
    swapped[[3, 4]] = swapped[[4, 3]]
    found = figures({"scores": order}, {"scores": swapped}, labels=[2 * number for number in range(20)])
    # Spearman's formula without ties: 1 - 6 Σd² / (n (n² - 1)).
    assert (found["spearman"], found["drop"]) == pytest.approx((1 - 6 * 2 / (20 * 399), 6 * 2 / (20 * 399)))
    both = figures({"scores": order @ [[1, 1]]}, {"scores": np.hstack([order, swapped])}, labels=[[n, n] for n in range(20)])
    assert both["drop"] == pytest.approx(found["drop"])  # of the worse of two scores

    angles = np.linspace(0, 1.5, 20)
    pairs = np.zeros((40, 2))
    pairs[::2, 0] = 1
    pairs[1::2] = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    turned = pairs.copy()
    turned[[7, 9]] = turned[[9, 7]]
    found = figures({"embedding": pairs}, {"embedding": turned}, labels=list(np.cos(angles)))
    assert (found["spearman"], found["drop"]) == pytest.approx((1 - 6 * 2 / (20 * 399), 6 * 2 / (20 * 399)))


def test_spans_by_brute_force() -> None:
    length = MAX_SPAN + 15
    starts, ends = 3 * RANDOM.standard_normal((2, 20, length))
    mask = np.ones((20, length), dtype=bool)
    mask[5:10, 20:] = False
    mask[10:15, :6] = False
    starts[0, 0] = ends[0, -1] = 50  # too long
    starts[1, 30] = ends[1, 2] = 50  # the wrong way round
    found = spans(starts, ends, mask)
    for row in range(20):
        allowed = [
            (start, end)
            for start in range(length)
            for end in range(start, min(length, start + MAX_SPAN))
            if mask[row, start] and mask[row, end]
        ]
        assert tuple(found[row]) == max(allowed, key=lambda span: starts[row, span[0]] + ends[row, span[1]])
    assert figures({"span": found}, {"span": np.where(np.arange(20)[:, None] < 5, found + 1, found)}) == {"spans": 0.75}


MASK = np.array([[1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]], dtype=bool)
POOLED: dict[str, Callable[[Any], Any]] = {
    "mean": lambda rows: rows.mean(axis=0),
    "max": lambda rows: rows.max(axis=0),
    "cls": lambda rows: rows[0],
    "lasttoken": lambda rows: rows[-1],
    "weightedmean": lambda rows: np.average(rows, axis=0, weights=np.arange(1, len(rows) + 1)),
}


@pytest.mark.parametrize("mode", POOLED)
def test_pooling_sees_real_tokens_alone(mode: str) -> None:
    tokens = RANDOM.standard_normal((3, 4, 6))
    tokens[~MASK] = 1e6
    for row, vector in enumerate(embed(tokens, MASK, [mode])):
        expected = POOLED[mode](tokens[row][MASK[row]])
        assert vector == pytest.approx(expected / np.linalg.norm(expected))


def test_several_poolings_are_one_behind_the_other() -> None:
    tokens = RANDOM.standard_normal((3, 4, 6))
    for row, vector in enumerate(embed(tokens, MASK, ["mean", "cls"])):
        expected = np.concatenate([POOLED[mode](tokens[row][MASK[row]]) for mode in ("mean", "cls")])
        assert vector == pytest.approx(expected / np.linalg.norm(expected))


def test_a_text_without_a_token_has_an_embedding_of_zeros() -> None:
    assert not embed(np.ones((1, 4, 6)), np.zeros((1, 4), dtype=bool), ["cls"]).any()


def test_an_embedding_in_the_graph_is_the_answer() -> None:
    outputs = {"last_hidden_state": RANDOM.standard_normal((3, 4, 6)), "sentence_embedding": np.array([[3.0, 4.0]] * 3)}
    (given,) = answers("feature-extraction", outputs, MASK, ["mean"]).values()
    assert given.tolist() == [[0.6, 0.8]] * 3


def test_answers_of_each_task() -> None:
    logits = RANDOM.standard_normal((3, 4, 7))
    tokens = answers("token-classification", {"logits": logits}, MASK, [])["logits"]
    assert np.array_equal(tokens, logits[MASK])
    places = np.zeros((3, 4), dtype=bool)
    places[0, 1] = places[1, 3] = places[2, 3] = True  # the second is padding
    masked = answers("fill-mask", {"logits": logits}, MASK, [], places)["logits"]
    assert np.array_equal(masked, logits[[0, 2], [1, 3]])
    labels = answers("text-classification", {"logits": logits[:, 0]}, MASK, [])["logits"]
    assert np.array_equal(labels, logits[:, 0])


def test_answers_are_stacked_over_batches() -> None:
    stacked = Answering({"task": "fill-mask", "pooling": [], "mask_token": 9, "problem": CHOICE})
    assert stacked.stacked() == {}
    logits = RANDOM.standard_normal((2, 3, 5))
    for number in range(2):
        ids = np.array([[1, 9, 9]])
        inputs = {"input_ids": ids, "attention_mask": np.array([[1, 1, number]])}
        stacked.add(Case("accuracy", inputs), {"logits": logits[number : number + 1]})
    assert np.array_equal(stacked.stacked()["logits"], logits[[0, 1, 1], [1, 1, 2]])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["embedding", "logits", "labels", "scores", "span"])
def test_an_answer_that_is_not_finite_passes_nothing(kind: str, bad: float) -> None:
    """By no limit at all: every figure that the kind has is there, and fails."""
    good = unit(20)
    spoilt = good.copy()
    spoilt[3, 2] = bad
    mask = np.ones(good.shape, dtype=bool)
    one, other = ({kind: spans(good, side, mask) if kind == "span" else side} for side in (good, spoilt))
    labels: dict[str, list[Any]] = {
        "embedding": [*range(10)],
        "labels": [[0]] * 20,
        "scores": good.tolist(),
        "span": [[[0, 0]]] * 20,
    }
    whole, found = (figures(one, side, labels=labels.get(kind, [0] * 20)) for side in (one, other))
    assert set(found) == set(whole) - {"accuracy", "exact_match", "f1", "spearman"}
    limits = DEFAULT_LIMITS["int8"].model_copy(update={"rank": 0.5, "kl": 1.0})
    worst = dict.fromkeys(found, "")
    checks = judge({"answers": {"figures": found, "worst": worst}}, limits, expected=True)
    assert not any(check.passed for check in checks)
    assert len(checks) == len(found)
