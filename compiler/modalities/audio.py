"""Sound: float32 `[batch, samples]` in mono at the rate that the model was trained at, and a mask where it has one."""

from __future__ import annotations

import wave
from collections.abc import Mapping, Sequence
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compiler.errors import ConfigError
from compiler.modalities.image import check_runs
from compiler.numerics import Case
from compiler.samples import BATCH, NONE, RIGHT
from compiler.sources import check_processor, check_tokenizer

if TYPE_CHECKING:
    import numpy as np
    import torch

    from compiler.modalities import Samples
    from compiler.types import Model, Snapshot

LIBRARIES: tuple[str, ...] = ()
MAIN_INPUTS = ("input_values", "input_features")
DERIVED = {1: "frames"}
# Sounds of a data file that are all run, in batches, and how much of each: attention grows with the square of it.
MAX_SOUNDS, MAX_SECONDS = 32, 15.0
# What one batch of each size is of, in seconds; and an odd number of samples, at any rate.
SECONDS, ODD = 0.5, 6007
SOUNDS = "sounds"
# A windowed sinc reaches over so many zero crossings, and cuts off at so much of the lower rate's half.
CROSSINGS, ROLLOFF = 32, 0.95


def check(snapshot: Snapshot, task: str) -> None:
    check_processor(snapshot, "audio")
    if task == "automatic-speech-recognition":  # its vocabulary, to make text of what the model says
        check_tokenizer(snapshot)


def processor(folder: Path, options: Mapping[str, Any]) -> Any:
    from transformers import AutoFeatureExtractor

    return AutoFeatureExtractor.from_pretrained(folder, **options)


def prepare(module: torch.nn.Module, processor: Any, task: str, uri: str) -> dict[str, Any]:
    import numpy as np
    import torch

    noise = np.random.default_rng(0).standard_normal((2, ODD + 2), dtype=np.float32) / 4
    short = features(processor, [noise[0], noise[1, : ODD - 1000]])
    long = features(processor, [noise[0], noise[1], noise[0]], twice=True)
    axes = {
        name: tuple(
            name_of if one != other else one
            for name_of, one, other in zip(("batch", "samples", "bands"), value.shape, long[name].shape, strict=False)
        )
        for name, value in short.items()
    }
    example = {name: torch.from_numpy(value) for name, value in short.items()}
    check_runs(module, example, uri)
    return {"axes": axes, "example": example, "positions": None}


def features(
    processor: Any, sounds: Sequence[np.ndarray[Any, Any]], *, twice: bool = False
) -> dict[str, np.ndarray[Any, Any]]:
    """Sounds, float32 `[samples]` at the processor's rate, as the model takes them, padded to the longest: float32
    `[batch, samples]`, and int64 `attention_mask` where the processor says that the model wants one. With `twice`, each is
    repeated once."""
    import numpy as np

    made = processor(
        [np.tile(sound, 2) if twice else sound for sound in sounds],
        sampling_rate=processor.sampling_rate,
        padding=True,
        return_tensors="np",
        return_attention_mask=bool(getattr(processor, "return_attention_mask", False)),
    )
    return {
        name: np.ascontiguousarray(value, dtype=np.int64 if name == "attention_mask" else np.float32)
        for name, value in made.items()
    }


def probes(model: Model) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, np.ndarray[Any, Any]]]:
    import numpy as np

    noise = np.random.default_rng(1).standard_normal((3, ODD), dtype=np.float32) / 4
    return features(model.processor, list(noise[:2])), features(model.processor, list(noise), twice=True)


def read(path: str) -> tuple[np.ndarray[Any, Any], int]:
    """A WAV file's sound, float32 `[samples]` in mono, and its rate in Hz.

    Raises:
        ConfigError: the file is none, or is compressed, or holds nothing.
    """
    import numpy as np

    advice = "give a WAV file of PCM samples (ffmpeg -i FILE -c:a pcm_s16le sound.wav makes one)"
    try:
        with wave.open(path, "rb") as stream:
            width, channels, rate = stream.getsampwidth(), stream.getnchannels(), stream.getframerate()
            content = stream.readframes(stream.getnframes())
    except (wave.Error, EOFError, OSError) as error:
        raise ConfigError(f"{path}: not a sound that can be read ({str(error) or 'empty, or cut short'}); {advice}") from error
    content = content[: len(content) - len(content) % (width * channels)]
    if not content or not rate:
        raise ConfigError(f"{path}: holds no sound; {advice}")
    if width == 1:  # the only one without a sign
        values = np.frombuffer(content, dtype=np.uint8).astype(np.float32) / 128 - 1
    else:
        # Little-endian with a sign; three bytes are the upper ones of four.
        padded = np.zeros((len(content) // width, 4), dtype=np.uint8)
        padded[:, 4 - width :] = np.frombuffer(content, dtype=np.uint8).reshape(-1, width)
        values = padded.view("<i4")[:, 0].astype(np.float32) / 2**31
    return values.reshape(-1, channels).mean(axis=1), rate


def resample(sound: np.ndarray[Any, Any], rate: int, wanted: int) -> np.ndarray[Any, Any]:
    """A sound at another rate, by a sinc with a Hann window (J. O. Smith, "Digital Audio Resampling").

    Args:
        sound: float32 `[samples]` at `rate` Hz. The result has `ceil(samples × wanted / rate)`.
    """
    import numpy as np

    if rate == wanted:
        return sound
    up, down = wanted // gcd(rate, wanted), rate // gcd(rate, wanted)
    cutoff = ROLLOFF * min(1.0, up / down)  # in half of `rate`
    reach = int(np.ceil(CROSSINGS / cutoff))
    count = -(-len(sound) * up // down)
    place = np.arange(count) * down
    padded = np.pad(sound.astype(np.float64), reach + 1)
    result = np.zeros(count)
    for offset in range(-reach, reach + 2):
        distance = (place % up) / up - offset
        window = np.where(np.abs(distance) <= reach, np.cos(np.pi * distance / (2 * reach)) ** 2, 0.0)
        result += padded[place // up + offset + reach + 1] * cutoff * np.sinc(cutoff * distance) * window
    return result.astype(np.float32)


def samples(
    model: Model, lines: Sequence[tuple[str, ...]], batches: Sequence[int], sequences: Sequence[int] | None
) -> Samples:
    """Every batch size without padding and, of sounds of different length, with it; an odd length; and every sound, in
    batches."""
    import numpy as np

    from compiler.modalities import Samples

    if sequences is not None:
        raise ConfigError("shapes.sequence: is for text, in tokens; a model of sound has none: leave it out")
    wanted = int(model.processor.sampling_rate)
    every, others = [], set()
    for path, *_ in lines[:MAX_SOUNDS]:
        sound, rate = read(path)
        others |= {rate} - {wanted}
        every.append(resample(sound, rate, wanted)[: int(MAX_SECONDS * wanted)])
    note = ""
    if others:
        note = f"sounds at {', '.join(map(str, sorted(others)))} Hz resampled to the model's {wanted}"

    def cut(number: int, length: int) -> np.ndarray[Any, Any]:
        """So many samples of a sound, which begins again where it is shorter."""
        sound = every[number % len(every)]
        return np.resize(sound, length)

    length = int(SECONDS * wanted)
    found = []
    for batch in dict.fromkeys((*batches, 3)):
        found.append(_case(model, NONE, [cut(row, length) for row in range(batch)]))
        if batch > 1:
            lengths = [length - row % 4 * (length // 5) - row % 97 for row in range(batch)]
            found.append(_case(model, RIGHT, [cut(row, size) for row, size in enumerate(lengths)]))
    found.append(_case(model, NONE, [cut(0, ODD)]))
    found += [_case(model, SOUNDS, every[start : start + BATCH]) for start in range(0, len(every), BATCH)]
    return Samples(found, note)


def _case(model: Model, name: str, sounds: Sequence[np.ndarray[Any, Any]]) -> Case:
    import numpy as np

    module: Any = model.module
    inputs = features(model.processor, sounds)
    if "attention_mask" not in inputs or not hasattr(module, "_get_feat_extract_output_lengths"):
        return Case(name, inputs)  # what the model makes of padding is its answer, then
    import torch

    mask = torch.from_numpy(inputs["attention_mask"])
    lengths = module._get_feat_extract_output_lengths(mask.sum(dim=1)).numpy()
    frames = int(module._get_feat_extract_output_lengths(torch.tensor([mask.shape[1]])))
    return Case(name, inputs, real={"frames": np.arange(frames)[None] < lengths[:, None]})
