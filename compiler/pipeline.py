"""The spine: a model from its checkpoint to its release, a line a stage. Read this first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from compiler.build import Build, Context, Release
from compiler.config import ModelSpec, Pipeline
from compiler.errors import ConfigError
from compiler.plan import make_plan
from compiler.sources import resolve


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
        if current := build.published():
            return current
        reference = build.load()
        made = build.side_by_side(lambda target: build.validate(target, build.export(target), reference))
        build.gate(made)
        return build.package(reference, made)


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
