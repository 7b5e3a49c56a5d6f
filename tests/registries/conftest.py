"""Tiny hand-made releases, for tests to which the model does not matter, and processes that push and pull them at once."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from compiler.hashing import canonical, hash_file
from compiler.manifest import MANIFEST, VALIDATION, Manifest, Source, from_bytes, to_bytes
from compiler.types import Artifact, File, Signature, Tensor

FILES = {
    "config.json": b'{"model_type": "bert"}\n',
    "tokenizer.json": b"{}\n",
    "onnx/model.onnx": b"onnx " * 2000,
    "torchscript/model.pt": b"torchscript " * 3000,
}


def make_release(
    folder: Path, files: Mapping[str, bytes] | None = None, *, name: str = "tiny", release: str = "1.0.0"
) -> Manifest:
    """Write a release into a new folder, as `read_release` and `verify_files` accept it. Files below onnx/, torchscript/ and
    openvino/ are that format's fp32 artifact; the others are the release's own."""
    for path, content in (FILES if files is None else files).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    formats = [format for format in ("torchscript", "onnx", "openvino") if (folder / format).is_dir()]
    check = {"output": "logits", "name": "cosine", "figure": 1.0, "limit": 0.999, "passed": True, "worst": "sample"}
    entries = [{"format": format, "precision": "fp32", "outputs": {}, "checks": [check]} for format in formats]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / VALIDATION).write_bytes(canonical({"schema": 1, "known": {}, "artifacts": entries}))
    found = [hash_file(folder, path) for path in sorted({*(FILES if files is None else files), VALIDATION})]
    of_format = {format: tuple(file for file in found if file.path.startswith(f"{format}/")) for format in formats}
    own = tuple(file for file in found if not file.path.startswith(tuple(f"{format}/" for format in formats)))
    manifest = manifest_of(own, of_format, name=name, release=release)
    (folder / MANIFEST).write_bytes(to_bytes(manifest))
    return from_bytes((folder / MANIFEST).read_bytes(), str(folder))


def manifest_of(
    files: tuple[File, ...],
    artifacts: Mapping[str, tuple[File, ...]] | None = None,
    *,
    name: str = "tiny",
    release: str = "1.0.0",
) -> Manifest:
    """A manifest that names these files, whether they are sound or not."""
    return Manifest(
        name=name,
        release=release,
        task="feature-extraction",
        architecture="BertModel",
        source=Source("path:checkpoint", None, "apache-2.0", (File("model.safetensors", "0" * 64, 4),)),
        signature=Signature(
            (Tensor("input_ids", "int64", ("batch", "sequence")),),
            (Tensor("last_hidden_state", "float32", ("batch", "sequence", 32)),),
        ),
        positions=512,
        left_out=(),
        artifacts=tuple(
            Artifact(format, "fp32", inside, {}, "0" * 64, fast_on=("avx2",)) for format, inside in (artifacts or {}).items()
        ),
        files=files,
        libraries={"torch": "2.13.0"},
        python="3.11.2",
        compiler="0.1.0",
        steps={},
        key="0" * 64,
    )


def start(*lines: str, environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Run lines of Python in a process of their own, with `push`, `pull`, `connect`, `Path` and `die` (kill -9) to hand."""
    program = (
        "import os, signal, time",
        "from pathlib import Path",
        "from compiler.errors import CompileError",
        "from compiler.registries import connect",
        "from compiler.stages.publish import pull, push",
        "die = lambda: os.kill(os.getpid(), signal.SIGKILL)",
        *lines,
    )
    return subprocess.Popen(
        [sys.executable, "-c", "\n".join(program)],
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(*processes: subprocess.Popen[str], code: int = 0) -> list[str]:
    """Wait for processes to end with an exit code; what each printed, without the final newline."""
    ended = [(process.communicate(timeout=60), process.returncode) for process in processes]
    for (_, stderr), returned in ended:
        assert returned == code, stderr
    return [stdout.strip() for (stdout, _), _ in ended]


def race(folder: Path, *tries: str, environment: Mapping[str, str] | None = None) -> list[str]:
    """Run lines of Python, each in a process of its own, all at the same moment. What each printed: `won`, `lost` and why."""
    gate = folder / "gate"
    processes = []
    for number, line in enumerate(tries):
        lines = (
            f"Path({str(folder / f'ready{number}')!r}).touch()",
            f"while not os.path.exists({str(gate)!r}): time.sleep(0.0005)",
            "try:",
            f"    {line}",
            "    print('won')",
            "except CompileError as error:",
            "    print('lost', error)",
        )
        processes.append(start(*lines, environment=environment))
    deadline = time.monotonic() + 60
    while len(list(folder.glob("ready*"))) < len(tries):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    gate.touch()
    answers = finish(*processes)
    for left in (gate, *folder.glob("ready*")):
        left.unlink()
    return answers


def one_line(caught: pytest.ExceptionInfo[BaseException], *words: str) -> str:
    """The one line of an error, which holds all of these words."""
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
    return message
