"""The tasks of images, sound and choices: the same answers as transformers' own pipelines give on the eager model; alone and
in batches; and what they refuse."""

from __future__ import annotations

import functools
import itertools
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import compiler
from compiler.errors import CompileError, InputError, ReleaseError
from compiler.modalities import audio, image
from compiler.pipelines import KINDS
from compiler.plan import PACKAGE
from compiler.verify import read_release
from tests.conftest import seal
from tests.modalities.test_audio import tone, write
from tests.pipelines.test_text import agree
from tests.releases import MEDIA, PICTURES, RECORDINGS, release_of

pytestmark = pytest.mark.usefixtures("plain_torchscript")

CHOICES = [json.loads(line) for line in (PACKAGE / "data/choices.jsonl").read_text().splitlines()]
LABELS = ["boat", "red house", "fruit"]


@pytest.fixture(scope="session")
def opened(media: Path) -> Callable[[str], Any]:
    return functools.cache(lambda name: compiler.load(release_of(media, name), "torchscript"))


@pytest.fixture(scope="session")
def original(media: Path) -> Callable[..., Any]:
    """transformers' own pipeline: over the eager checkpoint, or over another model."""
    import transformers
    from optimum.exporters.tasks import TasksManager

    from compiler.tasks import TASKS

    transformers.utils.logging.disable_progress_bar()

    def make(name: str, model: Any = None) -> Any:
        task = MEDIA[name][1]
        parts: dict[str, Any] = {}
        if TASKS[task].modality == "audio":
            parts["feature_extractor"] = transformers.AutoFeatureExtractor.from_pretrained(media / name)
        else:
            parts["image_processor"] = transformers.AutoImageProcessor.from_pretrained(media / name, backend="pil")
        if name in ("speech", "captions"):
            parts["tokenizer"] = transformers.AutoTokenizer.from_pretrained(media / name)
        kind = MEDIA[name][0].partition("-")[0]
        auto = TasksManager.get_model_class_for_task(
            task, model_type=kind, model_class_name=TASKS[task].auto, library="transformers"
        )
        return transformers.pipeline(task, model=model or auto.from_pretrained(media / name).eval(), **parts)

    return functools.cache(make)


def sounds() -> list[np.ndarray]:
    """Of different length, two alike."""
    read = [audio.read(path)[0] for path in RECORDINGS]
    assert {audio.read(path)[1] for path in RECORDINGS} == {16000}
    return [read[0][:9000], read[1][:16000], read[2][:9000], read[3][:4321]]


CASES: list[tuple[str, dict[str, Any]]] = [
    ("photos", {}),
    ("photos", {"top_k": 2}),
    ("photos", {"top_k": 9, "function_to_apply": "sigmoid"}),
    ("patches", {}),
    ("patches", {"pool": True}),
    ("captions", {"candidate_labels": LABELS}),
    ("captions", {"candidate_labels": LABELS[:1], "hypothesis_template": "{}, seen from above"}),
    ("sounds", {}),
    ("sounds", {"top_k": 2, "function_to_apply": "none"}),
    ("speech", {}),
    ("speech", {"chunk_length_s": 0.3}),
    ("speech", {"chunk_length_s": 0.4, "stride_length_s": [0.1, 0.05]}),
]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_answers_are_those_of_transformers(
    media: Path, opened: Callable[[str], Any], original: Callable[..., Any], name: str, options: dict[str, Any]
) -> None:
    """Ours in batches, of paths; theirs one by one."""
    heard = name in ("sounds", "speech")
    pipe = compiler.pipeline(MEDIA[name][1], opened(name))
    theirs = [original(name)(one, **options) for one in (sounds() if heard else [image.read(path) for path in PICTURES])]
    given = sounds() if heard else PICTURES
    agree(pipe(given, **options), theirs)
    agree(pipe(given[0], **options), theirs[0])
    assert len({json.dumps(answer) for answer in theirs}) > 1 or options.get("candidate_labels") == LABELS[:1]


@pytest.mark.parametrize("name", ["photos", "patches", "captions", "sounds", "speech"])
def test_transformers_pipeline_over_ours(
    opened: Callable[[str], Any], original: Callable[..., Any], caplog: pytest.LogCaptureFixture, name: str
) -> None:
    given = sounds()[1] if name in ("sounds", "speech") else image.read(PICTURES[0])
    options = {"candidate_labels": LABELS} if name == "captions" else {}
    theirs = original(name, opened(name))
    agree(theirs(given, **options), original(name)(given, **options))
    assert "is not supported" not in caplog.text


def test_choices(media: Path, opened: Callable[[str], Any]) -> None:
    import torch
    from transformers import AutoModelForMultipleChoice, AutoTokenizer

    eager = AutoModelForMultipleChoice.from_pretrained(media / "choices").eval()
    tokenizer = AutoTokenizer.from_pretrained(media / "choices")
    given = [*CHOICES[:5], {**CHOICES[5], "choices": CHOICES[5]["choices"][:2]}]  # not all have as many
    answers = compiler.pipeline(None, opened("choices"))(given)
    for line, answer in zip(given, answers, strict=True):
        pairs = [(line["text"], choice) for choice in line["choices"]]
        coded = tokenizer(pairs, padding=True, truncation=True, max_length=64, return_tensors="pt")
        with torch.no_grad():
            scores = eager(**{name: value[None] for name, value in coded.items()}).logits[0].softmax(-1).tolist()
        expected = sorted(zip(scores, line["choices"], strict=True), reverse=True)
        agree(answer, [{"score": score, "label": choice} for score, choice in expected])
    agree(compiler.pipeline("multiple-choice", opened("choices"))(given[0]), answers[0])
    for wrong in ({"text": "a"}, {"text": "a", "choices": ["b"]}, {"text": 1, "choices": ["b", "c"]}, "a"):
        with pytest.raises(InputError, match="choice"):
            compiler.pipeline("multiple-choice", opened("choices"))(wrong)


def test_ways_to_give_an_image(opened: Callable[[str], Any], tmp_path: Path) -> None:
    pipe = compiler.pipeline("image-classification", opened("photos"))
    expected = pipe(PICTURES[0])
    picture = image.read(PICTURES[0])
    for given in (Path(PICTURES[0]), picture, np.asarray(picture)):
        agree(pipe(given), expected)
    agree(pipe(images=PICTURES[:1]), [expected])
    agree(pipe(inputs=PICTURES[0]), expected)


def test_texts_of_each_image(opened: Callable[[str], Any]) -> None:
    """Images bring the texts to choose from, and a batch is of those with the same."""
    pipe = compiler.pipeline("zero-shot-image-classification", opened("captions"), hypothesis_template="{}")
    given = [{"image": path, "texts": LABELS[: 2 + number % 2]} for number, path in enumerate(PICTURES)]
    found = pipe(given)
    for one, answer in zip(given, found, strict=True):
        agree(answer, pipe(one["image"], candidate_labels=one["texts"]))
        agree(answer, pipe(one))


def test_a_model_that_takes_any_size(opened: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of several sizes do not fit in one array."""
    pipe = compiler.pipeline("image-feature-extraction", opened("patches"), return_tensors=True)
    pipe.prepared = lambda images, return_tensors: {
        "pixel_values": np.stack([np.asarray(one, dtype=np.float32).transpose(2, 0, 1) for one in images]) / 255
    }
    noise = np.random.default_rng(0).integers(0, 255, (3, 64, 64, 3), dtype=np.uint8)
    given = [noise[0], noise[1][:32], noise[2]]
    answers = pipe(given)
    assert [answer.shape for answer in answers] == [(1, 20, 2, 2), (1, 20, 1, 2), (1, 20, 2, 2)]
    for one, answer in zip(given, answers, strict=True):
        np.testing.assert_allclose(answer, pipe(one), atol=1e-5)


@pytest.mark.parametrize(("name", "most"), [("sounds", 1), ("speech", 4)])
def test_padding_only_where_a_mask_says_so(
    opened: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, name: str, most: int
) -> None:
    """Without a mask, only sounds of one length share a batch; and what is heard in front of padding stays the same."""
    model = opened(name)
    pipe = compiler.pipeline(None, model)
    given = [sounds()[0][:length] for length in (4000, 5000, 6000, 7000)]
    alone = [pipe(one) for one in given]
    shapes = []
    run = model.run

    def seen(inputs: Any) -> Any:
        shapes.append(inputs["input_values"].shape)
        return run(inputs)

    monkeypatch.setattr(model, "run", seen)
    agree(pipe(given), alone)
    assert max(batch for batch, _ in shapes) == most
    if name == "sounds":
        shapes.clear()
        pipe([given[0], given[1], given[0]])
        assert sorted(shapes) == [(1, 5000), (2, 4000)]


def test_another_rate_is_said_once(opened: Callable[[str], Any], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = compiler.pipeline("audio-classification", opened("sounds"))
    paths = [str(write(tmp_path / f"{n}.wav", tone(300 + 100 * n, 44100, 0.3), 44100)) for n in range(3)]
    with caplog.at_level(logging.WARNING, "compiler"):
        found = [*pipe(paths[:2]), pipe(paths[2])]
    assert [record.message for record in caplog.records] == [
        "audio-classification: sound at 44100 Hz is resampled to the model's 16000 Hz"
    ]
    sound, rate = audio.read(paths[1])
    resampled = audio.resample(sound, rate, 16000)
    agree(found[1], pipe(resampled))
    agree(found[1], pipe({"array": sound, "sampling_rate": 44100}))
    wrong = pipe(sound)  # at the rate that it is not
    assert abs(wrong[0]["score"] - found[1][0]["score"]) > 1e-4


def test_channels_are_mixed(opened: Callable[[str], Any], tmp_path: Path) -> None:
    pipe = compiler.pipeline("audio-classification", opened("sounds"))
    both = np.stack([tone(300, 16000), tone(500, 16000)], axis=1)
    stereo, mono = write(tmp_path / "stereo.wav", both), write(tmp_path / "mono.wav", both.mean(axis=1))
    left = write(tmp_path / "left.wav", both[:, 0])
    for one, other in zip(pipe(str(stereo), top_k=9), pipe(str(mono), top_k=9), strict=True):
        assert one["label"] == other["label"]
        assert one["score"] == pytest.approx(other["score"], abs=2e-3)  # rounded to 16 bits before and after
    assert abs(pipe(str(left))[0]["score"] - pipe(str(stereo))[0]["score"]) > 2e-3


NO_IMAGE = "not an image that can be read"


@pytest.mark.parametrize(
    ("name", "given", "options", "says"),
    [
        ("photos", b"", {}, NO_IMAGE),
        ("photos", b"a text", {}, NO_IMAGE),
        ("photos", "nowhere.jpg", {}, "nowhere.jpg: not an image that can be read ([Errno 2] No such file"),
        ("photos", 3, {}, "an input is int; give an image's path"),
        ("photos", np.zeros((4, 4)), {}, "an input is ndarray float64 [4, 4]; give an image's path"),
        ("photos", [], {}, "an empty batch"),
        ("photos", PICTURES[0], {"top_k": 0}, "top_k: 0"),
        ("photos", PICTURES[0], {"pool": True}, "no option 'pool'; it has top_k"),
        ("captions", PICTURES[0], {}, "candidate_labels are missing"),
        ("captions", PICTURES[0], {"candidate_labels": "boat"}, "candidate_labels: 'boat' is no list of texts"),
        ("captions", PICTURES[0], {"candidate_labels": []}, "candidate_labels: [] is no list of texts"),
        (
            "captions",
            PICTURES[0],
            {"candidate_labels": LABELS, "hypothesis_template": "a"},
            "hypothesis_template: 'a' has no {}",
        ),
        (
            "captions",
            PICTURES[0],
            {"candidate_labels": ["a", "tea " * 30]},
            "tokens, and the model has 24 positions; say less",
        ),
        ("captions", {"image": PICTURES[0]}, {}, "an input that is a mapping has image, and texts"),
        ("sounds", b"", {}, "not a sound that can be read (empty, or cut short)"),
        ("sounds", b"a text", {}, "not a sound that can be read"),
        ("sounds", PICTURES[0], {}, "not a sound that can be read"),
        ("sounds", "nowhere.wav", {}, "No such file"),
        ("sounds", np.zeros((2, 4000)), {}, "an input is ndarray float64 [2, 4000]; give a WAV file's path"),
        ("sounds", np.zeros(4000, dtype=np.int16), {}, "an input is ndarray int16 [4000]"),
        ("sounds", {"array": np.zeros(4000)}, {}, "sampling_rate: 0; a whole number of Hz"),
        ("sounds", {"sampling_rate": 16000}, {}, "an input is NoneType"),
        ("sounds", np.zeros(0), {}, "a sound is empty"),
        ("sounds", np.full(4000, np.nan), {}, "a sound is empty, or holds values that are no numbers"),
        ("sounds", np.zeros(80), {}, "a sound of 80 samples is too short: the model takes 105 or more"),
        ("speech", np.zeros(80), {}, "a sound of 80 samples is too short"),
        ("speech", sounds()[3], {"chunk_length_s": 0.1, "stride_length_s": 0.05}, "longer than both its overlaps"),
        ("speech", sounds()[3], {"chunk_length_s": -1}, "longer than both its overlaps"),
        ("speech", sounds()[3], {"chunk_length_s": "1"}, "chunk_length_s: '1' with stride_length_s None; both are numbers"),
    ],
)
def test_bad_input(
    opened: Callable[[str], Any], tmp_path: Path, name: str, given: Any, options: dict[str, Any], says: str
) -> None:
    if isinstance(given, bytes):
        (tmp_path / "given").write_bytes(given)
        given = str(tmp_path / "given")
    with pytest.raises(InputError) as caught:
        compiler.pipeline(None, opened(name))(given, **options)
    assert says in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "task"), [(n, t) for n, t in itertools.product(MEDIA, KINDS) if MEDIA[n][1] != KINDS[t].TASK]
)
def test_a_task_that_the_release_has_no_head_for(opened: Callable[[str], Any], name: str, task: str) -> None:
    with pytest.raises(InputError) as caught:
        compiler.pipeline(task, opened(name))
    assert f"{task}: {name} 1.0.0 has no head for it" in str(caught.value)
    assert str(caught.value).endswith(f"does {MEDIA[name][1]}")


@pytest.mark.parametrize(
    ("name", "file", "content", "says"),
    [
        ("photos", "preprocessor_config.json", None, "the release has no image processor (preprocessor_config.json)"),
        ("captions", "preprocessor_config.json", None, "the release has no image processor"),
        ("sounds", "preprocessor_config.json", None, "the release has no feature extractor"),
        ("photos", "preprocessor_config.json", b'{"image_processor_type": "NoSuch"}', "its image processor cannot be read"),
        ("sounds", "preprocessor_config.json", b"{", "its feature extractor cannot be read"),
        ("speech", "vocab.json", b"[", "its tokenizer cannot be read"),
    ],
)
def test_a_release_without_its_processor(
    media: Path, tmp_path: Path, name: str, file: str, content: bytes | None, says: str
) -> None:
    """Its hashes are right: it was made so."""
    from compiler.hashing import hash_file

    folder = Path(shutil.copytree(release_of(media, name), tmp_path / "release"))
    manifest, _ = read_release(folder)
    (folder / file).unlink()
    files = tuple(one for one in manifest.files if one.path != file)
    if content is not None:
        (folder / file).write_bytes(content)
        files = tuple(sorted((*files, hash_file(folder, file))))
    seal(folder, replace(manifest, files=files, read=None))
    with pytest.raises(ReleaseError) as caught:
        compiler.pipeline(None, folder, format="torchscript")
    assert says in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_pillow_is_missing(opened: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened("photos")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "PIL" else name)
    with pytest.raises(CompileError, match=r"needs pillow: pip install 'aot-model-compiler\[image\]'"):
        compiler.pipeline(None, model)


def test_texts_that_are_scored_apart(opened: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened("captions")
    monkeypatch.setattr(model.config, "model_type", "siglip")
    with pytest.raises(InputError, match="siglip scores each text alone"):
        compiler.pipeline(None, model)


def test_an_image_is_turned_as_its_camera_says(opened: Callable[[str], Any], tmp_path: Path) -> None:
    pipe = compiler.pipeline(None, opened("photos"))
    picture = image.read(PICTURES[0])
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    picture.rotate(180).save(tmp_path / "turned.png", exif=exif)
    agree(pipe(str(tmp_path / "turned.png")), pipe(picture))


NO_TORCH = """
import sys
sys.modules["torch"] = None
import compiler
folder, picture = sys.argv[1:]
print(compiler.pipeline(None, folder, format="onnx")(picture)[0]["label"])
"""


def test_without_torch(media: Path, opened: Callable[[str], Any]) -> None:
    """transformers' processors import torch where it is installed, and do without where it is not."""
    script = [sys.executable, "-c", NO_TORCH, str(release_of(media, "photos")), PICTURES[0]]
    ran = subprocess.run(script, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == compiler.pipeline(None, opened("photos"))(PICTURES[0])[0]["label"]
