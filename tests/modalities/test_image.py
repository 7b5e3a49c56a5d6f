"""Images: what the processor makes of a file, held against the formula of its config, and files that are no images."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from compiler.errors import ConfigError, SourceError
from compiler.modalities import image
from compiler.stages.load import load
from compiler.types import Model
from tests.modalities.conftest import found
from tests.modalities.test_modalities import one_line


def test_a_grey_image(loaded: Callable[..., Model], tmp_path: Path) -> None:
    Image.new("L", (50, 40), 100).save(tmp_path / "grey.png")
    pixels = image.read_pixels(loaded("vit"), [str(tmp_path / "grey.png")])
    assert pixels.shape == (1, 3, 32, 32)
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels, (100 / 255 - 0.5) / 0.25, rtol=1e-5)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "1", "CMYK", "I;16"])
def test_any_kind_of_image(loaded: Callable[..., Model], tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new(mode, (50, 40)).save(path)
    assert image.read_pixels(loaded("vit"), [str(path)]).shape == (1, 3, 32, 32)


def test_an_image_is_turned_as_its_camera_says(tmp_path: Path) -> None:
    turned = Image.new("RGB", (40, 20), "white")
    turned.paste("black", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter to the right
    turned.save(tmp_path / "turned.png", exif=exif)
    read = image.read(str(tmp_path / "turned.png"))
    assert read.size == (20, 40)
    assert read.getpixel((10, 5)) == (0, 0, 0)
    assert read.getpixel((10, 35)) == (255, 255, 255)


@pytest.mark.parametrize("content", [b"", b"text", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"<svg/>"])
def test_an_image_that_is_not_one(loaded: Callable[..., Model], tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "not.png"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        image.samples(loaded("vit"), [(str(path),)], (1,), None)
    one_line(caught.value, str(path), "not an image", "PNG")


def test_an_image_that_is_cut_short(loaded: Callable[..., Model], tmp_path: Path) -> None:
    path = tmp_path / "cut.jpg"
    Image.effect_noise((90, 90), 50).save(path)
    path.write_bytes(path.read_bytes()[:-900])
    with pytest.raises(ConfigError) as caught:
        image.samples(loaded("vit"), [(str(path),)], (1,), None)
    one_line(caught.value, "cut.jpg", "not an image")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"size": {"height": 40, "width": 40}}, "40"),
        ({"size": {"shortest_edge": 32}, "image_processor_type": "CLIPImageProcessor", "do_center_crop": False}, "size"),
    ],
)
def test_a_processor_of_another_model(
    saved: Callable[..., Path], tmp_path: Path, change: dict[str, object], word: str
) -> None:
    folder = Path(shutil.copytree(saved("vit"), tmp_path / "copy"))
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(SourceError) as caught:
        load(found(folder), "image-classification")
    one_line(caught.value, "preprocessor_config.json", word)
