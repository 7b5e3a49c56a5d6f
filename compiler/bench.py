"""How fast each artifact of a release is beside the eager original, on this machine.

Two runtimes in one process disturb each other's threads, so the original and every artifact live in a process of their own,
started from nothing. They are timed in turn, shape by shape, over several rounds: a machine that slows down slows all of
them, and the ratios are taken within a round.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compiler import cpu
from compiler.backends import BACKENDS
from compiler.errors import CompileError, ConfigError, StageError
from compiler.manifest import SAMPLES, Manifest
from compiler.samples import TEXT, read_cases
from compiler.types import Artifact, Model, Runner, Snapshot
from compiler.verify import find_original, known_samples, open_release

if TYPE_CHECKING:
    import numpy as np

EAGER = "eager fp32"
# Sentences of a padded batch of real text.
TEXT_BATCH = 32
WARM_UP = 3
# An idle process ends at once; one that does not is killed.
CLOSING_SECONDS = 2
# A shape is run at least so often in a round, and until so much time has passed.
LEAST_RUNS, LEAST_SECONDS, MOST_RUNS = 3, 0.25, 50


@dataclass(frozen=True)
class Subject:
    """What is timed: an artifact of the release or, with `artifact` None, the eager original."""

    name: str
    artifact: Artifact | None


@dataclass(frozen=True)
class Timing:
    """One subject at one shape. Latencies in milliseconds a batch; `ratio` is the eager original's over it, the median of
    the rounds; `texts_per_second`, or images or sounds, is of the median latency."""

    subject: str
    shape: str
    p50: float
    p90: float
    ratio: float
    texts_per_second: float


@dataclass(frozen=True)
class Result:
    """`padding` is the share of the text batch that is padding; `memory` each subject's peak, in MB."""

    threads: int
    rounds: int
    cpu: str
    padding: float
    memory: Mapping[str, float]
    timings: tuple[Timing, ...]

    def best(self, shape: str) -> str:
        """The fastest artifact at a shape."""
        mine = [timing for timing in self.timings if timing.shape == shape and timing.subject != EAGER]
        return min(mine, key=lambda timing: timing.p50).subject

    @property
    def shapes(self) -> list[str]:
        return list(dict.fromkeys(timing.shape for timing in self.timings))

    def to_json(self) -> dict[str, Any]:
        best = {shape: self.best(shape) for shape in self.shapes}
        return {**asdict(self), "best": best, "machine": platform.machine()}


def bench(
    release: Path,
    manifest: Manifest,
    *,
    shapes: Sequence[tuple[int, int]] | None,
    threads: int,
    rounds: int,
    source: str | None,
    options: Mapping[str, bool],
    tell: Callable[[str], None],
) -> Result:
    """Time every artifact of a release and the eager original.

    Args:
        shapes: (batch, sequence) without padding; 1 and 8 by 16 and 128, as far as the model's positions go, when None.
        threads: for every runtime alike.
        rounds: each subject is timed so often at each shape, in turn with the others.
        source: where the checkpoint is now, when it is not where the manifest says.
        options: `trust_remote_code` and `allow_pickle`, when the checkpoint needs them.
        tell: is told what is being timed.

    Raises:
        ConfigError: a shape does not fit the model.
        SourceError: the checkpoint is not there, or is another.
        StageError: a subject does not run.
    """
    batches = dict(_batches(release, manifest, shapes))
    snapshot = find_original(release, manifest, source, options)
    subjects = [Subject(EAGER, None)]
    subjects += [Subject(f"{artifact.format} {artifact.precision}", artifact) for artifact in manifest.artifacts]
    seconds: dict[tuple[str, str], list[list[float]]] = {}
    with contextlib.ExitStack() as stack:
        running = []
        for subject in subjects:
            tell(f"opening {subject.name}")
            running.append(stack.enter_context(_process(subject, release, manifest, snapshot, dict(options), threads)))
        for number in range(rounds):
            for shape, inputs in batches.items():
                for subject, ask in zip(subjects, running, strict=True):
                    tell(f"round {number + 1} of {rounds}: {shape}, {subject.name}")
                    seconds.setdefault((subject.name, shape), []).append(ask(inputs))
        memory = {subject.name: ask(None) for subject, ask in zip(subjects, running, strict=True)}
    padded = batches[TEXT].get("attention_mask") if TEXT in batches else None
    return Result(
        threads=threads,
        rounds=rounds,
        cpu=cpu.features(),
        padding=0.0 if padded is None else round(1 - float(padded.mean()), 3),
        memory=memory,
        timings=tuple(_timings(seconds, {shape: len(next(iter(inputs.values()))) for shape, inputs in batches.items()})),
    )


def _timings(seconds: Mapping[tuple[str, str], list[list[float]]], sizes: Mapping[str, int]) -> Iterator[Timing]:
    for (subject, shape), found in seconds.items():
        every = sorted(second for one in found for second in one)
        median = statistics.median(every)
        eager = seconds[EAGER, shape]
        ratios = [statistics.median(a) / statistics.median(b) for a, b in zip(eager, found, strict=True)]
        yield Timing(
            subject=subject,
            shape=shape,
            p50=1e3 * median,
            p90=1e3 * every[int(0.9 * (len(every) - 1))],
            ratio=statistics.median(ratios),
            texts_per_second=sizes[shape] / median,
        )


def _batches(
    release: Path, manifest: Manifest, shapes: Sequence[tuple[int, int]] | None
) -> Iterator[tuple[str, dict[str, np.ndarray[Any, Any]]]]:
    """The inputs by shape's name: real tokens without padding, and a padded batch of real text; of other modalities, and of
    texts with choices, samples of the release, in batches."""
    import numpy as np

    found = read_cases(release / SAMPLES, known_samples(release, manifest, open_release(release)[1]))
    if manifest.signature.inputs[0].shape != ("batch", "sequence"):
        if shapes is not None:
            raise ConfigError(f"--shape: is for models of text; one for {manifest.task} is timed at its own samples")
        for case in sorted((case for case in found if case.mask.all()), key=lambda case: case.shape):
            yield "x".join(map(str, case.shape)), dict(case.inputs)
        return
    longest = max((case for case in found if case.mask.all()), key=lambda case: case.mask.shape[1])
    most = longest.mask.shape[1]
    if shapes is None:
        shapes = [(batch, min(length, most)) for batch in (1, 8) for length in (16, 128)]
    for batch, length in dict.fromkeys(shapes):
        if manifest.positions is not None and length > manifest.positions:
            raise ConfigError(f"--shape {batch}x{length}: the model has {manifest.positions} positions; at most that many")
        # Longer than the samples: their tokens once more.
        copies = (batch, -(-length // most))
        yield f"{batch}x{length}", {name: np.tile(value[:1], copies)[:, :length] for name, value in longest.inputs.items()}
    texts = [
        {name: value[row, case.mask[row]] for name, value in case.inputs.items()}
        for case in found
        if case.name == TEXT
        for row in range(len(case.mask))
    ]
    texts = [texts[number % len(texts)] for number in range(TEXT_BATCH)]
    length = max(len(text["input_ids"]) for text in texts)
    padded = next((case for case in found if not case.mask.all()), longest)

    def column(name: str) -> np.ndarray[Any, Any]:
        filler = padded.inputs[name][~padded.mask][:1]
        value = int(filler[0]) if len(filler) else 0
        return np.stack([np.pad(text[name], (0, length - len(text[name])), constant_values=value) for text in texts])

    yield TEXT, {name: column(name) for name in texts[0]}


@contextlib.contextmanager
def _process(
    subject: Subject, release: Path, manifest: Manifest, snapshot: Snapshot, options: dict[str, bool], threads: int
) -> Iterator[Callable[[Any], Any]]:
    """A process that holds a subject. What it gives takes inputs and returns the seconds of some runs, or, for None, its
    peak memory in MB."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    arguments = (theirs, subject, release, manifest, snapshot, options, threads)
    process = context.Process(target=_serve, args=arguments, daemon=True)
    process.start()
    theirs.close()

    def ask(question: Any) -> Any:
        try:
            if question is not _READY:
                ours.send(question)
            kind, value = ours.recv()
        except (EOFError, OSError) as error:
            process.join()
            raise StageError(f"bench {subject.name}: its process died (exit code {process.exitcode})") from error
        if kind == "error":
            raise value if isinstance(value, CompileError) else StageError(f"bench {subject.name}: {value}")
        return value

    try:
        ask(_READY)
        yield ask
    finally:
        ours.close()  # which ends the process, if it is not in the middle of a run
        process.join(CLOSING_SECONDS)
        process.kill()
        process.join()


_READY = object()


def _serve(
    pipe: Connection,
    subject: Subject,
    release: Path,
    manifest: Manifest,
    snapshot: Snapshot,
    options: dict[str, bool],
    threads: int,
) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what libraries say is nobody's answer
    os.environ.update({"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})
    with errors_sent(pipe):
        runner, _ = open_subject(subject.artifact, release, manifest, snapshot, options, threads)
        pipe.send(("ready", None))
        while True:
            inputs = pipe.recv()
            if inputs is None:
                # Linux counts in KiB, macOS in bytes.
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                pipe.send(("result", peak * (1 if sys.platform == "darwin" else 1024) / 1e6))
                continue
            pipe.send(("result", _time(runner, inputs)))


@contextlib.contextmanager
def errors_sent(pipe: Connection) -> Iterator[None]:
    """Send what is raised to who asked, as `("error", …)`: an error of ours as it is, another as a line. Who asked may have
    gone: then nothing is said."""
    try:
        yield
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return
    except CompileError as error:
        pipe.send(("error", error))
    except Exception as error:
        traceback.print_exc()
        pipe.send(("error", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"))


def open_subject(
    artifact: Artifact | None,
    release: Path,
    manifest: Manifest,
    snapshot: Snapshot,
    options: Mapping[str, bool],
    threads: int,
) -> tuple[Runner, Model | None]:
    """An artifact opened in its runtime; or, for None, the eager original, with the model."""
    if artifact is not None:
        return BACKENDS[artifact.format].open(release, artifact, threads), None
    import torch

    from compiler.stages.load import load, run_eager

    torch.set_num_threads(threads)
    model = load(snapshot, manifest.task, aside=None, **manifest.loading(options))
    return lambda inputs: run_eager(model, inputs), model


def _time(runner: Runner, inputs: Mapping[str, np.ndarray[Any, Any]]) -> list[float]:
    for _ in range(WARM_UP):
        runner(inputs)
    seconds: list[float] = []
    while len(seconds) < LEAST_RUNS or (sum(seconds) < LEAST_SECONDS and len(seconds) < MOST_RUNS):
        began = time.perf_counter()
        runner(inputs)
        seconds.append(time.perf_counter() - began)
    return seconds
