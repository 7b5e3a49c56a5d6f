"""A process that holds one subject of benchmarks/latency.py, in our environment or in the peers'.

    python -P benchmarks/subject.py FD         # a socket's descriptor, inherited from benchmarks/latency.py

Two runtimes in one process disturb each other's threads, so each opener imports its own, and this module none. Requests and
answers are pickles by multiprocessing's connections, (kind, value) both ways:

    open    (opener's name, its arguments)    what is worth a note, as text; then, as often as asked:
    answer  inputs                            (seconds, fp32 [batch, sequence, hidden])
    time    (inputs, limits)                  seconds of each run

Inputs are int64 `[batch, sequence]` by name; a subject is given those that it has. What goes wrong is the answer `error`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np

if TYPE_CHECKING:
    import torch

    from compiler.types import Artifact, Snapshot

Arrays = Mapping[str, np.ndarray[Any, Any]]
Run = Callable[[Arrays], Arrays]
# optimum exports a sentence-transformers folder as such, with the same states under another name.
OUTPUTS = ("last_hidden_state", "token_embeddings")
# The native encoder and the eager model in fp32 differ by no more than rounding.
AGREEMENT = 1e-4


# Ours, in our environment.


def ours(root: Path, artifact: Artifact, threads: int) -> tuple[Run, str]:
    """A file of the release, as `compile bench` opens it."""
    from compiler.backends import BACKENDS

    return BACKENDS[artifact.format].open(root, artifact, threads), ""


# PyTorch, in our environment, on the untouched model.


def eager(snapshot: Snapshot, task: str, precision: str, threads: int) -> tuple[Run, str]:
    from dataclasses import replace

    from compiler.stages.load import load, run_eager

    model = load(snapshot, task)
    _set_threads(threads)
    model = replace(model, module=_cast(model.module, precision))
    return lambda inputs: run_eager(model, inputs), ""


def compiled(snapshot: Snapshot, task: str, precision: str, threads: int) -> tuple[Run, str]:
    """torch.compile by inductor with frozen weights, which turns to dynamic shapes with the second shape that it sees.

    `dynamic=False` would be half as fast in fp32 on CPUs for which MKL is not made: when it knows the number of rows,
    inductor packs weights for MKL, else for oneDNN.
    """
    import torch
    import torch._dynamo.config
    import torch._inductor.config

    from compiler.stages.load import load

    _set_threads(threads)
    torch._inductor.config.freezing = True
    torch._dynamo.config.recompile_limit = 64  # past it, shapes would run eagerly without a word
    module: Any = torch.compile(_cast(load(snapshot, task).module, precision))

    def run(inputs: Arrays) -> Arrays:
        with torch.no_grad():  # weights are frozen under no_grad
            outputs = module(**{name: torch.from_numpy(value) for name, value in inputs.items()})
        return {name: value.float().numpy() for name, value in outputs.items()}

    return run, ""


def native(snapshot: Snapshot, task: str, precision: str, threads: int) -> tuple[Run, str]:
    """PyTorch's own encoder on its fast path, with a nested tensor where the batch has padding: what BetterTransformer
    put in the place of BERT's layers. Embeddings and pooler stay the model's."""
    import torch

    from compiler.stages.load import load

    model = load(snapshot, task)
    _set_threads(threads)
    module: Any = model.module
    encoder = _encoder(module)

    def forward(input_ids: torch.Tensor, attention_mask: torch.Tensor, **more: torch.Tensor) -> dict[str, torch.Tensor]:
        # Without padding, the dense fast path is the faster one.
        padding = None if bool(attention_mask.all()) else attention_mask == 0
        with torch.inference_mode():
            states = encoder(module.embeddings(input_ids=input_ids, **more), src_key_padding_mask=padding)
            return {"last_hidden_state": states, "pooler_output": module.pooler(states)}

    ids = torch.arange(2 * 24).reshape(2, 24) + 1000
    full = torch.ones_like(ids)
    padded = full.clone()
    padded[1, 7:] = 0
    for mask in (full, padded):
        with torch.inference_mode():
            expected = module(input_ids=ids, attention_mask=mask).last_hidden_state
        error = float((forward(ids, mask)["last_hidden_state"] - expected)[mask.bool()].abs().max())
        if error > AGREEMENT:
            raise RuntimeError(f"the native encoder is {error:.2g} away from the eager model; at most {AGREEMENT:g}")
    _cast(module, precision)
    _cast(encoder, precision)
    original = torch._transformer_encoder_layer_fwd
    for mask, nested in ((full, False), (padded, True)):
        fired: list[bool] = []

        def count(states: torch.Tensor, *arguments: Any, fired: list[bool] = fired) -> Any:
            fired.append(states.is_nested)
            return original(states, *arguments)

        with mock.patch.object(torch, "_transformer_encoder_layer_fwd", count):
            forward(ids, mask)
        if fired != [nested] * len(encoder.layers):
            raise RuntimeError("the native encoder did not take its fast path")

    def run(inputs: Arrays) -> Arrays:
        outputs = forward(**{name: torch.from_numpy(value) for name, value in inputs.items()})
        return {name: value.float().numpy() for name, value in outputs.items()}

    return run, ""


def _encoder(module: Any) -> Any:
    """BERT's layers as a torch.nn.TransformerEncoder with the same weights."""
    import torch

    config = module.config
    layers = []
    for layer in module.encoder.layer:
        new = torch.nn.TransformerEncoderLayer(
            config.hidden_size,
            config.num_attention_heads,
            config.intermediate_size,
            dropout=0.0,
            activation="gelu",
            layer_norm_eps=config.layer_norm_eps,
            batch_first=True,
            norm_first=False,
        )
        heads = [getattr(layer.attention.self, name) for name in ("query", "key", "value")]
        parts = {
            "self_attn.out_proj": layer.attention.output.dense,
            "norm1": layer.attention.output.LayerNorm,
            "linear1": layer.intermediate.dense,
            "linear2": layer.output.dense,
            "norm2": layer.output.LayerNorm,
        }
        weights = {
            f"self_attn.in_proj_{kind}": torch.cat([getattr(head, kind) for head in heads]) for kind in ("weight", "bias")
        }
        weights |= {f"{name}.{kind}": getattr(part, kind) for name, part in parts.items() for kind in ("weight", "bias")}
        new.load_state_dict(weights)
        layers.append(new)
    encoder = torch.nn.TransformerEncoder(layers[0], len(layers), enable_nested_tensor=True)
    encoder.layers = torch.nn.ModuleList(layers)
    return encoder.eval().requires_grad_(False)


def _cast(module: Any, precision: str) -> Any:
    import torch

    return module.to({"fp32": torch.float32, "bf16": torch.bfloat16}[precision])


def _set_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


# The peers' files, in the peers' environment, opened as our backends open ours.


def onnxruntime(path: Path, threads: int) -> tuple[Run, str]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs = [value.name for value in session.get_inputs()]
    outputs = [value.name for value in session.get_outputs()]
    return lambda given: dict(zip(outputs, session.run(None, _only(given, inputs)), strict=True)), ""


def openvino(path: Path, precision: str | None, threads: int) -> tuple[Run, str]:
    """`precision` is f32, bf16, or None for what the CPU plugin chooses by itself."""
    import openvino

    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    if precision is not None:
        settings["INFERENCE_PRECISION_HINT"] = precision
    program = openvino.Core().compile_model(str(path), "CPU", settings)
    request = program.create_infer_request()
    inputs = [value.get_any_name() for value in program.inputs]
    outputs = [value.get_any_name() for value in program.outputs]

    def run(given: Arrays) -> Arrays:
        result = request.infer(_only(given, inputs))
        return {name: result[number].copy() for number, name in enumerate(outputs)}

    chosen = program.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    return run, "" if precision is not None else f"computes in {chosen} here"


def _only(given: Arrays, names: Iterable[str]) -> dict[str, np.ndarray[Any, Any]]:
    return {name: given[name] for name in names}


OPENERS: dict[str, Callable[..., tuple[Run, str]]] = {
    opener.__name__: opener for opener in (ours, eager, compiled, native, onnxruntime, openvino)
}


def answer(run: Run, inputs: Arrays) -> tuple[float, np.ndarray[Any, Any]]:
    began = time.perf_counter()
    outputs = run(inputs)
    seconds = time.perf_counter() - began
    return seconds, np.asarray(next(outputs[name] for name in OUTPUTS if name in outputs), dtype=np.float32)


def measure(run: Run, inputs: Arrays, limits: Mapping[str, float]) -> list[float]:
    """Seconds of each run, after `warm_up` runs: at least `least_runs`, and until `least_seconds` or `most_runs`."""
    for _ in range(int(limits["warm_up"])):
        run(inputs)
    seconds: list[float] = []
    while len(seconds) < limits["least_runs"] or (
        sum(seconds) < limits["least_seconds"] and len(seconds) < limits["most_runs"]
    ):
        began = time.perf_counter()
        run(inputs)
        seconds.append(time.perf_counter() - began)
    return seconds


def main() -> None:
    connection = Connection(int(sys.argv[1]))
    run: Run | None = None
    while True:
        try:
            kind, value = connection.recv()
        except EOFError:
            return
        try:
            result: Any
            if kind == "open":
                run, result = OPENERS[value[0]](**value[1])
            elif run is None:
                raise RuntimeError("nothing is open")
            elif kind == "answer":
                result = answer(run, value)
            else:
                result = measure(run, *value)
        except Exception as error:
            connection.send(("error", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"))
        else:
            connection.send(("result", result))


if __name__ == "__main__":
    main()
