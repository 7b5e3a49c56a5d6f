"""What labelled validation text expects of a model, in the form in which `compiler.accuracy.metric` judges its answers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from compiler.accuracy import CHOICE, problem
from compiler.errors import ConfigError
from compiler.labelled import LINES
from compiler.metrics import OUTSIDE
from compiler.samples import length_of_texts
from compiler.tasks import EXPECTED, TAGGED, Words, answer_texts, check_tags, finite_number, label_number
from compiler.types import Model

Labels = Sequence[tuple[str, Any]]


def expected(model: Model, lines: Sequence[tuple[str, ...]], labels: Labels) -> list[Any]:
    """What is expected of each text, or of each pair of texts.

    Args:
        lines: the texts.
        labels: of each, where it stands, for errors, and what stands there, as `compiler.tasks.read_label` found it.

    Returns:
        feature-extraction: the pairs' scores; question-answering: for each question the right spans, `[start, end]` in tokens;
        text-classification: labels' numbers, a list of them a text where it may have several, or a regression's numbers;
        token-classification: the `tags` of a text's words by name, and their `places` among the real tokens of all texts, -1
        where a word has none.

    Raises:
        ConfigError: something else stands there, or what the model does not know.
    """
    if model.task == "question-answering":
        return list(_spans(model, lines, labels))
    if model.task == "token-classification":
        return list(_tagged(model, lines, labels))
    config: Any = model.module.config
    kind = problem(model)
    if model.task == "feature-extraction" or (kind == "regression" and config.num_labels == 1):
        return [_number(place, label, model.task) for place, label in labels]
    if kind == "regression":
        return [_numbers(place, label, config.num_labels) for place, label in labels]
    names = config.id2label
    if kind == CHOICE:
        return [_label(place, label, names) for place, label in labels]
    return [[_label(place, one, names) for one in (label if isinstance(label, list) else [label])] for place, label in labels]


def check_evidence(model: Model, told: Sequence[Any], place: str) -> None:
    """Raise ConfigError where nothing that is expected, as `expected` has it, could be lost. `place` is that of
    the first."""
    if model.task == "token-classification":
        if all(tag == OUTSIDE for text in told for tag in text["tags"]):
            raise ConfigError(f"{place}: no line has a tag but {OUTSIDE}, and F1 is of entities; give some")
    elif model.task == "feature-extraction" or problem(model) == "regression":
        columns = zip(*(one if isinstance(one, list) else [one] for one in told), strict=True)
        if any(len(set(column)) == 1 for column in columns):
            raise ConfigError(
                f"{place}: every line has the same {EXPECTED[model.task]}, and Spearman's correlation is of "
                "different ones; give some"
            )


def _number(place: str, value: Any, task: str) -> float:
    return finite_number(value, EXPECTED[task], place, LINES[task])


def _label(place: str, value: Any, names: Mapping[int, str]) -> int:
    return label_number(value, names, place)


def _numbers(place: str, label: Any, count: int) -> list[float]:
    if not isinstance(label, list) or len(label) != count:
        raise ConfigError(f"{place}: label {label!r} is no list of {count} numbers, as the model gives")
    return [_number(place, one, "text-classification") for one in label]


def _check_fast(model: Model, place: str, what: str) -> None:
    if not model.tokenizer.is_fast:
        raise ConfigError(
            f"{place}: {type(model.tokenizer).__name__} does not tell where tokens stand in a text, so {what} "
            f"cannot be judged; leave {what} out"
        )


def _spans(model: Model, lines: Sequence[tuple[str, ...]], labels: Labels) -> Iterator[list[list[int]]]:
    """Where answers stand in the tokens of a question and its context; the first token's place where there is none, as SQuAD
    2 has it. An answer may stand there several times, or be cut off."""
    _check_fast(model, labels[0][0], "answers")
    for (question, context), (place, given) in zip(lines, labels, strict=True):
        if (texts := answer_texts(given)) is None:
            raise ConfigError(f"{place}: answers {given!r} is no list of texts")
        encoded = model.tokenizer(
            question, context, truncation="longest_first", max_length=length_of_texts(model), return_offsets_mapping=True
        )
        found = [] if texts else [[0, 0]]
        for text in texts:
            spans = [match.span() for match in re.finditer(re.escape(text), context)]
            if not spans:
                raise ConfigError(f"{place}: answer {text[:60]!r} does not stand in the context")
            for start, end in spans:
                of_context = enumerate(zip(encoded["offset_mapping"], encoded.sequence_ids(), strict=True))
                inside = [token for token, ((a, b), part) in of_context if part == 1 and a < end and b > start]
                if inside:
                    found.append([inside[0], inside[-1]])
        yield found


def _tagged(model: Model, lines: Sequence[tuple[str, ...]], labels: Labels) -> Iterator[dict[str, Any]]:
    """A word's place is that of its first token, as `compiler.pipelines.words` has it; -1 where it is cut off, or is none to
    the tokenizer."""
    _check_fast(model, labels[0][0], "tags")
    config: Any = model.module.config
    before = 0
    for (text,), (place, tags) in zip(lines, labels, strict=True):
        if not isinstance(text, Words):
            raise ConfigError(f"{place}: has tags and no tokens, the words that they are of; a line is {TAGGED}")
        words = list(text.words)
        check_tags(tags, words, place)
        encoded = model.tokenizer(
            words, is_split_into_words=True, truncation="longest_first", max_length=length_of_texts(model)
        )
        first: dict[int, int] = {}
        for token, word in enumerate(encoded.word_ids(), before):
            if word is not None:
                first.setdefault(word, token)
        before += len(encoded["input_ids"])
        names = [str(config.id2label[_label(place, tag, config.id2label)]) for tag in tags]
        yield {"places": [first.get(word, -1) for word in range(len(words))], "tags": names}
