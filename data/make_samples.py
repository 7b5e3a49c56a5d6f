"""Make the images and sounds that the compiler ships as samples: `python data/make_samples.py`, from the checkout.

The images are scenes drawn with PIL: gradients, shapes at several depths, blur and noise, so that their edges, textures
and colours are those of small photographs. The sounds are synthesized with numpy at 16 kHz: vowels (a glottal pulse train
through formant resonators, G. Fant), a plucked string (K. Karplus and A. Strong, 1983), a bird, and rain.
Nobody's photograph or voice is in them.
"""

from __future__ import annotations

import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

OUT = Path(__file__).parent.parent / "compiler" / "data"
RATE = 16_000
Array = np.ndarray[Any, np.dtype[Any]]
Colour = tuple[int, int, int]


def gradient(size: tuple[int, int], top: Colour, bottom: Colour) -> Image.Image:
    """A sky or a wall: one colour into another, from above."""
    width, height = size
    share = np.linspace(0, 1, height)[:, None, None]
    rows = np.array(top) * (1 - share) + np.array(bottom) * share
    return Image.fromarray(np.broadcast_to(rows, (height, width, 3)).astype(np.uint8))


def finish(image: Image.Image, seed: int, blur: float = 0.7, noise: float = 7.0) -> Image.Image:
    """A lens's blur, a darker border, and a sensor's noise."""
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(blur))).astype(np.float64)
    height, width = pixels.shape[:2]
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]  # type: ignore[misc]
    pixels *= (1 - 0.22 * (x**2 + y**2) / 2)[..., None]
    pixels += np.random.default_rng(seed).normal(0, noise, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def boat() -> Image.Image:
    image = gradient((208, 156), (96, 150, 214), (214, 226, 236))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 92, 208, 156), fill=(38, 84, 124))
    random = np.random.default_rng(1)
    for _ in range(160):
        x, y = random.integers(0, 208), random.integers(94, 156)
        draw.line((x, y, x + random.integers(4, 16), y), fill=(70, 122, 158))
    draw.polygon([(58, 98), (150, 98), (136, 116), (72, 116)], fill=(150, 48, 36))
    draw.line((104, 24, 104, 98), fill=(70, 50, 34), width=3)
    draw.polygon([(107, 28), (107, 92), (146, 92)], fill=(240, 236, 222))
    draw.polygon([(101, 34), (101, 92), (74, 92)], fill=(226, 220, 204))
    return finish(image, 1)


def hill() -> Image.Image:
    image = gradient((176, 200), (238, 150, 84), (250, 222, 150))
    draw = ImageDraw.Draw(image)
    draw.ellipse((104, 40, 140, 76), fill=(255, 244, 196))
    for depth, (base, colour) in enumerate([(112, (132, 110, 128)), (136, (92, 84, 92)), (160, (46, 58, 44))]):
        x = np.arange(0, 177, 4)
        y = base + 14 * np.sin(x / (21.0 - 4 * depth) + depth) + 6 * np.sin(x / 7.0)
        draw.polygon([(0, 200), *zip(x.tolist(), y.tolist(), strict=True), (176, 200)], fill=colour)
    return finish(image, 2)


def house() -> Image.Image:
    image = gradient((200, 160), (150, 182, 214), (208, 214, 210))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 122, 200, 160), fill=(104, 138, 74))
    draw.rectangle((54, 66, 148, 128), fill=(196, 172, 140))
    draw.polygon([(44, 68), (101, 28), (158, 68)], fill=(124, 52, 42))
    draw.rectangle((92, 92, 112, 128), fill=(84, 56, 36))
    for x in (64, 124):
        draw.rectangle((x, 80, x + 16, 98), fill=(60, 78, 98), outline=(236, 232, 220), width=2)
    draw.rectangle((128, 32, 138, 58), fill=(110, 70, 60))
    return finish(image, 3)


def apple() -> Image.Image:
    image = gradient((160, 160), (92, 82, 74), (60, 46, 38))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 112, 160, 160), fill=(136, 96, 58))
    draw.ellipse((40, 116, 132, 136), fill=(90, 60, 36))
    image = image.filter(ImageFilter.GaussianBlur(3))
    draw = ImageDraw.Draw(image)
    for step in range(26):
        draw.ellipse(
            (42 + step, 42 + step, 122 - step * 1.4, 126 - step * 1.4), fill=(140 + 4 * step, 18 + 3 * step, 22 + 2 * step)
        )
    draw.line((82, 46, 90, 26), fill=(64, 44, 26), width=4)
    draw.ellipse((90, 24, 116, 38), fill=(76, 128, 52))
    return finish(image, 4)


def forest() -> Image.Image:
    image = gradient((190, 170), (176, 196, 190), (90, 110, 90))
    draw = ImageDraw.Draw(image)
    random = np.random.default_rng(5)
    for tree in range(34):
        depth = tree / 34
        x, height = int(random.integers(0, 190)), int(50 + 70 * depth)
        base = int(96 + 68 * depth)
        shade = int(96 - 62 * depth)
        draw.rectangle((x - 2, base - 12, x + 2, base), fill=(70, 54, 40))
        for part in range(3):
            width = (9 + 12 * depth) * (1 + part * 0.45)
            top = base - height + part * height / 4
            draw.polygon(
                [(x, top), (x - width, top + height / 2.4), (x + width, top + height / 2.4)],
                fill=(shade // 2, shade, shade // 2),
            )
    return finish(image, 5)


def street() -> Image.Image:
    image = gradient((210, 150), (16, 20, 44), (52, 44, 60))
    draw = ImageDraw.Draw(image)
    random = np.random.default_rng(6)
    for x in range(0, 210, 30):
        top = int(random.integers(20, 70))
        draw.rectangle((x, top, x + 27, 112), fill=(34, 34, 46))
        for wx in range(x + 4, x + 24, 7):
            for wy in range(top + 5, 106, 10):
                if random.random() < 0.45:
                    draw.rectangle((wx, wy, wx + 3, wy + 5), fill=(246, 212, 128))
    draw.polygon([(0, 150), (210, 150), (140, 112), (70, 112)], fill=(42, 42, 48))
    for y in range(116, 150, 9):
        draw.line((105, y, 105, y + 4), fill=(200, 196, 180), width=2)
    return finish(image, 6, noise=10)


def vowels() -> Array:
    """The vowels a, i and u, one after the other, in a voice that falls from 130 to 105 Hz."""
    formants = [(730, 1090, 2440), (270, 2290, 3010), (300, 870, 2240)]  # Peterson and Barney, 1952
    length = int(1.05 * RATE)
    pitch = np.linspace(130, 105, length)
    phase = np.cumsum(pitch) / RATE
    source = np.diff(np.floor(phase), prepend=0.0) + np.random.default_rng(7).normal(0, 0.004, length)
    parts = np.array_split(source, 3)
    out = np.concatenate([resonate(part, peaks) for part, peaks in zip(parts, formants, strict=True)])
    envelope = np.concatenate([np.hanning(len(part)) ** 0.3 for part in parts])
    return out * envelope


def resonate(source: Array, formants: tuple[int, ...]) -> Array:
    """A source through resonators in a row, each of two poles and 90 Hz wide (D. Klatt, 1980)."""
    for frequency in formants:
        radius = np.exp(-np.pi * 90 / RATE)
        b, c = 2 * radius * np.cos(2 * np.pi * frequency / RATE), -(radius**2)
        result = np.zeros(len(source) + 2)
        for n, value in enumerate(source):
            result[n + 2] = (1 - b - c) * value + b * result[n + 1] + c * result[n]
        source = result[2:]
    return source


def strings() -> Array:
    """Four plucked notes, each over the last."""
    out = np.zeros(int(0.8 * RATE))
    for number, frequency in enumerate((220.0, 277.2, 329.6, 440.0)):
        start = number * 2800
        ring = np.random.default_rng(number).uniform(-1, 1, round(RATE / frequency))
        for n in range(start, len(out)):
            place = n % len(ring)
            out[n] += ring[place]
            ring[place] = 0.498 * (ring[place] + ring[(place + 1) % len(ring)])
    return out


def bird() -> Array:
    """Five chirps, each falling and rising."""
    time = np.arange(int(0.62 * RATE)) / RATE
    beat = time % 0.13 / 0.13
    frequency = 3200 + 1500 * np.cos(2 * np.pi * beat) + 240 * np.sin(2 * np.pi * 31 * time)
    tone = np.sin(2 * np.pi * np.cumsum(frequency) / RATE) * np.sin(np.pi * beat) ** 2
    return tone + np.random.default_rng(8).normal(0, 0.01, len(time))


def rain() -> Array:
    """Drops on noise."""
    random = np.random.default_rng(9)
    length = int(0.5 * RATE)
    out = np.convolve(random.normal(0, 0.12, length), np.ones(3) / 3, "same")
    for _ in range(40):
        start = int(random.integers(0, length - 200))
        time = np.arange(200) / RATE
        out[start : start + 200] += (
            random.uniform(0.3, 1) * np.exp(-time * 500) * np.sin(2 * np.pi * random.uniform(900, 3000) * time)
        )
    return out


def main() -> None:
    scenes: tuple[Callable[[], Image.Image], ...] = (boat, hill, house, apple, forest, street)
    for scene in scenes:
        scene().save(OUT / "images" / f"{scene.__name__}.jpg", quality=82)
    for sound in (vowels, strings, bird, rain):
        values = sound()
        content = (values / np.abs(values).max() * 0.7 * 32767).astype("<i2").tobytes()
        with wave.open(str(OUT / "sounds" / f"{sound.__name__}.wav"), "wb") as stream:
            stream.setparams((1, 2, RATE, 0, "NONE", ""))
            stream.writeframes(content)


if __name__ == "__main__":
    main()
