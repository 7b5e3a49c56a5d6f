"""Tasks: which one a checkpoint's config means, and how a line of a data file becomes the tokenizer's input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compiler.config import ModelSpec, OnnxTargets, Targets
from compiler.errors import ConfigError, SourceError
from compiler.plan import read_texts
from compiler.tasks import TASKS, TaskName, Words, example, infer, label_number, parse_line

PAIR = "text-classification"
QUESTION = "question-answering"


def refusal(text: str, task: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_line(text, task, "lines.jsonl:7")
    message = str(caught.value)
    assert message.startswith("lines.jsonl:7: ")
    assert len(message.splitlines()) == 1
    return message


def test_names_of_tasks_are_the_table() -> None:
    assert set(get_args(TaskName)) == set(TASKS)


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("BertModel", "feature-extraction"),
        ("XLMRobertaModel", "feature-extraction"),
        ("DebertaV2ForSequenceClassification", "text-classification"),
        ("DistilBertForTokenClassification", "token-classification"),
        ("AlbertForQuestionAnswering", "question-answering"),
        ("ModernBertForMaskedLM", "fill-mask"),
    ],
)
def test_head_is_the_task(architecture: str, task: str) -> None:
    assert infer({"architectures": [architecture]}, sentence_transformer=False) == task


def test_sentence_transformer_is_an_embedding_model_whatever_its_head() -> None:
    assert infer({"architectures": ["BertForMaskedLM"]}, sentence_transformer=True) == "feature-extraction"
    assert infer({}, sentence_transformer=True) == "feature-extraction"


def test_first_head_that_is_known_counts() -> None:
    config = {"architectures": ["BertForPreTraining", "BertForMaskedLM", "BertModel"]}
    assert infer(config, sentence_transformer=False) == "fill-mask"


@pytest.mark.parametrize(
    ("architectures", "found"),
    [
        (["BertForPreTraining"], "BertForPreTraining"),
        (["LlamaForCausalLM", "X"], "LlamaForCausalLM, X"),
        ([], "none"),
        (None, "none"),
        ([3], "3"),
        ("BertModel", "BertModel"),
        (3, "3"),
        (True, "True"),
        ({"BertModel": 1}, "BertModel"),
        ([None], "None"),
        (["Bert\nThing"], "Bert"),
    ],
)
def test_no_task_to_infer(architectures: Any, found: str) -> None:
    with pytest.raises(SourceError) as caught:
        infer({"architectures": architectures}, sentence_transformer=False)
    message = str(caught.value)
    assert found in message
    assert "set task: to one of" in message
    assert all(task in message for task in TASKS)
    assert len(message.splitlines()) == 1


def test_no_architectures_at_all() -> None:
    with pytest.raises(SourceError, match=r"\(none\); set task:"):
        infer({}, sentence_transformer=False)


@pytest.mark.parametrize(
    "task", [task for task, entry in TASKS.items() if entry.fields[0] == "text" and task != "multiple-choice"]
)
def test_line_of_text(task: str) -> None:
    assert parse_line('{"text": "a b"}', task, "x") == ("a b",)


def test_line_of_a_pair_keeps_the_order_of_the_task() -> None:
    assert parse_line('{"text_pair": "b", "text": "a"}', PAIR, "x") == ("a", "b")
    assert parse_line('{"text_pair": null, "text": "a"}', PAIR, "x") == ("a",)
    assert parse_line('{"context": "c", "question": "q"}', QUESTION, "x") == ("q", "c")


def test_line_of_words() -> None:
    """As labelled data has them."""
    task = "token-classification"
    for line, words in (
        ('{"tokens": ["Ada", "reads", ""]}', ("Ada", "reads", "")),
        ('{"tokens": ["Ada"], "text": "Ben", "tags": [0]}', ("Ada",)),
    ):
        (text,) = parse_line(line, task, "x")
        assert isinstance(text, Words)
        assert text.words == words
    assert parse_line('{"tokens": ["Ada"], "text": "Ben"}', task, "x") == ("Ben",)
    for wrong in ("[]", '"Ada"', "[3]", '[" "]', "null"):
        message = refusal(f'{{"tokens": {wrong}}}', task)
        assert "field 'tokens' is no list of words, or of blanks alone; a line with tags is {" in message
    for nothing in ('{"text": "Ada", "tags": null, "tokens": null}', '{"text": "Ada", "tags": [0]}'):
        assert parse_line(nothing, task, "x") == ("Ada",)
    assert "field 'text'" in refusal('{"tokens": ["Ada"]}', "fill-mask")


def test_text_is_taken_as_it_is() -> None:
    text = "  Ünï \n\t\u2028 “x” \U0001f600 "
    assert parse_line(json.dumps({"text": text}), "fill-mask", "x") == (text,)
    assert parse_line(json.dumps({"text": text}, ensure_ascii=False), "fill-mask", "x") == (text,)


def test_other_fields_are_not_read() -> None:
    assert parse_line('{"text": "a", "label": 3, "text_pair": 7}', "fill-mask", "x") == ("a",)


def test_half_of_a_character() -> None:
    """JSON can say it, and no tokenizer takes it."""
    assert refusal('{"text": "cut \\ud83d"}', "fill-mask").endswith(
        "\\ud83d is half of a character; write all of it, or leave it out"
    )
    assert "is half of a character" in refusal('{"tokens": ["a", "\\udc00b"]}', "token-classification")
    assert parse_line('{"text": "\\ud83d\\ude00"}', "fill-mask", "x") == ("\U0001f600",)


@pytest.mark.parametrize("task", list(TASKS))
@pytest.mark.parametrize("text", ["", "text", "{", "{'text': 'a'}", "[1", '{"text": "a"} x', '"\\ud8'])
def test_line_is_not_json(text: str, task: str) -> None:
    assert example(task) in refusal(text, task)


@pytest.mark.parametrize("opening", ["[", '{"text":'])
def test_line_nests_without_end(opening: str) -> None:
    refusal(opening * 200_000, "fill-mask")


@pytest.mark.parametrize("text", ["[]", '["a"]', '"a"', "3", "null", "true", "NaN"])
def test_line_is_not_an_object(text: str) -> None:
    assert "not a JSON object" in refusal(text, "fill-mask")


@pytest.mark.parametrize(
    ("line", "task", "field"),
    [
        ({}, "fill-mask", "text"),
        ({"txt": "a"}, "fill-mask", "text"),
        ({"text": ""}, "fill-mask", "text"),
        ({"text": " \n"}, "fill-mask", "text"),
        ({"text": 3}, "fill-mask", "text"),
        ({"text": None}, "fill-mask", "text"),
        ({"text": ["a"]}, "fill-mask", "text"),
        ({"text_pair": "b"}, PAIR, "text"),
        ({"text": "a", "text_pair": ""}, PAIR, "text_pair"),
        ({"question": "q"}, QUESTION, "context"),
        ({"context": "c"}, QUESTION, "question"),
        ({"text": "a"}, QUESTION, "question"),
    ],
)
def test_field_is_missing_or_no_text(line: dict[str, Any], task: str, field: str) -> None:
    message = refusal(json.dumps(line), task)
    assert f"field {field!r}" in message
    assert example(task) in message


@pytest.mark.parametrize("task", list(TASKS))
def test_example_is_a_line_of_its_task(task: str) -> None:
    assert parse_line(example(task), task, "x")


@settings(deadline=None)
@given(st.text(), st.sampled_from(list(TASKS)))
def test_any_line(text: str, task: str) -> None:
    try:
        assert parse_line(text, task, "x")
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize("odd", ["\u2028", "\u2029", "\x85", "\u000b", "\x1c"])
def test_file_is_split_where_json_lines_are(odd: str, tmp_path: Path) -> None:
    """JSON lets U+2028 and the like stand in a string as they are; only a newline ends a line."""
    line = {"text": f"one{odd}two"}
    written = json.dumps(line, ensure_ascii=odd < " ")
    (tmp_path / "lines.jsonl").write_text(f"{written}\r\n\n{written}\n", encoding="utf-8", newline="")
    targets = Targets(onnx=OnnxTargets(precisions=("fp32",)))
    spec = ModelSpec.model_validate(
        {
            "name": "a",
            "release": "1.0.0",
            "source": "path:x",
            "targets": targets,
            "data": {"validation": {"path": "lines.jsonl"}},
        }
    )
    assert read_texts(spec, "fill-mask", tmp_path).lines == ((f"one{odd}two",),) * 2


def test_labels_may_be_called_by_numbers() -> None:
    """As some checkpoints have it: a name is a text, whatever config.json says."""
    names: Any = {0: 5, 1: "five"}
    assert [label_number(value, names, "x") for value in ("5", 0, "five", 1.0)] == [0, 0, 1, 1]
    with pytest.raises(ConfigError, match="knows no label 5; it has 5, five"):
        label_number(5, names, "x")
