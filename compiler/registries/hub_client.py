"""The hub's own client, told to be silent, with its many errors as three: what may pass, what is expected, a refusal."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import quote

import compiler
from compiler.config import SEMVER
from compiler.errors import RegistryError
from compiler.registries import ALIAS
from compiler.registries.transfer import FaultError, bounded, chunks_of, retrying
from compiler.types import File

if TYPE_CHECKING:
    import httpx2
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.hf_api import RepoFile

T = TypeVar("T")

MAIN = "main"
# What the hub keeps in a repository for itself.
KEPT = (".gitattributes",)
# Seconds without a byte after which a connection counts as lost; the library waits for ever.
SILENCE = 120
PASSING = (408, 429, 500, 502, 503, 504)


class AnswerError(Exception):
    """The hub's answer is one that the caller has a use for: not found, there already, moved meanwhile."""


class _ClosedError(FaultError):
    """One of the library's threads could not connect, and closed what the others were using."""


@dataclass(frozen=True)
class Refs:
    """Commits by the names of versions (tags that are one) and of branches."""

    versions: Mapping[str, str]
    branches: Mapping[str, str]

    def aliases(self, commit: str) -> tuple[str, ...]:
        """The aliases that stand on a commit."""
        names = (name for name, at in self.branches.items() if at == commit)
        return tuple(sorted(name for name in names if name != MAIN and ALIAS.fullmatch(name)))


@dataclass(frozen=True)
class Client:
    """One repository, `ORG/NAME`, of which errors speak as `url`."""

    url: str
    repo: str
    api: HfApi

    def refs(self) -> Refs | None:
        """The versions and branches; None where there is no such repository."""
        try:
            refs = self.ask("listing its versions", lambda: self.api.list_repo_refs(self.repo), (404,))
        except AnswerError:
            return None
        return Refs(
            {tag.name: tag.target_commit for tag in refs.tags if re.fullmatch(SEMVER, tag.name)},
            {branch.name: branch.target_commit for branch in refs.branches},
        )

    def tree(self, commit: str) -> dict[str, RepoFile]:
        """The files of a commit, as the hub lists them."""
        from huggingface_hub.hf_api import RepoFile

        entries = self.ask(
            "listing its files",
            lambda: tuple(self.api.list_repo_tree(self.repo, revision=commit, recursive=True)),
            again=False,
        )
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    def commit(self, branch: str, contents: Mapping[File, Path | bytes], message: str) -> str:
        """Make the content of a branch these files, by one commit: its id. Raises AnswerError when the branch has moved."""
        from huggingface_hub import CommitOperationDelete

        refs = self.refs()
        if refs is None or branch not in refs.branches:
            raise AnswerError
        head = refs.branches[branch]
        gone = sorted(set(self.tree(head)) - {file.path for file in contents} - set(KEPT))
        added = [self._addition(file, content) for file, content in contents.items()]
        self.ask(
            "sending files",
            lambda: self.api.preupload_lfs_files(self.repo, added, revision=branch, free_memory=False),
            (404,),
            again=False,
        )
        info = self.ask(
            "committing",
            lambda: self.api.create_commit(
                self.repo,
                [*(CommitOperationDelete(path, is_folder=False) for path in gone), *added],
                commit_message=message,
                revision=branch,
                parent_commit=head,
            ),
            (404, 409, 412),
        )
        return str(info.oid)

    def _addition(self, file: File, content: Path | bytes) -> CommitOperationAdd:
        from huggingface_hub import CommitOperationAdd

        try:
            addition = CommitOperationAdd(file.path, content)
        except (ValueError, OSError) as error:
            raise RegistryError(
                f"{self.url}: cannot take {file.path}: it is gone, or its name is one of the hub's own"
            ) from error
        addition.upload_info.sha256 = bytes.fromhex(file.sha256)  # hashed before, and not to be hashed again
        return addition

    def make_branch(self, name: str) -> None:
        """Make a branch, if it is not there, on what `main` stands on. Raises AnswerError when there is no `main`."""
        self.ask(
            "making a branch",
            lambda: self.api.create_branch(self.repo, branch=name, revision=MAIN, exist_ok=True),
            (404,),
        )

    def move_branch(self, name: str, commit: str) -> None:
        """Have a branch stand on a commit, whether it is there or not, in one step."""
        from huggingface_hub.utils._http import get_session, hf_raise_for_status

        def move() -> None:
            # The Python library has no word for `overwrite`; the hub's JavaScript library does.
            response = get_session().post(
                f"{self.api.endpoint}/api/models/{self.repo}/branch/{quote(name, safe='')}",
                headers=self._headers(),
                json={"startingPoint": commit, "overwrite": True},
            )
            hf_raise_for_status(response)

        self.ask(f"moving {name}", move)

    def small(self, commit: str, name: str) -> bytes | None:
        """The content of a small file; None where there is none."""

        def fetch() -> bytes | None:
            try:
                with self.read(commit, name) as chunks:
                    return bounded(chunks, f"{self.url}: its {name}")
            except AnswerError:
                return None

        return retrying(fetch, self.give_up)

    @contextlib.contextmanager
    def read(self, commit: str, path: str) -> Iterator[Iterator[bytes]]:
        """A file's content as a stream, past the library's cache. A redirect to another host gets no login (httpx2 takes it
        off), and no compression is asked for.

        Raises:
            FaultError: what may pass.
            AnswerError: there is no such file.
        """
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils._http import get_session

        doing = f"fetching {path}"
        address = hf_hub_url(self.repo, path, revision=commit, endpoint=self.api.endpoint)
        with contextlib.ExitStack() as stack:
            with self._judged(doing, (404,)):
                stream = get_session().stream("GET", address, headers={**self._headers(), "Accept-Encoding": "identity"})
                response = stack.enter_context(stream)
                if response.status_code == 404:
                    raise AnswerError
                if response.status_code != 200:
                    raise self._refusal(doing, response)

            def chunks() -> Iterator[bytes]:
                with self._judged(doing):
                    yield from response.iter_bytes()

            yield chunks()

    def _headers(self) -> dict[str, str]:
        from huggingface_hub.utils._headers import build_hf_headers

        headers: dict[str, str] = build_hf_headers(
            token=self.api.token, library_name=self.api.library_name, library_version=self.api.library_version
        )
        return headers

    def ask(self, doing: str, work: Callable[[], T], expected: Collection[int] = (), *, again: bool = True) -> T:
        """What `work` returns.

        Args:
            again: try again what may pass. Not where the library does so itself: when it lists, and sends files.

        Raises:
            AnswerError: the hub answers with a status that is expected.
            RegistryError: it refuses, or cannot be reached.
        """

        def attempt() -> T:
            with self._judged(doing, expected), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what the hub thinks of a checkpoint's README.md
                return work()

        if again:
            return retrying(attempt, self.give_up)
        try:
            try:
                return attempt()
            except _ClosedError:
                return attempt()
        except FaultError as fault:
            raise self.give_up(fault) from fault

    def give_up(self, fault: FaultError) -> RegistryError:
        """The error for what did not pass."""
        return RegistryError(f"{self.url}: {fault}; check the network and HF_ENDPOINT, or try again later")

    @contextlib.contextmanager
    def _judged(self, doing: str, expected: Collection[int] = ()) -> Iterator[None]:
        import httpx2
        from huggingface_hub.errors import OfflineModeIsEnabled

        try:
            yield
        except (RegistryError, FaultError, AnswerError):
            raise
        except Exception as error:  # the library lets through what its HTTP client, and other servers' answers, raise
            if isinstance(error, ValueError) and "README.md" in str(error):
                said = " ".join(str(error).split())[:200]
                reason = f"the hub refuses the release's README.md ({said}); correct it in the checkpoint and build again"
                raise RegistryError(f"{self.url}: {reason}") from error
            chain = list(_causes(error))  # the library wraps what goes wrong in its threads
            responses = (response for one in chain if (response := getattr(one, "response", None)) is not None)
            if (response := next(responses, None)) is not None:
                if response.status_code in expected:
                    raise AnswerError from error
                raise self._refusal(doing, response) from error
            if lost := next((one for one in chain if isinstance(one, httpx2.TransportError)), None):
                raise FaultError(f"{doing}: the hub cannot be reached ({type(lost).__name__})") from error
            if any(isinstance(one, RuntimeError) and "client has been closed" in str(one) for one in chain):
                raise _ClosedError(f"{doing}: the hub cannot be reached (connections closed)") from error
            if isinstance(error, json.JSONDecodeError):  # a gateway's page: the library reads it before its status
                raise FaultError(f"{doing}: the hub's answer is not JSON") from error
            if isinstance(error, OfflineModeIsEnabled):
                reason = "HF_HUB_OFFLINE is set; unset it"
            elif isinstance(error, OSError) and error.filename:
                reason = f"{doing}: {error.filename}: {error.strerror}"
            else:
                reason = f"{doing}: what came is no hub's answer ({type(error).__name__}); check HF_ENDPOINT"
            raise RegistryError(f"{self.url}: {reason}") from error

    def _refusal(self, doing: str, response: httpx2.Response) -> Exception:
        """The error that an answer stands for. It quotes no address: those of large files hold signatures."""
        status, code = response.status_code, response.headers.get("X-Error-Code")
        if status in PASSING:
            return FaultError(f"{doing}: the hub answers {status}")
        if code == "GatedRepo":
            reason = "is gated: ask for access on its page, then log in (`hf auth login`, or HF_TOKEN)"
        elif status == 401:
            reason = "is not there, or not for this login (401): check the name, and log in (`hf auth login`, or HF_TOKEN)"
        elif status == 403:
            reason = f"{doing} is forbidden to this login (403): ask the owner for the right, or set another HF_TOKEN"
        else:
            said = " ".join((response.headers.get("X-Error-Message") or "").split())[:200]
            reason = f"{doing}: the hub answers {status}" + (f": {said}" if said else "")
        return RegistryError(f"{self.url}: {reason}")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def library() -> HfApi:
    """The library's entrance, at HF_ENDPOINT."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from huggingface_hub import HfApi

    _set_up()
    return HfApi(
        endpoint=os.environ.get("HF_ENDPOINT") or None,
        library_name="aot-model-compiler",
        library_version=compiler.__version__,
    )


@functools.cache
def _set_up() -> None:
    """Have connections end when the other side falls silent, and the library talk neither to the user nor to a log: the
    addresses that it would write hold signatures. Once in a process, also where the library was imported before."""
    import httpx2
    from huggingface_hub import constants, set_client_factory
    from huggingface_hub.utils import logging
    from huggingface_hub.utils._http import default_client_factory
    from huggingface_hub.utils.tqdm import disable_progress_bars

    def client() -> httpx2.Client:
        made = default_client_factory()
        made.timeout = httpx2.Timeout(SILENCE, pool=None)
        return made

    set_client_factory(client)
    logging.set_verbosity(40)  # logging.ERROR
    constants.HF_HUB_DISABLE_TELEMETRY = True
    constants.HF_HUB_DISABLE_XET = True
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        disable_progress_bars()


def local_hashes(content: Path | bytes, size: int) -> tuple[str, str]:
    """A small file's sha256, and its id as a git blob."""
    sha256, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    for chunk in [content] if isinstance(content, bytes) else chunks_of(content):
        sha256.update(chunk)
        blob.update(chunk)
    return sha256.hexdigest(), blob.hexdigest()
