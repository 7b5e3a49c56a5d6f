"""Opens a release for `mlflow.pyfunc.load_model` and answers texts. Needs numpy, transformers and one of the runtimes.

This file travels with a release in MLflow and runs there on its own: it imports nothing of the compiler.

    model = mlflow.pyfunc.load_model("models:/minilm/1", model_config={"format": "onnx", "precision": "fp32", "threads": 4})
    model.predict(["a text", "another"])            # or a DataFrame with a column `text`

Each configuration may be left out: the format is then the first of openvino, onnx and torchscript that the release has and
whose runtime is installed, and the precision fp32, the closest to the original.

It answers, per text: an embedding (a release with sentence-transformers' files); the tokens' vectors (feature-extraction); the
label and its score (text-classification, or per token: token-classification); otherwise the model's outputs by name.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

RUNTIMES = {"openvino": "openvino", "onnx": "onnxruntime", "torchscript": "torch"}
BATCH = 32
# The columns of a DataFrame, or keys of a dict, that are a task's text and the text beside it.
COLUMNS = (("text", "text_pair"), ("question", "context"))

TASKS = ("feature-extraction", "text-classification", "token-classification", "question-answering", "fill-mask")

Arrays = dict[str, "np.ndarray[Any, Any]"]
Runner = Callable[[Arrays], Arrays]


def _load_pyfunc(data_path: str, model_config: Mapping[str, Any] | None = None) -> Predictor:
    return Predictor(Path(data_path), dict(model_config or {}))


class Predictor:
    """A release, opened."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        from transformers import AutoTokenizer

        self.manifest = json.loads((folder / "manifest.json").read_bytes())
        if self.manifest["task"] not in TASKS:
            raise ValueError(
                f"{self.manifest['task']}: python_function answers texts here ({', '.join(TASKS)}); open an artifact"
            )
        artifact = choose(self.manifest["artifacts"], config.get("format"), config.get("precision"))
        self.run = OPEN[artifact["format"]](folder, artifact, config.get("threads"))
        self.names = [tensor["name"] for tensor in self.manifest["signature"]["inputs"]]
        self.tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        self.config = _json(folder / "config.json") or {}
        self.steps = pooling(folder)
        limits = [self.tokenizer.model_max_length, self.manifest["positions"]]
        limits.append((_json(folder / "sentence_bert_config.json") or {}).get("max_seq_length"))
        self.positions = min(limit for limit in limits if limit)

    def predict(self, data: Any, params: Mapping[str, Any] | None = None) -> Any:
        texts = lines(data)
        answers: list[Any] = []
        for start in range(0, len(texts), BATCH):
            answers += self._batch(texts[start : start + BATCH])
        return np.stack(answers) if self.steps and answers else answers

    def _batch(self, texts: Sequence[tuple[str, ...]]) -> list[Any]:
        columns = [list(column) for column in zip(*texts, strict=True)]
        limit = min(self.positions, 1 << 20)  # a tokenizer without a limit has one of 1e30
        coded = self.tokenizer(*columns, padding=True, truncation=True, max_length=limit, return_tensors="np")
        mask = coded["attention_mask"].astype(np.int64)
        outputs = self.run({name: coded[name].astype(np.int64) for name in self.names})
        task = self.manifest["task"]
        if self.steps:
            vectors = outputs["last_hidden_state"]
            for step in self.steps:
                vectors = step(vectors, mask)
            return list(vectors)
        if task == "feature-extraction":
            return [row[kept.astype(bool)] for row, kept in zip(outputs["last_hidden_state"], mask, strict=True)]
        if task == "text-classification":
            return [self._label(row) for row in outputs["logits"]]
        if task == "token-classification":
            special = set(self.tokenizer.all_special_tokens)
            answers = []
            for row, ids in zip(outputs["logits"], coded["input_ids"], strict=True):
                tokens = zip(self.tokenizer.convert_ids_to_tokens(ids), row, strict=True)
                answers.append([{"token": token, **self._label(score)} for token, score in tokens if token not in special])
            return answers
        return [{name: value[index] for name, value in outputs.items()} for index in range(len(texts))]

    def _label(self, logits: np.ndarray[Any, Any]) -> dict[str, Any]:
        scores = 1 / (1 + np.exp(-logits.astype(np.float64)))
        if len(logits) > 1 and self.config.get("problem_type") != "multi_label_classification":
            powers = np.exp(logits.astype(np.float64) - logits.max())
            scores = powers / powers.sum()
        best = int(scores.argmax())
        return {"label": self.config.get("id2label", {}).get(str(best), f"LABEL_{best}"), "score": float(scores[best])}


def choose(artifacts: Sequence[Mapping[str, Any]], format: str | None, precision: str | None) -> Mapping[str, Any]:
    """The artifact to open."""
    installed = [name for name, module in RUNTIMES.items() if importlib.util.find_spec(module)]
    for name in [format] if format else installed:
        for wanted in [precision] if precision else ["fp32", "bf16", "int8"]:
            for artifact in artifacts:
                if (artifact["format"], artifact["precision"]) == (name, wanted):
                    return artifact
    has = ", ".join(f"{artifact['format']} {artifact['precision']}" for artifact in artifacts)
    raise ValueError(f"no {format or ' or '.join(installed)} {precision or ''} artifact; the release has {has}")


def lines(data: Any) -> list[tuple[str, ...]]:
    """The texts of a list, an array, a Series, a dict of columns, or a DataFrame: one each, or two where there is a pair."""
    columns = list(getattr(data, "columns", data if isinstance(data, Mapping) else ()))
    if columns:
        for names in COLUMNS:
            if found := [list(data[name]) for name in names if name in columns]:
                return list(zip(*found, strict=True))
        if len(columns) > 1:
            raise ValueError(f"columns {columns}: give text, text and text_pair, or question and context")
        data = data[columns[0]]
    if isinstance(data, str):
        data = [data]
    return [(value,) if isinstance(value, str) else tuple(value) for value in data]


def pooling(folder: Path) -> list[Callable[[Any, Any], Any]]:
    """What follows the model in a sentence-transformers' folder, as functions of vectors and attention mask; empty without."""
    steps: list[Callable[[Any, Any], Any]] = []
    for module in (_json(folder / "modules.json") or [])[1:]:
        kind = module["type"].rpartition(".")[2]
        if kind == "Pooling":
            config = _json(folder / module["path"] / "config.json") or {}
            modes = [name for name, on in config.items() if name.startswith("pooling_mode_") and on is True]
            modes = modes or [f"pooling_mode_{config.get('pooling_mode')}"]
            if len(modes) != 1 or modes[0] not in POOLING:
                raise ValueError(f"pooling {', '.join(modes)} is not known here; open the release with sentence-transformers")
            steps.append(POOLING[modes[0]])
        elif kind == "Normalize":
            steps.append(lambda vectors, mask: vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12))
        elif kind != "Dropout":
            raise ValueError(f"module {module['type']} is not known here; open the release with sentence-transformers")
    return steps


def _mean(vectors: Any, mask: Any) -> Any:
    weights = mask[:, :, None].astype(vectors.dtype)
    return (vectors * weights).sum(1) / np.maximum(weights.sum(1), 1e-9)


def _first(vectors: Any, mask: Any) -> Any:
    return vectors[np.arange(len(vectors)), mask.argmax(1)]


def _last(vectors: Any, mask: Any) -> Any:
    return vectors[np.arange(len(vectors)), mask.shape[1] - 1 - mask[:, ::-1].argmax(1)]


def _max(vectors: Any, mask: Any) -> Any:
    return np.where(mask[:, :, None] > 0, vectors, -np.inf).max(1)


POOLING = {
    "pooling_mode_mean_tokens": _mean,
    "pooling_mode_mean": _mean,
    "pooling_mode_cls_token": _first,
    "pooling_mode_cls": _first,
    "pooling_mode_lasttoken": _last,
    "pooling_mode_max_tokens": _max,
    "pooling_mode_max": _max,
}


def _open_onnx(folder: Path, artifact: Mapping[str, Any], threads: int | None) -> Runner:
    import onnxruntime

    settings = artifact["runtime"]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, settings["graph_optimization_level"])
    path = str(folder / artifact["files"][0]["path"])
    session = onnxruntime.InferenceSession(path, options, providers=[settings["provider"]])
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(None, inputs), strict=True))


def _open_openvino(folder: Path, artifact: Mapping[str, Any], threads: int | None) -> Runner:
    import openvino

    settings = dict(artifact["runtime"])
    device = settings.pop("device")
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    path = next(file["path"] for file in artifact["files"] if file["path"].endswith(".xml"))
    compiled = openvino.Core().compile_model(str(folder / path), device, settings)
    names = [output.get_any_name() for output in compiled.outputs]

    def run(inputs: Arrays) -> Arrays:
        result = compiled(inputs)
        return {name: result[index] for index, name in enumerate(names)}

    return run


def _open_torchscript(folder: Path, artifact: Mapping[str, Any], threads: int | None) -> Runner:
    import torch

    torch.set_float32_matmul_precision(artifact["runtime"]["float32_matmul_precision"])
    if threads:
        torch.set_num_threads(threads)
    script = torch.jit.load(str(folder / artifact["files"][0]["path"]), map_location="cpu")

    def run(inputs: Arrays) -> Arrays:
        with torch.inference_mode():
            outputs = script(**{name: torch.from_numpy(value) for name, value in inputs.items()})
        return {name: value.numpy() for name, value in outputs.items()}

    return run


OPEN = {"onnx": _open_onnx, "openvino": _open_openvino, "torchscript": _open_torchscript}


def _json(path: Path) -> Any:
    return json.loads(path.read_bytes()) if path.is_file() else None
