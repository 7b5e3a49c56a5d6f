"""A comparison of two releases as text: what differs, and one line for each thing in which nothing does."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# Names of layers that are listed for one change of precision; `--json` has all.
SHOWN = 3


def text(result: Mapping[str, Any]) -> str:
    """The lines of a terminal for what `compiler.diff.diff` found."""
    before, after = result["before"], result["after"]
    head = " → ".join(f"{side['name']} {side['release']} ({side['digest'][:12]}…)" for side in (before, after))
    sections = [("files", list(_files(result["files"])))]
    sections += [(name, list(_artifact(artifact))) for name, artifact in result["artifacts"].items()]
    sections += [
        ("speed", list(_speed(result["speed"]))),
        ("release", [(name, _pair(pair)) for name, pair in result["release"].items()]),
        ("libraries", [(name, _pair(pair)) for name, pair in result["libraries"].items()]),
        (
            "source",
            [
                (path, _pair([None if one is None else f"{one[:12]}…" for one in pair]))
                for path, pair in result["source"].items()
            ],
        ),
        ("steps", [(step, change) for step, changes in result["steps"].items() for change in changes]),
    ]
    lines = [head]
    for title, rows in sections:
        lines.append(title if rows else f"{title}: the same")
        width = max((len(name) for name, _ in rows), default=0)
        last = ""
        for name, words in rows:
            lines.append(f"  {name if name != last else '':<{width}}  {words}".rstrip())
            last = name
    return "\n".join(lines)


Row = tuple[str, str]


def _files(files: Mapping[str, Any]) -> Iterator[Row]:
    for kind in ("added", "removed", "changed"):
        for path, size in files[kind].items():
            yield kind, f"{path}  {_sizes(size) if kind == 'changed' else _size(size)}"
    if any(files[kind] for kind in ("added", "removed", "changed")):
        yield "in all", f"{_sizes(files['bytes'])}, {files['same']} files are the same"


def _artifact(artifact: Mapping[str, Any]) -> Iterator[Row]:
    old, new = artifact["bytes"]
    if old is None or new is None:
        yield ("added", _size(new)) if old is None else ("removed", _size(old))
        return
    if old != new:
        yield "size", _sizes([old, new])
    elif not artifact["same"]:
        yield "size", f"{_size(old)}, the same"
    for title in ("settings", "fusions", "declined", "operators"):
        for name, pair in artifact[title].items():
            yield title, f"{name}  {_pair(pair)}"
    changes: dict[tuple[str | None, str | None], list[str]] = collections.defaultdict(list)
    for layer, pair in artifact["layers"].items():
        changes[pair[0], pair[1]].append(layer)
    for change, layers in changes.items():
        more = f" and {len(layers) - SHOWN} more" if len(layers) > SHOWN else ""
        yield "precision", f"{_pair(change)}  {len(layers)} layers: {', '.join(layers[:SHOWN])}{more}"
    for name, figures in artifact["numerics"].items():
        shown = _pair([None if figure is None else _figure(figure) for figure in figures["figure"]])
        limits = [None if limit is None else f"{limit:g}" for limit in figures["limit"]]
        limit = "no limit" if limits == [None, None] else f"limit {limits[0] if limits[0] == limits[1] else _pair(limits)}"
        yield "numerics", f"{name}  {shown}  {limit}"
    for name, pair in artifact["metrics"].items():
        yield "metrics", f"{name}  {_pair(pair)}"


def _speed(speed: Mapping[str, Any]) -> Iterator[Row]:
    recorded = speed["recorded"]
    if not any(recorded):
        yield "recorded", "for neither release"
    if recorded == [True, False] or recorded == [False, True]:
        yield "recorded", f"only for the {'first' if recorded[0] else 'second'} release"
    for name, pair in speed["machine"].items():
        if all(recorded):
            yield name, _pair(pair)
    for name, pair in speed["timings"].items():
        if all(recorded):
            times = _pair([None if one is None else f"{one:.2f}" for one in pair["p50"]])
            ratios = _pair([None if one is None else f"{one:.2f}x" for one in pair["ratio"]])
            yield name, f"{times} ms, {ratios} eager"


def _pair(pair: Sequence[Any]) -> str:
    return " → ".join("none" if one is None else str(one) for one in pair)


def _size(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size:,} bytes"


def _sizes(pair: Sequence[int]) -> str:
    old, new = pair
    change = f" ({100 * (new - old) / old:+.1f} %)" if old and new != old else ""
    return f"{_size(old)} → {_size(new)}{change}"


def _figure(value: float) -> str:
    if 0.99 <= value < 1:  # what is missing says more than nines
        return f"1 - {1 - value:.2g}"
    return f"{value:.4g}"
