"""The TorchScript module around the traced functions: which of them runs, and the weights, plain in the file and packed in
memory.

Packed weights are of one machine and do not serialize, so the file holds them as they are and `__setstate__` packs them, in
Python and in C++ alike, as torch's own quantized layers do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from compiler.errors import StageError

if TYPE_CHECKING:
    from compiler.fusions.linear import Weights


@torch.jit.script
def pack(tensors: list[torch.Tensor], packs: list[int]) -> list[torch.Tensor]:
    """The weights at `packs` as oneDNN wants them; as they are where it has no kernels for their type on this CPU.

    A large block is asked for and given back at the end. glibc learns from that to keep what is freed, up to twice as much,
    where it would else give the memory between two layers back to the system and have it zeroed anew, page by page: a third of
    the time of a large batch. The largest that it learns from has 32 MiB with what it adds to one (mallopt(3),
    M_MMAP_THRESHOLD). Nothing is written to the block, so that it takes no memory.
    """
    packed: list[torch.Tensor] = []
    for place in packs:
        weight = tensors[place]
        if weight.dtype == torch.int8:
            packed.append(torch.ops.onednn.qlinear_prepack(weight, None))
            continue
        able = torch.ops.mkldnn._is_mkldnn_bf16_supported() if weight.dtype == torch.bfloat16 else True
        packed.append(torch.ops.mkldnn._reorder_linear_weight(weight, None) if able else weight)
    packed.append(torch.empty([31 << 20], dtype=torch.uint8))
    packed.pop()
    return packed


def assemble(
    inputs: Sequence[str], dense: Any, packed: Any, weights: Weights, records: Sequence[torch.Tensor], about: str
) -> torch.jit.ScriptModule:
    """A module that takes `inputs` by name and returns a dict. One of text runs `dense` when nothing is padded, else `packed`;
    others run `dense`.

    A mask that is left out is one of ones, and token types that are left out are zeros, as the original has it.

    Args:
        records: of the packed weights, as `compiler.fusions.int8` has them.
        about: what the file tells of itself to those who make another of it.

    Raises:
        StageError: no module here takes those inputs: a script's arguments stand in its source.
    """

    class Held(torch.nn.Module):
        def __init__(self, tensors: list[torch.Tensor], packs: list[int], records: list[torch.Tensor], about: str) -> None:
            super().__init__()
            self.tensors, self.packs, self.records, self.about = tensors, packs, records, about
            self.packed = pack(tensors, packs)

        @torch.jit.export
        def __getstate__(self) -> tuple[list[torch.Tensor], list[int], list[torch.Tensor], str, bool]:
            return self.tensors, self.packs, self.records, self.about, self.training

        @torch.jit.export
        def __setstate__(self, state: tuple[list[torch.Tensor], list[int], list[torch.Tensor], str, bool]) -> None:
            self.tensors, self.packs, self.records, self.about, self.training = state
            self.packed = pack(self.tensors, self.packs)

    class Encoder(Held):
        @torch.jit.export
        def run(self, inputs: list[torch.Tensor], mask: torch.Tensor) -> dict[str, torch.Tensor]:
            if mask.shape != inputs[0].shape:
                raise ValueError("attention_mask: must be [batch, sequence], as input_ids is; 0 at padding")
            real = mask != 0
            if bool(real.all()):
                outputs: dict[str, torch.Tensor] = dense(inputs, self.tensors, self.packed, self.records)
            elif bool(real.any()):
                outputs = packed(inputs, self.tensors, self.packed, self.records)
            else:  # nothing to pack: a row more, with a token, whose answers nobody gets
                more = [torch.cat([value, value[:1]]) for value in inputs]
                more[1][-1, 0] = 1
                outputs = packed(more, self.tensors, self.packed, self.records)
                for name, value in outputs.items():
                    outputs[name] = value[:-1]
            return outputs

    class Two(Encoder):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            return self.run([input_ids, mask], mask)

    class Three(Encoder):
        def forward(
            self,
            input_ids: torch.Tensor,
            attention_mask: torch.Tensor | None = None,
            token_type_ids: torch.Tensor | None = None,
        ) -> dict[str, torch.Tensor]:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            return self.run([input_ids, mask, types], mask)

    class Pixels(Held):
        def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
            outputs: dict[str, torch.Tensor] = dense([pixel_values], self.tensors, self.packed, self.records)
            return outputs

    class Sound(Held):
        def forward(self, input_values: torch.Tensor) -> dict[str, torch.Tensor]:
            outputs: dict[str, torch.Tensor] = dense([input_values], self.tensors, self.packed, self.records)
            return outputs

    class MaskedSound(Held):
        def forward(self, input_values: torch.Tensor, attention_mask: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
            mask = torch.ones_like(input_values, dtype=torch.int64) if attention_mask is None else attention_mask
            if mask.shape != input_values.shape:
                raise ValueError("attention_mask: must be [batch, samples], as input_values is; 0 at padding")
            outputs: dict[str, torch.Tensor] = dense([input_values, mask], self.tensors, self.packed, self.records)
            return outputs

    class TextsAndPixels(Held):
        def forward(
            self, input_ids: torch.Tensor, pixel_values: torch.Tensor, attention_mask: torch.Tensor | None = None
        ) -> dict[str, torch.Tensor]:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            if mask.shape != input_ids.shape:
                raise ValueError("attention_mask: must be [texts, sequence], as input_ids is; 0 at padding")
            outputs: dict[str, torch.Tensor] = dense([input_ids, pixel_values, mask], self.tensors, self.packed, self.records)
            return outputs

    forms: dict[tuple[str, ...], type[Held]] = {
        ("input_ids", "attention_mask"): Two,
        ("input_ids", "attention_mask", "token_type_ids"): Three,
        ("pixel_values",): Pixels,
        ("input_values",): Sound,
        ("input_values", "attention_mask"): MaskedSound,
        ("input_ids", "pixel_values", "attention_mask"): TextsAndPixels,
    }
    if (form := forms.get(tuple(inputs))) is None:
        raise StageError(f"torchscript: no module for a model that takes {', '.join(inputs)}; leave that format out")
    made = form(weights.tensors, weights.packs, list(records), about)
    # Not frozen: in traces of plain weights nothing is left to fold, and inlining them into one method is what torch's reader
    # is slow at (2 s and 1.07 GB for the file of a MiniLM, against 0.3 s and 0.45 GB).
    script: torch.jit.ScriptModule = torch.jit.script(made.eval())
    return script
