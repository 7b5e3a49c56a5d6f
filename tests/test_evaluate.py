"""`compile evaluate`: data files line by line, each task's figures against the eager model asked one by one, and the gate."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import compiler
from compiler import labelled, metrics
from compiler.cli.run import _table
from compiler.errors import ConfigError, InputError, StageError
from compiler.evaluate import KINDS, Score, _Job, _prepare, fall, judge, worse
from compiler.hashing import hash_file
from compiler.labelled import Data
from compiler.modalities import audio, image
from compiler.runtime import Config
from compiler.verify import find_original, read_release
from tests.conftest import error_line, run_command, seal
from tests.modalities import test_audio as sound
from tests.releases import MEDIA, PICTURES, RECORDINGS, SHORT, TAGS, TEXTS, release_of

pytestmark = pytest.mark.usefixtures("plain_torchscript")
NO_OPTIONS = {"trust_remote_code": False, "allow_pickle": False}


def write(folder: Path, lines: Sequence[Any]) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def config_of(releases: Path, name: str) -> Config:
    return Config(release_of(releases, name), None)


def asked(releases: Path, name: str, data: Data, artifact: bool, **given: Any) -> list[Any]:
    """The answers of the original, or of the first artifact, as the processes of `evaluate` give them."""
    release = release_of(releases, name)
    manifest, _ = read_release(release)
    snapshot = find_original(release, manifest, None, NO_OPTIONS, releases)
    chosen = manifest.artifacts[0] if artifact else None
    options = {**KINDS[manifest.task][1], **given}
    pipe = _prepare(_Job(release, manifest, chosen, snapshot, NO_OPTIONS, 1, 100, data.items, options))
    return list(pipe.stream(data.items, pipe.options))


@pytest.mark.parametrize("artifact", [False, True])
def test_labels(releases: Path, tmp_path: Path, artifact: bool) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    eager = AutoModelForSequenceClassification.from_pretrained(releases / "classes").eval()
    tokenizer = AutoTokenizer.from_pretrained(releases / "classes")
    texts = [text for text in SHORT if text]
    with torch.no_grad():
        best = [int(eager(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text in texts]
    # Every third label is wrong; half of them by name.
    given = [(label + (number % 3 == 0)) % 9 for number, label in enumerate(best)]
    lines = [
        {"text": text, "label": f"LABEL_{label}" if label % 2 else label} for text, label in zip(texts, given, strict=True)
    ]
    config = config_of(releases, "classes")
    data = labelled.read(write(tmp_path, lines), "text-classification", config)
    score = judge("text-classification", config, data, tmp_path)
    found = score(asked(releases, "classes", data, artifact))
    right = sum(one == other for one, other in zip(given, best, strict=True))
    assert found["accuracy"] == pytest.approx(right / len(texts))
    names = [[{f"LABEL_{label}"} for label in labels] for labels in (given, best)]
    assert found["f1_macro"] == pytest.approx(metrics.f1(names[0], names[1]))
    assert set(found) == {"accuracy", "f1_macro"}


def test_several_labels(releases: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    eager = AutoModelForSequenceClassification.from_pretrained(releases / "topics").eval()
    tokenizer = AutoTokenizer.from_pretrained(release_of(releases, "topics"))
    texts = [text for text in SHORT if text]
    lines, above = [], []
    for text in texts:
        with torch.no_grad():
            logits = eager(**tokenizer(text, return_tensors="pt")).logits[0]
        above.append({eager.config.id2label[number] for number in range(3) if logits[number] > 0})
        lines.append({"text": text, "label": sorted(above[-1])})
    lines[0]["label"] = sorted({"sport", "trade", "music"} ^ above[0])
    config = config_of(releases, "topics")
    data = labelled.read(write(tmp_path, lines), "text-classification", config)
    found = judge("text-classification", config, data, tmp_path)(asked(releases, "topics", data, True))
    assert found["accuracy"] == pytest.approx(1 - 1 / len(texts))
    truth = [set(line["label"]) for line in lines]
    assert found["f1_micro"] == pytest.approx(metrics.f1(truth, above, "micro"))


def test_entities(releases: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    eager = AutoModelForTokenClassification.from_pretrained(releases / "entities").eval()
    tokenizer = AutoTokenizer.from_pretrained(release_of(releases, "entities"))
    sentences = [text.split() for text in SHORT if text] + [TEXTS[0].split() * 20]
    predicted = []
    for words in sentences:
        coded = tokenizer(words, is_split_into_words=True, return_tensors="pt", truncation=True, max_length=64)
        with torch.no_grad():
            best = eager(**coded).logits[0].argmax(-1).tolist()
        firsts = {word: place for place, word in reversed(list(enumerate(coded.word_ids()))) if word is not None}
        predicted.append([TAGS[best[firsts[word]]] if word in firsts else "O" for word in range(len(words))])
    expected = [["B-PER" if number % 4 == 0 else tag for number, tag in enumerate(tags)] for tags in predicted]
    lines = [{"tokens": words, "tags": tags} for words, tags in zip(sentences, expected, strict=True)]
    config = config_of(releases, "entities")
    data = labelled.read(write(tmp_path, lines), "token-classification", config)
    answers = asked(releases, "entities", data, True)
    assert answers == predicted
    assert judge("token-classification", config, data, tmp_path)(answers) == metrics.entity_f1(expected, predicted)


@pytest.mark.parametrize("form", ["squad", "lines"])
def test_questions(releases: Path, tmp_path: Path, form: str) -> None:
    """SQuAD's JSON and JSON lines: the same questions; one has no answer."""
    contexts = TEXTS[:3]
    answers: list[list[str]] = [[contexts[0].split()[1]], [], [" ".join(contexts[2].split()[:2]), "nothing"]]
    if form == "squad":
        asked_of = [
            {"context": context, "qas": [{"id": str(number), "question": "What?", "answers": [{"text": a} for a in given]}]}
            for number, (context, given) in enumerate(zip(contexts, answers, strict=True))
        ]
        path = tmp_path / "squad.json"
        path.write_text(json.dumps({"version": "v2.0", "data": [{"title": "t", "paragraphs": asked_of}]}, indent=1))
    else:
        forms: list[Any] = [{"text": answers[0], "answer_start": [0]}, answers[1], answers[2]]
        lines = [{"question": "What?", "context": c, "answers": a} for c, a in zip(contexts, forms, strict=True)]
        path = write(tmp_path, lines)
    config = config_of(releases, "answers")
    data = labelled.read(path, "question-answering", config)
    assert data == Data([("What?", context) for context in contexts], answers)
    found = asked(releases, "answers", data, True, handle_impossible_answer=True)
    expected = asked(releases, "answers", data, False, handle_impossible_answer=True)
    assert [one["answer"] for one in found] == [one["answer"] for one in expected]
    score = judge("question-answering", config, data, path)
    assert score(found) == metrics.squad(answers, [one["answer"] for one in expected])
    assert score([{"answer": given[0] if given else ""} for given in answers]) == {"exact_match": 1.0, "f1": 1.0}
    assert score([[], [], []])["exact_match"] == pytest.approx(1 / 3)


def test_a_tokenizer_that_is_not_the_originals(releases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compiler.pipelines import tokenizer

    data = Data([("Some Text",)], [frozenset({"LABEL_0"})])
    original = tokenizer.read

    def other(model: Any) -> Any:
        read = original(model)
        read.backend.normalizer = None
        return read

    monkeypatch.setattr(tokenizer, "read", other)
    with pytest.raises(StageError, match="give different tokens for"):
        asked(releases, "classes", data, False)


LINE = {"text": "a", "label": "LABEL_1"}


@pytest.mark.parametrize(
    ("name", "task", "lines", "says"),
    [
        (
            "classes",
            "text-classification",
            [LINE, {**LINE, "label": "cat"}],
            ":2: the model knows no label 'cat'; it has LABEL_0",
        ),
        ("classes", "text-classification", [{**LINE, "label": 9}], ":1: the model knows no label 9"),
        ("classes", "text-classification", [{**LINE, "label": True}], ":1: the model knows no label True"),
        (
            "classes",
            "text-classification",
            [{"text": "a"}],
            ":1: field 'label' is missing; a line for text-classification is ",
        ),
        ("classes", "text-classification", [{**LINE, "label": ["LABEL_1"]}], ":1: has a list of labels"),
        ("classes", "text-classification", [{**LINE, "text": ""}], ":1: field 'text' is missing, empty"),
        ("classes", "text-classification", [LINE, [1]], ":2: not a JSON object"),
        ("classes", "text-classification", [], "empty; give at least one line"),
        ("entities", "token-classification", [{"tokens": ["a"], "tags": []}], ":1: has 0 tags for 1 tokens; give each a tag"),
        ("entities", "token-classification", [{"tokens": "a", "tags": []}], ":1: field 'tokens' is no list of words"),
        ("entities", "token-classification", [{"tokens": [" "], "tags": ["O"]}], ":1: field 'tokens' is no list of words"),
        ("entities", "token-classification", [{"tokens": ["a"], "tags": ["X"]}], ":1: the model knows no label 'X'"),
        (
            "features",
            "feature-extraction",
            [{"text": "a", "text_pair": "b", "score": "1"}],
            ":1: field 'score' is missing or not",
        ),
        ("features", "feature-extraction", [{"text": "a", "score": 1}], ":1: field 'text_pair' is missing"),
        ("answers", "question-answering", [{"question": "a", "context": "b", "answers": "c"}], ":1: field 'answers'"),
        ("answers", "question-answering", [{"question": "a", "context": "b"}], ":1: field 'answers'"),
        ("answers", "question-answering", [{"data": [{}]}], "not SQuAD's form"),
        ("answers", "question-answering", [{"data": []}], "no question in it"),
        ("masks", "fill-mask", [LINE], "there is no metric for fill-mask"),
    ],
)
def test_bad_lines(releases: Path, tmp_path: Path, name: str, task: str, lines: list[Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        labelled.read(write(tmp_path, lines), task, config_of(releases, name))
    assert says in str(caught.value)


def test_scores_that_are_all_the_same(releases: Path, tmp_path: Path) -> None:
    data = Data([], [3.0, 3.0])
    with pytest.raises(InputError, match="every score is the same"):
        judge("feature-extraction", config_of(releases, "features"), data, tmp_path)


def test_a_regression(releases: Path, tmp_path: Path) -> None:
    config = config_of(releases, "classes")
    vars(config)["num_labels"] = 1
    data = labelled.read(
        write(tmp_path, [{"text": "a", "label": 1.5}, {"text": "b", "label": 0}]), "text-classification", config
    )
    assert data.expected == [1.5, 0.0]
    answers = [[{"label": "LABEL_0", "score": score}] for score in (0.1, 0.9)]
    assert judge("text-classification", config, data, tmp_path)(answers) == {"spearman": pytest.approx(-1)}
    with pytest.raises(ConfigError, match="not a number"):
        labelled.read(write(tmp_path, [{"text": "a", "label": "b"}]), "text-classification", config)


def test_worse() -> None:
    better = Score("c", {"f1": 0.9}, 1, 1, {"f1": -0.4})
    scores = [Score("a", {"f1": 0.5}, 1, 1), Score("b", {"f1": 0.48}, 1, 1, {"f1": 0.02}), better]
    assert worse(scores, 0.02) == []
    assert worse(scores, 0.01) == ["b: f1 is 0.4800, 0.0200 below the original's"]


def test_the_command_and_its_gate(releases: Path, tmp_path: Path) -> None:
    """A sound release passes; one whose ONNX file lost its word embeddings does not, though its hashes are right."""
    import onnx

    pairs: list[dict[str, Any]] = [{"text": one, "text_pair": other} for one, other in itertools.pairwise(SHORT[:13])]
    # What the original says itself: its own figure is 1.
    pipe = compiler.pipeline("sentence-similarity", release_of(releases, "features"), format="onnx")
    for pair, score in zip(pairs, pipe(pairs), strict=True):
        pair["score"] = score
    data = write(tmp_path, pairs)
    mine = Path(shutil.copytree(release_of(releases, "features"), tmp_path / "release"))
    command = ("evaluate", mine, "--data", data, "--source", f"path:{releases / 'features'}", "--threads", "1")
    sound = run_command(tmp_path, tmp_path, *command, "--format", "onnx", "--max-drop", "0.01", "--json")
    assert sound.returncode == 0, sound.stderr
    assert "leaked" not in sound.stderr  # of what a process that is killed leaves behind, Python tells
    answer = json.loads(sound.stdout)
    assert [score["subject"] for score in answer["scores"]] == ["eager fp32", "onnx fp32"]
    eager, same = answer["scores"]
    assert same["metrics"]["spearman"] == pytest.approx(eager["metrics"]["spearman"], abs=0.01) == pytest.approx(1, abs=0.01)
    assert all(score["seconds"] > 0 and score["per_second"] > 0 for score in answer["scores"])

    graph = onnx.load(mine / "onnx/model.onnx")
    for tensor in graph.graph.initializer:
        if tensor.dims == [300, 32]:
            values = np.random.default_rng(0).normal(size=(300, 32)).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(graph, mine / "onnx/model.onnx")
    manifest, _ = read_release(mine)
    file = hash_file(mine, "onnx/model.onnx")
    changed = tuple(
        replace(one, files=tuple(file if old.path == file.path else old for old in one.files)) for one in manifest.artifacts
    )
    seal(mine, replace(manifest, artifacts=changed, read=None))
    failed = run_command(tmp_path, tmp_path, *command, "--format", "onnx", "--max-drop", "0.01")
    line = error_line(failed)
    assert "onnx fp32: spearman is" in line
    assert "below the original's" in line
    assert failed.stdout.splitlines()[1].split() == ["artifact", "spearman", "seconds", "inputs/s"]


def test_bad_commands(releases: Path, tmp_path: Path) -> None:
    release = release_of(releases, "classes")
    data = write(tmp_path, [LINE])
    for arguments, says in (
        (("--data", tmp_path / "missing.jsonl"), "missing.jsonl: cannot be read"),
        (("--data", data, "--format", "onnx"), "no onnx artifact; the release has torchscript fp32"),
        (("--data", data, "--source", "path:nowhere"), "path:nowhere"),
    ):
        assert says in error_line(run_command(tmp_path, tmp_path, "evaluate", release, *arguments))


def heard(media: Path) -> list[str]:
    """What the untouched speech model makes of the recordings, by transformers alone."""
    import torch
    from transformers import AutoFeatureExtractor, AutoModelForCTC, AutoTokenizer

    eager = AutoModelForCTC.from_pretrained(media / "speech").eval()
    extractor = AutoFeatureExtractor.from_pretrained(media / "speech")
    tokenizer = AutoTokenizer.from_pretrained(media / "speech")
    texts = []
    for path in RECORDINGS:
        inputs = extractor(audio.read(path)[0], sampling_rate=16000, return_tensors="pt")
        with torch.no_grad():
            texts.append(tokenizer.decode(eager(**inputs).logits[0].argmax(-1)))
    return texts


@pytest.mark.parametrize("artifact", [False, True])
def test_images(media: Path, tmp_path: Path, artifact: bool) -> None:
    import torch
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    eager = AutoModelForImageClassification.from_pretrained(media / "photos").eval()
    processor = AutoImageProcessor.from_pretrained(media / "photos", backend="pil")
    with torch.no_grad():
        pixels = processor([image.read(path) for path in PICTURES], return_tensors="pt")
        best = eager(**pixels).logits.argmax(-1).tolist()
    given = [(label + (number % 3 == 0)) % 9 for number, label in enumerate(best)]
    shutil.copytree(Path(PICTURES[0]).parent, tmp_path / "in")
    lines = [
        {"image": f"in/{Path(path).name}", "label": f"LABEL_{label}" if label % 2 else label}
        for path, label in zip(PICTURES, given, strict=True)
    ]
    config = config_of(media, "photos")
    data = labelled.read(write(tmp_path, lines), "image-classification", config)
    assert list(data.items) == [str(tmp_path / line["image"]) for line in lines]
    found = judge("image-classification", config, data, tmp_path)(asked(media, "photos", data, artifact))
    names = [[{f"LABEL_{label}"} for label in labels] for labels in (given, best)]
    assert found == {"accuracy": pytest.approx(4 / 6), "f1_macro": pytest.approx(metrics.f1(names[0], names[1]))}


@pytest.mark.parametrize("artifact", [False, True])
def test_sounds(media: Path, tmp_path: Path, artifact: bool) -> None:
    import torch
    from transformers import AutoFeatureExtractor, AutoModelForAudioClassification

    eager = AutoModelForAudioClassification.from_pretrained(media / "sounds").eval()
    extractor = AutoFeatureExtractor.from_pretrained(media / "sounds")
    best = []
    for path in RECORDINGS:
        with torch.no_grad():
            inputs = extractor(audio.read(path)[0], sampling_rate=16000, return_tensors="pt")
            best.append(int(eager(**inputs).logits.argmax()))
    given = [(best[0] + 1) % 9, *best[1:]]
    lines = [{"audio": path, "label": label} for path, label in zip(RECORDINGS, given, strict=True)]
    config = config_of(media, "sounds")
    data = labelled.read(write(tmp_path, lines), "audio-classification", config)
    found = judge("audio-classification", config, data, tmp_path)(asked(media, "sounds", data, artifact))
    assert found["accuracy"] == pytest.approx(0.75)


@pytest.mark.parametrize("artifact", [False, True])
def test_speech(media: Path, tmp_path: Path, artifact: bool) -> None:
    texts = heard(media)
    lines = [{"audio": path, "text": text.lower() + "!"} for path, text in zip(RECORDINGS, texts, strict=True)]
    lines[1]["text"] = f"one more {texts[1]}"
    config = config_of(media, "speech")
    data = labelled.read(write(tmp_path, lines), "automatic-speech-recognition", config)
    answers = asked(media, "speech", data, artifact)
    assert [answer["text"] for answer in answers] == texts
    words = sum(len(text.split()) for text in texts) + 2
    assert judge("automatic-speech-recognition", config, data, tmp_path)(answers) == {"wer": pytest.approx(2 / words)}


def test_less_is_better_of_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert fall("wer", 0.2, 0.25) == pytest.approx(0.05)
    assert fall("f1", 0.2, 0.25) == pytest.approx(-0.05)
    scores = [Score("eager fp32", {"wer": 0.2}, 1, 1), Score("b", {"wer": 0.25}, 1, 1, {"wer": 0.05})]
    assert worse(scores, 0.01) == ["b: wer is 0.2500, 0.0500 above the original's"]
    assert _table(scores).splitlines()[2].split()[:3] == ["b", "0.2500", "+0.0500"]


@pytest.mark.parametrize(
    ("name", "line", "says"),
    [
        ("photos", {"image": "none.jpg", "label": 1}, ":1: none.jpg: no such file; paths are relative to the data file"),
        ("photos", {"image": "", "label": 1}, ":1: field 'image' is missing, empty"),
        ("photos", {"image": "a.jpg", "label": "cat"}, ":1: the model knows no label 'cat'; it has LABEL_0"),
        ("photos", {"image": "a.jpg", "label": [1]}, ":1: has a list of labels"),
        ("sounds", {"image": "a.jpg", "label": 1}, ":1: field 'audio' is missing"),
        ("speech", {"audio": "a.wav"}, ":1: field 'text' is missing"),
        ("speech", {"audio": "a.wav", "text": "…!"}, ":1: field 'text' holds no word"),
        ("captions", {"image": "a.jpg", "label": 1}, "there is no metric for zero-shot-image-classification"),
    ],
)
def test_bad_lines_of_media(media: Path, tmp_path: Path, name: str, line: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        labelled.read(write(tmp_path, [line]), MEDIA[name][1], config_of(media, name))
    assert says in str(caught.value)


def test_the_command_on_sound(media: Path, tmp_path: Path) -> None:
    """Sound at another rate is said once, however many subjects hear it; a file that is no sound is one line of error."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(2):
        sound.write(folder / f"{number}.wav", sound.tone(300 + 200 * number, 44100, 0.3), 44100)
    data = write(folder, [{"audio": f"{number}.wav", "text": "one two"} for number in range(2)])
    given = ("--data", data, "--source", f"path:{media / 'speech'}", "--threads", "1", "--json")
    done = run_command(tmp_path, tmp_path, "evaluate", release_of(media, "speech"), *given)
    assert done.returncode == 0, done.stderr
    eager, same = json.loads(done.stdout)["scores"]
    assert eager["metrics"] == same["metrics"]
    assert same["drop"] == {"wer": 0.0}
    assert done.stderr.count("sound at 44100 Hz is resampled to the model's 16000 Hz") == 1
    (folder / "1.wav").write_bytes(b"")
    with pytest.raises(InputError, match=r"1\.wav: not a sound that can be read \(empty"):
        asked(media, "speech", labelled.read(data, "automatic-speech-recognition", config_of(media, "speech")), True)
