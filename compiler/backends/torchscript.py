"""TorchScript: traced, frozen, and free of Python. No exporter makes it any more, so this module does.

torch has deprecated TorchScript but still traces, freezes, saves and loads it; what that takes stands here alone.
"""

from __future__ import annotations

import inspect
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compiler.types import Artifact, Model, Precision, Runner, Target

if TYPE_CHECKING:
    import numpy as np

LIBRARIES = ("torch", "transformers", "numpy")
PRECISIONS: Mapping[Precision, Precision | None] = {"fp32": None, "bf16": None}
FUSED = ("gelu", "layer_norm", "rms_norm", "scaled_dot_product_attention")
# The earliest time that a ZIP archive can hold: the files of a release carry no time of their own.
ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)
# torch aligns the tensors in its archives so that they can be mapped into memory.
ALIGNMENT = 64


def files(precision: Precision) -> tuple[str, ...]:
    return ("torchscript/model.pt" if precision == "fp32" else f"torchscript/model_{precision}.pt",)


def runtime(precision: Precision) -> dict[str, Any]:
    # torch may use bf16 or tf32 inside fp32 matrix products when this is lowered.
    return {"float32_matmul_precision": "highest"}


def export(out: Path, model: Model, target: Target) -> dict[str, Any]:
    import copy

    import torch

    module = model.module
    if target.precision == "bf16":
        module = copy.deepcopy(module).to(torch.bfloat16)

    class Traced(torch.nn.Module):
        """Plain tensors in and a plain dict of fp32 tensors out, whatever the precision inside."""

        def __init__(self) -> None:
            super().__init__()
            self.model = module

        def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> dict[str, torch.Tensor]:
            given = {**dict(zip(model.inputs, args, strict=False)), **kwargs}
            outputs = self.model(**given)
            return {
                name: value.float() if value.is_floating_point() else value
                for name, value in outputs.items()
                if isinstance(value, torch.Tensor)
            }

    traced = Traced().eval()
    # torch takes the arguments' names from here, and keyword arguments under these names.
    traced.forward.__func__.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("self", *model.inputs)]
    )
    with torch.no_grad():
        script = torch.jit.trace(traced, example_kwarg_inputs=dict(model.example), strict=False, check_trace=False)
        script = torch.jit.freeze(script)
    counts = Counter(node.kind().removeprefix("aten::") for node in script.graph.nodes())
    path = out / files(target.precision)[0]
    path.parent.mkdir(parents=True)
    raw = path.with_suffix(".raw")
    script.save(str(raw))
    _canonical_archive(raw, path)
    raw.unlink()
    return {"opset": None, "fusions": {name: counts[name] for name in FUSED if counts[name]}}


def _canonical_archive(source: Path, target: Path) -> None:
    """Copy a TorchScript archive without what differs between machines: the debug records, which hold the paths of the
    Python sources, and the archive's own name, which follows the file's."""
    with zipfile.ZipFile(source) as reader, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as writer:
        for entry in sorted(reader.infolist(), key=lambda entry: entry.filename):
            name = f"model/{entry.filename.partition('/')[2]}"
            if name.endswith(".debug_pkl"):
                continue
            info = zipfile.ZipInfo(name, ZIP_EPOCH)
            header = 30 + len(name.encode())  # a local file header without its extra field (APPNOTE 4.3.7)
            missing = -(writer.fp.tell() + header + 4) % ALIGNMENT  # type: ignore[union-attr]
            # An extra field is an id ("FB", as torch's own writer has it), its length, and that many bytes.
            info.extra = b"FB" + missing.to_bytes(2, "little") + b"\0" * missing
            with reader.open(entry) as stream, writer.open(info, "w") as sink:
                while chunk := stream.read(1 << 20):
                    sink.write(chunk)


def reduce(out: Path, exported: Path, precision: Precision) -> dict[str, Any]:
    raise NotImplementedError("no precision of TorchScript is made from another")


def open(root: Path, artifact: Artifact, threads: int | None) -> Runner:
    import torch

    torch.set_float32_matmul_precision(artifact.runtime["float32_matmul_precision"])
    if threads is not None:
        torch.set_num_threads(threads)
    script = torch.jit.load(str(root / artifact.files[0].path), map_location="cpu")

    def run(inputs: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        with torch.inference_mode():
            outputs = script(**{name: torch.from_numpy(value) for name, value in inputs.items()})
        return {name: value.numpy() for name, value in outputs.items()}

    return run
