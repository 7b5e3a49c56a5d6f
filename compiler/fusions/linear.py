"""Linear layers through oneDNN: queries, keys and values in one, gelu and add inside, weights packed when the file is opened.

These are the fusions that IPEX was used for. They happen while the model is traced: a mode sees each call of torch's functions
with its arguments, so nothing depends on how a model's code is written. What a fusion replaces is dead code in the trace.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from compiler.fusions.attention import attention


@torch.jit.script
def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`x` times a weight that oneDNN has packed, or a plain one where it cannot (a CPU without bf16)."""
    if weight.is_mkldnn:
        fused: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], None)
        return fused
    return functional.linear(x, weight, bias)


@torch.jit.script
def linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, approximate: str) -> torch.Tensor:
    """gelu of `linear`."""
    if weight.is_mkldnn:
        fused: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], approximate)
        return fused
    return functional.gelu(functional.linear(x, weight, bias), approximate=approximate)


@torch.jit.script
def linear_add(x: torch.Tensor, other: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`other` plus `linear`; both of one shape."""
    if weight.is_mkldnn:
        fused: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, other, weight, bias, "add")
        return fused
    return functional.linear(x, weight, bias) + other


@dataclass(frozen=True)
class Layer:
    """What a linear layer is called with: `pack` is its weight's place among the packed ones, `bias` its bias's among the
    tensors; it gives part `part` of an output that is split into `sizes`."""

    pack: int
    bias: int | None
    part: int = 0
    sizes: tuple[int, ...] = ()


@dataclass
class Weights:
    """A model's parameters as its traced functions take them: a list, each tensor once.

    `packs` are the places of those that linear layers use, to be packed when the file is opened.
    """

    tensors: list[torch.Tensor] = field(default_factory=list)
    packs: list[int] = field(default_factory=list)
    places: dict[int, int] = field(default_factory=dict)
    layers: dict[int, Layer] = field(default_factory=dict)

    def add(self, tensor: torch.Tensor) -> int:
        self.tensors.append(tensor.detach())
        return len(self.tensors) - 1


@dataclass(frozen=True)
class Linears:
    """Linear layers, and what follows them, as oneDNN's kernels."""

    def weights(self, module: torch.nn.Module, example: Mapping[str, torch.Tensor]) -> Weights:
        """What `collect` finds in a module, which may be the model at another precision."""
        return collect(module, lambda: module(**example))

    def applied(self, weights: Weights, tensors: Sequence[torch.Tensor], packed: Sequence[torch.Tensor]) -> Fuse:
        """The mode to trace in."""
        return Fuse(weights, tensors, packed)


def collect(module: torch.nn.Module, run: Callable[[], object]) -> Weights:
    """The weights of a model; those of linear layers that are given the same tensor are joined into one. `run` calls it."""
    groups: dict[int, list[tuple[torch.nn.Parameter, torch.nn.Parameter | None]]] = {}
    kept: list[Any] = []
    elsewhere: set[int] = set()

    class Record(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func is functional.linear and isinstance(args[1], torch.nn.Parameter):
                bias = args[2] if len(args) > 2 else kwargs.get("bias")
                pair = (args[1], bias)
                if all(weight is not args[1] for group in groups.values() for weight, _ in group):
                    groups.setdefault(id(args[0]), []).append(pair)
                kept.append(args[0])  # or another tensor may get its id
            else:
                elsewhere.update(id(value) for value in (*args, *kwargs.values()) if isinstance(value, torch.nn.Parameter))
            return func(*args, **kwargs)

    with torch.no_grad(), Record():
        run()
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
    for weight, bias in (pair for group in groups.values() for pair in group):
        if id(weight) not in joined:
            place = weights.places[id(weight)]
            weights.packs.append(place)
            weights.layers[id(weight)] = Layer(len(weights.packs) - 1, None if bias is None else weights.places[id(bias)])
    return weights


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
    """

    def __init__(self, weights: Weights, tensors: Sequence[torch.Tensor], packed: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.weights, self.tensors, self.packed = weights, tensors, packed
        self._count: Counter[str] = Counter()
        # By a tensor's id: what its layer was given, the layer, the tensor, and the versions of both, since an operation in
        # place changes a tensor and keeps its identity.
        self._made: dict[int, tuple[torch.Tensor, Layer, torch.Tensor, tuple[int, int]]] = {}
        self._split: dict[tuple[int, int], tuple[torch.Tensor, ...]] = {}
        self._kept: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func is functional.linear and (layer := self.weights.layers.get(id(args[1]))) is not None:
            return self._linear(args[0], layer)
        if func is functional.dropout and not (args[2] if len(args) > 2 else kwargs.get("training", True)):
            return args[0]
        if func is functional.scaled_dot_product_attention and (plain := _plain(args, kwargs)) is not None:
            self._count["attention"] += 1
            return attention(*plain)
        if name == "gelu" and (made := self._layer(args[0])) is not None:
            x, layer = made
            self._count["linear_gelu"] += 1
            approximate = args[1] if len(args) > 1 else kwargs.get("approximate", "none")
            return self._keep(linear_gelu(x, self.packed[layer.pack], self._bias(layer), approximate))
        if name in ("add", "__add__", "__radd__") and len(args) == 2 and not kwargs:
            for one, other in (args, args[::-1]):
                made = self._layer(one)
                if made is not None and isinstance(other, torch.Tensor) and other.shape == one.shape:
                    x, layer = made
                    self._count["linear_add"] += 1
                    return self._keep(linear_add(x, other, self.packed[layer.pack], self._bias(layer)))
        return func(*map(self._traced, args), **{key: self._traced(value) for key, value in kwargs.items()})

    def counts(self) -> dict[str, int]:
        """How many layers run as each of the functions above; those of a joined layer count once."""
        found = dict(self._count)
        found["linear"] = found.get("linear", 0) - found.get("linear_gelu", 0) - found.get("linear_add", 0)
        return {name: number for name, number in sorted(found.items()) if number}

    def _linear(self, x: torch.Tensor, layer: Layer) -> torch.Tensor:
        if not layer.sizes:
            self._count["linear"] += 1
            output = self._keep(linear(x, self.packed[layer.pack], self._bias(layer)))
            self._made[id(output)] = (x, layer, output, (x._version, output._version))
            return output
        key = (id(x), layer.pack)
        if key not in self._split:
            self._count["concat_linear"] += 1
            self._kept.append(x)
            output = linear(x, self.packed[layer.pack], self._bias(layer))
            self._split[key] = torch.split(output, list(layer.sizes), dim=-1)
        return self._split[key][layer.part]

    def _layer(self, value: Any) -> tuple[torch.Tensor, Layer] | None:
        """What a linear layer was given, and which, when a value is as that layer made it."""
        if (made := self._made.get(id(value))) is None:
            return None
        x, layer, output, versions = made
        return (x, layer) if versions == (x._version, output._version) else None

    def _bias(self, layer: Layer) -> torch.Tensor | None:
        return None if layer.bias is None else self.tensors[layer.bias]

    def _traced(self, value: Any) -> Any:
        place = self.weights.places.get(id(value)) if isinstance(value, torch.nn.Parameter) else None
        return value if place is None else self.tensors[place]

    def _keep(self, output: torch.Tensor) -> torch.Tensor:
        self._kept.append(output)  # or another tensor may get its id
        return output
