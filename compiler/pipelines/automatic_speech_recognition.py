"""automatic-speech-recognition by CTC: the likeliest token of each frame, repeated ones and blanks left out, as a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compiler.errors import ReleaseError
from compiler.modalities import audio
from compiler.pipelines import sounds
from compiler.pipelines.base import Pipeline
from compiler.runtime import CompiledModel

if TYPE_CHECKING:
    import numpy as np

TASK = "automatic-speech-recognition"
OPTIONS: Mapping[str, Any] = {}
WINDOW, size, group, rows, single = sounds.WINDOW, sounds.size, sounds.group, sounds.rows, sounds.single
items = sounds.items


@dataclass(frozen=True)
class Processors:
    extractor: Any
    tokenizer: Any


def prepare(model: CompiledModel, options: Mapping[str, Any]) -> Processors:
    extractor = sounds.prepare(model, options)
    from transformers import AutoTokenizer

    try:
        return Processors(extractor, AutoTokenizer.from_pretrained(model.folder, local_files_only=True))
    except Exception as error:  # transformers raises what it likes
        raise ReleaseError(
            f"{model.folder}: its tokenizer cannot be read ({' '.join(str(error).split())[:200]}); fetch or build the release "
            "again"
        ) from error


def features(pipe: Pipeline, items: Sequence[Any], options: Mapping[str, Any]) -> list[list[sounds.Samples]]:
    return [[sounds.samples(pipe, pipe.prepared.extractor, item)] for item in items]


def collate(pipe: Pipeline, features: Sequence[sounds.Samples]) -> dict[str, np.ndarray[Any, Any]]:
    return dict(audio.features(pipe.prepared.extractor, features))


def reduce(
    pipe: Pipeline, feature: Any, outputs: Mapping[str, np.ndarray[Any, Any]], options: Mapping[str, Any]
) -> np.ndarray[Any, Any]:
    """int `[frames]`."""
    tokens: np.ndarray[Any, Any] = outputs["logits"].argmax(axis=-1)
    return tokens


def finish(pipe: Pipeline, item: Any, parts: Sequence[tuple[Any, Any]], options: Mapping[str, Any]) -> dict[str, str]:
    ((_, tokens),) = parts
    return {"text": pipe.prepared.tokenizer.decode(tokens.tolist(), skip_special_tokens=False)}
