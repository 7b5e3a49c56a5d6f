"""How good each artifact of a release is at its task, beside the eager original: the task's metric on labelled data.

The original and every artifact answer in a process of their own, one after the other, with all threads: two runtimes in one
process disturb each other. All of them read the same tokens, or images and sounds as the release's processor makes
them, in the same batches.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from compiler import metrics
from compiler.bench import EAGER, WARM_UP, errors_sent, open_subject
from compiler.errors import CompileError, InputError, StageError
from compiler.labelled import Data, read
from compiler.manifest import Manifest
from compiler.pipelines import (
    audio_classification,
    automatic_speech_recognition,
    image_classification,
    question_answering,
    sentence_similarity,
    text_classification,
    words,
)
from compiler.pipelines.base import Kind, Pipeline
from compiler.runtime import CompiledModel, Config, config_of
from compiler.tasks import TASKS
from compiler.types import Artifact, Snapshot
from compiler.verify import find_original

# What answers a task's data, and with which options. Answers of SQuAD are as long as in its published baselines.
KINDS: dict[str, tuple[Kind, Mapping[str, Any]]] = {
    "audio-classification": (audio_classification, {"top_k": None}),
    "automatic-speech-recognition": (automatic_speech_recognition, {}),
    "feature-extraction": (sentence_similarity, {}),
    "image-classification": (image_classification, {"top_k": None}),
    "question-answering": (question_answering, {"max_answer_len": 30}),
    "text-classification": (text_classification, {"top_k": None}),
    "token-classification": (words, {}),
}
# A label of several is given when its probability is above.
THRESHOLD = 0.5
# Texts whose tokens are compared with those of transformers' tokenizer.
COMPARED = 64
# A process that has given its answers ends by itself, within a second on an idle machine.
ENDING_SECONDS = 10


@dataclass(frozen=True)
class Score:
    """One subject's metrics, shares of 1. `seconds` are those of answering all, without opening the file; `drop` says by
    how much each metric is worse than the original's (negative: better)."""

    subject: str
    metrics: Mapping[str, float]
    seconds: float
    per_second: float
    drop: Mapping[str, float] = field(default_factory=dict)


def evaluate(
    release: Path,
    manifest: Manifest,
    data: Path,
    artifacts: Sequence[Artifact],
    *,
    threads: int,
    batch_tokens: int,
    source: str | None,
    folder: Path | None,
    options: Mapping[str, bool],
    tell: Callable[[str, int, int], None],
) -> list[Score]:
    """The original's score, and those of the artifacts.

    Args:
        data: the labelled file, see `compiler.labelled`.
        threads: for every runtime alike.
        source, folder: where the checkpoint is now, and where relative paths start, as `compile verify` takes them.
        options: `trust_remote_code` and `allow_pickle`, when the checkpoint needs them.
        tell: is told a subject, how many of its items are done, and how many there are.

    Raises:
        ConfigError: a line of the data is not what the task takes, or names a label that the model does not know.
        SourceError: the checkpoint is not there, or is another.
        StageError: a subject does not run, or the release's tokenizer is not the original's.
    """
    config = config_of(release, manifest)
    labelled = read(data, manifest.task, config)
    score = judge(manifest.task, config, labelled, data)
    given = {**KINDS[manifest.task][1]}
    if manifest.task == "question-answering":
        given["handle_impossible_answer"] = not all(labelled.expected)
    snapshot = find_original(release, manifest, source, options, folder)
    scores: list[Score] = []
    warned: set[str] = set()
    for artifact in (None, *artifacts):
        subject = EAGER if artifact is None else f"{artifact.format} {artifact.precision}"
        job = _Job(release, manifest, artifact, snapshot, dict(options), threads, batch_tokens, labelled.items, given)
        answers, seconds, warnings = _run(subject, job, tell)
        for text in warnings:
            if text not in warned:
                warned.add(text)
                logging.getLogger("compiler").warning("%s", text)
        found = score(answers)
        drop = {name: fall(name, scores[0].metrics[name], value) for name, value in found.items()} if scores else {}
        scores.append(Score(subject, found, seconds, len(labelled.items) / seconds, drop))
    return scores


def fall(name: str, original: float, value: float) -> float:
    """By how much a metric is worse than the original's."""
    return value - original if name in metrics.ERRORS else original - value


def judge(task: str, config: Config, data: Data, where: Path) -> Callable[[Sequence[Any]], dict[str, float]]:
    """What makes a task's metrics of its pipeline's answers to the data.

    Raises:
        InputError: all expected numbers are the same, so that nothing can be in their order.
    """
    expected = data.expected
    if task == "question-answering":
        return lambda answers: metrics.squad(expected, [answer["answer"] if answer else "" for answer in answers])
    if task == "automatic-speech-recognition":
        return lambda answers: {"wer": metrics.word_error_rate(expected, [answer["text"] for answer in answers])}
    if task == "token-classification":
        return lambda answers: metrics.entity_f1(expected, answers)
    if task == "feature-extraction" or config.num_labels == 1:
        if len(set(expected)) < 2:
            raise InputError(f"{where}: every score is the same; Spearman's correlation needs some that differ")
        if task == "feature-extraction":
            return lambda answers: {"spearman": metrics.spearman(expected, answers)}
        return lambda answers: {"spearman": metrics.spearman(expected, [answer[0]["score"] for answer in answers])}
    several = config.problem_type == "multi_label_classification"

    def classified(answers: Sequence[Any]) -> dict[str, float]:
        # The answer to an input are all labels, the likeliest first.
        predicted = [
            {label["label"] for label in answer if label["score"] > THRESHOLD} if several else {answer[0]["label"]}
            for answer in answers
        ]
        found = {"accuracy": metrics.accuracy(expected, predicted), "f1_macro": metrics.f1(expected, predicted, "macro")}
        return {**found, "f1_micro": metrics.f1(expected, predicted, "micro")} if several else found

    return classified


def worse(scores: Sequence[Score], most: float) -> list[str]:
    """What is worse than the original by more than `most`, for a reader."""
    sides = {name: "above" if name in metrics.ERRORS else "below" for score in scores for name in score.metrics}
    return [
        f"{score.subject}: {name} is {score.metrics[name]:.4f}, {drop:.4f} {sides[name]} the original's"
        for score in scores
        for name, drop in score.drop.items()
        if drop > most
    ]


@dataclass(frozen=True)
class _Job:
    """What a subject's process is given; `artifact` is None for the original."""

    release: Path
    manifest: Manifest
    artifact: Artifact | None
    snapshot: Snapshot
    options: dict[str, bool]
    threads: int
    batch_tokens: int
    items: Sequence[Any]
    given: Mapping[str, Any]


def _run(subject: str, job: _Job, tell: Callable[[str, int, int], None]) -> tuple[list[Any], float, list[str]]:
    """A subject's answers, the seconds that they took, and its warnings, from a process started from nothing."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(theirs, job), daemon=True)
    process.start()
    theirs.close()
    done = 0
    tell(subject, done, len(job.items))
    try:
        while True:
            kind, value = ours.recv()
            if kind == "done":
                done += value
                tell(subject, done, len(job.items))
            elif kind == "error":
                raise value if isinstance(value, CompileError) else StageError(f"evaluate {subject}: {value}")
            else:
                answers, seconds, warnings = value
                process.join(ENDING_SECONDS)  # killed, it would leave behind what libraries clear away
                return answers, seconds, warnings
    except EOFError as error:
        process.join()
        raise StageError(f"evaluate {subject}: its process died (exit code {process.exitcode})") from error
    finally:
        ours.close()
        process.kill()
        process.join()


def _serve(pipe: Connection, job: _Job) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what libraries say is nobody's answer
    os.environ.update({"OMP_NUM_THREADS": str(job.threads), "HF_HUB_OFFLINE": "1"})
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("compiler").addHandler(handler)
    with errors_sent(pipe):
        asked = _prepare(job)
        for _ in range(WARM_UP):  # what is done once is not timed: TorchScript optimizes in its first runs
            list(asked.stream(job.items[:2], asked.options))
        began = time.perf_counter()
        answers = list(asked.stream(job.items, asked.options, lambda count: pipe.send(("done", count))))
        pipe.send(("result", (answers, time.perf_counter() - began, warnings)))


def _prepare(job: _Job) -> Pipeline:
    """The task's pipeline over a subject."""
    run, original = open_subject(job.artifact, job.release, job.manifest, job.snapshot, job.options, job.threads)
    opened = CompiledModel(job.release, job.manifest, run, job.artifact, "evaluated")
    kind = KINDS[job.manifest.task][0]
    pipe = Pipeline(job.manifest.task, kind, opened, None, {**kind.OPTIONS, **job.given}, job.batch_tokens)
    pipe.prepared = kind.prepare(opened, pipe.options)
    if original is not None and TASKS[job.manifest.task].modality == "text":
        _check_tokens(pipe, original.tokenizer, job.items[:COMPARED])
    return pipe


def _check_tokens(pipe: Pipeline, tokenizer: Any, items: Sequence[Any]) -> None:
    """The release's tokenizer must give the tokens that transformers gives to the original."""
    for item in items:
        texts = item[1] if pipe.kind is sentence_similarity else item
        split = isinstance(texts, list) and pipe.kind is words
        parts = [texts] if split or pipe.kind is not sentence_similarity else [[text] for text in texts]
        for part in parts:
            given = (part,) if split else tuple(part)
            ours = pipe.prepared.encode([given], limit=1 << 20, words=split)[0].ids
            theirs = tokenizer(*given, is_split_into_words=split, verbose=False)["input_ids"]
            if ours != theirs:
                raise StageError(
                    f"evaluate: the release's tokenizer.json and transformers give different tokens for {str(given)[:80]}; "
                    "save the tokenizer with this transformers beside the checkpoint, and build again"
                )
