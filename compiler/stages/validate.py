"""Validate: the shipped file, opened in its runtime, against the original's outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from compiler.accuracy import ANSWER, Answering, figures
from compiler.backends import BACKENDS
from compiler.errors import NumericsError, brief
from compiler.numerics import Case, Pair, compare, noise, rows
from compiler.samples import ACCURACY, read_cases
from compiler.types import Artifact, Signature, Tensor
from compiler.workers import THREADS

Part = Literal["all", "answers", "elements"]


def validate(
    root: Path, artifact: Artifact, samples: Path, reference: Path, known: Mapping[str, Any], part: Part = "all"
) -> dict[str, Any]:
    """The figures of an artifact over every sample, by output (see `compiler.numerics.compare`).

    Args:
        root: where the artifact's files are.
        samples, reference: the files of those names that `compiler.stages.load.reference` wrote.
        known: what that stage returned.
        part: of an int8 artifact, the answers to the validation text alone, or the elements of the other samples alone; of
            others elements are all that is looked at.

    Raises:
        NumericsError: the file does not open, does not run, or its outputs are not the original's.
    """
    from safetensors.numpy import load_file

    expected = load_file(reference)
    signature = Signature.from_json(known["signature"])
    tensors = signature.outputs
    where = f"validate {artifact.format} {artifact.precision}"
    try:
        runner = BACKENDS[artifact.format].open(root, artifact, THREADS)
    except Exception as error:
        raise NumericsError(f"{where}: the file does not open in its runtime: {brief(error)}") from error

    int8 = artifact.precision == "int8"
    texts = Answering(known.get("answering"))
    pairs: dict[str, list[Pair]] = {tensor.name: [] for tensor in tensors}
    for number, case in enumerate(read_cases(samples, known)):
        wanted = int8 and part != "elements" if case.name == ACCURACY else part != "answers"
        if not wanted:
            continue
        shape = "x".join(map(str, case.shape))
        try:
            outputs = runner(case.inputs)
        except Exception as error:
            raise NumericsError(f"{where}: it does not run on sample {case.name!r} ({shape}): {brief(error)}") from error
        for tensor in tensors:
            if tensor.name not in outputs:
                raise NumericsError(f"{where}: it has no output {tensor.name}; it has {', '.join(outputs)}")
            shaped = _shape(tensor, case, signature)
            if outputs[tensor.name].shape != shaped:
                raise NumericsError(
                    f"{where}: output {tensor.name} of sample {case.name!r} ({shape}) is "
                    f"{list(outputs[tensor.name].shape)}, the original's is {list(shaped)}"
                )
            if case.name == ACCURACY:
                continue
            actual = rows(outputs[tensor.name], tensor, case, known["keep"][tensor.name])
            original = type(actual)(expected[f"{number:03d}.{tensor.name}"].astype("float64"), actual.index, actual.real)
            pairs[tensor.name].append(Pair(case, original, actual))
        if case.name == ACCURACY:
            texts.add(case, outputs)
    answered = _accuracy(texts, expected, known) if int8 and part != "elements" else {}
    if part == "answers":
        return answered
    compared = {tensor.name: compare(pairs[tensor.name], tensor, logits="logits" in tensor.name) for tensor in tensors}
    return (
        {**{tensor.name: _coarse(compared[tensor.name], pairs[tensor.name], tensor) for tensor in tensors}, **answered}
        if int8
        else compared
    )


def _coarse(result: Mapping[str, Any], pairs: Sequence[Pair], tensor: Tensor) -> dict[str, Any]:
    """Of an int8 artifact's elements, what shows that a shape or a kind of padding goes wrong; the rest is for the answers."""
    kept = ("max_abs", "max_rel")
    least = {part: {name: result[part][name] for name in kept} for part in ("figures", "worst")}
    share, where = noise(pairs, tensor)
    return {
        **result,
        "figures": {**least["figures"], "noise": share},
        "worst": {**least["worst"], "noise": where},
    }


def _accuracy(texts: Answering, expected: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    original = {name.removeprefix(ANSWER): value for name, value in expected.items() if name.startswith(ANSWER)}
    found = figures(original, texts.stacked(), known.get("labels"), texts.how.get("tags", ()))
    count = len(next(iter(original.values())))
    return {
        "answers": {"figures": found, "worst": dict.fromkeys(found, f"all {count} answers to the validation text together")}
    }


def _shape(tensor: Tensor, case: Case, signature: Signature) -> tuple[int, ...]:
    if tensor.name in case.shapes:
        return case.shapes[tensor.name]
    sizes = {
        axis: size
        for given in signature.inputs
        for axis, size in zip(given.shape, case.inputs[given.name].shape, strict=True)
        if isinstance(axis, str)
    }
    return tuple(sizes[axis] if isinstance(axis, str) else axis for axis in tensor.shape)
