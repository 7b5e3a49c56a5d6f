"""What the tasks of sound share: items, samples at the model's rate, batches."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Any

from compiler.errors import ConfigError, InputError
from compiler.inputs import frames
from compiler.modalities import audio
from compiler.pipelines import images, processor, text
from compiler.pipelines.base import Pipeline, listed
from compiler.runtime import CompiledModel

if TYPE_CHECKING:
    import numpy as np

    Samples = np.ndarray[Any, Any]

# 64 sounds of half a minute at 16 kHz are 123 MB.
WINDOW = 64
# Samples that count as a token of a batch's budget: what Wav2Vec2 and its kin make a frame of.
FRAME = 320

single = text.single


def prepare(model: CompiledModel, options: Mapping[str, Any]) -> Any:
    return processor.read(model, "audio")


def items(args: tuple[Any, ...], named: dict[str, Any]) -> tuple[list[Any], bool]:
    """Sounds: paths of WAV files, float arrays `[samples]` at the model's rate, or mappings with `array` (or `raw`) and
    `sampling_rate` in Hz: one, or a list."""
    return listed(args, named, "audio")


def features(pipe: Pipeline, items: Sequence[Any], options: Mapping[str, Any]) -> list[list[Samples]]:
    return [[samples(pipe, pipe.prepared, item)] for item in items]


def samples(pipe: Pipeline, extractor: Any, item: Any) -> Samples:
    """A sound, float32 `[samples]` in mono, at the rate of the model's feature extractor: made so where it is another, which
    is said once. Raises InputError when it is none."""
    import numpy as np

    wanted = int(extractor.sampling_rate)
    if isinstance(item, (str, os.PathLike)):
        try:
            sound, rate = audio.read(str(item))
        except ConfigError as error:
            raise InputError(str(error)) from error
    else:
        given, rate = item, wanted
        if isinstance(item, Mapping):
            given, rate = item.get("raw", item.get("array")), item.get("sampling_rate", 0)
        if not isinstance(given, np.ndarray) or given.dtype.kind != "f" or given.ndim != 1:
            raise InputError(
                f"an input is {images.described(given)}; give a WAV file's path, a float array [samples] in mono, or a "
                "mapping with array and sampling_rate"
            )
        if isinstance(rate, bool) or not isinstance(rate, int) or rate < 1:
            raise InputError(f"sampling_rate: {rate!r}; a whole number of Hz")
        if given.size == 0 or not np.isfinite(given).all():
            raise InputError("a sound is empty, or holds values that are no numbers")
        sound = given.astype(np.float32)
    if rate != wanted:
        pipe.say_once("rate", f"{pipe.task}: sound at {rate} Hz is resampled to the model's {wanted} Hz")
    return audio.resample(sound, rate, wanted)


def size(feature: Sized) -> int:
    return -(-len(feature) // FRAME)


def group(pipe: Pipeline, feature: Sized) -> Hashable:
    """Only a model with a mask, whose frames can be counted, answers beside padding as it does without."""
    names = {tensor.name for tensor in pipe.model.manifest.signature.inputs}
    masked = "attention_mask" in names and frames(len(feature), pipe.model.config) is not None
    return None if masked else len(feature)


def collate(pipe: Pipeline, features: Sequence[Samples]) -> dict[str, np.ndarray[Any, Any]]:
    return audio.features(pipe.prepared, features)


def rows(
    pipe: Pipeline, outputs: Mapping[str, np.ndarray[Any, Any]], features: Sequence[Sized]
) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
    """Each sound's part of the outputs; of those that answer for each frame, the real ones."""
    aligned = {tensor.name for tensor in pipe.model.manifest.signature.outputs if tensor.shape[1:2] == ("frames",)}
    for number, feature in enumerate(features):
        real = slice(frames(len(feature), pipe.model.config))
        yield {name: value[number][real] if name in aligned else value[number] for name, value in outputs.items()}
