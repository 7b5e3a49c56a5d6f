"""Packed tokens: the same answers on every mask there can be, zeros on padding, and a reason where it cannot be done."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from compiler.backends import BACKENDS
from compiler.fusions import Declined
from compiler.fusions.padding_free import CHANGES, GROUPS, Packed, PaddingFree, rewrite
from compiler.types import Artifact, File, Model, Runner, Target
from tests.backends.conftest import export, load_checkpoint
from tests.exports import Exports
from tests.zoo import ENCODERS, ZOO, save_checkpoint

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


@pytest.fixture(scope="module", params=sorted(set(ENCODERS) - DECLINED))
def exported(request: pytest.FixtureRequest, exports: Callable[..., Exports]) -> Exports:
    found: Exports = exports(request.param)
    return found


@pytest.fixture(scope="module")
def model(exported: Exports) -> Model:
    return load_checkpoint(exported.folder / "checkpoint")


def opened(model: Model, format: str, out: Path) -> Runner:
    """An fp32 artifact of the model, from its file."""
    backend = BACKENDS[format]
    export(backend, out, model, Target(format, "fp32"))
    files = tuple(File(path, "", 0) for path in backend.files("fp32"))
    return backend.open(out, Artifact(format, "fp32", files, backend.runtime("fp32"), key=""), 1)


def shipped(exported: Exports, format: str) -> Runner:
    """The fp32 artifact of a checkpoint of the zoo, from its file."""
    out, artifact = exported.export(Target(format, "fp32"))
    return BACKENDS[format].open(out, artifact, 1)


@pytest.fixture(scope="module", params=sorted(BACKENDS))
def runner(request: pytest.FixtureRequest, exported: Exports) -> Runner:
    return shipped(exported, request.param)


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
def test_heads(format: str, task: str, exports: Callable[..., Exports]) -> None:
    """A head that answers for each token runs on the packed ones too; one that answers for the text sees it whole."""
    exported = exports("bert", task)
    model = load_checkpoint(exported.folder / "checkpoint", task)
    found = rewrite(model.module, model.example)
    assert isinstance(found, PaddingFree)
    assert found.whole == (task != "text-classification")
    run = shipped(exported, format)
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


def test_a_mask_that_is_left_out_is_one_of_ones(exports: Callable[..., Exports]) -> None:
    """In TorchScript, as in the original. The other runtimes want every input that a file declares, and say so."""
    exported = exports("bert")
    model = load_checkpoint(exported.folder / "checkpoint")
    ids = inputs(model, masks()["no padding"])["input_ids"]
    with torch.inference_mode():
        expected = model.module(input_ids=ids)["last_hidden_state"]
    for format in sorted(BACKENDS):
        run = shipped(exported, format)
        if format == "torchscript":
            assert torch.allclose(torch.from_numpy(run({"input_ids": ids.numpy()})["last_hidden_state"]), expected, atol=1e-5)
        else:
            with pytest.raises((ValueError, RuntimeError), match=r"(?i)attention_mask|input"):
                run({"input_ids": ids.numpy()})


@pytest.mark.parametrize("format", sorted(BACKENDS))
def test_a_window_longer_than_the_example(format: str, tmp_path: Path) -> None:
    """A batch without padding is masked all the same where a layer sees only so far."""
    sizes: dict[str, Any] = {"local_attention": 40, "max_position_embeddings": 128}
    model = load_checkpoint(save_checkpoint(tmp_path / "modernbert", "modernbert", **sizes))
    assert model.example["input_ids"].shape[1] < 20
    run = opened(model, format, tmp_path / "artifact")
    ids = torch.randint(6, 200, (2, 100), generator=torch.Generator().manual_seed(3))
    for padded in (False, True):
        mask = torch.ones_like(ids)
        mask[1, 80:] -= int(padded)
        given = {"input_ids": ids, "attention_mask": mask}
        with torch.inference_mode():
            expected = model.module(**given)["last_hidden_state"]
        actual = torch.from_numpy(run({name: value.numpy() for name, value in given.items()})["last_hidden_state"])
        assert float((actual - expected)[mask > 0].abs().max()) < 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("format", sorted(BACKENDS))
def test_texts_of_nothing_but_padding_answer_as_such_a_row_does(format: str, exports: Callable[..., Exports]) -> None:
    exported = exports("bert", "text-classification")
    model = load_checkpoint(exported.folder / "checkpoint", "text-classification")
    run = shipped(exported, format)
    mask = torch.zeros(2, LENGTH, dtype=torch.int64)
    alone = run({name: value.numpy() for name, value in inputs(model, mask).items()})["logits"]
    mask[1, :9] = 1
    beside = run({name: value.numpy() for name, value in inputs(model, mask).items()})["logits"]
    assert alone.shape == beside.shape
    assert abs(alone - beside[:1]).max() < 1e-6


@pytest.mark.parametrize("name", sorted(ENCODERS))
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


class Head(torch.nn.Module):
    """A head of somebody's own over a BERT: `answer` is given the encoder, the ids and the mask."""

    def __init__(self, model: Model, answer: Any) -> None:
        super().__init__()
        self.base_model: Any = model.module
        self.config = self.base_model.config
        self.get_input_embeddings = self.base_model.get_input_embeddings
        self.answer = answer

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        return {"logits": self.answer(self.base_model, input_ids, attention_mask)}


def _masked_mean(base: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    hidden: torch.Tensor = base(input_ids=ids, attention_mask=mask).last_hidden_state
    return (hidden * mask[..., None]).sum(1)[:, :16] / mask.sum(1, keepdim=True)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda base, ids, mask: base(input_ids=ids, attention_mask=mask).last_hidden_state.mean(1)[:, :24], "differs by"),
        (lambda base, ids, mask: base(input_ids=ids, attention_mask=mask).last_hidden_state[:, -1], "differs by"),
        (lambda base, ids, mask: base(input_ids=ids, attention_mask=mask * (ids != 7)).last_hidden_state, "another attention"),
        (lambda base, ids, mask: base.embeddings(ids), "does not go through|does not call"),
        (_masked_mean, None),
    ],
    ids=["mean of all places", "last place", "another mask", "no encoder", "mean of real tokens"],
)
def test_a_head_is_held_against_the_original_too(answer: Any, reason: str | None, tmp_path: Path) -> None:
    """24 is the length of the batch that it is held against: a width of a text's answer, and no number of tokens."""
    head = Head(load_checkpoint(save_checkpoint(tmp_path / "bert", "bert")), answer)
    found = rewrite(head, dict(load_checkpoint(tmp_path / "bert").example))
    if reason is None:
        assert isinstance(found, PaddingFree)
        assert not found.whole
    else:
        assert isinstance(found, Declined)
        assert re.search(reason, found.reason)


def test_padding_in_front_of_texts_that_answer_by_their_first_token(tmp_path: Path) -> None:
    model = load_checkpoint(save_checkpoint(tmp_path / "bert", "bert", "text-classification"), "text-classification")
    assert isinstance(rewrite(model.module, model.example, left=False), PaddingFree)
    found = rewrite(model.module, model.example, left=True)
    assert isinstance(found, Declined)
    assert "padded on the left" in found.reason
    tokens = load_checkpoint(save_checkpoint(tmp_path / "tokens", "bert", "token-classification"), "token-classification")
    assert isinstance(rewrite(tokens.module, tokens.example, left=True), PaddingFree)


def test_a_model_that_makes_more_of_a_special_token_is_declined() -> None:
    """ESM scales a text's embeddings by the share of its tokens that are masked, whatever the batch's shape is."""
    from transformers import EsmConfig, EsmModel

    torch.manual_seed(0)
    config = EsmConfig(
        vocab_size=300, mask_token_id=4, pad_token_id=1, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=64, token_dropout=True, position_embedding_type="rotary",
        initializer_range=0.2,
    )  # fmt: skip
    model = EsmModel(config).eval()
    example = {name: torch.full((2, 8), 5) for name in ("input_ids", "attention_mask")}
    found = rewrite(model, example, (1, 4))
    assert isinstance(found, Declined)
    assert "differs by" in found.reason


def test_masks_inside_of_groups_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layout that ignores which keys of a group are there is found out."""
    model = load_checkpoint(save_checkpoint(tmp_path / "bert", "bert"))
    plain: Any = torch.nn.functional.scaled_dot_product_attention

    def unmasked(*args: Any, attn_mask: Any = None, **kwargs: Any) -> Any:
        masks_a_group = attn_mask is not None and attn_mask.dtype == torch.bool and args[0].shape[0] == 3
        return plain(*args, attn_mask=None if masks_a_group else attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", unmasked)
    found = rewrite(model.module, model.example)
    assert isinstance(found, Declined)
    assert "differs by" in found.reason


@pytest.mark.parametrize("name", CHANGES)
def test_attention_that_takes_more_is_declined(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.bert import modeling_bert

    model = load_checkpoint(save_checkpoint(tmp_path / "bert", "bert"))
    base: Any = model.module
    base.set_attn_implementation("eager")  # torch's own kernel refuses some of them by itself
    before = modeling_bert.BertSelfAttention.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return before(self, *args, **{**kwargs, name: 50.0})

    monkeypatch.setattr(modeling_bert.BertSelfAttention, "forward", forward)
    found = rewrite(model.module, model.example)
    assert isinstance(found, Declined)
    assert f"attention with {name}" in found.reason


def test_a_model_that_cannot_take_the_attention_is_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_checkpoint(save_checkpoint(tmp_path / "bert", "bert"))
    base: Any = model.module.base_model
    before = base.config._attn_implementation
    set_attention = type(base).set_attn_implementation

    def fails(self: Any, name: str) -> None:
        set_attention(self, name)
        raise AssertionError("no")

    monkeypatch.setattr(type(base), "set_attn_implementation", fails)
    found = rewrite(model.module, model.example)
    assert isinstance(found, Declined)
    assert "AssertionError: no" in found.reason
    assert base.config._attn_implementation == before
    assert "forward" not in vars(base)


def test_masks_that_a_file_cannot_take_are_told(exports: Callable[..., Exports]) -> None:
    """As the original takes it, every value but 0 is a real token; a mask of another shape is refused, not misread."""
    exported = exports("bert")
    mask = masks()["right"]
    given = {name: value.numpy() for name, value in inputs(load_checkpoint(exported.folder / "checkpoint"), mask).items()}
    for format in sorted(BACKENDS):
        run = shipped(exported, format)
        expected = run(given)["last_hidden_state"]
        assert (run({**given, "attention_mask": -given["attention_mask"]})["last_hidden_state"] == expected).all()
    run = shipped(exported, "torchscript")
    for other in (given["attention_mask"][:1], given["attention_mask"][:, None, None]):
        with pytest.raises(Exception, match=r"attention_mask: must be \[batch, sequence\]"):
            run({**given, "attention_mask": other})


def test_layout_brings_every_token_back() -> None:
    for mask in masks().values():
        layout = Packed(mask)
        values = torch.arange(mask.numel()).reshape(mask.shape) + 1
        again = layout.unpack(layout.pack(values)[..., None].float())[..., 0]
        assert torch.equal(again, (values * mask).float())
        assert len(layout.groups) == GROUPS
        assert sum(len(back) for _, _, back in layout.groups) == int(mask.sum())
