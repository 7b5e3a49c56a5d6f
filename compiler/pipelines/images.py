"""What the tasks of images share: items, pixels, batches of one size."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from compiler.errors import ConfigError, InputError
from compiler.modalities import image
from compiler.pipelines import processor, text
from compiler.pipelines.base import Pipeline, listed
from compiler.pipelines.base import rows as rows
from compiler.runtime import CompiledModel

if TYPE_CHECKING:
    import numpy as np
    import PIL.Image

    Pixels = np.ndarray[Any, Any]

# 64 photographs of 224 × 224 are 39 MB of pixels.
WINDOW = 64
# Pixels that count as a token of a batch's budget: a patch of most vision transformers.
PATCH = 16 * 16

single = text.single


def prepare(model: CompiledModel, options: Mapping[str, Any]) -> Any:
    return processor.read(model, "image")


def items(args: tuple[Any, ...], named: dict[str, Any]) -> tuple[list[Any], bool]:
    """Images: paths, PIL's images, or uint8 arrays `[height, width, 3]`: one, or a list."""
    return listed(args, named, "images")


def features(pipe: Pipeline, items: Sequence[Any], options: Mapping[str, Any]) -> list[list[Pixels]]:
    return [[pixels(pipe.prepared, item)] for item in items]


def pixels(made_by: Any, item: Any) -> Pixels:
    """An image as the model takes it, float32 `[channels, height, width]`."""
    made: Pixels = image.pixels(made_by, [opened(item)])[0]
    return made


def opened(item: Any) -> PIL.Image.Image:
    """An image in RGB. Raises InputError when it is none."""
    import numpy as np
    from PIL import Image, ImageOps

    if isinstance(item, (str, os.PathLike)):
        try:
            return image.read(str(item))
        except ConfigError as error:
            raise InputError(str(error)) from error
    if isinstance(item, Image.Image):
        return ImageOps.exif_transpose(item).convert("RGB")
    if isinstance(item, np.ndarray) and item.dtype == np.uint8 and item.ndim == 3 and item.shape[2] == 3 and item.size:
        return Image.fromarray(item)
    raise InputError(f"an input is {described(item)}; give an image's path, a PIL image or a uint8 array [height, width, 3]")


def described(item: Any) -> str:
    shape = f" {item.dtype} {list(item.shape)}" if hasattr(item, "shape") and hasattr(item, "dtype") else ""
    return f"{type(item).__name__}{shape}"


def size(feature: Pixels) -> int:
    return -(-int(feature.shape[-2] * feature.shape[-1]) // PATCH)


def group(pipe: Pipeline, feature: Pixels) -> Hashable:
    """Images of other sizes, where a model takes any, do not fit in one array."""
    return tuple(feature.shape)


def collate(pipe: Pipeline, features: Sequence[Pixels]) -> dict[str, np.ndarray[Any, Any]]:
    import numpy as np

    return {"pixel_values": np.stack(features)}
