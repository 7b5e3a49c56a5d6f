"""The hub of `server.py` as a process of its own, and fixtures that start it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from compiler.registries import transfer
from tests.ports import free_port

ROOT = Path(__file__).parents[3]


class HubProcess:
    """The hub's process. It may be killed and started again, with the same addresses and what it holds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port, self.storage_port = free_port(), free_port()
        self.start()

    def start(self) -> None:
        command = [
            sys.executable,
            "-m",
            "tests.registries.hub.server",
            str(self.folder),
            str(self.port),
            str(self.storage_port),
        ]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        end = time.monotonic() + 20
        while time.monotonic() < end:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            time.sleep(0.02)
        raise AssertionError("the hub does not start")

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def storage_url(self) -> str:
        return f"http://127.0.0.1:{self.storage_port}"

    def set(self, **settings: Any) -> None:
        aside = self.folder / "settings.new"
        aside.write_text(json.dumps(settings))
        os.replace(aside, self.folder / "settings.json")

    def requests(self, method: str = "", path: str = "") -> list[dict[str, Any]]:
        try:
            lines = (self.folder / "requests.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        every = [json.loads(line) for line in lines]
        return [request for request in every if method in request["method"] and path in request["path"]]

    def forget(self) -> None:
        """Forget the requests, and what the hub was told to do."""
        self.set()
        (self.folder / "requests.jsonl").unlink(missing_ok=True)

    def there(self, url: str) -> bool:
        return (self.folder / url.removeprefix("hf://")).exists()

    def state(self, url: str) -> dict[str, Any]:
        state: dict[str, Any] = json.loads((self.folder / url.removeprefix("hf://") / "repo.json").read_bytes())
        return state

    def files(self, url: str, revision: str) -> dict[str, Any]:
        state = self.state(url)
        commit = state["tags"].get(revision) or state["branches"][revision]
        files: dict[str, Any] = state["commits"][commit]["files"]
        return files

    def content(self, url: str, entry: dict[str, Any]) -> Path:
        """Where the content of one of `files` lies."""
        place = self.folder / url.removeprefix("hf://")
        return place / "objects" / str(entry["lfs"]["oid"]) if "lfs" in entry else place / "blobs" / str(entry["oid"])


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubProcess]:
    server = HubProcess(tmp_path_factory.mktemp("hub"))
    yield server
    server.stop()


@pytest.fixture
def hub(server: HubProcess, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubProcess]:
    """The hub, without what earlier tests told it, and a login that may do everything."""
    server.forget()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    if server.process.poll() is not None:
        server.start()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries follow each other without the pauses, in our own code and in the library."""
    from huggingface_hub.utils import _http

    monkeypatch.setattr(transfer, "DELAYS", (0.0, 0.0, 0.0, 0.0))
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None))


@pytest.fixture
def url(request: pytest.FixtureRequest) -> str:
    """A repository for a test alone."""
    return f"hf://org/{request.node.name.partition('[')[0].replace('_', '-')}-{os.urandom(3).hex()}"
