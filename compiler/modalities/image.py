"""Images: float32 `[batch, channels, height, width]`, made by the checkpoint's own image processor on PIL and numpy."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compiler.errors import ConfigError, SourceError
from compiler.numerics import Case
from compiler.samples import BATCH
from compiler.sources import check_processor

if TYPE_CHECKING:
    import numpy as np
    import PIL.Image
    import torch

    from compiler.modalities import Samples
    from compiler.types import Model, Snapshot

LIBRARIES = ("pillow",)
MAIN_INPUTS = ("pixel_values",)
# What is left of an image's height and width in a feature map.
DERIVED = {2: "feature_height", 3: "feature_width"}
# Images of a data file that are all run, in batches of `BATCH`.
MAX_IMAGES = 64
IMAGES, SIZE = "images", "other size"


def check(snapshot: Snapshot, task: str) -> None:
    check_processor(snapshot, "image")
    if importlib.util.find_spec("PIL") is None:
        raise ConfigError("a model of images needs pillow: pip install 'aot-model-compiler[image]'")


def processor(folder: Path, options: Mapping[str, Any]) -> Any:
    from transformers import AutoImageProcessor

    # torchvision resizes otherwise than PIL, and is not everywhere: what is installed must not change the samples.
    return AutoImageProcessor.from_pretrained(folder, backend="pil", **options)


def prepare(module: torch.nn.Module, processor: Any, task: str, uri: str) -> dict[str, Any]:
    pixels = example(processor)
    axes = ("batch", *pixels.shape[1:])
    check_runs(module, {"pixel_values": pixels}, uri)
    if takes_any_size(module, pixels):
        axes = ("batch", axes[1], "height", "width")
    return {"axes": {"pixel_values": axes}, "example": {"pixel_values": pixels}, "positions": None}


def example(processor: Any) -> torch.Tensor:
    """Two images of noise, as the processor makes them of ones that are larger."""
    import numpy as np
    import torch
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (2, 300, 260, 3), dtype=np.uint8)
    return torch.from_numpy(pixels(processor, [Image.fromarray(one) for one in noise]))


def pixels(processor: Any, images: Sequence[PIL.Image.Image]) -> np.ndarray[Any, Any]:
    """Images as the model takes them, float32 `[images, channels, height, width]`."""
    import numpy as np

    made = processor(list(images), return_tensors="np")["pixel_values"]
    return np.ascontiguousarray(made, dtype=np.float32)


def check_runs(module: torch.nn.Module, inputs: Mapping[str, torch.Tensor], uri: str) -> None:
    """Make sure that a model takes what its processor makes. Raises SourceError."""
    import torch

    try:
        with torch.inference_mode():
            module(**inputs)
    except Exception as error:  # a model's code may raise anything
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
        raise SourceError(
            f"{uri}: {type(module).__name__} does not take what its processor makes, {shapes} "
            f"({' '.join(str(error).split())[:160]}); give it the preprocessor_config.json that it was trained with"
        ) from error


def takes_any_size(module: torch.nn.Module, pixels: torch.Tensor) -> bool:
    """Whether a model is indifferent to the size of an image: one of convolutions alone. Attention has positions or
    windows."""
    import torch

    config: Any = module.config
    if any(hasattr(config, name) for name in ("num_attention_heads", "num_heads", "window_size")):
        return False
    try:
        with torch.inference_mode():
            module(pixel_values=torch.from_numpy(_larger(pixels.numpy())))
    except Exception:  # a model's code may raise anything
        return False
    return True


def _larger(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Images that are taller by half and a little wider, by their mirror image."""
    import numpy as np

    return np.pad(pixels, ((0, 0), (0, 0), (0, pixels.shape[2] // 2 + 1), (0, 5)), mode="reflect")


def probes(model: Model) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, np.ndarray[Any, Any]]]:
    import numpy as np

    two = model.example["pixel_values"].numpy()
    three = np.concatenate([two, two[:1]])
    return {"pixel_values": two}, {"pixel_values": _larger(three) if "height" in model.axes["pixel_values"] else three}


def read(path: str) -> PIL.Image.Image:
    """An image, turned as its camera says, in RGB.

    Raises:
        ConfigError: the file is none that PIL reads.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # decoders raise what they like
        raise ConfigError(
            f"{path}: not an image that can be read ({' '.join(str(error).split())[:120]}); give a JPEG, PNG or WebP file"
        ) from error


def read_pixels(model: Model, paths: Sequence[str]) -> np.ndarray[Any, Any]:
    """Files as `pixels` gives them, one after the other: photographs are large.

    Raises:
        ConfigError: a file is no image.
        SourceError: the processor makes images of different sizes of them, which do not fit in one batch.
    """
    import numpy as np

    images = getattr(model.processor, "images", model.processor)
    made = [pixels(images, [read(path)]) for path in paths]
    if len({one.shape for one in made}) > 1:
        raise SourceError("preprocessor_config.json: it makes images of different sizes, which no batch holds; set its size")
    return np.concatenate(made)


def samples(
    model: Model, lines: Sequence[tuple[str, ...]], batches: Sequence[int], sequences: Sequence[int] | None
) -> Samples:
    """Every batch size; a batch of another size and form, where the model takes any; and every image, in batches."""
    import numpy as np

    from compiler.modalities import Samples

    if sequences is not None:
        raise ConfigError("shapes.sequence: is for text, in tokens; a model of images has none: leave it out")
    every = read_pixels(model, [path for path, *_ in lines[:MAX_IMAGES]])
    start = 0
    found = []
    for batch in dict.fromkeys((*batches, 3)):
        chosen = every[(start + np.arange(batch)) % len(every)]
        found.append(Case(IMAGES, {"pixel_values": chosen}))
        start += batch
    if "height" in model.axes["pixel_values"]:
        found.append(Case(SIZE, {"pixel_values": _larger(every[:2])}))
    found += [Case(IMAGES, {"pixel_values": every[start : start + BATCH]}) for start in range(0, len(every), BATCH)]
    return Samples(found)
