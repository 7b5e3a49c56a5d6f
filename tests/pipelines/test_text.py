"""The tasks of text: the same answers as transformers' own pipelines give on the eager model; and what they refuse."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import compiler
from compiler.errors import CompileError, InputError, ReleaseError
from tests.releases import SHORT, TEXTS, release_of

pytestmark = pytest.mark.usefixtures("plain_torchscript")

CLASSES, TOKENS, MASKS, FEATURES = "text-classification", "token-classification", "fill-mask", "feature-extraction"
MASKED = [" ".join("<mask>" if place == 1 else word for place, word in enumerate(text.split())) for text in SHORT[:12]]
PAIRS = [{"text": one, "text_pair": other} for one, other in itertools.pairwise(SHORT[:9])]
LONG = [" ".join(TEXTS[start : start + 6]) for start in range(0, 30, 6)]


def agree(ours: Any, theirs: Any, where: str = "") -> None:
    """The same structure, words and places; numbers as close as fp32 in another runtime is."""
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs), where
        for name in theirs:
            agree(ours[name], theirs[name], f"{where}.{name}")
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs), where
        for number, value in enumerate(theirs):
            agree(ours[number], value, f"{where}[{number}]")
    elif isinstance(theirs, (float, np.floating)):
        assert ours == pytest.approx(float(theirs), abs=2e-5, rel=2e-5), where
    else:
        assert ours == theirs, where


@pytest.fixture(scope="session")
def original(releases: Path) -> Callable[..., Any]:
    """transformers' own pipeline: over the eager checkpoint, or over another model."""
    import transformers
    from optimum.exporters.tasks import TasksManager

    transformers.utils.logging.disable_progress_bar()

    @functools.cache
    def eager(name: str, task: str) -> Any:
        automatic = TasksManager.get_model_class_for_task(task, library="transformers")
        return automatic.from_pretrained(releases / name).eval()

    def make(name: str, task: str, model: Any = None, **options: Any) -> Any:
        tokenizer = transformers.AutoTokenizer.from_pretrained(release_of(releases, name))
        tokenizer.model_max_length = 64
        return transformers.pipeline(task, model=model or eager(name, task), tokenizer=tokenizer, **options)

    return make


@pytest.fixture(scope="session")
def opened(releases: Path) -> Callable[[str], Any]:
    return functools.cache(lambda name: compiler.load(release_of(releases, name)))


CASES: list[tuple[str, str, list[Any], dict[str, Any]]] = [
    ("classes", CLASSES, SHORT, {}),
    ("classes", CLASSES, SHORT, {"top_k": 3}),
    ("classes", CLASSES, SHORT, {"top_k": None, "function_to_apply": "sigmoid"}),
    ("classes", CLASSES, PAIRS, {"top_k": None}),
    ("topics", CLASSES, SHORT, {"top_k": None}),
    ("entities", TOKENS, SHORT, {}),
    ("entities", TOKENS, SHORT, {"aggregation_strategy": "simple"}),
    ("entities", TOKENS, SHORT, {"aggregation_strategy": "first"}),
    ("entities", TOKENS, SHORT, {"aggregation_strategy": "average"}),
    ("entities", TOKENS, SHORT, {"aggregation_strategy": "max", "ignore_labels": ["PER"]}),
    ("entities", TOKENS, LONG, {"aggregation_strategy": "simple", "stride": 8}),
    ("masks", MASKS, MASKED, {}),
    ("masks", MASKS, MASKED[:4], {"top_k": 2, "targets": ["the", "of", "water"]}),
    ("masks", MASKS, ["a <mask> of <mask> tea", "one <mask>"], {"top_k": 3}),
    ("features", FEATURES, SHORT, {}),
]


@pytest.mark.parametrize(("name", "task", "inputs", "options"), CASES, ids=lambda value: str(value)[:40])
def test_answers_as_transformers(
    original: Callable[..., Any],
    opened: Callable[[str], Any],
    name: str,
    task: str,
    inputs: list[Any],
    options: dict[str, Any],
) -> None:
    """Our pipeline, and transformers' own over a compiled model; lists, lists of one, and single inputs."""
    expected, compiled = original(name, task, **options), original(name, task, opened(name), **options)
    ours = compiler.pipeline(task, opened(name), batch_tokens=100, **options)
    for given in (inputs, inputs[:1], inputs[0], inputs[1]):
        answer = expected(given)
        agree(ours(given), answer)
        agree(compiled(given), answer)


def test_transformers_batches_and_says_nothing(
    original: Callable[..., Any], opened: Callable[[str], Any], caplog: pytest.LogCaptureFixture
) -> None:
    """A pipeline that does not know a model's class logs an error that lists hundreds."""
    logging.getLogger("transformers").propagate = True
    compiled = original("classes", CLASSES, opened("classes"))
    agree(compiled(SHORT, batch_size=4), original("classes", CLASSES)(SHORT))
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_options_of_a_call_and_of_the_pipeline(opened: Callable[[str], Any]) -> None:
    pipe = compiler.pipeline("sentiment-analysis", opened("classes"), top_k=2)
    assert len(pipe(SHORT[:2])[0]) == 2
    assert len(pipe(SHORT[0], top_k=3)) == 3
    assert compiler.pipeline("ner", opened("entities")).task == TOKENS
    assert compiler.pipeline(None, opened("answers")).task == "question-answering"


def test_features_as_an_array(opened: Callable[[str], Any]) -> None:
    pipe = compiler.pipeline(FEATURES, opened("features"))
    array = pipe(SHORT[0], return_tensors=True)
    assert array.dtype == np.float32
    agree(array.tolist(), pipe(SHORT[0]))


def test_a_long_text_is_cut_and_it_is_said_once(opened: Callable[[str], Any], caplog: pytest.LogCaptureFixture) -> None:
    pipe = compiler.pipeline(CLASSES, opened("classes"))
    caplog.set_level(logging.WARNING, "compiler")
    cut = pipe(["tea " * 500, "tea " * 400, "tea " * 62])
    assert cut[0] == cut[1] == cut[2]
    assert [record.getMessage() for record in caplog.records] == [
        "text-classification: a text of more than 64 tokens, as many as the model takes, is cut there"
    ]


@pytest.mark.parametrize(
    ("name", "task", "call", "says"),
    [
        ("classes", CLASSES, lambda pipe: pipe([]), "an empty batch"),
        ("classes", CLASSES, lambda pipe: pipe(3), "int, not a text"),
        ("classes", CLASSES, lambda pipe: pipe(["a", None]), "NoneType, not a text"),
        ("classes", CLASSES, lambda pipe: pipe({"text_pair": "a"}), "NoneType, not a text"),
        ("classes", CLASSES, lambda pipe: pipe("a\ud800b"), "half of a character"),
        ("classes", CLASSES, lambda pipe: pipe("a", top_k=0), "top_k: 0"),
        ("classes", CLASSES, lambda pipe: pipe("a", topk=2), "no option 'topk'; it has top_k"),
        ("classes", CLASSES, lambda pipe: pipe("a", function_to_apply="relu"), "softmax, sigmoid or none"),
        ("entities", TOKENS, lambda pipe: pipe("a", aggregation_strategy="last"), "none, simple, first"),
        ("entities", TOKENS, lambda pipe: pipe("a", stride=8), "needs an aggregation_strategy"),
        ("entities", TOKENS, lambda pipe: pipe("a", stride=62, aggregation_strategy="simple"), "stride: 62"),
        ("masks", MASKS, lambda pipe: pipe("nothing is masked"), "no <mask> in 'nothing is masked'"),
        ("masks", MASKS, lambda pipe: pipe("tea " * 80 + "<mask>"), "left of what is not cut off"),
        ("masks", MASKS, lambda pipe: pipe("<mask>", targets=[]), "at least one"),
        ("masks", MASKS, lambda pipe: pipe("<mask>", top_k=0), "top_k: 0"),
    ],
)
def test_bad_input(opened: Callable[[str], Any], name: str, task: str, call: Callable[[Any], Any], says: str) -> None:
    with pytest.raises(InputError, match="") as caught:
        call(compiler.pipeline(task, opened(name)))
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("question-answering", "classes"), "has no head for it: BertForSequenceClassification does text-classification"),
        (("translation", "classes"), "no such task; audio-classification"),
        (("sentence-embedding", "classes"), "has no head for it"),
    ],
)
def test_a_task_that_the_release_has_no_head_for(opened: Callable[[str], Any], arguments: tuple[str, str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        compiler.pipeline(arguments[0], opened(arguments[1]))


def test_pipeline_takes_a_folder_or_an_opened_model(releases: Path, opened: Callable[[str], Any]) -> None:
    folder = release_of(releases, "classes")
    agree(compiler.pipeline(CLASSES, folder, threads=1)(SHORT[:3]), compiler.pipeline(CLASSES, opened("classes"))(SHORT[:3]))
    with pytest.raises(InputError, match="not opened yet"):
        compiler.pipeline(CLASSES, opened("classes"), format="onnx")
    with pytest.raises(InputError, match="batch_tokens: 0"):
        compiler.pipeline(CLASSES, folder, batch_tokens=0)
    with pytest.raises(ReleaseError, match="no such release"):
        compiler.pipeline(CLASSES, folder / "nothing")


def test_errors_are_the_users() -> None:
    assert issubclass(InputError, CompileError)
