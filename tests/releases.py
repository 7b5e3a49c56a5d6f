"""Small releases of every task, built once for all tests that use them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock

from compiler.plan import BUILTIN_TEXT, PACKAGE
from compiler.tasks import TASKS
from tests.exports import shared
from tests.zoo import save_checkpoint

TEXTS = [value for line in BUILTIN_TEXT.read_text().splitlines() for value in json.loads(line).values()]
# Without what is longer than the 64 tokens that the models take.
ODD = ["", "Zürich ẞß is é, 中文 here!", "naïve co-operation e.g. U.S.A's"]
SHORT = [*[text for text in TEXTS if 0 < len(text) < 60][:24], *ODD]
TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC", "B-ORG", "I-ORG", "B-MISC", "I-MISC")
TOPICS = ("sport", "trade", "music")
EVERY = {"torchscript": ["fp32"], "onnx": ["fp32"], "openvino": ["fp32", "bf16"]}
FAST: dict[str, Any] = {"torchscript": ["fp32"]}


def _labels(names: tuple[str, ...]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}


# By name: architecture, task, changes of its config, targets.
MODELS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "features": ("bert", "feature-extraction", {}, EVERY),
    "classes": ("bert", "text-classification", {}, FAST),
    "topics": (
        "roberta",
        "text-classification",
        {"problem_type": "multi_label_classification", "num_labels": 3, **_labels(TOPICS)},
        FAST,
    ),
    "entities": ("distilbert", "token-classification", _labels(TAGS), FAST),
    "answers": ("bert", "question-answering", {}, FAST),
    "masks": ("roberta", "fill-mask", {}, FAST),
}
# Of images, sound and choices. `speech` has a mask, `sounds` has none.

MEDIA: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "photos": ("vit", "image-classification", {}, {**FAST, "onnx": ["fp32"]}),
    "patches": ("resnet", "image-feature-extraction", {}, FAST),
    "captions": ("clip", "zero-shot-image-classification", {}, FAST),
    "sounds": ("hubert", "audio-classification", {}, FAST),
    "speech": ("wav2vec2-lv60", "automatic-speech-recognition", {}, FAST),
    "choices": ("bert", "multiple-choice", {}, FAST),
}
PICTURES = sorted(map(str, (PACKAGE / "data/images").glob("*.jpg")))
RECORDINGS = sorted(map(str, (PACKAGE / "data/sounds").glob("*.wav")))


def _build(folder: Path, chosen: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]]) -> None:
    from tests.conftest import run_command

    models = []
    for name, (architecture, task, changes, targets) in chosen.items():
        save_checkpoint(folder / name, architecture, task, **changes)
        about = {"name": name, "release": "1.0.0", "source": f"path:{name}", "task": task, "targets": targets}
        shapes = {"batch": [1, 3], "sequence": [16, 33]} if TASKS[task].modality == "text" else {"batch": [1, 3]}
        models.append({**about, "shapes": shapes})
    if "features" in chosen:
        add_sentence_files(folder / "features")
    pipeline = folder / "pipeline.yaml"
    pipeline.write_text(yaml.safe_dump({"schema": 1, "output": "artifacts", "models": models}))
    built = run_command(folder, folder / "cache", pipeline)
    assert built.returncode == 0, built.stderr


def add_sentence_files(folder: Path, **pooling: bool) -> None:
    """sentence-transformers' files: mean pooling unless said, normalized, at most 32 tokens."""
    modules = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    kinds = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (kind, path) in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(kinds))
    (folder / "1_Pooling").mkdir()
    modes = pooling or {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    (folder / "1_Pooling/config.json").write_text(json.dumps({"word_embedding_dimension": 32, **modes}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 32, "do_lower_case": False}))


@pytest.fixture(scope="session")
def releases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints of `MODELS` and, in `artifacts/<name>/1.0.0`, their releases. Read only."""
    return _built_once(tmp_path_factory, "releases", MODELS)


@pytest.fixture(scope="session")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of `MEDIA`."""
    return _built_once(tmp_path_factory, "media", MEDIA)


def _built_once(
    factory: pytest.TempPathFactory, name: str, chosen: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]]
) -> Path:
    root = shared(factory)  # the first worker builds for all
    folder = root / name
    with FileLock(root / f"{name}.lock"):
        if not (folder / "built").exists():
            folder.mkdir()
            _build(folder, chosen)
            (folder / "built").touch()
    return folder


def release_of(releases: Path, name: str) -> Path:
    return releases / "artifacts" / name / "1.0.0"


@pytest.fixture
def plain_torchscript() -> Iterator[None]:
    """TorchScript optimizes for each new shape, which takes far longer than these tiny models do."""
    import torch

    with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
        yield
