"""The sentence embedding inside the graph: what sentence-transformers does behind the encoder, as the checkpoint's own files
say (modules.json, 1_Pooling/config.json …), as one more output, `sentence_embedding`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from compiler.errors import SourceError
from compiler.pooling import NO_WORK, POOLING, modes

if TYPE_CHECKING:
    import torch

    from compiler.types import Snapshot

NAME = "sentence_embedding"
ACTIVATIONS = ("GELU", "Identity", "ReLU", "Sigmoid", "SiLU", "Tanh")


def with_sentence_embedding(module: Any, snapshot: Snapshot) -> Any:
    """An encoder of text with `sentence_embedding`, float32 `[batch, width]`, among its outputs.

    Raises:
        SourceError: the checkpoint has no files of sentence-transformers, or they ask for what is not known here.
    """
    import torch
    from transformers import PreTrainedModel

    steps = _steps(snapshot)
    forward = type(module).forward

    class Embedder(PreTrainedModel):  # type: ignore[misc]
        """The encoder, as the base model of one with a head: rewrites take it for what it is."""

        base_model_prefix = "encoder"
        _supports_sdpa = _supports_attention_backend = _supports_flash_attn = _supports_flex_attn = True

        def __init__(self) -> None:
            super().__init__(module.config)
            self.encoder = module
            self.steps = torch.nn.ModuleList(steps)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            outputs = self.encoder(*args, **kwargs)
            # In float32 whatever the encoder is in: a vector that is to have length 1 has it.
            vectors = outputs["last_hidden_state"].float()
            for step in self.steps:
                vectors = step(vectors, kwargs["attention_mask"])
            # A plain dict: transformers' own classes of outputs take no other names.
            return {**{name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}, NAME: vectors}

    Embedder.forward.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    Embedder.__name__ = type(module).__name__
    return Embedder()


def _steps(snapshot: Snapshot) -> list[torch.nn.Module]:
    """What follows the encoder: each takes vectors, `[batch, sequence, width]` before the pooling and `[batch, width]` behind
    it, and the attention mask."""
    import torch

    class Step(torch.nn.Module):
        def __init__(self, function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
            super().__init__()
            self.function = function

        def forward(self, vectors: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.function(vectors, mask)

    class Dense(torch.nn.Module):
        def __init__(self, linear: torch.nn.Linear, activation: torch.nn.Module) -> None:
            super().__init__()
            self.linear, self.activation = linear, activation

        def forward(self, vectors: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.activation(self.linear(vectors.to(self.linear.weight.dtype)))
            return result.float()

    names = {file.path for file in snapshot.files}
    if "modules.json" not in names:
        raise SourceError(f"{snapshot.uri}: no modules.json, which says how {NAME} is made; leave sentence_embedding out")
    steps: list[torch.nn.Module] = []
    entries = _read(snapshot, "modules.json")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise SourceError("modules.json: not a list of modules; fetch the checkpoint again")
    for entry in entries[1:]:
        kind, folder = str(entry.get("type", "")).rpartition(".")[2], str(PurePosixPath(str(entry.get("path", ""))))
        if kind == "Pooling":
            steps.append(Step(_pool(_modes(_settings(snapshot, folder), f"{folder}/config.json"))))
        elif kind == "Normalize":
            steps.append(Step(lambda vectors, mask: torch.nn.functional.normalize(vectors, dim=-1)))
        elif kind in NO_WORK:
            continue
        elif kind == "Dense" and f"{folder}/model.safetensors" in names:
            steps.append(Dense(*_dense(snapshot, folder)))
        else:
            raise SourceError(f"modules.json: {kind or entry} cannot be put into the graph; leave sentence_embedding out")
    if not steps or not isinstance(steps[0], Step):
        raise SourceError(f"modules.json: no pooling behind the encoder, so there is no {NAME}; leave sentence_embedding out")
    return steps


def _read(snapshot: Snapshot, name: str) -> Any:
    """A JSON file among those of the checkpoint that were hashed."""
    try:
        if name not in {file.path for file in snapshot.files}:
            raise SourceError(f"{name}: missing, and modules.json names its folder; fetch the checkpoint again")
        return json.loads((snapshot.root / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{name}: cannot be read as JSON; fetch the checkpoint again") from error


def _settings(snapshot: Snapshot, folder: str) -> dict[str, Any]:
    settings = _read(snapshot, f"{folder}/config.json")
    if not isinstance(settings, dict):
        raise SourceError(f"{folder}/config.json: not a JSON object; fetch the checkpoint again")
    return settings


def _modes(config: Mapping[str, Any], where: str) -> tuple[str, ...]:
    named = modes(config)
    unknown = [mode for mode in named if mode not in POOLING or mode == "weightedmean"]
    if unknown or not named:
        said = ", ".join(unknown) or "by nothing"
        raise SourceError(f"{where}: pooling {said} is not known here; leave sentence_embedding out")
    if config.get("include_prompt") is False:
        raise SourceError(
            f"{where}: leaves a prompt out of the pooling, which no graph knows of; leave sentence_embedding out"
        )
    return named


def _pool(modes: tuple[str, ...]) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The poolings, by the formulas of sentence-transformers' `Pooling`."""
    import torch

    def at(vectors: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        return torch.gather(vectors, 1, place[:, None, None].expand(-1, 1, vectors.shape[-1])).squeeze(1)

    def pool(vectors: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        # float, for ONNX Runtime has no argmax of int64; the texts of a batch may be padded on either side.
        real = mask.to(vectors.dtype)
        total = (vectors * real[..., None]).sum(dim=1)
        count = real.sum(dim=1, keepdim=True).clamp(min=1e-9)
        place = torch.arange(mask.shape[1], dtype=vectors.dtype)
        found = []
        for mode in modes:
            if mode == "cls":
                found.append(at(vectors, real.argmax(dim=1)))
            elif mode == "lasttoken":
                found.append(at(vectors, (real * (place + 1)).argmax(dim=1)))
            elif mode == "max":
                found.append(vectors.masked_fill(mask[..., None] == 0, float("-inf")).max(dim=1).values)
            else:
                found.append(total / (count if mode == "mean" else count.sqrt()))
        return torch.cat(found, dim=-1)

    return pool


def _dense(snapshot: Snapshot, folder: str) -> tuple[torch.nn.Linear, torch.nn.Module]:
    import torch
    from safetensors.torch import load_file

    activation = str(_settings(snapshot, folder).get("activation_function", "Tanh")).rpartition(".")[2]
    weights = load_file(snapshot.root / folder / "model.safetensors")
    if activation not in ACTIVATIONS or "linear.weight" not in weights:
        raise SourceError(f"{folder}: {activation} or its weights are not known here; leave sentence_embedding out")
    width, size = weights["linear.weight"].shape
    linear = torch.nn.Linear(size, width, bias="linear.bias" in weights)
    linear.load_state_dict({key.removeprefix("linear."): value.float() for key, value in weights.items()})
    return linear, getattr(torch.nn, activation)()
