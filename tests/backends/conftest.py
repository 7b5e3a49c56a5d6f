"""A small model in memory, for the formats' own tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compiler.backends import Backend
from compiler.config import ModelSpec, OnnxTargets, Targets
from compiler.sources import resolve
from compiler.stages.load import load
from compiler.stages.optimize import optimize
from compiler.types import Model, Target
from tests.zoo import save_checkpoint


def load_checkpoint(folder: Path, task: str = "feature-extraction") -> Model:
    targets = Targets(onnx=OnnxTargets(precisions=("fp32",)))
    spec = ModelSpec(name="tiny", release="1.0.0", source=f"path:{folder.name}", targets=targets)
    return load(resolve(spec, folder.parent), task)


def export(backend: Backend, out: Path, model: Model, target: Target) -> dict[str, Any]:
    """Optimize and export, as the stage does."""
    return backend.export(out, optimize(model, backend.FUSIONS), target)


@pytest.fixture(scope="session")
def model(bert: Path) -> Model:
    return load_checkpoint(bert)


@pytest.fixture(scope="session")
def mpnet(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """An encoder with relative positions in logarithmic buckets."""
    return load_checkpoint(save_checkpoint(tmp_path_factory.mktemp("mpnet"), "mpnet"))
