"""A build of a model of sound, as a user runs it: from `init` to a release that verifies, from data at another rate."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.conftest import Command, error_line, write_pipeline
from tests.modalities.test_audio import tone, write


def test_sound_at_another_rate(command: Command, saved: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(saved("wav2vec2-lv60"), tmp_path / "checkpoint")
    (tmp_path / "data").mkdir()
    for name, seconds in (("a", 0.5), ("b", 0.3)):
        write(tmp_path / "data" / f"{name}.wav", tone(330, 44100, seconds), 44100)
    (tmp_path / "data" / "lines.jsonl").write_text('{"audio": "a.wav"}\n{"audio": "b.wav"}\n')
    data = {"validation": {"path": "data/lines.jsonl"}}
    write_pipeline(tmp_path, tmp_path / "checkpoint", shapes={"batch": [1, 2]}, data=data)
    built = command("pipeline.yaml")
    assert built.returncode == 0, built.stderr
    assert built.stderr.count("resampled") == 1
    assert "sounds at 44100 Hz resampled to the model's 16000" in built.stderr
    release = tmp_path / "artifacts/tiny/1.0.0"
    manifest = json.loads((release / "manifest.json").read_text())
    assert manifest["task"] == "automatic-speech-recognition"
    assert {"preprocessor_config.json", "vocab.json", "tokenizer_config.json"} <= {file["path"] for file in manifest["files"]}
    declined = manifest["artifacts"][0]["declined"]
    assert declined["padding_free"].endswith("input_values [batch, samples], attention_mask [batch, samples]")
    described = json.loads((release / "validation.json").read_text())["data"]
    assert set(described["files"]) == {"a.wav", "b.wav"}
    assert json.loads((tmp_path / "pipeline.lock").read_text())["models"]["tiny 1.0.0"]["data"].keys() >= {"a.wav", "b.wav"}
    verified = command("verify", release, "--numerics", "--source", "path:checkpoint", cache=tmp_path / "other")
    assert verified.returncode == 0, verified.stderr
    rebuilt = command("verify", release, "--rebuild", "--source", "path:checkpoint")
    assert rebuilt.returncode == 0, rebuilt.stderr
    timed = command("bench", release, "--rounds", 1)
    assert timed.returncode == 0, timed.stderr
    assert "1x8000" in timed.stdout
    assert "text" not in timed.stdout.replace("texts", "")
    assert "--shape" in error_line(command("bench", release, "--rounds", 1, "--shape", "1x16"))


def test_a_sound_that_is_not_one(command: Command, saved: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(np.zeros(100).tobytes())
    (tmp_path / "lines.jsonl").write_text('{"audio": "a.wav"}\n')
    write_pipeline(tmp_path, saved("wav2vec2"), shapes=None, data={"validation": {"path": "lines.jsonl"}})
    message = error_line(command("pipeline.yaml"))
    assert "a.wav: not a sound" in message
    assert "WAV" in message
