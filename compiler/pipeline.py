"""The spine: a model from its checkpoint to its release and its registries, a line a stage. Read this first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from compiler import registries
from compiler.build import Build, Context, Release
from compiler.config import ModelSpec, Pipeline
from compiler.errors import ConfigError
from compiler.plan import make_plan
from compiler.sources import resolve
from compiler.stages.publish import Published
from compiler.stages.publish import publish as push


def build(pipeline: Pipeline, context: Context, only: Sequence[str] = ()) -> Iterator[Release]:
    """Build the models of a pipeline, or those named in `only`, one after the other; each is given as it is released.

    Raises:
        CompileError: a model cannot be built, or does not pass its gate; those before it are released.
    """
    for spec in select(pipeline, only):
        yield build_model(spec, context)


def build_model(spec: ModelSpec, context: Context) -> Release:
    """Load, export, validate and package one model. Each step comes from the cache where nothing that shapes it changed."""
    snapshot = resolve(spec, context.folder)
    plan = make_plan(spec, snapshot, context.folder)
    with Build.alone(plan, context) as build:
        if current := build.current():
            return current
        reference = build.load()
        made = build.side_by_side(lambda target: build.validate(target, build.export(target), reference))
        build.gate(made)
        return build.package(reference, made)


def publish(
    pipeline: Pipeline, releases: Sequence[Release], context: Context, only: Sequence[str] = ()
) -> Iterator[Published]:
    """Publish what `build` gave, in its order, each model where its `publish:` says. It comes after the last model's gate: a
    pipeline is one delivery, and when a model of it fails, none of it goes out and no alias moves.

    Raises:
        RegistryError: a registry cannot be reached, refuses, or has that version with other content; what is published
            until then stays published, and all releases stay on disk.
    """
    for spec, release in zip(select(pipeline, only), releases, strict=True):
        for place in spec.publish:
            yield push(release.path, place.url, place.aliases, context.tell, release.manifest, verified=True)


def connect(pipeline: Pipeline, only: Sequence[str] = ()) -> None:
    """See, before a build that takes long, that what publishing needs is installed. Raises RegistryError when it is not."""
    for spec in select(pipeline, only):
        for place in spec.publish:
            registries.connect(place.url)


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
