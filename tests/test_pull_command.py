"""`compile pull` into places where no release can appear: one line, with the user's own path, before anything is sent."""

from __future__ import annotations

import subprocess
from pathlib import Path

from compiler.stages.publish import push
from tests.conftest import Command, error_line
from tests.registries.conftest import make_release
from tests.test_store import small_disk


def published(folder: Path) -> str:
    make_release(folder / "release")
    push(folder / "release", (folder / "registry").as_uri())
    return f"{(folder / 'registry').as_uri()}@1.0.0"


def test_a_mount_point(command: Command, tmp_path: Path) -> None:
    url = published(tmp_path)
    with small_disk(tmp_path / "disk", "1m") as disk:
        line = error_line(command("pull", url, disk))
        instead = "in whose place no folder can be put; give a folder in it, such as"
        assert line == f"error: {disk}: is a mount point, {instead} {disk}/release"
        assert list(disk.iterdir()) == []
        assert command("pull", url, disk / "release").returncode == 0


def test_a_place_that_is_read_only(command: Command, tmp_path: Path) -> None:
    url = published(tmp_path)
    with small_disk(tmp_path / "disk", "1m") as disk:
        assert command("pull", url, "disk/there").returncode == 0
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        line = error_line(command("pull", url, "disk/new/release"))
        instead = "give a folder where you can write"
        assert line == f"error: disk/new/release: cannot be made, since {disk} cannot be written; {instead}"
        assert "are there already" in command("pull", url, "disk/there").stdout
