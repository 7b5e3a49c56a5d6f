"""Layers in int8 found from real text: close to the original, blind to padding, and rounded better than to the nearest."""

from __future__ import annotations

import json
import random
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compiler.accuracy import figures
from compiler.plan import BUILTIN_TEXT
from compiler.quantization import calibrate as calibration
from compiler.quantization.calibrate import Text, answer, batches, collect, departure
from compiler.quantization.layers import LAYERS, Layers, digest, load
from compiler.quantization.rounding import Emulation, Quantizer
from compiler.samples import with_masks
from compiler.types import Model
from tests.backends.conftest import load_checkpoint
from tests.quantization.formula import formula, widened
from tests.zoo import save_checkpoint

MEAN = ["mean"]


def texts(count: int, seed: int) -> list[tuple[str, ...]]:
    words = " ".join(json.loads(line)["text"] for line in BUILTIN_TEXT.read_text().splitlines()).split()
    generator = random.Random(seed)  # noqa: S311
    return [(" ".join(generator.sample(words, generator.randint(3, 20))),) for _ in range(count)]


@pytest.fixture(scope="module")
def model(bert: Path) -> Model:
    return load_checkpoint(bert)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory, model: Model) -> tuple[dict[str, Any], Layers]:
    out = tmp_path_factory.mktemp("calibrated")
    known = calibration.calibrate(out, model, texts(64, 1), texts(48, 2), MEAN, 8)
    return known, load(out / LAYERS, [name for group in known["groups"] for name in group["names"]])


def linears(model: Model) -> dict[str, torch.nn.Linear]:
    return {name: part for name, part in model.module.named_modules() if isinstance(part, torch.nn.Linear)}


def test_every_layer_is_described(model: Model, calibrated: tuple[dict[str, Any], Layers]) -> None:
    known, layers = calibrated
    small = {f"embeddings.{name}_embeddings" for name in ("word", "position", "token_type")}
    assert {*layers.by_name, *known["left"]} == set(linears(model)) | small
    assert {known["left"][name] for name in small} == {"an embedding of less than 1 MiB is not worth more operators"}
    assert not set(layers.by_name) & set(known["left"])
    attention = "encoder.layer.0.attention.self"
    assert [f"{attention}.{part}" for part in ("query", "key", "value")] in [group["names"] for group in known["groups"]]
    assert sum(group["cost"] for group in known["groups"]) == pytest.approx(1)
    assert all(0 < group["error"] < 0.05 for group in known["groups"])
    for group in known["groups"]:
        weight = layers.by_name[group["names"][0]].weight
        assert group["columns"] == weight.shape[1] / dict(linears(model))[group["names"][0]].in_features
    for name, layer in layers.by_name.items():
        assert layer.digest == digest(linears(model)[name].weight.detach().numpy())
        assert np.abs(layer.weight).max() <= 127


def test_emulation_of_all_layers_stays_close(model: Model, calibrated: tuple[dict[str, Any], Layers]) -> None:
    layers = calibrated[1]
    held = list(batches(model, texts(40, 3)))
    before = answer(model, held, MEAN)
    with Emulation(model.module, layers.by_name.values()).applied(list(layers.by_name)):
        after = answer(model, held, MEAN)
    found = figures(before, after)
    assert 0.99 < found["cosine"] < 1 - 1e-7
    assert found["rank"] > 0.95
    assert np.array_equal(answer(model, held, MEAN)["embedding"], before["embedding"])


@pytest.mark.parametrize("wide", [False, True])
def test_emulation_is_the_formula(model: Model, calibrated: tuple[dict[str, Any], Layers], wide: bool) -> None:
    """Of a layer as it was calibrated, and with channels that are given more than once."""
    name = "encoder.layer.1.intermediate.dense"
    layer, part = calibrated[1].by_name[name], linears(model)[name]
    if wide:
        narrow = replace(layer, weight=layer.weight[:, : layer.inputs], repeated=None, offset=None)
        (layer,) = widened([narrow])
    x = torch.randn((50, layer.inputs), generator=torch.Generator().manual_seed(4))
    with Emulation(model.module, [layer]).applied([name]), torch.inference_mode():
        actual = part(x).numpy()
    expected = formula(x, layer, part.bias).detach().numpy()
    assert actual == pytest.approx(expected, abs=1e-4)


def test_answers_are_in_the_order_of_their_texts(model: Model) -> None:
    given = texts(40, 5)
    whole = answer(model, list(batches(model, given)), MEAN)["embedding"]
    for number in (0, 17, 39):
        alone = answer(model, list(batches(model, [given[number]])), MEAN)["embedding"][0]
        assert whole[number] == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("task", ["token-classification", "fill-mask"])
def test_answers_of_tokens_are_in_the_order_of_their_texts(tmp_path: Path, task: str) -> None:
    """Though the short ones are run together."""
    model = load_checkpoint(save_checkpoint(tmp_path / "checkpoint", "bert", task), task)
    given = with_masks(model, texts(40, 5))
    alone = [answer(model, list(batches(model, [text])), MEAN)["logits"] for text in given]
    assert answer(model, list(batches(model, given)), MEAN)["logits"] == pytest.approx(np.concatenate(alone), abs=1e-5)


def test_excerpts() -> None:
    given = [("a b c d e f",), ("why ?", "a b c d e f"), ("one",), ("a b c",), ("a b c d e f",), ("",)]
    assert calibration.excerpts(given) == [("a",), ("why ?", "b c"), ("one",), ("a b c",), ("e",), ("",)]


def test_short_texts_are_in_range(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention over a few tokens reaches further than over many. Layers that were calibrated on long texts cut little of it
    off, and much without excerpts of these."""
    long = [text for text in texts(400, 7) if len(text[0].split()) > 16]
    alone = list(batches(model, [(word,) for word in sorted({word for text in long for word in text[0].split()})]))
    found = collect(model.module, alone)[0]

    def cut(folder: str) -> int:
        (tmp_path / folder).mkdir()
        known = calibration.calibrate(tmp_path / folder, model, long, texts(8, 8), MEAN, 8)
        layers = load(tmp_path / folder / LAYERS, [name for group in known["groups"] for name in group["names"]])
        total = 0
        for group in found:
            if group.names[0].endswith("attention.output.dense"):
                quantizer = Quantizer.of(layers.by_name[group.names[0]])
                steps = torch.cat(group.rows) * quantizer.smooth / quantizer.scale + quantizer.zero_point
                total += int(((steps < -1) | (steps > 256)).sum())
        return total

    cuts = cut("with")
    monkeypatch.setattr(calibration, "excerpts", lambda _: [])
    assert 5 * cuts < cut("without")


def padded(text: Text, more: int) -> Text:
    """The same text with more padding, on both sides, of tokens that are not the padding token."""
    inputs = {}
    for name, value in text.inputs.items():
        fill = 0 if name != "input_ids" else 7
        inputs[name] = torch.nn.functional.pad(value, (0, more), value=fill)
    return replace(text, inputs=inputs, mask=torch.nn.functional.pad(text.mask, (0, more)))


def test_padding_is_never_seen(model: Model) -> None:
    given = list(batches(model, texts(40, 6)))
    groups, left = collect(model.module, given)
    others, other_left = collect(model.module, [padded(text, 9) for text in given])
    assert left == other_left
    assert [group.names for group in groups] == [group.names for group in others]
    tokens = sum(int(text.mask.sum()) for text in given)
    for group, other in zip(groups, others, strict=True):
        assert group.tokens == other.tokens == tokens
        for one, two in ((group.low, other.low), (group.high, other.high), (torch.cat(group.rows), torch.cat(other.rows))):
            assert torch.allclose(one, two, atol=1e-4), group.name


def test_ranges_are_those_of_real_tokens(model: Model) -> None:
    """The first layers' input is the embeddings, which can be had without a hook."""
    given = list(batches(model, texts(40, 7)))
    first = next(group for group in collect(model.module, given)[0] if "layer.0.attention.self.query" in group.name)
    embeddings: Any = model.module.get_submodule("embeddings")
    with torch.inference_mode():
        rows = torch.cat(
            [embeddings(text.inputs["input_ids"], token_type_ids=text.inputs["token_type_ids"])[text.mask] for text in given]
        )
    assert torch.allclose(first.low, rows.min(dim=0).values, atol=1e-5)
    assert torch.allclose(first.high, rows.max(dim=0).values, atol=1e-5)
    assert len(torch.cat(first.rows)) == len(rows)


class Odd(torch.nn.Module):
    """Layers that are no candidates, each for another reason."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(20, 6)
        self.one, self.twin, self.other = (torch.nn.Linear(6, 6) for _ in range(3))
        self.twin.weight = self.one.weight
        self.decoder = torch.nn.Linear(6, 20)
        self.decoder.weight = self.table.weight
        self.pooler, self.unused = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)
        self.mixed, self.wild, self.original = (torch.nn.Linear(6, 6) for _ in range(3))
        self.copy = deepcopy(self.original)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.table(input_ids)
        x = self.one(x) + self.other(x)
        positions = torch.arange(24.0).reshape(1, 4, 6)
        x = x + self.mixed(x) + self.copy(self.original(x)) + self.mixed(positions).mean() + self.wild(x / 0)
        pooled: torch.Tensor = self.pooler(x[:, 0]) + self.decoder(self.twin(x)).mean()
        return pooled


@pytest.mark.parametrize("length", [5, 6])  # 6: as wide as the vectors are
def test_layers_that_are_no_candidates(length: int) -> None:
    ids = torch.arange(4 * length).reshape(4, length) % 20
    text = Text({"input_ids": ids}, torch.ones_like(ids, dtype=torch.bool), (0, 1, 2, 3), None)
    groups, left = collect(Odd(), [text])
    assert [group.names for group in groups] == [("other",)]
    assert left == {
        "one": "its weights are those of twin as well",
        "twin": "its weights are those of one as well",
        "copy": "its weights are those of original as well",
        "original": "its weights are those of copy as well",
        "decoder": "its weights are table's too",
        "pooler": "it sees no token's row, such as one row a text, which is no work",
        "mixed": "it sees what is no token's row as well, such as positions",
        "wild": "its input is not finite on calibration text",
        "unused": "the model does not use it",
    }


class Again(torch.nn.Module):
    """Layers that share an input, of which one is run on another as well, and one is given its by keyword."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(9)
        self.table = torch.nn.Embedding(20, 6)
        self.one, self.other, self.again, self.named = (torch.nn.Linear(6, 6) for _ in range(4))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.table(input_ids)
        found: torch.Tensor = self.one(x) + self.other(x) + self.again(x) + self.again(100 * x) + self.named(input=x)
        return found


def test_ranges_are_those_of_every_input() -> None:
    ids = torch.arange(20).reshape(4, 5)
    module = Again()
    groups, left = collect(module, [Text({"input_ids": ids}, torch.ones_like(ids, dtype=torch.bool), (0, 1, 2, 3), None)])
    assert [group.names for group in groups] == [("one", "other"), ("again",)]
    assert torch.equal(groups[1].high, 100 * module.table.weight.amax(dim=0))
    assert left == {"named": "its input is given by keyword"}


def test_departure_is_in_units_of_the_variance() -> None:
    before = np.random.default_rng(1).standard_normal((2000, 5)) * 7
    assert departure({"logits": before}, {"logits": before + 0.7}) == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize("task", ["question-answering", "multiple-choice", "text-classification", "token-classification"])
def test_layers_of_every_task_are_told_apart(tmp_path: Path, task: str) -> None:
    """Also where answers seldom change, such as spans, or stand several to a text, such as choices."""
    model = load_checkpoint(save_checkpoint(tmp_path / task, "bert", task), task)
    lines = [text for (text,) in texts(60, 3)]
    columns = {"question-answering": 2, "multiple-choice": 3}.get(task, 1)
    given = [tuple(lines[(number + column) % 60] for column in range(columns)) for number in range(60)]
    known = calibration.calibrate(tmp_path, model, given[:32], given[32:], MEAN, 8)
    errors = [group["error"] for group in known["groups"]]
    assert len(errors) == len(set(errors)) >= 8
    assert all(0 < error < 0.5 for error in errors)


def test_excerpts_of_a_script_without_spaces() -> None:
    line = "图书馆在星期天上午十点开门，晚上八点关门，读者可以借阅十本书。"
    found = calibration.excerpts([(line,)] * 4)
    assert [len(text) for (text,) in found] == [2, 4, 6, 8]
    assert all(text in line for (text,) in found)


def test_rows_that_are_kept_are_no_more_than_the_most(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of a layer that is run once for each of the model's, too."""
    monkeypatch.setattr(calibration, "MAX_ROWS", 256)
    shared = load_checkpoint(save_checkpoint(tmp_path / "albert", "albert", num_hidden_layers=5))
    given = list(batches(shared, texts(90, 4)))
    assert sum(int(text.mask.sum()) for text in given) % 256
    groups, _ = collect(shared.module, given)
    assert {sum(map(len, group.rows)) for group in groups} <= set(range(128, 257 + 5))
