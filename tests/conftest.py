"""Fixtures that several tests share. Checkpoints are tiny, random and seeded; the command runs as users run it."""

from __future__ import annotations

import atexit
import functools
import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from compiler.manifest import MANIFEST, SUMS, Manifest, sums, to_bytes
from tests.exports import Exports, shared
from tests.releases import media as media  # fixtures
from tests.releases import plain_torchscript as plain_torchscript
from tests.releases import releases as releases
from tests.warm import Warm, inherited
from tests.zoo import save_checkpoint

# As in the workers (see `compiler.preload`): tracing makes millions of objects that live on.
gc.set_threshold(200_000, 20, 100)
# Nor does a test report its use of OpenVINO to OpenVINO's makers, which takes it seconds.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
ENVIRONMENT = dict(os.environ)
# What libraries set in a process that uses them (transformers' pipelines, OpenVINO's converter); no command gets it from here.
SET_BY_LIBRARIES = ("TOKENIZERS_PARALLELISM", "TF_CPP_MIN_LOG_LEVEL", "KMP_DUPLICATE_LIB_OK", "CUBLAS_WORKSPACE_CONFIG")

Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT encoder with its tokenizer. Read only: copy it before you change it."""
    return save_checkpoint(tmp_path_factory.mktemp("bert"), "bert")


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Exports]:
    """A checkpoint of the zoo, by its architecture and task, and its artifacts, each made once. Read only."""

    def find(architecture: str, task: str = "feature-extraction") -> Exports:
        return Exports(shared(tmp_path_factory) / "zoo" / f"{architecture}-{task}", architecture, task)

    return find


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage cache for tests that do not look at the cache."""
    return tmp_path_factory.mktemp("cache")


@functools.cache
def _warm() -> Warm:
    warm = Warm(ENVIRONMENT)
    atexit.register(warm.close)
    return warm


def run_command(
    folder: Path,
    cache: Path,
    *arguments: object,
    environment: dict[str, str] | None = None,
    timeout: float = 300,
    cold: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run `compile ARGUMENTS` in a folder, with a stage cache, and return what it printed and its exit code.

    It starts `cold`, with a new interpreter and a new server of jobs, where it is told so or has an environment of its own;
    else warm (see `tests.warm`).
    """
    ours = {name: value for name, value in os.environ.items() if name in ENVIRONMENT or name not in SET_BY_LIBRARIES}
    full = {**ours, "COMPILE_CACHE_DIR": str(cache), **(environment or {})}
    if not cold and inherited(full) == inherited(ENVIRONMENT):
        return _warm().run([*map(str, arguments)], folder, full, timeout)
    return subprocess.run(
        [sys.executable, "-m", "compiler", *map(str, arguments)],
        cwd=folder,
        env=full,
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
        check=False,
    )


@pytest.fixture
def command(tmp_path: Path, shared_cache: Path) -> Command:
    """`run_command` in `tmp_path`; `cache` is the stage cache, `environment` adds variables, `cold` starts anew."""

    def run(*arguments: object, cache: Path = shared_cache, **options: Any) -> subprocess.CompletedProcess[str]:
        return run_command(tmp_path, cache, *arguments, **options)

    return run


def build_folder(folder: Path, checkpoint: Path, **changes: Any) -> Path:
    """Put a copy of a checkpoint, a pipeline with `changes`, a cache and the release that is built of them into a folder."""
    shutil.copytree(checkpoint, folder / "checkpoint")
    pipeline = write_pipeline(folder, "path:checkpoint", **changes)
    result = run_command(folder, folder / "cache", pipeline)
    assert result.returncode == 0, result.stderr
    return folder


def write_pipeline(folder: Path, source: Path | str, /, **changes: Any) -> Path:
    """Write a pipeline.yaml for one small model; `changes` replace or add keys of the model, None removes one."""
    model: dict[str, Any] = {
        "name": "tiny",
        "release": "1.0.0",
        "source": source if isinstance(source, str) else f"path:{source}",
        "shapes": {"batch": [1, 3], "sequence": [16, 33]},
        "targets": {"torchscript": ["fp32"]},
    }
    model |= changes
    document = {"schema": 1, "output": "artifacts", "models": [{k: v for k, v in model.items() if v is not None}]}
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def seal(folder: Path, manifest: Manifest) -> None:
    """Write a release's manifest.json, and the SHA256SUMS that belong to it."""
    content = to_bytes(manifest)
    (folder / MANIFEST).write_bytes(content)
    (folder / SUMS).write_bytes(sums(manifest, content))


def error_line(result: subprocess.CompletedProcess[str]) -> str:
    """The one line that an expected failure prints. Fails when there is another exit code, a traceback or more lines."""
    assert result.returncode == 1, (result.returncode, result.stdout, result.stderr)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    return errors[0]
