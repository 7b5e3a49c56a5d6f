"""`compiler.load`: which artifact opens, that it answers as the original, what it refuses, and what it does without."""

from __future__ import annotations

import importlib
import logging
import pickle
import platform
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import compiler
from compiler import cpu, runtime
from compiler.backends import BACKENDS
from compiler.errors import InputError, ReleaseError
from compiler.manifest import Manifest
from compiler.runtime import CompiledModel, Output, choose
from compiler.types import Artifact, Report
from compiler.verify import read_release, record_benchmark
from tests.releases import release_of

IDS = np.array([[2, 20, 30, 40, 3], [2, 21, 3, 0, 0]])
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
EVERY = ["torchscript fp32", "onnx fp32", "openvino fp32", "openvino bf16"]


@pytest.fixture(scope="module")
def folder(releases: Path) -> Path:
    return release_of(releases, "features")


@pytest.fixture(scope="module")
def model(folder: Path) -> CompiledModel:
    return compiler.load(folder, "onnx")


@pytest.fixture(scope="module")
def read(folder: Path) -> tuple[Manifest, tuple[Report, ...]]:
    return read_release(folder)


@pytest.mark.parametrize("target", EVERY)
def test_is_called_as_the_original(releases: Path, folder: Path, target: str) -> None:
    import torch
    from transformers import AutoModel

    eager = AutoModel.from_pretrained(releases / "features").eval()
    with torch.no_grad():
        expected = eager(input_ids=torch.tensor(IDS), attention_mask=torch.tensor(MASK))
    format, precision = target.split()
    opened = compiler.load(folder, format, precision, threads=1)
    assert opened.artifact is not None
    assert f"{opened.artifact.format} {opened.artifact.precision}" == target
    arrays = opened(input_ids=IDS, attention_mask=MASK)
    tensors = opened(torch.tensor(IDS, dtype=torch.int32), torch.tensor(MASK, dtype=torch.bool))
    assert list(arrays) == list(tensors) == list(expected)
    limit = 1e-5 if precision == "fp32" else 0.1
    for name in expected:
        assert isinstance(arrays[name], np.ndarray)
        assert isinstance(tensors[name], torch.Tensor)
        np.testing.assert_array_equal(arrays[name], tensors[name].numpy())
    real = MASK.astype(bool)
    np.testing.assert_allclose(arrays.last_hidden_state[real], expected.last_hidden_state.numpy()[real], atol=limit)
    np.testing.assert_allclose(arrays.pooler_output, expected.pooler_output.numpy(), atol=limit)


def test_ways_to_call(model: CompiledModel) -> None:
    named = model(input_ids=IDS, attention_mask=MASK, token_type_ids=np.zeros_like(IDS))
    for other in (
        model(IDS, MASK),
        model(IDS.tolist(), MASK.tolist()),
        model(input_ids=IDS, attention_mask=MASK, use_cache=False, token_type_ids=None, return_dict=True),
    ):
        np.testing.assert_array_equal(other.last_hidden_state, named.last_hidden_state)
    as_tuple = model(IDS, MASK, return_dict=False)
    assert isinstance(as_tuple, tuple)
    np.testing.assert_array_equal(as_tuple[0], named[0])
    np.testing.assert_array_equal(model(IDS[:1])[0], model(IDS[:1], MASK[:1])[0])
    kinds = np.array([[0, 0, 1, 1, 1], [0, 0, 1, 0, 0]])
    assert np.abs(model(IDS, MASK, kinds)[0] - named[0]).max() > 0.01


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "no input_ids"),
        ({"input_ids": np.zeros((0, 5), dtype=np.int64)}, "an empty batch"),
        ({"input_ids": np.zeros((2, 0), dtype=np.int64)}, "an empty batch"),
        ({"input_ids": IDS[0]}, "has shape (5,)"),
        ({"input_ids": IDS, "attention_mask": MASK[:1]}, "attention_mask: has shape (1, 5)"),
        ({"input_ids": [[1, 2], [3]]}, "rows of different length"),
        ({"input_ids": IDS.astype(float)}, "is float64, and the model takes integers"),
        ({"input_ids": IDS * 100}, "is no token of the model, which has 300"),
        ({"input_ids": -IDS}, "-40 is no token"),
        ({"input_ids": np.ones((1, 65), dtype=np.int64)}, "65 tokens, and the model has 64 positions"),
        ({"input_ids": IDS, "attention_mask": MASK * 2}, "something else than 0 and 1"),
        ({"input_ids": IDS, "token_type_ids": IDS}, "the model has 2 types"),
        ({"input_ids": IDS, "inputs_embeds": IDS}, "inputs_embeds: the compiled model does not take it"),
        ({"input_ids": IDS, "output_hidden_states": True}, "output_hidden_states"),
    ],
)
def test_bad_input(model: CompiledModel, given: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as caught:
        model(**given)
    assert says in str(caught.value)


def test_bad_calls(model: CompiledModel) -> None:
    with pytest.raises(InputError, match="4 inputs are given"):
        model(IDS, MASK, MASK, MASK)
    with pytest.raises(InputError, match="input_ids is given twice"):
        model(IDS, input_ids=IDS)
    with pytest.raises(InputError, match=r"to\(cuda:0\)"):
        model.to("cuda:0")
    assert model.to("cpu") is model.eval()


def test_token_types_that_a_model_lacks(releases: Path) -> None:
    entities = compiler.load(release_of(releases, "entities"))
    ones = np.ones_like(IDS)
    assert entities(IDS, MASK, token_type_ids=0 * ones).logits.shape == (2, 5, 9)
    with pytest.raises(InputError, match="the compiled model has none"):
        entities(IDS, MASK, token_type_ids=ones)


def test_a_batch_over_memory(model: CompiledModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "available_memory", lambda: 1000)
    with pytest.raises(InputError, match="a batch of 2 × 5 tokens does not fit into memory: its outputs alone are"):
        model(IDS)
    monkeypatch.undo()

    def full(inputs: Any) -> Any:
        raise RuntimeError("[ONNXRuntimeError] : 6 : Failed to allocate memory for requested buffer of size 99")

    monkeypatch.setattr(model, "_run", full)
    with pytest.raises(InputError, match="does not fit into memory; give smaller batches"):
        model(IDS)


def test_available_memory() -> None:
    free = runtime.available_memory()
    assert free is None or 1 << 20 < free < 1 << 50


def test_threads_wait_for_each_other(folder: Path) -> None:
    opened = compiler.load(folder, "openvino", "fp32")
    expected = opened(IDS, MASK)[0]
    found: list[Any] = []
    workers = [threading.Thread(target=lambda: found.extend(opened(IDS, MASK)[0] for _ in range(20))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 80
    assert all((one == expected).all() for one in found)


def test_output_is_a_mapping_with_attributes() -> None:
    output = Output({"logits": 1, "other": 2})
    assert (output.logits, output["other"], output[0], output[:2], output.to_tuple()) == (1, 2, 1, (1, 2), (1, 2))
    assert list(output.items()) == [("logits", 1), ("other", 2)]
    assert pickle.loads(pickle.dumps(output)) == output  # noqa: S301
    output["more"] = 3
    del output["other"]
    assert list(output) == ["logits", "more"]
    with pytest.raises(AttributeError, match="no output 'other'; there is logits, more"):
        _ = output.other
    assert "logits=1" in repr(output)


def test_config(releases: Path, model: CompiledModel) -> None:
    config = compiler.load(release_of(releases, "entities")).config
    assert (config.num_labels, config.id2label[1], config.label2id["B-PER"], config.problem_type) == (9, "B-PER", 1, None)
    assert config.model_type == "distilbert"
    assert config.to_dict()["dim"] == 32
    assert model.config.is_decoder is False  # from transformers' defaults: config.json leaves it out
    with pytest.raises(AttributeError):
        _ = model.config.no_such_thing


# Which artifact


def benchmark_of(speeds: Mapping[str, tuple[float, ...]], machine: str | None = None) -> dict[str, Any]:
    timings = [
        {"subject": subject, "shape": str(number), "ratio": ratio}
        for subject, ratios in speeds.items()
        for number, ratio in enumerate(ratios)
    ]
    return {"machine": machine or platform.machine(), "timings": timings}


def chosen(read: tuple[Manifest, tuple[Report, ...]], benchmark: dict[str, Any] | None, *asked: str | None) -> str:
    manifest = replace(read[0], benchmark=benchmark)
    artifact, _ = choose(manifest, read[1], *asked)
    return f"{artifact.format} {artifact.precision}"


@pytest.fixture
def features(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda words: monkeypatch.setattr(cpu, "features", lambda: words)


def test_the_fastest_by_the_benchmark(read: tuple[Manifest, tuple[Report, ...]], features: Callable[[str], None]) -> None:
    features("x86_64 avx2 avx512f avx512_bf16")
    speeds = {"eager fp32": (1.0, 1.0), "torchscript fp32": (9.0, 1.0), "onnx fp32": (4.0, 4.0), "openvino bf16": (3.9, 4.0)}
    assert chosen(read, benchmark_of(speeds)) == "onnx fp32"  # by the geometric mean
    assert chosen(read, benchmark_of(speeds), "openvino") == "openvino bf16"
    assert chosen(read, benchmark_of(speeds), None, "bf16") == "openvino bf16"
    speeds["openvino bf16"] = (8.0, 8.0)
    assert chosen(read, benchmark_of(speeds)) == "openvino bf16"
    features("x86_64 avx2")  # nothing that bf16 is fast on
    assert chosen(read, benchmark_of(speeds)) == "onnx fp32"
    assert chosen(read, benchmark_of(speeds), "openvino", "bf16") == "openvino bf16"


def with_needs(read: tuple[Manifest, tuple[Report, ...]]) -> Manifest:
    """OpenVINO's artifacts as int8 ones are: right where sums of products are wide."""
    artifacts = [replace(one, needs=cpu.WIDE_SUMS) if one.format == "openvino" else one for one in read[0].artifacts]
    return replace(read[0], artifacts=tuple(artifacts))


def test_last_what_was_not_shown_to_be_right_here(
    read: tuple[Manifest, tuple[Report, ...]], features: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where only a cap takes the instructions away; who asks for it all the same is warned."""
    whole = (with_needs(read), read[1])
    features("x86_64 avx2 avx512f avx512_vnni")
    assert chosen(whole, None) == "openvino fp32"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert chosen(whole, None) == "onnx fp32"
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    features("x86_64 avx2")
    assert chosen(whole, None) == "onnx fp32"
    assert chosen(whole, None, "openvino", "fp32") == "openvino fp32"


@pytest.fixture
def needing(
    folder: Path, read: tuple[Manifest, tuple[Report, ...]], monkeypatch: pytest.MonkeyPatch, features: Callable[[str], None]
) -> Path:
    """The release as one of which a file needs wide sums, on a CPU that has none, unless `features` says otherwise."""
    monkeypatch.setattr(runtime, "read_release", lambda _: (with_needs(read), read[1]))
    features("x86_64 avx2 avx512f")
    return folder


def test_it_warns_where_it_was_not_shown_to_be_right(
    needing: Path, features: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    features("x86_64 avx2 avx512f avx512_vnni")
    runtime.load(needing, format="openvino", precision="fp32")
    assert "saturate" not in caplog.text
    features("x86_64 avx2 avx512f")
    runtime.load(needing, format="openvino", precision="fp32")
    assert "openvino fp32 was validated on a CPU with amx_int8 or avx512_vnni" in caplog.text
    assert "sums of its 8-bit products may saturate here; build it with quantize: {cpu: avx2}" in caplog.text


def test_a_runtime_that_does_not_open_the_file(
    needing: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In one line, and with what was to be warned of, which may be the cause."""

    def refuse(*_: object) -> None:
        raise RuntimeError("no kernel for\nSoftmax")

    monkeypatch.setattr(BACKENDS["openvino"], "open", refuse)
    with pytest.raises(InputError) as caught:
        runtime.load(needing, format="openvino", precision="fp32")
    assert "openvino does not open openvino/openvino_model.xml here: no kernel for Softmax; take another" in str(caught.value)
    assert "saturate here" in caplog.text


def test_the_order_without_a_benchmark(read: tuple[Manifest, tuple[Report, ...]]) -> None:
    assert chosen(read, None) == "openvino fp32"
    elsewhere = benchmark_of({"onnx fp32": (9.0,)}, machine="another")
    assert chosen(read, elsewhere) == "openvino fp32"
    assert chosen(read, None, "torchscript") == "torchscript fp32"


def test_never_what_did_not_pass(read: tuple[Manifest, tuple[Report, ...]]) -> None:
    manifest, reports = read
    failed = replace(reports[0].checks[0], passed=False)
    target = ("openvino", "fp32")
    worse = tuple(replace(one, checks=(failed,)) if (one.format, one.precision) == target else one for one in reports)
    assert choose(manifest, worse)[0].format == "onnx"
    with pytest.raises(InputError, match="did not pass its checks"):
        choose(manifest, worse, "openvino", "fp32")


def test_never_what_is_not_installed(read: tuple[Manifest, tuple[Report, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(runtime.RUNTIMES, "openvino", "no_such_runtime")
    assert choose(*read)[0].format == "onnx"
    with pytest.raises(InputError, match="needs no_such_runtime, which is not installed: pip install no_such_runtime"):
        choose(*read, "openvino")


def test_why_a_file_was_left_out(read: tuple[Manifest, tuple[Report, ...]]) -> None:
    manifest = replace(read[0], refused={"onnx int8": "int8 is too slow here"})
    with pytest.raises(InputError, match=r"no onnx int8 artifact \(int8 is too slow here\); the release has "):
        choose(manifest, read[1], "onnx", "int8")


def test_what_the_release_has_not(folder: Path) -> None:
    with pytest.raises(InputError, match="no onnx int8 artifact; the release has torchscript fp32, onnx fp32, openvino"):
        compiler.load(folder, "onnx", "int8")
    with pytest.raises(InputError, match="threads: 0"):
        compiler.load(folder, threads=0)


def test_says_which(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, features: Callable[[str], None]) -> None:
    """And takes the benchmark from the manifest as `compile bench --record` leaves it."""
    mine = Path(shutil.copytree(folder, tmp_path / "release"))
    record_benchmark(mine, benchmark_of({"eager fp32": (1.0,), "onnx fp32": (2.5,)}))
    caplog.set_level(logging.INFO, "compiler")
    opened = compiler.load(str(mine))
    said = "onnx fp32 (the fastest for this CPU by the recorded benchmark, 2.50 times the original's speed)"
    assert said in caplog.text
    assert repr(opened) == f"<BertModel of features 1.0.0, {said.replace(' (', ': ').rstrip(')')}>"
    features("x86_64")
    compiler.load(mine, "openvino", "bf16")
    assert "this CPU has none of amx_bf16, avx512_bf16, bf16" in caplog.text


def test_recorded_settings_are_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compiler.backends import openvino

    seen: list[tuple[Artifact, int | None]] = []
    original = openvino.open

    def spying(root: Path, artifact: Artifact, threads: int | None) -> Any:
        seen.append((artifact, threads))
        return original(root, artifact, threads)

    monkeypatch.setattr(openvino, "open", spying)
    compiler.load(folder, "openvino", "fp32", threads=2)
    ((artifact, threads),) = seen
    assert (artifact.runtime["INFERENCE_PRECISION_HINT"], threads) == ("f32", 2)


def test_a_damaged_release_does_not_open(folder: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(folder, tmp_path / "release"))
    path = mine / "torchscript/model.pt"  # not even one that would be opened
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ReleaseError, match=r"torchscript/model\.pt is changed"):
        compiler.load(mine, "onnx")
    with pytest.raises(ReleaseError, match="no such release"):
        compiler.load(tmp_path / "nothing")


# Without torch

ALONE = """
import sys
import compiler
heavy = {{"torch", "transformers", "onnxruntime", "openvino", "pydantic"}} & set(sys.modules)
assert not heavy, heavy  # `import compiler` is cheap
import numpy as np
model = compiler.load({folder!r}, {format!r})
model(input_ids=np.array([[2, 20, 3]])).last_hidden_state
assert model.config.hidden_size == 32
pipe = compiler.pipeline("sentence-embedding", model)
print(pipe(["A cup of tea.", "Rain again."])[0].shape)
print(sorted({{"torch", "transformers"}} & set(sys.modules)))
import torch
print(type(model(input_ids=torch.tensor([[2, 20, 3]]))[0]).__name__)
"""


@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_opens_without_torch(folder: Path, format: str) -> None:
    script = ALONE.format(folder=str(folder), format=format)
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == ["(32,)", "[]", "Tensor"]


def test_the_package_names_what_it_lacks() -> None:
    assert {"load", "pipeline"} <= set(dir(compiler))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = compiler.nothing
    # The module of that name, wherever it is imported, must not take the function's place.
    for name in ("cli", "spine", "pipelines", "runtime"):
        importlib.import_module(f"compiler.{name}")
    assert callable(compiler.pipeline)
