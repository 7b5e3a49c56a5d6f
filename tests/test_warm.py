"""Commands that start warm do what those that start cold do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ENVIRONMENT, Command, write_pipeline
from tests.warm import inherited


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a new process, whatever libraries have set in this one since."""
    for name in inherited(os.environ).keys() - ENVIRONMENT.keys():
        monkeypatch.delenv(name)


def test_as_cold(command: Command, tmp_path: Path) -> None:
    (tmp_path / "here.yaml").write_text("schema: 2\n")
    for arguments in (["here.yaml"], ["--version"], ["verify", "a", "b", "--numerics", "c"], ["schema"]):
        warm, cold = command(*arguments), command(*arguments, cold=True)
        assert (warm.args[0], cold.args[0]) == ("compile", sys.executable)
        assert (warm.returncode, warm.stdout, warm.stderr) == (cold.returncode, cold.stdout, cold.stderr)
        assert warm.stdout + warm.stderr


def test_an_environment_of_its_own_starts_cold(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command("--version").args[0] == "compile"
    assert command("--version", environment={"OMP_NUM_THREADS": "7"}).args[0] == sys.executable
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert command("--version").args[0] == sys.executable


def test_one_that_takes_too_long_is_killed(command: Command, tmp_path: Path, bert: Path) -> None:
    pipeline = write_pipeline(tmp_path, bert)
    with pytest.raises(subprocess.TimeoutExpired):
        command(pipeline, timeout=0.01)
    assert not (tmp_path / "artifacts/tiny").exists()
    assert command("--version").returncode == 0
