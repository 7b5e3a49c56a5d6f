"""Text: int64 `[batch, sequence]`, made by a tokenizer; `[batch, choices, sequence]` where one of several texts is chosen."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compiler.errors import SourceError
from compiler.samples import MAX_ACCURACY_LINES, cases, shortened, with_masks
from compiler.sources import check_tokenizer

if TYPE_CHECKING:
    import numpy as np
    import torch

    from compiler.modalities import Samples
    from compiler.types import Model, Snapshot

LIBRARIES: tuple[str, ...] = ()
MAIN_INPUTS = ("input_ids",)
DERIVED: Mapping[int, str] = {}
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def check(snapshot: Snapshot, task: str) -> None:
    check_tokenizer(snapshot)


def processor(folder: Path, options: Mapping[str, Any]) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, **options)


def prepare(module: torch.nn.Module, processor: Any, task: str, uri: str) -> dict[str, Any]:
    config: Any = module.config
    if hasattr(config, "vision_config"):
        raise SourceError(f"{uri}: {type(module).__name__} takes images beside text; set task: zero-shot-image-classification")
    pad(processor, uri)
    inputs = tuple(
        name
        for name in inspect.signature(module.forward).parameters
        if name in INPUTS
        and name in {*processor.model_input_names, "input_ids", "attention_mask"}
        # A model without token types ignores them: DeBERTa-v2's tokenizer makes them all the same.
        and not (name == "token_type_ids" and getattr(config, "type_vocab_size", 1) == 0)
    )
    if not {"input_ids", "attention_mask"} <= set(inputs):
        raise SourceError(
            f"{uri}: {type(module).__name__} takes no input_ids with an attention_mask; it is no encoder of text"
        )
    axes = ("batch", "choices", "sequence") if task == "multiple-choice" else ("batch", "sequence")
    return {
        "axes": dict.fromkeys(inputs, axes),
        "example": _example(config, task, inputs),
        "positions": positions(module),
    }


def pad(tokenizer: Any, uri: str) -> None:
    """Make sure that a tokenizer has a token to pad with. Raises SourceError."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise SourceError(f"{uri}: the tokenizer has no token to pad with; set pad_token in tokenizer_config.json")


def positions(module: torch.nn.Module) -> int | None:
    """The longest sequence that the model has positions for, in tokens.

    RoBERTa and its kin number positions from `padding_idx + 1`, so that many rows of the table stand for none.
    """
    import torch

    for name, part in module.named_modules():
        if name.rpartition(".")[2] == "position_embeddings" and isinstance(part, torch.nn.Embedding):
            return part.num_embeddings - (0 if part.padding_idx is None else part.padding_idx + 1)
    config: Any = module.config
    found = getattr(config, "max_position_embeddings", None)
    return int(found) if isinstance(found, int) and found > 0 else None


def _example(config: Any, task: str, inputs: Sequence[str]) -> dict[str, torch.Tensor]:
    """optimum's dummy inputs, int64 `[2, 16]` or `[2, 4, 16]`, to trace with: never a shape of which an axis is 1 or equals
    another."""
    import torch
    from optimum.utils import DummyTextInputGenerator, NormalizedConfigManager, NormalizedTextConfig

    try:
        normalized = NormalizedConfigManager.get_normalized_config_class(config.model_type)(config)
    except KeyError:
        normalized = NormalizedTextConfig(config)
    torch.manual_seed(0)
    length = min(16, int(getattr(config, "max_position_embeddings", 16) or 16) - 4)
    generator = DummyTextInputGenerator(task, normalized, batch_size=2, sequence_length=length)
    example = {name: generator.generate(name, framework="pt").to(torch.int64) for name in inputs}
    example["attention_mask"] = torch.ones_like(example["input_ids"])
    example["attention_mask"][1, ..., length // 2 :] = 0  # a mask of ones alone would let a trace leave the mask out
    return example


def probes(model: Model) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, np.ndarray[Any, Any]]]:
    import numpy as np

    token = model.example["input_ids"][0].flatten()[1].item()

    def probe(sizes: Mapping[str, int]) -> dict[str, np.ndarray[Any, Any]]:
        ids = np.full([sizes[str(axis)] for axis in model.axes["input_ids"]], token, dtype=np.int64)
        inputs = {name: np.zeros_like(ids) for name in model.inputs}
        return inputs | {"input_ids": ids, "attention_mask": np.ones_like(ids)}

    return probe({"batch": 2, "choices": 4, "sequence": 5}), probe({"batch": 3, "choices": 6, "sequence": 7})


def samples(
    model: Model, lines: Sequence[tuple[str, ...]], batches: Sequence[int], sequences: Sequence[int] | None
) -> Samples:
    from compiler.modalities import Samples

    found = cases(model, lines, batches, sequences)  # which says what is wrong with the text
    return Samples(found, shortened(model, with_masks(model, lines[:MAX_ACCURACY_LINES]), "validation"))
