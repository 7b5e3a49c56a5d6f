"""The release's tokenizer gives the very tokens that transformers gives, by whatever way it reads them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import compiler
from compiler.errors import ReleaseError
from compiler.pipelines import tokenizer
from compiler.runtime import CompiledModel
from tests.releases import SHORT, release_of

pytestmark = pytest.mark.usefixtures("plain_torchscript")

LOWER = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


@pytest.fixture
def model(releases: Path, tmp_path: Path) -> CompiledModel:
    """A model over a copy of its tokenizer's files, to change."""
    opened = compiler.load(release_of(releases, "classes"))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(opened.folder / name, tmp_path / name)
    return CompiledModel(tmp_path, opened.manifest, opened._run, opened.artifact, "")


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "by_transformers"),
    [
        ({}, False),
        ({"tokenizer_class": "BertTokenizer"}, False),
        ({"tokenizer_class": "BertTokenizerFast", "do_lower_case": False}, True),
        ({"tokenizer_class": "BertTokenizer", "strip_accents": False}, True),
    ],
)
def test_tokens_as_transformers(
    model: CompiledModel, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], by_transformers: bool
) -> None:
    """transformers builds a BertTokenizer's normalizer from tokenizer_config.json, and not from tokenizer.json."""
    from transformers import AutoTokenizer

    change(model.folder / "tokenizer_config.json", **changes)
    asked: list[Path] = []
    original = tokenizer._by_transformers

    def spying(folder: Path) -> Any:
        asked.append(folder)
        return original(folder)

    monkeypatch.setattr(tokenizer, "_by_transformers", spying)
    ours = tokenizer.read(model)
    theirs = AutoTokenizer.from_pretrained(model.folder)
    texts = [*SHORT, "ÉCOLE Größe"]
    assert [encoding.ids for encoding in ours.encode([(text,) for text in texts])] == theirs(texts)["input_ids"]
    pairs = ours.encode([(text, "tea") for text in texts])
    assert [encoding.type_ids for encoding in pairs] == theirs(texts, ["tea"] * len(texts))["token_type_ids"]
    assert bool(asked) == by_transformers


def test_a_rebuilt_tokenizer_is_told() -> None:
    def told(stored: dict[str, Any], **config: Any) -> str:
        return tokenizer._rebuilt(stored, config)

    assert told({"normalizer": LOWER}) == ""
    assert "lowercase is True, tokenizer_config.json False" in told({"normalizer": LOWER}, do_lower_case=False)
    assert told({"normalizer": LOWER}, do_lower_case=False, tokenizer_class="PreTrainedTokenizerFast") == ""
    assert told({"pre_tokenizer": BYTES}) == ""
    assert "add_prefix_space" in told({"pre_tokenizer": BYTES}, add_prefix_space=True)


def test_without_tokenizer_json(model: CompiledModel) -> None:
    """A vocabulary alone: transformers builds the tokenizer. Nothing at all: an error."""
    stored = json.loads((model.folder / "tokenizer.json").read_text())
    words = sorted(stored["model"]["vocab"], key=lambda word: stored["model"]["vocab"][word])
    (model.folder / "vocab.txt").write_text("\n".join(words) + "\n")
    change(model.folder / "tokenizer_config.json", tokenizer_class="BertTokenizer")
    with_json = tokenizer.read(model)
    (model.folder / "tokenizer.json").unlink()
    without = tokenizer.read(model)
    texts = [(text,) for text in SHORT]
    assert [one.ids for one in without.encode(texts)] == [one.ids for one in with_json.encode(texts)]
    for name in ("vocab.txt", "tokenizer_config.json"):
        (model.folder / name).unlink()
    with pytest.raises(ReleaseError, match="the release has no tokenizer"):
        compiler.pipeline("text-classification", model)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged_files(model: CompiledModel, name: str) -> None:
    (model.folder / name).write_text("{")
    with pytest.raises(ReleaseError, match=name):
        tokenizer.read(model)


def test_special_tokens_and_limits(model: CompiledModel) -> None:
    assert tokenizer.read(model).specials == {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
    assert tokenizer.read(model).limit == 64
    (model.folder / "tokenizer_config.json").write_text('{"model_max_length": 20, "mask_token": {"content": "[UNK]"}}')
    read = tokenizer.read(model)
    assert (read.limit, read.specials["mask"], read.specials["cls"]) == (20, 1, 2)


def test_padding_on_either_side(model: CompiledModel) -> None:
    change(model.folder / "tokenizer_config.json", padding_side="left")
    left = compiler.pipeline("text-classification", model, top_k=None)
    items, _ = left.kind.items((SHORT[:8],), {})
    inputs = left.kind.collate(left, [features[0] for features in left.kind.features(left, items, left.options)])
    assert (inputs["attention_mask"][:, -1] == 1).all()
    assert inputs["attention_mask"].min() == 0
    assert (inputs["input_ids"][inputs["attention_mask"] == 0] == 0).all()


def test_spaces_are_cleaned_up_as_transformers_does(model: CompiledModel) -> None:
    from transformers import AutoTokenizer

    change(model.folder / "tokenizer_config.json", clean_up_tokenization_spaces=True)
    theirs, ours = AutoTokenizer.from_pretrained(model.folder), tokenizer.read(model)
    for text in SHORT:
        ids = theirs(text)["input_ids"]
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)
