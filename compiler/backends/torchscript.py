"""TorchScript: traced, fused, and free of Python. No exporter makes it any more, so this module does.

torch has deprecated TorchScript but still traces, saves and loads it; what that takes stands here alone.
"""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compiler.types import Artifact, Model, Precision, Runner, Target
from compiler.workers import THREADS

if TYPE_CHECKING:
    import numpy as np
    import torch

    from compiler.fusions.linear import Weights
    from compiler.quantization.layers import Layers

LIBRARIES = ("torch", "transformers", "numpy")
PRECISIONS: Mapping[Precision, Precision | None] = {"fp32": None, "bf16": None, "int8": "bf16"}
FUSIONS = ("padding_free", "linear")
# Why a layer of a plan is not in int8.
JOINED = "it runs joined with layers of the same input, of which one is not in the plan or is quantized another way"
UNKNOWN = "no linear layer of the file has its weights to itself"
# The earliest time that a ZIP archive can hold: the files of a release carry no time of their own.
ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)
# torch aligns the tensors in its archives so that they can be mapped into memory.
ALIGNMENT = 64
# What the names of inner values start with, among the outputs of a copy that gives them.
INNER = "inner "


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
    script, fusions = _fused(module, model)
    _save(script, out / files(target.precision)[0])
    return {"opset": None, "fusions": fusions}


def _save(script: torch.jit.ScriptModule, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = path.with_suffix(".raw")
    script.save(str(raw))
    _canonical_archive(raw, path)
    raw.unlink()


def _fused(module: torch.nn.Module, model: Model) -> tuple[torch.jit.ScriptModule, dict[str, int]]:
    """The model as two traces of one set of weights: `dense`, for batches without padding, and `packed`, which computes the
    real tokens alone; with the counts of what was fused."""
    import torch

    from compiler.fusions import script
    from compiler.fusions.int8 import RECORD
    from compiler.fusions.padding_free import Dense

    example = dict(model.example)
    linears = model.rewrites["linear"]
    precision = next(module.parameters()).dtype

    def cast(value: torch.Tensor) -> torch.Tensor:
        return value.to(precision) if value.is_floating_point() else value  # pixels and samples come as fp32

    weights = linears.weights(module, {name: cast(value) for name, value in example.items()})
    if not weights.packs:  # torch traces no empty list
        weights.packs.append(weights.add(torch.zeros(1, 1)))
    stand_ins = [weights.tensors[place] for place in weights.packs]
    records = [torch.empty(0) for _ in range(RECORD * len(weights.packs))]

    def trace(forward: Callable[..., Any]) -> tuple[Any, dict[str, int], dict[str, Any]]:
        fused: dict[str, int] = {}
        layers: dict[str, Any] = {}

        def run(
            inputs: list[torch.Tensor], tensors: list[torch.Tensor], packed: list[torch.Tensor], records: list[torch.Tensor]
        ) -> Any:
            with linears.applied(weights, tensors, packed, records) as mode:
                outputs = forward(**dict(zip(model.inputs, map(cast, inputs), strict=True)))
            fused.update(mode.counts())
            layers.update(runs=mode.runs, followed=mode.followed())
            # Plain tensors in and a plain dict of fp32 tensors out, whatever the precision inside.
            return {
                name: value.float() if value.is_floating_point() else value
                for name, value in outputs.items()
                if isinstance(value, torch.Tensor)
            }

        with torch.no_grad(), warnings.catch_warnings():
            # It warns of each decision that it takes from a shape; whether one was wrong is what the gate finds out.
            warnings.simplefilter("ignore")
            arguments = ([example[name] for name in model.inputs], weights.tensors, stand_ins, records)
            return torch.jit.trace(run, arguments, strict=False, check_trace=False), fused, layers

    padding_free = model.rewrites.get("padding_free")
    if padding_free is None:
        dense, counts, layers = trace(module)
        packed = dense
    else:
        with padding_free.applied(module, Dense):
            dense, counts, layers = trace(module)
        with padding_free.applied(module):
            packed, _, _ = trace(module)
        counts = {"padding_free": padding_free.count, **counts}
    about = {
        "fusions": counts,
        **layers,
        "digests": _digests(module, model.module, weights),
        "biases": _biases(weights),
        "tables": _tables(module, model.module, weights),
    }
    return script.assemble(model.inputs, dense, packed, weights, records, json.dumps(about)), counts


def _digests(module: torch.nn.Module, original: torch.nn.Module, weights: Weights) -> list[list[str]]:
    """For each packed weight, the digests of the original's weights that were joined in it, in that order; none where
    something else uses them too, and they cannot be replaced."""
    from compiler.quantization.layers import digest

    found: list[dict[int, str]] = [{} for _ in weights.packs]
    parameters = dict(original.named_parameters())
    for name, parameter in module.named_parameters():
        layer = weights.layers.get(id(parameter))
        if layer is not None and weights.packs[layer.pack] not in weights.shared:
            found[layer.pack][layer.part] = digest(parameters[name].detach().float().numpy())
    return [[digest for _, digest in sorted(parts.items())] for parts in found]


def _tables(module: torch.nn.Module, original: torch.nn.Module, weights: Weights) -> list[tuple[int, int, str]]:
    """The places of each table and of its scales, and the digest of the original's."""
    from compiler.quantization.layers import digest

    parameters = dict(original.named_parameters())
    found = []
    for name, parameter in module.named_parameters():
        place = weights.places.get(id(parameter))
        if place in weights.tables:
            found.append((place, weights.tables[place], digest(parameters[name].detach().float().numpy())))
    return found


def _canonical_archive(source: Path, target: Path) -> None:
    """Copy a TorchScript archive without what differs between machines: the debug records, which hold the paths of the
    Python sources, the archive's id, which torch makes of all records, those too, and its name, which follows the file's."""
    with zipfile.ZipFile(source) as reader, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as writer:
        for entry in sorted(reader.infolist(), key=lambda entry: entry.filename):
            name = f"model/{entry.filename.partition('/')[2]}"
            if name.endswith((".debug_pkl", "/serialization_id")):
                continue
            info = zipfile.ZipInfo(name, ZIP_EPOCH)
            header = 30 + len(name.encode())  # a local file header without its extra field (APPNOTE 4.3.7)
            missing = -(writer.fp.tell() + header + 4) % ALIGNMENT  # type: ignore[union-attr]
            # An extra field is an id ("FB", as torch's own writer has it), its length, and that many bytes.
            info.extra = b"FB" + missing.to_bytes(2, "little") + b"\0" * missing
            with reader.open(entry) as stream, writer.open(info, "w") as sink:
                while chunk := stream.read(1 << 20):
                    sink.write(chunk)


def _biases(weights: Weights) -> list[int | None]:
    """For each packed weight, its bias's place among the tensors."""
    found: list[int | None] = [None] * len(weights.packs)
    for layer in weights.layers.values():
        found[layer.pack] = layer.bias
    return found


def quantize(out: Path, exported: Path, layers: Layers, rest: Precision) -> dict[str, Any]:
    """Make the int8 file from the one of precision `rest` below `exported`: its traced code, with other weights.

    Returns:
        what `export` does, and `int8`, how each layer that is in int8 runs, and `left`, why each other one is not, by the
        names of `layers`.
    """
    import torch

    from compiler.fusions.int8 import RECORD, record, repeating
    from compiler.quantization.layers import NO_TABLE

    module: Any = torch.jit.load(str(exported / files(rest)[0]))
    about = json.loads(module.about)
    tensors, records = list(module.tensors), list(module.records)
    ran: dict[str, str] = {}
    left: dict[str, str] = {}
    for pack, (place, digests) in enumerate(zip(module.packs, about["digests"], strict=True)):
        layer = layers.joined_as(digests)
        if layer is None:
            continue
        bias = None if (at := about["biases"][pack]) is None else tensors[at]
        dtype, outputs = tensors[place].dtype, layer.outputs
        behind = about["followed"][pack]
        if behind is not None and (following := layers.joined_as(about["digests"][behind])) is not None:
            layer, bias = repeating(layer, bias, following)
        records[pack * RECORD : (pack + 1) * RECORD] = record(layer, bias, dtype, outputs)
        tensors[place] = torch.from_numpy(layer.weight)
        ran |= dict.fromkeys(layer.name.split("+"), about["runs"][pack])
    for place, scales, digest in about["tables"]:
        if (table := layers.tables.get(digest)) is not None:
            tensors[scales] = torch.from_numpy(table.weight_scale[:, None]).to(tensors[place].dtype)
            tensors[place] = torch.from_numpy(table.weight)
            ran[table.name] = "embedding"
    left |= {table.name: NO_TABLE for table in layers.tables.values() if table.name not in ran}
    known = {digest for digests in about["digests"] for digest in digests}
    for name, layer in layers.by_name.items():
        if name not in ran:
            left[name] = JOINED if layer.digest in known else UNKNOWN
    module.tensors, module.records = tensors, records
    _save(module, out / files("int8")[0])
    return {"opset": None, "fusions": about["fusions"], "int8": ran, "left": left}


def reduce(out: Path, exported: Path, precision: Precision) -> dict[str, Any]:
    raise NotImplementedError("no precision of TorchScript is made from another")


def open(root: Path, artifact: Artifact, threads: int | None) -> Runner:
    import torch

    torch.set_float32_matmul_precision(artifact.runtime["float32_matmul_precision"])
    if threads is not None:
        torch.set_num_threads(threads)
    script = torch.jit.load(str(root / artifact.files[0].path), map_location="cpu")

    def run(inputs: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        with torch.inference_mode(), _unprofiled():
            outputs = script(**{name: torch.from_numpy(value) for name, value in inputs.items()})
        return {name: value.numpy() for name, value in outputs.items()}

    return run


@contextmanager
def _unprofiled() -> Iterator[None]:
    """Have a function that is called for the first time compiled at once, in half a second, instead of twice, first to see
    what it is given. That takes two seconds for each branch of a file, and what runs afterwards is as fast."""
    import torch

    before = torch._C._jit_set_profiling_mode(False)
    try:
        yield
    finally:
        torch._C._jit_set_profiling_mode(before)


def inner(
    root: Path, artifact: Artifact, inputs: Mapping[str, np.ndarray[Any, Any]]
) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    import torch

    torch.set_float32_matmul_precision(artifact.runtime["float32_matmul_precision"])
    torch.set_num_threads(THREADS)
    # As `torch.jit.load` does, but that the functions of the file, which its module calls, can be asked for.
    unit = torch._C.CompilationUnit()
    path = str(root / artifact.files[0].path)
    loaded = torch._C.import_ir_module(unit, path, torch.device("cpu"), {}, False)  # type: ignore[call-arg]
    script = torch.jit._recursive.wrap_cpp_module(loaded)
    names: list[str] = []
    functions: Any = unit.get_functions()  # type: ignore[func-returns-value]  # torch's stubs say None
    for function in functions:
        graph = function.graph
        answer = next(graph.outputs()).node()
        if answer.kind() != "prim::DictConstruct":  # not one of the traces of the model
            continue
        parameters = {value.debugName() for value in graph.inputs()}
        for node in list(graph.nodes()):
            unpacks = node.kind() == "prim::ListUnpack" and next(node.inputs()).debugName() in parameters
            if unpacks or node.kind() == "prim::Constant":
                continue  # inputs and weights
            for value in node.outputs():
                if value.type().kind() == "TensorType":
                    # The function is compiled when it is first called, with what its answer then holds.
                    names.append(f"{INNER}{len(names)} {value.debugName()}")
                    graph.setInsertPoint(answer)
                    answer.addInput(graph.insertConstant(names[-1]))
                    answer.addInput(value)
    with torch.inference_mode():
        found = script(**{name: torch.from_numpy(value) for name, value in inputs.items()})
    # The traces of the branch that did not run are not in it.
    for name in (*(name for name in names if name in found), *(name for name in found if not name.startswith(INNER))):
        if found[name].is_floating_point() and not found[name].is_mkldnn:
            shown = name.removeprefix(INNER).partition(" ")[2] if name.startswith(INNER) else name
            yield shown, found[name].float().numpy()
