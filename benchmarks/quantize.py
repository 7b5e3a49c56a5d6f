"""What int8 costs in accuracy and brings in time: ours beside the peers' and beside our own next precision, in one run.

    .venv/bin/python -m benchmarks.quantize artifacts/all-minilm-l6-v2/1.0.0 --rounds 5

Subjects, shapes and rules are those of benchmarks/latency.py. The sentences are film reviews that are neither in the
calibration nor in the validation text. What is asked of each file is in `GOALS`, and is shown beside what was measured.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import latency, peers
from benchmarks.latency import PADDED, Measured, Subject
from benchmarks.peers import ROOT
from compiler import bench
from compiler.errors import CompileError
from compiler.verify import find_original, read_release

OPTIMUM, NNCF = "optimum onnx int8", "NNCF openvino int8"
UNPADDED = [f"{batch}x{length}" for batch, length in latency.SHAPES]


@dataclass(frozen=True)
class Goal:
    """`figure` of a subject should be at least `least`."""

    subject: str
    what: str
    least: float
    figure: Callable[[Measured], float]


def goals() -> list[Goal]:
    found = []
    for format in ("openvino", "onnx", "torchscript"):
        own = f"ours, {format} int8"
        found += [
            Goal(own, "neighbours that are the same", 0.95, lambda m, own=own: m.figures[own].neighbours[0]),  # type: ignore[misc]
            Goal(own, "smallest cosine of a sentence", 0.985, lambda m, own=own: m.figures[own].sentence_cosine),  # type: ignore[misc]
        ]
    own = "ours, openvino int8"
    for shape, least in (("1x128", 4.8), (PADDED, 16.0)):
        found.append(_faster(own, bench.EAGER, shape, least))
    found += [_faster(own, "ours, openvino bf16", shape, 1.0) for shape in (*UNPADDED, PADDED)]
    own = "ours, onnx int8"
    found += [_faster(own, OPTIMUM, shape, 0.8) for shape in UNPADDED]
    found.append(_faster(own, OPTIMUM, PADDED, 2.4))
    own = "ours, torchscript int8"
    found += [_faster(own, "ours, torchscript bf16", shape, 1.1) for shape in (*UNPADDED, PADDED)]
    return found


def _faster(own: str, other: str, shape: str, least: float) -> Goal:
    return Goal(own, f"times as fast as {other}, {shape}", least, lambda measured: latency.ratio(measured, own, other, shape))


def subjects(found: Sequence[Subject]) -> list[Subject]:
    """The reference, ours, and the peers' int8."""
    kept = [subject for subject in found if subject.name in (bench.EAGER, OPTIMUM) or subject.name.startswith("ours, ")]
    return [*kept, Subject(NNCF, "openvino", {"precision": "f32"}, peers.PYTHON, "nncf")]


def unseen(reviews: Mapping[str, Sequence[str]], paths: Sequence[Path]) -> dict[str, list[str]]:
    """The reviews that are not in these files of JSON lines."""
    lines = (line for path in paths for line in path.read_text(encoding="utf-8").split("\n") if line)
    seen = {json.loads(line)["text"].strip() for line in lines}
    return {source: [text for text in texts if text.strip() not in seen] for source, texts in reviews.items()}


def verdicts(measured: Measured) -> list[str]:
    """Markdown: a line a goal."""
    lines = ["| file | what | asked | measured | |", "|---|---|---|---|---|"]
    for goal in goals():
        try:
            figure = goal.figure(measured)
        except KeyError:
            figure = math.nan
        verdict = "yes" if figure >= goal.least else "not measured" if math.isnan(figure) else "**no**"
        lines.append(f"| {goal.subject} | {goal.what} | ≥ {goal.least:g} | {figure:.4g} | {verdict} |")
    return lines


def _several(shares: Sequence[float]) -> str:
    return f"{sum(shares) / len(shares):.4f} ({min(shares):.4f} to {max(shares):.4f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("release", type=Path, help="a release of all-MiniLM-L6-v2, built by `compile pipeline.yaml`")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--sets", type=int, default=1, help="of sentences; of more than one, neighbours are told for each")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the peers' files there, and use those of the last time")
    options = parser.parse_args()
    texts = [ROOT / "data/calibration.jsonl", ROOT / "data/validation.jsonl"]
    try:
        manifest, _ = read_release(options.release)
        snapshot = find_original(options.release, manifest, None, {"trust_remote_code": False, "allow_pickle": False})
    except CompileError as error:
        sys.exit(f"error: {error}")
    chosen = subjects(latency.subjects(options.release, manifest, snapshot))
    peers.prepare_peers()
    shapes, sentences = latency.batches(options.release, unseen(peers.read_reviews(), texts), options.sets)
    with tempfile.TemporaryDirectory(prefix="compile-benchmark-") as name:
        aside = Path(name)
        folder = (options.keep or aside).absolute()
        made = dict(peers.make_artifacts(folder, snapshot, {"int8", "openvino"}, latency.tell))
        made["nncf"] = peers.quantize_with_nncf(folder, made["openvino"], snapshot, texts[0], latency.tell)
        measured = latency.run(chosen, made, shapes, sentences, options.threads, options.rounds, aside)
    real = float(shapes[PADDED]["attention_mask"].mean())
    lines = latency.heading("benchmarks.quantize", manifest, options.threads, options.rounds, None, measured.others, real)
    lines += [*latency.table(measured, list(shapes)), "", *verdicts(measured)]
    if options.sets > 1:
        lines += ["", f"Neighbours that are the same, of {options.sets} sets of {latency.SENTENCES} sentences:", ""]
        lines += [f"- {name}: {_several(figures.neighbours)}" for name, figures in measured.figures.items()]
    if measured.notes:
        lines += ["", *(f"- {name}: {note}" for name, note in measured.notes.items())]
    print("\n".join(lines))


if __name__ == "__main__":
    main()
