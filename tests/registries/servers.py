"""docker-registry, the real one, on the loopback: started, killed and started again on the same port and storage."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from tests.debian import MISSING, program
from tests.ports import free_port


class DockerRegistry:
    """A context manager. `storage` has the blobs as files; `config` replaces or adds parts of the server's configuration."""

    def __init__(self, folder: Path, config: Mapping[str, Any] | None = None, tls: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.storage = folder / "storage"
        self.host = f"127.0.0.1:{free_port()}"
        self._process: subprocess.Popen[bytes] | None = None
        body = {
            "version": "0.1",
            "log": {"level": "error", "accesslog": {"disabled": True}},
            "storage": {"filesystem": {"rootdirectory": str(self.storage)}},
            "http": {"addr": self.host, "secret": "the same after a restart", **({"tls": tls} if tls else {})},
            **(config or {}),
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yml").write_text(json.dumps(body), encoding="utf-8")  # JSON is YAML

    @property
    def url(self) -> str:
        return f"http://{self.host}"

    def start(self) -> None:
        server = program("docker-registry")
        assert server is not None, MISSING.format("docker-registry")
        with open(self.folder / "log", "ab") as log:
            self._process = subprocess.Popen(
                [server, "serve", str(self.folder / "config.yml")], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        for _ in range(500):
            try:
                urllib.request.urlopen(f"{self.url}/v2/", timeout=5).close()
                return
            except urllib.error.HTTPError:  # it wants a login: it is there
                return
            except OSError:
                assert self._process.poll() is None, (self.folder / "log").read_text(encoding="utf-8")
                time.sleep(0.01)
        raise AssertionError("docker-registry does not answer")

    def kill(self) -> None:
        """As a crash or a loss of power does, in the middle of whatever it does."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def blob(self, digest: str) -> Path:
        """The file that holds a blob."""
        return self.storage / "docker" / "registry" / "v2" / "blobs" / "sha256" / digest[:2] / digest / "data"
