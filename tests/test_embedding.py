"""The sentence embedding inside the graph, held against sentence-transformers itself on the same folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from compiler.accuracy import answers
from compiler.backends import BACKENDS
from compiler.config import ModelSpec, OnnxTargets, Targets
from compiler.errors import ConfigError, SourceError
from compiler.hashing import hash_folder
from compiler.plan import make_plan
from compiler.sources import pooling, resolve
from compiler.stages.export import export
from compiler.stages.load import load, run_eager, signature
from compiler.types import Artifact, Model, Snapshot, Target
from tests.conftest import write_pipeline

TEXTS = ["Cats sleep most of the day.", "The harbour opens at six.", "salt"]
TYPES = "sentence_transformers.models."
Write = Callable[..., Path]


@pytest.fixture
def write(bert: Path, tmp_path: Path) -> Write:
    """A checkpoint with sentence-transformers' files: the pooling's settings, and which modules follow it."""

    def make(pooling: dict[str, Any], *following: str, path: str = "1_Pooling") -> Path:
        folder = Path(shutil.copytree(bert, tmp_path / "embedder"))
        kinds = [("", "Transformer"), (path, "Pooling"), *((f"{n}_{kind}", kind) for n, kind in enumerate(following, 2))]
        modules = [{"idx": n, "name": str(n), "path": path, "type": TYPES + kind} for n, (path, kind) in enumerate(kinds)]
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / path).mkdir()
        (folder / path / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **pooling}))
        for name in {"Dropout", "LayerNorm"}.intersection(following):
            inner = folder / next(path for path, kind in kinds if kind == name)
            inner.mkdir()
            (inner / "config.json").write_text("{}")
        if "Dense" in following:
            inner = folder / next(path for path, kind in kinds if kind == "Dense")
            inner.mkdir()
            settings = {
                "in_features": 32,
                "out_features": 8,
                "bias": True,
                "activation_function": "torch.nn.modules.activation.Tanh",
            }
            (inner / "config.json").write_text(json.dumps(settings))
            torch.manual_seed(3)
            save_file({"linear.weight": torch.randn(8, 32), "linear.bias": torch.randn(8)}, inner / "model.safetensors")
        return folder

    return make


def snapshot(folder: Path) -> Snapshot:
    targets = Targets(onnx=OnnxTargets(precisions=("fp32",)))
    return resolve(ModelSpec(name="a", release="1.0.0", source="path:.", targets=targets), folder)


def loaded(folder: Path) -> Model:
    return load(snapshot(folder), "feature-extraction", sentence_embedding=True)


def inputs(model: Model, side: str = "right") -> dict[str, np.ndarray[Any, Any]]:
    made = model.tokenizer(TEXTS, padding=True, padding_side=side, return_tensors="np")
    return {name: made[name].astype(np.int64) for name in model.inputs}


@pytest.mark.parametrize(
    ("pooling", "following"),
    [
        ({"pooling_mode_mean_tokens": True}, ("Normalize",)),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, ()),
        ({"pooling_mode_max_tokens": True}, ("Normalize",)),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, ()),
        ({"pooling_mode_lasttoken": True}, ()),
        ({"pooling_mode": "cls"}, ("Dense", "Normalize")),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, ()),
    ],
)
@pytest.mark.parametrize("side", ["right", "left"])
def test_it_is_that_of_sentence_transformers(
    write: Write, pooling: dict[str, Any], following: tuple[str, ...], side: str
) -> None:
    from sentence_transformers import SentenceTransformer

    folder = write(pooling, *following)
    model = loaded(folder)
    given = inputs(model, side)
    made = run_eager(model, given)["sentence_embedding"]
    theirs = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    with torch.inference_mode():
        expected = theirs({name: torch.from_numpy(value) for name, value in given.items()})["sentence_embedding"].numpy()
    np.testing.assert_allclose(made, expected, atol=1e-5)
    assert [list(tensor.shape) for tensor in signature(model).outputs if tensor.name == "sentence_embedding"] == [
        ["batch", expected.shape[1]]
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
        {"pooling_mode": "cls"},
        {"pooling_mode": "lasttoken", "pooling_mode_mean_tokens": True},
        {"pooling_mode": ["mean", "cls"]},
        {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True},
        {"pooling_mode": "weightedmean"},
        {"pooling_mode": "mean_sqrt_len_tokens"},
    ],
)
@pytest.mark.parametrize("path", ["1_Pooling", "pooled"])
def test_int8_is_judged_by_the_embeddings_of_sentence_transformers(write: Write, settings: dict[str, Any], path: str) -> None:
    from sentence_transformers import SentenceTransformer

    folder = write(settings, "Normalize", path=path)
    found = snapshot(folder)
    model = load(found, "feature-extraction")
    given = inputs(model)
    how = pooling(found, "feature-extraction", {})
    made = answers("feature-extraction", run_eager(model, given), given["attention_mask"].astype(bool), how)["embedding"]
    theirs = SentenceTransformer(str(folder), device="cpu", local_files_only=True).encode(TEXTS)
    np.testing.assert_allclose(made, theirs, atol=1e-5)


def test_int8_of_a_pooling_that_is_not_known(write: Write) -> None:
    with pytest.raises(SourceError, match=r"1_Pooling/config\.json: pooling other is not known"):
        pooling(snapshot(write({"pooling_mode": "other"})), "feature-extraction", {})


def test_int8_of_an_embedding_that_goes_on_behind_the_pooling(write: Write) -> None:
    """What is judged must be what a user gets."""
    found = snapshot(write({"pooling_mode": "cls"}, "Dense", "Normalize"))
    with pytest.raises(SourceError, match=r"has a Dense behind the encoder, .* set sentence_embedding: true"):
        pooling(found, "feature-extraction", {})
    assert pooling(found, "feature-extraction", {"sentence_embedding": True}) == []
    assert pooling(found, "text-classification", {}) == []


def test_int8_of_an_embedding_that_no_graph_can_hold(write: Write) -> None:
    unable = snapshot(write({"pooling_mode": "cls"}, "LayerNorm"))
    with pytest.raises(SourceError, match=r"has a LayerNorm behind the encoder, .* whole embedding; leave int8 out"):
        pooling(unable, "feature-extraction", {})


def test_dropout_behind_the_pooling_is_nothing(write: Write) -> None:
    folder = write({"pooling_mode": "cls"}, "Dropout", "Normalize")
    assert pooling(snapshot(folder), "feature-extraction", {}) == ["cls"]
    model = loaded(folder)
    made = run_eager(model, inputs(model))
    expected = made["last_hidden_state"][:, 0] / np.linalg.norm(made["last_hidden_state"][:, 0], axis=1, keepdims=True)
    np.testing.assert_allclose(made["sentence_embedding"], expected, atol=1e-6)


def test_a_pooling_by_nothing(write: Write) -> None:
    folder = write({"pooling_mode": []})
    for find in (lambda: pooling(snapshot(folder), "feature-extraction", {}), lambda: loaded(folder)):
        with pytest.raises(SourceError, match="pooling by nothing is not known"):
            find()


@pytest.mark.parametrize("format", list(BACKENDS))
def test_it_is_in_every_format_and_padding_costs_nothing(write: Write, tmp_path: Path, format: str) -> None:
    folder = write({"pooling_mode_mean_tokens": True}, "Normalize")
    model = loaded(folder)
    (tmp_path / "out").mkdir()
    target = Target(format, "fp32")
    known = export(tmp_path / "out", target, snapshot(folder), "feature-extraction", {"sentence_embedding": True}, None)
    assert known["declined"] == {}
    assert known["fusions"]["padding_free"] == 2
    backend = BACKENDS[format]
    files = tuple(sorted(hash_folder(tmp_path / "out"), key=lambda file: file.path != backend.files("fp32")[0]))
    run = backend.open(tmp_path / "out", Artifact(format, "fp32", files, backend.runtime("fp32"), ""), 1)
    for side in ("right", "left"):
        given = inputs(model, side)
        made, expected = run(given), run_eager(model, given)
        assert set(made) == set(expected) == {"last_hidden_state", "pooler_output", "sentence_embedding"}
        np.testing.assert_allclose(made["sentence_embedding"], expected["sentence_embedding"], atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(made["sentence_embedding"], axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("following", [("Normalize",), ("Dense", "Normalize")])
def test_vectors_of_length_1_have_it_in_bf16(write: Write, tmp_path: Path, following: tuple[str, ...]) -> None:
    """Who compares them by their dot product takes another for the nearest otherwise."""
    (tmp_path / "out").mkdir()
    folder = write({"pooling_mode": "cls"}, *following)
    options = {"sentence_embedding": True}
    export(tmp_path / "out", Target("torchscript", "bf16"), snapshot(folder), "feature-extraction", options, None)
    backend = BACKENDS["torchscript"]
    files = hash_folder(tmp_path / "out")
    run = backend.open(tmp_path / "out", Artifact("torchscript", "bf16", files, backend.runtime("bf16"), ""), 1)
    model = loaded(folder)
    for given in (inputs(model), {name: value[:1, :4] for name, value in inputs(model).items()}):
        made, expected = (side["sentence_embedding"] for side in (run(given), run_eager(model, given)))
        np.testing.assert_allclose(np.linalg.norm(made, axis=1), 1, atol=1e-6)
        np.testing.assert_allclose(made, expected, atol=0.05)


def test_the_architecture_is_still_the_encoder(write: Write) -> None:
    assert type(loaded(write({"pooling_mode_mean_tokens": True})).module).__name__ == "BertModel"


@pytest.mark.parametrize(
    ("pooling", "following", "word"),
    [
        ({"pooling_mode_weightedmean_tokens": True}, (), "weightedmean"),
        ({"pooling_mode": "other"}, (), "other"),
        ({"pooling_mode_mean_tokens": True, "include_prompt": False}, (), "prompt"),
        ({"pooling_mode_mean_tokens": True}, ("LSTM",), "LSTM"),
    ],
)
def test_what_is_not_known(write: Write, pooling: dict[str, Any], following: tuple[str, ...], word: str) -> None:
    folder = write(pooling, *following)
    for name in following:
        (folder / f"2_{name}").mkdir()
        (folder / f"2_{name}" / "config.json").write_text("{}")
    with pytest.raises(SourceError, match=word) as caught:
        loaded(folder)
    assert len(str(caught.value).splitlines()) == 1


def test_no_files_of_sentence_transformers(bert: Path) -> None:
    with pytest.raises(SourceError, match=r"no modules\.json"):
        loaded(bert)


@pytest.mark.parametrize("content", ["", "{}", "[3]", "null"])
def test_files_that_are_garbage(write: Write, content: str) -> None:
    folder = write({"pooling_mode_mean_tokens": True})
    (folder / "modules.json").write_text(content)
    with pytest.raises(SourceError, match=r"modules\.json"):
        loaded(folder)


@pytest.mark.parametrize("content", ["", "[]", "null"])
def test_a_pooling_that_is_garbage(write: Write, content: str) -> None:
    folder = write({})
    (folder / "1_Pooling" / "config.json").write_text(content)
    with pytest.raises(SourceError, match=r"1_Pooling/config\.json"):
        loaded(folder)


def test_another_task_has_none(bert: Path) -> None:
    targets = Targets(onnx=OnnxTargets(precisions=("fp32",)))
    spec = ModelSpec(name="a", release="1.0.0", source="path:.", task="fill-mask", sentence_embedding=True, targets=targets)
    with pytest.raises(ConfigError, match="sentence_embedding: is an output of feature-extraction") as caught:
        make_plan(spec, resolve(spec, bert), Path())
    assert len(str(caught.value).splitlines()) == 1


def test_a_release_with_it_verifies_again_from_the_checkpoint(
    write: Write, tmp_path: Path, command: Callable[..., Any]
) -> None:
    write_pipeline(tmp_path, write({"pooling_mode_mean_tokens": True}, "Normalize"), sentence_embedding=True)
    built = command("pipeline.yaml")
    assert built.returncode == 0, built.stderr
    manifest = json.loads((tmp_path / "artifacts/tiny/1.0.0/manifest.json").read_text())
    assert manifest["entry"]["sentence_embedding"] is True
    assert [tensor["name"] for tensor in manifest["signature"]["outputs"]][-1] == "sentence_embedding"
    verified = command("verify", "artifacts/tiny/1.0.0", "--numerics", "--source", "path:embedder")
    assert verified.returncode == 0, verified.stderr
