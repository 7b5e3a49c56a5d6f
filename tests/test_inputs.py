"""Releases of images, sound and choices, opened: called as the originals, and what they refuse."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import compiler
from compiler import runtime
from compiler.errors import InputError
from compiler.modalities import audio, image
from compiler.runtime import CompiledModel
from tests.releases import MEDIA, PICTURES, RECORDINGS, release_of

pytestmark = pytest.mark.usefixtures("plain_torchscript")

Open = Callable[..., CompiledModel]
PIXELS = np.random.default_rng(3).standard_normal((2, 3, 32, 32), dtype=np.float32)
SOUND = np.random.default_rng(3).standard_normal((2, 4000), dtype=np.float32)
IDS = np.array([[2, 20, 30, 40, 3], [2, 21, 3, 0, 0], [2, 50, 60, 3, 0]])
MASK = (IDS != 0).astype(np.int64)


@pytest.fixture(scope="session")
def opened(media: Path) -> Open:
    return functools.cache(lambda name, format="torchscript": compiler.load(release_of(media, name), format, threads=1))


@pytest.fixture(scope="session")
def eager(media: Path) -> Callable[[str], Any]:
    """The untouched checkpoint, by transformers."""
    from optimum.exporters.tasks import TasksManager

    from compiler.tasks import TASKS

    def load(name: str) -> Any:
        architecture, task = MEDIA[name][:2]
        automatic = TasksManager.get_model_class_for_task(
            task, model_type=architecture.partition("-")[0], model_class_name=TASKS[task].auto, library="transformers"
        )
        return automatic.from_pretrained(media / name).eval()

    return functools.cache(load)


@functools.cache
def given(media: Path, name: str) -> dict[str, np.ndarray]:
    """Real inputs of a release, by transformers' classes and the checkpoint's own files."""
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer

    if name in ("sounds", "speech"):
        extractor = AutoFeatureExtractor.from_pretrained(media / name)
        lengths = (8000, 5000) if name == "speech" else (6000, 6000)
        sounds = [audio.read(path)[0][:length] for path, length in zip(RECORDINGS, lengths, strict=False)]
        return dict(extractor(sounds, sampling_rate=16000, padding=True, return_tensors="np"))
    if name == "choices":
        return {"input_ids": np.stack([IDS, IDS[::-1]]), "attention_mask": np.stack([MASK, MASK[::-1]])}
    processor = AutoImageProcessor.from_pretrained(media / name, backend="pil")
    made = dict(processor([image.read(path) for path in PICTURES[:3]], return_tensors="np"))
    if name == "captions":
        tokenizer = AutoTokenizer.from_pretrained(media / name)
        texts = tokenizer(["a boat", "a red house"], padding=True, return_tensors="np")
        made |= {part: texts[part] for part in ("input_ids", "attention_mask")}
    return made


@pytest.mark.parametrize(("name", "format"), [*((name, "torchscript") for name in MEDIA), ("photos", "onnx")])
def test_is_called_as_the_original(media: Path, opened: Open, eager: Callable[[str], Any], name: str, format: str) -> None:
    import torch

    inputs = given(media, name)
    tensors = {part: torch.from_numpy(value) for part, value in inputs.items()}
    with torch.no_grad():
        answer = eager(name)(**tensors)
    expected = {part: value.numpy() for part, value in answer.items() if isinstance(value, torch.Tensor)}
    model = opened(name, format)
    arrays, as_tensors = model(**inputs), model(**tensors, return_dict=True)
    assert list(arrays) == list(as_tensors) == list(expected)
    real = {}
    if name == "speech":  # behind a sound is only padding
        real = {"logits": np.arange(arrays.logits.shape[1])[None] < np.array([[198], [123]])}
    for part, value in expected.items():
        assert isinstance(as_tensors[part], torch.Tensor)
        np.testing.assert_array_equal(arrays[part], as_tensors[part].numpy())
        chosen = real.get(part, slice(None))
        np.testing.assert_allclose(arrays[part][chosen], value[chosen], atol=2e-4 * max(1, np.abs(value).max()))


def test_ways_to_call(opened: Open, eager: Callable[[str], Any]) -> None:
    photos, speech, sounds = opened("photos"), opened("speech"), opened("sounds")
    named = photos(pixel_values=PIXELS)
    for other in (
        photos(PIXELS),
        photos(PIXELS.astype(np.float64)),
        photos(PIXELS.tolist()),
        photos(PIXELS, interpolate_pos_encoding=False, labels=None),
    ):
        np.testing.assert_array_equal(other.logits, named.logits)
    # A mask that is left out is of ones; one that the model lacks may be of ones, as transformers' pipelines give it.
    ones = np.ones(SOUND.shape, dtype=np.int64)
    np.testing.assert_array_equal(speech(SOUND).logits, speech(SOUND, attention_mask=ones).logits)
    np.testing.assert_array_equal(sounds(SOUND).logits, sounds(SOUND, attention_mask=ones).logits)
    assert opened("choices")(np.stack([IDS, IDS])).logits.shape == (2, 3)
    assert opened("patches")(np.zeros((1, 3, 64, 96), dtype=np.float32)).last_hidden_state.shape == (1, 20, 2, 3)


@pytest.mark.parametrize(
    ("name", "inputs", "says"),
    [
        ("photos", {}, "no pixel_values are given"),
        ("photos", {"pixel_values": PIXELS[0]}, "has shape (3, 32, 32); the model takes [batch, 3, 32, 32]"),
        ("photos", {"pixel_values": PIXELS[..., :31]}, "has shape (2, 3, 32, 31); the model takes [batch, 3, 32, 32]"),
        ("photos", {"pixel_values": PIXELS[:, :1]}, "has shape (2, 1, 32, 32)"),
        ("photos", {"pixel_values": (PIXELS * 50).astype(np.uint8)}, "is uint8, and the model takes floats"),
        ("photos", {"pixel_values": PIXELS[:0]}, "an empty batch: pixel_values has shape (0, 3, 32, 32)"),
        ("photos", {"input_ids": IDS}, "input_ids: the compiled model does not take it; it takes pixel_values"),
        ("photos", {"pixel_values": PIXELS, "attention_mask": MASK}, "attention_mask: the compiled model does not take it"),
        ("patches", {"pixel_values": PIXELS[:, :, :0]}, "an empty batch"),
        ("sounds", {"input_values": SOUND[0]}, "has shape (4000,); the model takes [batch, samples]"),
        ("sounds", {"input_values": (SOUND * 99).astype(np.int16)}, "is int16, and the model takes floats"),
        ("sounds", {"input_values": SOUND[:, :0]}, "an empty batch"),
        ("sounds", {"input_values": SOUND[:, :104]}, "a sound of 104 samples is too short: the model takes 105 or more"),
        ("sounds", {"input_values": SOUND, "attention_mask": np.zeros((2, 4000), dtype=int)}, "the compiled model has none"),
        ("sounds", {"input_values": SOUND, "attention_mask": MASK}, "attention_mask: has shape (3, 5)"),
        ("speech", {"input_values": SOUND, "attention_mask": np.ones((2, 3999), dtype=int)}, "attention_mask as input_values"),
        ("speech", {"input_values": SOUND, "attention_mask": np.full((2, 4000), 2)}, "something else than 0 and 1"),
        ("speech", {"input_values": SOUND, "attention_mask": np.eye(2, 4000, dtype=int)}, "a sound of 1 samples is too short"),
        ("captions", {"input_ids": IDS}, "no pixel_values are given"),
        ("captions", {"pixel_values": PIXELS}, "no input_ids are given"),
        ("captions", {"input_ids": IDS * 100, "pixel_values": PIXELS}, "is no token of the model, which has 300"),
        ("captions", {"input_ids": np.ones((1, 25), dtype=int), "pixel_values": PIXELS}, "the model has 24 positions"),
        ("captions", {"input_ids": IDS, "pixel_values": PIXELS, "attention_mask": MASK[:2]}, "attention_mask as input_ids"),
        ("choices", {"input_ids": IDS}, "has shape (3, 5); the model takes [batch, choices, sequence]"),
    ],
)
def test_bad_input(opened: Open, name: str, inputs: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as caught:
        opened(name)(**inputs)
    assert says in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_an_empty_answer_is_none(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenVINO answers to a sound that is too short with nothing, and not all configs tell how short that is."""
    model = opened("sounds")
    monkeypatch.setattr(runtime, "check_length", lambda inputs, config: None)
    monkeypatch.setattr(model, "_run", lambda inputs: {"logits": np.zeros((0, 9), dtype=np.float32)})
    with pytest.raises(InputError, match=r"logits: the model has none for a batch of input_values \[2, 10\]"):
        model(SOUND[:, :10])


def test_a_batch_over_memory(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "available_memory", lambda: 10)
    for name, inputs, says in (
        ("photos", {"pixel_values": PIXELS}, r"pixel_values \[2, 3, 32, 32\]"),
        ("captions", {"pixel_values": PIXELS, "input_ids": IDS}, r"input_ids \[3, 5\] and pixel_values \[2, 3, 32, 32\]"),
        ("speech", {"input_values": SOUND}, r"input_values \[2, 4000\]"),
    ):
        with pytest.raises(InputError, match=f"a batch of {says} does not fit into memory"):
            opened(name)(**inputs)


ALONE = """
import sys
import numpy as np
import compiler
model = compiler.load(sys.argv[1], "onnx")
print(model(pixel_values=np.zeros((2, 3, 32, 32), dtype=np.float32)).logits.shape, model.config.id2label[1])
print(sorted({"torch", "transformers"} & set(sys.modules)))
"""


def test_opens_without_torch(media: Path) -> None:
    script = [sys.executable, "-c", ALONE, str(release_of(media, "photos"))]
    ran = subprocess.run(script, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == ["(2, 9) LABEL_1", "[]"]
