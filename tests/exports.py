"""Checkpoints of the zoo and what is exported from them, each made once for all tests that use it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from compiler.backends import BACKENDS
from compiler.build import _in_order
from compiler.config import ModelSpec, OnnxTargets, Targets
from compiler.hashing import hash_folder
from compiler.sources import resolve
from compiler.stages.export import export
from compiler.types import Artifact, Target
from tests.zoo import save_checkpoint


def shared(factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers have in common."""
    root = factory.getbasetemp()
    return root.parent if "PYTEST_XDIST_WORKER" in os.environ else root


class Exports:
    """A checkpoint, in `checkpoint`, and the artifacts that were exported from it so far. Read only: copy what you change."""

    def __init__(self, folder: Path, architecture: str, task: str, **config: Any) -> None:
        self.folder = folder
        self.name = architecture
        self.task = task
        self.spec = ModelSpec(
            name="zoo",
            release="1.0.0",
            source="path:checkpoint",
            targets=Targets(onnx=OnnxTargets(precisions=("fp32",))),
        )
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):
            if not (folder / "checkpoint").exists():
                save_checkpoint(folder / "new", architecture, task, **config).rename(folder / "checkpoint")
        self.snapshot = resolve(self.spec, folder)

    def export(self, target: Target) -> tuple[Path, Artifact]:
        """An artifact and the folder that its files are in, as the stage writes them."""
        backend = BACKENDS[target.format]
        out = self.folder / target.format / target.precision
        source = backend.PRECISIONS[target.precision]
        exported = None if source is None else self.export(Target(target.format, source))[0]
        out.parent.mkdir(exist_ok=True)
        with FileLock(f"{out}.lock"):
            if not out.exists():
                aside = out.with_name(f"{out.name}.new")
                shutil.rmtree(aside, ignore_errors=True)  # of a test that failed there
                aside.mkdir()
                export(aside, target, self.snapshot, self.task, {}, exported)
                aside.rename(out)
        files = _in_order(hash_folder(out), backend.files(target.precision))
        return out, Artifact(target.format, target.precision, files, backend.runtime(target.precision), key="")
