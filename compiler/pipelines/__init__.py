"""Tasks answered by a release: `compiler.pipeline(task, release)`.

A task is a module that satisfies `base.Kind`, and a line in `KINDS`.
"""

from __future__ import annotations

import os
from typing import Any

from compiler.bucketing import BATCH_TOKENS
from compiler.errors import InputError
from compiler.pipelines import (
    audio_classification,
    automatic_speech_recognition,
    feature_extraction,
    fill_mask,
    image_classification,
    image_feature_extraction,
    multiple_choice,
    question_answering,
    sentence_embedding,
    sentence_similarity,
    text_classification,
    token_classification,
    zero_shot_image_classification,
)
from compiler.pipelines.base import Kind, Pipeline
from compiler.runtime import CompiledModel, load

KINDS: dict[str, Kind] = {
    "audio-classification": audio_classification,
    "automatic-speech-recognition": automatic_speech_recognition,
    "feature-extraction": feature_extraction,
    "fill-mask": fill_mask,
    "image-classification": image_classification,
    "image-feature-extraction": image_feature_extraction,
    "multiple-choice": multiple_choice,
    "question-answering": question_answering,
    "sentence-embedding": sentence_embedding,
    "sentence-similarity": sentence_similarity,
    "text-classification": text_classification,
    "token-classification": token_classification,
    "zero-shot-image-classification": zero_shot_image_classification,
}
ALIASES = {"ner": "token-classification", "sentiment-analysis": "text-classification"}


def pipeline(
    task: str | None,
    release: str | os.PathLike[str] | CompiledModel,
    *,
    format: str | None = None,
    precision: str | None = None,
    threads: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    **options: Any,
) -> Pipeline:
    """A task's pipeline over a release, called and answering as transformers' own.

    Args:
        task: a key of `KINDS`, or transformers' `ner` and `sentiment-analysis`; the release's own when None.
        release: its folder, or what `compiler.load` opened.
        format, precision, threads: as `compiler.load` takes them.
        batch_tokens: lists are sorted by length and run in batches of so many tokens, padding included; 16 × 16 pixels count
            as one, and so do 320 samples of sound.
        options: the task's, for every call: `top_k`, `aggregation_strategy` …

    Raises:
        InputError: the release has no head for the task, or no such artifact or option.
        ReleaseError: it is no release, is damaged, or has no tokenizer or processor.
    """
    model = release if isinstance(release, CompiledModel) else load(release, format, precision, threads)
    if isinstance(release, CompiledModel) and (format or precision or threads):
        raise InputError("format, precision and threads are for a release that is not opened yet")
    name = model.manifest.task if task is None else ALIASES.get(task, task)
    if name not in KINDS:
        raise InputError(f"{task}: no such task; {', '.join(KINDS)}")
    kind = KINDS[name]
    if model.manifest.task != kind.TASK:
        has = ", ".join(known for known, other in KINDS.items() if model.manifest.task == other.TASK)
        where = f"{model.manifest.name} {model.manifest.release}"
        raise InputError(f"{name}: {where} has no head for it: {model.manifest.architecture} does {has}")
    if batch_tokens < 1:
        raise InputError(f"batch_tokens: {batch_tokens}; at least 1")
    pipe = Pipeline(name, kind, model, None, kind.OPTIONS, batch_tokens)
    pipe.options = pipe.with_options(options)
    pipe.prepared = kind.prepare(model, pipe.options)
    return pipe
