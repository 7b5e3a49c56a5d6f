"""mlflow://host:port/name: releases as versions of an MLflow registered model; mlflow:///folder/name needs no server.

    <run>/artifacts/model/release/…   the release's files, beside MLmodel and code/ with `?pyfunc=true`
    model version N of `name`         tags: compile.release, compile.digest, compile.formats, …; its source is that folder
    registered model `name`           aliases; those that MLflow has no room for (latest, v2, a.b) as tags compile.alias.…

A version is made in one step, with its tags, after all files are there. MLflow does not refuse a second version with the
same release, but numbers them in order: the lowest number with a release is that release, for every reader and from the moment
it is made. So of two pushes at once the first wins, and the other takes its version away again.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

from compiler.config import SEMVER
from compiler.errors import RegistryError, ReleaseError
from compiler.manifest import MANIFEST, Manifest
from compiler.registries import Parcel, Registry, TakenError, Version, match, newest, precedence
from compiler.registries.mlflow_transport import (
    Artifacts,
    MissingError,
    Outgoing,
    absent,
    artifacts,
    call,
    client,
    exists,
    gave_up,
    imported,
)
from compiler.registries.transfer import FaultError, bounded, key_of, receive, retrying
from compiler.store import locked
from compiler.types import File

RELEASE, DIGEST, KEY, SENT = "compile.release", "compile.digest", "compile.key", "compile.sent"
ALIAS_TAG, NAMED = "compile.alias.", "compile.model"
MODEL, FILES, MLMODEL = "model", "release", "MLmodel"
DATABASE, STORED, LOCK = "mlflow.db", "mlartifacts", "mlflow.lock"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
NAME = re.compile(r"[\w .-]+")
# MLflow's aliases are letters, digits, _ and -, and neither `latest` nor a version (mlflow.utils.validation).
NATIVE = re.compile(r"(?!latest$|v\d+$)[\w-]+", re.IGNORECASE)
PAGE = 1000
# A file is noted on the run once it is sent; a smaller one is sent again faster than noted (4 ms against 20 on the loopback).
NOTED_BYTES = 1 << 20


def connect(url: str) -> Registry:
    """The registered model that a URL names. Nothing is contacted before the first call.

    Raises:
        RegistryError: the URL names no model.
    """
    parts = urlsplit(url)
    place, _, name = parts.path.rpartition("/")
    name = unquote(name)
    pyfunc = parts.query == "pyfunc=true"
    if not NAME.fullmatch(name) or (not parts.netloc and not place):
        raise RegistryError(f"{url}: names no model; give mlflow://host:port/name, or mlflow:///folder/name without a server")
    if not parts.netloc:
        folder = Path(unquote(place))
        return Model(url, name, f"sqlite:///{folder / DATABASE}", folder, pyfunc)
    plain = parts.scheme == "mlflow+http" or parts.hostname in LOOPBACK
    return Model(url, name, f"{'http' if plain else 'https'}://{parts.netloc}{place}", None, pyfunc)


def ready(url: str) -> None:
    """Raises RegistryError when the client, or what it needs for a folder, is not installed. Nothing is contacted."""
    imported(url, folder=not urlsplit(url).netloc)


@dataclass(frozen=True)
class Found:
    """A release's model version: its number in MLflow, and where its artifacts are."""

    version: Version
    number: int
    source: str


@dataclass(frozen=True)
class Model:
    """See `compiler.registries.Registry`. `folder` holds the database and the artifacts where there is no server."""

    url: str
    name: str
    tracking: str
    folder: Path | None
    pyfunc: bool
    hashes: ClassVar[bool] = True

    def list(self) -> tuple[Version, ...]:
        return tuple(found.version for found in self._all())

    def resolve(self, reference: str) -> Version | None:
        versions = self.list()
        if (version := match(versions, reference)) is None and (number := self._aliases().get(reference)) is not None:
            raise RegistryError(
                f"{self.url}: {reference} names MLflow's version {number}, which no push of ours made; fetch it with MLflow, "
                f"or name {', '.join(found.release for found in versions[-3:]) or 'another model'}"
            )
        return version

    def model(self) -> str | None:
        found = {version.tags[RELEASE]: version.tags.get(NAMED) for version in reversed(self._versions())}
        return found.get(newest(found) or "")

    def push(self, parcel: Parcel) -> None:
        with self._alone():
            self._make_model()
            run, root = self._run(parcel)
            store = artifacts(self.tracking, self.url, root, self._stored)
            self._send(parcel, run, store)
            if self.pyfunc:
                from compiler.registries.pyfunc import files_of

                for path, content in files_of(parcel.manifest).items():
                    self._put(store, path, content)
            if self._first(parcel.manifest.release) is not None:
                raise TakenError(f"{self.url}: {parcel.manifest.release} was published meanwhile, by another push")
            # A run that is finished is not taken up again: were its version deleted, a new push sends every file anew.
            self._call("set_terminated", run, "FINISHED")
            self._publish(parcel.manifest, run, root)

    def check_same(self, version: Version) -> None:
        """Raises RegistryError when the URL asks for the flavour, and a version that is there was published without it."""
        if not self.pyfunc:
            return
        store = artifacts(self.tracking, self.url, self._found(version).source, self._stored)

        def look() -> None:
            with store.get(MLMODEL):
                pass

        try:
            retrying(look, self._give_up)
        except MissingError:
            raise RegistryError(
                f"{self.url}: {version.release} is published already, without pyfunc; a published version never changes: "
                "raise release: in pipeline.yaml, or leave ?pyfunc=true out"
            ) from None

    def alias(self, name: str, version: Version) -> None:
        number = str(self._found(version).number)
        if NATIVE.fullmatch(name):
            self._call("set_registered_model_alias", self.name, name, number)
        else:
            self._call("set_registered_model_tag", self.name, ALIAS_TAG + name, number)

    def pull(self, version: Version, folder: Path) -> None:
        store = artifacts(self.tracking, self.url, self._found(version).source, self._stored)
        where = f"{self.url}@{version.release}"

        @contextlib.contextmanager
        def read(file: File) -> Iterator[Iterator[bytes]]:
            with contextlib.ExitStack() as stack:
                try:
                    chunks = stack.enter_context(store.get(f"{FILES}/{file.path}"))
                except MissingError:
                    raise ReleaseError(f"{where}: {file.path} is not there any more; it is damaged, do not use it") from None
                yield chunks

        def small(name: str) -> bytes | None:
            def once() -> bytes | None:
                try:
                    with store.get(f"{FILES}/{name}") as chunks:
                        return bounded(chunks, f"{where}: {name}")
                except MissingError:
                    return None

            return retrying(once, self._give_up)

        receive(folder, where, version.digest, small, read, lambda work: retrying(work, self._give_up))

    @property
    def _stored(self) -> Path | None:
        """What all artifacts are below where there is no server."""
        return None if self.folder is None else self.folder.absolute() / STORED

    @cached_property
    def _client(self) -> Any:
        return client(self.tracking, self.url)

    def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        connected = self._client
        return call(lambda: getattr(connected, method)(*arguments, **options), self.url)

    def _give_up(self, fault: FaultError) -> Exception:
        return gave_up(fault, self.url)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the folder, where there is one: pushes into it wait for each other. A server keeps its own order."""
        if self.folder is None:
            yield
            return
        with contextlib.ExitStack() as stack:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(self.folder / LOCK))
            except OSError as error:
                raise RegistryError(f"{self.url}: {self.folder}: cannot be written ({error.strerror}); make it so") from error
            yield

    def _all(self) -> tuple[Found, ...]:
        """Every release, by its lowest version; versions that others made, without our tags, are none."""
        named: dict[int, list[str]] = {}
        versions = self._versions()
        for alias, number in (self._aliases() if versions else {}).items():
            named.setdefault(number, []).append(alias)
        found: dict[str, Found] = {}
        for version in versions:
            release, digest = version.tags[RELEASE], version.tags[DIGEST]
            number = int(version.version)
            aliases = tuple(sorted(named.get(number, ())))
            found.setdefault(release, Found(Version(release, digest, aliases), number, version.source))
        return tuple(found[release] for release in sorted(found, key=precedence))

    def _versions(self) -> tuple[Any, ...]:
        """MLflow's versions that are releases, in the order in which they were made."""
        if self.folder is not None and not (self.folder / DATABASE).is_file():
            return ()
        versions: tuple[Any, ...] = ()
        token = None
        while True:
            page = self._call("search_model_versions", f"name='{self.name}'", max_results=PAGE, page_token=token)
            versions += tuple(page)
            if not (token := page.token):
                break
        return tuple(sorted(filter(_is_release, versions), key=lambda version: int(version.version)))

    def _aliases(self) -> dict[str, int]:
        """The number of the version that each alias names."""
        if self.folder is not None and not (self.folder / DATABASE).is_file():
            return {}
        try:
            model = self._call("get_registered_model", self.name)
        except RegistryError as error:
            if absent(error):
                return {}
            raise
        kept = {tag.removeprefix(ALIAS_TAG): value for tag, value in model.tags.items() if tag.startswith(ALIAS_TAG)}
        return {alias: int(number) for alias, number in {**kept, **model.aliases}.items() if str(number).isdecimal()}

    def _first(self, release: str) -> Any:
        """MLflow's version that is a release; None where there is none."""
        return next((version for version in self._versions() if version.tags[RELEASE] == release), None)

    def _found(self, version: Version) -> Found:
        for found in self._all():
            if (found.version.release, found.version.digest) == (version.release, version.digest):
                return found
        raise RegistryError(f"{self.url}: {version.release} is not there any more; somebody deleted it")

    def _make_model(self) -> None:
        with self._there_already():
            self._call("create_registered_model", self.name)

    @contextlib.contextmanager
    def _there_already(self) -> Iterator[None]:
        try:
            yield
        except RegistryError as error:
            if not exists(error):
                raise

    def _experiment(self) -> str:
        """The experiment that holds the runs of this model's pushes."""
        title = f"releases/{self.name}"
        for _ in range(2):
            found = self._call("get_experiment_by_name", title)
            if found is not None and found.lifecycle_stage == "active":
                return str(found.experiment_id)
            if found is not None:
                raise RegistryError(f"{self.url}: MLflow's experiment {title!r} is deleted; restore it, then push again")
            place = None if self._stored is None else (self._stored / self.name).as_uri()
            with self._there_already():
                return str(self._call("create_experiment", title, artifact_location=place))
        raise RegistryError(f"{self.url}: MLflow's experiment {title!r} cannot be made; push again")

    def _run(self, parcel: Parcel) -> tuple[str, str]:
        """The run that holds what an interrupted push of the same bytes sent, or a new one; and where its artifacts go."""
        key = key_of(parcel)
        experiment = self._experiment()
        found = self._call("search_runs", [experiment], f"tags.`{KEY}` = '{key}' and attributes.status = 'RUNNING'")
        manifest = parcel.manifest
        tags = {KEY: key, **_tags(manifest)}
        title = f"{manifest.name} {manifest.release}"
        run = found[0] if found else self._call("create_run", experiment, tags=tags, run_name=title)
        return run.info.run_id, f"{run.info.artifact_uri}/{MODEL}"

    def _send(self, parcel: Parcel, run: str, store: Artifacts) -> None:
        """Send every file that an earlier push has not; each is noted on the run when the server has it."""
        tags = self._call("get_run", run).data.tags
        noted = [file for file in parcel.files if tags.get(_note(file)) == file.path]
        there = self._sizes(run, {file.path.rpartition("/")[0] for file in noted})
        for file in parcel.files:
            if file in noted and there.get(file.path) == file.size:
                continue
            self._put(store, f"{FILES}/{file.path}", Outgoing(parcel.path / file.path, file))
            if file.size >= NOTED_BYTES:
                self._call("set_tag", run, _note(file), file.path)
        self._put(store, f"{FILES}/{MANIFEST}", parcel.content)

    def _sizes(self, run: str, folders: set[str]) -> dict[str, int]:
        """The sizes of the artifacts in some folders of a release. MLflow knows no hashes."""
        root = f"{MODEL}/{FILES}"
        listed = [found for folder in folders for found in self._call("list_artifacts", run, f"{root}/{folder}".rstrip("/"))]
        return {found.path.removeprefix(f"{root}/"): found.file_size for found in listed if not found.is_dir}

    def _put(self, store: Artifacts, path: str, content: bytes | Outgoing) -> None:
        retrying(lambda: store.put(path, content), self._give_up)

    def _publish(self, manifest: Manifest, run: str, root: str) -> None:
        tags = _tags(manifest)
        number = int(self._call("create_model_version", self.name, root, run, tags=tags, await_creation_for=0).version)
        first = self._first(manifest.release)
        if first is None or int(first.version) == number:
            return
        self._call("delete_model_version", self.name, str(number))
        if first.run_id != run:  # else ours came twice: an answer was lost, and the request tried again
            raise TakenError(f"{self.url}: {manifest.release} was published meanwhile, by another push")


def _is_release(version: Any) -> bool:
    tags = version.tags
    return bool(re.fullmatch(SEMVER, tags.get(RELEASE, "")) and re.fullmatch("[0-9a-f]{64}", tags.get(DIGEST, "")))


def _tags(manifest: Manifest) -> dict[str, str]:
    tags = {
        RELEASE: manifest.release,
        DIGEST: manifest.identity,
        NAMED: manifest.name,
        "compile.task": manifest.task,
        "compile.formats": ", ".join(f"{artifact.format} {artifact.precision}" for artifact in manifest.artifacts),
        "compile.licence": manifest.source.licence or "unknown",
        "compile.compiler": manifest.compiler,
    }
    return {name: value[:5000] for name, value in tags.items()}  # MLflow's limit on a tag


def _note(file: File) -> str:
    """The tag that says that a file was sent. MLflow's tags have no room for every path that a file may have."""
    return f"{SENT}.{hashlib.sha256(f'{file.sha256} {file.path}'.encode()).hexdigest()[:32]}"
