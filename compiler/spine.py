"""The spine: a model from its checkpoint to its release and its registries, a line a stage. Read this first."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from compiler import registries
from compiler.build import Build, Candidate, Context, Release
from compiler.config import ModelSpec, Pipeline
from compiler.errors import ConfigError, DamagedError
from compiler.lock import check_lock, read_lock, write_lock
from compiler.plan import Plan, check_cpu, make_plan
from compiler.sources import resolve
from compiler.stages.publish import Published, move_aliases
from compiler.stages.publish import publish as send


def build(
    pipeline: Pipeline, context: Context, lock: Path, only: Sequence[str] = (), *, locked: bool = False
) -> Iterator[Release]:
    """Build the models of a pipeline, or those named in `only`, one after the other; each is given as it is released, and
    then recorded in the lock. With `locked`, nothing is built unless all of it is as the lock records, which is not written.

    Raises:
        CompileError: a model cannot be built, or does not pass its gate; those before it are released.
        LockError: the lock is damaged or cannot be written, or, with `locked`, missing or another.
    """
    specs = select(pipeline, only)
    read_lock(lock)  # a damaged one is told before anything is built
    plans: Iterable[Plan] = (plan_model(spec, context.folder) for spec in specs)
    if locked:
        plans = locked_plans(pipeline, context.folder, lock, only)
    for plan in plans:
        yield build_model(plan, context)
        if not locked:
            write_lock(lock, [plan])
    if not locked and not only:
        write_lock(lock, [], keep={str(spec) for spec in specs})


def build_model(plan: Plan, context: Context) -> Release:
    """Load, export, validate and package one model. Each step comes from the cache where nothing that shapes it changed."""
    with Build.alone(plan, context) as build:
        if current := build.current():
            return current
        check_cpu(plan.spec)
        if build.recall():
            with contextlib.suppress(DamagedError):
                return _release(build)
            build.forget()
        return _release(build)


def _release(build: Build) -> Release:
    reference = build.load()
    made: list[Candidate] = []
    # int8 takes most of the time: what fails without it ends the build before.
    for low in (False, True):
        if targets := [target for target in build.plan.validates if (target.precision == "int8") is low]:
            made += build.side_by_side(targets, lambda target: build.validate(target, build.export(target), reference))
            build.gate(reference, made)
    order = list(map(str, build.plan.validates))
    made.sort(key=lambda candidate: order.index(f"{candidate.artifact.format} {candidate.artifact.precision}"))
    return build.package(reference, made)


def plan_model(spec: ModelSpec, folder: Path) -> Plan:
    """Every step of a model, its checkpoint found and hashed. `folder` is what a pipeline's relative paths start from."""
    return make_plan(spec, resolve(spec, folder), folder)


def locked_plans(pipeline: Pipeline, folder: Path, lock: Path, only: Sequence[str]) -> list[Plan]:
    """The plans of a pipeline's models, all as its lock records them. Raises LockError when one is not."""
    plans = [plan_model(spec, folder) for spec in select(pipeline, only)]
    check_lock(lock, plans, whole=not only)
    return plans


def publish(
    pipeline: Pipeline, releases: Sequence[Release], context: Context, only: Sequence[str] = ()
) -> Iterator[Published]:
    """Publish what `build` gave, in its order, each model where its `publish:` says, then move the aliases: each is given once
    it is sent and again once its aliases are moved. It comes after the last model's gate: a pipeline is one delivery, and when
    a model of it fails, none of it goes out; when one cannot be published, no alias moves.

    Raises:
        RegistryError: a registry cannot be reached, refuses, or has that version with other content; what is published
            until then stays published, and all releases stay on disk.
    """
    sent = []
    for spec, release in zip(select(pipeline, only), releases, strict=True):
        for place in spec.publish:
            done = send(release.path, place.url, place.aliases, context.tell, release.manifest, verified=True)
            yield done
            sent.append((done, place.aliases, release.manifest))
    for done, aliases, manifest in sent:
        yield move_aliases(done, aliases, context.tell, manifest)


def connect(pipeline: Pipeline, only: Sequence[str] = ()) -> None:
    """See, before a build that takes long, that all places can be published to and that what this needs is installed. Raises
    RegistryError when not."""
    for spec in select(pipeline, only):
        for place in spec.publish:
            registries.ready(place.url)


def select(pipeline: Pipeline, only: Sequence[str]) -> list[ModelSpec]:
    """The models of a pipeline called by the names in `only`; all of them when it is empty.

    Raises:
        ConfigError: there is no model of that name.
    """
    names = sorted({spec.name for spec in pipeline.models})
    for name in only:
        if name not in names:
            raise ConfigError(f"--only {name}: the pipeline has no such model; it has {', '.join(names)}")
    return [spec for spec in pipeline.models if not only or spec.name in only]
