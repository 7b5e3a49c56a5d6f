"""Commands that use a release: run, evaluate."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compiler.bucketing import BATCH_TOKENS
from compiler.cli.options import json_option
from compiler.cli.output import lines, print_json
from compiler.errors import ConfigError, InputError

if TYPE_CHECKING:
    from compiler.evaluate import Score
    from compiler.pipelines.base import Pipeline
    from compiler.runtime import CompiledModel

format_option = click.option("--format", help="torchscript, onnx or openvino; the fastest when left out.")
precision_option = click.option("--precision", help="fp32, bf16 …; the fastest when left out.")
threads_option = click.option(
    "--threads", type=click.IntRange(1, 1024), help="The runtime's threads; as many as cores when left out."
)
tokens_option = click.option(
    "--batch-tokens",
    type=click.IntRange(1),
    default=BATCH_TOKENS,
    show_default=True,
    help="Inputs are sorted by length and run in batches of so many tokens, padding included.",
)


@click.command(short_help="Ask a release.")
@click.argument("release", type=click.Path(path_type=Path))
@click.option("--text", "texts", multiple=True, help="A text; may be given again.")
@click.option("--text-pair", "pairs", multiple=True, help="The text beside it: to classify as a pair, or to compare.")
@click.option("--question", help="What to ask of --context.")
@click.option("--context", help="Where the answer stands.")
@click.option(
    "--file",
    "file",
    type=click.Path(path_type=Path),
    help="Inputs: a text, or the path of an image or a sound, a line (.txt), or JSON lines (.jsonl).",
)
@click.option("--image", "images", multiple=True, help="The path of an image; may be given again.")
@click.option("--audio", "sounds", multiple=True, help="The path of a WAV file; may be given again.")
@click.option(
    "--chunk-seconds",
    type=click.FloatRange(0.1),
    help="Hear long speech in pieces of so many seconds, which overlap: memory grows with the square of a piece.",
)
@click.option("--label", "labels", multiple=True, help="What an image may show, or how a text may go on; given several times.")
@click.option("--task", help="sentence-embedding, feature-extraction or sentence-similarity, where a release does several.")
@click.option("--top-k", type=click.IntRange(1), help="So many answers; all labels of a text are --top-k 1000.")
@click.option("--pooling", help="mean, cls …: how tokens make a vector, where a release does not say.")
@click.option("--no-answer", is_flag=True, help="The answer to a question may be that there is none.")
@format_option
@precision_option
@threads_option
@tokens_option
@json_option
def run(
    release: Path,
    texts: tuple[str, ...],
    pairs: tuple[str, ...],
    question: str | None,
    context: str | None,
    file: Path | None,
    images: tuple[str, ...],
    sounds: tuple[str, ...],
    chunk_seconds: float | None,
    labels: tuple[str, ...],
    task: str | None,
    top_k: int | None,
    pooling: str | None,
    no_answer: bool,
    format: str | None,
    precision: str | None,
    threads: int | None,
    batch_tokens: int,
    as_json: bool,
) -> None:
    """Answer with RELEASE, which says what kind of answer: an embedding, a label, entities, a span, words for a mask, what was
    said.

    Results come in the order of the inputs.
    """
    from compiler.pipelines import pipeline
    from compiler.progress import counting
    from compiler.runtime import load

    if sum(map(bool, (texts, file, question, images, sounds))) != 1:
        raise click.UsageError("give --text, or --question with --context, or --image, or --audio, or --file")
    if (question is None) != (context is None):
        raise click.UsageError("--question and --context go together")
    if pairs and len(pairs) != len(texts):
        raise click.UsageError("give as many --text-pair as --text")
    _warn_on_stderr()
    model = load(release, format, precision, threads)
    asked = "question-answering" if question else None
    name = task or asked or _usual_task(release, model.manifest.task, bool(pairs), pooling)
    given_options: dict[str, Any] = {"pooling": pooling} if pooling else {}
    _check_kind(model, {"text": bool(texts), "image": bool(images), "audio": bool(sounds)})
    _check_labels(name, len(labels), bool(texts), file)
    if labels and name == "zero-shot-image-classification":
        given_options["candidate_labels"] = list(labels)
    elif labels and (name != "multiple-choice" or file):
        raise InputError(f"--label: is for zero-shot-image-classification, and multiple-choice with --text; this is {name}")
    pipe = pipeline(name, model, batch_tokens=batch_tokens, **given_options)
    options = _options(pipe, top_k, no_answer, chunk_seconds)
    if file is not None:
        given = _read(file, pipe, bool(labels))
    elif images or sounds:
        given = [*images, *sounds]
    elif name == "multiple-choice":
        given = [{"text": text, "choices": list(labels)} for text in texts]
    elif question is not None:
        given = [{"question": question, "context": context}]
    elif pairs:
        given = [{"text": text, "text_pair": pair} for text, pair in zip(texts, pairs, strict=True)]
    else:
        given = list(texts)
    items, _ = pipe.kind.items((given,), {})
    artifact = model.artifact
    assert artifact is not None  # noqa: S101
    opened = f"{artifact.format} {artifact.precision}"
    click.echo(f"{model.manifest.name} {model.manifest.release}: {opened}, {model.reason}", err=True)
    with counting() as tell:
        done = 0

        def count(more: int) -> None:
            nonlocal done
            done += more
            tell(pipe.task, done, len(items))

        answers = pipe.stream(items, options, count if file is not None else lambda more: None)
        if not as_json:
            for answer in answers:
                click.echo(shown(pipe.task, answer))
            return
        results = [plain(answer) for answer in answers]
    about = {"release": str(release), "task": pipe.task, "format": artifact.format, "precision": artifact.precision}
    print_json({**about, "reason": model.reason, "results": results})


def _usual_task(release: Path, task: str, compared: bool, pooling: str | None) -> str:
    """Vectors are pooled where the release says how; two texts are compared."""
    if task != "feature-extraction":
        return task
    if compared:
        return "sentence-similarity"
    return "sentence-embedding" if pooling or (release / "modules.json").is_file() else task


def _check_kind(model: CompiledModel, given: Mapping[str, bool]) -> None:
    """Refuse a text, an image or a sound that is given to a release of something else. Raises InputError."""
    from compiler.tasks import TASKS

    task = model.manifest.task
    wanted = {"image-text": "image"}.get(TASKS[task].modality, TASKS[task].modality)
    if wrong := [name for name, is_given in given.items() if is_given and name != wanted]:
        where = f"{model.manifest.name} {model.manifest.release}"
        raise InputError(f"--{wrong[0]}: {where} is for {task}; give --{wanted}")


def _check_labels(task: str, labels: int, with_text: bool, file: Path | None) -> None:
    """Make sure that there is something to choose from. Raises InputError."""
    if task == "zero-shot-image-classification" and not labels and (file is None or file.suffix != ".jsonl"):
        raise InputError("--label: is missing: what may the image show? It is given several times")
    if task == "multiple-choice" and with_text and labels < 2:
        raise InputError("--label: is given for each choice, two or more times; how may the text go on?")


def _options(pipe: Pipeline, top_k: int | None, no_answer: bool, chunk_seconds: float | None) -> dict[str, Any]:
    given: dict[str, Any] = {}
    if chunk_seconds is not None:
        if "chunk_length_s" not in pipe.kind.OPTIONS:
            raise InputError(f"--chunk-seconds: is for automatic-speech-recognition, and this is {pipe.task}")
        given["chunk_length_s"] = chunk_seconds
    if top_k is not None:
        if "top_k" not in pipe.kind.OPTIONS:
            scored = pipe.task in ("zero-shot-image-classification", "multiple-choice")
            raise InputError(f"--top-k: {pipe.task} {'scores each label' if scored else 'has one answer'}")
        given["top_k"] = top_k
    elif pipe.task.endswith("-classification") and "top_k" in pipe.kind.OPTIONS:
        if pipe.model.config.problem_type == "multi_label_classification":
            given["top_k"] = None
        elif pipe.task != "text-classification":
            given["top_k"] = 1
    if no_answer:
        if "handle_impossible_answer" not in pipe.kind.OPTIONS:
            raise InputError(f"--no-answer: is for question-answering, and this is {pipe.task}")
        given["handle_impossible_answer"] = True
    if pipe.task == "token-classification":
        given["aggregation_strategy"] = "simple"
    return pipe.with_options(given)


def _read(path: Path, pipe: Pipeline, labelled: bool) -> list[Any]:
    """The inputs of a file; paths in it are relative to it. `labelled`: the labels of its images are those of the command.
    Raises ConfigError when it, or a line of it, is none."""
    from compiler.labelled import objects, read_text
    from compiler.tasks import FILES, LISTS, TASKS, parse_line

    task = pipe.model.manifest.task
    names = TASKS[task].fields
    if path.suffix == ".jsonl":
        if pipe.task == "sentence-similarity":
            return [line for _, line in objects(path)]
        found: list[Any] = []
        for where, line in objects(path):
            if labelled and "texts" in names:
                line = {**line, "texts": ["given by --label"]}
            values = parse_line(json.dumps(line), task, where)
            fields: dict[str, Any] = dict(zip(names, values, strict=False))
            fields |= {name: list(values[number:]) for number, name in enumerate(names) if name in LISTS}
            fields |= {name: str(path.parent / value) for name, value in fields.items() if name in FILES}
            found.append(fields[names[0]] if len(names) == 1 or labelled else fields)
        return found
    if path.suffix != ".txt" or pipe.task in ("question-answering", "sentence-similarity", "multiple-choice"):
        raise ConfigError(f"{path}: inputs are JSON lines (.jsonl) or, where an input is one text, a text a line (.txt)")
    rows = read_text(path).removesuffix("\n").split("\n")
    return [str(path.parent / row) for row in rows] if names[0] in FILES else rows


def plain(value: Any) -> Any:
    """An answer as JSON has it."""
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value


def shown(task: str, answer: Any) -> str:
    """An answer for a reader."""
    return "\n".join(_shown(task, answer)) or "nothing found"


def _shown(task: str, answer: Any) -> Iterator[str]:
    if task == "sentence-embedding":
        length = sum(float(value) ** 2 for value in answer) ** 0.5
        yield f"{len(answer)} values, length {length:.4f}: {' '.join(f'{value:.4f}' for value in answer[:6])} …"
    elif task == "feature-extraction":
        (tokens,) = answer
        yield f"{len(tokens)} tokens × {len(tokens[0])} values: {' '.join(f'{value:.4f}' for value in tokens[0][:6])} …"
    elif task == "image-feature-extraction":
        import numpy as np

        vectors = np.asarray(answer)[0]
        flat = " ".join(f"{value:.4f}" for value in vectors.reshape(-1)[:6])
        yield f"{' × '.join(map(str, vectors.shape))} values: {flat} …"
    elif task == "automatic-speech-recognition":
        yield answer["text"]
    elif task == "sentence-similarity":
        yield " ".join(f"{value:.4f}" for value in (answer if isinstance(answer, list) else [answer]))
    elif task == "question-answering":
        for one in answer if isinstance(answer, list) else [answer]:
            what = f"characters {one['start']} to {one['end']}" if one["answer"] else "there is none"
            yield f"{one['answer'] or '–'}  {one['score']:.4f}  {what}"
    elif task == "token-classification":
        for one in answer:
            yield f"{one['entity_group']}  {one['score']:.4f}  characters {one['start']} to {one['end']}  {one['word']}"
    elif task == "fill-mask":
        for one in answer:
            if isinstance(one, list):  # several masked words
                yield from _shown(task, one)
            else:
                yield f"{one['token_str']}  {one['score']:.4f}  {one['sequence']}"
    else:
        for one in answer if isinstance(answer, list) else [answer]:
            yield f"{one['label']}  {one['score']:.4f}"


def _warn_on_stderr() -> None:
    """What the compiler's own log warns of, as lines on stderr."""
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: click.echo(f"warning: {record.getMessage()}", err=True)  # type: ignore[method-assign]
    log = logging.getLogger("compiler")
    log.handlers = [handler]
    log.propagate = False


@click.command(short_help="Judge a release on labelled data.")
@click.argument("release", type=click.Path(path_type=Path))
@click.option("--data", required=True, type=click.Path(path_type=Path), help="Labelled JSON lines, or SQuAD's JSON.")
@click.option(
    "--max-drop",
    type=click.FloatRange(0, 1),
    help="Exit 1 when a metric is worse than the original's by more (0.01: a point).",
)
@format_option
@precision_option
@threads_option
@tokens_option
@click.option("--source", help="Where the checkpoint is now, if not where the manifest says: path:, package: or hf:.")
@click.option(
    "--folder", type=click.Path(path_type=Path), help="Where pipeline.yaml's relative paths start, if not here, nor two up."
)
@click.option("--trust-remote-code", is_flag=True, help="Run the checkpoint's own code, if the original needs it.")
@click.option("--allow-pickle", is_flag=True, help="Open the checkpoint's pickle, if its weights are one.")
@json_option
def evaluate(
    release: Path,
    data: Path,
    max_drop: float | None,
    format: str | None,
    precision: str | None,
    threads: int | None,
    batch_tokens: int,
    source: str | None,
    folder: Path | None,
    trust_remote_code: bool,
    allow_pickle: bool,
    as_json: bool,
) -> None:
    """The task's metric of every artifact of RELEASE on labelled data, beside the eager original, and the time each took.

    Accuracy and F1 (classification of texts, images, sounds), Spearman's correlation (pairs of texts with a score), F1 of
    entities (token-classification), exact match and F1 (question-answering), word error rate (automatic-speech-recognition).
    """
    from compiler.evaluate import evaluate as judge
    from compiler.evaluate import worse
    from compiler.progress import counting
    from compiler.runtime import asked_for
    from compiler.verify import read_release, verify_files

    _warn_on_stderr()
    manifest, _ = read_release(release)
    verify_files(release, manifest)
    wanted = asked_for(manifest, str(release), format, precision)
    with counting() as tell:
        scores = judge(
            release,
            manifest,
            data,
            wanted,
            threads=threads or os.cpu_count() or 1,
            batch_tokens=batch_tokens,
            source=source,
            folder=folder,
            options={"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle},
            tell=tell,
        )
    below = [] if max_drop is None else worse(scores, max_drop)
    if as_json:
        about = {"release": str(release), "task": manifest.task, "data": str(data)}
        print_json({**about, "scores": [asdict(score) for score in scores], "max_drop": max_drop, "worse": below})
    else:
        click.echo(f"{manifest.name} {manifest.release}  {data}")
        click.echo(_table(scores))
    sys.stdout.flush()
    if below:
        more = f"; and {len(below) - 3} more" if len(below) > 3 else ""
        click.echo(f"error: {release}: {'; '.join(below[:3])}{more}; do not use what falls short", err=True)
        raise click.exceptions.Exit(1)


def _table(scores: Sequence[Score]) -> str:
    names = list(scores[0].metrics)
    rows = [("artifact", *names, "seconds", "inputs/s")]
    for score in scores:
        cells = [
            f"{value:.4f}" + (f"  {round(value - scores[0].metrics[name], 4) + 0.0:+.4f}" if name in score.drop else "")
            for name, value in score.metrics.items()
        ]
        rows.append((score.subject, *cells, f"{score.seconds:.2f}", f"{score.per_second:.0f}"))
    return lines(rows)
