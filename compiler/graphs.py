"""What an artifact's file holds: how often each operator, and the precision of each layer's weights. Nothing is run or loaded
into a runtime, and no pickle is opened that could run anything.

A layer is an operator that reads weights; its precision is that of the weights, as they are stored: `int8` weights that are
converted, scaled or transposed on their way count as `int8`. Single numbers, indices, shapes and flags are no weights.
"""

from __future__ import annotations

import collections
import math
import pickle
import re
import xml.etree.ElementTree as ElementTree
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compiler.errors import ReleaseError
from compiler.types import Artifact

if TYPE_CHECKING:
    import onnx

# A stored tensor of one element: a constant of the computation.
NUMBER = "number"
# One name for each type, whatever a format calls it.
NAMES = {
    "float": "fp32", "f32": "fp32", "FloatStorage": "fp32",
    "double": "fp64", "f64": "fp64", "DoubleStorage": "fp64",
    "float16": "fp16", "f16": "fp16", "HalfStorage": "fp16",
    "bfloat16": "bf16", "bf16": "bf16", "BFloat16Storage": "bf16",
    "int8": "int8", "i8": "int8", "CharStorage": "int8", "QInt8Storage": "int8",
    "uint8": "uint8", "u8": "uint8", "ByteStorage": "uint8", "QUInt8Storage": "uint8",
    "int4": "int4", "i4": "int4", "uint4": "uint4", "u4": "uint4",
}  # fmt: skip


@dataclass(frozen=True)
class Graph:
    """`operators` counts them by type, those inside of branches included; `layers` gives a layer's precision by its name."""

    operators: Mapping[str, int]
    layers: Mapping[str, str]


def read_graph(root: Path, artifact: Artifact) -> Graph:
    """What is in an artifact's first file.

    Raises:
        ReleaseError: the file is not what its format says.
    """
    path = root / artifact.files[0].path
    try:
        operators, layers = READERS[artifact.format](path)
    except Exception as error:  # each reader raises in words of its own
        raise ReleaseError(f"{path}: cannot be read as {artifact.format} ({type(error).__name__}); build it again") from error
    return Graph(dict(sorted(operators.items())), dict(layers))


Found = tuple[Counter[str], dict[str, str]]


@dataclass(frozen=True)
class _Node:
    """An operator: its type, its name (empty when it has none that lasts), and what it reads and writes, by name."""

    type: str
    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]


def _layers(nodes: Iterable[_Node], stored: Mapping[str, str]) -> dict[str, str]:
    """The precision of each layer among nodes that come in the order in which they run.

    Args:
        stored: the types of stored tensors by name; `NUMBER` for those of one element.
    """
    types = dict(stored)
    seen: Counter[str] = Counter()
    layers = {}
    for node in nodes:
        if node.reads and all(name in types for name in node.reads):  # computed from stored tensors alone: still weights
            found = [types[name] for name in node.reads]
            types.update(dict.fromkeys(node.writes, next((one for one in found if one in NAMES), found[0])))
            continue
        seen[node.type] += 1
        weights = sorted({NAMES[types[name]] for name in node.reads if types.get(name) in NAMES})
        if weights:
            name = node.name or f"{node.type} {seen[node.type]}"
            if name in layers:  # both branches may have it
                name = f"{name} ({node.type} {seen[node.type]})"
            layers[name] = "+".join(weights)
    return layers


def _onnx(path: Path) -> Found:
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    counts: Counter[str] = Counter()
    stored: dict[str, str] = {}
    nodes: list[_Node] = []

    def kind(tensor: onnx.TensorProto) -> str:
        return NUMBER if math.prod(tensor.dims) == 1 else onnx.TensorProto.DataType.Name(tensor.data_type).lower()

    def walk(graph: onnx.GraphProto) -> None:
        stored.update((tensor.name, kind(tensor)) for tensor in graph.initializer)
        for node in graph.node:
            counts[node.op_type] += 1
            for attribute in node.attribute:
                if node.op_type == "Constant" and attribute.name == "value":
                    stored[node.output[0]] = kind(attribute.t)
                for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                    walk(inner)
            reads = tuple(name for name in node.input if name)
            nodes.append(_Node(node.op_type, node.name, reads, tuple(node.output)))

    walk(model.graph)
    for function in model.functions:
        counts.update(node.op_type for node in function.node)
    return counts, _layers(nodes, stored)


def _openvino(path: Path) -> Found:
    # The manifest has hashed the file, and expat bounds what entities may grow to.
    tree = ElementTree.parse(path)  # noqa: S314
    counts: Counter[str] = Counter()
    layers: dict[str, str] = {}
    stored: dict[str, str] = {}
    nodes: list[_Node] = []

    def walk(net: ElementTree.Element, prefix: str) -> None:
        sources: dict[tuple[str, str], str] = {}
        reads: dict[str, list[str]] = collections.defaultdict(list)
        for edge in net.findall("edges/edge"):
            source = f"{prefix}{edge.attrib['from-layer']}:{edge.attrib['from-port']}"
            sources[edge.attrib["to-layer"], edge.attrib["to-port"]] = source
        for layer in net.findall("layers/layer"):
            number, kind = layer.attrib["id"], layer.attrib["type"]
            writes = tuple(f"{prefix}{number}:{port.attrib['id']}" for port in layer.findall("output/port"))
            ports = [(number, port.attrib["id"]) for port in layer.findall("input/port")]
            reads[number] = [sources[port] for port in ports if port in sources]
            if kind not in ("Const", "Parameter", "Result"):
                counts[kind] += 1
            if kind == "Const":
                data = next(layer.iter("data")).attrib
                sizes = [int(size) for size in data["shape"].split(",") if size.strip()]
                stored.update(dict.fromkeys(writes, NUMBER if math.prod(sizes) == 1 else data["element_type"]))
                continue
            for name in ("body", "then_body", "else_body"):
                if (body := layer.find(name)) is not None:
                    walk(body, f"{prefix}{number}/{name}/")
            # `MatMul_123` is numbered afresh in each build; such a layer is known by its type and place.
            name = layer.attrib["name"]
            name = "" if re.fullmatch(rf"{re.escape(kind)}_[0-9]+", name) else name
            nodes.append(_Node(kind, name, tuple(reads[number]), writes))

    walk(tree.getroot(), "")
    layers.update(_layers(nodes, stored))
    return counts, layers


CALL = re.compile(r"(?<![\w.])(?:torch|ops\.(\w+))\.(\w+)\(")


def _torchscript(path: Path) -> Found:
    counts: Counter[str] = Counter()
    layers: dict[str, str] = {}
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        for name in names:
            inner = name.partition("/")[2]
            if inner.startswith("code/") and inner.endswith(".py"):
                code = archive.read(name).decode()
                counts.update(f"{space or 'aten'}::{operator}" for space, operator in CALL.findall(code))
            elif inner in ("data.pkl", "constants.pkl"):
                with archive.open(name) as stream:
                    held = _Held(stream).load()
                layers.update(_tensors(held, "constants" if inner == "constants.pkl" else ""))
    if not counts:
        raise ValueError("no code")
    return counts, layers


@dataclass(frozen=True)
class _Tensor:
    storage: str
    shape: tuple[int, ...]


class _Object:
    """Stands for an instance of any class of the archive; only its state is kept."""

    def __init__(self, *arguments: Any) -> None:
        self.state: Any = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Held(pickle.Unpickler):
    """Reads which tensors an archive's pickle holds. Whatever it names is made of the stand-ins above: nothing is imported or
    called that the pickle chooses."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name.endswith("Storage"):
            return name
        if module == "torch._utils" and name.startswith("_rebuild_"):
            return lambda storage, offset, shape, *rest: _Tensor(storage, shape)
        if module == "torch.jit._pickle":  # build_tensorlist and the like, restore_type_tag
            return lambda value, *rest: value
        return dict if (module, name) == ("collections", "OrderedDict") else _Object

    def persistent_load(self, pid: Any) -> str:
        return str(pid[1])


def _tensors(held: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(held, _Object):
        yield from _tensors(held.state, path)
    elif isinstance(held, _Tensor):
        if held.storage in NAMES and math.prod(held.shape) != 1:
            yield path, NAMES[held.storage]
    elif isinstance(held, dict | list | tuple):
        for key, value in held.items() if isinstance(held, dict) else enumerate(held):
            yield from _tensors(value, f"{path}.{key}".lstrip("."))


READERS: Mapping[str, Callable[[Path], Found]] = {"onnx": _onnx, "openvino": _openvino, "torchscript": _torchscript}
