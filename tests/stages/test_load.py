"""Checkpoints that load, whole and as they are, and the many that must not: each refusal is one line that names the thing.

transformers fills what is missing at random, reads what lies beside, and runs what is offered; none of that may happen.
"""

from __future__ import annotations

import functools
import json
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import compiler.stages.load
from compiler.config import ModelSpec, OnnxTargets, Targets
from compiler.errors import CompileError, ConfigError, SourceError, StageError
from compiler.samples import read_cases
from compiler.sources import resolve
from compiler.stages.load import (
    OWN_CODE,
    POOLER,
    REFERENCE,
    SAMPLES,
    for_transformers_4,
    load,
    reference,
    reference_again,
    run_eager,
    signature,
)
from compiler.types import Model, Snapshot
from tests.zoo import ENCODERS, ZOO, save_checkpoint, save_tokenizer

FEATURES, CLASSES, MASKS = "feature-extraction", "text-classification", "fill-mask"
HEADS = (CLASSES, MASKS, "token-classification", "question-answering")
WITH_POOLER = {"bert", "roberta", "xlm-roberta", "albert", "mpnet"}
WEIGHTS = "model.safetensors"
TEXTS = [("the quick brown fox jumps over the lazy dog",), ("hello",), ("a second line of text",)]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A checkpoint of the zoo, saved once. Read only."""

    @functools.cache
    def save(name: str, task: str = FEATURES) -> Path:
        return save_checkpoint(tmp_path_factory.mktemp(f"{name}-{task}"), name, task)

    return save


@pytest.fixture
def checkpoint(tmp_path: Path, bert: Path) -> Path:
    """A BERT encoder to change."""
    return Path(shutil.copytree(bert, tmp_path / "checkpoint"))


def found(source: Path, **options: Any) -> Snapshot:
    spec = ModelSpec(
        name="tiny",
        release="1.0.0",
        source=f"path:{source}",
        targets=Targets(onnx=OnnxTargets(precisions=("fp32",))),
        **options,
    )
    return resolve(spec, Path())


def loaded(source: Path, task: str = FEATURES, **options: Any) -> Model:
    return load(found(source, **options), task, **options)


def one_line(error: BaseException, *words: str) -> str:
    message = str(error)
    assert len(message.splitlines()) == 1, message
    assert len(message) < 500, message
    assert [word for word in words if word not in message] == [], message
    assert "/compile-" not in message, message  # the folder of links means nothing to a user
    return message


def refused(source: Path, *words: str, task: str = FEATURES, **options: Any) -> str:
    """The one line that finding or loading a checkpoint is refused with."""
    with pytest.raises(CompileError) as caught:
        loaded(source, task, **options)
    assert type(caught.value) is SourceError
    return one_line(caught.value, *words)


def change_config(folder: Path, **changes: Any) -> None:
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value != "gone"}))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def sample(model: Model, text: str = "hello world") -> dict[str, Any]:
    encoded = model.tokenizer(text, return_tensors="np")
    return {name: encoded[name].astype(np.int64) if name in encoded else np.zeros((1, 4), np.int64) for name in model.inputs}


def same_answers(one: Model, other: Model) -> None:
    """The same weights, and outputs that differ by no more than where in memory the weights are."""
    weights = dict(other.module.named_parameters())
    assert all(torch.equal(value, weights.pop(name)) for name, value in one.module.named_parameters())
    assert not weights
    inputs = sample(one)
    answers, others = run_eager(one, inputs), run_eager(other, inputs)
    assert set(answers) == set(others)
    for name, value in answers.items():
        assert np.allclose(value, others[name], rtol=0, atol=1e-5), name


def small_reference(
    out: Path, source: Path, task: str = FEATURES, sequences: tuple[int, ...] | None = (8,), **options: Any
) -> dict[str, Any]:
    out.mkdir(exist_ok=True)
    return reference(out, found(source, **options), task, TEXTS, (1, 2), sequences, options)


class TestMissingWeights:
    @pytest.mark.parametrize("task", HEADS)
    @pytest.mark.parametrize("name", ENCODERS)
    def test_a_head_that_the_checkpoint_lacks(self, saved: Callable[..., Path], name: str, task: str) -> None:
        message = refused(saved(name), "missing from the checkpoint", task, task=task)
        heads = ("classifier", "qa_outputs", "cls.", "lm_head", "predictions", "vocab", "head", "decoder")
        assert any(word in message for word in heads), message

    @pytest.mark.parametrize("name", ENCODERS)
    def test_one_weight_of_an_inner_layer(self, saved: Callable[..., Path], tmp_path: Path, name: str) -> None:
        folder = Path(shutil.copytree(saved(name), tmp_path / "copy"))
        lost = next(key for key in sorted(load_file(folder / WEIGHTS)) if "layer" in key and "norm" not in key.lower())
        change_weights(folder, lambda tensors: tensors.pop(lost))
        refused(folder, lost, "1 weight")

    def test_a_bias_alone(self, checkpoint: Path) -> None:
        change_weights(checkpoint, lambda tensors: tensors.pop("encoder.layer.1.output.LayerNorm.bias"))
        refused(checkpoint, "encoder.layer.1.output.LayerNorm.bias")

    def test_one_that_a_classifier_lacks(self, saved: Callable[..., Path], tmp_path: Path) -> None:
        folder = Path(shutil.copytree(saved("bert", CLASSES), tmp_path / "copy"))
        change_weights(folder, lambda tensors: tensors.pop("classifier.bias"))
        refused(folder, "classifier.bias", task=CLASSES)

    def test_the_pooler_that_a_classifier_needs(self, saved: Callable[..., Path], tmp_path: Path) -> None:
        folder = Path(shutil.copytree(saved("bert", CLASSES), tmp_path / "copy"))

        def strip(tensors: dict[str, torch.Tensor]) -> None:
            for name in [name for name in tensors if "pooler" in name]:
                del tensors[name]

        change_weights(folder, strip)
        refused(folder, "pooler.dense.weight", task=CLASSES)

    def test_names_of_another_model(self, checkpoint: Path) -> None:
        tensors = load_file(checkpoint / WEIGHTS)
        save_file({f"other.{name}": value for name, value in tensors.items()}, checkpoint / WEIGHTS, metadata={"format": "pt"})
        assert "more" in refused(checkpoint, "missing from the checkpoint")

    def test_more_layers_than_the_checkpoint_has(self, checkpoint: Path) -> None:
        change_config(checkpoint, num_hidden_layers=3)
        refused(checkpoint, "encoder.layer.2.")

    def test_a_head_of_another_task(self, saved: Callable[..., Path]) -> None:
        refused(saved("bert", CLASSES), "qa_outputs", task="question-answering")

    @pytest.mark.parametrize("key", ["encoder.layer.0.attention.self.query.weight", "embeddings.word_embeddings.weight"])
    def test_a_weight_of_another_shape(self, checkpoint: Path, key: str) -> None:
        change_weights(checkpoint, lambda tensors: tensors.update({key: tensors[key][:, :-1].contiguous()}))
        shape = list(load_file(checkpoint / WEIGHTS)[key].shape)
        refused(checkpoint, f"another shape than config.json says: {key} {shape}, not [{shape[0]}, {shape[1] + 1}]")

    def test_sizes_of_another_model(self, checkpoint: Path) -> None:
        change_config(checkpoint, intermediate_size=64)
        refused(checkpoint, "intermediate.dense", "another shape")

    def test_number_of_classes_of_another_model(self, saved: Callable[..., Path], tmp_path: Path) -> None:
        folder = Path(shutil.copytree(saved("bert", CLASSES), tmp_path / "copy"))
        labels = {str(number): f"L{number}" for number in range(5)}
        change_config(folder, id2label=labels, label2id={value: int(key) for key, value in labels.items()})
        refused(folder, "classifier", "another shape", task=CLASSES)


class TestPooler:
    @pytest.mark.parametrize("name", ENCODERS)
    def test_features_of_a_masked_language_model_go_without(self, saved: Callable[..., Path], name: str) -> None:
        model = loaded(saved(name, MASKS))
        assert model.left_out == ((POOLER,) if name in WITH_POOLER else ())
        assert [tensor.name for tensor in signature(model).outputs] == ["last_hidden_state"]

    @pytest.mark.parametrize("name", ["bert", "roberta"])
    def test_it_is_recorded(self, saved: Callable[..., Path], tmp_path: Path, name: str) -> None:
        known = small_reference(tmp_path / "out", saved(name, MASKS))
        assert known["left_out"] == [POOLER]
        assert [output["name"] for output in known["signature"]["outputs"]] == ["last_hidden_state"]

    @pytest.mark.parametrize("name", sorted(WITH_POOLER))
    def test_one_that_is_there_is_kept(self, saved: Callable[..., Path], name: str) -> None:
        model = loaded(saved(name))
        assert model.left_out == ()
        assert "pooler_output" in [tensor.name for tensor in signature(model).outputs]

    @pytest.mark.parametrize("part", ["weight", "bias"])
    def test_half_a_pooler(self, checkpoint: Path, part: str) -> None:
        change_weights(checkpoint, lambda tensors: tensors.pop(f"pooler.dense.{part}"))
        refused(checkpoint, f"pooler.dense.{part}")

    def test_no_pooler_and_a_layer_lost(self, saved: Callable[..., Path], tmp_path: Path) -> None:
        folder = Path(shutil.copytree(saved("bert", MASKS), tmp_path / "copy"))
        lost = "bert.encoder.layer.1.output.dense.weight"
        change_weights(folder, lambda tensors: tensors.pop(lost))
        refused(folder, lost.removeprefix("bert."))


@pytest.mark.parametrize("task", [FEATURES, *HEADS])
@pytest.mark.parametrize("name", ENCODERS)
def test_every_weight_is_the_checkpoints(saved: Callable[..., Path], name: str, task: str) -> None:
    """Nothing is drawn at random, and nothing depends on the random state."""
    torch.manual_seed(1)
    one = loaded(saved(name, task), task)
    torch.manual_seed(2)
    other = loaded(saved(name, task), task)
    parameters = dict(other.module.named_parameters())
    assert all(torch.equal(value, parameters[key]) for key, value in one.module.named_parameters())
    assert {value.dtype for value in parameters.values()} == {torch.float32}
    assert not one.module.training
    assert not any(value.requires_grad for value in parameters.values())


class TestFiles:
    TWO, SIXTEEN = (bytes([length]) + b"\0" * 7 for length in (2, 16))  # a header's length

    @pytest.mark.parametrize("length", [0, 4, 100, -1, -10_000])
    def test_weights_cut_short(self, checkpoint: Path, length: int) -> None:
        content = (checkpoint / WEIGHTS).read_bytes()
        (checkpoint / WEIGHTS).write_bytes(content[:length])
        refused(checkpoint, WEIGHTS, "damaged or cut short", "fetch it again")

    @pytest.mark.parametrize(
        "content",
        [b"\xff" * 64, SIXTEEN + b"not json at all!", TWO + b"{}" + b"x", TWO + b"[]"],
        ids=["huge header", "no json", "bytes behind", "list"],
    )
    def test_weights_with_a_garbage_header(self, checkpoint: Path, content: bytes) -> None:
        (checkpoint / WEIGHTS).write_bytes(content)
        refused(checkpoint, WEIGHTS, "damaged or cut short")

    def test_weights_longer_than_their_header_says(self, checkpoint: Path) -> None:
        with open(checkpoint / WEIGHTS, "ab") as stream:
            stream.write(b"x" * 16)
        refused(checkpoint, WEIGHTS)

    def test_weights_without_metadata(self, checkpoint: Path) -> None:
        """Some writers leave out what framework the tensors are of; the tensors are as good."""
        save_file(load_file(checkpoint / WEIGHTS), checkpoint / WEIGHTS)
        loaded(checkpoint)

    @pytest.mark.parametrize("content", ["[]", "3", '"bert"', "null", "", "{", "{'model_type': 'bert'}", "[" * 100_000, "\0"])
    def test_config_that_is_no_object(self, checkpoint: Path, content: str) -> None:
        (checkpoint / "config.json").write_text(content)
        refused(checkpoint, "config")

    def test_config_that_is_no_text(self, checkpoint: Path) -> None:
        (checkpoint / "config.json").write_bytes(b'{"model_type": "\xff"}')
        refused(checkpoint, "config")

    def test_unknown_model_type(self, checkpoint: Path) -> None:
        change_config(checkpoint, model_type="bort-9000")
        refused(checkpoint, "config.json", "bort-9000")

    @pytest.mark.parametrize("value", ["gone", None, "", 3, ["bert"], {"bert": 1}])
    def test_no_usable_model_type(self, checkpoint: Path, value: object) -> None:
        change_config(checkpoint, model_type=value)
        refused(checkpoint, "config.json")

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("hidden_size", 0),
            ("hidden_size", -32),
            ("hidden_size", "32"),
            ("hidden_size", 33),
            ("hidden_size", None),
            ("hidden_size", [32]),
            ("num_attention_heads", 0),
            ("num_attention_heads", 5),
            ("num_hidden_layers", -1),
            ("num_hidden_layers", "two"),
            ("vocab_size", -5),
            ("vocab_size", 1e30),
            ("max_position_embeddings", 0),
            ("max_position_embeddings", "many"),
            ("intermediate_size", 10**15),
            ("hidden_act", "no such function"),
            ("hidden_act", 3),
            ("layer_norm_eps", "small"),
            ("pad_token_id", 10**6),
            ("hidden_dropout_prob", "x"),
        ],
    )
    def test_sizes_that_are_nonsense(self, checkpoint: Path, key: str, value: object) -> None:
        change_config(checkpoint, **{key: value})
        refused(checkpoint)

    @pytest.mark.parametrize("bits", [4, "x"])
    def test_a_quantized_checkpoint(self, checkpoint: Path, bits: object) -> None:
        change_config(checkpoint, quantization_config={"quant_method": "gptq", "bits": bits})
        refused(checkpoint, "quant")

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_other_precisions_load_as_fp32(self, checkpoint: Path, dtype: torch.dtype) -> None:
        tensors = {name: value.to(dtype) for name, value in load_file(checkpoint / WEIGHTS).items()}
        save_file(tensors, checkpoint / WEIGHTS, metadata={"format": "pt"})
        change_config(checkpoint, dtype=str(dtype).removeprefix("torch."))
        model = loaded(checkpoint)
        for name, value in model.module.named_parameters():
            assert value.dtype == torch.float32
            assert torch.equal(value, tensors[name].float())
        assert run_eager(model, sample(model))["last_hidden_state"].dtype == np.float32

    def test_shards_give_the_same(self, checkpoint: Path, bert: Path) -> None:
        tensors = load_file(checkpoint / WEIGHTS)
        (checkpoint / WEIGHTS).unlink()
        names = sorted(tensors)
        shards = {f"model-0000{number + 1}-of-00002.safetensors": names[number::2] for number in range(2)}
        for shard, keys in shards.items():
            save_file({key: tensors[key] for key in keys}, checkpoint / shard, metadata={"format": "pt"})
        weight_map = {key: shard for shard, keys in shards.items() for key in keys}
        (checkpoint / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        same_answers(loaded(checkpoint), loaded(bert))
        shard = next(iter(shards))
        (checkpoint / shard).write_bytes((checkpoint / shard).read_bytes()[:-8])
        refused(checkpoint, shard)

    def test_what_lies_beside_is_not_read(self, checkpoint: Path, bert: Path, tmp_path: Path) -> None:
        save_file({"x": torch.zeros(1)}, checkpoint / "adapter_model.safetensors")
        (checkpoint / "other.safetensors").write_bytes(b"garbage")
        (checkpoint / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "elsewhere"}')
        (checkpoint / "modeling_own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
        (checkpoint / "optimizer.pt").write_bytes(b"garbage")
        (checkpoint / "pytorch_model.bin").write_bytes(b"garbage")
        names = {file.path for file in found(checkpoint).files}
        assert names == {file.path for file in found(bert).files}
        same_answers(loaded(checkpoint), loaded(bert))
        assert not (tmp_path / "ran").exists()

    def test_outputs_that_a_config_asks_for(self, checkpoint: Path, bert: Path) -> None:
        change_config(checkpoint, output_hidden_states=True, output_attentions=True, return_dict=False)
        assert signature(loaded(checkpoint)) == signature(loaded(bert))


class TestTokenizer:
    TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")

    def test_none(self, checkpoint: Path) -> None:
        for name in self.TOKENIZER:
            (checkpoint / name).unlink(missing_ok=True)
        refused(checkpoint, "tokenizer", "tokenizer.json", "add it")

    @pytest.mark.parametrize("content", ["", "garbage", "{}", "[]", '{"model": {"type": "WordPiece"}}', "null"])
    def test_garbage(self, checkpoint: Path, content: str) -> None:
        (checkpoint / "tokenizer.json").write_text(content)
        refused(checkpoint, "tokenizer")

    @pytest.mark.parametrize(
        "content", ["", "garbage", "[]", '{"tokenizer_class": "NoSuchTokenizer"}', '{"model_max_length": "x"}']
    )
    def test_garbage_beside_it(self, checkpoint: Path, content: str) -> None:
        """Either it loads, for the file does not matter to it, or it is refused in one line."""
        (checkpoint / "tokenizer_config.json").write_text(content)
        try:
            loaded(checkpoint)
        except SourceError as error:
            one_line(error, "tokenizer")

    def test_ids_beyond_the_embeddings(self, tmp_path: Path) -> None:
        folder = save_checkpoint(tmp_path / "checkpoint", "bert", vocab_size=50)
        with pytest.raises(SourceError) as caught:
            small_reference(tmp_path / "out", folder)
        one_line(caught.value, "50 embeddings", "tokenizer")

    def test_no_mask_token(self, saved: Callable[..., Path], tmp_path: Path) -> None:
        folder = Path(shutil.copytree(saved("bert", MASKS), tmp_path / "copy"))
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "mask_token": None}))
        with pytest.raises(SourceError) as caught:
            small_reference(tmp_path / "out", folder, MASKS)
        one_line(caught.value, "mask token", "fill-mask")

    def test_no_token_to_pad_with(self, checkpoint: Path, tmp_path: Path) -> None:
        path = checkpoint / "tokenizer_config.json"
        settings = {key: None if key.endswith("_token") else value for key, value in json.loads(path.read_text()).items()}
        path.write_text(json.dumps(settings))
        (checkpoint / "special_tokens_map.json").unlink(missing_ok=True)
        with pytest.raises(SourceError) as caught:
            small_reference(tmp_path / "out", checkpoint)
        one_line(caught.value, "pad")


class TestTokenizerForOlderTools:
    def test_what_transformers_5_saved_is_written_under_the_names_of_4(self, checkpoint: Path, tmp_path: Path) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        tokenizer.add_special_tokens({"extra_special_tokens": ["<first>", "<second>"]})
        tokenizer.save_pretrained(checkpoint)
        shutil.copytree(checkpoint, tmp_path / "released")
        saved = json.loads((checkpoint / "tokenizer_config.json").read_text())
        assert (saved["tokenizer_class"], saved["extra_special_tokens"]) == ("TokenizersBackend", ["<first>", "<second>"])
        save_checkpoint(tmp_path / "larger", "bert", vocab_size=len(tokenizer))
        for name in ("config.json", WEIGHTS):
            shutil.copy(tmp_path / "larger" / name, checkpoint / name)
        known = small_reference(tmp_path / "out", checkpoint)
        assert known["support"] == ["support/tokenizer_config.json"]
        written = json.loads((tmp_path / "out/support/tokenizer_config.json").read_text())
        assert "extra_special_tokens" not in written
        assert written == {
            **{key: value for key, value in saved.items() if key != "extra_special_tokens"},
            "tokenizer_class": "PreTrainedTokenizerFast",
            "additional_special_tokens": ["<first>", "<second>"],
        }
        shutil.copy(tmp_path / "out/support/tokenizer_config.json", tmp_path / "released")
        again = AutoTokenizer.from_pretrained(tmp_path / "released")
        text = "The fox <second> sleeps."
        assert again(text, "again")["input_ids"] == tokenizer(text, "again")["input_ids"]
        assert again.convert_tokens_to_ids("<second>") in again(text)["input_ids"]
        assert again.all_special_tokens == tokenizer.all_special_tokens

    def test_what_4_can_read_stays_the_checkpoints_own(self, checkpoint: Path, tmp_path: Path) -> None:
        path = checkpoint / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}))
        assert small_reference(tmp_path / "out", checkpoint)["support"] == []
        assert not (tmp_path / "out/support").exists()

    @pytest.mark.parametrize(
        "config",
        [{}, {"tokenizer_class": "BertTokenizer", "extra_special_tokens": {"image": "<image>"}}, {"tokenizer_class": None}],
    )
    def test_other_names_are_left_alone(self, config: dict[str, Any]) -> None:
        assert for_transformers_4(config) == config


class TestTask:
    @pytest.fixture(scope="class")
    def vision(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        from transformers import ViTConfig, ViTModel

        folder = tmp_path_factory.mktemp("vit")
        save_tokenizer(folder, ZOO["bert"])
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        ViTModel(ViTConfig(**sizes, image_size=8, patch_size=4)).save_pretrained(folder)
        return folder

    @pytest.fixture(scope="class")
    def translator(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        from transformers import T5Config, T5ForConditionalGeneration

        folder = tmp_path_factory.mktemp("t5")
        vocabulary = save_tokenizer(folder, ZOO["bert"])
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": vocabulary}
        T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).save_pretrained(folder)
        return folder

    @pytest.mark.parametrize("task", [FEATURES, *HEADS])
    def test_pictures(self, vision: Path, task: str) -> None:
        message = refused(vision, task=task)
        assert "vit" in message.lower()

    @pytest.mark.parametrize("task", [MASKS])
    def test_a_head_that_the_architecture_has_not(self, translator: Path, task: str) -> None:
        refused(translator, "t5", task, task=task)

    def test_an_encoder_with_a_decoder(self, translator: Path, tmp_path: Path) -> None:
        with pytest.raises(SourceError) as caught:
            small_reference(tmp_path / "out", translator)
        one_line(caught.value, "t5")


class TestReference:
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_weights_that_are_not_finite(self, checkpoint: Path, tmp_path: Path, value: float) -> None:
        key = "encoder.layer.0.output.dense.weight"
        change_weights(checkpoint, lambda tensors: tensors[key][0].fill_(value))
        with pytest.raises(StageError) as caught:
            small_reference(tmp_path / "out", checkpoint)
        one_line(caught.value, "not finite", "last_hidden_state", "damaged")

    @pytest.mark.parametrize("name", sorted(set(ENCODERS) - {"deberta-v2"}))
    def test_positions(self, saved: Callable[..., Path], tmp_path: Path, name: str) -> None:
        """64 of them, whatever a table's first rows are kept for; the 65th token is refused, the 64th is not."""
        assert loaded(saved(name)).positions == 64
        with pytest.raises(ConfigError) as caught:
            small_reference(tmp_path / "out", saved(name), sequences=(8, 65))
        one_line(caught.value, "65", "64", "sequence")

    @pytest.mark.parametrize("name", ["bert", "roberta"])
    def test_as_long_as_can_be(self, saved: Callable[..., Path], tmp_path: Path, name: str) -> None:
        known = small_reference(tmp_path / "out", saved(name), sequences=(64,))
        assert [2, 64] in [case["shape"] for case in known["cases"]]

    def test_default_lengths_fit_the_positions(self, saved: Callable[..., Path], tmp_path: Path) -> None:
        known = small_reference(tmp_path / "out", saved("roberta"), sequences=None)
        lengths = {case["shape"][1] for case in known["cases"]}
        assert {16, 64} <= lengths
        assert max(lengths) == 64

    def test_samples_can_be_read_again(self, bert: Path, tmp_path: Path) -> None:
        known = json.loads(json.dumps(small_reference(tmp_path / "out", bert)))
        cases = read_cases(tmp_path / "out" / SAMPLES, known)
        assert [case.name for case in cases] == [case["name"] for case in known["cases"]]
        assert {case.name for case in cases} == {"no padding", "right padding", "left padding", "text"}
        assert [list(case.mask.shape) for case in cases] == [case["shape"] for case in known["cases"]]
        assert [int(case.mask.sum()) for case in cases] == [case["real_tokens"] for case in known["cases"]]
        assert all(case.mask.all() for case in cases if case.name == "no padding")
        assert any(not case.mask[:, 0].all() for case in cases if case.name == "left padding")

    def test_it_is_the_same_again(self, bert: Path, tmp_path: Path) -> None:
        known = small_reference(tmp_path / "one", bert)
        assert small_reference(tmp_path / "two", bert) == known
        (tmp_path / "three").mkdir()
        reference_again(tmp_path / "three", found(bert), FEATURES, tmp_path / "one" / SAMPLES, known, {})
        content = (tmp_path / "one" / REFERENCE).read_bytes()
        assert (tmp_path / "two" / REFERENCE).read_bytes() == content
        assert (tmp_path / "three" / REFERENCE).read_bytes() == content
        assert (tmp_path / "one" / SAMPLES).read_bytes() == (tmp_path / "two" / SAMPLES).read_bytes()


class Malice:
    """A pickle that runs a command when it is opened."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.marker}",)


class TestPickle:
    @pytest.fixture
    def pickled(self, checkpoint: Path) -> Path:
        torch.save(load_file(checkpoint / WEIGHTS), checkpoint / "pytorch_model.bin")
        (checkpoint / WEIGHTS).unlink()
        return checkpoint

    def test_it_is_refused_unless_allowed(self, pickled: Path) -> None:
        refused(pickled, "pickle", "allow_pickle: true", "safetensors")

    def test_loading_one_is_refused_unless_allowed(self, pickled: Path) -> None:
        with pytest.raises(SourceError, match="allow_pickle"):
            load(found(pickled, allow_pickle=True), FEATURES)

    def test_it_gives_the_same(self, pickled: Path, bert: Path) -> None:
        same_answers(loaded(pickled, allow_pickle=True), loaded(bert))

    @pytest.mark.parametrize("legacy", [False, True])
    def test_malice_is_refused_and_does_not_run(self, pickled: Path, tmp_path: Path, legacy: bool) -> None:
        content = {"embeddings": Malice(tmp_path / "ran")}
        if legacy:
            (pickled / "pytorch_model.bin").write_bytes(pickle.dumps(content))
        else:
            torch.save(content, pickled / "pytorch_model.bin")
        message = refused(pickled, allow_pickle=True)
        assert not (tmp_path / "ran").exists()
        assert "pickle" in message or "pytorch_model.bin" in message
        assert "weights_only" not in message  # torch's advice is to run the code after all

    @pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04garbage", b"\x80\x02."])
    def test_garbage(self, pickled: Path, content: bytes) -> None:
        (pickled / "pytorch_model.bin").write_bytes(content)
        refused(pickled, "pytorch_model.bin", allow_pickle=True)

    def test_safetensors_are_read_where_there_are_both(self, checkpoint: Path, tmp_path: Path) -> None:
        torch.save({"x": Malice(tmp_path / "ran")}, checkpoint / "pytorch_model.bin")
        loaded(checkpoint, allow_pickle=True)
        assert not (tmp_path / "ran").exists()


class TestRemoteCode:
    @pytest.fixture(autouse=True)
    def own_modules(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """transformers copies a checkpoint's code into a cache of modules: one of our own."""
        import transformers.dynamic_module_utils

        monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
        monkeypatch.syspath_prepend(str(tmp_path / "modules"))

    @pytest.fixture
    def remote(self, checkpoint: Path, tmp_path: Path) -> Path:
        mark = f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
        (checkpoint / "configuration_own.py").write_text(
            f"from transformers import BertConfig\n{mark}class OwnConfig(BertConfig):\n    model_type = 'own'\n"
        )
        (checkpoint / "modeling_own.py").write_text(
            "from transformers import BertModel\nfrom .configuration_own import OwnConfig\n"
            f"{mark}class OwnModel(BertModel):\n    config_class = OwnConfig\n"
        )
        names = {"AutoConfig": "configuration_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"}
        change_config(checkpoint, model_type="own", architectures=["OwnModel"], auto_map=names)
        return checkpoint

    def test_it_is_refused_and_does_not_run(self, remote: Path, tmp_path: Path) -> None:
        refused(remote, "trust_remote_code: true", "code")
        assert not (tmp_path / "ran").exists()
        assert not (tmp_path / "modules").exists()

    def test_it_does_not_run_where_the_code_is_beside(self, remote: Path, tmp_path: Path) -> None:
        """Even if the snapshot holds the code."""
        with pytest.raises(SourceError, match="trust_remote_code"):
            load(found(remote, trust_remote_code=True), FEATURES)
        assert not (tmp_path / "ran").exists()

    def test_it_runs_where_it_is_trusted(self, remote: Path, bert: Path, tmp_path: Path) -> None:
        model = loaded(remote, trust_remote_code=True)
        assert type(model.module).__name__ == "OwnModel"
        assert (tmp_path / "ran").exists()
        same_answers(model, loaded(bert))

    def test_trusted_code_that_is_broken(self, remote: Path) -> None:
        (remote / "modeling_own.py").write_text("this is no Python")
        refused(remote, "SyntaxError", trust_remote_code=True)

    def test_trusted_code_that_fails(self, remote: Path) -> None:
        (remote / "modeling_own.py").write_text("1 / 0")
        refused(remote, trust_remote_code=True)

    def test_trusted_code_that_is_not_there(self, remote: Path) -> None:
        (remote / "modeling_own.py").unlink()
        refused(remote, "modeling_own", trust_remote_code=True)

    def test_a_tokenizer_of_its_own(self, checkpoint: Path, tmp_path: Path) -> None:
        (checkpoint / "tokenization_own.py").write_text(
            "from transformers import PreTrainedTokenizerFast\n"
            f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
        )
        path = checkpoint / "tokenizer_config.json"
        names = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}
        path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": "OwnTokenizer", "auto_map": names}))
        try:  # refused, or made by the library's own class
            loaded(checkpoint)
        except SourceError as error:
            one_line(error, "trust_remote_code: true")
        assert not (tmp_path / "ran").exists()


LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-5,
}


def permuted(weight: Any, heads: int) -> Any:
    """Rows of queries and keys as GGUF orders them."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path) -> Mapping[str, torch.Tensor]:
    """Write a tiny llama with a byte-level tokenizer, and return its weights under transformers' names."""
    import gguf
    from transformers import LlamaConfig, LlamaModel
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = ["<s>", "</s>", *bytes_to_unicode().values(), "th", "the"]
    torch.manual_seed(3)
    config = LlamaConfig(vocab_size=len(tokens), bos_token_id=0, eos_token_id=1, **LLAMA)
    weights: dict[str, torch.Tensor] = LlamaModel(config).state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_embedding_length(32)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, value in weights.items():
        array = value.numpy()
        if "q_proj" in name or "k_proj" in name:
            array = permuted(array, 4 if "q_proj" in name else 2)
        writer.add_tensor(names.get_name(f"model.{name}", (".weight",)), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


class TestGguf:
    @pytest.fixture
    def weights(self, tmp_path: Path) -> Mapping[str, torch.Tensor]:
        return write_gguf(tmp_path / "tiny.gguf")

    def test_weights_are_those_that_were_written(self, weights: Mapping[str, torch.Tensor], tmp_path: Path) -> None:
        model = loaded(tmp_path / "tiny.gguf")
        parameters = dict(model.module.named_parameters())
        assert set(parameters) == set(weights)
        assert all(torch.equal(parameters[name], value) for name, value in weights.items())
        assert {value.dtype for value in parameters.values()} == {torch.float32}
        assert model.positions == 64

    def test_outputs_are_finite_and_depend_on_the_text(self, weights: Mapping[str, torch.Tensor], tmp_path: Path) -> None:
        model = loaded(tmp_path / "tiny.gguf")
        answers = [run_eager(model, sample(model, text))["last_hidden_state"] for text in ("the one", "the two")]
        assert all(np.isfinite(answer).all() for answer in answers)
        assert not np.allclose(answers[0], answers[1])

    def test_a_folder_that_holds_one(self, weights: Mapping[str, torch.Tensor], tmp_path: Path) -> None:
        assert set(dict(loaded(tmp_path).module.named_parameters())) == set(weights)

    def test_what_it_holds_inside_is_written_as_files(self, weights: Mapping[str, torch.Tensor], tmp_path: Path) -> None:
        known = small_reference(tmp_path / "out", tmp_path / "tiny.gguf")
        assert {"support/config.json", "support/tokenizer.json", "support/tokenizer_config.json"} <= set(known["support"])
        assert [output["name"] for output in known["signature"]["outputs"]] == ["last_hidden_state"]
        config = json.loads((tmp_path / "out/support/config.json").read_text())
        assert (config["model_type"], config["hidden_size"]) == ("llama", 32)

    def test_these_files_are_the_same_again(self, weights: Mapping[str, torch.Tensor], tmp_path: Path) -> None:
        """And name no path of this machine."""
        known = small_reference(tmp_path / "one", tmp_path / "tiny.gguf")
        assert small_reference(tmp_path / "two", tmp_path / "tiny.gguf") == known
        for name in known["support"]:
            content = (tmp_path / "one" / name).read_bytes()
            assert content == (tmp_path / "two" / name).read_bytes(), name
            assert b"compile-" not in content, (name, content)

    def test_these_files_load_without_it(self, weights: Mapping[str, torch.Tensor], tmp_path: Path) -> None:
        from transformers import AutoConfig, AutoTokenizer

        small_reference(tmp_path / "out", tmp_path / "tiny.gguf")
        support = tmp_path / "out" / "support"
        model = loaded(tmp_path / "tiny.gguf")
        assert AutoConfig.from_pretrained(support).hidden_size == 32
        tokenizer = AutoTokenizer.from_pretrained(support)
        assert tokenizer("the fox")["input_ids"] == model.tokenizer("the fox")["input_ids"]
        assert tokenizer.pad_token is not None

    VERSION_3 = b"GGUF\x03\0\0\0"

    @pytest.mark.parametrize(
        "content",
        [b"", b"garbage", b"GGUF", VERSION_3 + b"\xff" * 64, VERSION_3 + b"\0" * 16],
        ids=["empty", "garbage", "magic", "huge counts", "nothing inside"],
    )
    def test_garbage(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "tiny.gguf").write_bytes(content)
        refused(tmp_path / "tiny.gguf", "tiny.gguf")

    @pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.99])
    def test_cut_short(self, weights: Mapping[str, torch.Tensor], tmp_path: Path, share: float) -> None:
        content = (tmp_path / "tiny.gguf").read_bytes()
        (tmp_path / "tiny.gguf").write_bytes(content[: int(len(content) * share)])
        refused(tmp_path / "tiny.gguf", "tiny.gguf")


@pytest.mark.parametrize(("head", "task"), [(FEATURES, FEATURES), ("fill-mask", "fill-mask"), ("fill-mask", FEATURES)])
def test_more_layers_than_the_config_says(tmp_path: Path, head: str, task: str) -> None:
    """A config of fewer layers would make another model of the same weights, in silence."""
    folder = save_checkpoint(tmp_path / "checkpoint", "bert", head)
    change_config(folder, num_hidden_layers=1)
    refused(folder, "more layers than config.json says", "encoder.layer.1.", task=task)


def test_a_file_that_changes_while_it_is_read(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was hashed must be what was loaded, or a release would name weights that it does not hold."""
    snapshot = found(checkpoint)
    original = compiler.stages.load._check_config

    def swap(config: Mapping[str, Any]) -> None:
        original(config)
        change_weights(checkpoint, lambda tensors: tensors.update({name: value + 1 for name, value in tensors.items()}))

    monkeypatch.setattr(compiler.stages.load, "_check_config", swap)
    with pytest.raises(SourceError) as caught:
        load(snapshot, FEATURES)
    one_line(caught.value, "model.safetensors", "changed while it was read")


def test_own_code_of_a_known_architecture_is_left_out(checkpoint: Path) -> None:
    """It does not run unless it is trusted; the release says that it was left out."""
    change_config(checkpoint, auto_map={"AutoModel": "modeling_x.Mine"})
    assert loaded(checkpoint).left_out == (OWN_CODE,)


def test_code_of_another_repository(checkpoint: Path) -> None:
    change_config(checkpoint, auto_map={"AutoModel": "other/repo--modeling_x.Mine"})
    refused(checkpoint, "auto_map", "other/repo--modeling_x.Mine")


def test_damaged_weights_of_a_module(checkpoint: Path) -> None:
    (checkpoint / "modules.json").write_text(json.dumps([{"path": "2_Dense", "type": "models.Dense"}]))
    (checkpoint / "2_Dense").mkdir()
    (checkpoint / "2_Dense/model.safetensors").write_bytes(b"x" * 100)
    refused(checkpoint, "2_Dense/model.safetensors", "damaged")


def test_text_without_a_word(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError) as caught:
        reference(tmp_path / "out", found(checkpoint), FEATURES, [("\u200b",)], (1,), (16,), {})
    one_line(caught.value, "data.validation")
