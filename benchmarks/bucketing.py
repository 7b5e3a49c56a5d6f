"""What it brings to sort a file's texts by length and to batch them to a budget of tokens, as `compile run --file` does.

    .venv/bin/python -m benchmarks.bucketing artifacts/all-minilm-l6-v2/1.0.0 --rounds 5

The texts are film reviews in the order of their file, seven of a sentence or two to one of some paragraphs. Each artifact is
opened in a process of its own, and answers them in turn: sorted, as the product does it; in the file's order, batched to the
same budget; in the file's order by 32, as loops are written by hand; and one at a time.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

import numpy as np

import compiler
from benchmarks import peers
from compiler.bucketing import BATCH_TOKENS
from compiler.bucketing import batches as by_length
from compiler.errors import CompileError
from compiler.manifest import Manifest
from compiler.numerics import cosine
from compiler.pipelines import base
from compiler.verify import read_release

Places = list[list[int]]
SHORT, LONG = 7, 1


def in_order(sizes: Sequence[int], budget: int) -> Places:
    """As `compiler.bucketing.batches`, but without sorting."""
    found: Places = []
    longest = 0
    for place, size in enumerate(sizes):
        longest = max(longest, size)
        if found and longest * (len(found[-1]) + 1) <= budget:
            found[-1].append(place)
        else:
            found.append([place])
            longest = size
    return found


def by_count(count: int) -> Callable[[Sequence[int], int], Places]:
    """Batches of so many, in the order of the texts."""
    return lambda sizes, budget: [list(range(at, min(at + count, len(sizes)))) for at in range(0, len(sizes), count)]


WAYS: dict[str, Callable[[Sequence[int], int], Places]] = {
    "sorted": by_length,
    "file's order": in_order,
    "by 32": by_count(32),
    "one by one": by_count(1),
}


def mixed(count: int) -> list[str]:
    """So many reviews, long ones spread evenly among short ones."""
    reviews = peers.read_reviews()
    short, long = iter(reviews["rotten_tomatoes"]), iter(reviews["imdb"])
    return [next(long) if place % (SHORT + LONG) < LONG else next(short) for place in range(count)]


def measure(
    pipe: Connection, release: Path, format: str, precision: str, threads: int, texts: Sequence[str], rounds: int
) -> None:
    """Send the seconds of each way, a list of a number a round; then, against `sorted`, the smallest cosine of an answer."""
    asked = compiler.pipeline("sentence-embedding", release, format=format, precision=precision, threads=threads)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    answers = {}
    for number in range(rounds + 1):  # the first is not counted: runtimes make themselves ready for shapes
        for way, batches in WAYS.items():
            with mock.patch.object(base, "batches", batches):
                began = time.perf_counter()
                answers[way] = np.asarray(asked(list(texts)))
                if number:
                    seconds[way].append(time.perf_counter() - began)
    cosines = [float(cosine(answers["sorted"], found).min()) for found in answers.values()]
    pipe.send((seconds, min(cosines)))


def table(release: Path, manifest: Manifest, texts: Sequence[str], threads: int, rounds: int) -> list[str]:
    """Markdown: a line an artifact; how many times as fast sorted texts are as each other way, the median over the rounds."""
    lines = ["| artifact | sorted, texts a second | " + " | ".join(f"× {way}" for way in list(WAYS)[1:]) + " | cosine |"]
    lines.append("|" + "---|" * (len(WAYS) + 2))
    context = multiprocessing.get_context("spawn")
    for artifact in manifest.artifacts:
        ours, theirs = context.Pipe(duplex=False)
        arguments = (theirs, release, artifact.format, artifact.precision, threads, texts, rounds)
        process = context.Process(target=measure, args=arguments)
        process.start()
        theirs.close()
        seconds, cosine = ours.recv()
        process.join()
        row = [f"{len(texts) / statistics.median(seconds['sorted']):.0f}"]
        for way in list(WAYS)[1:]:
            ratios = [other / own for other, own in zip(seconds[way], seconds["sorted"], strict=True)]
            row.append(f"{statistics.median(ratios):.2f}")
        lines.append(f"| {artifact.format} {artifact.precision} | {' | '.join(row)} | {cosine:.6f} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("release", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--texts", type=int, default=512)
    options = parser.parse_args()
    try:
        manifest, _ = read_release(options.release)
    except CompileError as error:
        sys.exit(f"error: {error}")
    peers.prepare_peers()
    texts = mixed(options.texts)
    print(f"{len(texts)} texts, batches of up to {BATCH_TOKENS} tokens, {options.threads} threads, {options.rounds} rounds\n")
    print("\n".join(table(options.release, manifest, texts, options.threads, options.rounds)))


if __name__ == "__main__":
    main()
