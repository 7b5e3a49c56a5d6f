"""Commands over a pipeline.yaml: build, plan, init, schema."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compiler.cli.options import cache_option, json_option, locked_option, open_store
from compiler.cli.output import print_json, published_json, report_json, table, verdicts
from compiler.errors import CompileError, NumericsError

if TYPE_CHECKING:
    from compiler.build import Release
    from compiler.plan import Plan
    from compiler.stages.publish import Published


@click.command()
@click.argument("pipeline", type=click.Path(path_type=Path), default=Path("pipeline.yaml"))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Where releases go, instead of the pipeline's output:.")
@click.option("--only", multiple=True, metavar="NAME", help="Build this model only; may be given again.")
@click.option("--no-cache", is_flag=True, help="Run every step, and compare with a release that is there.")
@click.option("--no-publish", is_flag=True, help="Build only; leave the registries of publish: alone.")
@locked_option
@click.option(
    "-j", "--jobs", type=click.IntRange(1, 64), default=3, show_default=True, help="Formats to work on side by side."
)
@click.option("-v", "--verbose", is_flag=True, help="Show what the libraries print; the build's log always has it.")
@cache_option
@json_option
def build(
    pipeline: Path,
    output: Path | None,
    only: tuple[str, ...],
    no_cache: bool,
    no_publish: bool,
    locked: bool,
    jobs: int,
    verbose: bool,
    cache_dir: Path | None,
    as_json: bool,
) -> None:
    """Build the releases of PIPELINE (pipeline.yaml)."""
    from compiler.build import FOLDER, Context
    from compiler.config import read
    from compiler.lock import lock_path
    from compiler.progress import Display
    from compiler.spine import build as run
    from compiler.spine import connect
    from compiler.spine import publish as run_publish

    parsed = read(pipeline)
    if not no_publish:
        connect(parsed, only)
    where = output if output is not None else pipeline.parent / parsed.output
    with Display((where / FOLDER) if verbose else None) as display:
        context = Context(
            folder=pipeline.parent,
            output=where,
            store=open_store(cache_dir),
            tell=display.tell,
            use_cache=not no_cache,
            jobs=jobs,
        )
        releases = []
        published: dict[tuple[Path, str], Published] = {}
        try:
            for release in run(parsed, context, lock_path(pipeline), only, locked=locked):
                releases.append(release)
            if not no_publish:
                for done in run_publish(parsed, releases, context, only):
                    published[done.path, done.url] = done
        except CompileError as error:
            if isinstance(error, NumericsError) and error.reports and not as_json:
                display.console.print(verdicts(error.reports))
            error.released = [_release_json(release, published.values()) for release in releases]
            raise
        finally:
            if not as_json:
                for release in releases:  # also what was released before something failed
                    table(release.manifest, release.reports, release.path)
    if as_json:
        print_json([_release_json(release, published.values()) for release in releases])


@click.command(short_help="List the steps, run or cached, and why.")
@click.argument("pipeline", type=click.Path(path_type=Path), default=Path("pipeline.yaml"))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Where releases go, instead of the pipeline's output:.")
@click.option("--only", multiple=True, metavar="NAME", help="Plan this model only; may be given again.")
@locked_option
@cache_option
@json_option
def plan(
    pipeline: Path, output: Path | None, only: tuple[str, ...], locked: bool, cache_dir: Path | None, as_json: bool
) -> None:
    """List every step of PIPELINE: whether it would run or come from the cache, and why."""
    from compiler.build import planned
    from compiler.config import read
    from compiler.lock import lock_path
    from compiler.spine import locked_plans, plan_model, select

    parsed = read(pipeline)
    where = output if output is not None else pipeline.parent / parsed.output
    store = open_store(cache_dir)
    plans: Iterable[Plan] = (plan_model(spec, pipeline.parent) for spec in select(parsed, only))
    if locked:
        plans = locked_plans(parsed, pipeline.parent, lock_path(pipeline), only)
    rows = [row for plan in plans for row in planned(plan, where, store)]
    if as_json:
        print_json(rows)
        return
    width = max(len(row["step"]) for row in rows)
    model = ""
    for row in rows:
        if row["model"] != model:
            model = row["model"]
            click.echo(model)
        click.echo(f"  {row['step']:<{width}}  {row['state']:<9}  {row['why']}".rstrip())


@click.command(short_help="Write a pipeline.yaml for a checkpoint.")
@click.argument("checkpoint")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("pipeline.yaml"), help="The file to write.")
@click.option("--task", help="Instead of the one that config.architectures tells.")
@click.option("--revision", help="A hub's commit, tag or branch.")
@click.option("--opset", type=int, help="ONNX operator set.")
@click.option("--trust-remote-code", is_flag=True, help="The checkpoint carries Python code and you have read it.")
@click.option("--allow-pickle", is_flag=True, help="Open the checkpoint's pickle, if its weights are one.")
@click.option("--force", is_flag=True, help="Write over a file that is there.")
@json_option
def init(
    checkpoint: str,
    output: Path,
    task: str | None,
    revision: str | None,
    opset: int | None,
    trust_remote_code: bool,
    allow_pickle: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Write a commented pipeline.yaml for CHECKPOINT: a folder, a GGUF file, package:… or hf:ORG/NAME."""
    from compiler.init import write

    written = write(checkpoint, output, task, revision, opset, trust_remote_code, allow_pickle, force)
    if as_json:
        print_json(written)
        return
    click.echo(f"{output}: {written['name']} {written['release']}, {written['task']}; next: compile {output}")


@click.command(short_help="Print the JSON schema of pipeline.yaml.")
@json_option
def schema(as_json: bool) -> None:
    """Print the JSON schema of pipeline.yaml, for editors that complete and check YAML."""
    from compiler.config import schema as make

    del as_json  # it is JSON either way
    print_json(make())


def _release_json(release: Release, published: Iterable[Published]) -> dict[str, Any]:
    mine = [done for done in published if done.path == release.path]
    return {
        "name": release.manifest.name,
        "release": release.manifest.release,
        "path": str(release.path),
        "made": release.made,
        "artifacts": [
            {
                "format": artifact.format,
                "precision": artifact.precision,
                "bytes": sum(file.size for file in artifact.files),
                **report_json(report),
            }
            for artifact, report in zip(release.manifest.artifacts, release.reports, strict=True)
        ],
        "refused": dict(release.manifest.refused),
        "published": [published_json(done) for done in mine],
    }
