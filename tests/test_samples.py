"""Masked words, and how many texts are in a batch."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from compiler.errors import ConfigError
from compiler.quantization import calibrate as calibration
from compiler.samples import LONGEST, MAX_LOGITS, accuracy_cases, batch_size, with_masks
from compiler.types import Model
from tests.backends.conftest import load_checkpoint
from tests.zoo import save_checkpoint

TASK = "fill-mask"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_checkpoint(save_checkpoint(tmp_path_factory.mktemp("masks") / "checkpoint", "bert", TASK), TASK)


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("the quick brown fox jumps", "the quick [MASK] fox jumps"),
        ("the [MASK] fox", "the [MASK] fox"),
        ("the <mask> fox", "the [MASK] fox"),
        ("fox", "[MASK]"),
        ("今天天气很好我们去公园散步然后回家吃饭看书写字", "今天天气很好我们去公园[MASK]步然后回家吃饭看书写字"),
    ],
)
def test_the_middle_word_is_masked(model: Model, text: str, masked: str) -> None:
    assert with_masks(model, [(text,)]) == [(masked,)]


@pytest.mark.parametrize("count", [40, 200, 3000])
def test_a_masked_word_is_not_cut_off(model: Model, count: int) -> None:
    """The middle of a long text is beyond what the model takes."""
    texts = [("the quick brown fox " * count,)] * 20
    for case in accuracy_cases(model, texts):
        assert case.inputs["input_ids"].shape[1] == model.positions
        assert ((case.inputs["input_ids"] == model.tokenizer.mask_token_id).sum(axis=1) == 1).all()


def test_a_masked_word_is_not_cut_off_on_the_left(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.tokenizer, "truncation_side", "left")
    for case in accuracy_cases(model, [("the quick brown fox " * 200,)] * 20):
        assert ((case.inputs["input_ids"] == model.tokenizer.mask_token_id).sum(axis=1) == 1).all()


def test_masks_that_are_all_cut_off(model: Model, tmp_path: Path) -> None:
    """Where the user has set them."""
    texts = [(f"{number} " + "fox " * 100 + "[MASK]",) for number in range(40)]
    with pytest.raises(ConfigError, match=r"^data\.validation: 0 masked words within the 64 tokens .* give at least 16"):
        accuracy_cases(model, texts)
    right = with_masks(model, [(f"the quick brown fox {number}",) for number in range(40)])
    with pytest.raises(ConfigError, match=r"^data\.calibration: no masked word stands within what the model takes"):
        calibration.calibrate(tmp_path, model, right, texts, [], 8)


@pytest.mark.parametrize(("words", "most"), [(30_000, 8), (250_000, 1), (100, 32)])
def test_batches_are_smaller_where_logits_are_many(words: int, most: int) -> None:
    config = SimpleNamespace(vocab_size=words)
    of: Any = SimpleNamespace(task=TASK, positions=4 * LONGEST, module=SimpleNamespace(config=config))
    size = batch_size(of, 32)
    assert size == most
    assert size == 1 or size * LONGEST * words <= MAX_LOGITS
    assert batch_size(SimpleNamespace(task="feature-extraction"), 32) == 32  # type: ignore[arg-type]


def test_calibration_runs_in_batches_of_that_size(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = with_masks(model, [(f"the quick brown fox {number}",) for number in range(20)])
    monkeypatch.setattr(calibration, "batch_size", lambda model, most: 3)
    found = list(calibration.batches(model, texts))
    assert [len(text.mask) for text in found] == [3, 3, 3, 3, 3, 3, 2]
    assert sorted(np.concatenate([text.order for text in found]).tolist()) == list(range(20))
