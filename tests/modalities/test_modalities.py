"""What every modality must do: a task from a checkpoint's files, a signature with named axes, and samples that cover them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from compiler.config import ModelSpec, OnnxTargets, Targets
from compiler.errors import CompileError, ConfigError, SourceError
from compiler.modalities import MODALITIES
from compiler.plan import make_plan, read_texts
from compiler.sources import infer_task
from compiler.stages.load import load, signature
from compiler.tasks import TASKS, Modality
from compiler.types import Model
from tests.modalities.conftest import found
from tests.zoo import ZOO

OTHERS = [(name, task) for name, entry in ZOO.items() for task in entry.tasks if TASKS[task].modality != "text"]


def one_line(error: CompileError, *words: str) -> None:
    message = str(error)
    assert len(message.splitlines()) == 1
    assert [word for word in words if word not in message] == [], message


def spec(**keys: object) -> ModelSpec:
    targets = Targets(onnx=OnnxTargets(precisions=("fp32",)))
    return ModelSpec.model_validate({"name": "a", "release": "1.0.0", "source": "path:.", "targets": targets, **keys})


def test_modalities_of_tasks_are_the_table() -> None:
    assert set(get_args(Modality)) == set(MODALITIES) == {entry.modality for entry in TASKS.values()}


@pytest.mark.parametrize(("name", "task"), OTHERS)
def test_task_is_inferred_from_head_and_processor(saved: Callable[..., Path], name: str, task: str) -> None:
    assert infer_task(found(saved(name, task))) == task


AXES = {
    ("vit", "image-classification"): (["batch", 3, 32, 32], {"logits": ["batch", 9]}),
    ("vit", "image-feature-extraction"): (
        ["batch", 3, 32, 32],
        {"last_hidden_state": ["batch", 17, 32], "pooler_output": ["batch", 32]},
    ),
    ("resnet", "image-feature-extraction"): (
        ["batch", 3, "height", "width"],
        {
            "last_hidden_state": ["batch", 20, "feature_height", "feature_width"],
            "pooler_output": ["batch", 20, 1, 1],
        },
    ),
    ("convnext", "image-classification"): (["batch", 3, "height", "width"], {"logits": ["batch", 9]}),
    ("swin", "image-classification"): (["batch", 3, 32, 32], {"logits": ["batch", 9]}),
    ("wav2vec2", "automatic-speech-recognition"): (["batch", "samples"], {"logits": ["batch", "frames", 32]}),
    ("wav2vec2-lv60", "audio-classification"): (["batch", "samples"], {"logits": ["batch", 9]}),
    ("clip", "zero-shot-image-classification"): (
        ["texts", "sequence"],
        {
            "logits_per_image": ["batch", "texts"],
            "logits_per_text": ["texts", "batch"],
            "text_embeds": ["texts", 16],
            "image_embeds": ["batch", 16],
        },
    ),
    ("bert", "multiple-choice"): (["batch", "choices", "sequence"], {"logits": ["batch", "choices"]}),
}


@pytest.mark.parametrize(("name", "task"), AXES)
def test_axes_are_named(loaded: Callable[..., Model], name: str, task: str) -> None:
    made = signature(loaded(name, task))
    first, outputs = AXES[name, task]
    assert list(made.inputs[0].shape) == first
    assert {tensor.name: list(tensor.shape) for tensor in made.outputs} == outputs
    floats = {tensor.name for tensor in made.inputs if tensor.dtype == "float32"}
    assert floats == {"pixel_values", "input_values"} & {tensor.name for tensor in made.inputs}


@pytest.mark.parametrize(("name", "task"), AXES)
def test_samples_are_real_and_differ(loaded: Callable[..., Model], name: str, task: str) -> None:
    model = loaded(name, task)
    lines = read_texts(spec(), task, Path()).lines
    cases = MODALITIES[TASKS[task].modality].samples(model, lines, (1, 3), None).cases
    for number, axis in enumerate(next(iter(model.axes.values()))):
        sizes = {case.shape[number] for case in cases}
        assert (len(sizes) > 1) == isinstance(axis, str), (axis, sizes)
    for case in cases:
        assert list(case.inputs) == list(model.axes)
        for key, value in case.inputs.items():
            assert str(value.dtype) == str(model.example[key].dtype).removeprefix("torch."), key
            if len(value) > 1 and key in ("pixel_values", "input_values"):
                assert np.abs(value[0] - value[1]).max() > 0.1
            if key in ("pixel_values", "input_values"):
                assert value.std() > 0.05


@pytest.mark.parametrize(
    ("name", "task", "fitting"),
    [
        ("vit", "audio-classification", "image-classification"),
        ("vit", "feature-extraction", "image-feature-extraction"),
        ("vit", "zero-shot-image-classification", "image-classification"),
        ("wav2vec2", "image-classification", "automatic-speech-recognition"),
        ("wav2vec2", "text-classification", "audio-classification"),
        ("bert", "automatic-speech-recognition", "fill-mask"),
        ("bert", "image-feature-extraction", "feature-extraction"),
    ],
)
def test_a_task_that_the_checkpoint_has_no_head_for(
    saved: Callable[..., Path], tmp_path: Path, name: str, task: str, fitting: str
) -> None:
    with pytest.raises(SourceError) as caught:
        load(found(saved(name)), task)
    one_line(caught.value, f"no head for {task}", fitting)


def test_a_head_that_was_not_trained(saved: Callable[..., Path]) -> None:
    with pytest.raises(SourceError) as caught:
        load(found(saved("vit", "image-feature-extraction")), "image-classification")
    one_line(caught.value, "classifier", "not trained for image-classification")


@pytest.mark.parametrize(
    ("name", "other", "word"),
    [("vit", None, "image processor"), ("vit", "wav2vec2", "image processor"), ("wav2vec2", "vit", "feature extractor")],
)
def test_no_processor(saved: Callable[..., Path], tmp_path: Path, name: str, other: str | None, word: str) -> None:
    folder = Path(shutil.copytree(saved(name), tmp_path / "copy"))
    (folder / "preprocessor_config.json").unlink()
    if other:
        shutil.copyfile(saved(other) / "preprocessor_config.json", folder / "preprocessor_config.json")
    with pytest.raises(SourceError) as caught:
        make_plan(spec(task=ZOO[name].tasks[0]), found(folder), tmp_path)
    one_line(caught.value, word, "preprocessor_config.json")


@pytest.mark.parametrize("content", ["", "[]", "{", "null", '{"image_processor_type": "NoSuch", "size": 3}'])
def test_a_processor_that_is_garbage(saved: Callable[..., Path], tmp_path: Path, content: str) -> None:
    folder = Path(shutil.copytree(saved("vit"), tmp_path / "copy"))
    (folder / "preprocessor_config.json").write_text(content)
    with pytest.raises(SourceError) as caught:
        load(found(folder), "image-classification")
    one_line(caught.value, "processor")


def test_speech_without_its_vocabulary(saved: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved("wav2vec2"), tmp_path / "copy"))
    (folder / "vocab.json").unlink()
    with pytest.raises(SourceError) as caught:
        make_plan(spec(), found(folder), tmp_path)
    one_line(caught.value, "no tokenizer")


def test_images_beside_text_are_no_text(saved: Callable[..., Path]) -> None:
    with pytest.raises(SourceError) as caught:
        load(found(saved("clip")), "feature-extraction")
    one_line(caught.value, "images beside text", "zero-shot-image-classification")


def test_both_halves_of_a_processor_in_one_file(saved: Callable[..., Path], tmp_path: Path) -> None:
    """transformers 5 saves a processor of several parts as processor_config.json."""
    folder = Path(shutil.copytree(saved("clip"), tmp_path / "copy"))
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(
        json.dumps({"processor_class": "CLIPProcessor", "image_processor": settings})
    )
    assert infer_task(found(folder)) == "zero-shot-image-classification"
    before, after = (load(found(path), "zero-shot-image-classification") for path in (saved("clip"), folder))
    assert (before.example["pixel_values"] == after.example["pixel_values"]).all()


def test_pillow_is_missing(saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        make_plan(spec(), found(saved("vit")), Path())
    one_line(caught.value, "pillow", "pip install 'aot-model-compiler[image]'")


@pytest.mark.parametrize("name", ["vit", "wav2vec2"])
def test_sequences_are_of_text(loaded: Callable[..., Model], name: str) -> None:
    model = loaded(name)
    lines = read_texts(spec(), model.task, Path()).lines
    with pytest.raises(ConfigError) as caught:
        MODALITIES[TASKS[model.task].modality].samples(model, lines, (1,), (16,))
    one_line(caught.value, "shapes.sequence", "leave it out")


class TestData:
    def test_files_are_found_beside_the_data_and_hashed(self, tmp_path: Path) -> None:
        (tmp_path / "data" / "in").mkdir(parents=True)
        (tmp_path / "data" / "in" / "a.png").write_bytes(b"x")
        (tmp_path / "data" / "lines.jsonl").write_text('{"image": "in/a.png"}\n')
        texts = read_texts(spec(data={"validation": {"path": "data/lines.jsonl"}}), "image-classification", tmp_path)
        assert texts.lines == ((str(tmp_path / "data" / "in" / "a.png"),),)
        assert texts.files == {"in/a.png": "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"}

    def test_another_image_under_the_same_name_is_another_build(self, saved: Callable[..., Path], tmp_path: Path) -> None:
        (tmp_path / "lines.jsonl").write_text('{"image": "a.png"}\n')
        keys = []
        for content in (b"x", b"y"):
            (tmp_path / "a.png").write_bytes(content)
            plan = make_plan(spec(data={"validation": {"path": "lines.jsonl"}}), found(saved("vit")), tmp_path)
            keys.append(plan.load.key)
        assert keys[0] != keys[1]

    def test_files_of_one_name_in_different_folders(self, tmp_path: Path) -> None:
        hashes = []
        for second in (b"y", b"z"):
            for folder, content in (("one", b"x"), ("two", second)):
                (tmp_path / folder).mkdir(exist_ok=True)
                (tmp_path / folder / "a.png").write_bytes(content)
            lines = "".join(json.dumps({"image": str(tmp_path / folder / "a.png")}) + "\n" for folder in ("one", "two"))
            (tmp_path / "lines.jsonl").write_text(lines)
            texts = read_texts(spec(data={"validation": {"path": "lines.jsonl"}}), "image-classification", tmp_path)
            assert list(texts.files) == ["a.png"]
            hashes.append(texts.files["a.png"])
        assert hashes[0] != hashes[1]

    @pytest.mark.parametrize(
        ("line", "task"),
        [('{"image": "gone.png"}', "image-classification"), ('{"audio": "gone.wav"}', "audio-classification")],
    )
    def test_a_file_that_is_not_there(self, tmp_path: Path, line: str, task: str) -> None:
        (tmp_path / "lines.jsonl").write_text(line)
        with pytest.raises(ConfigError) as caught:
            read_texts(spec(data={"validation": {"path": "lines.jsonl"}}), task, tmp_path)
        one_line(caught.value, "gone", "No such file", "relative to the data file")

    def test_different_numbers_of_choices(self, tmp_path: Path) -> None:
        (tmp_path / "lines.jsonl").write_text(
            '{"text": "a", "choices": ["b", "c"]}\n{"text": "a", "choices": ["b", "c", "d"]}'
        )
        with pytest.raises(ConfigError) as caught:
            read_texts(spec(data={"validation": {"path": "lines.jsonl"}}), "multiple-choice", tmp_path)
        one_line(caught.value, "numbers of choices")
