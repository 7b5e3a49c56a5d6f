"""Calibrate: the model's linear layers in int8, from statistics of real text, and how much each alone costs in accuracy.

All of it is measured on the eager original, once for all formats. A layer's numbers are found so that its output stays
close: the input's channels are evened out (SmoothQuant, Xiao et al. 2022, with the exponent that does best), the few that
are far wider than the others, or cost the most, are given several times (as outlier channel splitting, Zhao et al. 2019, but
finer with each time: see `layers`), and weights are rounded one column after the other, each taking over the error of those
before (GPTQ, Frantar et al. 2022), against the inputs as they are once quantized. Padding is never seen: only real tokens
count. Ranges are those of whole texts and of short excerpts.

What was tried and does not help: scales of each token's own, zero points of each channel's own, narrower ranges that cut
what is beyond, least squares before GPTQ, the means of texts beside tokens in its Hessian, and training the rounded weights
against the original (four epochs: 4 % less error). What remains is the noise of 8-bit inputs, which no weights can take back.
Inputs of 16 bits, as two products in ONNX, have 0.4 of the error and take 0.7 of the time of fp32; files with as many of them
as a budget asks for were no faster than those with layers left in fp32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compiler.accuracy import Answers, answers, problem
from compiler.errors import ConfigError
from compiler.quantization.layers import LAYERS, QuantizedLinear, QuantizedTable, digest, save
from compiler.samples import batch_size, masked_places, together, without_spaces
from compiler.tasks import Words
from compiler.types import Model

# Texts are run in batches of so many, the short ones together.
BATCH = 16
# Rows of an input that are kept to round weights against, all layers together at most so many bytes.
MAX_ROWS, MAX_BYTES = 4096, 1 << 30
# Of those, what SmoothQuant's exponent is chosen on.
TRIAL_ROWS = 768
EXPONENTS = (0.0, 0.6, 0.8, 0.9, 1.0)
# Of so many channels one may be given once more, if that makes this of the error: columns cost time. How many are so wide that
# weights are narrowed for them, and how often one of these is given at most.
COLUMNS, WORTH = 32, 0.67
WIDE, TIMES = 8, 16
# The share that GPTQ leaves of the error of weights that are rounded to the nearest: 0.1 to 0.8 was measured.
LEFT = 0.5
# What is added to the diagonal of GPTQ's Hessian, in units of its mean; columns that are rounded between two updates.
DAMPING, BLOCK = 0.01, 128
# Words of the longest excerpts.
EXCERPT = 4
# A layer with less than this share of the multiply-adds is not worth an error.
LEAST_SHARE = 0.005
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


@dataclass
class Group:
    """Linear layers that are given the same tensor, so that it is quantized once for all of them."""

    names: tuple[str, ...]
    low: torch.Tensor
    high: torch.Tensor
    rows: list[torch.Tensor] = field(default_factory=list)
    tokens: int = 0

    @property
    def name(self) -> str:
        return " + ".join(self.names)


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
    before = answer(model, trial, pooling, soft=True)
    described = []
    for group in groups:
        with emulation.applied(group.names):
            error = departure(before, answer(model, trial, pooling, soft=True))
        if not np.isfinite(error):
            left |= dict.fromkeys(group.names, "in int8 it makes answers that are not finite")
            continue
        described.append(
            {
                "names": list(group.names),
                "cost": _work(module, group) / total,
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
    """The mean squared difference of answers, as `answer` gives them with `soft`, in units of their variance."""
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


def answer(
    model: Model, texts: Sequence[Text], pooling: Sequence[str], *, soft: bool = False
) -> dict[str, np.ndarray[Any, Any]]:
    """The answers of the model as it is now, stacked over the texts, in their order.

    Args:
        soft: instead of spans, which seldom change, the start and end logits of real tokens, `[tokens, 2]`.
    """
    parts: list[dict[str, np.ndarray[Any, Any]]] = []
    with torch.inference_mode():
        for text in texts:
            outputs = model.module(**text.inputs)
            arrays = {name: value.float().numpy() for name, value in outputs.items() if isinstance(value, torch.Tensor)}
            if soft and "start_logits" in arrays:
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
    together: dict[int, list[str]] = {}
    kept: list[torch.Tensor] = []
    token_rows: dict[str, list[bool]] = {}
    mask = _flat(texts[0].mask)

    def first(name: str) -> Callable[..., None]:
        def hook(part: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            kept.append(arguments[0])  # or another tensor may get its id
            together.setdefault(id(arguments[0]), []).append(name)
            token_rows.setdefault(name, []).append(arguments[0].dim() == 3 and arguments[0].shape[:2] == mask.shape)

        return hook

    with _hooks(linears, first), torch.inference_mode():
        module(**texts[0].inputs)
    left |= {name: "the model does not use it" for name in linears if name not in token_rows}
    for name, kinds in token_rows.items():
        if not any(kinds):
            left[name] = "it sees no token's row, such as one row a text, which is no work"
        elif not all(kinds):
            left[name] = "it sees what is no token's row as well, such as positions"
    groups: list[Group] = []
    of: dict[str, Group] = {}
    for given in together.values():
        names = tuple(name for name in dict.fromkeys(given) if name not in left and name not in of)
        if names:
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
            left |= dict.fromkeys(group.names, "its input is not finite on calibration text")
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


def quantize(module: torch.nn.Module, group: Group, bits: int) -> list[QuantizedLinear]:
    """The layers of a group in int8: the exponent of SmoothQuant by the error that is to be expected, the weights by GPTQ."""
    parts = dict(module.named_modules())
    weights: list[Any] = [parts[name].weight.detach().float() for name in group.names]
    rows = torch.cat(group.rows)
    group.rows.clear()
    largest = 2 ** (bits - 1) - 1
    trial = rows[:: max(1, len(rows) // TRIAL_ROWS)]
    joined = torch.cat(weights)
    exact = rows @ joined.T

    def best(columns: int) -> tuple[list[QuantizedLinear], float]:
        made = (Quantizer.make(group, joined, exponent, columns) for exponent in EXPONENTS)
        quantizer = min(made, key=lambda one: _expected(one, joined, trial, largest))
        return _rounded(quantizer, group.names, weights, rows, exact, largest)

    found, least = best(0)
    if columns := joined.shape[1] // COLUMNS:
        # Whether more columns are worth it shows after rounding only: of what wide channels do to weights it leaves more.
        wide, lower = best(columns)
        if lower < WORTH * least:
            return wide
    return found


def _expected(quantizer: Quantizer, weight: torch.Tensor, rows: torch.Tensor, largest: int) -> float:
    """The mean squared error of the outputs that is to be expected: what rounding the input makes, and the share of what
    rounding weights to the nearest would, that GPTQ leaves."""
    spread, exact = quantizer.spread(weight), quantizer.exact(rows)
    number, scale = _nearest(spread, largest)
    of_inputs = (quantizer(rows) - exact) @ spread.T
    of_weights = exact @ (number * scale[:, None] - spread).T
    # Constants are taken back by `shift`.
    return float(of_inputs.var(dim=0).mean() + LEFT * of_weights.var(dim=0).mean())


def _rounded(
    quantizer: Quantizer,
    names: Sequence[str],
    weights: Sequence[torch.Tensor],
    rows: torch.Tensor,
    exact: torch.Tensor,
    largest: int,
) -> tuple[list[QuantizedLinear], float]:
    """The layers with weights rounded for a quantizer, and the mean squared error of what they make of `rows`, of which the
    original makes `exact`."""
    inputs = quantizer(rows)
    numbers, scales = gptq(quantizer.spread(torch.cat(list(weights))), (inputs.T @ inputs).double(), largest)
    departures = exact - inputs @ (numbers * scales[:, None]).T
    shifts = departures.mean(dim=0)
    squares = float(departures.var(dim=0).mean())
    found = []
    smooth = None if bool((quantizer.smooth == 1).all()) else quantizer.smooth.numpy()
    repeated = quantizer.repeated.numpy() if len(quantizer.repeated) else None
    parts = [torch.split(values, [len(weight) for weight in weights]) for values in (numbers, scales, shifts)]
    for name, weight, number, scale, shift in zip(names, weights, *parts, strict=True):
        found.append(
            QuantizedLinear(
                name,
                digest(weight.numpy()),
                number.to(torch.int8).numpy(),
                scale.numpy(),
                smooth,
                quantizer.scale,
                quantizer.zero_point,
                shift.numpy(),
                repeated,
                None if repeated is None else quantizer.offset.numpy(),
            )
        )
    return found, squares


@dataclass(frozen=True)
class Quantizer:
    """An input's quantization, and back: what int8 arithmetic sees of it, in floating point. See `QuantizedLinear`."""

    smooth: torch.Tensor
    scale: float
    zero_point: int
    repeated: torch.Tensor
    offset: torch.Tensor

    @classmethod
    def of(cls, layer: QuantizedLinear) -> Quantizer:
        return cls(
            torch.ones(layer.inputs) if layer.smooth is None else torch.from_numpy(layer.smooth),
            layer.scale,
            layer.zero_point,
            torch.empty(0, dtype=torch.int64) if layer.repeated is None else torch.from_numpy(layer.repeated),
            torch.empty(0) if layer.offset is None else torch.from_numpy(layer.offset),
        )

    @classmethod
    def make(cls, group: Group, weight: torch.Tensor, exponent: float, columns: int = 0) -> Quantizer:
        """The whole range of the calibration's tokens, with zero at a whole number.

        SmoothQuant: channel j is divided by max|x_j|^a / max|w_j|^(1 - a); 0 stands for none.

        Some of `columns` go to the `WIDE` channels of which range and weights together are the largest: they are left out of
        that, made as narrow as the others, and given as often as it takes to have their weights no larger than those of the
        others. What remains goes, one after the other, to the channel where one more takes away the most of the error:
        rounding channel j makes one of |w_j|² / smooth_j² / 12 steps, and m of its kind 1/m² of that.
        """
        reach = torch.maximum(group.low.abs(), group.high.abs()).clamp(min=1e-5)
        others = torch.ones(len(reach), dtype=torch.bool)
        if columns:
            others[torch.topk(reach**2 * (weight**2).sum(dim=0), min(WIDE, len(reach) - 1)).indices] = False
        largest = weight.abs().amax(dim=0).clamp(min=1e-5)
        smooth = torch.ones_like(reach)
        if exponent:
            divisor = reach**exponent / largest ** (1 - exponent)
            smooth = torch.exp(torch.log(divisor[others]).mean()) / divisor
        low = min(float((group.low * smooth)[others].min()), 0.0)
        high = max(float((group.high * smooth)[others].max()), 0.0)
        scale = float(np.float32(max(high - low, 1e-12) / 255))
        zero_point = round(-low / scale)
        # A step of room at the top, for the offsets. Channels that reach it are given no more than once.
        room = torch.minimum(
            scale * max(254 - zero_point, 1) / group.high.clamp(min=1e-9),
            scale * max(zero_point, 1) / (-group.low).clamp(min=1e-9),
        )
        smooth = torch.where(others, smooth, torch.minimum(smooth, room))
        amplitude = largest / smooth
        times = torch.ones(len(reach), dtype=torch.int64)
        times[~others] = torch.ceil(amplitude[~others] / amplitude[others].max()).clamp(1, TIMES).long()
        able = group.high * smooth <= scale * (254 - zero_point)
        errors = ((weight**2).sum(dim=0) / smooth**2).double() * able
        for _ in range(columns - int(times.sum() - len(times)) if able.any() else 0):
            times[int(torch.argmax(errors * (1 / times**2 - 1 / (times + 1) ** 2)))] += 1
        repeated = torch.repeat_interleave(torch.arange(len(reach)), times - 1)
        offset = torch.cat([torch.arange(1, int(count)) / int(count) for count in times])
        return cls(smooth, scale, zero_point, repeated, offset)

    def exact(self, rows: torch.Tensor) -> torch.Tensor:
        """Wide and smoothed, with the offsets, as it is before it is rounded."""
        smoothed = rows * self.smooth
        return torch.cat([smoothed, smoothed[..., self.repeated] + self.offset * self.scale], dim=-1)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Quantized and back, wide and still smoothed."""
        steps = self.exact(rows) / self.scale
        return ((torch.round(steps) + self.zero_point).clamp(0, 255) - self.zero_point) * self.scale

    def spread(self, weight: torch.Tensor) -> torch.Tensor:
        """Weights `[out, in]` as those of the wide and smoothed input, `[out, wide]`."""
        times = torch.ones(weight.shape[1]).index_add_(0, self.repeated, torch.ones(len(self.repeated)))
        weight = weight / times / self.smooth
        return torch.cat([weight, weight[:, self.repeated]], dim=1)


def _scale(weight: torch.Tensor, largest: int) -> torch.Tensor:
    return (weight.abs().amax(dim=1) / largest).clamp(min=1e-9).float()


def _nearest(weight: torch.Tensor, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    scale = _scale(weight, largest)
    return torch.round(weight / scale[:, None]).clamp(-largest, largest), scale


def gptq(weight: torch.Tensor, hessian: torch.Tensor, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights `[out, in]` as whole numbers from -largest to largest, and a scale for each row, by GPTQ's algorithm 1.

    Args:
        hessian: `[in, in]` float64, XᵀX of the inputs X that the rounded weights will see.
    """
    scale = _scale(weight, largest)
    damped = hessian + torch.eye(len(hessian), dtype=hessian.dtype) * max(float(hessian.diagonal().mean()) * DAMPING, 1e-12)
    order = torch.argsort(damped.diagonal(), descending=True, stable=True)
    back = torch.argsort(order)
    damped = damped[order][:, order]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    # Transposed: a column that is rounded is then a row in memory.
    left = (weight / scale[:, None]).T[order].contiguous()
    numbers = torch.empty_like(left)
    for start in range(0, len(left), BLOCK):
        end = min(start + BLOCK, len(left))
        block, errors = left[start:end].clone(), torch.empty_like(left[start:end])
        corner = factor[start:end, start:end]
        for column in range(end - start):
            numbers[start + column] = torch.round(block[column]).clamp_(-largest, largest)
            errors[column] = (block[column] - numbers[start + column]) / corner[column, column]
            block[column + 1 :].sub_(torch.outer(corner[column, column + 1 :], errors[column]))
        left[end:] -= factor[start:end, end:].T @ errors
    return numbers[back].T.contiguous(), scale


class Emulation:
    """The eager model with some of its linear layers as int8 arithmetic computes them, in floating point."""

    def __init__(self, module: torch.nn.Module, layers: Iterable[QuantizedLinear]) -> None:
        self.parts = dict(module.named_modules())
        self.layers = {layer.name: layer for layer in layers}

    @contextmanager
    def applied(self, names: Sequence[str]) -> Iterator[None]:
        """Layers of those names in int8 meanwhile."""
        before: list[tuple[Any, Any, Any]] = []
        handles = []
        for name in names:
            part: Any = self.parts[name]
            layer = self.layers[name]
            quantizer = Quantizer.of(layer)
            before.append((part, part.weight, part.bias))
            rounded = torch.from_numpy(layer.weight.astype(np.float32) * layer.weight_scale[:, None])
            shift = torch.from_numpy(layer.shift)
            part.weight = torch.nn.Parameter(rounded, requires_grad=False)
            part.bias = torch.nn.Parameter(shift if part.bias is None else part.bias + shift, requires_grad=False)
            handles.append(part.register_forward_pre_hook(lambda _, given, quantizer=quantizer: (quantizer(given[0]),)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for part, weight, bias in before:
                part.weight, part.bias = weight, bias
