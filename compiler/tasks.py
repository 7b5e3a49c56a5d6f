"""What a task is: which heads mean it, what its inputs are made of, which fields of a data file it reads. Imports no torch.

optimum's `TasksManager` turns a task into transformers' auto class (`compiler.stages.load`); this table adds only what it
cannot tell: a task from a local folder's config, and how a line of data becomes the model's input.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from compiler.errors import ConfigError, SourceError

TaskName = Literal[
    "feature-extraction",
    "text-classification",
    "token-classification",
    "question-answering",
    "fill-mask",
    "multiple-choice",
    "image-classification",
    "image-feature-extraction",
    "zero-shot-image-classification",
    "audio-classification",
    "automatic-speech-recognition",
]
Modality = Literal["text", "image", "audio", "image-text"]
# Fields that name a file, relative to the data file, and fields that are a list of at least so many texts.
FILES = ("image", "audio")
# The field of a line that says what is expected of the model: a task's own metric is of that.
EXPECTED: Mapping[str, str] = {
    "feature-extraction": "score",
    "text-classification": "label",
    "token-classification": "tags",
    "question-answering": "answers",
}
TAGGED = '{"tokens": ["…"], "tags": ["B-PER"]}'
LISTS: Mapping[str, int] = {"choices": 2, "texts": 1}


class Words(str):
    """A text that is given as a list of words. A tokenizer is given the words, as they were when the model learned its tags:
    some make other tokens of them than of the text."""

    words: tuple[str, ...]

    def __new__(cls, words: Iterable[str]) -> Words:
        made = super().__new__(cls, " ".join(words := tuple(words)))
        made.words = words
        return made

    def __reduce__(self) -> tuple[type[Words], tuple[tuple[str, ...]]]:
        return Words, (self.words,)


@dataclass(frozen=True)
class Task:
    """`head` is the suffix of the class names in `config.architectures`; `fields` are those of a data line, in the order
    that the processor takes them; one in `optional` may be left out. `auto` is transformers' auto class, where a task has
    several."""

    head: str
    fields: tuple[str, ...]
    optional: tuple[str, ...] = ()
    modality: Modality = "text"
    auto: str | None = None


TASKS: dict[str, Task] = {
    "feature-extraction": Task("Model", ("text",)),
    "text-classification": Task("ForSequenceClassification", ("text", "text_pair"), optional=("text_pair",)),
    "token-classification": Task("ForTokenClassification", ("text",)),
    "question-answering": Task("ForQuestionAnswering", ("question", "context")),
    "fill-mask": Task("ForMaskedLM", ("text",)),
    "multiple-choice": Task("ForMultipleChoice", ("text", "choices")),
    "image-classification": Task("ForImageClassification", ("image",), modality="image"),
    "image-feature-extraction": Task("Model", ("image",), modality="image"),
    "zero-shot-image-classification": Task("Model", ("image", "texts"), modality="image-text"),
    "audio-classification": Task("ForSequenceClassification", ("audio",), modality="audio"),
    "automatic-speech-recognition": Task("ForCTC", ("audio",), modality="audio", auto="AutoModelForCTC"),
}


def infer(config: Mapping[str, Any], sentence_transformer: bool, modality: Modality = "text") -> str:
    """The task of a checkpoint, from its parsed config.json. `modality` is what its processor's files are for: some heads
    are of several.

    A folder with sentence-transformers' `modules.json` is an embedding model whatever its head is.

    Raises:
        SourceError: `architectures` is missing, or names no head that a task here has.
    """
    if sentence_transformer:
        return "feature-extraction"
    names = config.get("architectures") or []
    for name in names if isinstance(names, list) else []:
        fitting = [task for task, entry in TASKS.items() if isinstance(name, str) and name.endswith(entry.head)]
        if fitting:
            return next((task for task in fitting if TASKS[task].modality == modality), fitting[0])
    found = " ".join(", ".join(map(str, names if isinstance(names, list) else [names])).split()) or "none"
    raise SourceError(
        f"config.json: no task can be inferred from architectures ({found}); set task: to one of {', '.join(TASKS)}"
    )


def json_object(text: str, where: str, such: str = "") -> dict[str, Any]:
    """A JSON object of a data file. Raises ConfigError, with `such` behind it, where the text is none, or holds a surrogate
    alone: no UTF-8 has that and no tokenizer takes it."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not JSON ({error}){such}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: not a JSON object{such}")
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])[1:-1]
            raise ConfigError(f"{where}: {half} is half of a character; write all of it, or leave it out") from error
    return value


def parse_line(text: str, task: str, where: str) -> tuple[str, ...]:
    """One line of a data file, as the texts that the processor takes: one, a pair, or one (the path of a file, too) and a
    list of others. For token-classification the text may be given as a list of words, `tokens`, and where
    these have `tags` it is: one of `Words`.

    Raises:
        ConfigError: the line is not a JSON object, or lacks a field of the task. `where` says which line it is.
    """
    entry = TASKS[task]
    line = json_object(text, where, f"; a line for {task} is {example(task)}")
    # Tags are of words, whatever a text beside them is. None is what some writers have where there is nothing.
    words, tags = line.get("tokens"), line.get("tags")
    if task == "token-classification" and "tokens" in line and (tags is not None or line.get("text") is None):
        return (Words(check_words(words, where)),)
    values: list[str] = []
    for name in entry.fields:
        value = line.get(name)
        if name in entry.optional and value is None:  # as some writers have it
            continue
        given: Any = value if name in LISTS else [value]
        found = given if isinstance(given, list) else []
        if len(found) < LISTS.get(name, 1) or not all(isinstance(one, str) and one.strip() for one in found):
            kind = f"list of {LISTS[name]} or more texts" if name in LISTS else "text"
            raise ConfigError(
                f"{where}: field {name!r} is missing, empty or not a {kind}; a line for {task} is {example(task)}"
            )
        values += found
    return tuple(values)


def parse_pair(text: str, where: str) -> tuple[str, str]:
    """The two texts that the score of a line for feature-extraction is of. Raises ConfigError as `parse_line` does."""
    line = json.loads(text)
    pair = line.get("text_pair")
    if not isinstance(pair, str) or not pair.strip():
        raise ConfigError(f"{where}: has a score and no text_pair; a score says how close two texts are")
    return line["text"], pair


def read_label(text: str, task: str) -> Any:
    """What a line that `parse_line` took expects of the model, as it stands there; None where it says nothing."""
    return json.loads(text).get(EXPECTED[task])


def label_number(value: Any, names: Mapping[int, str], where: str) -> int:
    """The number of a label that a line gives by its name or by its number; 1.0 is 1, as some writers of JSON have it.

    Raises:
        ConfigError: the model has no such label. `where` says which line it is.
    """
    if isinstance(value, str):
        number = next((number for number, name in names.items() if str(name) == value), None)
    else:
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        number = int(value) if whole and not isinstance(value, bool) and int(value) in names else None
    if number is None:
        known = [str(name) for name in names.values()]
        more = f" and {len(known) - 8} more" if len(known) > 8 else ""
        raise ConfigError(f"{where}: the model knows no label {value!r}; it has {', '.join(known[:8])}{more}")
    return number


def check_words(words: Any, where: str) -> list[str]:
    """What stands in a line's field `tokens`. Raises ConfigError where that is no list of words, or one of blanks alone."""
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words) or not "".join(words).strip():
        raise ConfigError(f"{where}: field 'tokens' is no list of words, or of blanks alone; a line with tags is {TAGGED}")
    return words


def check_tags(tags: Any, words: Sequence[str], where: str) -> None:
    """Raise ConfigError where these are no list of as many as there are words."""
    if not isinstance(tags, list):
        raise ConfigError(f"{where}: field 'tags' is missing or no list; a line is {TAGGED}")
    if len(tags) != len(words):
        raise ConfigError(f"{where}: has {len(tags)} tags for {len(words)} tokens; give each a tag")


def finite_number(value: Any, name: str, where: str, line: str) -> float:
    """The number that stands in a field of a line. Raises ConfigError, with what a `line` looks like, where none does."""
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, (int, float)) else float(value)
    except OverflowError:  # a whole number of 400 digits
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{where}: field {name!r} is missing or not a number; a line is {line}")
    return number


def answer_texts(answers: Any) -> list[str] | None:
    """The answers of a line for question-answering: texts, objects with a `text`, or the columns of a data set; None where
    they are none of these."""
    if isinstance(answers, Mapping):  # {"text": […], "answer_start": […]}
        answers = answers.get("text")
    if not isinstance(answers, list):
        return None
    texts = [answer.get("text") if isinstance(answer, Mapping) else answer for answer in answers]
    if not all(isinstance(text, str) for text in texts):
        return None
    return [text for text in texts if text]


def example(task: str) -> str:
    entry = TASKS[task]
    fields = {name: ["…"] * 2 if name in LISTS else "…" for name in entry.fields if name not in entry.optional}
    return json.dumps(fields, ensure_ascii=False)
