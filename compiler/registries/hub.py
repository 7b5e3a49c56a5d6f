"""`hf://ORG/NAME`: a model repository of the Hugging Face Hub, or of another server that speaks its protocol (HF_ENDPOINT).

- A version is a git tag, `1.0.0`, on a commit that holds the release's files byte for byte (and the `.gitattributes` that the
  hub keeps for itself). The commit is made on a branch of its own, `push/1.0.0-<digest>`, the hub's own listing of it is held
  against the manifest, and only then is it tagged: a tag that exists cannot be made again, so that of two pushes one wins.
- An alias is a branch that stands on a version's commit. It is moved by one call: the hub's branches can be overwritten,
  while a tag would have to be deleted and made again. So `from_pretrained("ORG/NAME", revision="prod")` works as well.
- `main` is what the hub's page shows: the files of the newest version, with a model card made from the manifest as its
  README.md. A release's own README.md is in its version, as it was. Nothing is pulled from `main`.

A repository that is not there is made, private unless the URL ends in `?private=false`; one that is there stays as it is.
Large files go by git LFS, whose batch call asks the hub which of them it has, so none is sent twice; xet is left off. The
login is the library's own: `HF_TOKEN`, or `hf auth login`. This is tested against a local server that speaks the hub's
protocol (`tests/registries/hub/server.py`), with the hub's own client, unchanged.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from compiler.errors import RegistryError, ReleaseError
from compiler.manifest import MANIFEST, OUTSIDE, from_bytes
from compiler.registries import DIGEST, Parcel, TakenError, Version, match, newest, precedence
from compiler.registries.card import model_card
from compiler.registries.hub_client import KEPT, MAIN, AnswerError, Client, Refs, library, local_hashes
from compiler.registries.transfer import receive, retrying
from compiler.types import File
from compiler.verify import read_release

CARD = "README.md"
# How often a push starts again when another one moved what it built on.
ROUNDS = 5
# How much of its manifest's digest tells a push's branch from another push's of the same version.
BRANCH_DIGITS = 12
# As the hub has them: `--` and `..` are its own, and a name is at most 96 characters long.
REPOSITORY = re.compile(r"(?!.*(--|\.\.|\.git$))[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*(?<![.-])", re.ASCII)
LONGEST = 96

Contents = Mapping[File, Path | bytes]


def connect(url: str) -> Hub:
    """The registry at `hf://ORG/NAME`, with `?private=false` for a repository that everybody may read once it is made.

    Raises:
        RegistryError: the URL names no repository.
    """
    parts = urlsplit(url)
    repo = f"{parts.netloc}{parts.path}"
    if not REPOSITORY.fullmatch(repo) or len(repo) > LONGEST:
        raise RegistryError(f"{url}: no repository can be called so; give hf://ORG/NAME")
    return Hub(url, parts.query != "private=false", Client(url.partition("?")[0], repo, library()))


@dataclass(frozen=True)
class Hub:
    """One repository. `private` is what it is made as, when it is not there yet.

    It neither `hashes` nor `checks`: large files are sent by the library, under the sha256 that they are said to have, to a
    storage of which we do not know that it refuses others. So files are hashed right before they are sent.
    """

    url: str
    private: bool
    client: Client

    def list(self) -> tuple[Version, ...]:
        refs = self.client.refs()
        if refs is None:
            return ()
        found = (self._look(release, refs) for release in sorted(refs.versions, key=precedence))
        return tuple(version for version in found if version is not None)

    def resolve(self, reference: str) -> Version | None:
        if DIGEST.fullmatch(reference):
            return match(self.list(), reference)
        refs = self.client.refs()
        if refs is None:
            return None
        release = reference
        if reference not in refs.versions:
            commit = refs.branches.get(reference) if reference != MAIN else None
            release = next((name for name, at in refs.versions.items() if at == commit), "")
            if not release:
                return None
        version = self._look(release, refs)
        if version is None:
            raise RegistryError(
                f"{self.url}: has a tag {release} that holds no release; remove that tag, or raise release: in pipeline.yaml"
            )
        return version

    def model(self) -> str | None:
        refs = self.client.refs()
        release = newest(refs.versions) if refs else None
        with contextlib.suppress(ReleaseError):
            content = self.client.small(refs.versions[release], MANIFEST) if refs and release else None
            return from_bytes(content, self.url).name if content else None
        return None

    def push(self, parcel: Parcel) -> None:
        client, release = self.client, parcel.manifest.release
        branch = f"push/{release}-{parcel.manifest.identity[:BRANCH_DIGITS]}"
        contents: dict[File, Path | bytes] = {file: parcel.path.absolute() / file.path for file in parcel.files}
        contents[_file(MANIFEST, parcel.content)] = parcel.content
        refs = client.refs()
        if refs is None:
            client.ask("making it", lambda: client.api.create_repo(client.repo, private=self.private, exist_ok=True))

        def attempt() -> None:
            here = client.refs()
            if here is not None and release in here.versions:
                raise TakenError(f"{self.url}: {release} was published by another push meanwhile")
            if here is None or branch not in here.branches:
                client.make_branch(branch)
            commit = client.commit(branch, contents, f"{parcel.manifest.name} {release}")
            self._prove(commit, contents)
            client.ask("tagging", lambda: client.api.create_tag(client.repo, tag=release, revision=commit), (404, 409))

        try:
            self._until_still(attempt)
        except TakenError:
            self._tidy(release)
            raise
        self._tidy(release)

    def check_alias(self, name: str) -> None:
        """Raises RegistryError for the one name that can be no alias here."""
        if name == MAIN:
            raise RegistryError(f"{self.url}: {MAIN} is the branch that the hub shows, and no alias; take another name")

    def alias(self, name: str, version: Version) -> None:
        self.check_alias(name)
        refs = self.client.refs()
        if refs is None or version.release not in refs.versions:
            raise RegistryError(f"{self.url}: has no {version.release} any more; push it again")
        commit = refs.versions[version.release]
        if refs.branches.get(name, commit) not in refs.versions.values():
            raise RegistryError(f"{self.url}: has a branch {name} with other commits, which would be lost; take another name")
        self.client.move_branch(name, commit)
        moved = self.client.refs()
        if moved is None or moved.branches.get(name) != commit:
            raise RegistryError(
                f"{self.url}: {name} does not name {version.release} after it was moved: somebody else moved it meanwhile, or "
                "this hub cannot move a branch; look where it is and move it again"
            )

    def pull(self, version: Version, folder: Path) -> None:
        refs = self.client.refs()
        if refs is None or version.release not in refs.versions:
            raise RegistryError(f"{self.url}: has no {version.release} any more")
        commit = refs.versions[version.release]
        where = f"{self.url}@{version.release}"

        @contextlib.contextmanager
        def read(file: File) -> Iterator[Iterator[bytes]]:
            try:
                with self.client.read(commit, file.path) as chunks:
                    yield chunks
            except AnswerError as error:
                raise ReleaseError(
                    f"{where}: lacks {file.path}, which its manifest names; it is damaged, do not use it"
                ) from error

        receive(
            folder,
            where,
            version.digest,
            lambda name: self.client.small(commit, name),
            read,
            lambda work: retrying(work, self.client.give_up),
        )

    def _look(self, release: str, refs: Refs) -> Version | None:
        """The version that a tag holds; None where it holds no release."""
        commit = refs.versions[release]
        try:
            content = self.client.small(commit, MANIFEST)
            if content is None:
                return None
            manifest = from_bytes(content, f"{self.url}@{release}: {MANIFEST}")
        except ReleaseError as error:
            raise RegistryError(str(error)) from error
        if manifest.release != release:
            raise RegistryError(f"{self.url}: its tag {release} holds release {manifest.release}; it was moved, do not use it")
        return Version(release, manifest.identity, refs.aliases(commit))

    def _until_still(self, attempt: Any) -> None:
        """Do something that builds on what is there, again when another push has changed that."""
        for _ in range(ROUNDS):
            with contextlib.suppress(AnswerError):
                attempt()
                return
        raise RegistryError(f"{self.url}: something else changed it during each of {ROUNDS} tries; try again later")

    def _prove(self, commit: str, contents: Contents) -> None:
        """Make sure that a commit holds what the manifest names, by the hub's own listing, before it becomes a version."""
        tree = self.client.tree(commit)
        for file, content in contents.items():
            entry = tree.pop(file.path, None)
            if entry is None:
                raise RegistryError(f"{self.url}: did not take {file.path} (has it a .gitignore?); nothing is published")
            if entry.lfs is not None:
                same = (entry.lfs.sha256, entry.lfs.size) == (file.sha256, file.size)
            else:
                sha256, blob = local_hashes(content, file.size)
                if sha256 != file.sha256:
                    raise RegistryError(
                        f"{self.url}: {file.path} changed while it was pushed; nothing is published, push again"
                    )
                same = blob == entry.blob_id
            if not same:
                raise RegistryError(f"{self.url}: holds something else as {file.path} than was sent; nothing is published")
        if more := sorted(set(tree) - set(KEPT)):
            raise RegistryError(f"{self.url}: keeps {more[0]}, which is not the release's; nothing is published")

    def _tidy(self, release: str) -> None:
        """Remove the branches on which a version was put together, now that it is there. One that is left harms nobody."""
        client = self.client
        with contextlib.suppress(RegistryError):
            refs = client.refs()
            for name in refs.branches if refs else ():
                # Not those of 1.0.0-rc.1 when 1.0.0 is there.
                if re.fullmatch(rf"push/{re.escape(release)}-[0-9a-f]{{{BRANCH_DIGITS}}}", name):
                    with contextlib.suppress(AnswerError):
                        delete = {"repo_id": client.repo, "branch": name}
                        client.ask("tidying", lambda delete=delete: client.api.delete_branch(**delete), (404,))  # type: ignore[misc]

    def show(self, path: Path) -> None:
        """Have `main` show the version that a release on disk is published as, with its card, when that is the newest and
        `main` shows another. Files that the hub has are not sent again.

        Raises:
            RegistryError: the hub cannot be reached or refuses; the version itself stays published.
            ReleaseError: the release on disk is damaged.
        """
        manifest, reports = read_release(path)

        def attempt() -> None:
            refs = self.client.refs()
            if refs is None or manifest.release != newest(refs.versions):
                return
            commit = refs.versions[manifest.release]
            content = self.client.small(commit, MANIFEST)
            if content is None or from_bytes(content, f"{self.url}@{manifest.release}").identity != manifest.identity:
                return
            if MAIN in refs.branches and self.client.small(refs.branches[MAIN], MANIFEST) == content:
                return
            # What lies beside a release's files may have changed on disk since it was published: the hub's is shown.
            beside = {MANIFEST: content, **{name: self.client.small(commit, name) for name in OUTSIDE}}
            card = model_card(manifest, reports, self.client.url, self.client.repo).encode()
            shown: dict[File, Path | bytes] = {file: path.absolute() / file.path for file in manifest.every_file}
            shown |= {_file(name, found): found for name, found in beside.items() if found is not None}
            shown = {file: found for file, found in shown.items() if file.path != CARD}
            self.client.commit(MAIN, {**shown, _file(CARD, card): card}, f"Show {manifest.release}")

        try:
            self._until_still(attempt)
        except RegistryError as error:
            reason = str(error).removeprefix(f"{self.client.url}: ").removeprefix(f"{self.url}: ")
            raise RegistryError(
                f"{self.url}: {manifest.release} is published, but {MAIN} does not show it yet: {reason}"
            ) from error


def _file(path: str, content: bytes) -> File:
    return File(path, hashlib.sha256(content).hexdigest(), len(content))
