"""What a task is: which heads mean it, and which fields of a data file it reads. Imports no torch.

optimum's `TasksManager` turns a task into transformers' auto class (`compiler.stages.load`); this table adds only what it
cannot tell: a task from a local folder's config, and how a line of text becomes the model's input.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from compiler.errors import ConfigError, SourceError

TaskName = Literal["feature-extraction", "text-classification", "token-classification", "question-answering", "fill-mask"]


@dataclass(frozen=True)
class Task:
    """`head` is the suffix of the class names in `config.architectures`; `fields` are those of a data line, in the order
    that the tokenizer takes them; one in `optional` may be left out."""

    head: str
    fields: tuple[str, ...]
    optional: tuple[str, ...] = ()


TASKS: dict[str, Task] = {
    "feature-extraction": Task("Model", ("text",)),
    "text-classification": Task("ForSequenceClassification", ("text", "text_pair"), optional=("text_pair",)),
    "token-classification": Task("ForTokenClassification", ("text",)),
    "question-answering": Task("ForQuestionAnswering", ("question", "context")),
    "fill-mask": Task("ForMaskedLM", ("text",)),
}


def infer(config: Mapping[str, Any], sentence_transformer: bool) -> str:
    """The task of a checkpoint, from its parsed config.json.

    A folder with sentence-transformers' `modules.json` is an embedding model whatever its head is.

    Raises:
        SourceError: `architectures` is missing, or names no head that a task here has.
    """
    if sentence_transformer:
        return "feature-extraction"
    names = config.get("architectures") or []
    for name in names if isinstance(names, list) else []:
        for task, entry in TASKS.items():
            if isinstance(name, str) and name.endswith(entry.head):
                return task
    found = " ".join(", ".join(map(str, names if isinstance(names, list) else [names])).split()) or "none"
    raise SourceError(
        f"config.json: no task can be inferred from architectures ({found}); set task: to one of {', '.join(TASKS)}"
    )


def parse_line(text: str, task: str, where: str) -> tuple[str, ...]:
    """One line of a data file, as the texts that the tokenizer takes: one, or a pair.

    Raises:
        ConfigError: the line is not a JSON object, or lacks a field of the task. `where` is `file:line`.
    """
    try:
        line = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not JSON ({error}); each line is an object such as {example(task)}") from error
    entry = TASKS[task]
    if not isinstance(line, dict):
        raise ConfigError(f"{where}: not a JSON object; a line for {task} is {example(task)}")
    values = []
    for name in entry.fields:
        if name not in line and name in entry.optional:
            continue
        value = line.get(name)
        if not isinstance(value, str) or not value.strip():
            raise ConfigError(f"{where}: field {name!r} is missing, empty or not a text; a line for {task} is {example(task)}")
        values.append(value)
    return tuple(values)


def example(task: str) -> str:
    entry = TASKS[task]
    return json.dumps({name: "…" for name in entry.fields if name not in entry.optional}, ensure_ascii=False)
