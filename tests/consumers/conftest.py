"""Releases as users build them, what eager fp32 answers, and the table of how close each consumer came."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from compiler.backends import BACKENDS
from compiler.hashing import hash_folder
from compiler.manifest import MANIFEST
from tests.consumers.classifier import save_classifier

ROOT = Path(__file__).parent.parent.parent
Array = np.ndarray[Any, np.dtype[Any]]
DEMO: dict[str, Any] = yaml.safe_load((ROOT / "pipeline.yaml").read_text(encoding="utf-8"))["models"][0]
with (ROOT / "data/validation.jsonl").open(encoding="utf-8") as file:
    TEXTS = [json.loads(line)["text"] for line in file]
# One text alone, texts of every length in one padded batch, and two that only differ in accents and case.
BATCHES = [[TEXTS[3]], TEXTS[:10], ["Café Zoë opens at 7:30 — “really”?", 'cafe zoe opens at 7:30 - "REALLY"?']]
# As many as it takes for a share of them to be near that of the gate's texts.
PAIRS = [[[TEXTS[0], TEXTS[4]]], [list(pair) for pair in zip(TEXTS[:50], TEXTS[50:100], strict=True)]]
#: What the table is made of: figures of a consumer, by its name, then by artifact, then by task.
FIGURES: dict[str, dict[str, dict[str, dict[str, float]]]] = {}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The original of each task."""
    package, _, inside = DEMO["source"].removeprefix("package:").partition("/")
    embedder = Path(str(importlib.resources.files(package))) / inside
    return {
        "feature-extraction": embedder,
        "text-classification": save_classifier(tmp_path_factory.mktemp("classifier"), embedder),
    }


@pytest.fixture(scope="session")
def releases(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """The release of each task, with every precision of every format, built by `compile`; untouched by whoever opened it."""
    from tests.conftest import run_command

    folder = tmp_path_factory.mktemp("releases")
    targets = {name: list(backend.PRECISIONS) for name, backend in BACKENDS.items()}
    data = {name: {**entry, "path": str(ROOT / entry["path"])} for name, entry in DEMO["data"].items()}
    embedder = {**DEMO, "targets": targets, "data": data}
    del embedder["optimize"]
    classifier = {
        "name": "classifier",
        "release": "1.0.0",
        "source": f"path:{checkpoints['text-classification']}",
        "targets": targets,
        "data": data,
        # Some logits of random weights nearly tie.
        "budget": {"bf16": {"cosine": 0.99, "argmax": 0.9}, "int8": {"argmax": 0.8}},
    }
    document = {"schema": 1, "output": "artifacts", "models": [embedder, classifier]}
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    built = run_command(folder, ROOT / ".venv/consumers/cache", "build", "pipeline.yaml", timeout=1800)
    assert built.returncode == 0, built.stderr
    found = {
        json.loads((path / MANIFEST).read_text(encoding="utf-8"))["task"]: path
        for path in (folder / "artifacts").glob("*/1.0.0")
    }
    before = {task: hash_folder(path) for task, path in found.items()}
    yield found
    assert {task: hash_folder(path) for task, path in found.items()} == before


@pytest.fixture(scope="session")
def reference(checkpoints: dict[str, Path]) -> dict[str, dict[str, list[Array]]]:
    """What the original answers in eager fp32, by task and output: for each batch its real rows, `[rows, width]`."""
    import torch
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

    answers: dict[str, dict[str, list[Array]]] = {
        "feature-extraction": {"last_hidden_state": [], "sentence_embedding": []},
        "text-classification": {"logits": [], "scores": [], "logits of pairs": []},
    }
    with torch.inference_mode():
        path = checkpoints["feature-extraction"]
        tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()
        for texts in BATCHES:
            inputs = tokenizer(texts, padding=True, return_tensors="pt")
            hidden, mask = model(**inputs).last_hidden_state, inputs["attention_mask"]
            mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            answers["feature-extraction"]["last_hidden_state"].append(hidden[mask > 0].numpy())
            answers["feature-extraction"]["sentence_embedding"].append(torch.nn.functional.normalize(mean).numpy())
        path = checkpoints["text-classification"]
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForSequenceClassification.from_pretrained(path).eval()
        found = answers["text-classification"]
        for texts in BATCHES:
            logits = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
            found["logits"].append(logits.numpy())
            found["scores"].append(logits.softmax(-1).numpy())
        for pairs in PAIRS:
            inputs = tokenizer([a for a, _ in pairs], [b for _, b in pairs], padding=True, return_tensors="pt")
            found["logits of pairs"].append(model(**inputs).logits.numpy())
    return answers


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table of the README: the largest error of fp32 and the smallest cosine of other precisions, for each task."""
    artifacts = [f"{name} {precision}" for name, backend in BACKENDS.items() for precision in backend.PRECISIONS]
    if not FIGURES:
        return
    lines = [f"| consumer | task | {' | '.join(artifacts)} |", "|---" * (len(artifacts) + 2) + "|"]
    for consumer, row in FIGURES.items():
        for task in dict.fromkeys(task for found in row.values() for task in found):
            cells = [_cell(artifact, row.get(artifact, {}).get(task)) for artifact in artifacts]
            lines.append(f"| {consumer} | {task} | {' | '.join(cells)} |")
    terminalreporter.write_sep("-", "largest error of fp32, smallest cosine of others")
    terminalreporter.write("\n".join(lines) + "\n")


def _cell(artifact: str, figures: Mapping[str, float] | None) -> str:
    if figures is None:
        return "–"
    return f"{figures['max_abs']:.1e}" if artifact.endswith(" fp32") else f"{figures['cosine']:.5f}"
