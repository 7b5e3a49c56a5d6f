"""Linear layers and embeddings in int8, as every backend is handed them: numbers only, found again in a graph by the weights
that they replace.

A layer computes, in the original, `x · weightᵀ + bias`. In int8 it computes

    s = x · smooth                                                         the channels evened out
    q = clip(round(concat(s, s[repeated]) / scale + offset) + zero_point, 0, 255)     uint8, one scale a layer
    (q - zero_point) · weightᵀ · scale · weight_scale + bias + shift       int8 × uint8 → int32, then floating point

where `weight` and `weight_scale` are already those of the smoothed layer. Each backend says this in its runtime's operators.

A channel that is far wider than the others is given m times, the t-th time t/m of a step higher: rounded, the m numbers add
up to the value in steps that are m times finer (Hermite's identity: the sum of floor(y + t/m) is floor(m·y)), so that it
costs the others no precision and is itself as precise as they are. `offset` is 0 for the first of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
# What a calibration's layers and tables are in.
LAYERS = "layers.safetensors"
# Why an embedding of a plan is not in int8 in some file.
NO_TABLE = "its rows are not looked up alone, or not in this file"


@dataclass(frozen=True)
class QuantizedLinear:
    """One linear layer in int8. Layers that are given the same input have `smooth`, `scale` and `zero_point` in common.

    Attributes:
        name: the module's name in the original, such as `encoder.layer.0.output.dense`.
        digest: sha256 (hex) of the weights that it replaces, float32 `[out, in]`, in C order.
        weight: int8 `[out, wide]`, from -127 to 127 (-63 to 63 for CPUs whose 16-bit sums saturate).
        weight_scale: float32 `[out]`.
        smooth: float32 `[in]`, what the input's channels are multiplied by, or None.
        scale: of the quantized input, float32.
        zero_point: of the quantized input, 0 to 255.
        shift: float32 `[out]`, what is added beside the bias: the mean error that rounding makes, taken back.
        repeated: int64 `[wide - in]`, the channels that are given once more, or None.
        offset: float32 `[wide - in]`, what is added to those before they are rounded, in steps, or None.
    """

    name: str
    digest: str
    weight: Array
    weight_scale: Array
    smooth: Array | None
    scale: float
    zero_point: int
    shift: Array
    repeated: Array | None = None
    offset: Array | None = None

    @property
    def inputs(self) -> int:
        return int(self.weight.shape[1]) - (0 if self.repeated is None else len(self.repeated))

    @property
    def outputs(self) -> int:
        return int(self.weight.shape[0])


@dataclass(frozen=True)
class QuantizedTable:
    """The rows of an embedding in int8: row i is `weight[i] * weight_scale[i]`. It is computed with in floating point: a table
    makes the file smaller, and takes no time.

    Attributes:
        name: the module's name in the original, such as `embeddings.word_embeddings`.
        digest: as a `QuantizedLinear` has it, of float32 `[rows, width]`.
        weight: int8 `[rows, width]`, from -127 to 127.
        weight_scale: float32 `[rows]`.
    """

    name: str
    digest: str
    weight: Array
    weight_scale: Array


class Layers:
    """The layers and tables of a plan, to be found in a graph by their original weights. Names say nothing there: exporters
    rename, share and join what they find."""

    def __init__(self, layers: Iterable[QuantizedLinear], tables: Iterable[QuantizedTable] = ()) -> None:
        self.by_name = {layer.name: layer for layer in layers}
        self.tables = {table.digest: table for table in tables}
        self._by_digest = {layer.digest: layer for layer in self.by_name.values()}
        self._sizes = sorted({(layer.outputs, layer.inputs) for layer in self.by_name.values()})

    def find(self, weight: Array) -> tuple[QuantizedLinear, ...] | None:
        """The layers whose original weights, one below the other, are `weight`, float32 `[out, in]`; None when these are not
        (all) layers of the plan, or do not take the same input."""
        found = []
        start = 0
        while start < len(weight):
            for outputs, inputs in self._sizes:
                part = weight[start : start + outputs]
                if inputs == weight.shape[1] and len(part) == outputs and (layer := self._by_digest.get(digest(part))):
                    found.append(layer)
                    start += outputs
                    break
            else:
                return None
        return tuple(found) if found and all(_same_input(layer, found[0]) for layer in found) else None

    def table(self, rows: Array) -> QuantizedTable | None:
        """The table whose original is `rows`, float32 `[rows, width]`; None when it is none of the plan."""
        if all(table.weight.shape != rows.shape for table in self.tables.values()):
            return None
        return self.tables.get(digest(rows))

    def joined(self, weight: Array) -> QuantizedLinear | None:
        """As `find`, as one layer that gives all their outputs, in that order. Its name is theirs, joined by `+`."""
        found = self.find(weight)
        return None if found is None else _join(found, digest(weight))

    def joined_as(self, digests: Sequence[str]) -> QuantizedLinear | None:
        """As `joined`, for weights of which only the digests are known, of each of those that are one below the other. That of
        more than one is the digest of theirs."""
        found = tuple(self._by_digest[own] for own in digests if own in self._by_digest)
        if not found or len(found) < len(digests) or not all(_same_input(layer, found[0]) for layer in found):
            return None
        return _join(found, hashlib.sha256("".join(digests).encode()).hexdigest())


def _join(layers: tuple[QuantizedLinear, ...], digest: str) -> QuantizedLinear:
    if len(layers) == 1:
        return layers[0]
    return QuantizedLinear(
        "+".join(layer.name for layer in layers),
        digest,
        np.concatenate([layer.weight for layer in layers]),
        np.concatenate([layer.weight_scale for layer in layers]),
        layers[0].smooth,
        layers[0].scale,
        layers[0].zero_point,
        np.concatenate([layer.shift for layer in layers]),
        layers[0].repeated,
        layers[0].offset,
    )


def _same_input(one: QuantizedLinear, other: QuantizedLinear) -> bool:
    if (one.scale, one.zero_point) != (other.scale, other.zero_point):
        return False
    pairs = [(one.smooth, other.smooth), (one.repeated, other.repeated), (one.offset, other.offset)]
    return all(
        first is second is None or (first is not None and second is not None and np.array_equal(first, second))
        for first, second in pairs
    )


def digest(weight: Array) -> str:
    """What `QuantizedLinear.digest` is of float32 `[out, in]`."""
    return hashlib.sha256(np.ascontiguousarray(weight, dtype=np.float32).data).hexdigest()


def save(path: Path, layers: Iterable[QuantizedLinear | QuantizedTable]) -> None:
    """Write layers and tables as safetensors: `<name>.<attribute>` for each."""
    from safetensors.numpy import save_file

    arrays: dict[str, Array] = {}
    for layer in layers:
        for field in fields(layer):
            value = getattr(layer, field.name)
            if field.name == "digest":
                value = np.frombuffer(bytes.fromhex(value), dtype=np.uint8)
            if field.name != "name" and value is not None:
                kinds: Mapping[str, Any] = {"scale": np.float32, "zero_point": np.int64}
                arrays[f"{layer.name}.{field.name}"] = np.ascontiguousarray(value, dtype=kinds.get(field.name))
    save_file(arrays, str(path))


def load(path: Path, names: Iterable[str]) -> Layers:
    """The layers and tables of those names from what `save` wrote."""
    from safetensors import safe_open

    found, tables = [], []
    with safe_open(path, framework="np") as file:
        have = set(file.keys())
        for name in names:
            kind = QuantizedLinear if f"{name}.zero_point" in have else QuantizedTable
            values: dict[str, Any] = {
                field.name: file.get_tensor(key) if (key := f"{name}.{field.name}") in have else None
                for field in fields(kind)
                if field.name != "name"
            }
            values["digest"] = values["digest"].tobytes().hex()
            if kind is QuantizedTable:
                tables.append(QuantizedTable(name, **values))
                continue
            values["scale"], values["zero_point"] = values["scale"].item(), values["zero_point"].item()
            found.append(QuantizedLinear(name, **values))
    return Layers(found, tables)
