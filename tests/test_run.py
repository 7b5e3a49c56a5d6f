"""`compile run` as users run it: each kind of answer, files in order, and input that is none. In this process: `main` is
what the console script calls."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import compiler
from compiler.cli import main
from tests.modalities.test_audio import tone, write
from tests.releases import PICTURES, RECORDINGS, SHORT, TEXTS, release_of

pytestmark = pytest.mark.usefixtures("plain_torchscript")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(releases: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """`compile run` of a release by its name: exit code, stdout, stderr."""

    def go(name: str, *arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main(["run", str(release_of(releases, name)), *map(str, arguments)])
        out, err = capfd.readouterr()
        return int(str(left.value.code)), out, err

    return go


def results(run: Run, name: str, *arguments: object) -> list[Any]:
    code, out, err = run(name, *arguments, "--json")
    assert code == 0, err
    found: list[Any] = json.loads(out)["results"]
    return found


def test_an_embedding(run: Run, releases: Path) -> None:
    code, out, err = run("features", "--text", SHORT[0], "--text", SHORT[1], "--format", "onnx")
    assert code == 0
    assert err.strip() == "features 1.0.0: onnx fp32, as asked"
    lines = out.splitlines()
    assert len(lines) == 2
    pipe = compiler.pipeline("sentence-embedding", release_of(releases, "features"), format="onnx")
    expected = pipe(SHORT[:2])
    for line, vector in zip(lines, expected, strict=True):
        assert line == f"32 values, length 1.0000: {' '.join(f'{value:.4f}' for value in vector[:6])} …"
    found = results(run, "features", "--text", SHORT[0], "--text", SHORT[1], "--format", "onnx")
    np.testing.assert_allclose(found, np.stack(expected), atol=1e-6)
    tokens = run("features", "--text", SHORT[0], "--format", "onnx", "--task", "feature-extraction")[1]
    assert re.fullmatch(r"\d+ tokens × 32 values: (-?\d\.\d{4} ){6}…\n", tokens)
    by_first = results(run, "features", "--text", SHORT[0], "--format", "onnx", "--pooling", "cls")[0]
    assert np.abs(np.array(by_first) - expected[0]).max() > 0.01


def test_a_similarity(run: Run) -> None:
    code, out, _ = run("features", "--text", SHORT[0], "--text-pair", SHORT[1], "--format", "onnx")
    assert code == 0
    assert re.fullmatch(r"-?\d\.\d{4}\n", out)


def test_a_label(run: Run, releases: Path) -> None:
    expected = compiler.pipeline("text-classification", release_of(releases, "classes"), top_k=3)(SHORT[:1])[0]
    assert run("classes", "--text", SHORT[0])[1] == f"{expected[0]['label']}  {expected[0]['score']:.4f}\n"
    lines = run("classes", "--text", SHORT[0], "--top-k", "3")[1].splitlines()
    assert lines == [f"{one['label']}  {one['score']:.4f}" for one in expected]
    assert len(run("topics", "--text", SHORT[0])[1].splitlines()) == 3  # several labels may be right: all are shown
    assert results(run, "classes", "--text", SHORT[0], "--text-pair", SHORT[1])[0]["label"].startswith("LABEL_")


def test_entities(run: Run, releases: Path) -> None:
    text = "John Smith lives in Paris."
    pipe = compiler.pipeline("ner", release_of(releases, "entities"), aggregation_strategy="simple")
    expected = pipe(text)
    lines = run("entities", "--text", text)[1].splitlines()
    assert len(lines) == len(expected) > 0
    first = expected[0]
    place = f"characters {first['start']} to {first['end']}"
    assert lines[0] == f"{first['entity_group']}  {first['score']:.4f}  {place}  {first['word']}"


def test_an_answer(run: Run) -> None:
    context = "The ferry leaves at noon."
    code, out, _ = run("answers", "--question", "When does it leave?", "--context", context, "--top-k", "2")
    assert code == 0
    for line in out.splitlines():
        found = re.fullmatch(r"(.+)  (0\.\d{4})  characters (\d+) to (\d+)", line)
        assert found
        assert context[int(found[3]) : int(found[4])] == found[1]
    found_none = results(run, "answers", "--question", "Why?", "--context", context, "--no-answer", "--top-k", "100")[0]
    assert {"answer", "score", "start", "end"} == set(found_none[0])
    assert "" in [one["answer"] for one in found_none]


def test_words_for_a_mask(run: Run) -> None:
    lines = run("masks", "--text", "A cup of <mask> tea", "--top-k", "2")[1].splitlines()
    assert len(lines) == 2
    assert re.fullmatch(r"\S+  0\.\d{4}  .+", lines[0])
    assert len(run("masks", "--text", "A <mask> of <mask>", "--top-k", "2")[1].splitlines()) == 4


def test_files_in_their_order(run: Run, tmp_path: Path) -> None:
    """However the batches are made: answers as to each line alone."""
    (tmp_path / "lines.txt").write_text("\n".join(SHORT) + "\n")
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in SHORT if text))
    plain = results(run, "classes", "--file", tmp_path / "lines.txt", "--batch-tokens", "70")
    alone = results(run, "classes", *(word for text in SHORT for word in ("--text", text)), "--batch-tokens", "1")
    assert len(plain) == len(SHORT)
    for one, other in zip(plain, alone, strict=True):
        assert one["label"] == other["label"]
        assert one["score"] == pytest.approx(other["score"], abs=1e-5)
    objects = results(run, "classes", "--file", tmp_path / "lines.jsonl")
    kept = [one for text, one in zip(SHORT, plain, strict=True) if text]
    assert [one["label"] for one in objects] == [one["label"] for one in kept]
    asked = [{"question": "When?", "context": text} for text in TEXTS[:5]]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    answers = results(run, "answers", "--file", tmp_path / "asked.jsonl")
    for line, answer in zip(asked, answers, strict=True):
        assert line["context"][answer["start"] : answer["end"]] == answer["answer"]
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"text": "a", "text_pair": "b"}) + "\n")
    arguments = ("--file", tmp_path / "pairs.jsonl", "--task", "sentence-similarity", "--format", "onnx")
    assert len(results(run, "features", *arguments)) == 1


def test_a_long_text_is_told_once(run: Run) -> None:
    code, _, err = run("classes", "--text", "tea " * 100, "--text", "tea " * 90)
    assert code == 0
    assert err.count("warning: text-classification: a text of more than 64 tokens") == 1


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("classes", ("--question", "Who?", "--context", "He."), "has no head for it"),
        ("classes", ("--text", "a", "--task", "nothing"), "no such task"),
        ("classes", ("--text", "a", "--format", "onnx"), "no onnx artifact; the release has torchscript fp32"),
        ("classes", ("--text", "a", "--no-answer"), "is for question-answering"),
        ("entities", ("--text", "a", "--top-k", "2"), "--top-k: token-classification has one answer"),
        ("entities", ("--text", "a", "--text-pair", "b"), "dict, not a text"),
        ("masks", ("--text", "no mask"), "no <mask> in 'no mask'"),
        ("classes", ("--file", "missing.txt"), "missing.txt: cannot be read"),
        ("classes", ("--file", "missing.jsonl"), "missing.jsonl: cannot be read"),
        ("classes", ("--file", "table.csv"), "inputs are JSON lines"),
        ("answers", ("--file", "lines.txt"), "inputs are JSON lines"),
    ],
)
def test_bad_input(run: Run, name: str, arguments: tuple[str, ...], says: str) -> None:
    code, out, err = run(name, *arguments)
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("error: ")
    assert says in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("suffix", "content", "says"),
    [
        (".txt", b"", "empty"),
        (".jsonl", b"\n\n", "empty"),
        (".txt", b"caf\xe9\n", "not UTF-8 (byte 3)"),
        (".jsonl", b'{"text": "a"}\n{"text": 3}\n', ":2: field 'text' is missing"),
        (".jsonl", b'{"text": "a"}\n\n[1]\n', ":3: not a JSON object"),
        (".jsonl", b"text\n", ":1: not JSON"),
    ],
)
def test_bad_files(run: Run, tmp_path: Path, suffix: str, content: bytes, says: str) -> None:
    path = tmp_path / f"given{suffix}"
    path.write_bytes(content)
    code, out, err = run("classes", "--file", path)
    assert (code, out) == (1, "")
    assert says in err.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments",
    [(), ("--text", "a", "--file", "b.txt"), ("--question", "Who?"), ("--text", "a", "--text-pair", "b", "--text-pair", "c")],
)
def test_usage(run: Run, arguments: tuple[str, ...]) -> None:
    assert run("classes", *arguments)[0] == 2


@pytest.fixture
def run_media(media: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """`compile run` of a release of images, sound or choices."""

    def go(name: str, *arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main(["run", str(release_of(media, name)), "--format", "torchscript", *map(str, arguments)])
        out, err = capfd.readouterr()
        return int(str(left.value.code)), out, err

    return go


def test_an_image(run_media: Run, media: Path) -> None:
    pipe = compiler.pipeline("image-classification", release_of(media, "photos"), format="torchscript")
    expected = pipe(PICTURES[:2], top_k=3)
    both = ("--image", PICTURES[0], "--image", PICTURES[1])
    code, out, err = run_media("photos", *both)
    assert (code, err.strip()) == (0, "photos 1.0.0: torchscript fp32, as asked")
    assert out.splitlines() == [f"{one[0]['label']}  {one[0]['score']:.4f}" for one in expected]
    assert run_media("photos", *both, "--top-k", "3")[1].splitlines() == [
        f"{label['label']}  {label['score']:.4f}" for one in expected for label in one
    ]
    answers = results(run_media, "photos", *both, "--top-k", "3")
    assert [one[0]["label"] for one in answers] == [one[0]["label"] for one in expected]
    vectors = run_media("patches", "--image", PICTURES[0])[1]
    assert re.fullmatch(r"20 × 1 × 1 values: (-?\d+\.\d{4} ){6}…\n", vectors)


def test_labels_of_an_image(run_media: Run, media: Path) -> None:
    pipe = compiler.pipeline("zero-shot-image-classification", release_of(media, "captions"))
    expected = pipe(PICTURES[0], candidate_labels=["boat", "house"])
    code, out, _ = run_media("captions", "--image", PICTURES[0], "--label", "boat", "--label", "house")
    assert code == 0
    assert out.splitlines() == [f"{one['label']}  {one['score']:.4f}" for one in expected]


def test_a_sound(run_media: Run, media: Path) -> None:
    for name in ("sounds", "speech"):
        pipe = compiler.pipeline(None, release_of(media, name))
        expected = pipe(RECORDINGS[0])
        code, out, _ = run_media(name, "--audio", RECORDINGS[0])
        assert code == 0
        line = expected["text"] if name == "speech" else f"{expected[0]['label']}  {expected[0]['score']:.4f}"
        assert out == line + "\n"
    pieces = compiler.pipeline(None, release_of(media, "speech"))(RECORDINGS[0], chunk_length_s=0.5)
    assert run_media("speech", "--audio", RECORDINGS[0], "--chunk-seconds", "0.5")[1] == pieces["text"] + "\n"


def test_a_choice(run_media: Run) -> None:
    given = ("--text", "She watered the seedlings, so", "--label", "they grew.", "--label", "the train was late.")
    code, out, _ = run_media("choices", *given)
    assert code == 0
    assert sorted(line.rpartition("  ")[0] for line in out.splitlines()) == ["the train was late.", "they grew."]
    assert re.fullmatch(r".+  0\.\d{4}", out.splitlines()[0])


def test_files_of_paths(run_media: Run, tmp_path: Path) -> None:
    """Relative to the file that names them, in its order; a warning stands once, however many sounds are of another rate."""
    (tmp_path / "in").mkdir()
    shutil.copy(PICTURES[0], tmp_path / "in/one.jpg")
    for number, rate in enumerate((44100, 16000, 44100)):
        write(tmp_path / f"in/{number}.wav", tone(300 + 200 * number, rate, 0.2 + number / 10), rate)
    (tmp_path / "images.txt").write_text(f"in/one.jpg\n{PICTURES[1]}\n")
    found = results(run_media, "photos", "--file", tmp_path / "images.txt")
    both = results(run_media, "photos", "--image", PICTURES[0], "--image", PICTURES[1])
    assert [one[0]["label"] for one in found] == [one[0]["label"] for one in both]
    with_texts = [{"image": "in/one.jpg", "texts": ["boat", "house"]}, {"image": PICTURES[1], "texts": ["a", "b", "c"]}]
    (tmp_path / "images.jsonl").write_text("".join(json.dumps(line) + "\n" for line in with_texts))
    assert [len(one) for one in results(run_media, "captions", "--file", tmp_path / "images.jsonl")] == [2, 3]
    (tmp_path / "bare.jsonl").write_text('{"image": "in/one.jpg"}\n')
    for name in ("images.txt", "images.jsonl", "bare.jsonl"):
        given = ("--file", tmp_path / name, "--label", "boat", "--label", "hill")
        for answer in results(run_media, "captions", *given):
            assert sorted(one["label"] for one in answer) == ["boat", "hill"]
    (tmp_path / "sounds.jsonl").write_text("".join(json.dumps({"audio": f"in/{n}.wav"}) + "\n" for n in range(3)))
    code, out, err = run_media("speech", "--file", tmp_path / "sounds.jsonl")
    assert code == 0
    assert err.count("warning: ") == err.count("sound at 44100 Hz is resampled to the model's 16000 Hz") == 1
    alone = [run_media("speech", "--audio", tmp_path / f"in/{n}.wav")[1] for n in range(3)]
    assert out == "".join(alone)
    choice = {"text": "She watered the seedlings, so", "choices": ["they grew.", "the train was late."]}
    (tmp_path / "choices.jsonl").write_text(json.dumps(choice) + "\n")
    assert [one["label"] for one in results(run_media, "choices", "--file", tmp_path / "choices.jsonl")[0]]


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("photos", ("--image", "none.jpg"), "none.jpg: not an image that can be read"),
        ("photos", ("--image", __file__), "test_run.py: not an image that can be read"),
        ("photos", ("--text", "a boat"), "--text: photos 1.0.0 is for image-classification; give --image"),
        ("photos", ("--audio", "a.wav"), "--audio: photos 1.0.0 is for image-classification; give --image"),
        ("photos", ("--image", "a.jpg", "--task", "text-classification"), "has no head for it"),
        ("photos", ("--image", "a.jpg", "--label", "boat"), "--label: is for zero-shot-image-classification"),
        ("photos", ("--image", "a.jpg", "--no-answer"), "is for question-answering"),
        ("captions", ("--image", PICTURES[0]), "--label: is missing: what may the image show?"),
        (
            "captions",
            ("--image", PICTURES[0], "--label", "a", "--top-k", "2"),
            "--top-k: zero-shot-image-classification",
        ),
        ("captions", ("--file", "images.txt"), "--label: is missing"),
        ("speech", ("--audio", __file__), "test_run.py: not a sound that can be read"),
        ("speech", ("--image", "a.jpg"), "--image: speech 1.0.0 is for automatic-speech-recognition; give --audio"),
        ("sounds", ("--audio", "a.wav", "--chunk-seconds", "2"), "--chunk-seconds: is for automatic-speech-recognition"),
        ("speech", ("--audio", "a.wav", "--top-k", "2"), "--top-k: automatic-speech-recognition has one answer"),
        ("choices", ("--text", "a", "--label", "b"), "--label: is given for each choice, two or more times"),
        ("choices", ("--text", "a"), "--label: is given for each choice, two or more times"),
    ],
)
def test_bad_media(run_media: Run, name: str, arguments: tuple[str, ...], says: str) -> None:
    code, out, err = run_media(name, *arguments)
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("error: ")
    assert says in err.splitlines()[-1]


def test_media_for_a_release_of_text(run: Run) -> None:
    code, out, err = run("classes", "--image", PICTURES[0])
    assert (code, out) == (1, "")
    assert "--image: classes 1.0.0 is for text-classification; give --text" in err.splitlines()[-1]
