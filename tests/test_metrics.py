"""The metrics, against published values and those of the usual libraries, computed once with them."""

from __future__ import annotations

import pytest

from compiler import metrics

# From the README of seqeval, with its result.
TRUTH = [["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
GUESS = [["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]


def test_entities_as_seqeval() -> None:
    assert metrics.entity_f1(TRUTH, GUESS) == {"f1": 0.5, "precision": 0.5, "recall": 0.5}
    assert metrics.entity_f1(TRUTH, TRUTH)["f1"] == 1
    # seqeval 1.2.2, get_entities: the same on 3,000 random sequences.
    assert metrics.entities(["I-PER", "I-LOC", "O", "B-LOC", "B-LOC", "I-PER"]) == {
        ("PER", 0, 0),
        ("LOC", 1, 1),
        ("LOC", 3, 3),
        ("LOC", 4, 4),
        ("PER", 5, 5),
    }
    assert metrics.entities(["B-X-Y", "I-X-Y", "E-X-Y", "S-PER"]) == {("X-Y", 0, 2), ("PER", 3, 3)}
    assert metrics.entity_f1([["O"]], [["O"]])["f1"] == 0


def test_spearman_as_scipy() -> None:
    # scipy 1.17.1, stats.spearmanr: with ties on both sides.
    first, second = [1, 2, 2, 3, 5, 8, 8, 8], [0.1, 0.4, 0.3, 0.9, 0.2, 0.8, 0.8, 1.0]
    assert metrics.spearman(first, second) == pytest.approx(0.6792194247767449, abs=1e-15)
    assert metrics.spearman([1, 2, 3], [10, 20, 21]) == pytest.approx(1)
    assert metrics.spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert metrics.spearman([1, 2, 3], [5, 5, 5]) == 0


def test_labels_as_scikit_learn() -> None:
    # The example of sklearn.metrics.f1_score: y_true = [0, 1, 2, 0, 1, 2], y_pred = [0, 2, 1, 0, 0, 1].
    truth, guess = [{label} for label in "012012"], [{label} for label in "021001"]
    assert metrics.f1(truth, guess, "macro") == pytest.approx(0.26666666666666666)
    assert metrics.f1(truth, guess, "micro") == pytest.approx(1 / 3)
    assert metrics.accuracy(truth, guess) == pytest.approx(1 / 3)
    # Its multi-label example: [[0, 0, 0], [1, 1, 1], [0, 1, 1]] and [[0, 0, 0], [1, 1, 1], [1, 1, 0]] are 2/3, 1 and 2/3.
    truth, guess = [set(), {"a", "b", "c"}, {"b", "c"}], [set(), {"a", "b", "c"}, {"a", "b"}]
    assert metrics.f1(truth, guess, "macro") == pytest.approx((2 / 3 + 1 + 2 / 3) / 3)
    assert metrics.accuracy(truth, guess) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("answers", "guess", "exact", "words"),
    [
        # evaluate-v2.0.py of SQuAD, on answers like its data set's.
        (["Denver Broncos", "The Denver Broncos"], "the denver broncos!", 1.0, 1.0),
        (["Santa Clara, California"], "Levi's Stadium in Santa Clara", 0.0, 0.5),
        (["a cat", "the dog"], "dog", 1.0, 1.0),
        ([], "", 1.0, 1.0),
        ([], "something", 0.0, 0.0),
        (["something"], "", 0.0, 0.0),
        (["The"], "", 1.0, 1.0),  # an answer of articles alone is none
    ],
)
def test_squad_as_published(answers: list[str], guess: str, exact: float, words: float) -> None:
    assert metrics.squad([answers], [guess]) == {"exact_match": exact, "f1": words}


def test_word_error_rate() -> None:
    # The example of the metric in Hugging Face's evaluate and in torchmetrics, with their figure.
    predicted = ["this is the prediction", "there is an other sample"]
    expected = ["this is the reference", "there is another one"]
    assert metrics.word_error_rate(expected, predicted) == 0.5
    # Morris, Maier and Green (2004): the rate has no upper limit.
    assert metrics.word_error_rate(["one"], ["two three four"]) == 3.0
    assert metrics.word_error_rate(["one two"], [""]) == 1.0
    assert metrics.word_error_rate(["one two"], ["ONE two"]) == 0.0


@pytest.mark.parametrize(
    ("one", "other", "distance"),
    [("kitten", "sitting", 3), ("saturday", "sunday", 3), ("intention", "execution", 5), ("", "abc", 3), ("abc", "", 3)],
)
def test_edits(one: str, other: str, distance: int) -> None:
    """The textbooks' pairs: Wikipedia's, and Jurafsky and Martin's."""
    assert metrics.edits(one, other) == metrics.edits(other, one) == distance


def test_words_as_they_sound() -> None:
    assert metrics.spoken("Don't stop, it’s «OK» – 3.5 %!") == ["don't", "stop", "it's", "ok", "3", "5"]
    assert metrics.spoken("STRASSE Straße हिन्दी 'quoted'") == ["strasse", "strasse", "हिन्दी", "quoted"]
    assert metrics.spoken(" … ") == []
