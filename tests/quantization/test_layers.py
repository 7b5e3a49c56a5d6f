"""Layers in int8 as numbers: what is saved is what is loaded, and graphs' weights are known again."""

from __future__ import annotations

import hashlib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compiler.quantization.layers import Layers, QuantizedLinear, digest, load, save
from tests.quantization.formula import widened

Array = np.ndarray[Any, Any]
RANDOM = np.random.default_rng(9)


def original(outputs: int, inputs: int) -> Array:
    return RANDOM.standard_normal((outputs, inputs)).astype(np.float32)


def layer(name: str, weight: Array, *, smooth: Array | None = None, zero_point: int = 128) -> QuantizedLinear:
    outputs, inputs = weight.shape
    return QuantizedLinear(
        name,
        digest(weight),
        RANDOM.integers(-127, 128, (outputs, inputs)).astype(np.int8),
        RANDOM.random(outputs, dtype=np.float32),
        smooth,
        float(np.float32(0.1)),
        zero_point,
        RANDOM.random(outputs, dtype=np.float32),
    )


WEIGHTS = {"query": original(6, 4), "key": original(6, 4), "value": original(2, 4), "dense": original(4, 6)}
SMOOTH = RANDOM.random(4, dtype=np.float32)
LAYERS = {name: layer(name, weight, smooth=SMOOTH if name != "dense" else None) for name, weight in WEIGHTS.items()}


def same(one: QuantizedLinear, other: QuantizedLinear) -> None:
    for field in fields(QuantizedLinear):
        before, after = getattr(one, field.name), getattr(other, field.name)
        if isinstance(before, np.ndarray):
            assert before.dtype == after.dtype
            assert np.array_equal(before, after), field.name
        else:
            assert (type(before), before) == (type(after), after)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    (wide,) = widened([replace(LAYERS["key"], name="wide")])
    given = {**LAYERS, "wide": wide}
    save(tmp_path / "layers.safetensors", given.values())
    found = load(tmp_path / "layers.safetensors", ["dense", "query", "wide"]).by_name
    assert list(found) == ["dense", "query", "wide"]
    for name, one in found.items():
        same(given[name], one)
    assert found["wide"].inputs == 4


def test_the_same_layers_are_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "other"):
        save(tmp_path / name, LAYERS.values())
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_digest_is_of_the_rows_whatever_lies_in_memory() -> None:
    weight = WEIGHTS["query"]
    assert digest(weight) == hashlib.sha256(weight.astype("<f4").tobytes()).hexdigest()
    assert digest(np.asfortranarray(weight)) == digest(weight) == digest(weight.astype(np.float64))
    assert digest(weight.T) != digest(weight)


@pytest.mark.parametrize("names", [["query"], ["query", "key"], ["value", "key", "query"]])
def test_weights_one_below_the_other_are_found(names: list[str]) -> None:
    layers = Layers(LAYERS.values())
    stacked = np.concatenate([WEIGHTS[name] for name in names])
    found = layers.find(stacked)
    assert found is not None
    assert [one.name for one in found] == names
    joined = layers.joined(stacked)
    assert joined is not None
    assert (joined.name, joined.digest) == ("+".join(names), digest(stacked))
    assert np.array_equal(joined.weight, np.concatenate([LAYERS[name].weight for name in names]))
    assert np.array_equal(joined.weight_scale, np.concatenate([LAYERS[name].weight_scale for name in names]))
    assert np.array_equal(joined.shift, np.concatenate([LAYERS[name].shift for name in names]))
    assert joined.smooth is LAYERS["query"].smooth
    by_digests = layers.joined_as([digest(WEIGHTS[name]) for name in names])
    assert by_digests is not None
    same(replace(by_digests, digest=joined.digest), joined)


def test_other_weights_are_none_of_them() -> None:
    layers = Layers(LAYERS.values())
    query, key = WEIGHTS["query"], WEIGHTS["key"]
    for other in (query + 1e-6, query[:5], np.concatenate([query, original(6, 4)]), np.concatenate([query, key[:3]]), query.T):
        assert layers.find(other) is None
        assert layers.joined(other) is None
    assert layers.find(query[:0]) is None
    assert Layers([]).find(query) is None
    assert Layers([LAYERS["query"]]).joined_as([digest(query), digest(key)]) is None
    assert layers.joined_as([]) is None


@pytest.mark.parametrize("change", [{"scale": 0.2}, {"zero_point": 127}, {"smooth": None}, {"smooth": SMOOTH * 2}])
def test_layers_of_other_inputs_are_not_joined(change: dict[str, Any]) -> None:
    layers = Layers([LAYERS["query"], replace(LAYERS["key"], **change)])
    stacked = np.concatenate([WEIGHTS["query"], WEIGHTS["key"]])
    assert layers.find(stacked) is None
    assert layers.joined(stacked) is None
    assert layers.joined_as([digest(WEIGHTS["query"]), digest(WEIGHTS["key"])]) is None
    assert layers.find(WEIGHTS["key"]) is not None
