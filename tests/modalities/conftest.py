"""Checkpoints of images and sound, and how they are loaded in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from compiler.config import ModelSpec, OnnxTargets, Targets
from compiler.sources import resolve
from compiler.stages.load import load
from compiler.types import Model, Snapshot
from tests.zoo import ZOO, save_checkpoint


def found(folder: Path) -> Snapshot:
    targets = Targets(onnx=OnnxTargets(precisions=("fp32",)))
    return resolve(ModelSpec(name="a", release="1.0.0", source="path:.", targets=targets), folder)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A checkpoint of the zoo, made once. Read only: copy it before you change it."""
    made: dict[tuple[str, str], Path] = {}

    def save(name: str, task: str = "") -> Path:
        task = task or ZOO[name].tasks[0]
        if (name, task) not in made:
            made[name, task] = save_checkpoint(tmp_path_factory.mktemp(f"{name}-{task}"), name, task)
        return made[name, task]

    return save


@pytest.fixture(scope="session")
def loaded(saved: Callable[..., Path]) -> Callable[..., Model]:
    """A model of the zoo, loaded once."""
    models: dict[tuple[str, str], Model] = {}

    def get(name: str, task: str = "") -> Model:
        task = task or ZOO[name].tasks[0]
        if (name, task) not in models:
            models[name, task] = load(found(saved(name, task)), task)
        return models[name, task]

    return get
