"""A model hub on this machine that speaks as much of the Hugging Face Hub's protocol as a download needs.

    with Hub() as hub:
        commit = hub.add("org/name", {"config.json": b"{}"}, branches=("main",))
        command("plan", environment=hub.environment(tmp_path))

Every request is kept in `hub.requests`; `hub.status` makes it answer all of them with an error.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote, urlsplit


@dataclass(frozen=True)
class Request:
    """What was asked for. `token` is the bearer token that came with it."""

    method: str
    path: str
    token: str | None


@dataclass
class Repository:
    """Files by commit, and the commits that branches and tags stand for. Files of a gated one need a token."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False


class Hub:
    """The server; a context manager. It may be stopped and started again, on the same port."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.status: int | None = None
        self.body: bytes | None = None
        self._port = 0
        self._server: ThreadingHTTPServer | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> None:
        hub = self

        class Handler(_Handler):
            owner = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        self._server.daemon_threads = True
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def environment(self, folder: Path, token: str | None = None) -> dict[str, str]:
        """The variables that send a process to this hub, with its cache in a folder."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(folder / "hf"),
            "HF_HUB_CACHE": str(folder / "hf" / "hub"),
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": token or "",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def add(
        self, name: str, files: Mapping[str, bytes] | Path, branches: Iterable[str] = ("main",), gated: bool = False
    ) -> str:
        """Commit files, or a folder's, to a repository: the commit, which is what the branches now stand for."""
        if isinstance(files, Path):
            folder = files
            files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        repository = self.repositories.setdefault(name, Repository())
        described = f"{name} {len(repository.commits)} {sorted((key, _etag(value)) for key, value in files.items())}"
        commit = hashlib.sha256(described.encode()).hexdigest()[:40]
        repository.commits[commit] = dict(files)
        repository.branches |= dict.fromkeys(branches, commit)
        repository.gated = gated
        return commit

    def fetched(self) -> set[str]:
        """The names of the files whose content was sent."""
        paths = [request.path for request in self.requests if request.method == "GET" and "/resolve/" in request.path]
        return {path.partition("/resolve/")[2].partition("/")[2] for path in paths}


def _etag(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:40]


class _Handler(BaseHTTPRequestHandler):
    owner: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the requests are kept."""

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path).lstrip("/")
        _, _, token = self.headers.get("Authorization", "").partition("Bearer ")
        hub = self.owner
        hub.requests.append(Request(self.command, path, token or None))
        if hub.body is not None:
            self._send(200, hub.body, {})
        elif hub.status is not None:
            self._fail(hub.status, "", "Something is wrong.")
        elif path.startswith("api/models/"):
            self._info(path.removeprefix("api/models/"))
        elif "/resolve/" in path:
            name, _, rest = path.partition("/resolve/")
            self._file(name, rest)
        else:
            self._fail(404, "", "Not found.")

    def _info(self, path: str) -> None:
        kind = "/tree/" if "/tree/" in path else "/revision/"
        name, _, revision = path.partition(kind)
        repository = self.owner.repositories.get(name)
        if repository is None:
            # As the real one does: who is not logged in is not told whether there is such a repository.
            self._fail(401 if "Authorization" not in self.headers else 404, "RepoNotFound", "Repository not found")
            return
        commit = self._commit(repository, revision or "main")
        if commit is None:
            self._fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        if kind == "/tree/":
            files = repository.commits[commit].items()
            tree = [{"type": "file", "path": file, "size": len(value), "oid": _etag(value)} for file, value in sorted(files)]
            self._send(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
            return
        siblings = [{"rfilename": file} for file in sorted(repository.commits[commit])]
        info = {"_id": "1", "id": name, "modelId": name, "sha": commit, "private": False, "tags": [], "siblings": siblings}
        self._send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def _file(self, name: str, rest: str) -> None:
        repository = self.owner.repositories.get(name)
        if repository is None:
            self._fail(404, "RepoNotFound", "Repository not found")
            return
        if repository.gated and "Authorization" not in self.headers:
            self._fail(401, "GatedRepo", "Access to this model is restricted.")
            return
        # A branch may hold slashes; the longest that fits is meant.
        for revision in sorted({*repository.commits, *repository.branches}, key=len, reverse=True):
            commit = self._commit(repository, revision)
            file = rest.removeprefix(f"{revision}/")
            if commit is not None and file != rest:
                self._content(repository.commits[commit].get(file), commit)
                return
        self._fail(404, "RevisionNotFound", "Invalid rev id")

    def _content(self, content: bytes | None, commit: str) -> None:
        if content is None:
            self._fail(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
            return
        headers = {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        wanted = self.headers.get("Range", "")
        if wanted.startswith("bytes="):
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self._send(206, content[start:], headers)
        else:
            self._send(200, content, headers)

    @staticmethod
    def _commit(repository: Repository, revision: str) -> str | None:
        commit = repository.branches.get(revision, revision)
        return commit if commit in repository.commits else None

    def _fail(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        named = {"X-Error-Code": code, "X-Error-Message": message} if code else {}
        self._send(status, json.dumps({"error": message}).encode(), {**named, **(headers or {})})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
