"""Data files with what is expected of a model: JSON lines, or SQuAD's own JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compiler.errors import ConfigError
from compiler.metrics import spoken
from compiler.tasks import (
    FILES,
    TAGGED,
    TASKS,
    answer_texts,
    check_tags,
    check_words,
    finite_number,
    json_object,
    label_number,
)

if TYPE_CHECKING:
    from compiler.runtime import Config

LINES = {
    "feature-extraction": '{"text": "…", "text_pair": "…", "score": 0.8}',
    "text-classification": '{"text": "…", "label": "…"}, a list of labels where several are right, a number for a regression',
    "token-classification": TAGGED,
    "image-classification": '{"image": "a.jpg", "label": "…"}, the path relative to the file; a label as for a text',
    "audio-classification": '{"audio": "a.wav", "label": "…"}, the path relative to the file; a label as for a text',
    "automatic-speech-recognition": '{"audio": "a.wav", "text": "…"}, the path relative to the file',
    "question-answering": '{"question": "…", "context": "…", "answers": ["…"]}, [] where there is none; or SQuAD\'s JSON',
}


@dataclass(frozen=True)
class Data:
    """`items` are what a task's pipeline takes, `expected` the answer to each."""

    items: Sequence[Any]
    expected: Sequence[Any]


def read(path: Path, task: str, config: Config) -> Data:
    """The items of a file, and what is expected of each. `config` knows the model's labels.

    Raises:
        ConfigError: the file cannot be read, or a line of it is not one for the task; it is named.
    """
    if task not in LINES:
        raise ConfigError(f"{path}: there is no metric for {task}; there is one for {', '.join(LINES)}")
    lines = objects(path)
    if task == "question-answering" and len(lines) == 1 and isinstance(lines[0][1].get("data"), list):
        lines = list(_squad(lines[0][1], path))
    found = [READERS[task](line, where, config) for where, line in lines]
    items = [item for item, _ in found]
    if TASKS[task].fields[0] in FILES:
        items = [_beside(path, item, where) for item, (where, _) in zip(items, lines, strict=True)]
    return Data(items, [expected for _, expected in found])


def _beside(path: Path, name: str, where: str) -> str:
    """The path of a file that a line names."""
    found = path.parent / name
    if not found.is_file():
        raise ConfigError(f"{where}: {name}: no such file; paths are relative to the data file")
    return str(found)


def read_text(path: Path) -> str:
    """The content of a file of inputs. Raises ConfigError when it cannot be read, is not UTF-8, or holds nothing."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from error
    if not text.strip():
        raise ConfigError(f"{path}: empty; give at least one line")
    return text


def objects(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The JSON objects of a file, one a line or one in all, each with where it is."""
    text = read_text(path)
    if path.suffix == ".json":
        rows = [(str(path), text)]
    else:
        rows = [(f"{path}:{number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    found = []
    for where, row in rows:
        found.append((where, json_object(row, where)))
    return found


def _text(line: Mapping[str, Any], name: str, where: str, task: str) -> str:
    value = line.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{where}: field {name!r} is missing, empty or not a text; a line for {task} is {LINES[task]}")
    return value


def _pair(line: Mapping[str, Any], where: str, config: Config) -> tuple[Any, float]:
    task = "feature-extraction"
    texts = [_text(line, name, where, task) for name in ("text", "text_pair")]
    return (False, texts), finite_number(line.get("score"), "score", where, LINES[task])


def _classified(line: Mapping[str, Any], where: str, config: Config) -> tuple[Any, Any]:
    task = "text-classification"
    texts = [_text(line, "text", where, task)]
    if line.get("text_pair") is not None:
        texts.append(_text(line, "text_pair", where, task))
    return tuple(texts), _labels(line, where, task, config)


def _labels(line: Mapping[str, Any], where: str, task: str, config: Config) -> Any:
    """What a line's label is: a set of names, of several only where the model gives several; a number for a regression."""
    value = line.get("label")
    if value is None:
        raise ConfigError(f"{where}: field 'label' is missing; a line for {task} is {LINES[task]}")
    if config.num_labels == 1:
        return finite_number(value, "label", where, LINES[task])
    several = config.problem_type == "multi_label_classification"
    if isinstance(value, list) and not several:
        raise ConfigError(f"{where}: has a list of labels, and the model gives one of them")
    return frozenset(_label(label, where, config) for label in (value if isinstance(value, list) else [value]))


def _seen(line: Mapping[str, Any], where: str, config: Config) -> tuple[Any, Any]:
    task = "image-classification"
    return _text(line, "image", where, task), _labels(line, where, task, config)


def _heard(line: Mapping[str, Any], where: str, config: Config) -> tuple[Any, Any]:
    task = "audio-classification"
    return _text(line, "audio", where, task), _labels(line, where, task, config)


def _said(line: Mapping[str, Any], where: str, config: Config) -> tuple[Any, Any]:
    task = "automatic-speech-recognition"
    text = _text(line, "text", where, task)
    if not spoken(text):
        raise ConfigError(f"{where}: field 'text' holds no word; a line for {task} is {LINES[task]}")
    return _text(line, "audio", where, task), text


def _label(value: Any, where: str, config: Config) -> str:
    return str(config.id2label[label_number(value, config.id2label, where)])


def _tagged(line: Mapping[str, Any], where: str, config: Config) -> tuple[Any, Any]:
    words = check_words(line.get("tokens"), where)
    tags: Any = line.get("tags")
    check_tags(tags, words, where)
    return words, [_label(tag, where, config) for tag in tags]


def _asked(line: Mapping[str, Any], where: str, config: Config) -> tuple[Any, Any]:
    task = "question-answering"
    item = tuple(_text(line, name, where, task) for name in ("question", "context"))
    if (texts := answer_texts(line.get("answers"))) is None:
        raise ConfigError(f"{where}: field 'answers' is no list of texts; a line for {task} is {LINES[task]}")
    return item, [] if line.get("is_impossible") else texts


def _squad(document: Mapping[str, Any], path: Path) -> list[tuple[str, dict[str, Any]]]:
    """SQuAD's JSON as lines."""
    found: list[tuple[str, dict[str, Any]]] = []
    try:
        for article in document["data"]:
            for paragraph in article["paragraphs"]:
                for asked in paragraph["qas"]:
                    where = f"{path}: question {asked.get('id', len(found) + 1)}"
                    found.append((where, {**asked, "context": paragraph["context"]}))
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: not SQuAD's form ({type(error).__name__}: {error}); data, paragraphs, qas") from error
    if not found:
        raise ConfigError(f"{path}: no question in it")
    return found


READERS: dict[str, Callable[[Mapping[str, Any], str, Config], tuple[Any, Any]]] = {
    "feature-extraction": _pair,
    "text-classification": _classified,
    "token-classification": _tagged,
    "question-answering": _asked,
    "image-classification": _seen,
    "audio-classification": _heard,
    "automatic-speech-recognition": _said,
}
