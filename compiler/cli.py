"""The command line. The only place that prints results or exits."""

from __future__ import annotations

import contextlib
import difflib
import errno
import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, cast

import click
from click_default_group import DefaultGroup  # type: ignore[import-untyped]

import compiler
from compiler.errors import CompileError, NumericsError

if TYPE_CHECKING:
    from compiler.bench import Result
    from compiler.build import Release
    from compiler.manifest import Manifest
    from compiler.types import Report

CACHE_VARIABLE = "COMPILE_CACHE_DIR"
json_option = click.option("--json", "as_json", is_flag=True, help="The result on stdout as JSON; progress stays on stderr.")
cache_option = click.option(
    "--cache-dir", envvar=CACHE_VARIABLE, type=click.Path(path_type=Path), help=f"The stage cache (also {CACHE_VARIABLE})."
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
    jobs: int,
    verbose: bool,
    cache_dir: Path | None,
    as_json: bool,
) -> None:
    """Build the releases of PIPELINE (pipeline.yaml)."""
    from compiler.build import FOLDER, Context
    from compiler.config import read
    from compiler.pipeline import build as run
    from compiler.progress import Display

    _expect_file(pipeline)
    parsed = read(pipeline)
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
        try:
            for release in run(parsed, context, only):
                releases.append(release)
        except NumericsError as error:
            if error.reports and not as_json:
                display.console.print(_verdicts(error.reports))
            raise
        finally:
            if not as_json and len(releases) < len(parsed.models):
                for release in releases:  # what was released before something failed
                    _table(release.manifest, release.reports, release.path)
    if as_json:
        _print_json([_release_json(release) for release in releases])
        return
    for release in releases:
        _table(release.manifest, release.reports, release.path)


@cli.command(short_help="List the steps, run or cached, and why.")
@click.argument("pipeline", type=click.Path(path_type=Path), default=Path("pipeline.yaml"))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Where releases go, instead of the pipeline's output:.")
@click.option("--only", multiple=True, metavar="NAME", help="Plan this model only; may be given again.")
@cache_option
@json_option
def plan(pipeline: Path, output: Path | None, only: tuple[str, ...], cache_dir: Path | None, as_json: bool) -> None:
    """List every step of PIPELINE: whether it would run or come from the cache, and why."""
    from compiler.build import planned
    from compiler.config import read
    from compiler.pipeline import select

    parsed = read(pipeline)
    where = output if output is not None else pipeline.parent / parsed.output
    store = _store(cache_dir)
    rows = [row for spec in select(parsed, only) for row in planned(spec, pipeline.parent, where, store)]
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
    from compiler.verify import read_release

    manifest, reports = read_release(release)
    if as_json:
        _print_json({"manifest": asdict(manifest), "checks": [_report_json(report) for report in reports]})
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
@click.option("--numerics", is_flag=True, help="Also reopen every artifact and repeat its checks.")
@click.option("--source", help="Where the checkpoint is now, if not where the manifest says: path:, package: or hf:.")
@click.option("--trust-remote-code", is_flag=True, help="Run the checkpoint's own code, if the reference needs it.")
@click.option("--allow-pickle", is_flag=True, help="Open the checkpoint's pickle, if its weights are one.")
@cache_option
@json_option
def verify(
    release: Path,
    numerics: bool,
    source: str | None,
    trust_remote_code: bool,
    allow_pickle: bool,
    cache_dir: Path | None,
    as_json: bool,
) -> None:
    """Hash every file of RELEASE again; with --numerics, repeat its checks against the original."""
    from compiler.progress import Display
    from compiler.verify import read_release, verify_files, verify_numerics

    manifest, reports = read_release(release)
    verify_files(release, manifest)
    if numerics:
        options = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
        with Display() as display:
            reports = verify_numerics(release, manifest, _store(cache_dir), display.tell, source, options)
    count = len(manifest.every_file)
    if as_json:
        checks = [_report_json(report) for report in reports] if numerics else []
        _print_json({"release": str(release), "files": count, "numerics": numerics, "checks": checks})
        return
    click.echo(f"{manifest.name} {manifest.release}: {count} files are what the manifest says")
    if numerics:
        _table(manifest, reports, release)


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
    from compiler.verify import read_release, record_benchmark, verify_files

    options = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    results = []
    for release in releases:
        manifest, _ = read_release(release)
        verify_files(release, manifest)
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


def _release_json(release: Release) -> dict[str, Any]:
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
        cli.main(args=given, prog_name="compile", standalone_mode=False)
        sys.stdout.flush()
        code = 0
    except click.exceptions.Exit as error:
        code = error.exit_code
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
            _print_json(
                {"error": text, "kind": type(error).__name__, "artifacts": [_report_json(report) for report in reports]}
            )
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
