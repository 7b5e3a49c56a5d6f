"""Images beside texts that may describe them: what both are made of, and their number apart."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compiler.errors import ConfigError, SourceError
from compiler.modalities import image, text
from compiler.numerics import Case
from compiler.samples import BATCH, NONE, RIGHT

if TYPE_CHECKING:
    import numpy as np
    import torch

    from compiler.modalities import Samples
    from compiler.types import Model, Snapshot

LIBRARIES = image.LIBRARIES
MAIN_INPUTS = ("input_ids", "pixel_values")
DERIVED: Mapping[int, str] = {}
INPUTS = ("input_ids", "pixel_values", "attention_mask")


@dataclass(frozen=True)
class Processors:
    images: Any
    tokenizer: Any


def check(snapshot: Snapshot, task: str) -> None:
    text.check(snapshot, task)
    image.check(snapshot, task)


def processor(folder: Path, options: Mapping[str, Any]) -> Processors:
    return Processors(image.processor(folder, options), text.processor(folder, options))


def prepare(module: torch.nn.Module, processor: Processors, task: str, uri: str) -> dict[str, Any]:
    import torch

    _return_tensors_alone(module)
    text.pad(processor.tokenizer, uri)
    taken = set(INPUTS) & set(inspect.signature(module.forward).parameters)
    if taken != set(INPUTS):
        raise SourceError(f"{uri}: {type(module).__name__} does not take {', '.join(sorted(set(INPUTS) - taken))}")
    pixels = image.example(processor.images)
    tokens = tokenize(processor.tokenizer, ["a", "a picture of a boat", "a picture of a hill"])
    example = {"pixel_values": pixels, **{name: torch.from_numpy(value) for name, value in tokens.items()}}
    example = {name: example[name] for name in INPUTS}
    image.check_runs(module, example, uri)
    axes = {name: ("batch", *pixels.shape[1:]) if name == "pixel_values" else ("texts", "sequence") for name in INPUTS}
    config: Any = module.config
    positions = getattr(getattr(config, "text_config", None), "max_position_embeddings", None)
    return {"axes": axes, "example": example, "positions": positions}


def _return_tensors_alone(module: torch.nn.Module) -> None:
    """Leave out of a model's outputs what its two halves return: it would be outputs of every artifact.

    The class is replaced, not the method: a copy of the module would go on to call the original's.
    """
    import torch

    original: Any = type(module)

    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        outputs = original.forward(self, *args, **kwargs)
        return {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}

    module.__class__ = type(original.__name__, (original,), {"forward": forward, "__module__": original.__module__})


def tokenize(tokenizer: Any, texts: Sequence[str], length: int | None = None) -> dict[str, np.ndarray[Any, Any]]:
    """Texts as int64 `[texts, sequence]`, padded to the longest, or to `length`."""
    import numpy as np

    encoded = tokenizer(
        list(texts),
        padding="max_length" if length else True,
        truncation=True,
        max_length=length,
        return_tensors="np",
        return_attention_mask=True,
    )
    return {name: np.ascontiguousarray(encoded[name], dtype=np.int64) for name in ("input_ids", "attention_mask")}


def probes(model: Model) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, np.ndarray[Any, Any]]]:
    import numpy as np

    two = model.example["pixel_values"].numpy()
    four = tokenize(model.tokenizer, ["a"] * 4, 8)
    five = tokenize(model.tokenizer, ["a"] * 5, 9)
    return {"pixel_values": two, **four}, {"pixel_values": np.concatenate([two, two[:1]]), **five}


def samples(
    model: Model, lines: Sequence[tuple[str, ...]], batches: Sequence[int], sequences: Sequence[int] | None
) -> Samples:
    """Every batch of images beside their texts, padded to the longest and to the most that the model has positions for; one
    image and one text; and every image beside the texts of its batch."""
    import numpy as np

    from compiler.modalities import Samples

    most = model.positions
    for length in sequences or ():
        if most is not None and length > most:
            raise ConfigError(f"shapes.sequence: {length} is longer than the model's {most} positions; at most {most}")
    lines = lines[: image.MAX_IMAGES]
    every = image.read_pixels(model, [path for path, *_ in lines])

    def case(name: str, rows: Sequence[int], length: int | None = None, only: int | None = None) -> Case:
        texts = list(dict.fromkeys(text for row in rows for text in lines[row][1:]))[:only]
        tokens = tokenize(model.tokenizer, texts, length)
        inputs = {"pixel_values": every[np.array(rows)], **tokens}
        return Case(name, {name: inputs[name] for name in model.inputs})

    found = [case(NONE, [0], only=1)]
    start = 0
    for batch in dict.fromkeys((*batches, 3)):
        rows = [(start + row) % len(lines) for row in range(batch)]
        lengths = (None, *(sequences or ([most] if most else [])))
        found += [case(RIGHT, rows, length) for length in lengths]
        start += batch
    found += [case(image.IMAGES, range(start, min(start + BATCH, len(lines)))) for start in range(0, len(lines), BATCH)]
    return Samples(found)
