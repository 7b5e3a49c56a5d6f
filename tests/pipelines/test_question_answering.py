"""Questions, against a plain search over the eager model's logits: every window, every span."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import compiler
from compiler.errors import InputError
from tests.releases import TEXTS, release_of

pytestmark = pytest.mark.usefixtures("plain_torchscript")

CONTEXT = " ".join(TEXTS[:10])
QUESTION = "Who keeps the night watch awake?"


@pytest.fixture(scope="module")
def pipe(releases: Path) -> Any:
    return compiler.pipeline("question-answering", release_of(releases, "answers"))


@pytest.fixture(scope="module")
def search(releases: Path) -> Callable[..., list[tuple[str, int, int, float]]]:
    """(answer, start, end, score) of all answers, the best first, in plain loops over probabilities."""
    import torch
    from transformers import AutoModelForQuestionAnswering, AutoTokenizer

    model = AutoModelForQuestionAnswering.from_pretrained(releases / "answers").eval()
    tokenizer = AutoTokenizer.from_pretrained(release_of(releases, "answers"))

    def probabilities(logits: list[float], allowed: list[bool]) -> list[float]:
        powers = [math.exp(value) if usable else 0.0 for value, usable in zip(logits, allowed, strict=True)]
        return [power / sum(powers) for power in powers]

    def run(
        question: str, context: str, window: int, stride: int, longest: int, words: bool, count: int
    ) -> list[tuple[str, int, int, float]]:
        coded = tokenizer(
            question, context, truncation="only_second", max_length=window, stride=stride,
            return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip
        edges = [match.span() for match in re.finditer(r"\w+|[^\w\s]", context)]
        found: dict[str, list[Any]] = {}
        nulls = []
        for number, ids in enumerate(coded["input_ids"]):
            with torch.no_grad():
                types = torch.tensor([coded["token_type_ids"][number]])
                outputs = model(input_ids=torch.tensor([ids]), token_type_ids=types)
            sides = coded.sequence_ids(number)
            places = [edge for edge, side in zip(coded["offset_mapping"][number], sides, strict=True) if side == 1]
            first, last = places[0][0], places[-1][1]
            allowed = [side == 1 or place == 0 for place, side in enumerate(sides)]
            starts = probabilities(outputs.start_logits[0].tolist(), allowed)
            ends = probabilities(outputs.end_logits[0].tolist(), allowed)
            nulls.append(starts[0] * ends[0])
            spans = [
                (starts[a] * ends[b], a, b) for a, b in itertools.product(range(1, len(ids)), repeat=2) if a <= b < a + longest
            ]
            for score, a, b in sorted(spans, reverse=True)[:count]:
                if sides[a] == 1 == sides[b]:
                    begin, end = coded["offset_mapping"][number][a][0], coded["offset_mapping"][number][b][1]
                    if words:
                        # As much of the words as the window has.
                        begin = max(first, next(left for left, right in edges if left <= begin < right))
                        end = min(last, next(right for left, right in edges if left < end <= right))
                    answer = found.setdefault(context[begin:end].lower(), [context[begin:end], begin, end, 0.0])
                    answer[3] += score
        assert len(nulls) > 1 or len(context) < 100
        return sorted([("", 0, 0, min(nulls)), *map(tuple, found.values())], key=lambda answer: -answer[3])

    return run


@pytest.mark.parametrize(
    ("context", "options", "searched"),
    [
        ("Strong tea keeps the watch awake.", {}, (64, 32, 15, True)),
        (CONTEXT, {}, (64, 32, 15, True)),
        (CONTEXT, {"align_to_words": False, "max_answer_len": 4}, (64, 32, 4, False)),
        (CONTEXT, {"max_seq_len": 40, "doc_stride": 5}, (40, 5, 15, True)),
    ],
    ids=["short", "long", "tokens", "narrow"],
)
@pytest.mark.parametrize("top_k", [1, 4])
def test_as_a_plain_search_finds_it(
    pipe: Any, search: Callable[..., Any], context: str, options: dict[str, Any], searched: tuple[Any, ...], top_k: int
) -> None:
    count = 2 * top_k + 10 if options.get("align_to_words", True) else top_k
    every = search(QUESTION, context, *searched, count)
    for impossible in (False, True):
        answers = pipe(question=QUESTION, context=context, top_k=top_k, handle_impossible_answer=impossible, **options)
        answers = answers if isinstance(answers, list) else [answers]
        expected = [answer for answer in every if impossible or answer[0]][:top_k]
        found = [(answer["answer"], answer["start"], answer["end"]) for answer in answers]
        assert found == [answer[:3] for answer in expected]
        assert [answer["score"] for answer in answers] == pytest.approx([answer[3] for answer in expected], rel=1e-4)
        assert all(context[start:end] == answer for answer, start, end in found)


def test_no_answer_wins_when_it_is_likeliest(pipe: Any) -> None:
    import numpy as np

    from compiler.pipelines.question_answering import spans

    start, end = np.array([9.0, 0, 0, 1]), np.array([9.0, 0, 1, 0])
    found, null = spans(start, end, [True, False, True, True], 3, 15)
    assert null > 0.9 > max(span.score for span in found)
    assert {(span.start, span.end) for span in found} == {(2, 2), (2, 3), (3, 3)}


def test_ways_to_ask(pipe: Any) -> None:
    contexts = ["Rain again. The ferry leaves at noon.", "A cup of strong tea."]
    one = pipe(question="When?", context=contexts[0])
    assert pipe({"question": "When?", "context": contexts[0]}) == one
    both = pipe(question=["When?", "What?"], context=contexts)
    assert pipe([{"question": q, "context": c} for q, c in zip(["When?", "What?"], contexts, strict=True)]) == both
    assert both[0]["answer"] == one["answer"]
    assert both[0]["score"] == pytest.approx(one["score"], abs=1e-5)
    assert len(pipe(question=["When?", "What?"], context=contexts[0])) == 2


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"question": "Who?"}, "the context is missing"),
        ({"question": "", "context": "a"}, "the question is missing, empty"),
        ({"question": ["a", "b"], "context": ["c"]}, "2 questions and 1 contexts"),
        ({"question": "why " * 80, "context": "a"}, "leaves -"),
        ({"question": "Who?", "context": "a", "doc_stride": 60}, "share 60 of"),
        ({"question": "Who?", "context": "a", "max_seq_len": 100}, "the model takes 64 tokens"),
        ({"question": "Who?", "context": "a", "top_k": 0}, "top_k: 0"),
        ({"question": "Who?", "context": "a", "max_answer_len": 0}, "max_answer_len: 0"),
    ],
)
def test_bad_input(pipe: Any, given: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as caught:
        pipe(**given)
    assert says in str(caught.value)
