"""What commands print: JSON for machines, tables for readers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from compiler.bench import Result
    from compiler.blame import Blame, Row
    from compiler.manifest import Manifest
    from compiler.stages.publish import Published
    from compiler.types import Report


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def report_json(report: Report) -> dict[str, Any]:
    return {**asdict(report), "passed": report.passed}


def published_json(published: Published) -> dict[str, Any]:
    version = published.version
    return {
        "url": published.url,
        "release": version.release,
        "digest": version.digest,
        "made": published.made,
        "aliases": version.aliases,
        "moved": published.moved,
        "moved_from": published.before,
        "signed": published.signed,
        **({"signature_sent": False} if published.unsent else {}),
    }


def number(value: float) -> str:
    return f"{value:.7f}" if 0.5 <= value <= 1 else f"{value:.2g}"


def counted(layers: int, tables: int) -> str:
    """What of a model is in int8."""
    return f"{layers} layers" + (f" and {tables} embedding{'s' * (tables > 1)}" if tables else "")


def pairs(values: Any, sign: str = "=") -> str:
    return ", ".join(f"{name}{sign}{value}" for name, value in values.items())


def either(names: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _row(report: Report, path: str, size: str) -> tuple[str, ...]:
    error, cosine, argmax = (report.figure(name) for name in ("max_abs", "cosine", "argmax"))
    shown = ["–" if figure is None else number(figure) for figure in (error, cosine, argmax)]
    return (path, report.format, report.precision, size, *shown, "passed" if report.passed else "FAILED")


def print_benchmark(result: Result) -> None:
    from compiler.samples import TEXT

    click.echo(f"{result.threads} threads, {result.rounds} rounds, {result.cpu}")
    last = result.shapes[-1]
    what = f"; {TEXT}: 32 lines, {result.padding:.0%} padding" if last == TEXT else ""
    click.echo(f"p50 / p90 ms a batch, times the original's speed{what}")
    rows = [("artifact", *result.shapes, f"{TEXT if last == TEXT else 'samples'}/s", "peak MB")]
    for subject, memory in result.memory.items():
        found = {timing.shape: timing for timing in result.timings if timing.subject == subject}
        cells = [f"{t.p50:.1f} / {t.p90:.1f}  {t.ratio:.2f}x" for t in found.values()]
        rows.append((subject, *cells, f"{found[last].texts_per_second:.0f}", f"{memory:.0f}"))
    click.echo(lines(rows))
    click.echo("best      " + ", ".join(f"{shape}: {result.best(shape)}" for shape in result.shapes))


HEADINGS = ("artifact", "format", "precision", "size", "max error", "min cosine", "argmax", "verdict")


def lines(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows as text in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def table(manifest: Manifest, reports: Sequence[Report], path: Path) -> None:
    rows: list[tuple[str, ...]] = [HEADINGS]
    for artifact in manifest.artifacts:
        report = next(r for r in reports if (r.format, r.precision) == (artifact.format, artifact.precision))
        rows.append(_row(report, artifact.files[0].path, f"{sum(file.size for file in artifact.files) / 1e6:.1f} MB"))
    rows += [("–", *target.split(" ", 1), *"––––", "left out") for target in manifest.refused]
    click.echo(f"{manifest.name} {manifest.release}  {path}")
    click.echo(lines(rows))


def verdicts(reports: Sequence[Report]) -> str:
    return lines([HEADINGS, *(_row(report, "–", "–") for report in reports)])


def print_blame(found: Blame) -> None:
    """A row for each layer of an artifact, and for what is inside of the one that departs."""

    def row(one: Row, indent: str = "") -> tuple[str, ...]:
        if one.value is None:
            return (f"{indent}{one.layer}", *"–––––")
        lost = "–" if one.lost is None else f"{one.lost:.2g}"
        figures = (f"{one.error:.2g}", f"{one.cosine:.7f}", lost, f"{one.own:.2g}")
        return (f"{indent}{one.layer}", *figures, one.value)

    rows: list[tuple[str, ...]] = [("layer", "error", "cosine", "lost", "own error", "in the file as")]
    for layer in found.layers:
        rows.append(row(layer))
        if found.departs is not None and layer.layer == found.departs.within:
            rows += [row(module, "  ") for module in found.inside]
    click.echo(f"{found.format} {found.precision}: {found.verdict}")
    click.echo(f"{found.sample}; a layer departs when its own error is more than {found.allowed:g}")
    click.echo(lines(rows) + "\n")
