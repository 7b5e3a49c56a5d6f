"""Tiny hand-made releases, for tests to which the model does not matter, and processes that push and pull them at once."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from compiler.errors import RegistryError
from compiler.hashing import canonical, hash_file, hash_folder
from compiler.manifest import MANIFEST, SIGNATURE, SUMS, VALIDATION, Manifest, Source, from_bytes
from compiler.registries import Version
from compiler.stages.publish import pull, push, versions
from compiler.types import Artifact, File, Signature, Tensor
from compiler.verify import verify_files
from tests.conftest import seal

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
    seal(folder, manifest)
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
        entry={"name": name, "release": release},
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
        refused={},
    )


def signed_round_trip(url: str, folder: Path) -> None:
    """What every registry does: a signed release comes back with the same bytes and a signature that holds, is not sent
    twice, and keeps its version; only an alias moves; and a place is one model's."""
    from cryptography.hazmat.primitives.asymmetric import ec

    from compiler.signing import sign, verify_signature
    from tests.test_signing import no_password, write_key

    key = write_key(folder, "key", ec.generate_private_key(ec.SECP256R1()))
    first = make_release(folder / "first", {**FILES, "1_Pooling/config.json": b"{}"})
    sign(folder / "first", key, no_password)
    published = push(folder / "first", url, ("latest",))
    assert (published.made, published.moved) == (True, ("latest",))

    fetched, made = pull(f"{url}@latest", folder / "fetched")
    assert made
    assert hash_folder(folder / "fetched") == hash_folder(folder / "first")
    assert {MANIFEST, SUMS, SIGNATURE} < {file.path for file in hash_folder(folder / "fetched")}
    verify_files(folder / "fetched", fetched)
    verify_signature(folder / "fetched", fetched, key.with_suffix(".pub"))

    again = push(folder / "first", url, ("prod",))
    assert (again.made, again.moved, again.version.aliases) == (False, ("prod",), ("latest", "prod"))
    make_release(folder / "other", {"config.json": b"other"})
    with pytest.raises(RegistryError) as caught:
        push(folder / "other", url, ("prod",))
    one_line(caught, "1.0.0 is published already, with other content")

    make_release(folder / "stranger", name="stranger", release="2.0.0")
    with pytest.raises(RegistryError) as caught:
        push(folder / "stranger", url, ("prod",))
    one_line(caught, "is the place of tiny, this is stranger; give each model a place of its own")

    second = make_release(folder / "second", release="1.1.0")
    moved = push(folder / "second", url, ("latest", "new"))
    assert (moved.moved, moved.before) == (("latest", "new"), {"latest": "1.0.0"})
    assert versions(url) == (Version("1.0.0", first.identity, ("prod",)), Version("1.1.0", second.identity, ("latest", "new")))
    assert pull(f"{url}@prod", folder / "fetched") == (first, False)
    pull(url, folder / "unsigned")
    assert hash_folder(folder / "unsigned") == hash_folder(folder / "second")


def start(*lines: str, environment: Mapping[str, str] | None = None, stdin: int | None = None) -> subprocess.Popen[str]:
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
        stdin=stdin,
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
