"""Sound: WAV files of every kind of sample, another rate, padding, and files that are no sound."""

from __future__ import annotations

import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from compiler.errors import ConfigError
from compiler.modalities import audio
from compiler.types import Model
from tests.modalities.test_modalities import one_line


def write(path: Path, values: np.ndarray, rate: int = 16000, width: int = 2) -> Path:
    """Write samples from -1 to 1, `[samples]` or `[samples, channels]`."""
    whole = np.round(np.asarray(values, dtype=np.float64) * (2 ** (8 * width - 1) - 1)).astype(np.int64)
    if width == 1:
        whole += 128
    content = b"".join(int(value).to_bytes(width, "little", signed=width > 1) for value in whole.reshape(-1))
    with wave.open(str(path), "wb") as stream:
        stream.setparams((1 if values.ndim == 1 else values.shape[1], width, rate, 0, "NONE", ""))
        stream.writeframes(content)
    return path


def tone(frequency: float, rate: int, seconds: float = 0.2) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(int(rate * seconds)) / rate)


@pytest.mark.parametrize(("width", "error"), [(1, 1e-2), (2, 1e-4), (3, 1e-6), (4, 1e-6)])
def test_samples_of_any_width(tmp_path: Path, width: int, error: float) -> None:
    values = np.array([0.0, 0.5, -0.5, 0.25, -1.0])
    read, rate = audio.read(str(write(tmp_path / "a.wav", values, 8000, width)))
    assert rate == 8000
    assert read.dtype == np.float32
    np.testing.assert_allclose(read, values, atol=error)


def test_channels_are_mixed(tmp_path: Path) -> None:
    values = np.array([[0.5, -0.5], [0.5, 0.0], [-0.25, -0.75]])
    read, _ = audio.read(str(write(tmp_path / "a.wav", values)))
    np.testing.assert_allclose(read, [0, 0.25, -0.5], atol=1e-4)


@pytest.mark.parametrize(("rate", "wanted"), [(44100, 16000), (8000, 16000), (48000, 16000), (22050, 16000), (16000, 8000)])
def test_a_tone_stays_what_it_is_at_another_rate(rate: int, wanted: int) -> None:
    made = audio.resample(tone(440, rate).astype(np.float32), rate, wanted)
    expected = tone(440, wanted)
    assert abs(len(made) - len(expected)) <= 1
    inner = slice(200, min(len(made), len(expected)) - 200)  # at its ends the tone begins and stops
    assert np.abs(made[inner] - expected[inner]).max() < 2e-3


def test_what_the_lower_rate_cannot_hold_is_gone() -> None:
    made = audio.resample(tone(11_000, 44100).astype(np.float32), 44100, 16000)
    assert np.abs(made[200:-200]).max() < 5e-3


def test_the_same_rate_is_not_touched() -> None:
    sound = tone(440, 16000).astype(np.float32)
    assert audio.resample(sound, 16000, 16000) is sound


def test_another_rate_is_said_once(loaded: Callable[..., Model], tmp_path: Path) -> None:
    lines = [(str(write(tmp_path / f"{rate}-{n}.wav", tone(300, rate, 0.3), rate)),) for rate in (8000, 44100) for n in (1, 2)]
    made = audio.samples(loaded("wav2vec2"), lines, (1,), None)
    assert made.note == "sounds at 8000, 44100 Hz resampled to the model's 16000"
    assert made.cases[-1].shape == (4, 4800)
    same = audio.samples(loaded("wav2vec2"), [(str(write(tmp_path / "a.wav", tone(300, 16000))),)], (1,), None)
    assert same.note == ""


def test_padding_counts_for_nothing_where_there_is_a_mask(loaded: Callable[..., Model], tmp_path: Path) -> None:
    lines = [(str(write(tmp_path / f"{seconds}.wav", tone(300, 16000, seconds))),) for seconds in (0.4, 0.2)]
    case = audio.samples(loaded("wav2vec2-lv60"), lines, (1,), None).cases[-1]
    assert case.inputs["attention_mask"].sum(axis=1).tolist() == [6400, 3200]
    assert case.real["frames"].sum(axis=1).tolist() == [158, 78]  # ((samples - 10) // 5 - 3) // 4 … by the convolutions
    assert case.real["frames"][1, :78].all()
    bare = audio.samples(loaded("wav2vec2"), lines, (1,), None).cases[-1]
    assert list(bare.inputs) == ["input_values"]
    assert not bare.real


def test_a_long_sound_is_cut(loaded: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audio, "MAX_SECONDS", 0.25)
    path = write(tmp_path / "long.wav", tone(300, 16000, 0.6))
    assert audio.samples(loaded("wav2vec2"), [(str(path),)], (1,), None).cases[-1].shape == (1, 4000)


@pytest.mark.parametrize("content", [b"", b"text", b"RIFF", b"RIFF\x10\0\0\0WAVEfmt ", b"ID3\x03\0\0\0", b"fLaC\0\0\0"])
def test_a_sound_that_is_not_one(loaded: Callable[..., Model], tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "not.wav"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        audio.samples(loaded("wav2vec2"), [(str(path),)], (1,), None)
    one_line(caught.value, str(path), "sound", "WAV")


def test_a_sound_of_nothing(loaded: Callable[..., Model], tmp_path: Path) -> None:
    path = write(tmp_path / "empty.wav", np.zeros(0))
    with pytest.raises(ConfigError) as caught:
        audio.samples(loaded("wav2vec2"), [(str(path),)], (1,), None)
    one_line(caught.value, "holds no sound")
