"""The command line. The only place that prints results or exits."""

from __future__ import annotations

import contextlib
import difflib
import errno
import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, cast

import click
from click_default_group import DefaultGroup  # type: ignore[import-untyped]

import compiler
from compiler.errors import CompileError, NumericsError, ReleaseError, SigningError

if TYPE_CHECKING:
    from compiler.bench import Result
    from compiler.build import Release
    from compiler.manifest import Manifest
    from compiler.plan import Plan
    from compiler.stages.publish import Published
    from compiler.types import Report

CACHE_VARIABLE = "COMPILE_CACHE_DIR"
PASSWORD_VARIABLE = "COMPILE_SIGN_PASSWORD"  # noqa: S105
json_option = click.option("--json", "as_json", is_flag=True, help="The result on stdout as JSON; progress stays on stderr.")
cache_option = click.option(
    "--cache-dir", envvar=CACHE_VARIABLE, type=click.Path(path_type=Path), help=f"The stage cache (also {CACHE_VARIABLE})."
)

locked_option = click.option(
    "--locked", is_flag=True, help="Refuse when anything is not as pipeline.lock, which builds write, records it."
)


@click.group(
    cls=cast("type[click.Group]", DefaultGroup), default="build", context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(compiler.__version__, prog_name="compile")
def cli() -> None:
    """Compile checkpoints into validated, versioned CPU releases: TorchScript, ONNX, OpenVINO.

    `compile pipeline.yaml` is `compile build pipeline.yaml`.
    """


@cli.command()
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
    from compiler.pipeline import build as run
    from compiler.pipeline import connect
    from compiler.pipeline import publish as run_publish
    from compiler.progress import Display

    _expect_file(pipeline)
    parsed = read(pipeline)
    if not no_publish:
        connect(parsed, only)
    where = output if output is not None else pipeline.parent / parsed.output
    with Display((where / FOLDER) if verbose else None) as display:
        context = Context(
            folder=pipeline.parent,
            output=where,
            store=_store(cache_dir),
            tell=display.tell,
            use_cache=not no_cache,
            jobs=jobs,
        )
        releases = []
        published = []
        try:
            for release in run(parsed, context, lock_path(pipeline), only, locked=locked):
                releases.append(release)
            if not no_publish:
                for done in run_publish(parsed, releases, context, only):
                    published.append(done)
        except NumericsError as error:
            if error.reports and not as_json:
                display.console.print(_verdicts(error.reports))
            raise
        finally:
            if not as_json:
                for release in releases:  # also what was released before something failed
                    _table(release.manifest, release.reports, release.path)
    if as_json:
        _print_json([_release_json(release, published) for release in releases])


@cli.command(short_help="List the steps, run or cached, and why.")
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
    from compiler.pipeline import locked_plans, plan_model, select

    parsed = read(pipeline)
    where = output if output is not None else pipeline.parent / parsed.output
    store = _store(cache_dir)
    plans: Iterable[Plan] = (plan_model(spec, pipeline.parent) for spec in select(parsed, only))
    if locked:
        plans = locked_plans(parsed, pipeline.parent, lock_path(pipeline), only)
    rows = [row for plan in plans for row in planned(plan, where, store)]
    if as_json:
        _print_json(rows)
        return
    width = max(len(row["step"]) for row in rows)
    model = ""
    for row in rows:
        if row["model"] != model:
            model = row["model"]
            click.echo(model)
        click.echo(f"  {row['step']:<{width}}  {row['state']:<9}  {row['why']}".rstrip())


@cli.command(short_help="Show what a release holds.")
@click.argument("release", type=click.Path(path_type=Path))
@json_option
def inspect(release: Path, as_json: bool) -> None:
    """Show what RELEASE holds: files, checks with their limits, fusions, runtime settings, origin."""
    from compiler.verify import is_signed, read_release

    manifest, reports = read_release(release)
    signed = is_signed(release)
    if as_json:
        checks = [_report_json(report) for report in reports]
        _print_json({"manifest": asdict(manifest), "checks": checks, "signed": signed})
        return
    source = manifest.source
    click.echo(f"{manifest.name} {manifest.release}: {manifest.architecture} for {manifest.task}")
    click.echo(f"source    {source.uri}  licence {source.licence or 'not stated'}")
    for file in source.files:
        click.echo(f"          {file.sha256}  {file.path}")
    for side in ("inputs", "outputs"):
        tensors = [f"{t.name} {t.dtype} [{', '.join(map(str, t.shape))}]" for t in getattr(manifest.signature, side)]
        click.echo(f"{side:<9} {', '.join(tensors)}")
    click.echo(f"length    at most {manifest.positions} tokens" if manifest.positions else "length    not bounded")
    if manifest.left_out:
        click.echo(f"left out  {', '.join(manifest.left_out)}")
    click.echo(f"made with python {manifest.python}, compile {manifest.compiler}, " + _pairs(manifest.libraries, " "))
    click.echo(f"signed    {'yes; compile verify --key checks it' if signed else 'no'}")
    click.echo()
    _table(manifest, reports, release)
    for artifact in manifest.artifacts:
        click.echo(f"\n{artifact.files[0].path}")
        click.echo(f"  runtime  {_pairs(artifact.runtime)}" + (f", opset {artifact.opset}" if artifact.opset else ""))
        if artifact.fast_on:  # not in a release that an earlier version made
            click.echo(f"  fast on  a CPU with {_either(artifact.fast_on)}")
        click.echo(f"  fused    {_pairs(artifact.fusions, ' ') or 'nothing'}")
        for name, reason in artifact.declined.items():
            click.echo(f"  without  {name}: {reason}")
        report = next(r for r in reports if (r.format, r.precision) == (artifact.format, artifact.precision))
        for check in report.checks:
            relation = "<=" if check.name.startswith("max") else ">="
            verdict = "ok" if check.passed else "FAILED"
            click.echo(f"  {verdict:<8} {check.output} {check.name} {_figure(check.figure)} {relation} {check.limit:g}")


@cli.command(short_help="Hash a release again; repeat its checks.")
@click.argument("release", type=click.Path(path_type=Path))
@click.option("--key", type=click.Path(path_type=Path), help="Also check the signature, with this public key (PEM).")
@click.option("--numerics", is_flag=True, help="Also reopen every artifact and repeat its checks.")
@click.option("--rebuild", is_flag=True, help="Also build it again, without the cache, and compare every byte.")
@click.option("--any-environment", is_flag=True, help="Rebuild also where libraries, CPU or compiler are others.")
@click.option("--source", help="Where the checkpoint is now, if not where the manifest says: path:, package: or hf:.")
@click.option(
    "--folder", type=click.Path(path_type=Path), help="Where pipeline.yaml's relative paths start, if not here, nor two up."
)
@click.option("--trust-remote-code", is_flag=True, help="Run the checkpoint's own code, if the reference needs it.")
@click.option("--allow-pickle", is_flag=True, help="Open the checkpoint's pickle, if its weights are one.")
@cache_option
@json_option
def verify(
    release: Path,
    key: Path | None,
    numerics: bool,
    rebuild: bool,
    any_environment: bool,
    source: str | None,
    folder: Path | None,
    trust_remote_code: bool,
    allow_pickle: bool,
    cache_dir: Path | None,
    as_json: bool,
) -> None:
    """Hash every file of RELEASE again; with --key, check its signature; with --numerics, repeat its checks against the
    original; with --rebuild, build it again from what its manifest says, and compare every byte."""
    from compiler.progress import Display
    from compiler.verify import is_signed, read_release, verify_files, verify_numerics

    if any_environment and not rebuild:
        raise click.UsageError("--any-environment is for --rebuild")
    if folder is not None and not (numerics or rebuild):
        raise click.UsageError("--folder is for --numerics and --rebuild")

    manifest, reports = read_release(release)
    verify_files(release, manifest)
    if key is not None:
        from compiler.signing import verify_signature

        verify_signature(release, manifest, key)
    signed = is_signed(release)
    options = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    store = _store(cache_dir)
    if numerics:
        with Display() as display:
            reports = verify_numerics(release, manifest, store, display.tell, source, options, folder)
    count = len(manifest.every_file)
    if not as_json:
        click.echo(f"{manifest.name} {manifest.release}: {count} files are what the manifest says")
        if key is not None:
            click.echo(f"{manifest.name} {manifest.release}: the signature is by {key} and covers every file")
        elif signed:
            click.echo(f"{manifest.name} {manifest.release}: is signed; the signature was not checked: give --key")
        if numerics:
            _table(manifest, reports, release)
    if rebuild:
        from compiler.rebuild import RECORDS
        from compiler.rebuild import rebuild as run

        try:
            with Display() as display:
                again = run(
                    release, manifest, store.root, display.tell, source, folder, options, any_environment=any_environment
                )
        except ReleaseError as error:
            for name in () if as_json else error.files:
                click.echo(f"differs  {name}")
            raise
        if not as_json:
            left_out = [name for name in RECORDS if name not in again]
            without = f"; not compared, since they record another environment: {', '.join(left_out)}" if left_out else ""
            click.echo(f"{manifest.name} {manifest.release}: built again, {len(again)} files are the same bytes{without}")
    if as_json:
        checks = [_report_json(report) for report in reports] if numerics else []
        _print_json(
            {
                "release": str(release),
                "files": count,
                "signed": signed,
                "signature_checked": key is not None,
                "numerics": numerics,
                "checks": checks,
                "rebuild": rebuild,
            }
        )


@cli.command(short_help="Sign a release with a local key.")
@click.argument("release", type=click.Path(path_type=Path))
@click.option("--key", required=True, type=click.Path(path_type=Path), help="The EC private key (PEM).")
@json_option
def sign(release: Path, key: Path, as_json: bool) -> None:
    """Verify RELEASE and sign every file of it: model.sig, which `compile verify --key` checks.

    The password of an encrypted key is asked for, or comes from COMPILE_SIGN_PASSWORD.
    """
    from compiler.manifest import SIGNATURE
    from compiler.signing import sign as run

    def password() -> str:
        given = os.environ.get(PASSWORD_VARIABLE)
        if given is None and not sys.stdin.isatty():
            raise SigningError(f"{key}: is encrypted; put its password into {PASSWORD_VARIABLE}, or sign at a terminal")
        return str(click.prompt(f"password of {key}", hide_input=True, err=True)) if given is None else given

    manifest = run(release, key, password)
    if as_json:
        _print_json({"release": str(release), "signature": str(release / SIGNATURE)})
        return
    click.echo(f"{manifest.name} {manifest.release}: signed; {release / SIGNATURE}")


def _shape(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    found = []
    for value in values:
        batch, _, sequence = value.partition("x")
        if not (batch.isdecimal() and sequence.isdecimal() and int(batch) and int(sequence)):
            raise click.BadParameter(f"{value!r} is not BATCHxSEQUENCE, such as 8x128")
        found.append((int(batch), int(sequence)))
    return tuple(found)


@cli.command(short_help="Time a release's artifacts.")
@click.argument("releases", metavar="RELEASE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--shape", "shapes", multiple=True, callback=_shape, metavar="BxS", help="Batch × sequence; may be given again.")
@click.option("--threads", type=click.IntRange(1, 1024), help="Threads of every runtime; as many as cores when left out.")
@click.option("--rounds", type=click.IntRange(1, 1000), default=5, show_default=True, help="How often each takes its turn.")
@click.option("--record", is_flag=True, help="Keep the result in the release's manifest, outside of what is hashed.")
@click.option("--source", help="Where the checkpoint is now, if not where the manifest says: path:, package: or hf:.")
@click.option("--trust-remote-code", is_flag=True, help="Run the checkpoint's own code, if the original needs it.")
@click.option("--allow-pickle", is_flag=True, help="Open the checkpoint's pickle, if its weights are one.")
@json_option
def bench(
    releases: tuple[Path, ...],
    shapes: tuple[tuple[int, int], ...],
    threads: int | None,
    rounds: int,
    record: bool,
    source: str | None,
    trust_remote_code: bool,
    allow_pickle: bool,
    as_json: bool,
) -> None:
    """Time every artifact of each RELEASE beside the eager original, on this machine."""
    from compiler.bench import bench as run
    from compiler.progress import status
    from compiler.verify import check_unsigned, read_release, record_benchmark, verify_files

    options = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    results = []
    for release in releases:
        manifest, _ = read_release(release)
        if record:
            check_unsigned(release)
        verify_files(release, manifest, recording=record)
        with status() as tell:
            result = run(
                release,
                manifest,
                shapes=shapes or None,
                threads=threads or os.cpu_count() or 1,
                rounds=rounds,
                source=source,
                options=options,
                tell=tell,
            )
        if record:
            record_benchmark(release, result.to_json())
        results.append({"release": str(release), **result.to_json()})
        if not as_json:
            click.echo(f"{manifest.name} {manifest.release}  {release}")
            _print_benchmark(result)
    if as_json:
        _print_json(results)


@cli.command(short_help="Publish a release to a registry.")
@click.argument("release", type=click.Path(path_type=Path))
@click.argument("url")
@click.option("--alias", "aliases", multiple=True, metavar="NAME", help="Move this alias to it; may be given again.")
@json_option
def push(release: Path, url: str, aliases: tuple[str, ...], as_json: bool) -> None:
    """Publish RELEASE at URL (file://, s3://, oci://, mlflow:// or hf://) under its version, which never changes there."""
    from compiler.progress import Display
    from compiler.stages.publish import publish
    from compiler.verify import is_signed, read_release

    manifest, _ = read_release(release)
    with Display() as display:
        published = publish(release, url, aliases, display.tell, manifest)
    if as_json:
        _print_json(_published_json(published))
        return
    version = published.version
    what = "published" if published.made else "is there already, the same; nothing was sent"
    if not published.made and is_signed(release):
        # Whether the published one has this signature is not known without fetching it.
        what += ", not even a signature made since: sign before you push"
    moved = f"; {', '.join(published.moved)} moved to it" if published.moved else ""
    click.echo(f"{manifest.name} {version.release}  {url}@{version.release}  {what}{moved}")
    click.echo(f"sha256:{version.digest}")


@cli.command(short_help="Fetch a release from a registry.")
@click.argument("url", metavar="URL[@REF]")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@json_option
def pull(url: str, folder: Path, as_json: bool) -> None:
    """Fetch the release that REF names (a version, an alias or sha256:DIGEST; `latest` when left out) into DIR, which appears
    whole and verified."""
    from compiler.progress import status
    from compiler.stages.publish import pull as run

    with status() as tell:
        tell(f"fetching {url}")
        manifest, made = run(url, folder)
    if as_json:
        _print_json(
            {
                "url": url,
                "name": manifest.name,
                "release": manifest.release,
                "digest": manifest.identity,
                "path": str(folder),
                "files": len(manifest.every_file),
                "made": made,
            }
        )
        return
    what = "files are what the manifest says" if made else "files are there already, and are what the manifest says"
    click.echo(f"{manifest.name} {manifest.release}  {folder}  {len(manifest.every_file)} {what}")
    click.echo(f"sha256:{manifest.identity}")


@cli.command("list", short_help="List a registry's versions and aliases.")
@click.argument("url")
@json_option
def list_versions(url: str, as_json: bool) -> None:
    """List the versions that are published at URL, oldest first, with the aliases that name them now."""
    from compiler.stages.publish import versions

    found = versions(url)
    if as_json:
        _print_json([asdict(version) for version in found])
        return
    if not found:
        click.echo(f"{url}: nothing is published there", err=True)
        return
    click.echo(_lines([(version.release, f"sha256:{version.digest}", ", ".join(version.aliases)) for version in found]))


@cli.command(short_help="Move an alias in a registry.")
@click.argument("url", metavar="URL@REF")
@click.argument("name")
@json_option
def alias(url: str, name: str, as_json: bool) -> None:
    """Make NAME (such as prod) name the version that REF names, in one step."""
    from compiler.stages.publish import alias as run

    version, moved = run(url, name)
    if as_json:
        _print_json({"alias": name, "moved": moved, **asdict(version)})
        return
    click.echo(f"{name} → {version.release}" + ("" if moved else ", as before"))


@cli.command(short_help="Compare two releases.")
@click.argument("before", metavar="A")
@click.argument("after", metavar="B")
@click.option(
    "--fail-on",
    "gates",
    multiple=True,
    metavar="KIND[=PERCENT]",
    help="Exit 1 when B is worse than A by more than so many percent in size, numerics, metrics or speed, or lost some of its "
    "artifacts or fusions; regress=PERCENT is all of these. files: when any byte differs. May be given again.",
)
@json_option
def diff(before: str, after: str, gates: tuple[str, ...], as_json: bool) -> None:
    """Compare two releases: A and B are folders, or registries' URLs such as hf://ORG/NAME@1.0.0."""
    from compiler.diff import diff as run
    from compiler.diff import parse_gate, worse
    from compiler.diff_text import text

    asked = [parse_gate(gate) for gate in gates]
    with _fetched(before) as old, _fetched(after) as new:
        result = run(old, new)
    found = worse(result, asked)
    if as_json:
        _print_json({**result, "worse": found})
    else:
        click.echo(text(result))
    if found:
        more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
        click.echo(f"error: {after} is worse than {before}: {'; '.join(found[:3])}{more}", err=True)
        raise click.exceptions.Exit(1)


@contextlib.contextmanager
def _fetched(place: str) -> Iterator[Path]:
    """A release's folder; one that is in a registry is fetched for the time being."""
    if "://" not in place:
        yield Path(place)
        return
    from compiler.stages.publish import pull

    with tempfile.TemporaryDirectory(prefix="compile-") as aside:
        pull(place, Path(aside) / "release")
        yield Path(aside) / "release"


@cli.command(short_help="Write a pipeline.yaml for a checkpoint.")
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
        _print_json(written)
        return
    click.echo(f"{output}: {written['name']} {written['release']}, {written['task']}; next: compile {output}")


@cli.command(short_help="Print the JSON schema of pipeline.yaml.")
@json_option
def schema(as_json: bool) -> None:
    """Print the JSON schema of pipeline.yaml, for editors that complete and check YAML."""
    from compiler.config import schema as make

    del as_json  # it is JSON either way
    _print_json(make())


def _expect_file(pipeline: Path) -> None:
    """A misspelt verb is taken for a pipeline's name, since `build` may be left out."""
    close = difflib.get_close_matches(str(pipeline), cli.commands, n=1)
    if close and not pipeline.exists():
        raise click.UsageError(f"no such command or file: {pipeline}; did you mean {close[0]!r}?")


def _store(cache_dir: Path | None) -> Any:
    from compiler.store import Store

    if cache_dir is None:
        import platformdirs

        cache_dir = platformdirs.user_cache_path("aot-model-compiler")
    return Store(cache_dir)


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def _report_json(report: Report) -> dict[str, Any]:
    return {**asdict(report), "passed": report.passed}


def _published_json(published: Published) -> dict[str, Any]:
    version = published.version
    return {
        "url": published.url,
        "release": version.release,
        "digest": version.digest,
        "made": published.made,
        "aliases": version.aliases,
        "moved": published.moved,
    }


def _release_json(release: Release, published: Sequence[Published]) -> dict[str, Any]:
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
                **_report_json(report),
            }
            for artifact, report in zip(release.manifest.artifacts, release.reports, strict=True)
        ],
        "published": [_published_json(done) for done in mine],
    }


def _figure(value: float) -> str:
    return f"{value:.7f}" if 0.5 <= value <= 1 else f"{value:.2g}"


def _pairs(values: Any, sign: str = "=") -> str:
    return ", ".join(f"{name}{sign}{value}" for name, value in values.items())


def _either(names: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _row(report: Report, path: str, size: str) -> tuple[str, ...]:
    error, cosine, argmax = (report.figure(name) for name in ("max_abs", "cosine", "argmax"))
    shown = ["–" if figure is None else _figure(figure) for figure in (error, cosine, argmax)]
    return (path, report.format, report.precision, size, *shown, "passed" if report.passed else "FAILED")


def _print_benchmark(result: Result) -> None:
    from compiler.samples import TEXT

    click.echo(f"{result.threads} threads, {result.rounds} rounds, {result.cpu}")
    click.echo(f"p50 / p90 ms a batch, times the original's speed; {TEXT}: 32 lines, {result.padding:.0%} padding")
    rows = [("artifact", *result.shapes, f"{TEXT}/s", "peak MB")]
    for subject, memory in result.memory.items():
        found = {timing.shape: timing for timing in result.timings if timing.subject == subject}
        cells = [f"{t.p50:.1f} / {t.p90:.1f}  {t.ratio:.2f}x" for t in found.values()]
        rows.append((subject, *cells, f"{found[TEXT].texts_per_second:.0f}", f"{memory:.0f}"))
    click.echo(_lines(rows))
    click.echo("best      " + ", ".join(f"{shape}: {result.best(shape)}" for shape in result.shapes))


HEADINGS = ("artifact", "format", "precision", "size", "max error", "min cosine", "argmax", "verdict")


def _lines(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows as text in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def _table(manifest: Manifest, reports: Sequence[Report], path: Path) -> None:
    rows: list[tuple[str, ...]] = [HEADINGS]
    for artifact in manifest.artifacts:
        report = next(r for r in reports if (r.format, r.precision) == (artifact.format, artifact.precision))
        rows.append(_row(report, artifact.files[0].path, f"{sum(file.size for file in artifact.files) / 1e6:.1f} MB"))
    click.echo(f"{manifest.name} {manifest.release}  {path}")
    click.echo(_lines(rows))


def _verdicts(reports: Sequence[Report]) -> str:
    return _lines([HEADINGS, *(_row(report, "–", "–") for report in reports)])


class _Terminated(BaseException):
    """SIGTERM."""


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    raise _Terminated


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The console script: every way out of the program ends here, with the exit code that the README lists."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, _terminate)
    try:
        left = cli.main(args=given, prog_name="compile", standalone_mode=False)
        sys.stdout.flush()
        code = left if isinstance(left, int) else 0  # click returns the code of an Exit
    except click.ClickException as error:
        error.show()
        code = 2
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; no release is half made", err=True)
        code = 130
    except _Terminated:
        click.echo("terminated; no release is half made", err=True)
        code = 143
    except CompileError as error:
        text = " ".join(str(error).split())
        if "--json" in given:
            reports = getattr(error, "reports", ())
            answer = {"error": text, "kind": type(error).__name__, "artifacts": [_report_json(report) for report in reports]}
            if isinstance(error, ReleaseError) and error.files:
                answer["files"] = list(error.files)
            _print_json(answer)
        click.echo(f"error: {text}", err=True)
        code = 1
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if error.errno == errno.EPIPE:
            code = 141
        elif error.errno == errno.ENOSPC and error.filename is None:
            click.echo("error: standard output: no space is left; make room", err=True)
            code = 1
        else:
            code = _bug()
    except Exception:
        code = _bug()
    sys.exit(code)


def _bug() -> int:
    traceback.print_exc()
    click.echo("this is a bug in compile: please report it with the lines above", err=True)
    return 3
