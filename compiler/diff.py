"""What separates two releases: files, artifacts and what is in them, numerics, metrics, speed, versions and inputs; and
whether the second is worse than it may be. A pure function of two releases on disk.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic reads no other before Python 3.12

from compiler.errors import ConfigError, ReleaseError
from compiler.fusions import TAKES_IN, WORK
from compiler.graphs import Graph, read_graph
from compiler.manifest import Manifest, differences
from compiler.types import AT_MOST, Artifact
from compiler.verify import Entry, Validation, open_release, verify_files

# Percent of what a figure's limit allows below which a growth is rounding: right builds of one fp32 model by different
# runtimes lie within 1 % of theirs.
ROUNDING = 2.0

Pair = list[Any]  # [before, after], None where there is none


@dataclass(frozen=True)
class Side:
    """A release that is compared."""

    path: Path
    manifest: Manifest
    validation: Validation

    @property
    def artifacts(self) -> dict[str, Artifact]:
        return {f"{artifact.format} {artifact.precision}": artifact for artifact in self.manifest.artifacts}


def diff(before: Path, after: Path) -> dict[str, Any]:
    """All that differs between two releases, as JSON. A pair is [before, after]; what is only in one has null for the other.
    `measured` says whether a release has metrics at all: `metrics` of an artifact in validation.json, numbers by name.

    Raises:
        ReleaseError: one is no release, or is damaged.
    """
    sides = [_side(before), _side(after)]
    old, new = (side.manifest for side in sides)
    artifacts = [side.artifacts for side in sides]
    return {
        "before": _name(sides[0]),
        "after": _name(sides[1]),
        "files": _files(old, new),
        "artifacts": {
            name: _artifact(name, sides, [artifacts[0].get(name), artifacts[1].get(name)])
            for name in dict.fromkeys(itertools.chain(*artifacts))
        },
        "speed": _speed(old.benchmark, new.benchmark),
        "measured": [any(entry.get("metrics") for entry in side.validation.entries.values()) for side in sides],
        "release": _changed(_facts(old), _facts(new)),
        "libraries": _changed(old.libraries, new.libraries),
        "source": _changed(_hashes(old), _hashes(new)),
        "steps": _steps(old, new),
    }


def _side(path: Path) -> Side:
    manifest, validation = open_release(path)
    verify_files(path, manifest)
    if manifest.benchmark is not None:
        try:
            TypeAdapter(_Benchmark).validate_python(manifest.benchmark, strict=True)
        except ValidationError as error:
            raise ReleaseError(f"{path}: its recorded benchmark is not what bench --record writes; record it again") from error
    return Side(path, manifest, validation)


class _Timing(TypedDict):
    subject: str
    shape: str
    p50: float
    ratio: float


class _Benchmark(TypedDict):
    timings: list[_Timing]


def _name(side: Side) -> dict[str, str]:
    return {"name": side.manifest.name, "release": side.manifest.release, "digest": side.manifest.identity}


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Pair]:
    return {key: [old.get(key), new.get(key)] for key in sorted({*old, *new}) if old.get(key) != new.get(key)}


def _files(old: Manifest, new: Manifest) -> dict[str, Any]:
    sides = [{file.path: file for file in manifest.every_file} for manifest in (old, new)]
    changed = _changed(*sides)
    return {
        "bytes": [sum(file.size for file in side.values()) for side in sides],
        "same": len({*sides[0], *sides[1]}) - len(changed),
        "added": {path: pair[1].size for path, pair in changed.items() if pair[0] is None},
        "removed": {path: pair[0].size for path, pair in changed.items() if pair[1] is None},
        "changed": {path: [file.size for file in pair] for path, pair in changed.items() if None not in pair},
    }


def _artifact(name: str, sides: Sequence[Side], pair: Sequence[Artifact | None]) -> dict[str, Any]:
    old, new = pair
    sizes = [None if artifact is None else sum(file.size for file in artifact.files) for artifact in pair]
    if old is None or new is None:
        return {"same": False, "bytes": sizes}
    graphs: list[Graph | None] = [None, None]
    if old.files != new.files:
        graphs = [read_graph(side.path, artifact) for side, artifact in zip(sides, (old, new), strict=True)]
    entries = [side.validation.entries[old.format, old.precision] for side in sides]
    settings = [
        {"opset": one.opset, "fast on": list(one.fast_on), **{f"runtime {key}": value for key, value in one.runtime.items()}}
        for one in (old, new)
    ]
    found = {
        "bytes": sizes,
        "fusions": _changed(old.fusions, new.fusions),
        "declined": _changed(old.declined, new.declined),
        "settings": _changed(*settings),
        "operators": _changed(*(graph.operators if graph else {} for graph in graphs)),
        "layers": _changed(*(graph.layers if graph else {} for graph in graphs)),
        "numerics": _numerics(*entries),
        "metrics": _changed(*(entry.get("metrics", {}) for entry in entries)),
    }
    same = old.files == new.files and not any(value for key, value in found.items() if key != "bytes")
    return {"same": same, **found}


def _numerics(old: Entry, new: Entry) -> dict[str, dict[str, Pair]]:
    """The figures, and their limits, that differ: `{"logits cosine": {"figure": …, "limit": …}}`."""
    sides = []
    for entry in (old, new):
        figures: dict[str, dict[str, float | None]] = {
            f"{output} {name}": {"figure": figure, "limit": None}
            for output, result in entry.get("outputs", {}).items()
            for name, figure in result["figures"].items()
        }
        for check in entry["checks"]:
            figures[f"{check.output} {check.name}"] = {"figure": check.figure, "limit": check.limit}
        sides.append(figures)
    nothing = {"figure": None, "limit": None}
    return {
        name: {part: [(one or nothing)[part] for one in pair] for part in ("figure", "limit")}
        for name, pair in _changed(*sides).items()
    }


def _speed(old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> dict[str, Any]:
    """The recorded benchmarks: `timings` by artifact and shape, each as pairs; `compared` says whether both have one."""
    sides = []
    for benchmark in (old, new):
        timings = (benchmark or {}).get("timings", ())
        sides.append({f"{one['subject']} {one['shape']}": {key: one[key] for key in ("p50", "ratio")} for one in timings})
    machine = ("cpu", "machine", "threads", "rounds")
    places = [{key: benchmark.get(key) for key in machine} if benchmark else {} for benchmark in (old, new)]
    return {
        "recorded": [old is not None, new is not None],
        "timings": {
            name: {key: [one[key] if one else None for one in pair] for key in ("p50", "ratio")}
            for name, pair in _changed(*sides).items()
        },
        "machine": _changed(*places),
    }


def _facts(manifest: Manifest) -> dict[str, Any]:
    parts = asdict(manifest)
    names = ("task", "architecture", "positions", "left_out", "python", "compiler", "signature")
    source = {f"source {name}": parts["source"][name] for name in ("uri", "revision", "licence")}
    return {**{name: parts[name] for name in names}, **source}


def _hashes(manifest: Manifest) -> dict[str, str]:
    return {file.path: file.sha256 for file in manifest.source.files}


def _steps(old: Manifest, new: Manifest) -> dict[str, list[str]]:
    """What changed in the inputs of each step, in words; another step's key is left out, since that step is there itself."""
    found = {}
    for name in dict.fromkeys((*old.steps, *new.steps)):
        if name not in old.steps or name not in new.steps:
            found[name] = ["added" if name in new.steps else "removed"]
            continue
        changed = differences(old.steps[name].inputs, new.steps[name].inputs)
        if changed := [text for text in changed if not text.startswith("step ")]:
            found[name] = changed
    return found


@dataclass(frozen=True)
class Gate:
    """Something that must not get worse, by more than so many percent."""

    kind: str
    percent: float = 0.0


def parse_gate(text: str) -> Gate:
    """A gate from `KIND` or `KIND=PERCENT`.

    Raises:
        ValueError: there is no such kind, or its percentage is none.
    """
    kind, equals, number = text.partition("=")
    if kind not in KINDS:
        raise ValueError(f"{text}: there is no {kind!r}; give one of {', '.join(KINDS)}")
    if not equals:
        return Gate(kind)
    if kind in ("artifacts", "files", "fusions"):
        raise ValueError(f"{text}: {kind} takes no percentage; give --fail-on {kind}")
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?%?", number):
        raise ValueError(f"{text}: {number!r} is no percentage, such as {kind}=5")
    return Gate(kind, float(number.rstrip("%")))


def worse(result: Mapping[str, Any], gates: Sequence[Gate]) -> list[str]:
    """How the second release is worse than the gates allow, in words.

    Raises:
        ConfigError: a gate is about what was not recorded, so that it could not fail.
    """
    found: list[str] = []
    for gate in gates:
        for kind in REGRESS if gate.kind == "regress" else (gate.kind,):
            found += CHECKS[kind](result, gate.percent, gate.kind != "regress")
    return list(dict.fromkeys(found))


def _worse_artifacts(result: Mapping[str, Any], percent: float, asked: bool) -> Iterator[str]:
    for name, artifact in result["artifacts"].items():
        if artifact["bytes"][1] is None:
            yield f"{name} is lost"


def _worse_files(result: Mapping[str, Any], percent: float, asked: bool) -> Iterator[str]:
    for kind in ("added", "removed", "changed"):
        for path in result["files"][kind]:
            yield f"{path} is {kind}"


def _worse_size(result: Mapping[str, Any], percent: float, asked: bool) -> Iterator[str]:
    for name, artifact in result["artifacts"].items():
        old, new = artifact["bytes"]
        if None not in (old, new) and new > old * (1 + percent / 100):
            yield f"{name} grew from {old:,} to {new:,} bytes ({_percent(old, new)}, allowed is {percent:g} %)"


def _worse_fusions(result: Mapping[str, Any], percent: float, asked: bool) -> Iterator[str]:
    """A fusion is lost when what it did is done fewer times by all fusions together: where `BiasGelu` took over what `Gemm`
    did nothing is lost; the other way round gelu is."""
    for name, artifact in result["artifacts"].items():
        changed = artifact.get("fusions", {})
        totals: Counter[str] = Counter()
        for fusion, (old, new) in changed.items():
            more = (new or 0) - (old or 0)
            for work in WORK.get(fusion, (fusion,)):
                totals[work] += more
            for work, most in TAKES_IN.get(fusion, {}).items():
                totals[work] += max(more, 0) * most
        for work, total in totals.items():
            if total < 0:
                pairs = {fusion: pair for fusion, pair in changed.items() if work in WORK.get(fusion, (fusion,))}
                mix = ", ".join(f"{fusion} {old or 0} → {new or 0}" for fusion, (old, new) in pairs.items())
                yield f"{name} fuses {work} {-total} times fewer ({mix})"


def _worse_numerics(result: Mapping[str, Any], percent: float, asked: bool) -> Iterator[str]:
    """An error is a figure that is a maximum, or what is missing to 1 of one that is an agreement. It is worse when it came
    nearer to its limit by more than a percentage of what that allows, `ROUNDING` at least. Only figures with a limit count:
    nobody asked anything of the others, and some (the largest relative error) are noise."""
    most = max(percent, ROUNDING)
    for name, artifact in result["artifacts"].items():
        for figure, pair in artifact.get("numerics", {}).items():
            old, new = pair["figure"]
            limit = pair["limit"][0] if pair["limit"][0] is not None else pair["limit"][1]
            if limit is None or old is None:
                continue
            if new is None or pair["limit"][1] is None:
                yield f"{name}: {figure} is checked no more"
                continue
            largest = figure.rpartition(" ")[2] in AT_MOST
            growth, allowance = (new - old, limit) if largest else (old - new, 1 - limit)
            if growth > allowance * most / 100:
                share = (
                    f"{100 * growth / allowance:.3g} % of what its limit {limit:g} allows" if allowance else "its limit is 1"
                )
                yield f"{name}: {figure} went from {old:.7g} to {new:.7g} ({share}; {most:g} % may be)"


def _worse_metrics(result: Mapping[str, Any], percent: float, asked: bool) -> Iterator[str]:
    """Of a metric more is better."""
    if asked and not any(result["measured"]):
        raise ConfigError("--fail-on metrics: neither release has a metric in its validation.json; leave it out")
    for name, artifact in result["artifacts"].items():
        for metric, (old, new) in artifact.get("metrics", {}).items():
            if old is not None and (new is None or new < old - abs(old) * percent / 100):
                now = "is measured no more" if new is None else f"fell from {old:g} to {new:g} (allowed is {percent:g} %)"
                yield f"{name}: {metric} {now}"


def _worse_speed(result: Mapping[str, Any], percent: float, asked: bool) -> Iterator[str]:
    """An artifact is slower when it beats the eager original, timed beside it, by less: that holds between machines too."""
    recorded = result["speed"]["recorded"]
    if asked and not all(recorded):
        which = " and ".join(name for name, there in zip(("the first", "the second"), recorded, strict=True) if not there)
        raise ConfigError(f"--fail-on speed: {which} release has no recorded benchmark; run compile bench --record on it")
    if not all(recorded):
        return
    for name, pair in result["speed"]["timings"].items():
        old, new = pair["ratio"]
        if None not in (old, new) and new < old * (1 - percent / 100):
            yield f"{name} went from {old:.2f} to {new:.2f} times eager ({_percent(old, new)}, allowed is {percent:g} %)"


def _percent(old: float, new: float) -> str:
    return f"{100 * (new - old) / old:+.1f} %" if old else "from none"


Check = Callable[[Mapping[str, Any], float, bool], Iterator[str]]
CHECKS: Mapping[str, Check] = {
    "artifacts": _worse_artifacts,
    "files": _worse_files,
    "fusions": _worse_fusions,
    "metrics": _worse_metrics,
    "numerics": _worse_numerics,
    "size": _worse_size,
    "speed": _worse_speed,
}
# `regress` stands for all that can be worse; that any byte differs is no regression.
REGRESS = tuple(kind for kind in CHECKS if kind != "files")
KINDS = ("regress", *CHECKS)
