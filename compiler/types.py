"""The values that flow through a build. All are frozen; none is a bag of context."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    import torch

Precision = Literal["fp32", "bf16", "int8"]

#: Figures that are the better the smaller they are.
AT_MOST = ("max_abs", "max_rel", "kl", "drop", "noise")
#: Fewer texts than this say nothing of which of them are neighbours.
LEAST_TEXTS = 16
#: The texts that a layer's share in the error is measured on; with fewer left over, some of the samples serve.
HELD = 64
#: Named arrays in, named arrays out: an artifact opened in its runtime, or the original model.
Runner = Callable[[Mapping[str, "np.ndarray[Any, Any]"]], dict[str, "np.ndarray[Any, Any]"]]


@dataclass(frozen=True, order=True)
class File:
    """A file by its path relative to the folder that holds it (with `/`), its content's sha256 (hex) and size (bytes)."""

    path: str
    sha256: str
    size: int


@dataclass(frozen=True)
class Snapshot:
    """The files of a checkpoint that a build reads, found and hashed; nothing else of the folder is ever opened.

    `weights` are the tensors (safetensors, one GGUF, or a pickle that the user allowed), `support` is what travels with
    a release: config, tokenizer, sentence-transformers' files, licence. `revision` is a commit sha for a hub's source.
    """

    uri: str
    root: Path
    weights: tuple[File, ...]
    support: tuple[File, ...]
    revision: str | None = None
    licence: str | None = None

    @property
    def files(self) -> tuple[File, ...]:
        return tuple(sorted(self.weights + self.support))


@dataclass(frozen=True)
class Tensor:
    """An input or output: its name, numpy dtype, and shape, with a name where it is dynamic: `batch`, `sequence`, `choices`,
    `texts`, `samples` (of a sound), `frames` (what a model makes of them), `height`, `width`."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Signature:
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Signature:
        """A signature from what `dataclasses.asdict` made of one, also by way of JSON."""
        sides = (
            tuple(Tensor(tensor["name"], tensor["dtype"], tuple(tensor["shape"])) for tensor in value[side])
            for side in ("inputs", "outputs")
        )
        return cls(*sides)


@dataclass(frozen=True)
class Model:
    """A checkpoint in memory, untouched: eager, fp32, in eval mode.

    `processor` makes its inputs of text, images or sound. `axes` are those of each tensor that it takes, in the order of its
    forward: a number, or a name where it is dynamic (see `Tensor`). `example` are inputs to trace with; their dtypes are the
    model's. `positions` is the longest sequence, in tokens, None where unbounded or where there are no tokens.
    `rewrites` are those that a backend may apply while it traces, and `declined` says why others do not apply; both are
    empty before `optimize`.
    """

    module: torch.nn.Module
    processor: Any
    task: str
    axes: Mapping[str, tuple[int | str, ...]]
    example: Mapping[str, torch.Tensor]
    positions: int | None
    left_out: tuple[str, ...] = ()
    rewrites: Mapping[str, Any] = field(default_factory=dict)
    declined: Mapping[str, str] = field(default_factory=dict)

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(self.axes)

    @property
    def tokenizer(self) -> Any:
        """The processor, or the part of it, that makes tokens of text."""
        return getattr(self.processor, "tokenizer", self.processor)

    def dynamic_axes(self, value: Any) -> dict[str, dict[int, Any]]:
        """For each input, `value` at its dynamic axes, as torch's exporters want them."""
        return {
            name: {number: value for number, axis in enumerate(axes) if isinstance(axis, str)}
            for name, axes in self.axes.items()
        }


@dataclass(frozen=True)
class Target:
    """One artifact to make. `opset` is ONNX's operator set, None elsewhere or for the exporter's own choice."""

    format: str
    precision: Precision
    opset: int | None = None

    def __str__(self) -> str:
        return f"{self.format} {self.precision}"


@dataclass(frozen=True)
class Artifact:
    """Files after export, with what a runtime must be told to run them as they were validated.

    `runtime` are settings of the runtime (`INFERENCE_PRECISION_HINT`, graph level …) that whoever opens it applies.
    `fusions` counts what was fused in the file; `declined` says why a fusion did not apply. `key` is the cache key of the
    step that made it. `fast_on` are CPU features, by their names in /proc/cpuinfo, of which one makes it fast; it is right
    without any of them, unless `needs` names some: those without which it was not shown to be right.

    Of an int8 artifact, `int8` are the layers that are, each with the operator that computes it, `kept` those that are not,
    each with the reason, and `ladder` the plans that were tried to find this one.
    """

    format: str
    precision: str
    files: tuple[File, ...]
    runtime: Mapping[str, Any]
    key: str
    opset: int | None = None
    fusions: Mapping[str, int] = field(default_factory=dict)
    declined: Mapping[str, str] = field(default_factory=dict)
    fast_on: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    int8: Mapping[str, str] = field(default_factory=dict)
    kept: Mapping[str, str] = field(default_factory=dict)
    ladder: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Check:
    """One figure against its limit. `worst` says where: the sample, its shape, the output and the index."""

    # As validation.json is read.
    __pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}  # noqa: RUF012
    output: str
    name: str
    figure: float
    limit: float
    passed: bool
    worst: str


@dataclass(frozen=True)
class Report:
    """The verdict on one artifact."""

    format: str
    precision: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def figure(self, name: str) -> float | None:
        """The worst figure of that name over the outputs: the largest error, the smallest agreement."""
        figures = [check.figure for check in self.checks if check.name == name]
        if not figures:
            return None
        return max(figures) if name in AT_MOST else min(figures)


@dataclass(frozen=True)
class Event:
    """What a reader of the progress is told. `state`: a step of a model was `start`ed, `run`, found `cached` or `failed`;
    the build is `waiting` for another; the release is `current` (there and unchanged) or
    `released`, and in a registry `published` or `there` already, and its aliases
    `moved`."""

    model: str
    step: str
    state: str
    seconds: float = 0.0
    detail: str = ""
