"""What the original computes on its way: the tensors that its modules take and return, in the order in which they run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from compiler.numerics import Array

if TYPE_CHECKING:
    import torch


class Key(NamedTuple):
    """A call of a module: its name, and the number of the call where it is called more than once, from 1."""

    module: str
    call: int = 1


@dataclass(frozen=True)
class Record:
    """What a call of a module took or returned, flat float32.

    `leaf`: it has no modules inside; `weighs`: it has parameters of its own; `table`: it looks rows up.
    """

    key: Key
    taken: bool
    content: Array
    leaf: bool
    weighs: bool
    table: bool


@dataclass(frozen=True)
class Trace:
    records: list[Record]
    outputs: dict[str, Array]


class Stop(Exception):  # noqa: N818
    """Raised by who has seen enough of a run."""


def trace(
    module: torch.nn.Module,
    inputs: Mapping[str, Array],
    replace: Callable[[Record], Array | None] = lambda record: None,
) -> Trace:
    """Run a model and record what every module inside of it returns, and what those take that have no modules inside.

    Args:
        replace: given what a module returned, what the model goes on with instead; None: with that. It may raise `Stop`, which
            comes through.
    """
    import torch

    records: list[Record] = []
    calls: Counter[str] = Counter()

    def record(name: str, part: torch.nn.Module, value: Any, taken: bool) -> Record | None:
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dim() < 2:
            return None
        content = value.detach().float().reshape(-1).numpy().copy()
        leaf = not any(True for _ in part.children())
        weighs = any(True for _ in part.parameters(recurse=False))
        key = Key(name, calls[name] + taken)
        records.append(Record(key, taken, content, leaf, weighs, isinstance(part, torch.nn.Embedding)))
        return records[-1]

    def returned(name: str) -> Callable[..., Any]:
        def hook(part: torch.nn.Module, arguments: Any, output: Any) -> Any:
            calls[name] += 1
            value = _tensor(output)
            found = record(name, part, value, False)
            instead = None if found is None else replace(found)
            return None if instead is None else _with(output, torch.from_numpy(instead).reshape(value.shape).to(value.dtype))

        return hook

    def takes(name: str) -> Callable[..., Any]:
        def hook(part: torch.nn.Module, arguments: Any) -> None:
            record(name, part, arguments[0] if arguments else None, True)

        return hook

    handles = []
    try:
        for name, part in module.named_modules():
            if name:
                handles.append(part.register_forward_hook(returned(name)))
                if not any(True for _ in part.children()):
                    handles.append(part.register_forward_pre_hook(takes(name)))
        with torch.no_grad():
            answers = module(**{name: torch.from_numpy(value) for name, value in inputs.items()})
    finally:
        for handle in handles:
            handle.remove()
    outputs = {name: value.float().numpy() for name, value in answers.items() if isinstance(value, torch.Tensor)}
    return Trace(records, outputs)


def layers(module: torch.nn.Module, records: list[Record], tokens: int | None) -> list[Key]:
    """The calls of a model's layers: of the modules of its outermost lists that return something for each token; all of
    those modules where there are no tokens."""
    import torch
    from torch.nn.utils.parametrize import ParametrizationList

    names: set[str] = set()
    for name, part in module.named_modules():
        if isinstance(part, ParametrizationList):  # a weight that is computed
            continue
        if isinstance(part, torch.nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in names):
            names.update(f"{name}.{child}" for child, _ in part.named_children())
    found = [record for record in records if not record.taken and record.key.module in names]
    if tokens is None:
        return [record.key for record in found]
    sizes = Counter(record.content.size for record in found)
    most = max(sizes, key=lambda size: (sizes[size], size), default=0)
    return [record.key for record in found if record.content.size == most and most % tokens == 0]


def input_of(records: list[Record], first: Key) -> Key | None:
    """The call whose output a layer takes, the outermost one; None where that is no module's."""
    start = next(place for place, record in enumerate(records) if record.key.module.startswith(first.module))
    taken = records[start].content
    before = [record for record in records[:start] if not record.taken and record.content.size == taken.size]
    return next((record.key for record in reversed(before) if (record.content == taken).all()), None)


def _tensor(output: Any) -> Any:
    """The first of what a module returns."""
    if isinstance(output, tuple | list):
        return output[0] if output else None
    return next(iter(output.values()), None) if isinstance(output, Mapping) else output


def _with(output: Any, value: torch.Tensor) -> Any:
    """An output with another first tensor."""
    if isinstance(output, tuple | list):
        return type(output)([value, *output[1:]])
    if isinstance(output, Mapping):
        output[next(iter(output))] = value  # type: ignore[index]
        return output
    return value
