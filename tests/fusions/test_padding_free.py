"""Packed tokens: the same answers on every mask there can be, zeros on padding, and a reason where it cannot be done."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from compiler.backends import BACKENDS
from compiler.fusions import Declined
from compiler.fusions.padding_free import GROUPS, Packed, PaddingFree, rewrite
from compiler.types import Artifact, File, Model, Runner, Target
from tests.backends.conftest import export, load_checkpoint
from tests.zoo import ZOO, save_checkpoint

# Those whose attention is their own code, outside of transformers' attention interface.
DECLINED = {"mpnet", "deberta-v2"}
LENGTH = 23


def masks() -> dict[str, torch.Tensor]:
    """Batches of all kinds, int64 `[batch, 23]`."""
    column = torch.arange(LENGTH)
    right = torch.stack([column < length for length in (3, 23, 11, 1, 17, 8, 20)])
    holes = (torch.arange(5)[:, None] * 7 + column[None] * 3) % 4 != 0
    return {
        "right": right.long(),
        "left": right.flip(1).long(),
        "holes": holes.long(),
        "one row": right[2:3].long(),
        "fewer rows than groups": right[:2].long(),
        "no padding": torch.ones(3, LENGTH, dtype=torch.int64),
        "one token each": (column[None] == torch.tensor([[0], [5], [22]])).long(),
        "a row of padding": torch.stack([column < 9, column < 0, column < 4]).long(),
    }


@pytest.fixture(scope="module", params=sorted(set(ZOO) - DECLINED))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_checkpoint(save_checkpoint(tmp_path_factory.mktemp(request.param), request.param))


def opened(model: Model, format: str, out: Path) -> Runner:
    """An fp32 artifact of the model, from its file."""
    backend = BACKENDS[format]
    export(backend, out, model, Target(format, "fp32"))
    files = tuple(File(path, "", 0) for path in backend.files("fp32"))
    return backend.open(out, Artifact(format, "fp32", files, backend.runtime("fp32"), key=""), 1)


@pytest.fixture(scope="module", params=sorted(BACKENDS))
def runner(request: pytest.FixtureRequest, model: Model, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return opened(model, request.param, tmp_path_factory.mktemp("artifact"))


def inputs(model: Model, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(6, 200, mask.shape, generator=generator)
    pad = model.tokenizer.pad_token_id
    given = {"input_ids": torch.where(mask > 0, ids, pad), "attention_mask": mask, "token_type_ids": mask * 0}
    return {name: given[name] for name in model.inputs}


@pytest.mark.parametrize("kind", sorted(masks()))
def test_file_answers_as_the_original(model: Model, runner: Runner, kind: str) -> None:
    mask = masks()[kind]
    given = inputs(model, mask)
    with torch.inference_mode():
        expected = model.module(**given)["last_hidden_state"]
    actual = torch.from_numpy(runner({name: value.numpy() for name, value in given.items()})["last_hidden_state"])
    assert torch.isfinite(actual).all()
    scale = max(1.0, float(expected.abs().max()))
    assert float((actual - expected)[mask > 0].abs().max()) < 1e-5 * scale
    assert not actual[mask == 0].any()


def test_nothing_but_padding(model: Model, runner: Runner) -> None:
    given = inputs(model, torch.zeros(2, LENGTH, dtype=torch.int64))
    actual = runner({name: value.numpy() for name, value in given.items()})["last_hidden_state"]
    assert actual.shape[:2] == (2, LENGTH)
    assert not actual.any()


def test_model_is_as_before(model: Model) -> None:
    given: Mapping[str, torch.Tensor] = inputs(model, masks()["right"])
    with torch.inference_mode():
        before = model.module(**given)["last_hidden_state"]
        found = rewrite(model.module, model.example)
        assert isinstance(found, PaddingFree)
        with found.applied(model.module):
            model.module(**given)
        with pytest.raises(KeyError), found.applied(model.module):
            raise KeyError
        assert torch.equal(model.module(**given)["last_hidden_state"], before)


@pytest.mark.parametrize("format", sorted(BACKENDS))
@pytest.mark.parametrize("task", ["fill-mask", "question-answering", "text-classification"])
def test_heads(format: str, task: str, tmp_path: Path) -> None:
    """A head that answers for each token runs on the packed ones too; one that answers for the text sees it whole."""
    model = load_checkpoint(save_checkpoint(tmp_path / "bert", "bert", task), task)
    found = rewrite(model.module, model.example)
    assert isinstance(found, PaddingFree)
    assert found.whole == (task != "text-classification")
    run = opened(model, format, tmp_path / "artifact")
    for kind in ("right", "left", "no padding", "one row"):
        mask = masks()[kind]
        given = inputs(model, mask)
        with torch.inference_mode():
            expected = model.module(**given)
        actual = run({name: value.numpy() for name, value in given.items()})
        for name, value in expected.items():
            answer = torch.from_numpy(actual[name])
            assert answer.shape == value.shape
            by_token = value.shape[:2] == mask.shape
            # A text's answer is its first token's, which padding on the left makes a padded one.
            counts = mask > 0 if by_token else mask[:, 0] > 0
            assert float((answer - value)[counts].abs().max()) < 1e-5 * max(1.0, float(value.abs().max()))
            assert not by_token or not answer[mask == 0].any()


@pytest.mark.parametrize("format", sorted(BACKENDS))
def test_odd_sizes(format: str, tmp_path: Path) -> None:
    """No size here is a multiple of what kernels like."""
    sizes: dict[str, Any] = {"hidden_size": 33, "num_attention_heads": 3, "intermediate_size": 37, "num_hidden_layers": 1}
    model = load_checkpoint(save_checkpoint(tmp_path / "bert", "bert", **sizes))
    run = opened(model, format, tmp_path / "artifact")
    for kind in ("right", "holes", "no padding"):
        mask = masks()[kind]
        given = inputs(model, mask)
        with torch.inference_mode():
            expected = model.module(**given)["last_hidden_state"]
        actual = torch.from_numpy(run({name: value.numpy() for name, value in given.items()})["last_hidden_state"])
        assert float((actual - expected)[mask > 0].abs().max()) < 1e-5 * max(1.0, float(expected.abs().max()))


def test_a_mask_that_is_left_out_is_one_of_ones(tmp_path: Path) -> None:
    """In TorchScript, as in the original. The other runtimes want every input that a file declares, and say so."""
    model = load_checkpoint(save_checkpoint(tmp_path / "bert", "bert"))
    ids = inputs(model, masks()["no padding"])["input_ids"]
    with torch.inference_mode():
        expected = model.module(input_ids=ids)["last_hidden_state"]
    for format in sorted(BACKENDS):
        run = opened(model, format, tmp_path / format)
        if format == "torchscript":
            assert torch.allclose(torch.from_numpy(run({"input_ids": ids.numpy()})["last_hidden_state"]), expected, atol=1e-5)
        else:
            with pytest.raises((ValueError, RuntimeError), match=r"(?i)attention_mask|input"):
                run({"input_ids": ids.numpy()})


@pytest.mark.parametrize("name", sorted(ZOO))
def test_every_architecture_is_packed_or_says_why(name: str, tmp_path: Path) -> None:
    model = load_checkpoint(save_checkpoint(tmp_path / name, name))
    found = rewrite(model.module, model.example)
    if name in DECLINED:
        assert found == Declined("its attention does not go through transformers' attention interface")
    else:
        assert isinstance(found, PaddingFree)
        assert found.count == (ZOO[name].config.get("num_hidden_layers") or ZOO[name].config["n_layers"])


def test_a_model_whose_answers_change_is_declined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rewritten model is held against the original before it is used: here positions are all wrong."""
    model = load_checkpoint(save_checkpoint(tmp_path / "bert", "bert"))
    monkeypatch.setattr(Packed, "columns", lambda self: self.column[None] * 0)
    found = rewrite(model.module, model.example)
    assert isinstance(found, Declined)
    assert "differs by" in found.reason


def test_layout_brings_every_token_back() -> None:
    for mask in masks().values():
        layout = Packed(mask)
        values = torch.arange(mask.numel()).reshape(mask.shape) + 1
        again = layout.unpack(layout.pack(values)[..., None].float())[..., 0]
        assert torch.equal(again, (values * mask).float())
        assert len(layout.groups) == GROUPS
        assert sum(len(back) for _, _, back in layout.groups) == int(mask.sum())
