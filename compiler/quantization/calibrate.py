"""Calibrate: the model's linear layers in int8, from statistics of real text, and how much each alone costs in accuracy.

All of it is measured on the eager original, once for all formats. How a layer is rounded is in `rounding`; here is what it is
rounded by: the ranges and rows of its input, of whole texts and of short excerpts. Padding is never seen: only real tokens
count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compiler.accuracy import Answers, answers, problem
from compiler.errors import ConfigError, StageError
from compiler.quantization.layers import LAYERS, QuantizedTable, digest, save
from compiler.quantization.rounding import Emulation, Group, quantize
from compiler.samples import batch_size, masked_places, together, without_spaces
from compiler.tasks import Words
from compiler.types import Model

# Texts are run in batches of so many, the short ones together.
BATCH = 16
# Rows of an input that are kept to round weights against, all layers together at most so many bytes.
MAX_ROWS, MAX_BYTES = 4096, 1 << 30
# Words of the longest excerpts.
EXCERPT = 4
# A layer with less than this share of the multiply-adds is not worth an error.
LEAST_SHARE = 0.005
# Why layers are none.
NO_INPUT = "its input is not finite on calibration text"
NO_ANSWERS = "in int8 it makes answers that are not finite"
DAMAGED = "the original itself is not finite on text of data.calibration; the checkpoint is damaged"
# In bytes, as float32: smaller embeddings are not worth more operators.
TABLE = 2**20


def speed_up(module: torch.nn.Module) -> None:
    """Have a model's linear layers computed by oneDNN, whose fp32 products take half the time of MKL's on some CPUs. They are
    sums in another order; what is measured here is far above that."""
    if torch.backends.mkldnn.is_available():
        for part in module.modules():
            if type(part) is torch.nn.Linear and part.weight.dtype == torch.float32:
                part.forward = _onednn(part)  # type: ignore[assignment, method-assign]


def _onednn(part: torch.nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    packed: list[torch.Tensor] = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        if not packed or packed[0] is not part.weight:
            packed[:] = [part.weight, torch.ops.mkldnn._reorder_linear_weight(part.weight.detach(), None)]
        output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed[1], part.bias, "none", [], None)
        return output

    return forward


@dataclass(frozen=True)
class Text:
    """A batch of texts: inputs, their mask, where they stand among all, and the masked tokens of fill-mask."""

    inputs: Mapping[str, torch.Tensor]
    mask: torch.Tensor
    order: tuple[int, ...]
    places: np.ndarray[Any, Any] | None


def calibrate(
    out: Path,
    model: Model,
    texts: Sequence[tuple[str, ...]],
    held: Sequence[tuple[str, ...]],
    pooling: Sequence[str],
    bits: int,
) -> dict[str, Any]:
    """Write `layers.safetensors`, every linear layer and every large embedding in int8, and return what is known of them.

    Args:
        texts: what statistics are taken from.
        held: other texts, on which the error of each layer alone is measured.
        pooling: as `compiler.accuracy.answers` takes it.
        bits: 8, or 7 for weights within ±63.

    Returns:
        `groups`: of each group of layers its `names`, `cost` (share of the multiply-adds of all layers that could be int8),
        `columns` (of its int8 product, to one of the input's channels: above 1 where some are given more than once),
        `outputs` (the width of all its layers' results together), `error` (the mean squared error of the answers when this
        group alone is int8, in units of their variance; see `departure`); `tables`, the names of the embeddings; `left`: by
        layer's name, why it is no candidate.
    """
    module = model.module
    groups, left = collect(module, list(batches(model, [*texts, *excerpts(texts)])))
    total = sum(_work(module, group) for group in groups)
    left |= {
        name: "it does too little of the work"
        for group in groups
        if _work(module, group) < LEAST_SHARE * total
        for name in group.names
    }
    groups = [group for group in groups if _work(module, group) >= LEAST_SHARE * total]
    layers = [layer for group in groups for layer in quantize(module, group, bits)]
    embeddings, others = tables(module)
    left |= others
    save(out / LAYERS, [*layers, *embeddings])
    by_name = {layer.name: layer for layer in layers}
    emulation = Emulation(module, by_name.values())
    trial = list(batches(model, held))
    if all(text.places is not None and not text.places.any() for text in trial):
        raise ConfigError("data.calibration: no masked word stands within what the model takes of a text; give shorter ones")
    before = answer(model, trial, pooling)
    if not all(np.isfinite(value).all() for value in before.values()):
        raise StageError(DAMAGED)
    described = []
    for group in groups:
        leader = by_name[group.names[0]]
        with emulation.applied(group.names):
            error = departure(before, answer(model, trial, pooling))
        if not np.isfinite(error):
            left |= dict.fromkeys(group.names, NO_ANSWERS)
            continue
        described.append(
            {
                "names": list(group.names),
                "cost": _work(module, group) / total,
                "columns": leader.weight.shape[1] / leader.inputs,
                "outputs": sum(by_name[name].outputs for name in group.names),
                "error": error,
            }
        )
    return {"groups": described, "tables": [table.name for table in embeddings], "left": left}


def excerpts(texts: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """One to four words of each text, or of its last part; where a script has no spaces between words, twice as many
    characters.

    Attention has means of the values of tokens as its results. Over few tokens they reach further than over many, and what is
    beyond the range of all text that was seen is cut: a text of two words then has a wrong answer.
    """
    found: list[tuple[str, ...]] = []
    for number, (*before, last) in enumerate(texts):
        words, count = last.split(), 1 + number % EXCERPT
        join: Callable[[list[str]], str] = " ".join
        if isinstance(last, Words):
            words, join = [word for word in last.words if word.strip()], Words
        elif without_spaces(last):
            words, count, join = [*last.strip()], 2 * count, "".join
        count = min(count, len(words))
        start = number % (len(words) - count + 1)
        found.append((*before, join(words[start : start + count])))
    return found


def tables(module: torch.nn.Module, least: int = TABLE) -> tuple[list[QuantizedTable], dict[str, str]]:
    """A model's embeddings that are large, of `least` bytes as float32, and have their weights to themselves, each row rounded
    by a scale of its own; and why others are none, by their names."""
    users = Counter(id(value) for part in module.modules() for value in part.parameters(recurse=False))
    found, left = [], {}
    for name, part in module.named_modules():
        if not isinstance(part, torch.nn.Embedding):
            continue
        rows = part.weight.detach().float()
        if rows.numel() * rows.element_size() < least:
            left[name] = f"an embedding of less than {least >> 20} MiB is not worth more operators"
        elif part.max_norm is not None:
            left[name] = "it scales its rows when they are looked up"
        elif users[id(part.weight)] > 1:
            left[name] = "its weights are used elsewhere as well"
        else:
            scale = (rows.abs().amax(dim=1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
            number = torch.round(rows / scale[:, None]).to(torch.int8)
            found.append(QuantizedTable(name, digest(rows.numpy()), number.numpy(), scale.numpy()))
    return found, left


def departure(before: Answers, after: Answers) -> float:
    """The mean squared difference of answers, as `answer` gives them, in units of their variance."""
    return max(float(((value - after[name]) ** 2).mean() / max(float(value.var()), 1e-12)) for name, value in before.items())


def batches(model: Model, texts: Sequence[tuple[str, ...]]) -> Iterator[Text]:
    """Texts as tensors, the short ones together, cut to what the model takes."""
    order = sorted(range(len(texts)), key=lambda number: (sum(map(len, texts[number])), number))
    size = batch_size(model, BATCH)
    for start in range(0, len(order), size):
        chosen = tuple(order[start : start + size])
        arrays = together(model, [texts[number] for number in chosen])
        mask = torch.from_numpy(arrays["attention_mask"]).bool()
        inputs = {name: torch.from_numpy(value) for name, value in arrays.items()}
        yield Text(inputs, mask, chosen, masked_places(model, arrays["input_ids"]))


def answer(model: Model, texts: Sequence[Text], pooling: Sequence[str]) -> dict[str, np.ndarray[Any, Any]]:
    """The answers of the model as it is now, stacked over the texts, in their order; instead of spans, which seldom change,
    the start and end logits of real tokens, `[tokens, 2]`."""
    parts: list[dict[str, np.ndarray[Any, Any]]] = []
    with torch.inference_mode():
        for text in texts:
            outputs = model.module(**text.inputs)
            arrays = {name: value.float().numpy() for name, value in outputs.items() if isinstance(value, torch.Tensor)}
            if "start_logits" in arrays:
                ends = np.stack([arrays["start_logits"], arrays["end_logits"]], axis=-1)
                parts.append({"logits": ends[text.mask.numpy()]})
                continue
            parts.append(answers(model.task, arrays, text.mask.numpy(), pooling, text.places, problem(model)))
    order = np.argsort(np.concatenate([text.order for text in texts]))
    seen = (text.mask.numpy() if text.places is None else text.mask.numpy() & text.places for text in texts)
    ends = np.concatenate([mask.reshape(len(mask), -1).sum(axis=1) for mask in seen]).cumsum()
    found = {}
    for name in parts[0]:
        value = np.concatenate([part[name] for part in parts])
        if len(value) != len(order):  # of each token
            rows = np.split(value, ends[:-1])
            found[name] = np.concatenate([rows[text] for text in order])
        else:
            found[name] = value[order]
    return found


def collect(module: torch.nn.Module, texts: Sequence[Text]) -> tuple[list[Group], dict[str, str]]:
    """Run texts and gather, for each group of linear layers, the range of every channel of its input and some of its rows;
    and why other layers are none."""
    linears = {name: part for name, part in module.named_modules() if isinstance(part, torch.nn.Linear)}
    alike: dict[str, list[str]] = {}
    for name, part in linears.items():
        alike.setdefault(digest(part.weight.detach().float().numpy()), []).append(name)
    # A graph knows a layer by its weights alone, and a range is for one input: no layer may take another's.
    left = {
        name: f"its weights are those of {next(other for other in names if other != name)} as well"
        for names in alike.values()
        for name in names
        if len(names) > 1
    }
    if own_elsewhere := {
        id(part.weight): name for name, part in module.named_modules() if isinstance(part, torch.nn.Embedding)
    }:
        for name, part in linears.items():
            if id(part.weight) in own_elsewhere:
                left[name] = f"its weights are {own_elsewhere[id(part.weight)]}'s too"
    kept: dict[str, list[torch.Tensor]] = {}  # for as long as they are told apart by their ids
    token_rows: dict[str, list[bool | None]] = {}
    mask = _flat(texts[0].mask)

    def first(name: str) -> Callable[..., None]:
        def hook(part: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            kinds = token_rows.setdefault(name, [])
            if not arguments:
                kinds.append(None)
                return
            kept.setdefault(name, []).append(arguments[0])
            kinds.append(arguments[0].dim() == 3 and arguments[0].shape[:2] == mask.shape)

        return hook

    with _hooks(linears, first), torch.inference_mode():
        module(**texts[0].inputs)
    left |= {name: "the model does not use it" for name in linears if name not in token_rows}
    for name, kinds in token_rows.items():
        if None in kinds:
            left[name] = "its input is given by keyword"
        elif not any(kinds):
            left[name] = "it sees no token's row, such as one row a text, which is no work"
        elif not all(kinds):
            left[name] = "it sees what is no token's row as well, such as positions"
    groups: list[Group] = []
    of: dict[str, Group] = {}
    together: dict[tuple[int, ...], list[str]] = {}
    for name, given in kept.items():
        together.setdefault(tuple(map(id, given)), []).append(name)
    for alike_given in together.values():
        if names := tuple(name for name in alike_given if name not in left):
            width = linears[names[0]].in_features
            groups.append(Group(names, torch.full((width,), np.inf), torch.full((width,), -np.inf)))
            of |= dict.fromkeys(names, groups[-1])
    widths = sum(len(group.low) for group in groups)
    most = max(256, min(MAX_ROWS, MAX_BYTES // (4 * max(widths, 1))))
    tokens = sum(int(text.mask.sum()) for text in texts)
    seen = 0

    def gather(name: str) -> Callable[..., None]:
        group = of[name]
        # Spread evenly over all tokens; a layer that is run several times has as many inputs.
        step = max(1, -(-tokens * len(token_rows[name]) // most))

        def hook(part: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            rows = arguments[0][mask]
            group.low = torch.minimum(group.low, rows.amin(dim=0))
            group.high = torch.maximum(group.high, rows.amax(dim=0))
            group.rows.append(rows[(-seen) % step :: step].clone())
            group.tokens += len(rows)

        return hook

    leaders = {group.names[0]: linears[group.names[0]] for group in groups}
    with _hooks(leaders, gather), torch.inference_mode():
        for text in texts:
            mask = _flat(text.mask)
            module(**text.inputs)
            seen += int(mask.sum())
    for group in groups:
        if not (torch.isfinite(group.low).all() and torch.isfinite(group.high).all()):
            left |= dict.fromkeys(group.names, NO_INPUT)
    return [group for group in groups if group.names[0] not in left], left


def _flat(mask: torch.Tensor) -> torch.Tensor:
    """A mask as layers see it: of several choices a text, each is a row."""
    return mask.reshape(-1, mask.shape[-1])


@contextmanager
def _hooks(layers: Mapping[str, torch.nn.Module], make: Callable[[str], Callable[..., Any]]) -> Iterator[None]:
    handles = [part.register_forward_pre_hook(make(name)) for name, part in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _work(module: torch.nn.Module, group: Group) -> int:
    """Multiply-adds of a group over the calibration's tokens."""
    parts = dict(module.named_modules())
    weights: list[Any] = [parts[name].weight for name in group.names]
    return sum(int(weight.numel()) for weight in weights) * group.tokens
