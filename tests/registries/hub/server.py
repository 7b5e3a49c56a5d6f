"""A model hub on this machine that speaks as much of the Hugging Face Hub's protocol as publishing and fetching need.

    python -m tests.registries.hub.server FOLDER PORT STORAGE_PORT

A process of its own, so that it can be killed; what it holds is on disk, in FOLDER, and is there again when it is started
again. Large files go to a storage with an address of its own, as the hub's do: it takes signed addresses, and refuses a
request that brings a login as well. Tokens: `hf_writer` may do everything, `hf_reader` may read, none reads what is public.

`settings.json` in FOLDER changes how it behaves, from the next request on: `part` (bytes; uploads in parts), `die` ([method,
path (a regular expression), bytes]: the process kills itself once it has received or sent that many bytes of such a body),
`gated` (names of repositories), `ignored` (paths, as if a .gitignore named them), `fixed` (branches that stay where they are),
`storage` (its address, when a proxy is in front of it). `requests.jsonl` has every request, written before its answer ends.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

CHUNK = 1 << 16
# From here on a file is a large one. The hub's own limit is 10 MB, and lower for what is no text.
LARGE = 4096
LOCK = threading.RLock()
ATTRIBUTES = b"*.bin filter=lfs diff=lfs merge=lfs -text\n*.onnx filter=lfs diff=lfs merge=lfs -text\n"
SIGNATURE = "signature=0123456789abcdef"


class FailureError(Exception):
    def __init__(self, status: int, code: str = "", message: str = "Not found", **body: Any) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.body = status, code, message, body


class Repository:
    """A repository's state, `repo.json` in its folder, which is replaced in one step; contents lie beside it by their hash."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state: dict[str, Any] = json.loads((folder / "repo.json").read_bytes())

    @classmethod
    def make(cls, folder: Path, private: bool) -> Repository:
        for name in ("objects", "blobs", "parts"):
            (folder / name).mkdir(parents=True)
        empty = {"private": private, "commits": {}, "branches": {}, "tags": {}}
        (folder / "repo.json").write_text(json.dumps(empty))
        repository = cls(folder)
        repository.commit("main", {".gitattributes": repository.blob(ATTRIBUTES)}, "initial commit")
        return repository

    def save(self) -> None:
        aside = self.folder / "repo.new"
        aside.write_text(json.dumps(self.state))
        os.replace(aside, self.folder / "repo.json")

    def blob(self, content: bytes) -> dict[str, Any]:
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
        (self.folder / "blobs" / oid).write_bytes(content)
        return {"oid": oid, "size": len(content)}

    def object(self, sha256: str) -> Path:
        return self.folder / "objects" / sha256

    def commit(self, branch: str, files: Mapping[str, Any], message: str) -> str:
        described = json.dumps([branch, self.state["branches"].get(branch), files, message], sort_keys=True)
        commit = hashlib.sha1(described.encode(), usedforsecurity=False).hexdigest()
        self.state["commits"][commit] = {"files": dict(files), "message": message}
        self.state["branches"][branch] = commit
        self.save()
        return commit

    def find(self, revision: str) -> str:
        commit: str = self.state["branches"].get(revision) or self.state["tags"].get(revision) or revision
        if commit not in self.state["commits"]:
            raise FailureError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def files(self, revision: str) -> dict[str, Any]:
        files: dict[str, Any] = self.state["commits"][self.find(revision)]["files"]
        return files


class Handler(BaseHTTPRequestHandler):
    root: Path
    storage: str
    is_storage = False
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the requests are kept."""

    def answer(self) -> None:
        split = urlsplit(self.path)
        self.query = parse_qs(split.query)
        self.where = unquote(split.path)
        self.settings = self.read_settings()
        self.received = self.status = 0
        self.sent = 0
        self.noted = False
        try:
            if self.is_storage:
                self.store(split.path)
            else:
                self.route(split.path)
        except FailureError as failure:
            self.drain()
            named = {"X-Error-Code": failure.code} if failure.code else {}
            content = json.dumps({"error": failure.message, **failure.body}).encode()
            self.reply(failure.status, content, {**named, "X-Error-Message": failure.message})
        except ConnectionError:
            self.close_connection = True
        finally:
            self.note()  # what was cut off

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer  # noqa: N815

    def note(self) -> None:
        if self.noted:
            return
        self.noted = True
        noted = {
            "method": self.command,
            "path": self.where,
            "status": self.status,
            "received": self.received,
            "sent": self.sent,
            "storage": self.is_storage,
            "authorization": "Authorization" in self.headers,
            "agent": self.headers.get("User-Agent", ""),
        }
        with LOCK, open(self.root / "requests.jsonl", "a") as stream:
            stream.write(json.dumps(noted) + "\n")

    def read_settings(self) -> dict[str, Any]:
        try:
            settings: dict[str, Any] = json.loads((self.root / "settings.json").read_bytes())
        except FileNotFoundError:
            return {}
        return settings

    def perhaps_die(self, done: int) -> None:
        die = self.settings.get("die")
        if die and self.command == die[0] and re.search(die[1], self.where) and done >= die[2]:
            rest = {key: value for key, value in self.settings.items() if key != "die"}
            (self.root / "settings.json").write_text(json.dumps(rest))
            self.note()
            self.wfile.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    # What is asked for.

    def route(self, path: str) -> None:
        if path == "/api/repos/create":
            return self.create()
        if path == "/api/validate-yaml":
            return self.validate_yaml()
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/([a-z-]+)(?:/(.+))?", path):
            name, verb, rest = found[1], found[2], unquote(found[3] or "")
            handlers = {
                ("GET", "refs"): self.refs,
                ("GET", "revision"): self.revision,
                ("GET", "tree"): self.tree,
                ("POST", "preupload"): self.preupload,
                ("POST", "commit"): self.commit,
                ("POST", "branch"): self.branch,
                ("DELETE", "branch"): self.delete_branch,
                ("POST", "tag"): self.tag,
            }
            if (handler := handlers.get((self.command, verb))) is None:
                raise FailureError(404)
            with LOCK:
                return handler(self.repository(name, self.command != "GET"), rest)
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/(batch|verify|complete)", path):
            if found[2] == "complete" and self.query.get("signature"):  # signed, as the storage's addresses
                return self.complete(Repository(self.root / found[1]))
            return self.lfs(self.repository(found[1], True), found[1], found[2])
        if (found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)) and self.command in ("GET", "HEAD"):
            return self.resolve(self.repository(found[1], False), found[1], unquote(found[2]), unquote(found[3]))
        raise FailureError(404)

    def role(self) -> str:
        _, _, token = self.headers.get("Authorization", "").partition("Bearer ")
        if token not in ("", "hf_reader", "hf_writer"):
            raise FailureError(401, "", "Invalid credentials in Authorization header")
        return token

    def repository(self, name: str, write: bool) -> Repository:
        role = self.role()
        folder = self.root / name
        there = (folder / "repo.json").is_file()
        repository = Repository(folder) if there else None
        if repository is None or (repository.state["private"] and not role):
            # As the real one does: who is not logged in is not told whether there is such a repository.
            raise FailureError(404 if role else 401, "RepoNotFound", "Repository not found")
        if write and role != "hf_writer":
            raise FailureError(403 if role else 401, "", "You don't have the rights to write there")
        return repository

    def create(self) -> None:
        if self.role() != "hf_writer":
            raise FailureError(403 if self.role() else 401, "", "You don't have the rights to create a model there")
        asked = json.loads(self.body())
        name = f"{asked['organization']}/{asked['name']}"
        with LOCK:
            if (self.root / name).exists():
                raise FailureError(409, "", "You already created this model repo", url=f"http://{self.headers['Host']}/{name}")
            Repository.make(self.root / name, asked.get("visibility") == "private")
        self.json({"url": f"http://{self.headers['Host']}/{name}", "name": name})

    def validate_yaml(self) -> None:
        text = json.loads(self.body())["content"]
        if re.match(r"---\n(.*\n)*?license: not a licence\n", text):
            self.reply(400, json.dumps({"errors": [{"message": '"license" must be one of [mit]'}], "warnings": []}).encode())
        else:
            self.json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})

    def refs(self, repository: Repository, rest: str) -> None:
        def listed(kind: str, where: str) -> list[dict[str, str]]:
            refs = sorted(repository.state[kind].items())
            return [{"name": name, "ref": f"refs/{where}/{name}", "targetCommit": commit} for name, commit in refs]

        self.json({"branches": listed("branches", "heads"), "tags": listed("tags", "tags"), "converts": []})

    def revision(self, repository: Repository, rest: str) -> None:
        name = repository.folder.relative_to(self.root).as_posix()
        siblings = [{"rfilename": file} for file in sorted(repository.files(rest))]
        self.json({"_id": "1", "id": name, "sha": repository.find(rest), "tags": [], "siblings": siblings})

    def tree(self, repository: Repository, rest: str) -> None:
        files = sorted(repository.files(rest).items())
        folders = sorted({str(parent) for path, _ in files for parent in Path(path).parents} - {"."})
        entries: list[dict[str, Any]] = [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders]
        # The hub gives at most 1000 of them at a time.
        entries += [{"type": "file", "path": path, **entry} for path, entry in files]
        start, page = int(self.query.get("cursor", ["0"])[0]), 5
        link = {}
        if start + page < len(entries):
            again = f"http://{self.headers['Host']}{self.where}?recursive=True&expand=False&cursor={start + page}"
            link = {"Link": f'<{again}>; rel="next"'}
        self.reply(200, json.dumps(entries[start : start + page]).encode(), {"Content-Type": "application/json", **link})

    def preupload(self, repository: Repository, rest: str) -> None:
        here = repository.files(rest)
        ignored = self.settings.get("ignored", [])
        files = []
        for file in json.loads(self.body())["files"]:
            entry = here.get(file["path"])
            oid = (entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]) if entry else None
            mode = "lfs" if file["size"] >= LARGE else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": file["path"] in ignored, "oid": oid})
        self.json({"files": files, "commitOid": repository.find(rest)})

    def lfs(self, repository: Repository, name: str, verb: str) -> None:
        asked = json.loads(self.body())
        if verb == "verify":
            path = repository.object(asked["oid"])
            if not path.is_file() or path.stat().st_size != asked["size"]:
                raise FailureError(404, "", "object is not there, or not whole")
            return self.json({})
        objects = []
        for item in asked["objects"]:
            oid, size = item["oid"], item["size"]
            answer: dict[str, Any] = {"oid": oid, "size": size}
            if not repository.object(oid).is_file():
                href = f"{self.settings.get('storage', self.storage)}/{name}/{oid}"
                upload: dict[str, Any] = {"href": f"{href}?{SIGNATURE}", "header": {}}
                if part := self.settings.get("part"):
                    parts = {str(n + 1): f"{href}.{n + 1}?{SIGNATURE}" for n in range(-(-size // part))}
                    complete = f"http://{self.headers['Host']}/{name}.git/info/lfs/objects/complete?{SIGNATURE}"
                    upload = {"href": complete, "header": {"chunk_size": str(part), **parts}}
                verify = {"href": f"http://{self.headers['Host']}/{name}.git/info/lfs/objects/verify"}
                answer["actions"] = {"upload": upload, "verify": verify}
            objects.append(answer)
        return self.json({"transfer": "basic", "objects": objects})

    def complete(self, repository: Repository) -> None:
        asked = json.loads(self.body())
        aside = repository.folder / "parts" / f"{asked['oid']}.whole"
        hasher = hashlib.sha256()
        with open(aside, "wb") as whole:
            for part in asked["parts"]:
                content = (repository.folder / "parts" / f"{asked['oid']}.{part['partNumber']}").read_bytes()
                hasher.update(content)
                whole.write(content)
        if hasher.hexdigest() != asked["oid"]:
            raise FailureError(400, "", "the parts do not make the object")
        os.replace(aside, repository.object(asked["oid"]))
        self.json({})

    def commit(self, repository: Repository, rest: str) -> None:
        lines = [json.loads(line) for line in self.body().splitlines()]
        if rest not in repository.state["branches"]:
            raise FailureError(404, "RevisionNotFound", f"Invalid rev id: {rest}")
        files = dict(repository.files(rest))
        message = ""
        for line in lines:
            key, value = line["key"], line["value"]
            if key == "header":
                message = value["summary"]
                if value.get("parentCommit", repository.find(rest)) != repository.find(rest):
                    raise FailureError(412, "", "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = repository.blob(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                path = repository.object(value["oid"])
                if not path.is_file():
                    raise FailureError(400, "", f"LFS pointer pointed to a file that does not exist: {value['path']}")
                size = path.stat().st_size
                pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{value['oid']}\nsize {size}\n".encode()
                lfs = {"oid": value["oid"], "size": size, "pointerSize": len(pointer)}
                files[value["path"]] = {**repository.blob(pointer), "size": size, "lfs": lfs}
            elif key == "deletedFile":
                if value["path"] not in files:
                    raise FailureError(404, "EntryNotFound", "A file with this name doesn't exist")
                del files[value["path"]]
        oid = repository.commit(rest, files, message)
        name = repository.folder.relative_to(self.root).as_posix()
        self.json({"commitUrl": f"http://{self.headers['Host']}/{name}/commit/{oid}", "commitOid": oid})

    def branch(self, repository: Repository, rest: str) -> None:
        asked = json.loads(self.body() or b"{}")
        if rest in repository.state["branches"] and not asked.get("overwrite"):
            raise FailureError(409, "", "Reference already exists")
        if rest not in self.settings.get("fixed", []):
            repository.state["branches"][rest] = repository.find(asked.get("startingPoint", "main"))
            repository.save()
        self.json({})

    def delete_branch(self, repository: Repository, rest: str) -> None:
        if repository.state["branches"].pop(rest, None) is None:
            raise FailureError(404, "RevisionNotFound", f"Invalid rev id: {rest}")
        repository.save()
        self.json({})

    def tag(self, repository: Repository, rest: str) -> None:
        name = json.loads(self.body())["tag"]
        if name in repository.state["tags"]:
            raise FailureError(409, "", "Tag reference exists already")
        repository.state["tags"][name] = repository.find(rest)
        repository.save()
        self.json({})

    def resolve(self, repository: Repository, name: str, revision: str, path: str) -> None:
        if name in self.settings.get("gated", []) and self.role() != "hf_writer":
            raise FailureError(403 if self.role() else 401, "GatedRepo", "Access to this model is restricted.")
        commit = repository.find(revision)
        entry = repository.files(commit).get(path)
        if entry is None:
            raise FailureError(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": commit, "ETag": f'"{entry["oid"]}"'}
        if "lfs" in entry:
            location = f"{self.settings.get('storage', self.storage)}/{name}/{entry['lfs']['oid']}?{SIGNATURE}"
            headers |= {"Location": location, "X-Linked-Size": str(entry["size"]), "X-Linked-Etag": f'"{entry["lfs"]["oid"]}"'}
            return self.reply(302, b"", headers)
        return self.stream(repository.folder / "blobs" / entry["oid"], headers)

    # The storage, which knows addresses that are signed, and no logins.

    def store(self, path: str) -> None:
        found = re.fullmatch(r"/([^/]+/[^/]+)/([0-9a-f]{64})(\.[0-9]+)?", path)
        if found is None or self.query.get("signature") != [SIGNATURE.partition("=")[2]]:
            raise FailureError(403, "", "SignatureDoesNotMatch")
        if "Authorization" in self.headers:
            raise FailureError(400, "", "Only one auth mechanism allowed")
        repository = Repository(self.root / found[1])
        if self.command == "GET":
            return self.stream(repository.object(found[2]), {})
        if self.command != "PUT":
            raise FailureError(405)
        aside = repository.folder / "parts" / f"{found[2]}.{threading.get_ident()}.new"
        hasher = hashlib.sha256()
        with open(aside, "wb") as stream:
            for piece in self.pieces():
                hasher.update(piece)
                stream.write(piece)
        if found[3]:
            os.replace(aside, repository.folder / "parts" / f"{found[2]}{found[3]}")
        elif hasher.hexdigest() != found[2]:
            raise FailureError(400, "", "BadDigest")
        else:
            os.replace(aside, repository.object(found[2]))
        return self.reply(200, b"", {"ETag": f'"{hasher.hexdigest()}"'})

    # Reading and writing.

    def pieces(self) -> Iterator[bytes]:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline(), 16):
                piece = self.rfile.read(size)
                self.rfile.readline()
                yield self.count(piece)
            self.rfile.readline()
            return
        length = int(self.headers.get("Content-Length") or 0)
        while self.received < length:
            piece = self.rfile.read(min(CHUNK, length - self.received))
            if not piece:
                raise ConnectionError
            yield self.count(piece)

    def count(self, piece: bytes) -> bytes:
        self.received += len(piece)
        self.perhaps_die(self.received)
        return piece

    def body(self) -> bytes:
        return b"".join(self.pieces())

    def drain(self) -> None:
        """What is left of a body would be taken for the next request."""
        for _ in self.pieces():
            pass

    def json(self, value: Any) -> None:
        self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def stream(self, path: Path, headers: Mapping[str, str]) -> None:
        size = path.stat().st_size
        self.head(200, {**headers, "Content-Length": str(size)})
        if self.command == "HEAD":
            return
        with open(path, "rb") as stream:
            while piece := stream.read(CHUNK):
                self.wfile.write(piece)
                self.sent += len(piece)
                self.perhaps_die(self.sent)

    def reply(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.status = status
        self.note()
        self.head(status, {**(headers or {}), "Content-Length": str(len(body))})
        if self.command != "HEAD":
            self.wfile.write(body)

    def head(self, status: int, headers: Mapping[str, str]) -> None:
        self.status = status
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of connections that break: that is what is tested."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def main() -> None:
    root, port, storage_port = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    Handler.root, Handler.storage = root, f"http://127.0.0.1:{storage_port}"
    storage = Server(("127.0.0.1", storage_port), type("Storage", (Handler,), {"is_storage": True}))
    threading.Thread(target=storage.serve_forever, daemon=True).start()
    with Server(("127.0.0.1", port), Handler) as server:
        server.serve_forever()


if __name__ == "__main__":
    main()
