"""Sentence embeddings and similarity, against the eager model pooled by torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import compiler
from compiler.errors import InputError
from compiler.pipelines import sentence_embedding
from compiler.runtime import CompiledModel
from tests.releases import SHORT, TEXTS, add_sentence_files, release_of

LONG = " ".join(TEXTS[:8])


@pytest.fixture(scope="module")
def model(releases: Path) -> CompiledModel:
    return compiler.load(release_of(releases, "features"), "onnx")


@pytest.fixture(scope="module")
def states(releases: Path) -> Any:
    """The eager model's vectors of a text, `[tokens, width]`, of at most 32 tokens."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    eager = AutoModel.from_pretrained(releases / "features").eval()
    tokenizer = AutoTokenizer.from_pretrained(releases / "features")

    def run(text: str) -> Any:
        with torch.no_grad():
            coded = tokenizer(text, return_tensors="pt", truncation=True, max_length=32)
            return eager(**coded).last_hidden_state[0]

    return run


def test_as_the_files_say(model: CompiledModel, states: Any) -> None:
    """Mean, normalized, cut to the 32 tokens of sentence_bert_config.json; a list in its order."""
    import torch

    pipe = compiler.pipeline("sentence-embedding", model, batch_tokens=64)
    texts = ["  a text between spaces ", LONG, *SHORT]
    found = pipe(texts)
    for text, vector in zip(texts, found, strict=True):
        expected = torch.nn.functional.normalize(states(text.strip()).mean(dim=0), dim=0)
        np.testing.assert_allclose(vector, expected.numpy(), atol=2e-6)
    one = pipe(texts[1])
    assert one.dtype == np.float32
    np.testing.assert_allclose(one, found[1], atol=2e-6)


POOLED = {
    "mean": lambda states: states.mean(0),
    "cls": lambda states: states[0],
    "max": lambda states: states.max(0).values,
    "mean_sqrt_len_tokens": lambda states: states.sum(0) / len(states) ** 0.5,
    "weightedmean": lambda states: sum((n + 1) * row for n, row in enumerate(states)) / sum(range(1, len(states) + 1)),
    "lasttoken": lambda states: states[-1],
}


@pytest.mark.parametrize("pooling", sorted(POOLED))
def test_pooling_on_request(model: CompiledModel, states: Any, pooling: str) -> None:
    pipe = compiler.pipeline("sentence-embedding", model, pooling=pooling, normalize=False)
    expected = POOLED[pooling](states(SHORT[0])).numpy()
    np.testing.assert_allclose(pipe(SHORT[0]), expected, atol=5e-6)


def rewritten(model: CompiledModel, folder: Path, **pooling: Any) -> CompiledModel:
    """The model over a folder with other sentence-transformers' files."""
    names = ("config.json", "tokenizer.json", "tokenizer_config.json")
    folder.mkdir()
    for name in names:
        shutil.copy(model.folder / name, folder / name)
    add_sentence_files(folder, **pooling)
    return CompiledModel(folder, model.manifest, model._run, model.artifact, "")


def test_other_files(model: CompiledModel, states: Any, tmp_path: Path) -> None:
    """Several ways at once, in sentence-transformers' order; the newer form; prompts; a width; another similarity."""
    import torch

    both = rewritten(model, tmp_path / "both", pooling_mode_mean_tokens=True, pooling_mode_cls_token=True)
    (both.folder / "config_sentence_transformers.json").write_text(
        json.dumps({"prompts": {"query": "the "}, "truncate_dim": 40, "similarity_fn_name": "dot"})
    )
    text = SHORT[0]
    pipe = compiler.pipeline("sentence-embedding", both)

    def expected(text: str) -> Any:
        vectors = states(text)
        return torch.nn.functional.normalize(torch.cat([vectors[0], vectors.mean(0)]), dim=0)[:40].numpy()

    np.testing.assert_allclose(pipe(text), expected(text), atol=2e-6)
    np.testing.assert_allclose(pipe(text, prompt="query"), expected("the " + text), atol=2e-6)
    with pytest.raises(InputError, match="prompt: no 'passage'; the release has query"):
        pipe(text, prompt="passage")
    dot = compiler.pipeline("sentence-similarity", both)({"text": text, "text_pair": SHORT[1]})
    assert dot == pytest.approx(float(expected(text) @ expected(SHORT[1])), abs=1e-5)
    (both.folder / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode": "max"}))
    maximum = torch.nn.functional.normalize(states(text).max(0).values, dim=0).numpy()
    np.testing.assert_allclose(compiler.pipeline("sentence-embedding", both)(text), maximum[:40], atol=2e-6)
    (both.folder / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode": ["mean", "cls"]}))
    vectors = states(text)
    together = torch.nn.functional.normalize(torch.cat([vectors.mean(0), vectors[0]]), dim=0).numpy()
    np.testing.assert_allclose(compiler.pipeline("sentence-embedding", both)(text), together[:40], atol=2e-6)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("modules.json", [{}, {"type": "sentence_transformers.models.Dense", "path": "2_Dense"}], "names a Dense"),
        ("1_Pooling/config.json", {"pooling_mode": "attention"}, "'attention'; cls, max, mean"),
        ("1_Pooling/config.json", {"pooling_mode": "mean", "include_prompt": False}, "leaves prompts out"),
        ("modules.json", [], "has no modules.json that says how to pool; give pooling"),
    ],
)
def test_what_only_sentence_transformers_can(model: CompiledModel, tmp_path: Path, name: str, content: Any, says: str) -> None:
    other = rewritten(model, tmp_path / "other")
    (other.folder / name).write_text(json.dumps(content))
    with pytest.raises(InputError, match=says):
        compiler.pipeline("sentence-embedding", other)


def test_similarity(model: CompiledModel, states: Any) -> None:
    import torch

    pipe = compiler.pipeline("sentence-similarity", model)
    one, two, three = SHORT[:3]
    expected = [float(torch.cosine_similarity(states(one).mean(0), states(other).mean(0), dim=0)) for other in (two, three)]
    assert pipe({"source_sentence": one, "sentences": [two, three]}) == pytest.approx(expected, abs=1e-5)
    pairs = [{"text": one, "text_pair": two}, {"text": one, "text_pair": three}]
    assert pipe(pairs) == pytest.approx(expected, abs=1e-5)
    assert pipe(pairs[0]) == pytest.approx(expected[0], abs=1e-5)
    for wrong in ("a text", {"text": "a"}, {"source_sentence": "a", "sentences": []}):
        with pytest.raises(InputError):
            pipe(wrong)


@pytest.mark.parametrize(("name", "value"), [("euclidean", -5.0), ("manhattan", -7.0), ("dot", 0.0), ("cosine", 0.0)])
def test_similarities(model: CompiledModel, name: str, value: float) -> None:
    from dataclasses import replace

    sentences = replace(compiler.pipeline("sentence-embedding", model).prepared, similarity=name)
    assert sentence_embedding.similar(sentences, np.array([3.0, 0.0]), np.array([0.0, -4.0])) == pytest.approx(value)
