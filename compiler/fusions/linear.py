"""Linear layers through oneDNN: queries, keys and values in one, gelu and add inside, weights packed when the file is opened.

These are the fusions that IPEX was used for. They happen while the model is traced: a mode sees each call of torch's functions
with its arguments, so nothing depends on how a model's code is written. What a fusion replaces is dead code in the trace.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from compiler.fusions.attention import attention
from compiler.fusions.int8 import RECORD, int8_linear, int8_linear_add


@torch.jit.script
def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, record: list[torch.Tensor] | None = None
) -> torch.Tensor:
    """`x` times a weight that oneDNN has packed, or a plain one where it cannot (a CPU without bf16); in int8, with what
    `record` holds, where the weight is."""
    if record is not None and weight.dtype == torch.int8:
        low: torch.Tensor = int8_linear(x, weight, record, None, None)
        return low
    if weight.is_mkldnn:
        fused: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], None)
        return fused
    return functional.linear(x, weight, bias)


@torch.jit.script
def embedding(ids: torch.Tensor, table: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Rows of a table; of one in int8, times their scales, `[rows, 1]`, in the dtype of these."""
    if table.dtype == torch.int8:
        return functional.embedding(ids, table).to(scale.dtype) * functional.embedding(ids, scale)
    return functional.embedding(ids, table)


@torch.jit.script
def linear_gelu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    approximate: str,
    record: list[torch.Tensor] | None = None,
    following: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """gelu of `linear`. `following` is the record of the layer that alone is given the result, if there is one."""
    if record is not None and weight.dtype == torch.int8:
        low: torch.Tensor = int8_linear(x, weight, record, approximate, following)
        return low
    if weight.is_mkldnn:
        fused: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], approximate)
        return fused
    return functional.gelu(functional.linear(x, weight, bias), approximate=approximate)


@torch.jit.script
def linear_add(
    x: torch.Tensor,
    other: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    record: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """`other` plus `linear`; both of one shape."""
    if record is not None and weight.dtype == torch.int8:
        low: torch.Tensor = int8_linear_add(x, other, weight, record)
        return low
    if weight.is_mkldnn:
        fused: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, other, weight, bias, "add")
        return fused
    return functional.linear(x, weight, bias) + other


@dataclass(frozen=True)
class Layer:
    """What a linear layer is called with: `pack` is its weight's place among the packed ones, `bias` its bias's among the
    tensors; it gives part `part` of an output that is split into `sizes`. `alone` says that no other layer has its input."""

    pack: int
    bias: int | None
    part: int = 0
    sizes: tuple[int, ...] = ()
    alone: bool = True


@dataclass
class Weights:
    """A model's parameters as its traced functions take them: a list, each tensor once.

    `packs` are the places of those that linear layers use, to be packed when the file is opened; `shared` those of them that
    something else uses too. `tables` are the places of those whose rows are looked up, and nothing else, each with the place
    of what stands for its scales in int8, which is empty until it is.
    """

    tensors: list[torch.Tensor] = field(default_factory=list)
    packs: list[int] = field(default_factory=list)
    places: dict[int, int] = field(default_factory=dict)
    layers: dict[int, Layer] = field(default_factory=dict)
    shared: set[int] = field(default_factory=set)
    tables: dict[int, int] = field(default_factory=dict)

    def add(self, tensor: torch.Tensor) -> int:
        self.tensors.append(tensor.detach())
        return len(self.tensors) - 1


@dataclass(frozen=True)
class Linears:
    """Linear layers, and what follows them, as oneDNN's kernels."""

    def weights(self, module: torch.nn.Module, example: Mapping[str, torch.Tensor]) -> Weights:
        """What `collect` finds in a module, which may be the model at another precision."""
        return collect(module, lambda: module(**example))

    def applied(
        self,
        weights: Weights,
        tensors: Sequence[torch.Tensor],
        packed: Sequence[torch.Tensor],
        records: Sequence[torch.Tensor] = (),
    ) -> Fuse:
        """The mode to trace in."""
        return Fuse(weights, tensors, packed, records)


def collect(module: torch.nn.Module, run: Callable[[], object]) -> Weights:
    """The weights of a model; those of linear layers that are given the same tensor are joined into one. `run` calls it."""
    groups: dict[int, list[tuple[torch.nn.Parameter, torch.nn.Parameter | None]]] = {}
    kept: list[Any] = []
    elsewhere: set[int] = set()
    looked_up: set[int] = set()

    class Record(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func is functional.linear and isinstance(args[1], torch.nn.Parameter):
                bias = args[2] if len(args) > 2 else kwargs.get("bias")
                pair = (args[1], bias)
                if all(weight is not args[1] for group in groups.values() for weight, _ in group):
                    groups.setdefault(id(args[0]), []).append(pair)
                kept.append(args[0])  # or another tensor may get its id
            elif _rows(func, args, kwargs) is not None:
                looked_up.add(id(args[1]))
            else:
                elsewhere.update(id(value) for value in (*args, *kwargs.values()) if isinstance(value, torch.nn.Parameter))
            return func(*args, **kwargs)

    with torch.no_grad(), Record():
        run()
    linears = {id(weight) for group in groups.values() for weight, _ in group}
    elsewhere |= looked_up & linears
    weights = Weights()
    joined = set()
    for group in groups.values():
        if len(group) > 1 and all(bias is not None and id(weight) not in elsewhere for weight, bias in group):
            sizes = tuple(weight.shape[0] for weight, _ in group)
            weights.packs.append(weights.add(torch.cat([weight for weight, _ in group])))
            place = weights.add(torch.cat([bias for _, bias in group if bias is not None]))
            for part, (weight, _) in enumerate(group):
                weights.layers[id(weight)] = Layer(len(weights.packs) - 1, place, part, sizes)
            joined |= {id(tensor) for pair in group for tensor in pair}
    for parameter in module.parameters():
        if id(parameter) not in joined and id(parameter) not in weights.places:
            weights.places[id(parameter)] = weights.add(parameter)
    for parameter in module.parameters():
        if id(parameter) in looked_up - elsewhere:
            weights.tables[weights.places[id(parameter)]] = weights.add(parameter.new_empty(0))
    for group in groups.values():
        for weight, bias in group:
            if id(weight) not in joined:
                weights.packs.append(weights.places[id(weight)])
                if id(weight) in elsewhere:
                    weights.shared.add(weights.places[id(weight)])
                weights.layers[id(weight)] = Layer(
                    len(weights.packs) - 1, None if bias is None else weights.places[id(bias)], alone=len(group) == 1
                )
    return weights


def _rows(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """The ids of a call that looks up rows of a parameter as they are, else None. The row for padding has no part in that."""
    if func is not functional.embedding or len(args) < 2 or not isinstance(args[1], torch.nn.Parameter):
        return None
    more = dict(zip(("padding_idx", "max_norm"), args[2:4], strict=False)) | dict(kwargs)
    return args[0] if more.get("max_norm") is None else None


def _plain(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """The arguments of a call of scaled_dot_product_attention for `attention`; None where it asks for more."""
    given = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False)) | dict(kwargs)
    query, key = given["query"], given["key"]
    if given.get("dropout_p") or given.get("is_causal") or given.get("enable_gqa"):
        return None
    if query.dim() != 4 or key.shape[1] != query.shape[1]:
        return None
    scale = given.get("scale")
    return query, key, given["value"], given.get("attn_mask"), float(query.shape[-1] ** -0.5 if scale is None else scale)


class Fuse(TorchFunctionMode):
    """While it is active, parameters are replaced by traced inputs, linear layers by the functions above, and scaled dot
    products by `attention`.

    Args:
        weights: what `collect` found.
        tensors: the traced inputs that stand for `weights.tensors`.
        packed: those that stand for the packed weights, in the order of `weights.packs`.
        records: those that stand for what these need in int8, `RECORD` for each; none where no file is made that could be.
    """

    def __init__(
        self,
        weights: Weights,
        tensors: Sequence[torch.Tensor],
        packed: Sequence[torch.Tensor],
        records: Sequence[torch.Tensor] = (),
    ) -> None:
        super().__init__()
        self.weights, self.tensors, self.packed, self.records = weights, tensors, packed, records
        # How each packed weight runs: the name of what is fused with it.
        self.runs = ["linear"] * len(packed)
        # The packed weights of layers that are given gelu of what a layer makes, by its own; and those whose results are added
        # to something, which is of their width.
        self._followers: dict[int, set[int]] = {}
        self._added: set[int] = set()
        self._count: Counter[str] = Counter()
        # By a tensor's id: what its layer was given, the layer, the tensor, and the versions of both, since an operation in
        # place changes a tensor and keeps its identity.
        self._made: dict[int, tuple[torch.Tensor, Layer, torch.Tensor, tuple[int, int]]] = {}
        self._split: dict[tuple[int, int], tuple[torch.Tensor, ...]] = {}
        # By the id of gelu's result: it, its version, the layer before, and the call that made it, to be made again for the
        # layer that follows.
        self._gelus: dict[int, tuple[torch.Tensor, int, Layer, Callable[[Sequence[torch.Tensor]], torch.Tensor]]] = {}
        self._kept: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func is functional.linear and (layer := self.weights.layers.get(id(args[1]))) is not None:
            return self._linear(args[0], layer)
        if (ids := _rows(func, args, kwargs)) is not None:
            place = self.weights.places.get(id(args[1]))
            if place in self.weights.tables:
                return embedding(ids, self.tensors[place], self.tensors[self.weights.tables[place]])
        if func is functional.dropout and not (args[2] if len(args) > 2 else kwargs.get("training", True)):
            return args[0]
        if func is functional.scaled_dot_product_attention and (plain := _plain(args, kwargs)) is not None:
            self._count["attention"] += 1
            return attention(*plain)
        if name == "gelu" and (made := self._layer(args[0])) is not None:
            x, layer = made
            self._ran("linear_gelu", layer)
            approximate = args[1] if len(args) > 1 else kwargs.get("approximate", "none")
            call = partial(linear_gelu, x, *self._weight(layer), approximate, self._record(layer))
            output = self._keep(call())
            self._gelus[id(output)] = (output, output._version, layer, call)
            return output
        if name in ("add", "__add__", "__radd__") and len(args) == 2 and not kwargs:
            for one, other in (args, args[::-1]):
                made = self._layer(one)
                if made is not None and isinstance(other, torch.Tensor) and other.shape == one.shape:
                    x, layer = made
                    self._ran("linear_add", layer)
                    self._added.add(layer.pack)
                    return self._keep(linear_add(x, other, *self._weight(layer), self._record(layer)))
        return func(*map(self._traced, args), **{key: self._traced(value) for key, value in kwargs.items()})

    def counts(self) -> dict[str, int]:
        """How many layers run as each of the functions above; those of a joined layer count once."""
        found = dict(self._count)
        found["linear"] = found.get("linear", 0) - found.get("linear_gelu", 0) - found.get("linear_add", 0)
        return {name: number for name, number in sorted(found.items()) if number}

    def followed(self) -> list[int | None]:
        """For each packed weight, that of the one layer which is given gelu of its result, where its result may be wider for
        that; else None."""
        alone = {pack: min(own) for pack, own in self._followers.items() if len(own) == 1 and pack not in self._added}
        return [alone.get(pack) for pack in range(len(self.packed))]

    def _linear(self, x: torch.Tensor, layer: Layer) -> torch.Tensor:
        if not layer.sizes:
            self._count["linear"] += 1
            gelu = self._gelus.get(id(x))
            if gelu is not None and gelu[1] == x._version and layer.alone:
                self._followers.setdefault(gelu[2].pack, set()).add(layer.pack)
                x = self._keep(gelu[3](self._record(layer)))
            output = self._keep(linear(x, *self._weight(layer), self._record(layer)))
            self._made[id(output)] = (x, layer, output, (x._version, output._version))
            return output
        key = (id(x), layer.pack)
        if key not in self._split:
            self._ran("concat_linear", layer)
            self._kept.append(x)
            output = linear(x, *self._weight(layer), self._record(layer))
            self._split[key] = torch.split(output, list(layer.sizes), dim=-1)
        return self._split[key][layer.part]

    def _layer(self, value: Any) -> tuple[torch.Tensor, Layer] | None:
        """What a linear layer was given, and which, when a value is as that layer made it."""
        if (made := self._made.get(id(value))) is None:
            return None
        x, layer, output, versions = made
        return (x, layer) if versions == (x._version, output._version) else None

    def _ran(self, name: str, layer: Layer) -> None:
        self._count[name] += 1
        self.runs[layer.pack] = name

    def _weight(self, layer: Layer) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The packed weight and the bias."""
        return self.packed[layer.pack], None if layer.bias is None else self.tensors[layer.bias]

    def _record(self, layer: Layer) -> list[torch.Tensor]:
        return list(self.records[layer.pack * RECORD : (layer.pack + 1) * RECORD])

    def _traced(self, value: Any) -> Any:
        place = self.weights.places.get(id(value)) if isinstance(value, torch.nn.Parameter) else None
        return value if place is None else self.tensors[place]

    def _keep(self, output: torch.Tensor) -> torch.Tensor:
        self._kept.append(output)  # or another tensor may get its id
        return output
