"""automatic-speech-recognition by CTC: the likeliest token of each frame, repeated ones and blanks left out, as a text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compiler.errors import InputError, ReleaseError
from compiler.inputs import samples_per_frame
from compiler.modalities import audio
from compiler.pipelines import sounds
from compiler.pipelines.base import Pipeline
from compiler.runtime import CompiledModel

if TYPE_CHECKING:
    import numpy as np

TASK = "automatic-speech-recognition"
# With `chunk_length_s` long sounds are heard in pieces of so many seconds: attention grows with the square of the length.
# Pieces overlap by `stride_length_s` on each side (one number or two), a sixth when left out; frames there do not count.
OPTIONS: Mapping[str, Any] = {"chunk_length_s": None, "stride_length_s": None}
WINDOW, size, group, rows, single = sounds.WINDOW, sounds.size, sounds.group, sounds.rows, sounds.single
items = sounds.items


@dataclass(frozen=True)
class Piece:
    """float32 `[samples]`; the first and the last frames of it are another piece's."""

    samples: sounds.Samples
    first: int = 0
    last: int = 0

    def __len__(self) -> int:
        return len(self.samples)


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


def features(pipe: Pipeline, items: Sequence[Any], options: Mapping[str, Any]) -> list[list[Piece]]:
    found = [sounds.samples(pipe, pipe.prepared.extractor, item) for item in items]
    if options["chunk_length_s"] is None:
        return [[Piece(sound)] for sound in found]
    chunk, before, after, frame = _lengths(pipe, options)
    return [list(_pieces(sound, chunk, before, after, frame)) for sound in found]


def _lengths(pipe: Pipeline, options: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """Samples of a piece, of its overlap before and after, and of a frame. Raises InputError."""
    chunk, stride = options["chunk_length_s"], options["stride_length_s"]
    if (frame := samples_per_frame(pipe.model.config)) is None:
        raise InputError("chunk_length_s: the model's config does not say how many samples make a frame; give shorter sounds")
    given = [chunk, *(stride if isinstance(stride, (list, tuple)) else [stride or 0])]
    if not all(isinstance(seconds, (int, float)) for seconds in given):
        raise InputError(f"chunk_length_s: {chunk!r} with stride_length_s {stride!r}; both are numbers of seconds")
    strides = [chunk / 6] * 2 if stride is None else list(stride) if isinstance(stride, (list, tuple)) else [stride] * 2
    rate = pipe.prepared.extractor.sampling_rate
    sizes = [round(seconds * rate / frame) * frame for seconds in (chunk, *strides)]
    if len(sizes) != 3 or min(sizes) < 0 or sizes[0] <= sizes[1] + sizes[2]:
        raise InputError(f"chunk_length_s: {chunk} with stride_length_s {stride}; a piece is longer than both its overlaps")
    return sizes[0], sizes[1], sizes[2], frame


def _pieces(sound: sounds.Samples, chunk: int, before: int, after: int, frame: int) -> Iterator[Piece]:
    """A sound's pieces, in samples, as transformers' pipeline cuts them."""
    for start in range(0, len(sound), chunk - before - after):
        piece = sound[start : start + chunk]
        ends = start + chunk >= len(sound)
        frames = round(len(piece) / frame)
        yield Piece(
            piece,
            round(before / len(piece) * frames) if start else 0,
            0 if ends else round(after / len(piece) * frames),
        )
        if ends:
            return


def collate(pipe: Pipeline, features: Sequence[Piece]) -> dict[str, np.ndarray[Any, Any]]:
    return dict(audio.features(pipe.prepared.extractor, [piece.samples for piece in features]))


def reduce(
    pipe: Pipeline, feature: Piece, outputs: Mapping[str, np.ndarray[Any, Any]], options: Mapping[str, Any]
) -> np.ndarray[Any, Any]:
    """int `[frames]`, those that are the piece's own."""
    tokens: np.ndarray[Any, Any] = outputs["logits"].argmax(axis=-1)
    if (frame := samples_per_frame(pipe.model.config)) is None:
        return tokens
    # The convolutions make a frame or so less than the samples are long.
    return tokens[feature.first : round(len(feature) / frame) - feature.last]


def finish(pipe: Pipeline, item: Any, parts: Sequence[tuple[Any, Any]], options: Mapping[str, Any]) -> dict[str, str]:
    tokens = [token for _, found in parts for token in found.tolist()]
    return {"text": pipe.prepared.tokenizer.decode(tokens, skip_special_tokens=False)}
