"""Commands over releases on disk: inspect, verify, sign, bench, diff."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from compiler.cli.options import cache_option, json_option, open_store
from compiler.cli.output import counted, either, number, pairs, print_benchmark, print_blame, print_json, report_json, table
from compiler.errors import ReleaseError, SigningError
from compiler.types import AT_MOST

if TYPE_CHECKING:
    from compiler.blame import Blame
    from compiler.diff import Gate
    from compiler.types import Report

# What the operators by which a file looks rows of an embedding up are called, among those of `Artifact.int8`.
LOOKUPS = ("Gather", "embedding")
PASSWORD_VARIABLE = "COMPILE_SIGN_PASSWORD"  # noqa: S105


@click.command(short_help="Show what a release holds.")
@click.argument("release", type=click.Path(path_type=Path))
@json_option
def inspect(release: Path, as_json: bool) -> None:
    """Show what RELEASE holds: files, checks with their limits, fusions, runtime settings, origin."""
    from compiler.verify import is_signed, read_release

    manifest, reports = read_release(release)
    signed = is_signed(release)
    if as_json:
        checks = [report_json(report) for report in reports]
        print_json({"manifest": asdict(manifest), "checks": checks, "signed": signed})
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
    click.echo(f"made with python {manifest.python}, compile {manifest.compiler}, " + pairs(manifest.libraries, " "))
    click.echo(f"signed    {'yes; compile verify --key checks it' if signed else 'no'}")
    click.echo()
    table(manifest, reports, release)
    for target, reason in manifest.refused.items():
        click.echo(f"\nwithout {target}: {reason}")
    for artifact in manifest.artifacts:
        click.echo(f"\n{artifact.files[0].path}")
        click.echo(f"  runtime  {pairs(artifact.runtime)}" + (f", opset {artifact.opset}" if artifact.opset else ""))
        if artifact.fast_on:  # not in a release that an earlier version made
            click.echo(f"  fast on  a CPU with {either(artifact.fast_on)}")
        if artifact.needs:
            click.echo(f"  needs    a CPU with {either(artifact.needs)}: without, sums of 8-bit products may saturate")
        click.echo(f"  fused    {pairs(artifact.fusions, ' ') or 'nothing'}")
        if artifact.int8:
            tables = sum(way.startswith(LOOKUPS) for way in artifact.int8.values())
            amount = counted(len(artifact.int8) - tables, tables)
            click.echo(f"  int8     {amount}, by {', '.join(sorted(set(artifact.int8.values())))}")
        for name, reason in artifact.kept.items():
            click.echo(f"  not int8 {name}: {reason}")
        for tried in artifact.ladder:
            figures = pairs({name: number(figure) for name, figure in tried["figures"].items()})
            verdict = "passes" if tried["passed"] else tried.get("missed", "fails")  # an earlier version did not say
            amount = counted(tried["int8"], tried.get("tables", 0))
            click.echo(f"  tried    {amount} int8, cost {tried['cost']:g}: {figures}: {verdict}")
        for name, reason in artifact.declined.items():
            click.echo(f"  without  {name}: {reason}")
        report = next(r for r in reports if (r.format, r.precision) == (artifact.format, artifact.precision))
        for check in report.checks:
            relation = "<=" if check.name in AT_MOST else ">="
            verdict = "ok" if check.passed else "FAILED"
            click.echo(f"  {verdict:<8} {check.output} {check.name} {number(check.figure)} {relation} {check.limit:g}")


@click.command(short_help="Hash a release again; repeat its checks.")
@click.argument("release", type=click.Path(path_type=Path))
@click.option("--key", type=click.Path(path_type=Path), help="Also check the signature, with this public key (PEM).")
@click.option("--numerics", is_flag=True, help="Also reopen every artifact and repeat its checks.")
@click.option("--blame", is_flag=True, help="Also show each artifact's layers, and the first that departs from the original.")
@click.option("--rebuild", is_flag=True, help="Also build it again, without the cache, and compare every byte.")
@click.option(
    "--any-environment",
    is_flag=True,
    help="Rebuild also where libraries, CPU or compiler are others. What records those is not compared: bom.cdx.json, "
    "provenance.json and, of manifest.json, the environment and the steps' keys.",
)
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
    blame: bool,
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
    original; with --blame, hold every layer against the original's; with --rebuild, build it again from what its manifest
    says, and compare every byte."""
    from compiler.progress import Display
    from compiler.verify import is_signed, open_release, verify_files, verify_numerics

    if any_environment and not rebuild:
        raise click.UsageError("--any-environment is for --rebuild")
    if folder is not None and not (numerics or blame or rebuild):
        raise click.UsageError("--folder is for --numerics, --blame and --rebuild")

    manifest, validation = open_release(release)
    verify_files(release, manifest)
    if key is not None:
        from compiler.signing import verify_signature

        verify_signature(release, manifest, key)
    signed = is_signed(release)
    options = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    store = open_store(cache_dir)
    reports: tuple[Report, ...] = ()
    layers: tuple[Blame, ...] = ()
    if blame:
        from compiler.blame import blame_release, departed

        with Display() as display:
            layers = blame_release(release, manifest, validation, store, display.tell, source, options, folder)
        for found in () if as_json else layers:
            print_blame(found)
        if (error := departed(release, layers)) is not None:
            raise error
    if numerics:
        with Display() as display:
            reports = verify_numerics(release, manifest, validation, store, display.tell, source, options, folder)
    count = len(manifest.every_file)
    if not as_json:
        click.echo(f"{manifest.name} {manifest.release}: {count} files are what the manifest says")
        if key is not None:
            click.echo(f"{manifest.name} {manifest.release}: the signature is by {key} and covers every file")
        elif signed:
            click.echo(f"{manifest.name} {manifest.release}: is signed; the signature was not checked: give --key")
        if numerics:
            table(manifest, reports, release)
    if rebuild:
        from compiler.manifest import MANIFEST
        from compiler.rebuild import ENVIRONMENT, RECORDS
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
            # Where anything is left out all of these are, and of the manifest only what is of the environment.
            whole = ", ".join(name for name in RECORDS if name != MANIFEST)
            part = f"{', '.join(ENVIRONMENT)} of {MANIFEST}"
            without = (
                "" if MANIFEST in again else f"; not compared, since they record another environment: {whole}, and {part}"
            )
            click.echo(f"{manifest.name} {manifest.release}: built again, {len(again)} files are the same bytes{without}")
    if as_json:
        checks = [report_json(report) for report in reports]
        print_json(
            {
                "release": str(release),
                "files": count,
                "signed": signed,
                "signature_checked": key is not None,
                "numerics": numerics,
                "checks": checks,
                "blame": [found.to_json() for found in layers],
                "rebuild": rebuild,
            }
        )


@click.command(short_help="Sign a release with a local key.")
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
        print_json({"release": str(release), "signature": str(release / SIGNATURE)})
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


@click.command(short_help="Time a release's artifacts.")
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
            print_benchmark(result)
    if as_json:
        print_json(results)


def _gates(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> tuple[Gate, ...]:
    from compiler.diff import parse_gate

    try:
        return tuple(parse_gate(value) for value in values)
    except ValueError as error:  # not exit 1, which says that B is worse
        raise click.BadParameter(str(error)) from error


@click.command(short_help="Compare two releases.")
@click.argument("before", metavar="A")
@click.argument("after", metavar="B")
@click.option(
    "--fail-on",
    "gates",
    multiple=True,
    callback=_gates,
    metavar="KIND[=PERCENT]",
    help="Exit 1 when B is worse than A by more than PERCENT in KIND (see above). May be given again.",
)
@json_option
def diff(before: str, after: str, gates: tuple[Gate, ...], as_json: bool) -> None:
    """Compare two releases: A and B are folders, or registries' URLs such as hf://ORG/NAME@1.0.0.

    --fail-on regress=PERCENT fails when B is worse in any of these, which are kinds by themselves too:

    \b
    artifacts  one that A has is not in B
    fusions    something is fused fewer times, whatever does it: from Gemm 18 to
               Gemm 12 and BiasGelu 6 nothing is lost, the other way round gelu is
    metrics    one fell by more than PERCENT
    numerics   a figure that has a limit came nearer to it by more than PERCENT of
               what the limit allows (less than 2 % is rounding, and never counts),
               or has none in B; figures without a limit do not count
    size       an artifact grew by more than PERCENT
    speed      an artifact beats eager by more than PERCENT less, where both
               releases have a recorded benchmark

    And one that is not part of regress: files, when any byte differs.
    """
    from compiler.diff import diff as run
    from compiler.diff import worse
    from compiler.diff_text import text

    with _fetched(before) as old, _fetched(after) as new:
        result = run(old, new)
    found = worse(result, gates)
    if as_json:
        print_json({**result, "worse": found})
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
