"""A small model in memory, for the formats' own tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from compiler.config import ModelSpec, OnnxTargets, Targets
from compiler.sources import resolve
from compiler.stages.load import load
from compiler.types import Model
from tests.zoo import save_checkpoint


def load_checkpoint(folder: Path, task: str = "feature-extraction") -> Model:
    targets = Targets(onnx=OnnxTargets(precisions=("fp32",)))
    spec = ModelSpec(name="tiny", release="1.0.0", source=f"path:{folder.name}", targets=targets)
    return load(resolve(spec, folder.parent), task)


@pytest.fixture(scope="session")
def model(bert: Path) -> Model:
    return load_checkpoint(bert)


@pytest.fixture(scope="session")
def mpnet(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """An encoder with relative positions in logarithmic buckets."""
    return load_checkpoint(save_checkpoint(tmp_path_factory.mktemp("mpnet"), "mpnet"))
