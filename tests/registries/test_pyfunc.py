"""The pyfunc flavour: what MLflow loads answers as the release's own runner does, and is no part of what pull returns."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compiler.backends import BACKENDS
from compiler.hashing import hash_folder
from compiler.registries import connect, pyfunc_loader
from compiler.stages import publish
from compiler.verify import read_release
from tests.conftest import run_command, write_pipeline
from tests.zoo import save_checkpoint

TEXTS = ["The weather is fine.", "A much longer line, so that the first of them is padded in its batch.", "no"]


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> Path:
    """A small classifier, compiled for every format."""
    folder = tmp_path_factory.mktemp("classifier")
    source = save_checkpoint(folder / "checkpoint", "bert", "text-classification")
    targets = {"onnx": ["fp32"], "openvino": ["fp32"], "torchscript": ["fp32"]}
    built = run_command(folder, shared_cache, "build", write_pipeline(folder, source, targets=targets))
    assert built.returncode == 0, built.stderr
    return folder / "artifacts" / "tiny" / "1.0.0"


def expected(release: Path, format: str) -> list[dict[str, Any]]:
    """Labels and scores by the release's runner, of one text at a time, without padding."""
    from transformers import AutoTokenizer

    manifest, _ = read_release(release)
    artifact = next(artifact for artifact in manifest.artifacts if artifact.format == format)
    run = BACKENDS[format].open(release, artifact, None)
    tokenizer = AutoTokenizer.from_pretrained(release)
    labels = json.loads((release / "config.json").read_bytes())["id2label"]
    answers = []
    for text in TEXTS:
        coded = tokenizer(text, return_tensors="np")
        logits = run({tensor.name: coded[tensor.name].astype(np.int64) for tensor in manifest.signature.inputs})["logits"][0]
        scores = np.exp(logits) / np.exp(logits).sum()
        answers.append({"label": labels[str(scores.argmax())], "score": float(scores.max())})
    return answers


def test_mlflow_loads_and_predicts(release: Path, tmp_path: Path) -> None:
    """As a user does, in a process that has nothing of the compiler, by an alias and by the version's number."""
    place = f"mlflow://{tmp_path}/store/tiny"
    assert publish.push(release, f"{place}?pyfunc=true", ("prod",)).made
    assert [found.release for found in connect(place).list()] == ["1.0.0"]
    publish.pull(f"{place}@prod", tmp_path / "pulled")
    assert hash_folder(tmp_path / "pulled") == hash_folder(release)
    script = f"""
import json, sys
sys.modules["compiler"] = None
import mlflow, pandas
mlflow.set_tracking_uri("sqlite:///{tmp_path}/store/mlflow.db")
texts = {TEXTS!r}
default = mlflow.pyfunc.load_model("models:/tiny@prod")
chosen = mlflow.pyfunc.load_model("models:/tiny/1", model_config={{"format": "onnx"}})
print(json.dumps([default.predict(pandas.DataFrame({{"text": texts}})), chosen.predict(texts)]))
"""
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
    )
    assert ran.returncode == 0, ran.stderr
    default, chosen = json.loads(ran.stdout.splitlines()[-1])
    agree(default, expected(release, "openvino"))
    agree(chosen, expected(release, "onnx"))


@pytest.mark.parametrize("format", list(BACKENDS))
def test_every_format_answers_as_its_runner(release: Path, format: str) -> None:
    model = pyfunc_loader._load_pyfunc(str(release), {"format": format, "threads": 2})
    agree(model.predict(TEXTS), expected(release, format))


def agree(answers: list[dict[str, Any]], right: list[dict[str, Any]]) -> None:
    assert [answer["label"] for answer in answers] == [answer["label"] for answer in right]
    assert [answer["score"] for answer in answers] == pytest.approx([answer["score"] for answer in right], abs=1e-4)


@pytest.fixture
def embedding(release: Path, tmp_path: Path) -> Path:
    """The classifier's folder made to look like a sentence-transformers' one."""
    folder = tmp_path / "embedding"
    shutil.copytree(release, folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    kinds = ("Transformer", "Pooling", "Normalize")
    modules = [
        {"type": f"sentence_transformers.models.{kind}", "path": path}
        for kind, path in zip(kinds, ("", "1_Pooling", "2_Normalize"), strict=True)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    return folder


@pytest.mark.parametrize("mode", ["mean_tokens", "cls_token", "max_tokens", "lasttoken"])
def test_pooling_is_sentence_transformers(embedding: Path, mode: str) -> None:
    import torch
    from sentence_transformers.sentence_transformer.modules import Pooling

    (embedding / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{mode}": True}))
    vectors = np.random.default_rng(3).normal(size=(3, 7, 8)).astype(np.float32)
    mask = np.array([[1] * 7, [1, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1]])
    ours = vectors
    for step in pyfunc_loader.pooling(embedding):
        ours = step(ours, mask)
    options = {f"pooling_mode_{name}": name == mode for name in ("mean_tokens", "cls_token", "max_tokens", "lasttoken")}
    features = {"token_embeddings": torch.from_numpy(vectors), "attention_mask": torch.from_numpy(mask)}
    right = torch.nn.functional.normalize(Pooling(8, **options)(features)["sentence_embedding"])
    left_padded = 2 if mode == "cls_token" else None  # sentence-transformers' cls is the first place, padding or not
    assert np.allclose(ours[:left_padded], right.numpy()[:left_padded], atol=1e-6)


def test_what_cannot_be_pooled_is_refused(embedding: Path) -> None:
    (embedding / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_weightedmean_tokens": True}))
    with pytest.raises(ValueError, match="open the release with sentence-transformers"):
        pyfunc_loader.pooling(embedding)
    modules = json.loads((embedding / "modules.json").read_text())
    modules[2]["type"] = "sentence_transformers.models.Dense"
    (embedding / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    (embedding / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match="Dense"):
        pyfunc_loader.pooling(embedding)


def test_lines() -> None:
    assert pyfunc_loader.lines("one") == [("one",)]
    assert pyfunc_loader.lines(np.array(["a", "b"])) == [("a",), ("b",)]
    assert pyfunc_loader.lines([("a", "b")]) == [("a", "b")]
    assert pyfunc_loader.lines({"context": ["c"], "question": ["q"]}) == [("q", "c")]
    assert pyfunc_loader.lines({"whatever": ["a"]}) == [("a",)]
    with pytest.raises(ValueError, match="text and text_pair"):
        pyfunc_loader.lines({"a": ["1"], "b": ["2"]})


def test_choose() -> None:
    artifacts = [{"format": "onnx", "precision": "int8"}, {"format": "onnx", "precision": "fp32"}]
    assert pyfunc_loader.choose(artifacts, None, None)["precision"] == "fp32"
    assert pyfunc_loader.choose(artifacts, "onnx", "int8")["precision"] == "int8"
    with pytest.raises(ValueError, match="the release has onnx int8, onnx fp32"):
        pyfunc_loader.choose(artifacts, "openvino", None)


def test_a_release_of_another_modality_is_refused(release: Path, tmp_path: Path) -> None:
    manifest = json.loads((release / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "task": "image-classification"}))
    with pytest.raises(ValueError, match="image-classification: python_function answers texts here"):
        pyfunc_loader._load_pyfunc(str(tmp_path))
