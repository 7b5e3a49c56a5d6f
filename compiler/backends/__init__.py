"""The formats. Columns own mechanism: all that knows an ONNX from an OpenVINO stands in that format's one module.

A format is a module that satisfies `Backend`, and a line in `BACKENDS`. Modules import their runtime inside functions, so
that reading this table costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from compiler.backends import onnx, openvino, torchscript
from compiler.types import Artifact, Model, Precision, Runner, Target

if TYPE_CHECKING:
    import numpy as np

    from compiler.quantization.layers import Layers


class Backend(Protocol):
    """What a format's module offers."""

    @property
    def LIBRARIES(self) -> tuple[str, ...]:  # noqa: N802
        """The distributions whose versions shape the files' bytes or what they compute."""

    @property
    def PRECISIONS(self) -> Mapping[Precision, Precision | None]:  # noqa: N802
        """The precisions there are, each with the one whose file it is made from; None: from the model itself."""

    @property
    def FUSIONS(self) -> tuple[str, ...]:  # noqa: N802
        """The rewrites of the eager model that it wants, of `fusions.REWRITES`."""

    def files(self, precision: Precision) -> tuple[str, ...]:
        """The paths in a release that an artifact always has, the one to open first."""

    def runtime(self, precision: Precision) -> dict[str, Any]:
        """The settings that the artifact is validated under, and that whoever opens it applies."""

    def export(self, out: Path, model: Model, target: Target) -> dict[str, Any]:
        """Write the artifact's files below `out` and return what is known of them: `opset`, and counts of `fusions`."""

    def reduce(self, out: Path, exported: Path, precision: Precision) -> dict[str, Any]:
        """As `export`, but from the files below `exported`, at the precision that `PRECISIONS` names."""

    def quantize(self, out: Path, exported: Path, layers: Layers, rest: Precision) -> dict[str, Any]:
        """Write the int8 artifact below `out`, from the files below `exported`: `layers` in int8, all else in `rest`, of which
        those files are, or of the precision that `rest` is made from.

        Returns what `export` does, and by layers' names the operators of those that are `int8`, and why others are `left`.
        """

    def open(self, root: Path, artifact: Artifact, threads: int | None) -> Runner:
        """The artifact below `root` in its runtime, under its settings; all cores when `threads` is None."""

    def inner(
        self, root: Path, artifact: Artifact, inputs: Mapping[str, np.ndarray[Any, Any]]
    ) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
        """Every value between the inputs and the outputs that the artifact computes in floating point, float32, by its name in
        the file and in the order of the file; the outputs come last, by their own names. The inputs are without padding, and
        the file stays as it is: a copy in memory gives its inner values as further outputs."""


BACKENDS: dict[str, Backend] = {"torchscript": torchscript, "onnx": onnx, "openvino": openvino}
