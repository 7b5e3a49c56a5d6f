"""What labelled text expects of a model: numbers of labels, scores, and where answers stand among tokens."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from compiler.errors import ConfigError
from compiler.expected import check_evidence, expected
from compiler.samples import together
from compiler.tasks import Words
from tests.zoo import save_checkpoint

NAMES = ["bad", "good", "odd"]


def placed(given: list[Any]) -> list[tuple[str, Any]]:
    return [(f"file:{line}", one) for line, one in enumerate(given, 4)]


def model(task: str = "text-classification", labels: int = 3, kind: str | None = None, **more: Any) -> Any:
    config = SimpleNamespace(problem_type=kind, num_labels=labels, id2label=dict(enumerate(NAMES[:labels])))
    return SimpleNamespace(task=task, module=SimpleNamespace(config=config), **more)


@pytest.mark.parametrize(
    ("of", "given", "found"),
    [
        (model(), ["good", 2, 0.0, "bad"], [1, 2, 0, 0]),
        (model(kind="multi_label_classification"), [["good", 2], "bad", []], [[1, 2], [0], []]),
        (model(labels=1), [0.5, 3], [0.5, 3.0]),
        (model(labels=2, kind="regression"), [[0.5, 3], [1, 2]], [[0.5, 3.0], [1.0, 2.0]]),
        (model("feature-extraction"), [0.5, 1], [0.5, 1.0]),
    ],
)
def test_what_is_expected(of: Any, given: list[Any], found: list[Any]) -> None:
    assert expected(of, [("a text",)] * len(given), placed(given)) == found


@pytest.mark.parametrize(
    ("of", "given", "reason"),
    [
        (model(), "wonderful", "the model knows no label 'wonderful'; it has bad, good, odd"),
        (model(), 3, "the model knows no label 3"),
        (model(), -1, "the model knows no label -1"),
        (model(), 0.5, "the model knows no label 0.5"),
        (model(), 10**400, "the model knows no label 1000"),
        (model(), float("inf"), "the model knows no label inf"),
        (model(), True, "the model knows no label True"),
        (model(), ["good"], "the model knows no label ['good']"),
        (model(kind="multi_label_classification"), ["good", "banana"], "the model knows no label 'banana'"),
        (model(labels=1), "good", "field 'label' is missing or not a number; a line is {"),
        (model(labels=2, kind="regression"), [1], "label [1] is no list of 2 numbers"),
        (model(labels=2, kind="regression"), [1, "a"], "field 'label' is missing or not a number"),
        (model("feature-extraction"), "close", "field 'score' is missing or not a number"),
        (model("feature-extraction"), float("nan"), "field 'score' is missing or not a number"),
        (model("feature-extraction"), 10**400, "field 'score' is missing or not a number"),
    ],
)
def test_what_the_model_does_not_know(of: Any, given: Any, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        expected(of, [("a text",)], [("file:7", given)])
    assert str(caught.value).startswith(f"file:7: {reason}")


@pytest.mark.parametrize("architecture", ["bert", "roberta", "deberta-v2"])
def test_answers_by_what_their_tokens_say(tmp_path: Path, architecture: str) -> None:
    folder = save_checkpoint(tmp_path / "checkpoint", architecture, "question-answering")
    asked = model(
        "question-answering",
        tokenizer=AutoTokenizer.from_pretrained(folder),
        positions=64,
        inputs=("input_ids", "attention_mask"),
    )
    lines = [
        ("Who reads?", "The harbour opens at six, and Ada reads; Ada sleeps."),
        ("When?", "The harbour opens at six, and Ada reads."),
        ("Why?", "The harbour opens at six, and Ada reads."),
        ("What is cut off?", "the harbour " * 60 + "zebra"),
    ]
    given: list[Any] = [{"text": ["Ada"], "answer_start": [30]}, [{"text": "at six"}, "six"], [], ["zebra"]]
    found = expected(asked, lines, placed(given))
    ids = together(asked, lines)["input_ids"]
    said = [
        {asked.tokenizer.decode(row[start : end + 1]).lower().replace(" ", "").replace("##", "") for start, end in spans}
        for row, spans in zip(ids, found, strict=True)
    ]
    assert said[:2] == [{"ada"}, {"atsix", "six"}]
    assert [len(spans) for spans in found] == [2, 2, 1, 0]
    assert found[2] == [[0, 0]]


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        (["Zoe"], "answer 'Zoe' does not stand in the context"),
        ("Ada", "answers 'Ada'"),
        (5, "answers 5 is no list of texts"),
        (True, "answers True is"),
        ({"text": 5}, "answers {'text': 5} is no"),
    ],
)
def test_answers_that_are_none(tmp_path: Path, answers: Any, reason: str) -> None:
    folder = save_checkpoint(tmp_path / "checkpoint", "bert", "question-answering")
    asked = model("question-answering", tokenizer=AutoTokenizer.from_pretrained(folder), positions=64)
    with pytest.raises(ConfigError) as caught:
        expected(asked, [("Who?", "Ada reads.")], [("file:3", answers)])
    assert str(caught.value).startswith(f"file:3: {reason}")
    slow = model("question-answering", tokenizer=SimpleNamespace(is_fast=False), positions=64)
    with pytest.raises(ConfigError, match="does not tell where tokens stand in a text, so answers cannot be judged"):
        expected(slow, [("Who?", "Ada reads.")], [("file:3", ["Ada"])])


@pytest.mark.parametrize(
    ("of", "given"),
    [
        (model("feature-extraction"), [0.5, 0.5]),
        (model(labels=1), [1, 1.0]),
        (model(labels=2, kind="regression"), [[0.5, 3], [1, 3]]),
    ],
)
def test_numbers_that_are_all_the_same(of: Any, given: list[Any]) -> None:
    """Rank correlation with them is 0 of any model: nothing could be lost."""
    told = expected(of, [("a text",)] * len(given), placed(given))
    with pytest.raises(ConfigError, match=r"^file:4: every line has the same (score|label), and Spearman's "):
        check_evidence(of, told, "file:4")
    check_evidence(of, [*told, [9.0, 9.5] if isinstance(given[0], list) else 9.0], "file:4")


WORDS = [
    ["Ada", "reads", "harbour-masters'", "books", "\U0001f989"],
    ["\u200b", "Ben", ""],
    ["Ada", "said"] * 40,
    ["Ben", "sleeps"],
]


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("architecture", ["bert", "roberta", "deberta-v2", "xlm-roberta"])
def test_words_by_their_first_tokens(tmp_path: Path, architecture: str, prefix: bool) -> None:
    """Of the very tokens that `evaluate` gives a model, which are not always those of the words joined."""
    folder = save_checkpoint(tmp_path / "checkpoint", architecture, "token-classification")
    more = {"add_prefix_space": prefix} if architecture == "roberta" else {}
    tokenizer = AutoTokenizer.from_pretrained(folder, **more)
    asked = model("token-classification", tokenizer=tokenizer, positions=64, inputs=("input_ids", "attention_mask"))
    lines = [(Words(words),) for words in WORDS]
    found = expected(asked, lines, placed([["good", *[2] * (len(words) - 1)] for words in WORDS]))
    inputs = together(asked, lines)
    before = 0
    for words, ids, mask, text in zip(WORDS, inputs["input_ids"], inputs["attention_mask"], found, strict=True):
        split = tokenizer(words, is_split_into_words=True, truncation=True, max_length=64)
        assert ids[: mask.sum()].tolist() == split["input_ids"]
        owners = split.word_ids()
        assert text["places"] == [before + owners.index(word) if word in owners else -1 for word in range(len(words))]
        assert text["tags"] == ["good", *["odd"] * (len(words) - 1)]
        before += len(owners)
    assert found[2]["places"][-1] == -1  # it is cut
    assert found[1]["places"][-1] == -1  # there is nothing


def test_words_are_a_text_to_all_others() -> None:
    words = Words(["Ada", "", "reads"])
    assert words == "Ada  reads"
    again = pickle.loads(pickle.dumps(words))  # noqa: S301 - our own
    assert (type(again), again.words, again) == (Words, ("Ada", "", "reads"), words)


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        (["good"], "has 1 tags for 2 tokens; give each a tag"),
        ("good", "field 'tags' is missing or no list; a line is {"),
        (["B-PER", 0], "the model knows no label 'B-PER'; it has bad, good, odd"),
        ([True, 0], "the model knows no label True"),
    ],
)
def test_tags_that_are_none(tmp_path: Path, tags: Any, reason: str) -> None:
    folder = save_checkpoint(tmp_path / "checkpoint", "bert", "token-classification")
    asked = model("token-classification", tokenizer=AutoTokenizer.from_pretrained(folder), positions=64)
    with pytest.raises(ConfigError) as caught:
        expected(asked, [(Words(["Ada", "reads"]),)], [("file:5", tags)])
    assert str(caught.value).startswith(f"file:5: {reason}")
    with pytest.raises(ConfigError, match=r"^file:5: has tags and no tokens, the words that they are of; a line is \{"):
        expected(asked, [("Ada reads",)], [("file:5", tags)])
    slow = model("token-classification", tokenizer=SimpleNamespace(is_fast=False), positions=64)
    with pytest.raises(ConfigError, match="does not tell where tokens stand in a text, so tags cannot be judged"):
        expected(slow, [(Words(["Ada"]),)], [("file:3", ["good"])])


def test_tags_without_an_entity(tmp_path: Path) -> None:
    """F1 would be 0 of the original and of any file."""
    folder = save_checkpoint(tmp_path / "checkpoint", "bert", "token-classification")
    asked = model("token-classification", tokenizer=AutoTokenizer.from_pretrained(folder), positions=64)
    asked.module.config.id2label = {0: "O", 1: "B-PER"}
    lines = [(Words(["Ada", "reads"]),)] * 2
    with pytest.raises(ConfigError, match=r"^file:5: no line has a tag but O"):
        check_evidence(asked, expected(asked, lines, placed([["O", 0], [0, "O"]])), "file:5")
    check_evidence(asked, expected(asked, lines, placed([["O", 0], [1, "O"]])), "file:5")
