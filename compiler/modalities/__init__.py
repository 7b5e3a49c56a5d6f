"""What inputs are made of: text, images, sound, images beside texts. All that differs between them stands in one module each.

A task names its modality (`compiler.tasks`). A modality is a module that satisfies `Modality`, and a line in `MODALITIES`.
Libraries are imported inside functions, so that reading this table costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from compiler.modalities import audio, image, image_text, text

if TYPE_CHECKING:
    import numpy as np
    import torch

    from compiler.numerics import Case
    from compiler.types import Model, Snapshot

Line = tuple[str, ...]


@dataclass(frozen=True)
class Samples:
    """What a model is held against. `note` is what a user is told of how they were made; empty when there is nothing."""

    cases: list[Case]
    note: str = ""


class Modality(Protocol):
    """What a modality's module offers."""

    @property
    def LIBRARIES(self) -> tuple[str, ...]:  # noqa: N802
        """The distributions, beside those of every model, whose versions shape the samples."""

    @property
    def MAIN_INPUTS(self) -> tuple[str, ...]:  # noqa: N802
        """The `main_input_name` of transformers' classes that take it."""

    @property
    def DERIVED(self) -> Mapping[int, str]:  # noqa: N802
        """The names of an output's axes, by number, that are computed of those of an input."""

    def check(self, snapshot: Snapshot, task: str) -> None:
        """Make sure that there is something to make the task's processor from. Raises SourceError, or ConfigError for what is
        not installed. Imports no torch."""

    def processor(self, folder: Path, options: Mapping[str, Any]) -> Any:
        """What makes inputs, from the checkpoint's files in a folder. `options` are those of transformers' loaders."""

    def prepare(self, module: torch.nn.Module, processor: Any, task: str, uri: str) -> dict[str, Any]:
        """`axes`, `example` and `positions` of a `Model`.

        Raises:
            SourceError: the processor does not fit the model.
        """

    def probes(self, model: Model) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, np.ndarray[Any, Any]]]:
        """Two inputs whose dynamic axes have no size in common, to see which axes of the outputs follow them."""

    def samples(self, model: Model, lines: Sequence[Line], batches: Sequence[int], sequences: Sequence[int] | None) -> Samples:
        """The cases of the gate, from the lines of a data file. Raises ConfigError when a line or a shape does not fit."""


MODALITIES: Mapping[str, Modality] = {"text": text, "image": image, "audio": audio, "image-text": image_text}
